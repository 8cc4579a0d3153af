// group_attention and its backward on the CPU: how the work is divided.
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <memory>
#include <numeric>
#include <type_traits>
#include <vector>

#include "../dynamic_group_attention.h"
#include "kernels.h"
#include "pytorch_device_registry.hpp"
#include "slices.h"

namespace mmdgt::cpu {
namespace {

// Queries attended by one task: enough to pay for packing the keys, few enough to
// share a large group among threads. Fixed, so that gradients are added up in the
// same order whatever the number of threads.
constexpr int64_t kTaskQueries = 512;

// Whether all numbers lie in [0, limit).
bool in_range(const int32_t* numbers, int64_t count, int64_t limit) {
  uint32_t outside = 0;  // has the sign of a negative number or distance to the last
  for (int64_t i = 0; i < count; ++i) {
    const auto number = static_cast<uint32_t>(numbers[i]);
    outside |= number | (static_cast<uint32_t>(limit - 1) - number);
  }
  return outside >> 31 == 0;
}

struct Task {
  int64_t slice, group;  // all groups of a slice attended together
  int64_t first, count;  // places in the slice's queries
};

// What gathering a group's keys costs, as the time of this many queries.
constexpr int64_t kGatherQueries = 16;

// How the slices are attended, and the tasks that they make. Where the groups are
// small and K is a large part of L, gathering the keys of every group takes longer
// than to score all of them: the groups of such a slice are attended together.
class Plan {
 public:
  Plan(const at::Tensor& group, const at::Tensor& index)
      : slices_(index.size(0) * index.size(1)),
        groups_(index.size(2)),
        num_keys_(index.size(3)),
        tokens_(group.size(2)),
        group_(group.const_data_ptr<int32_t>()),
        index_(index.const_data_ptr<int32_t>()),
        order_(slices_ * tokens_),
        together_(slices_),
        all_(tokens_) {
    std::iota(all_.begin(), all_.end(), 0);
    std::vector<int64_t> starts(slices_ * (groups_ + 1), 0);
    std::atomic<bool> groups_exist{true}, tokens_exist{true};
    at::parallel_for(0, slices_, 1, [&](int64_t begin, int64_t end) {
      for (int64_t slice = begin; slice < end; ++slice) {
        if (!in_range(group_ + slice * tokens_, tokens_, groups_)) groups_exist = false;
        if (!in_range(index_ + slice * groups_ * num_keys_, groups_ * num_keys_,
                      tokens_)) {
          tokens_exist = false;
        }
        if (!groups_exist || !tokens_exist) continue;
        int64_t* start = starts.data() + slice * (groups_ + 1);
        sort(slice, start);
        int64_t used = 0;
        for (int64_t g = 0; g < groups_; ++g) used += start[g] < start[g + 1];
        // What either way costs, in scores.
        together_[slice] =
            tokens_ * tokens_ <= num_keys_ * (tokens_ + used * kGatherQueries);
      }
    });
    TORCH_CHECK_INDEX(groups_exist, "group must name groups 0 to ", groups_ - 1,
                      ", got one outside");
    TORCH_CHECK_INDEX(tokens_exist, "index must name tokens 0 to ", tokens_ - 1,
                      ", got one outside");
    for (int64_t slice = 0; slice < slices_; ++slice) {
      begin_.push_back(tasks_.size());
      if (together_[slice]) {
        add_tasks(slice, 0, 0, tokens_);
        continue;
      }
      const int64_t* start = starts.data() + slice * (groups_ + 1);
      for (int64_t g = 0; g < groups_; ++g) add_tasks(slice, g, start[g], start[g + 1]);
    }
    begin_.push_back(tasks_.size());
  }

  const std::vector<Task>& tasks() const { return tasks_; }
  // The number of a slice's first task.
  int64_t begin(int64_t slice) const { return begin_[slice]; }
  const int32_t* queries(const Task& task) const {
    return order_.data() + task.slice * tokens_ + task.first;
  }
  const int32_t* keys(const Task& task) const {
    if (together_[task.slice]) return all_.data();
    return index_ + (task.slice * groups_ + task.group) * num_keys_;
  }
  int64_t num_keys(int64_t slice) const { return together_[slice] ? tokens_ : num_keys_; }
  Choices choices(int64_t slice) const {
    if (!together_[slice]) return {};
    return {group_ + slice * tokens_, index_ + slice * groups_ * num_keys_, num_keys_};
  }

 private:
  // Orders a slice's queries by group; start (G + 1) is where the groups begin.
  void sort(int64_t slice, int64_t* start) {
    const int32_t* of = group_ + slice * tokens_;
    for (int64_t l = 0; l < tokens_; ++l) ++start[of[l] + 1];
    for (int64_t g = 0; g < groups_; ++g) start[g + 1] += start[g];
    std::vector<int64_t> next(start, start + groups_);
    int32_t* order = order_.data() + slice * tokens_;
    for (int64_t l = 0; l < tokens_; ++l) {
      order[next[of[l]]++] = static_cast<int32_t>(l);
    }
  }

  void add_tasks(int64_t slice, int64_t group, int64_t first, int64_t end) {
    for (; first < end; first += kTaskQueries) {
      tasks_.push_back({slice, group, first, std::min(kTaskQueries, end - first)});
    }
  }

