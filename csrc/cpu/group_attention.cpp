// group_attention and its backward on the CPU: how the work is divided.
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <type_traits>
#include <vector>

#include "../dynamic_group_attention.h"
#include "kernels.h"
#include "pytorch_device_registry.hpp"
#include "slices.h"

namespace mmdgt {
namespace {

// Queries attended by one task: enough to pay for packing the keys, few enough to
// share a large group among threads. Fixed, so that gradients are added up in the
// same order whatever the number of threads.
constexpr int64_t kTaskQueries = 512;

void check_range(const at::Tensor& numbers, int64_t limit, const char* name,
                 const char* what) {
  const int32_t* data = numbers.const_data_ptr<int32_t>();
  bool outside = false;
  for (int64_t i = 0; i < numbers.numel(); ++i) {
    outside |= static_cast<uint32_t>(data[i]) >= static_cast<uint32_t>(limit);
  }
  TORCH_CHECK_INDEX(!outside, name, " must name ", what, " 0 to ", limit - 1,
                    ", got one outside");
}

struct Task {
  int64_t slice, group;
  int64_t first, count;  // places in the slice's queries ordered by group
};

// The queries of every slice ordered by group, and the tasks that they make.
struct Plan {
  std::vector<int32_t> order;  // (B * H, L)
  std::vector<Task> tasks;     // by slice, group and place
  std::vector<int64_t> begin;  // (B * H + 1), a slice's first task
};

Plan make_plan(const at::Tensor& group, const at::Tensor& index) {
  const int64_t slices = index.size(0) * index.size(1), groups = index.size(2);
  const int64_t tokens = group.size(2);
  check_range(group, groups, "group", "groups");
  check_range(index, tokens, "index", "tokens");
  Plan plan;
  plan.order.resize(slices * tokens);
  std::vector<int64_t> starts(slices * (groups + 1), 0);
  const int32_t* all = group.const_data_ptr<int32_t>();
  at::parallel_for(0, slices, 1, [&](int64_t begin, int64_t end) {
    for (int64_t slice = begin; slice < end; ++slice) {
      const int32_t* of = all + slice * tokens;
      int64_t* start = starts.data() + slice * (groups + 1);
      for (int64_t l = 0; l < tokens; ++l) ++start[of[l] + 1];
      for (int64_t g = 0; g < groups; ++g) start[g + 1] += start[g];
      std::vector<int64_t> next(start, start + groups);
      int32_t* order = plan.order.data() + slice * tokens;
      for (int64_t l = 0; l < tokens; ++l) {
        order[next[of[l]]++] = static_cast<int32_t>(l);
      }
    }
  });
  for (int64_t slice = 0; slice < slices; ++slice) {
    plan.begin.push_back(plan.tasks.size());
    const int64_t* start = starts.data() + slice * (groups + 1);
    for (int64_t g = 0; g < groups; ++g) {
      for (int64_t l = start[g]; l < start[g + 1]; l += kTaskQueries) {
        plan.tasks.push_back({slice, g, l, std::min(kTaskQueries, start[g + 1] - l)});
      }
    }
  }
  plan.begin.push_back(plan.tasks.size());
  return plan;
}

// Fills in what forward and backward share.
template <class T>
class Inputs {
 public:
  Inputs(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
         const at::Tensor& index, double scale, const Plan& plan)
      : query_(query),
        key_(key),
        value_(value),
        index_(index.const_data_ptr<int32_t>()),
        tokens_(query.size(2)),
        head_dim_(query.size(3)),
        groups_(index.size(2)),
        num_keys_(index.size(3)),
        scale_(scale),
        order_(plan.order.data()) {}

  void fill(const Task& task, AttentionTask<T>& work) const {
    work.query = query_[task.slice];
    work.key = key_[task.slice];
    work.value = value_[task.slice];
    work.tokens = order_ + task.slice * tokens_ + task.first;
    work.num_queries = task.count;
    work.index = index_ + (task.slice * groups_ + task.group) * num_keys_;
    work.num_keys = num_keys_;
    work.head_dim = head_dim_;
    work.scale = scale_;
  }

 private:
  Slices<const T> query_, key_, value_;
  const int32_t* index_;
  int64_t tokens_, head_dim_, groups_, num_keys_;
  double scale_;
  const int32_t* order_;
};

std::tuple<at::Tensor, at::Tensor> group_attention_cpu(
    const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
    const at::Tensor& group, const at::Tensor& index, double scale) {
  auto out = empty_heads_last(query);
  auto logsumexp =
      at::empty(group.sizes(), query.options().dtype(accumulate_type(query)));
  const int64_t tokens = query.size(2);
  const Plan plan = make_plan(group, index);
  AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kHalf, at::kBFloat16, query.scalar_type(), "group_attention", [&] {
        using sum_t = accumulate_t<scalar_t>;
        const Inputs<scalar_t> inputs(query, key, value, index, scale, plan);
        const Slices<scalar_t> outs(out);
        sum_t* sums = logsumexp.mutable_data_ptr<sum_t>();
        parallel_tasks(plan.tasks.size(), [&](int64_t i, Scratch& scratch) {
          const Task& task = plan.tasks[i];
          ForwardTask<scalar_t> work;
          inputs.fill(task, work);
          work.out = outs[task.slice];
          work.logsumexp = sums + task.slice * tokens;
          kernels<scalar_t>().forward(work, scratch);
        });
      });
  return {out, logsumexp};
}

// The gradients of one task's keys and values, gathered: (2, K, padded D).
template <class T>
struct Gathered {
  Gathered(int64_t tasks, int64_t num_keys, int64_t head_dim)
      : size(num_keys * padded_head_dim(head_dim)), data(tasks * 2 * size) {}

