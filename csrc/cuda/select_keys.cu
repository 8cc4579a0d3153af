// The exact Top-K keys of every centroid (eq. 1), without writing all scores:
// 1. sample_kernel scores a few keys and takes a threshold that more than K keys
//    reach, almost surely, but not many more;
// 2. collect_kernel scores all keys and keeps the candidates beyond it;
// 3. choose_kernel takes the K best of the candidates. Should the sample have
//    misled, it scores all keys of the row again.
#include <ATen/ops/empty.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/sort.h>

#include "../dynamic_group_attention.h"
#include "launch.cuh"
#include "scores.cuh"
#include "threshold.cuh"

namespace mmdgt {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int64_t kMaxMappedTokens = 1 << 17;  // 32 KB of shared memory

struct Candidate {
  float score;
  uint32_t token;
};

// The i-th of `samples` keys: spread evenly, but not in step with image rows.
__device__ __forceinline__ int64_t sampled_token(int i, int samples,
                                                 int64_t num_tokens) {
  const int64_t begin = i * num_tokens / samples;
  const int64_t end = (i + 1) * num_tokens / samples;
  return begin + (i * 2654435761u >> 8) % static_cast<uint32_t>(end - begin);
}

// A block serves kRows groups of one head: a warp each while the samples fit its
// registers, else the block one after the other. Fills threshold (BH,G) and sets
// the numbers of candidates, count (BH,G), to zero. Without samples everything
// becomes a candidate.
template <typename T, int D, int kSamples, int kRows>
__global__ void __launch_bounds__(kThreads)
    sample_kernel(Rows<const T> key, const float* __restrict__ centroids,
                  Threshold* __restrict__ threshold, int* __restrict__ count,
                  int64_t num_tokens, int num_groups, int dim, int samples,
                  int fewest, int most) {
  constexpr int N = kTokenTiles<T, D>;
  constexpr int kStride = kSamples + 8;  // against bank conflicts
  extern __shared__ __align__(16) char shared[];
  __shared__ uint32_t scratch[2][kWarps];
  const CentroidOperands<T, D> operands{reinterpret_cast<FragmentA<T>*>(shared)};
  float* scores = reinterpret_cast<float*>(
      shared + CentroidOperands<T, D>::kTileBytes);  // [kRows][kStride]
  const int blocks = (num_groups + kRows - 1) / kRows;
  const int bh = blockIdx.x / blocks, first = blockIdx.x % blocks * kRows;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t row = static_cast<int64_t>(bh) * num_groups + first;
  const int rows = min(num_groups - first, kRows);

  if (threadIdx.x < rows) {
    count[row + threadIdx.x] = 0;
    if (samples == 0) threshold[row + threadIdx.x] = {0, 0};
  }
  if (samples == 0) return;
  operands.fill(
      centroids + static_cast<int64_t>(bh % key.heads) * num_groups * dim, first,
      1, num_groups, dim);
  __syncthreads();
  for (int from = warp * 8 * N; from < kSamples; from += kWarps * 8 * N) {
    RowFragment<T, D> tokens[N];
    load_tokens(tokens, key.head(bh), key.token_stride, dim, [&](int i) {
      return sampled_token(from + i, kSamples, num_tokens);
    });
    float score[N][4];
    score_tokens<T, D, N>(operands, 0, tokens, score);
#pragma unroll
    for (int n = 0; n < N; ++n) {
      const int column = from + 8 * n + 2 * (lane % 4);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int r = lane / 4 + 8 * half;
        if (r < kRows) {
          *reinterpret_cast<float2*>(scores + r * kStride + column) =
              make_float2(score[n][2 * half], score[n][2 * half + 1]);
        }
      }
    }
  }
  __syncthreads();

  constexpr int kGroup = kSamples <= 1024 ? 32 : kThreads;  // threads of a row
  constexpr int kPerThread = kSamples / kGroup;
  BlockReducer<kGroup> reduce(
      reinterpret_cast<uint32_t(*)[kGroup / 32]>(scratch));
  const int own = threadIdx.x % kGroup;
  for (int r = threadIdx.x / kGroup; r < rows; r += kThreads / kGroup) {
    uint32_t bits[kPerThread];
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) {
      bits[i] = candidate_bits(scores[r * kStride + i * kGroup + own]);
    }
    const Threshold found = find_threshold<kGroup>(
        bits,
        [&](int i) {
          return static_cast<uint32_t>(
              sampled_token(i * kGroup + own, kSamples, num_tokens));
        },
        fewest, most, static_cast<uint32_t>(num_tokens), reduce);
    if (own == 0) threshold[row + r] = found;
  }
}

