// Assignment of queries to groups.
#include <ATen/Context.h>
#include <ATen/ops/matmul.h>

#include "kernels.h"
#include "launch.cuh"
#include "scores.cuh"
#include "sum_queries.h"

namespace mmdgt::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;

// query (B,H,L,D), centroids (H,G,D) -> group (B,H,L). A block serves `chunk`
// tokens of one head of one image.
template <typename T, int D>
__global__ void __launch_bounds__(kThreads, D * sizeof(T) == 64 ? 4 : 2)
    assign_kernel(Rows<const T> query, const float* __restrict__ centroids,
                  int* __restrict__ group, Sizes sizes, int chunk) {
  constexpr int N = kTokenTiles<T, D>;
  char* shared = dynamic_shared();
  __shared__ int nan_group;  // the first centroid with a NaN, which beats all
  const CentroidOperands<T, D> operands{reinterpret_cast<FragmentA<T>*>(shared)};
  const int begin = blockIdx.x * chunk, end = min(begin + chunk, sizes.num_tokens);
  const T* head = query.head();
  const int tiles = (sizes.num_groups + 15) / 16;
  const int warp = threadIdx.x / 32;

  RowFragment<T, D> tokens[N];
  const auto load = [&](int first) {
    load_tokens(tokens, head, query.token_stride, sizes.dim,
                [&](int i) { return first + i < end ? first + i : -1; });
  };
  load(begin + warp * 8 * N);
  if (threadIdx.x == 0) nan_group = sizes.num_groups;
  __syncthreads();
  centroids += blockIdx.y * sizes.num_groups * sizes.dim;
  operands.fill(centroids, 0, tiles, sizes.num_groups, sizes.dim, &nan_group);
  __syncthreads();

  group += own_head() * sizes.num_tokens;
  for (int first = begin + warp * 8 * N; first < end; first += kWarps * 8 * N) {
    NearestGroups<N> nearest;
    bool infinite = false;
    for (int tile = 0; tile < tiles; ++tile) {
      float score[N][4];
      score_tokens<T, D, N>(operands, tile, tokens, score);
      if (tile == 0) infinite = has_infinity(score);
      if (infinite) repair_scores(operands, tile, tokens, score);
      nearest.add(score, tile);
    }
    load(first + kWarps * 8 * N);  // arrives during the reductions
    nearest.reduce();
    const int token = first + nearest.own_token();
    if (token < end && nearest.owns_token()) {
      group[token] = nan_group < sizes.num_groups ? nan_group : nearest.group[0];
    }
  }
}

// Where the centroids do not fit in shared memory: all scores, one image at a time.
void assign_by_matmul(const at::Tensor& query, const at::Tensor& centroids,
                      at::Tensor& group) {
  const at::NoTF32Guard no_tf32;  // scores decide
  for (int64_t b = 0; b < query.size(0); ++b) {
    const at::Tensor scores = at::matmul(centroids, query[b].to(at::kFloat).mT());
    group[b].copy_(scores.argmax(1));
  }
}

}  // namespace

std::tuple<at::Tensor, at::Tensor, at::Tensor> assign_queries_cuda(
    const at::Tensor& query, const at::Tensor& centroids, bool with_sums) {
  const c10::DeviceGuard guard(query.device());
  const int64_t B = query.size(0), H = query.size(1), L = query.size(2);
  const int64_t G = centroids.size(1);
  at::Tensor group = at::empty({B, H, L}, query.options().dtype(at::kInt));
  const at::Tensor rows = aligned_rows(query), own = aligned_centroids(centroids);
  if (group.numel() > 0) {
    dispatch_tokens(rows, [&](auto type, auto width) {
      using T = typename decltype(type)::type;
      constexpr int kWidth = decltype(width)::value;
      const size_t shared_bytes = CentroidOperands<T, kWidth>::bytes(G);
      if (!fits(shared_bytes)) return assign_by_matmul(query, centroids, group);
      const int64_t chunk =
          tokens_per_block(L, B * H, kWarps * 8 * kTokenTiles<T, kWidth>);
      launch(assign_kernel<T, kWidth>, grid_of_heads(ceil_div(L, chunk), rows), kThreads,
             shared_bytes, Rows<const T>(rows), own.const_data_ptr<float>(),
             group.mutable_data_ptr<int>(), Sizes(query, G, 0), static_cast<int>(chunk));
    });
  }
  const auto [sums, counts] =
      with_sums ? sum_queries(rows, group, G) : no_sums(query.options());
  return {group, sums, counts};
}

}  // namespace mmdgt::cuda
