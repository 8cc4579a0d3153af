// Assignment of queries to groups, and the sums of eq. 3.
#include "../dynamic_group_attention.h"
#include "launch.cuh"
#include "scores.cuh"

namespace mmdgt {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;

// One step of a reduction over the lanes that hold the groups: halves the columns
// that a lane is responsible for, as long as there are several.
template <int kBit, int kColumns, int kAll>
__device__ __forceinline__ void reduce_columns(float (&best)[kAll], int (&group)[kAll],
                                               int& column) {
  constexpr int kKept = kColumns > 1 ? kColumns / 2 : 1;
  const bool upper = kColumns > 1 && (threadIdx.x & kBit);
#pragma unroll
  for (int i = 0; i < kKept; ++i) {
    constexpr int kOther = kColumns > 1 ? kKept : 0;
    const float sent = upper ? best[i] : best[i + kOther];
    const int sent_group = upper ? group[i] : group[i + kOther];
    if (upper) {
      best[i] = best[i + kOther];
      group[i] = group[i + kOther];
    }
    const float other = __shfl_xor_sync(~0u, sent, kBit);
    const int other_group = __shfl_xor_sync(~0u, sent_group, kBit);
    // The lowest group wins a tie.
    if (other > best[i] || (other == best[i] && other_group < group[i])) {
      best[i] = other;
      group[i] = other_group;
    }
  }
  if (upper) column += kKept;
}

// query (B,H,L,D), centroids (H,G,D) -> group (B,H,L). A block serves `chunk`
// tokens of one head of one image.
template <typename T, int D>
__global__ void __launch_bounds__(kThreads, D * sizeof(T) == 64 ? 4 : 1)
    assign_kernel(Rows<const T> query, const float* __restrict__ centroids,
                  int* __restrict__ group, int num_tokens, int num_groups, int dim,
                  int chunk) {
  constexpr int N = kTokenTiles<T, D>;
  char* shared = dynamic_shared();
  __shared__ int nan_group;  // the first centroid with a NaN, which beats all
  const CentroidOperands<T, D> operands{reinterpret_cast<FragmentA<T>*>(shared)};
  const int begin = blockIdx.x * chunk, end = min(begin + chunk, num_tokens);
  const T* head = query.head();
  const int tiles = (num_groups + 15) / 16;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;

  RowFragment<T, D> tokens[N];
  const auto load = [&](int first) {
    load_tokens(tokens, head, query.token_stride, dim,
                [&](int i) { return first + i < end ? first + i : -1; });
  };
  load(begin + warp * 8 * N);
  if (threadIdx.x == 0) nan_group = num_groups;
  __syncthreads();
  operands.fill(centroids + blockIdx.y * num_groups * dim, 0, tiles, num_groups, dim,
                &nan_group);
  __syncthreads();

  group += own_head() * num_tokens;
  for (int first = begin + warp * 8 * N; first < end; first += kWarps * 8 * N) {
    float best[2 * N];
    int best_group[2 * N];
#pragma unroll
    for (int i = 0; i < 2 * N; ++i) {
      best[i] = -INFINITY;
      best_group[i] = 0;
    }
    for (int tile = 0; tile < tiles; ++tile) {
      float score[N][4];
      score_tokens<T, D, N>(operands, tile, tokens, score);
      const int low = 16 * tile + lane / 4;
#pragma unroll
      for (int i = 0; i < 2 * N; ++i) {
        if (score[i / 2][i % 2] > best[i]) {
          best[i] = score[i / 2][i % 2];
          best_group[i] = low;
        }
        if (score[i / 2][2 + i % 2] > best[i]) {
          best[i] = score[i / 2][2 + i % 2];
          best_group[i] = low + 8;
        }
      }
    }
    load(first + kWarps * 8 * N);  // arrives during the reductions
    int column = 0;
    reduce_columns<16, 2 * N>(best, best_group, column);
    reduce_columns<8, (2 * N > 2 ? N : 1)>(best, best_group, column);
    reduce_columns<4, (2 * N > 4 ? N / 2 : 1)>(best, best_group, column);
#pragma unroll
    for (int i = 0; i < (2 * N > 8 ? N / 4 : 1); ++i) {
      const int c = column + i;
      const int token = first + 8 * (c / 2) + 2 * (lane % 4) + c % 2;
      if (token < end) {
        group[token] = nan_group < num_groups ? nan_group : best_group[i];
      }
    }
  }
}

// The terms of eq. 3: sums (P,H,G,D) of normalised queries and counts (P,H,G),
// P parts of the tokens of all images. A warp adds up in its own shared memory,
// 32 elements of D wide, so that the order of summation is fixed.
template <typename T, int D>
__global__ void __launch_bounds__(kThreads, 4)
    sum_kernel(Rows<const T> query, const int* __restrict__ group,
               float* __restrict__ sums, int* __restrict__ counts, int batch,
               int num_tokens, int num_groups, int dim, int parts) {
  char* shared = dynamic_shared();
  const int warps = blockDim.x / 32;
  auto* all_sums = reinterpret_cast<float*>(shared);  // [warp][G][32]
  auto* all_counts = reinterpret_cast<int*>(all_sums + warps * num_groups * 32);
  const int slice = blockIdx.x / parts, part = blockIdx.x % parts;
  const int head = blockIdx.y, heads = gridDim.y;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int column = 32 * slice + lane;

  for (int i = threadIdx.x; i < warps * num_groups * 32; i += blockDim.x) {
    all_sums[i] = 0.f;
  }
  for (int i = threadIdx.x; i < num_groups; i += blockDim.x) all_counts[i] = 0;
  __syncthreads();

  float* own = all_sums + warp * num_groups * 32 + lane;
  const int runs = (num_tokens + 31) / 32;  // of 32 tokens, in an image
  int b = 0, run = part * warps + warp;
  while (true) {
    for (; run >= runs && b < batch; ++b) run -= runs;
    if (b >= batch) break;
    const int first = 32 * run;
    const int count = min(num_tokens - first, 32);
    const T* rows = query.row(query.head(b, head), first);
    int own_group = 0;
    float own_factor = 0.f;  // 1 / max(|q|, 1e-12) of this lane's token
    if (lane < count) {
      own_group =
          group[(static_cast<int64_t>(b) * heads + head) * num_tokens + first + lane];
      const T* row = rows + static_cast<int64_t>(lane) * query.token_stride;
      float square = 0.f;
#pragma unroll
      for (int c = 0; c < D; c += 8) {
        if (c >= dim) break;
        Pair<T> pairs[4];
#pragma unroll
        for (int v = 0; v < static_cast<int>(sizeof(Pair<T>) / 4); ++v) {
          reinterpret_cast<uint4*>(pairs)[v] =
              __ldg(reinterpret_cast<const uint4*>(row + c) + v);
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float2 x = unpack<T>(pairs[i]);
          square += x.x * x.x + x.y * x.y;
        }
      }
      own_factor = 1.f / fmaxf(sqrtf(square), 1e-12f);
      if (isnan(square)) own_factor = square;  // fmaxf would hide it
      if (slice == 0) atomicAdd(&all_counts[own_group], 1);
    }
    const T* element = rows + (column < dim ? column : 0);
    const auto add = [&](int t) {
      const int g = __shfl_sync(~0u, own_group, t);
      const float factor = __shfl_sync(~0u, own_factor, t);
      own[g * 32] += to_float(__ldg(element)) * factor;
      element += query.token_stride;
    };
    if (count == 32) {
#pragma unroll 16
      for (int t = 0; t < 32; ++t) add(t);
    } else {
      for (int t = 0; t < count; ++t) add(t);
    }
    run += parts * warps;
  }
  __syncthreads();

  const int64_t out = (static_cast<int64_t>(part) * heads + head) * num_groups;
  for (int i = threadIdx.x; i < num_groups * 32; i += blockDim.x) {
    float sum = 0.f;
    for (int w = 0; w < warps; ++w) sum += all_sums[w * num_groups * 32 + i];
    const int c = 32 * slice + i % 32;
    if (c < dim) sums[(out + i / 32) * dim + c] = sum;
  }
  if (slice == 0) {
    for (int i = threadIdx.x; i < num_groups; i += blockDim.x) {
      counts[out + i] = all_counts[i];
    }
  }
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> assign_queries_cuda(
    const at::Tensor& query, const at::Tensor& centroids, bool with_sums) {
  const c10::DeviceGuard guard(query.device());
  const int64_t B = query.size(0), H = query.size(1), L = query.size(2);
  const int64_t G = centroids.size(1), D = query.size(3);
  const auto ints = query.options().dtype(at::kInt);
  const auto floats = query.options().dtype(at::kFloat);
  at::Tensor group = at::empty({B, H, L}, ints);
  at::Tensor sums = at::empty({0}, floats), counts = at::empty({0}, ints);
  if (with_sums && group.numel() == 0) {
    sums = at::zeros({H, G, D}, floats);
    counts = at::zeros({H, G}, ints);
  }
  if (group.numel() == 0) return {group, sums, counts};

  const at::Tensor rows = aligned_rows(query);
  dispatch_tokens(rows, [&](auto type, auto width) {
    using T = typename decltype(type)::type;
    constexpr int kWidth = decltype(width)::value;
    const Rows<const T> q(rows);
    const int64_t chunk = tokens_per_block(L, B * H, kWarps * 8 * kTokenTiles<T, kWidth>);
    launch(assign_kernel<T, kWidth>, grid_of_heads(ceil_div(L, chunk), rows), kThreads,
           CentroidOperands<T, kWidth>::bytes(G), q, centroids.const_data_ptr<float>(),
           group.mutable_data_ptr<int>(), static_cast<int>(L), static_cast<int>(G),
           static_cast<int>(D), static_cast<int>(chunk));
    if (!with_sums) return;
    const int64_t warps = std::clamp<int64_t>((64 << 10) / (G * 128), 1, kWarps);
    const int64_t slices = ceil_div(D, 32);
    const int64_t parts = std::clamp<int64_t>(4 * num_multiprocessors() / (H * slices), 1,
                                              ceil_div(B * ceil_div(L, 32), warps));
    sums = at::empty({parts, H, G, D}, floats);
    counts = at::empty({parts, H, G}, ints);
    launch(sum_kernel<T, kWidth>,
           dim3(static_cast<unsigned>(parts * slices), static_cast<unsigned>(H)),
           static_cast<int>(32 * warps), warps * G * 128 + G * 4, q,
           group.const_data_ptr<int>(), sums.mutable_data_ptr<float>(),
           counts.mutable_data_ptr<int>(), static_cast<int>(B), static_cast<int>(L),
           static_cast<int>(G), static_cast<int>(D), static_cast<int>(parts));
    sums = sums.sum(0);
    counts = counts.sum(0, false, at::kInt);
  });
  return {group, sums, counts};
}

}  // namespace

REGISTER_KERNELS(assign_queries_impl, assign_queries_cuda);

}  // namespace mmdgt