// Candidates (BH,G,capacity) beyond the thresholds, in any order, and their number
// count (BH,G), which may exceed the capacity. A block serves `chunk` keys of one
// head.
template <typename T, int D>
__global__ void __launch_bounds__(kThreads, 2)
    collect_kernel(Rows<const T> key, const float* __restrict__ centroids,
                   const Threshold* __restrict__ threshold,
                   int* __restrict__ count, Candidate* __restrict__ candidates,
                   int64_t num_tokens, int num_groups, int dim, int capacity,
                   int chunk, int chunks) {
  constexpr int N = kTokenTiles<T, D>;
  extern __shared__ __align__(16) char shared[];
  __shared__ Threshold limits[256];  // of all groups
  const CentroidOperands<T, D> operands{reinterpret_cast<FragmentA<T>*>(shared)};
  const int bh = blockIdx.x / chunks;
  const int64_t begin = static_cast<int64_t>(blockIdx.x % chunks) * chunk;
  const int64_t end = min(begin + chunk, num_tokens);
  const int tiles = (num_groups + 15) / 16;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t row = static_cast<int64_t>(bh) * num_groups;

  bool tied = false;
  if (threadIdx.x < num_groups) {
    limits[threadIdx.x] = threshold[row + threadIdx.x];
    tied = limits[threadIdx.x].token_end != 0;
  }
  tied = __syncthreads_or(tied);
  operands.fill(
      centroids + static_cast<int64_t>(bh % key.heads) * num_groups * dim, 0,
      tiles, num_groups, dim);
  __syncthreads();

  for (int64_t first = begin + warp * 8 * N; first < end;
       first += kWarps * 8 * N) {
    RowFragment<T, D> tokens[N];
    load_tokens(tokens, key.head(bh), key.token_stride, dim, [&](int i) {
      return first + i < end ? first + i : int64_t{-1};
    });
    const bool careful = tied || first + 8 * N > end;
    const uint32_t own_token = static_cast<uint32_t>(first) + 2 * (lane % 4);
    for (int tile = 0; tile < tiles; ++tile) {
      float score[N][4];
      score_tokens<T, D, N>(operands, tile, tokens, score);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int g = 16 * tile + lane / 4 + 8 * half;
        const bool exists = g < num_groups;
        const Threshold limit = exists ? limits[g] : Threshold{0, 0};
        const float limit_score = score_of_bits(limit.bits);
        // One bit per key of this thread. NaN passes every comparison here.
        uint32_t mask = 0;
#pragma unroll
        for (int i = 0; i < 2 * N; ++i) {
          if (!(score[i / 2][2 * half + i % 2] <= limit_score)) mask |= 1u << i;
        }
        if (careful) {
#pragma unroll
          for (int i = 0; i < 2 * N; ++i) {
            const uint32_t token = own_token + 8 * (i / 2) + i % 2;
            if (score[i / 2][2 * half + i % 2] == limit_score &&
                token < limit.token_end) {
              mask |= 1u << i;
            }
            if (token >= end) mask &= ~(1u << i);
          }
        }
        if (!exists) mask = 0;
        // The quad that shares the group reserves room at once.
        const int own = __popc(mask);
        int sum = own;
#pragma unroll
        for (int step = 1; step < 4; step *= 2) {
          const int other = __shfl_up_sync(~0u, sum, step, 4);
          if (lane % 4 >= step) sum += other;
        }
        int place = 0;
        if (lane % 4 == 3 && sum > 0) place = atomicAdd(&count[row + g], sum);
        place = __shfl_sync(~0u, place, 3, 4) + sum - own;
        Candidate* target = candidates + (row + g) * capacity;
#pragma unroll
        for (int i = 0; i < 2 * N; ++i) {
          if (mask >> i & 1) {
            if (place < capacity) {
              target[place] = {score[i / 2][2 * half + i % 2],
                               own_token + 8 * (i / 2) + i % 2};
            }
            ++place;
          }
        }
      }
    }
  }
}

// The score of one key as plain multiply-adds.
template <typename T>
__device__ float plain_score(const T* key, const float* centroid, int dim) {
  float sum = 0.f;
  for (int c = 0; c < dim; c += 8) {
    Pair<T> pairs[4];
#pragma unroll
    for (int v = 0; v < static_cast<int>(sizeof(Pair<T>) / 4); ++v) {
      reinterpret_cast<uint4*>(pairs)[v] =
          __ldg(reinterpret_cast<const uint4*>(key + c) + v);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 x = unpack<T>(pairs[i]);
      sum = fmaf(x.x, centroid[c + 2 * i], sum);
      sum = fmaf(x.y, centroid[c + 2 * i + 1], sum);
    }
  }
  return sum;
}