  int64_t slices_, groups_, num_keys_, tokens_;
  const int32_t* group_;           // (B * H, L)
  const int32_t* index_;           // (B * H, G, K)
  std::vector<int32_t> order_;     // (B * H, L), the queries by group
  std::vector<uint8_t> together_;  // (B * H), whether one task takes all groups
  std::vector<int32_t> all_;       // (L), the tokens
  std::vector<Task> tasks_;        // by slice, group and place
  std::vector<int64_t> begin_;     // (B * H + 1)
};

// Fills in what forward and backward share.
template <class T>
class Inputs {
 public:
  Inputs(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
         double scale, const Plan& plan)
      : query_(query),
        key_(key),
        value_(value),
        head_dim_(query.size(3)),
        scale_(scale),
        plan_(plan) {}

  void fill(const Task& task, AttentionTask<T>& work) const {
    work.query = query_[task.slice];
    work.key = key_[task.slice];
    work.value = value_[task.slice];
    work.tokens = plan_.queries(task);
    work.num_queries = task.count;
    work.index = plan_.keys(task);
    work.num_keys = plan_.num_keys(task.slice);
    work.head_dim = head_dim_;
    work.scale = scale_;
    work.choices = plan_.choices(task.slice);
  }

 private:
  Slices<const T> query_, key_, value_;
  int64_t head_dim_;
  double scale_;
  const Plan& plan_;
};

std::tuple<at::Tensor, at::Tensor> group_attention_cpu(
    const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
    const at::Tensor& group, const at::Tensor& index, double scale) {
  auto out = empty_heads_last(query);
  auto logsumexp =
      at::empty(group.sizes(), query.options().dtype(accumulate_type(query)));
  const int64_t tokens = query.size(2);
  AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kHalf, at::kBFloat16, query.scalar_type(), "group_attention", [&] {
        using sum_t = accumulate_t<scalar_t>;
        const Plan plan(group, index);
        const Inputs<scalar_t> inputs(query, key, value, scale, plan);
        const Slices<scalar_t> outs(out);
        sum_t* sums = logsumexp.mutable_data_ptr<sum_t>();
        parallel_tasks(plan.tasks().size(), [&](int64_t i, Scratch& scratch) {
          const Task& task = plan.tasks()[i];
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
      : size(num_keys * padded_head_dim(head_dim)), data(new T[tasks * 2 * size]) {}

  T* key(int64_t task) { return data.get() + 2 * task * size; }
  T* value(int64_t task) { return key(task) + size; }

  int64_t size;
  std::unique_ptr<T[]> data;
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
  const int64_t head_dim = query.size(3);
  AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kHalf, at::kBFloat16, query.scalar_type(), "group_attention_backward", [&] {
        using sum_t = accumulate_t<scalar_t>;
        const Slices<const scalar_t> outs(out), grad_outs(grad_out);
        const Plan plan(group, index);
        const Inputs<scalar_t> inputs(query, key, value, scale, plan);
        const Slices<scalar_t> grad_queries(grad_query), grad_keys(grad_key),
            grad_values(grad_value);
        const sum_t* sums = logsumexp.const_data_ptr<sum_t>();

        const auto run = [&](int64_t i, sum_t* to_key, sum_t* to_value,
                             Scratch& scratch) {
          const Task& task = plan.tasks()[i];
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
        if (slices >= at::get_num_threads()) {
          parallel_tasks(slices, [&](int64_t slice, Scratch& scratch) {
            const int64_t num_keys = plan.num_keys(slice);
            Gathered<sum_t> part(1, num_keys, head_dim);
            Total<scalar_t> total_key(grad_keys[slice], tokens, head_dim);
            Total<scalar_t> total_value(grad_values[slice], tokens, head_dim);
            for (int64_t i = plan.begin(slice); i < plan.begin(slice + 1); ++i) {
              const int32_t* index = plan.keys(plan.tasks()[i]);
              run(i, part.key(0), part.value(0), scratch);
              total_key.add(part.key(0), index, num_keys);
              total_value.add(part.value(0), index, num_keys);
            }
            total_key.finish();
            total_value.finish();
          });
          return;
        }
        // Few slices: the tasks of one at a time run in parallel, and what they
        // found is added up in the same order as above.
        for (int64_t slice = 0; slice < slices; ++slice) {
          const int64_t first = plan.begin(slice);
          const int64_t count = plan.begin(slice + 1) - first;
          const int64_t num_keys = plan.num_keys(slice);
          Gathered<sum_t> parts(count, num_keys, head_dim);
          parallel_tasks(count, [&](int64_t i, Scratch& scratch) {
            run(first + i, parts.key(i), parts.value(i), scratch);
          });
          parallel_tasks(2, [&](int64_t which, Scratch&) {
            Total<scalar_t> total((which ? grad_values : grad_keys)[slice], tokens,
                                  head_dim);
            for (int64_t i = 0; i < count; ++i) {
              total.add(which ? parts.value(i) : parts.key(i),
                        plan.keys(plan.tasks()[first + i]), num_keys);
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

}  // namespace mmdgt::cpu
