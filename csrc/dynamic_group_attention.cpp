// Checks of the operators' arguments, and the way to each device's kernels. The
// schemas are defined in Python (mmdgt/ops/library.py); importing this module
// adds the kernels to them.
#include "dynamic_group_attention.h"

#include <torch/csrc/Dtype.h>
#include <torch/csrc/DynamicTypes.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/library.h>
#include <torch/version.h>

#include <algorithm>
#include <limits>
#include <string>
#include <vector>

#include "pytorch_device_registry.hpp"

namespace mmdgt {

std::tuple<at::Tensor, at::Tensor, at::Tensor> assign_queries_impl(
    const at::Tensor& query, const at::Tensor& centroids, bool with_sums) {
  return DISPATCH_DEVICE_IMPL(assign_queries_impl, query, centroids, with_sums);
}

at::Tensor select_keys_impl(const at::Tensor& key, const at::Tensor& centroids,
                            int64_t num_keys, bool sorted) {
  return DISPATCH_DEVICE_IMPL(select_keys_impl, key, centroids, num_keys, sorted);
}

std::tuple<at::Tensor, at::Tensor> group_attention_impl(
    const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
    const at::Tensor& group, const at::Tensor& index, double scale) {
  return DISPATCH_DEVICE_IMPL(group_attention_impl, query, key, value, group, index,
                              scale);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> group_attention_backward_impl(
    const at::Tensor& grad_out, const at::Tensor& query, const at::Tensor& key,
    const at::Tensor& value, const at::Tensor& group, const at::Tensor& index,
    const at::Tensor& out, const at::Tensor& logsumexp, double scale) {
  return DISPATCH_DEVICE_IMPL(group_attention_backward_impl, grad_out, query, key, value,
                              group, index, out, logsumexp, scale);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>
choose_and_attend_impl(const at::Tensor& query, const at::Tensor& key,
                       const at::Tensor& value, const at::Tensor& centroids,
                       int64_t num_keys, double scale, bool with_sums) {
  return DISPATCH_DEVICE_IMPL(choose_and_attend_impl, query, key, value, centroids,
                              num_keys, scale, with_sums);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> choose_and_attend_backward_impl(
    const at::Tensor& grad_out, const at::Tensor& query, const at::Tensor& key,
    const at::Tensor& value, const at::Tensor& group, const at::Tensor& masks,
    const at::Tensor& out, const at::Tensor& logsumexp, double scale) {
  return DISPATCH_DEVICE_IMPL(choose_and_attend_backward_impl, grad_out, query, key,
                              value, group, masks, out, logsumexp, scale);
}

namespace {

void check_device(const at::Tensor& tensor, const char* name, const at::Tensor& first) {
  TORCH_CHECK(tensor.device() == first.device(), name, " is on ", tensor.device(),
              " but the first argument is on ", first.device(),
              "; move them to one device");
}

std::string dtype_name(at::ScalarType dtype) { return torch::getTHPDtype(dtype)->name; }

// What the kernels of a device serve, as torch names it.
std::vector<std::string> dtype_names(at::DeviceType device) {
  std::vector<std::string> names;
  for (const auto dtype : served_dtypes(device)) names.push_back(dtype_name(dtype));
  return names;
}

// query, key, value and their gradients: (B,H,L,D), rows without gaps.
void check_tokens(const at::Tensor& tokens, const char* name) {
  TORCH_CHECK(tokens.dim() == 4, name, " must have shape (B, H, L, D), got ",
              tokens.sizes());
  const auto device = tokens.device().type();
  const auto dtype = tokens.scalar_type();
  const auto served = served_dtypes(device);
  TORCH_CHECK(std::find(served.begin(), served.end(), dtype) != served.end(), name,
              " must be one of ", dtype_names(device), ", got ", dtype_name(dtype));
  const int64_t head_dim = tokens.size(3);
  TORCH_CHECK(
      head_dim >= kHeadDimStep && head_dim <= kMaxHeadDim && head_dim % kHeadDimStep == 0,
      name, "'s head dim must be a multiple of ", kHeadDimStep, " up to ", kMaxHeadDim,
      ", got ", head_dim, "; use the reference back end for others");
  TORCH_CHECK(tokens.stride(3) == 1, name,
              "'s last dimension must have stride 1, got strides ", tokens.strides(),
              "; call .contiguous() on it");
  TORCH_CHECK(tokens.size(2) <= std::numeric_limits<int32_t>::max(), name, " has ",
              tokens.size(2), " tokens, more than int32 can index");
}

void check_same(const at::Tensor& tokens, const char* name, const at::Tensor& query) {
  check_device(tokens, name, query);
  TORCH_CHECK(tokens.sizes() == query.sizes(), name, " has shape ", tokens.sizes(),
              ", but query has ", query.sizes(), "; they must be equal");
  TORCH_CHECK(tokens.scalar_type() == query.scalar_type(), name, " is ",
              tokens.scalar_type(), ", but query is ", query.scalar_type(),
              "; cast them to one type");
  check_tokens(tokens, name);
}

void check_groups(int64_t number) {
  TORCH_CHECK(number >= 1 && number <= kMaxGroups, "the number of groups must be 1 to ",
              kMaxGroups, ", got ", number);
}

void check_centroids(const at::Tensor& centroids, const at::Tensor& tokens) {
  check_device(centroids, "centroids", tokens);
  TORCH_CHECK(centroids.dim() == 3 && centroids.size(0) == tokens.size(1) &&
                  centroids.size(2) == tokens.size(3),
              "centroids must have shape (H, G, D) with H = ", tokens.size(1),
              " and D = ", tokens.size(3), ", got ", centroids.sizes());
  check_groups(centroids.size(1));
  TORCH_CHECK(centroids.scalar_type() == at::kFloat && centroids.is_contiguous(),
              "centroids must be contiguous float32, got ", centroids.scalar_type(),
              " with strides ", centroids.strides(),
              "; call .float().contiguous() on them");
}

void check_choice(const at::Tensor& choice, const char* name, const at::Tensor& query) {
  check_device(choice, name, query);
  TORCH_CHECK(choice.scalar_type() == at::kInt && choice.is_contiguous(), name,
              " must be contiguous int32, got ", choice.scalar_type(), " with strides ",
              choice.strides(), "; call .int().contiguous() on it");
}

void check_grouped(const at::Tensor& query, const at::Tensor& key,
                   const at::Tensor& value, const at::Tensor& group) {
  check_tokens(query, "query");
  check_same(key, "key", query);
  check_same(value, "value", query);
  check_choice(group, "group", query);
  TORCH_CHECK(group.sizes() == query.sizes().slice(0, 3),
              "group must have shape (B, H, L) = ", query.sizes().slice(0, 3), ", got ",
              group.sizes());
}

void check_attention(const at::Tensor& query, const at::Tensor& key,
                     const at::Tensor& value, const at::Tensor& group,
                     const at::Tensor& index) {
  check_grouped(query, key, value, group);
  check_choice(index, "index", query);
  TORCH_CHECK(index.dim() == 4 && index.size(0) == query.size(0) &&
                  index.size(1) == query.size(1),
              "index must have shape (B, H, G, K) with B = ", query.size(0),
              " and H = ", query.size(1), ", got ", index.sizes());
  check_groups(index.size(2));
  const int64_t tokens = query.size(2);
  TORCH_CHECK(index.size(3) <= tokens && (index.size(3) >= 1 || tokens == 0),
              "index must name 1 to L = ", tokens, " keys per group, got ",
              index.size(3));
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> assign_queries(const at::Tensor& query,
                                                              const at::Tensor& centroids,
                                                              bool with_sums) {
  check_tokens(query, "query");
  check_centroids(centroids, query);
  return assign_queries_impl(query, centroids, with_sums);
}

at::Tensor select_keys(const at::Tensor& key, const at::Tensor& centroids,
                       int64_t num_keys, bool sorted) {
  check_tokens(key, "key");
  check_centroids(centroids, key);
  TORCH_CHECK(num_keys >= 1, "num_keys must be at least 1, got ", num_keys);
  return select_keys_impl(key, centroids, std::min(num_keys, key.size(2)), sorted);
}

std::tuple<at::Tensor, at::Tensor> group_attention(
    const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
    const at::Tensor& group, const at::Tensor& index, double scale) {
  check_attention(query, key, value, group, index);
  return group_attention_impl(query, key, value, group, index, scale);
}

// What the forward pass left, and the output's gradient, which is returned as the kernels
// take it.
at::Tensor check_backward(const at::Tensor& grad_out, const at::Tensor& query,
                          const at::Tensor& group, const at::Tensor& out,
                          const at::Tensor& logsumexp) {
  check_same(out, "out", query);
  check_device(logsumexp, "logsumexp", query);
  const auto accumulate = query.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  TORCH_CHECK(logsumexp.sizes() == group.sizes() &&
                  logsumexp.scalar_type() == accumulate && logsumexp.is_contiguous(),
              "logsumexp must be contiguous ", accumulate, " of shape ", group.sizes(),
              ", got ", logsumexp.scalar_type(), " of shape ", logsumexp.sizes());
  // Autograd hands over whatever the next operator made, e.g. an expanded scalar.
  const auto grad =
      grad_out.dim() == 4 && grad_out.stride(3) != 1 ? grad_out.contiguous() : grad_out;
  check_same(grad, "grad_out", query);
  return grad;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> group_attention_backward(
    const at::Tensor& grad_out, const at::Tensor& query, const at::Tensor& key,
    const at::Tensor& value, const at::Tensor& group, const at::Tensor& index,
    const at::Tensor& out, const at::Tensor& logsumexp, double scale) {
  check_attention(query, key, value, group, index);
  const auto grad = check_backward(grad_out, query, group, out, logsumexp);
  return group_attention_backward_impl(grad, query, key, value, group, index, out,
                                       logsumexp, scale);
}

void check_few(const at::Tensor& query) {
  TORCH_CHECK(query.size(2) <= kMaxFewTokens && query.size(3) <= kMaxFewHeadDim &&
                  query.element_size() == 2,
              "choose_and_attend takes float16 or bfloat16, up to ", kMaxFewTokens,
              " tokens and head dims up to ", kMaxFewHeadDim, ", got ", query.sizes(),
              " of ", dtype_name(query.scalar_type()),
              "; call assign_queries, select_keys and group_attention");
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>
choose_and_attend(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                  const at::Tensor& centroids, int64_t num_keys, double scale,
                  bool with_sums) {
  check_tokens(query, "query");
  check_same(key, "key", query);
  check_same(value, "value", query);
  check_centroids(centroids, query);
  check_few(query);
  TORCH_CHECK(num_keys >= 1, "num_keys must be at least 1, got ", num_keys);
  return choose_and_attend_impl(query, key, value, centroids,
                                std::min(num_keys, query.size(2)), scale, with_sums);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> choose_and_attend_backward(
    const at::Tensor& grad_out, const at::Tensor& query, const at::Tensor& key,
    const at::Tensor& value, const at::Tensor& group, const at::Tensor& masks,
    const at::Tensor& out, const at::Tensor& logsumexp, double scale) {
  check_grouped(query, key, value, group);
  check_few(query);
  check_choice(masks, "masks", query);
  TORCH_CHECK(masks.dim() == 4 && masks.size(0) == query.size(0) &&
                  masks.size(1) == query.size(1) && masks.size(3) == kMaskWords,
              "masks must have shape (B, H, G, ", kMaskWords,
              ") with B = ", query.size(0), " and H = ", query.size(1), ", got ",
              masks.sizes());
  check_groups(masks.size(2));
  const auto grad = check_backward(grad_out, query, group, out, logsumexp);
  return choose_and_attend_backward_impl(grad, query, key, value, group, masks, out,
                                         logsumexp, scale);
}

void add_kernels_for_few(torch::Library& library) {
  library.impl("choose_and_attend", choose_and_attend);
  library.impl("choose_and_attend_backward", choose_and_attend_backward);
}

void add_kernels(torch::Library& library) {
  library.impl("assign_queries", assign_queries);
  library.impl("select_keys", select_keys);
  library.impl("group_attention", group_attention);
  library.impl("group_attention_backward", group_attention_backward);
}

pybind11::dict limits() {
  using namespace pybind11::literals;
  return pybind11::dict(
      "max_groups"_a = kMaxGroups, "max_head_dim"_a = kMaxHeadDim,
      "head_dim_step"_a = kHeadDimStep, "max_few_tokens"_a = kMaxFewTokens,
      "max_few_head_dim"_a = kMaxFewHeadDim, "channel_step"_a = kChannelStep,
      "dtypes"_a = pybind11::dict("cpu"_a = dtype_names(at::kCPU),
                                  "cuda"_a = dtype_names(at::kCUDA)));
}

}  // namespace

TORCH_LIBRARY_IMPL(mmdgt, CPU, library) { add_kernels(library); }

#ifdef MMDGT_WITH_CUDA
TORCH_LIBRARY_IMPL(mmdgt, CUDA, library) {
  add_kernels(library);
  add_kernels_for_few(library);
}
#endif

#ifdef MMDGT_EMULATE
TORCH_LIBRARY_IMPL(mmdgt, CPU, library) { add_kernels_for_few(library); }
#endif

}  // namespace mmdgt

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  module.doc() = "Compiled kernels of mmdgt's operators.";
  module.attr("torch_version") = TORCH_VERSION;
  module.attr("limits") = mmdgt::limits();
}
