// The exact Top-K keys of every centroid (eq. 1), without writing all scores:
// 1. sample_kernel scores a few keys and takes a threshold that more than K keys
//    reach, almost surely, but not many more;
// 2. collect_kernel scores all keys and keeps the candidates beyond it;
// 3. choose_kernel takes the K best of the candidates. Should the sample have
//    misled, it scores all keys of the row again.
#include <ATen/Context.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/sort.h>

#include "kernels.h"
#include "launch.cuh"
#include "scores.cuh"
#include "threshold.cuh"

namespace mmdgt::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int64_t kMaxMappedTokens = 1 << 17;  // 32 KB of shared memory

// How many keys to sample, and how many of them are to reach the threshold.
struct Plan {
  int samples;       // 0: all keys are candidates
  int fewest, most;  // samples beyond the threshold
  int capacity;      // room for candidates of a group; 0: no plan serves
};

struct Candidate {
  float score;
  uint32_t token;
};

// The i-th of kSamples keys: spread evenly, but not in step with image rows.
template <int kSamples>
__device__ __forceinline__ int sampled_token(uint32_t i, uint32_t num_tokens) {
  const uint32_t begin = static_cast<uint64_t>(i) * num_tokens / kSamples;
  const uint32_t end = (i + uint64_t{1}) * num_tokens / kSamples;
  return begin + __umulhi(i * 2654435761u, end - begin);
}

// Scores kColumns keys of one head, the i-th of which is token_at(i), by a tile of
// groups into scores[kRows][kColumns + 8], padded against bank conflicts. By all
// threads of the block, which has to wait before it reads them.
template <typename T, int D, int kRows, int kColumns, typename TokenAt>
__device__ __forceinline__ void score_rows(const CentroidOperands<T, D>& operands,
                                           const Rows<const T>& key, const Sizes& sizes,
                                           float* scores, TokenAt&& token_at) {
  constexpr int N = kTokenTiles<T, D>;
  const int lane = threadIdx.x % 32;
  for (int from = threadIdx.x / 32 * 8 * N; from < kColumns; from += blockDim.x / 4 * N) {
    RowFragment<T, D> tokens[N];
    load_tokens(tokens, key.head(), key.token_stride, sizes.dim,
                [&](int i) { return token_at(from + i); });
    float score[N][4];
    score_tokens<T, D, N>(operands, 0, tokens, score);
    if (has_infinity(score)) repair_scores(operands, 0, tokens, score);
#pragma unroll
    for (int n = 0; n < N; ++n) {
      const int column = from + 8 * n + 2 * (lane % 4);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int r = lane / 4 + 8 * half;
        if (r < kRows) {
          *reinterpret_cast<float2*>(scores + r * (kColumns + 8) + column) =
              make_float2(score[n][2 * half], score[n][2 * half + 1]);
        }
      }
    }
  }
}

// A block serves kRows groups of one head: half a warp or a warp each while the
// samples fit its registers, else the block one after the other. Fills threshold
// (B,H,G) and sets the numbers of candidates, count (B,H,G), to zero. Without
// samples everything becomes a candidate.
template <typename T, int D, int kSamples, int kRows>
__global__ void __launch_bounds__(kThreads, D * sizeof(T) > 64 ? 2
                                            : kSamples > 512   ? 3
                                                               : 4)
    sample_kernel(Rows<const T> key, const float* __restrict__ centroids,
                  Threshold* __restrict__ threshold, int* __restrict__ count, Sizes sizes,
                  Plan plan) {
  char* shared = dynamic_shared();
  __shared__ uint32_t scratch[2][kWarps];
  const CentroidOperands<T, D> operands{reinterpret_cast<FragmentA<T>*>(shared)};
  auto* scores = reinterpret_cast<float*>(shared + CentroidOperands<T, D>::kTileBytes);
  const int first = blockIdx.x * kRows;
  const int64_t row = own_head() * sizes.num_groups + first;
  const int rows = min(sizes.num_groups - first, kRows);

  if (threadIdx.x < rows) {
    count[row + threadIdx.x] = 0;
    if (plan.samples == 0) threshold[row + threadIdx.x] = {0, 0};
  }
  if (plan.samples == 0) return;
  centroids += blockIdx.y * sizes.num_groups * sizes.dim;
  operands.fill(centroids, first, 1, sizes.num_groups, sizes.dim);
  __syncthreads();
  score_rows<T, D, kRows, kSamples>(operands, key, sizes, scores, [&](int i) {
    return sampled_token<kSamples>(i, sizes.num_tokens);
  });
  __syncthreads();

  // Threads of a row: the fewer, the more rows share the cost of a step.
  constexpr int kGroup = kSamples <= 512 ? 16 : kSamples == 1024 ? 32 : kThreads;
  constexpr int kPerThread = kSamples / kGroup;
  TeamReducer<kGroup> reduce(reinterpret_cast<uint32_t (*)[(kGroup + 31) / 32]>(scratch));
  const int own = threadIdx.x % kGroup;
  for (int r = threadIdx.x / kGroup; r < rows; r += kThreads / kGroup) {
    uint32_t bits[kPerThread];
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) {
      bits[i] = candidate_bits(scores[r * (kSamples + 8) + i * kGroup + own]);
    }
    // Samples are in the order of tokens, so that their places stand for these.
    Threshold found = find_threshold<kGroup>(
        bits, kPerThread, [&](int i) { return static_cast<uint32_t>(i * kGroup + own); },
        plan.fewest, plan.most, kSamples, reduce);
    if (found.token_end > 0) {
      found.token_end =
          sampled_token<kSamples>(found.token_end - 1, sizes.num_tokens) + 1;
    }
    if (own == 0) threshold[row + r] = found;
  }
}