  T* key(int64_t task) { return data.data() + 2 * task * size; }
  T* value(int64_t task) { return key(task) + size; }

  int64_t size;
  std::vector<T> data;
};

// Adds up gathered gradients for the tokens of a slice: in place if the tensor's
// type is precise enough.
template <class T>
class Total {
 public:
  using Sum = accumulate_t<T>;

  Total(Rows<T> to, int64_t tokens, int64_t head_dim)
      : to_(to), tokens_(tokens), head_dim_(head_dim) {
    if constexpr (std::is_same_v<T, Sum>) {
      total_ = to;
      for (int64_t l = 0; l < tokens; ++l) std::fill_n(to[l], head_dim, T(0));
    } else {
      buffer_.resize(tokens * head_dim);
      total_ = {buffer_.data(), head_dim};
    }
  }

  // rows (K, padded D), index (K).
  void add(const Sum* rows, const int32_t* index, int64_t num_keys) {
    kernels<T>().add(rows, index, num_keys, total_, head_dim_);
  }

  void finish() const {
    if constexpr (!std::is_same_v<T, Sum>) {
      kernels<T>().store(buffer_.data(), to_, tokens_, head_dim_);
    }
  }

 private:
  Rows<T> to_;
  int64_t tokens_, head_dim_;
  Rows<Sum> total_;
  std::vector<Sum> buffer_;
};

std::tuple<at::Tensor, at::Tensor, at::Tensor> group_attention_backward_cpu(
    const at::Tensor& grad_out, const at::Tensor& query, const at::Tensor& key,
    const at::Tensor& value, const at::Tensor& group, const at::Tensor& index,
    const at::Tensor& out, const at::Tensor& logsumexp, double scale) {
  auto grad_query = empty_heads_last(query);
  auto grad_key = empty_heads_last(query);
  auto grad_value = empty_heads_last(query);
  const int64_t slices = query.size(0) * query.size(1), tokens = query.size(2);
  const int64_t head_dim = query.size(3), num_keys = index.size(3);
  const Plan plan = make_plan(group, index);
  AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kHalf, at::kBFloat16, query.scalar_type(), "group_attention_backward", [&] {
        using sum_t = accumulate_t<scalar_t>;
        const Inputs<scalar_t> inputs(query, key, value, index, scale, plan);
        const Slices<const scalar_t> outs(out), grad_outs(grad_out);
        const Slices<scalar_t> grad_queries(grad_query), grad_keys(grad_key),
            grad_values(grad_value);
        const sum_t* sums = logsumexp.const_data_ptr<sum_t>();
        const int32_t* chosen = index.const_data_ptr<int32_t>();

        const auto run = [&](int64_t i, sum_t* to_key, sum_t* to_value,
                             Scratch& scratch) {
          const Task& task = plan.tasks[i];
          BackwardTask<scalar_t> work;
          inputs.fill(task, work);
          work.out = outs[task.slice];
          work.grad_out = grad_outs[task.slice];
          work.logsumexp = sums + task.slice * tokens;
          work.grad_query = grad_queries[task.slice];
          work.grad_key = to_key;
          work.grad_value = to_value;
          kernels<scalar_t>().backward(work, scratch);
        };
        const auto index_of = [&](int64_t i) {
          const Task& task = plan.tasks[i];
          return chosen + (task.slice * index.size(2) + task.group) * num_keys;
        };
        if (slices >= at::get_num_threads()) {
          parallel_tasks(slices, [&](int64_t slice, Scratch& scratch) {
            Gathered<sum_t> part(1, num_keys, head_dim);
            Total<scalar_t> total_key(grad_keys[slice], tokens, head_dim);
            Total<scalar_t> total_value(grad_values[slice], tokens, head_dim);
            for (int64_t i = plan.begin[slice]; i < plan.begin[slice + 1]; ++i) {
              run(i, part.key(0), part.value(0), scratch);
              total_key.add(part.key(0), index_of(i), num_keys);
              total_value.add(part.value(0), index_of(i), num_keys);
            }
            total_key.finish();
            total_value.finish();
          });
          return;
        }
        // Few slices: the tasks of one at a time run in parallel, and what they
        // found is added up in the same order as above.
        for (int64_t slice = 0; slice < slices; ++slice) {
          const int64_t first = plan.begin[slice];
          const int64_t count = plan.begin[slice + 1] - first;
          Gathered<sum_t> parts(count, num_keys, head_dim);
          parallel_tasks(count, [&](int64_t i, Scratch& scratch) {
            run(first + i, parts.key(i), parts.value(i), scratch);
          });
          parallel_tasks(2, [&](int64_t which, Scratch&) {
            Total<scalar_t> total((which ? grad_values : grad_keys)[slice], tokens,
                                  head_dim);
            for (int64_t i = 0; i < count; ++i) {
              total.add(which ? parts.value(i) : parts.key(i), index_of(first + i),
                        num_keys);
            }
            total.finish();
          });
        }
      });
  return {grad_query, grad_key, grad_value};
}

}  // namespace

REGISTER_DEVICE_IMPL(group_attention_impl, CPU, group_attention_cpu);
REGISTER_DEVICE_IMPL(group_attention_backward_impl, CPU, group_attention_backward_cpu);

}  // namespace mmdgt