// Finds the K best of all keys of one head, eight bits of the threshold a pass, and
// calls choose(place, bits, token) for them in the order of tokens.
template <int kGroup, typename BitsAt, typename Choose>
__device__ void choose_from_all(BitsAt&& bits_at, int64_t num_tokens, int num_keys,
                                uint32_t* histogram, BlockReducer<kGroup>& reduce,
                                Choose&& choose) {
  uint32_t prefix = 0;
  int needed = num_keys;  // among those that share the prefix
  for (int shift = 24; shift >= 0; shift -= 8) {
    for (int i = threadIdx.x; i < 256; i += kGroup) histogram[i] = 0;
    __syncthreads();
    for (int64_t token = threadIdx.x; token < num_tokens; token += kGroup) {
      const uint32_t bits = bits_at(token);
      if (shift == 24 || bits >> (shift + 8) == prefix) {
        atomicAdd(&histogram[bits >> shift & 255], 1);
      }
    }
    __syncthreads();
    int digit = 255;
    while (digit > 0 && needed > static_cast<int>(histogram[digit])) {
      needed -= histogram[digit--];
    }
    prefix = prefix << 8 | digit;
    __syncthreads();
  }
  int chosen = 0, tied = 0;
  for (int64_t first = 0; first < num_tokens; first += kGroup) {
    const int64_t token = first + threadIdx.x;
    const uint32_t bits = token < num_tokens ? bits_at(token) : 0;
    const bool equal = token < num_tokens && bits == prefix;
    const int before = tied + reduce.exclusive_sum(equal);
    tied += reduce.sum(equal);
    const bool take = bits > prefix || (equal && before < needed);
    const int place = chosen + reduce.exclusive_sum(take);
    chosen += reduce.sum(take);
    if (take) choose(place, bits, static_cast<uint32_t>(token));
  }
}

// Sorts list[size], a power of two, in ascending order.
template <int kGroup>
__device__ void bitonic_sort(uint64_t* list, int list_size) {
  for (int size = 2; size <= list_size; size *= 2) {
    for (int stride = size / 2; stride > 0; stride /= 2) {
      for (int i = threadIdx.x; i < list_size / 2; i += kGroup) {
        const int low = i / stride * stride * 2 + i % stride, high = low + stride;
        const bool ascending = (low & size) == 0;
        const uint64_t a = list[low], b = list[high];
        if ((a > b) == ascending) {
          list[low] = b;
          list[high] = a;
        }
      }
      __syncthreads();
    }
  }
}

