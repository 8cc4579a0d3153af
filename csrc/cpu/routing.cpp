// assign_queries and select_keys on the CPU: how the work is divided.
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>

#include <vector>

#include "../dynamic_group_attention.h"
#include "kernels.h"
#include "pytorch_device_registry.hpp"
#include "slices.h"

namespace mmdgt::cpu {
namespace {

// Tokens assigned by one task. Fixed, so that the sums of eq. 3 are added up in
// the same order whatever the number of threads.
constexpr int64_t kAssignedTokens = 1024;

std::tuple<at::Tensor, at::Tensor, at::Tensor> assign_queries_cpu(
    const at::Tensor& query, const at::Tensor& centroids, bool with_sums) {
  const int64_t batch = query.size(0), heads = query.size(1);
  const int64_t tokens = query.size(2), head_dim = query.size(3);
  const int64_t groups = centroids.size(1);
  const int64_t chunks = (tokens + kAssignedTokens - 1) / kAssignedTokens;
  const int64_t tasks = batch * heads * chunks;
  const auto ints = centroids.options().dtype(at::kInt);
  auto group = at::empty({batch, heads, tokens}, ints);
  const int64_t kept = with_sums ? batch : 0;
  auto sums = at::zeros({kept, heads, chunks, groups, head_dim}, centroids.options());
  auto counts = at::zeros({kept, heads, chunks, groups}, ints);
  const float* centroid = centroids.const_data_ptr<float>();
  int32_t* to = group.mutable_data_ptr<int32_t>();
  float* sum = with_sums ? sums.mutable_data_ptr<float>() : nullptr;
  int32_t* number = with_sums ? counts.mutable_data_ptr<int32_t>() : nullptr;

  AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kHalf, at::kBFloat16, query.scalar_type(), "assign_queries", [&] {
        const Slices<const scalar_t> queries(query);
        parallel_tasks(tasks, [&](int64_t task, Scratch& scratch) {
          const int64_t slice = task / chunks, head = slice % heads;
          const int64_t first = task % chunks * kAssignedTokens;
          AssignTask<scalar_t> work;
          work.query = queries[slice];
          work.query.data = work.query[first];
          work.tokens = std::min(kAssignedTokens, tokens - first);
          work.centroids = centroid + head * groups * head_dim;
          work.groups = groups;
          work.head_dim = head_dim;
          work.group = to + slice * tokens + first;
          work.sums = sum ? sum + task * groups * head_dim : nullptr;
          work.counts = number ? number + task * groups : nullptr;
          kernels<scalar_t>().assign(work, scratch);
        });
      });
  if (!with_sums) return {group, sums.view({0}), counts.view({0})};
  const std::vector<int64_t> parts{0, 2};
  return {group, sums.sum(parts), counts.sum(parts, false, at::kInt)};
}

at::Tensor select_keys_cpu(const at::Tensor& key, const at::Tensor& centroids,
                           int64_t num_keys, bool sorted) {
  const int64_t batch = key.size(0), heads = key.size(1);
  const int64_t tokens = key.size(2), head_dim = key.size(3);
  const int64_t groups = centroids.size(1);
  auto index =
      at::empty({batch, heads, groups, num_keys}, centroids.options().dtype(at::kInt));
  if (index.numel() == 0) return index;
  // Few slices for many threads: split each by groups, 16 or more together.
  const int64_t slices = batch * heads;
  const int64_t parts =
      std::min((at::get_num_threads() + slices - 1) / slices, (groups + 15) / 16);
  const int64_t share = round_up((groups + parts - 1) / parts, 16);
  const float* centroid = centroids.const_data_ptr<float>();
  int32_t* to = index.mutable_data_ptr<int32_t>();

  AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kHalf, at::kBFloat16, key.scalar_type(), "select_keys", [&] {
        const Slices<const scalar_t> keys(key);
        parallel_tasks(slices * parts, [&](int64_t task, Scratch& scratch) {
          const int64_t slice = task / parts, head = slice % heads;
          const int64_t first = task % parts * share;
          if (first >= groups) return;
          SelectTask<scalar_t> work;
          work.key = keys[slice];
          work.tokens = tokens;
          work.centroids = centroid + (head * groups + first) * head_dim;
          work.groups = std::min(share, groups - first);
          work.head_dim = head_dim;
          work.num_keys = num_keys;
          work.sorted = sorted;
          work.index = to + (slice * groups + first) * num_keys;
          kernels<scalar_t>().select(work, scratch);
        });
      });
  return index;
}

}  // namespace

REGISTER_DEVICE_IMPL(assign_queries_impl, CPU, assign_queries_cpu);
REGISTER_DEVICE_IMPL(select_keys_impl, CPU, select_keys_cpu);

}  // namespace mmdgt::cpu
