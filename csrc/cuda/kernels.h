// The GPU's implementations of the operators.
#pragma once

#include "../dynamic_group_attention.h"

namespace mmdgt::cuda {

decltype(assign_queries_impl) assign_queries_cuda;
decltype(select_keys_impl) select_keys_cuda;
decltype(group_attention_impl) group_attention_cuda;
decltype(group_attention_backward_impl) group_attention_backward_cuda;
decltype(choose_and_attend_impl) choose_and_attend_cuda;
decltype(choose_and_attend_backward_impl) choose_and_attend_backward_cuda;

}  // namespace mmdgt::cuda