// index (B,H,G,K) by token, at once for up to kTokens keys. A block serves 16 groups
// of one head, a team of kTeam lanes one after the other.
template <typename T, int D, int kTokens, int kTeam>
__global__ void __launch_bounds__(kTeam * 16, kTeam == 32 ? 2 : 5)
    select_few_kernel(Rows<const T> key, const float* __restrict__ centroids,
                      int* __restrict__ index, Sizes sizes) {
  constexpr int kRows = 16;
  constexpr int kPerThread = kTokens / kTeam;
  char* shared = dynamic_shared();
  const CentroidOperands<T, D> operands{reinterpret_cast<FragmentA<T>*>(shared)};
  auto* scores = reinterpret_cast<float*>(shared + CentroidOperands<T, D>::kTileBytes);
  const int first = blockIdx.x * kRows;
  centroids += blockIdx.y * sizes.num_groups * sizes.dim;
  operands.fill(centroids, first, 1, sizes.num_groups, sizes.dim);
  __syncthreads();
  score_rows<T, D, kRows, kTokens>(operands, key, sizes, scores,
                                   [&](int i) { return i < sizes.num_tokens ? i : -1; });
  __syncthreads();

  TeamReducer<kTeam> reduce(nullptr);
  const int lane = threadIdx.x % kTeam, row = threadIdx.x / kTeam;
  const int shift = threadIdx.x % 32 - lane;  // of the team within the warp
  const bool exists = first + row < sizes.num_groups;
  uint32_t bits[kPerThread];
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) {
    const int token = kTeam * i + lane;
    bits[i] = token < sizes.num_tokens
                  ? candidate_bits(scores[row * (kTokens + 8) + token])
                  : 0;
  }
  const Threshold found = find_threshold<kTeam>(
      bits, (sizes.num_tokens + kTeam - 1) / kTeam,
      [&](int i) { return static_cast<uint32_t>(kTeam * i + lane); }, sizes.num_keys,
      sizes.num_keys, static_cast<uint32_t>(sizes.num_tokens), reduce);
  __syncwarp();
  int* own = index + (own_head() * sizes.num_groups + first + row) * sizes.num_keys;
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) {
    const bool take = exists && bits[i] != 0 && found.chooses(bits[i], kTeam * i + lane);
    unsigned taken = __ballot_sync(~0u, take) >> shift;
    if constexpr (kTeam < 32) taken &= (1u << kTeam) - 1;
    if (take) own[__popc(taken & ((1u << lane) - 1))] = kTeam * i + lane;
    own += __popc(taken);
  }
}

