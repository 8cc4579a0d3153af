#include "sum_queries.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include "sum_queries.cuh"

namespace mmdgt::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;

// The terms of eq. 3: sums (P,H,G,D) of normalised queries and counts (P,H,G),
// P parts of the tokens of all images. A warp adds up in its own shared memory,
// 32 elements of D wide, so that the order of summation is fixed.
template <typename T, int D>
__global__ void __launch_bounds__(kThreads, 4)
    sum_kernel(Rows<const T> query, const int* __restrict__ group,
               float* __restrict__ sums, int* __restrict__ counts, Sizes sizes, int batch,
               int parts) {
  char* shared = dynamic_shared();
  const int warps = blockDim.x / 32;
  auto* all_sums = reinterpret_cast<float*>(shared);  // [warp][G][32]
  auto* all_counts = reinterpret_cast<int*>(all_sums + warps * sizes.num_groups * 32);
  const int slice = blockIdx.x / parts, part = blockIdx.x % parts;
  const int head = blockIdx.y, heads = gridDim.y;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int column = 32 * slice + lane;

  for (int i = threadIdx.x; i < warps * sizes.num_groups * 32; i += blockDim.x) {
    all_sums[i] = 0.f;
  }
  for (int i = threadIdx.x; i < sizes.num_groups; i += blockDim.x) all_counts[i] = 0;
  __syncthreads();

  float* own = all_sums + warp * sizes.num_groups * 32 + lane;
  const int runs = (sizes.num_tokens + 31) / 32;  // of 32 tokens, in an image
  int b = 0, run = part * warps + warp;
  while (true) {
    for (; run >= runs && b < batch; ++b) run -= runs;
    if (b >= batch) break;
    const int first = 32 * run;
    const int count = min(sizes.num_tokens - first, 32);
    const T* rows = query.row(query.head(b, head), first);
    int own_group = 0;
    float own_factor = 0.f;  // of this lane's token
    if (lane < count) {
      own_group = group[(static_cast<int64_t>(b) * heads + head) * sizes.num_tokens +
                        first + lane];
      const T* row = rows + static_cast<int64_t>(lane) * query.token_stride;
      float square = 0.f;
#pragma unroll
      for (int c = 0; c < D; c += 8) {
        if (c >= sizes.dim) break;
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
      own_factor = inverse_norm(square);
      if (slice == 0) atomicAdd(&all_counts[own_group], 1);
    }
    const T* element = rows + (column < sizes.dim ? column : 0);
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

  const int64_t out = (static_cast<int64_t>(part) * heads + head) * sizes.num_groups;
  for (int i = threadIdx.x; i < sizes.num_groups * 32; i += blockDim.x) {
    float sum = 0.f;
    for (int w = 0; w < warps; ++w) sum += all_sums[w * sizes.num_groups * 32 + i];
    const int c = 32 * slice + i % 32;
    if (c < sizes.dim) sums[(out + i / 32) * sizes.dim + c] = sum;
  }
  if (slice == 0) {
    for (int i = threadIdx.x; i < sizes.num_groups; i += blockDim.x) {
      counts[out + i] = all_counts[i];
    }
  }
}

}  // namespace

std::tuple<at::Tensor, at::Tensor> sum_queries(const at::Tensor& query,
                                               const at::Tensor& group,
                                               int64_t num_groups) {
  const int64_t B = query.size(0), H = query.size(1), L = query.size(2);
  const int64_t G = num_groups, D = query.size(3);
  const auto ints = query.options().dtype(at::kInt);
  const auto floats = query.options().dtype(at::kFloat);
  if (group.numel() == 0) return {at::zeros({H, G, D}, floats), at::zeros({H, G}, ints)};
  const at::Tensor rows = aligned_rows(query);
  const int64_t warps = std::clamp<int64_t>((64 << 10) / (G * 128), 1, kWarps);
  const int64_t slices = ceil_div(D, 32);
  const int64_t parts = std::clamp<int64_t>(4 * num_multiprocessors() / (H * slices), 1,
                                            ceil_div(B * ceil_div(L, 32), warps));
  const at::Tensor sums = at::empty({parts, H, G, D}, floats);
  const at::Tensor counts = at::empty({parts, H, G}, ints);
  dispatch_tokens(rows, [&](auto type, auto width) {
    using T = typename decltype(type)::type;
    launch(sum_kernel<T, decltype(width)::value>,
           dim3(static_cast<unsigned>(parts * slices), static_cast<unsigned>(H)),
           static_cast<int>(32 * warps), warps * G * 128 + G * 4, Rows<const T>(rows),
           group.const_data_ptr<int>(), sums.mutable_data_ptr<float>(),
           counts.mutable_data_ptr<int>(), Sizes(query, G, 0), static_cast<int>(B),
           static_cast<int>(parts));
  });
  return add_parts(sums, counts);
}

std::tuple<at::Tensor, at::Tensor> add_parts(const at::Tensor& sums,
                                             const at::Tensor& counts) {
  return {sums.sum(0), counts.sum(0, false, at::kInt)};
}

std::tuple<at::Tensor, at::Tensor> no_sums(const at::TensorOptions& options) {
  return {at::empty({0}, options.dtype(at::kFloat)),
          at::empty({0}, options.dtype(at::kInt))};
}

}  // namespace mmdgt::cuda