// index (BH,G,K): the K best of the candidates, in the order of choice if `sorted`,
// else by token. A block of kGroup threads serves one row. The order comes from
// sorting a list of `list_size` or, where that is 0, from a map with one bit per
// token, which is quicker but knows tokens only.
template <typename T, int kGroup, int kPerThread>
__global__ void __launch_bounds__(kGroup)
    choose_kernel(Rows<const T> key, const float* __restrict__ centroids,
                  const int* __restrict__ count,
                  const Candidate* __restrict__ candidates,
                  int* __restrict__ index, int64_t num_tokens, int num_groups,
                  int num_keys, int dim, int list_size, bool sorted) {
  constexpr int kCapacity = kGroup * kPerThread;
  extern __shared__ __align__(16) char shared[];
  __shared__ uint32_t scratch[2][kGroup / 32];
  __shared__ int listed;
  auto* list = reinterpret_cast<uint64_t*>(shared);
  const int64_t row = blockIdx.x;
  BlockReducer<kGroup> reduce(scratch);
  const int n = count[row];
  index += row * num_keys;
  candidates += row * kCapacity;

  const auto entry = [&](uint32_t bits, uint32_t token) {
    // Ascending entries are the order asked for.
    const uint64_t rank = static_cast<uint64_t>(~bits) << 32 | token;
    return sorted ? rank : token;
  };
  if (threadIdx.x == 0) listed = 0;
  if (n < num_keys || n > kCapacity) {
    __shared__ uint32_t histogram[256];
    const int bh = static_cast<int>(row / num_groups);
    const float* centroid =
        centroids +
        (static_cast<int64_t>(bh % key.heads) * num_groups + row % num_groups) * dim;
    const T* head = key.head(bh);
    choose_from_all<kGroup>(
        [&](int64_t token) {
          return candidate_bits(
              plain_score(head + token * key.token_stride, centroid, dim));
        },
        num_tokens, num_keys, histogram, reduce,
        [&](int place, uint32_t bits, uint32_t token) {
          if (list_size > 0) {
            list[place] = entry(bits, token);
          } else {
            index[place] = static_cast<int>(token);
          }
        });
    if (list_size == 0) return;
  } else {
    uint32_t bits[kPerThread], token[kPerThread];
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) {
      const int at = i * kGroup + threadIdx.x;
      bits[i] = token[i] = 0;
      if (at < n) {
        const Candidate candidate = candidates[at];
        bits[i] = candidate_bits(candidate.score);
        token[i] = candidate.token;
      }
    }
    const Threshold found = find_threshold<kGroup>(
        bits, [&](int i) { return token[i]; }, num_keys, num_keys,
        static_cast<uint32_t>(num_tokens), reduce);
    const auto chosen = [&](int i) {
      return bits[i] != 0 && found.chooses(bits[i], token[i]);
    };
    __syncthreads();
    if (list_size == 0) {
      const int words = static_cast<int>((num_tokens + 31) / 32);
      const int share = (words + kGroup - 1) / kGroup;
      const int first = min(static_cast<int>(threadIdx.x) * share, words);
      const int last = min(first + share, words);
      auto* map = reinterpret_cast<uint32_t*>(shared);
      uint32_t* before = map + words;  // chosen tokens in the words before
      for (int w = threadIdx.x; w < words; w += kGroup) map[w] = 0;
      __syncthreads();
#pragma unroll
      for (int i = 0; i < kPerThread; ++i) {
        if (chosen(i)) atomicOr(&map[token[i] / 32], 1u << token[i] % 32);
      }
      __syncthreads();
      int sum = 0;
      for (int w = first; w < last; ++w) sum += __popc(map[w]);
      sum = reduce.exclusive_sum(sum);
      for (int w = first; w < last; ++w) {
        before[w] = sum;
        sum += __popc(map[w]);
      }
      __syncthreads();
#pragma unroll
      for (int i = 0; i < kPerThread; ++i) {
        if (!chosen(i)) continue;
        const int w = token[i] / 32;
        const uint32_t lower = map[w] & ((1u << token[i] % 32) - 1);
        index[before[w] + __popc(lower)] = static_cast<int>(token[i]);
      }
      return;
    }
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) {
      if (chosen(i)) list[atomicAdd(&listed, 1)] = entry(bits[i], token[i]);
    }
  }
  for (int i = num_keys + threadIdx.x; i < list_size; i += kGroup) list[i] = ~0ull;
  __syncthreads();
  bitonic_sort<kGroup>(list, list_size);
  for (int i = threadIdx.x; i < num_keys; i += kGroup) {
    index[i] = static_cast<int>(static_cast<uint32_t>(list[i]));
  }
}

// How many keys to sample, and how many of them are to reach the threshold.
struct Plan {
  int samples;       // 0: all keys are candidates
  int fewest, most;  // samples beyond the threshold
  int capacity;      // room for candidates of a group; 0: no plan serves
};

// The keys of the Top-K among the samples, and the candidates for a threshold taken
// from them, vary like sums of rare events. Five to six deviations on either side
// leave less than one row in a million that has to score again.
Plan make_plan(int64_t num_tokens, int64_t num_keys) {
  for (const int capacity : {512, 4096, 8192}) {
    if (num_tokens <= std::min(capacity, 1024)) return {0, 0, 0, capacity};
    for (int samples = 512; samples <= 8192 && samples * 2 <= num_tokens;
         samples *= 2) {
      const double ratio = static_cast<double>(num_tokens) / samples;
      const double mean = num_keys / ratio, unseen = 1. - 1. / ratio;
      const int fewest = static_cast<int>(mean + 5. * std::sqrt(mean * unseen) + 4.);
      const int most = fewest + fewest / 10 + 1;
      if (most < samples &&
          ratio * (most + 6. * std::sqrt(most * unseen)) <= capacity) {
        return {samples, fewest, most, capacity};
      }
    }
    if (num_tokens <= capacity) return {0, 0, 0, capacity};
  }
  return {0, 0, 0, 0};
}

// For many keys of many: sort all scores, one image at a time.
at::Tensor select_by_sorting(const at::Tensor& key, const at::Tensor& centroids,
                             int64_t num_keys) {
  at::Tensor index = at::empty(
      {key.size(0), key.size(1), centroids.size(1), num_keys},
      key.options().dtype(at::kInt));
  for (int64_t b = 0; b < key.size(0); ++b) {
    // Adding zero makes -0 equal to +0.
    const at::Tensor scores =
        at::matmul(centroids, key[b].to(at::kFloat).mT()).add_(0.f);
    index[b].copy_(std::get<1>(at::sort(scores, true, -1, true))
                       .narrow(-1, 0, num_keys));
  }
  return index;
}