// Candidates (B,H,G,capacity) beyond the thresholds, in any order, and their number
// count (B,H,G), which may exceed the capacity. A block serves `chunk` keys of one
// head.
template <typename T, int D>
__global__ void __launch_bounds__(kThreads, D * sizeof(T) == 64 ? 4 : 2)
    collect_kernel(Rows<const T> key, const float* __restrict__ centroids,
                   const Threshold* __restrict__ threshold, int* __restrict__ count,
                   Candidate* __restrict__ candidates, Sizes sizes, int capacity,
                   int chunk) {
  constexpr int N = kTokenTiles<T, D>;
  char* shared = dynamic_shared();
  __shared__ Threshold limits[256];  // of all groups
  const CentroidOperands<T, D> operands{reinterpret_cast<FragmentA<T>*>(shared)};
  const int begin = blockIdx.x * chunk, end = min(begin + chunk, sizes.num_tokens);
  const int tiles = (sizes.num_groups + 15) / 16;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t row = own_head() * sizes.num_groups;
  const T* head = key.head();

  RowFragment<T, D> tokens[N];
  const auto load = [&](int first) {
    load_tokens(tokens, head, key.token_stride, sizes.dim,
                [&](int i) { return first + i < end ? first + i : -1; });
  };
  load(begin + warp * 8 * N);
  bool tied = false;
  if (threadIdx.x < sizes.num_groups) {
    limits[threadIdx.x] = threshold[row + threadIdx.x];
    tied = limits[threadIdx.x].token_end != 0;
  }
  tied = __syncthreads_or(tied);
  centroids += blockIdx.y * sizes.num_groups * sizes.dim;
  operands.fill(centroids, 0, tiles, sizes.num_groups, sizes.dim);
  __syncthreads();

  count += row;
  candidates += row * capacity;
  for (int first = begin + warp * 8 * N; first < end; first += kWarps * 8 * N) {
    const bool careful = tied || first + 8 * N > end;
    bool infinite = false;
    const uint32_t own_token = first + 2 * (lane % 4);
    for (int tile = 0; tile < tiles; ++tile) {
      float score[N][4];
      score_tokens<T, D, N>(operands, tile, tokens, score);
      if (tile == 0) infinite = has_infinity(score);
      if (infinite) repair_scores(operands, tile, tokens, score);
      uint32_t mask[2];       // one bit per key of this thread, for both its groups
      int place[2], own = 0;  // of both halves, 16 bits each
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int g = 16 * tile + lane / 4 + 8 * half;
        const bool exists = g < sizes.num_groups;
        const Threshold limit = exists ? limits[g] : Threshold{0, 0};
        const float limit_score = score_of_bits(limit.bits);
        // NaN passes every comparison here.
        mask[half] = 0;
#pragma unroll
        for (int i = 0; i < 2 * N; ++i) {
          if (!(score[i / 2][2 * half + i % 2] <= limit_score)) {
            mask[half] |= 1u << i;
          }
        }
        if (careful) {
#pragma unroll
          for (int i = 0; i < 2 * N; ++i) {
            const uint32_t token = own_token + 8 * (i / 2) + i % 2;
            if (score[i / 2][2 * half + i % 2] == limit_score &&
                token < limit.token_end) {
              mask[half] |= 1u << i;
            }
            if (token >= end) mask[half] &= ~(1u << i);
          }
        }
        if (!exists) mask[half] = 0;
        own += __popc(mask[half]) << 16 * half;
      }
      // The quad that shares the group reserves room at once.
      int sum = own;
#pragma unroll
      for (int step = 1; step < 4; step *= 2) {
        const int other = __shfl_up_sync(~0u, sum, step, 4);
        if (lane % 4 >= step) sum += other;
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int g = 16 * tile + lane / 4 + 8 * half, room = sum >> 16 * half & 0xffff;
        place[half] = 0;
        if (lane % 4 == 3 && room > 0) place[half] = atomicAdd(&count[g], room);
      }
      own = sum - own;
      if (tile + 1 == tiles) load(first + kWarps * 8 * N);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int g = 16 * tile + lane / 4 + 8 * half;
        int at = __shfl_sync(~0u, place[half], 3, 4) + (own >> 16 * half & 0xffff);
        Candidate* target = candidates + static_cast<int64_t>(g) * capacity;
#pragma unroll
        for (int i = 0; i < 2 * N; ++i) {
          const bool passes = mask[half] >> i & 1;
          ptx::store_if(passes && at < capacity, target + static_cast<uint32_t>(at),
                        __float_as_uint(score[i / 2][2 * half + i % 2]),
                        own_token + 8 * (i / 2) + i % 2);
          at += passes;
        }
      }
    }
  }
}

