// Registers the kernels: apart from them, for mmcv's registry includes headers that take
// a compiler longer than they do.
#include "kernels.h"
#include "pytorch_device_registry.hpp"

#ifdef MMDGT_EMULATE
#define REGISTER(op) REGISTER_DEVICE_IMPL(op##_impl, CPU, cuda::op##_cuda)
#else
#define REGISTER(op) REGISTER_DEVICE_IMPL(op##_impl, CUDA, cuda::op##_cuda)
#endif

namespace mmdgt {

REGISTER(assign_queries);
REGISTER(select_keys);
REGISTER(group_attention);
REGISTER(group_attention_backward);
REGISTER(choose_and_attend);
REGISTER(choose_and_attend_backward);

}  // namespace mmdgt