at::Tensor select_keys_cuda(const at::Tensor& key, const at::Tensor& centroids,
                            int64_t num_keys, bool sorted) {
  const c10::cuda::CUDAGuard guard(key.device());
  const int64_t heads = key.size(0) * key.size(1), L = key.size(2);
  const int64_t G = centroids.size(1), D = key.size(3);
  const Plan plan = make_plan(L, num_keys);
  if (plan.capacity == 0) return select_by_sorting(key, centroids, num_keys);
  const auto ints = key.options().dtype(at::kInt);
  at::Tensor index = at::empty({key.size(0), key.size(1), G, num_keys}, ints);
  if (index.numel() == 0) return index;

  const at::Tensor rows = aligned_rows(key);
  const at::Tensor count = at::empty({heads, G}, ints);
  const at::Tensor thresholds = at::empty({heads, G, 2}, ints);
  const at::Tensor candidates = at::empty({heads, G, plan.capacity, 2}, ints);
  auto* threshold = static_cast<Threshold*>(thresholds.data_ptr());
  auto* candidate = static_cast<Candidate*>(candidates.data_ptr());
  const float* centroid = centroids.const_data_ptr<float>();
  const int groups = static_cast<int>(G), keys = static_cast<int>(num_keys);
  const int dim = static_cast<int>(D);
  const int64_t processors =
      at::cuda::getCurrentDeviceProperties()->multiProcessorCount;
  dispatch_tokens(rows, [&](auto type, auto width) {
    using T = typename decltype(type)::type;
    constexpr int kWidth = decltype(width)::value;
    using Operands = CentroidOperands<T, kWidth>;
    const Rows<const T> k(rows);

    const auto sample = [&](auto samples, auto served) {
      constexpr int kSamples = decltype(samples)::value;
      constexpr int kRows = decltype(served)::value;
      launch(sample_kernel<T, kWidth, kSamples, kRows>,
             heads * ceil_div(G, kRows), kThreads,
             Operands::kTileBytes + kRows * (kSamples + 8) * sizeof(float), k,
             centroid, threshold, count.mutable_data_ptr<int>(), L, groups, dim,
             plan.samples, plan.fewest, plan.most);
    };
    if (plan.samples <= 512) {
      sample(std::integral_constant<int, 512>(), std::integral_constant<int, 16>());
    } else if (plan.samples == 1024) {
      sample(std::integral_constant<int, 1024>(), std::integral_constant<int, 16>());
    } else if (plan.samples == 2048) {
      sample(std::integral_constant<int, 2048>(), std::integral_constant<int, 8>());
    } else if (plan.samples == 4096) {
      sample(std::integral_constant<int, 4096>(), std::integral_constant<int, 4>());
    } else {
      sample(std::integral_constant<int, 8192>(), std::integral_constant<int, 2>());
    }

    // As many keys a block as leave every multiprocessor four blocks.
    const int64_t step = kWarps * 8 * kTokenTiles<T, kWidth>;
    const int64_t steps =
        std::clamp<int64_t>(heads * L / (step * processors * 4), 1, 8);
    const int64_t chunks = ceil_div(L, step * steps);
    launch(collect_kernel<T, kWidth>, heads * chunks, kThreads, Operands::bytes(G),
           k, centroid, threshold, count.mutable_data_ptr<int>(), candidate, L,
           groups, dim, plan.capacity, static_cast<int>(step * steps),
           static_cast<int>(chunks));

    int list_size = 0;
    if (sorted || L > kMaxMappedTokens) {
      list_size = 32;
      while (list_size < num_keys) list_size *= 2;
    }
    const size_t bytes = list_size > 0 ? list_size * sizeof(uint64_t)
                                       : 2 * ceil_div(L, 32) * sizeof(uint32_t);
    const auto choose = [&](auto kernel, int threads) {
      launch(kernel, heads * G, threads, bytes, k, centroid,
             count.const_data_ptr<int>(), candidate, index.mutable_data_ptr<int>(),
             L, groups, keys, dim, list_size, sorted);
    };
    if (plan.capacity == 512) {
      choose(choose_kernel<T, 32, 16>, 32);
    } else if (plan.capacity == 4096) {
      choose(choose_kernel<T, 256, 16>, 256);
    } else {
      choose(choose_kernel<T, 256, 32>, 256);
    }
  });
  return index;
}

}  // namespace

REGISTER_DEVICE_IMPL(select_keys_impl, CUDA, select_keys_cuda);

}  // namespace mmdgt