// Finds the K best of all keys of one head, eight bits of the threshold a pass, and
// calls choose(place, bits, token) for them in the order of tokens.
template <int kGroup, typename BitsAt, typename Choose>
__device__ void choose_from_all(BitsAt&& bits_at, int num_tokens, int num_keys,
                                uint32_t* histogram, TeamReducer<kGroup>& reduce,
                                Choose&& choose) {
  uint32_t prefix = 0;
  int needed = num_keys;  // among those that share the prefix
  for (int shift = 24; shift >= 0; shift -= 8) {
    for (int i = threadIdx.x; i < 256; i += kGroup) histogram[i] = 0;
    __syncthreads();
    for (int token = threadIdx.x; token < num_tokens; token += kGroup) {
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
  for (int first = 0; first < num_tokens; first += kGroup) {
    const int token = first + threadIdx.x;
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

// index (B,H,G,K): the K best of the candidates, in the order of choice if `sorted`,
// else by token. A block of kGroup threads serves one row. The order comes from
// sorting a list of `list_size` or, where that is 0, from a map with one bit per
// token, which is quicker but knows tokens only.
template <typename T, int kGroup, int kPerThread>
__global__ void __launch_bounds__(kGroup)
    choose_kernel(Rows<const T> key, const float* __restrict__ centroids,
                  const int* __restrict__ count, const Candidate* __restrict__ candidates,
                  int* __restrict__ index, Sizes sizes, int list_size, bool sorted) {
  constexpr int kCapacity = kGroup * kPerThread;
  char* shared = dynamic_shared();
  __shared__ uint32_t scratch[2][kGroup / 32];
  __shared__ int listed;
  auto* list = reinterpret_cast<uint64_t*>(shared);
  const int64_t row = own_head() * sizes.num_groups + blockIdx.x;
  TeamReducer<kGroup> reduce(scratch);
  const int n = count[row];
  index += row * sizes.num_keys;
  candidates += row * kCapacity;

  const auto entry = [&](uint32_t bits, uint32_t token) {
    // Ascending entries are the order asked for.
    const uint64_t rank = static_cast<uint64_t>(~bits) << 32 | token;
    return sorted ? rank : token;
  };
  if (threadIdx.x == 0) listed = 0;
  if (n < sizes.num_keys || n > kCapacity) {
    __shared__ uint32_t histogram[256];
    const float* centroid =
        centroids + (blockIdx.y * sizes.num_groups + blockIdx.x) * sizes.dim;
    const T* head = key.head();
    choose_from_all<kGroup>(
        [&](int token) {
          return candidate_bits(plain_score(key.row(head, token), centroid, sizes.dim));
        },
        sizes.num_tokens, sizes.num_keys, histogram, reduce,
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
        bits, (n + kGroup - 1) / kGroup, [&](int i) { return token[i]; }, sizes.num_keys,
        sizes.num_keys, static_cast<uint32_t>(sizes.num_tokens), reduce);
    uint32_t taken = 0;  // one bit per own candidate
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) {
      if (bits[i] != 0 && found.chooses(bits[i], token[i])) taken |= 1u << i;
    }
    const auto chosen = [&](int i) { return taken >> i & 1; };
    __syncthreads();
    if (list_size == 0) {
      const int words = (sizes.num_tokens + 31) / 32;
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
  for (int i = sizes.num_keys + threadIdx.x; i < list_size; i += kGroup) list[i] = ~0ull;
  __syncthreads();
  bitonic_sort<kGroup>(list, list_size);
  for (int i = threadIdx.x; i < sizes.num_keys; i += kGroup) {
    index[i] = static_cast<int>(static_cast<uint32_t>(list[i]));
  }
}

// The keys of the Top-K among the samples, and the candidates for a threshold taken
// from them, vary like sums of rare events. Five deviations on either side
// leave less than one row in a million that has to score again.
Plan make_plan(int64_t num_tokens, int64_t num_keys) {
  for (const int capacity : {512, 4096, 8192}) {
    if (num_tokens <= std::min(capacity, 1024)) return {0, 0, 0, capacity};
    for (int samples = 512; samples <= 8192 && samples * 2 <= num_tokens; samples *= 2) {
      const double ratio = static_cast<double>(num_tokens) / samples;
      const double mean = num_keys / ratio, unseen = 1. - 1. / ratio;
      const int fewest = static_cast<int>(mean + 5. * std::sqrt(mean * unseen) + 4.);
      const int most = fewest + fewest / 5 + 1;
      if (most < samples && ratio * (most + 5. * std::sqrt(most * unseen)) <= capacity) {
        return {samples, fewest, most, capacity};
      }
    }
    if (num_tokens <= capacity) return {0, 0, 0, capacity};
  }
  return {0, 0, 0, 0};
}

// For many keys of many, or little shared memory: sort all scores, one image at a time.
at::Tensor select_by_sorting(const at::Tensor& key, const at::Tensor& centroids,
                             int64_t num_keys) {
  const at::NoTF32Guard no_tf32;  // scores decide
  at::Tensor index = at::empty({key.size(0), key.size(1), centroids.size(1), num_keys},
                               key.options().dtype(at::kInt));
  for (int64_t b = 0; b < key.size(0); ++b) {
    // Adding zero makes -0 equal to +0.
    const at::Tensor scores = at::matmul(centroids, key[b].to(at::kFloat).mT()).add_(0.f);
    index[b].copy_(std::get<1>(at::sort(scores, true, -1, true)).narrow(-1, 0, num_keys));
  }
  return index;
}

}  // namespace

at::Tensor select_keys_cuda(const at::Tensor& key, const at::Tensor& centroids,
                            int64_t num_keys, bool sorted) {
  const c10::DeviceGuard guard(key.device());
  const int64_t B = key.size(0), H = key.size(1), L = key.size(2);
  const int64_t G = centroids.size(1);
  const Plan plan = make_plan(L, num_keys);
  size_t shared_bytes = 0;  // of the kernel that needs most
  dispatch_tokens(key, [&](auto type, auto width) {
    using T = typename decltype(type)::type;
    shared_bytes = CentroidOperands<T, decltype(width)::value>::bytes(G);
  });
  if (plan.capacity == 0 || !fits(shared_bytes)) {
    return select_by_sorting(key, centroids, num_keys);
  }
  const auto ints = key.options().dtype(at::kInt);
  at::Tensor index = at::empty({B, H, G, num_keys}, ints);
  if (index.numel() == 0) return index;

  const at::Tensor rows = aligned_rows(key);
  const at::Tensor own = aligned_centroids(centroids);
  const float* centroid = own.const_data_ptr<float>();
  const Sizes sizes(key, G, num_keys);
  if (L <= 1024 && !sorted) {
    dispatch_tokens(rows, [&](auto type, auto width) {
      using T = typename decltype(type)::type;
      constexpr int kWidth = decltype(width)::value;
      const auto select = [&](auto most, auto team) {
        constexpr int kTokens = decltype(most)::value;
        constexpr int kTeam = decltype(team)::value;
        launch(
            select_few_kernel<T, kWidth, kTokens, kTeam>,
            grid_of_heads(ceil_div(G, 16), key), 16 * kTeam,
            CentroidOperands<T, kWidth>::kTileBytes + 16 * (kTokens + 8) * sizeof(float),
            Rows<const T>(rows), centroid, index.mutable_data_ptr<int>(), sizes);
      };
      if (L <= 256) {
        return select(std::integral_constant<int, 256>(),
                      std::integral_constant<int, 8>());
      }
      select(std::integral_constant<int, 1024>(), std::integral_constant<int, 32>());
    });
    return index;
  }
  const at::Tensor count = at::empty({B, H, G}, ints);
  const at::Tensor thresholds = at::empty({B, H, G, 2}, ints);
  const at::Tensor candidates = at::empty({B, H, G, plan.capacity, 2}, ints);
  auto* threshold = static_cast<Threshold*>(thresholds.data_ptr());
  auto* candidate = static_cast<Candidate*>(candidates.data_ptr());
  dispatch_tokens(rows, [&](auto type, auto width) {
    using T = typename decltype(type)::type;
    constexpr int kWidth = decltype(width)::value;
    using Operands = CentroidOperands<T, kWidth>;
    const Rows<const T> k(rows);

    const auto sample = [&](auto samples, auto served) {
      constexpr int kSamples = decltype(samples)::value;
      constexpr int kRows = decltype(served)::value;
      launch(sample_kernel<T, kWidth, kSamples, kRows>,
             grid_of_heads(ceil_div(G, kRows), key), kThreads,
             Operands::kTileBytes + kRows * (kSamples + 8) * sizeof(float), k, centroid,
             threshold, count.mutable_data_ptr<int>(), sizes, plan);
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

    const int64_t chunk = tokens_per_block(L, B * H, kWarps * 8 * kTokenTiles<T, kWidth>);
    launch(collect_kernel<T, kWidth>, grid_of_heads(ceil_div(L, chunk), key), kThreads,
           Operands::bytes(G), k, centroid, threshold, count.mutable_data_ptr<int>(),
           candidate, sizes, plan.capacity, static_cast<int>(chunk));

    int list_size = 0;
    if (sorted || L > kMaxMappedTokens) {
      list_size = 32;
      while (list_size < num_keys) list_size *= 2;
    }
    const size_t bytes = list_size > 0 ? list_size * sizeof(uint64_t)
                                       : 2 * ceil_div(L, 32) * sizeof(uint32_t);
    const auto choose = [&](auto kernel, int threads) {
      launch(kernel, grid_of_heads(G, key), threads, bytes, k, centroid,
             count.const_data_ptr<int>(), candidate, index.mutable_data_ptr<int>(), sizes,
             list_size, sorted);
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

}  // namespace mmdgt::cuda
