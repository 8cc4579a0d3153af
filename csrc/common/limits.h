// What the kernels serve: checked in C++, exported to Python as `_ext.limits`.
#pragma once

#include <c10/core/DeviceType.h>
#include <c10/core/ScalarType.h>

#include <cstdint>
#include <vector>

namespace mmdgt {

constexpr int64_t kMaxGroups = 256;
constexpr int64_t kMaxHeadDim = 128;
constexpr int64_t kHeadDimStep = 8;  // head dims are multiples of it
// choose_and_attend serves so many tokens and head dims, of 16 bits an element.
constexpr int64_t kMaxFewTokens = 256;
constexpr int64_t kMaxFewHeadDim = 32;
constexpr int kMaskWords = kMaxFewTokens / 32;  // with one bit per token
constexpr int64_t kChannelStep = 16;            // channels of GELU and its norm are

// The floating point types of a device's kernels.
inline std::vector<c10::ScalarType> served_dtypes(c10::DeviceType device) {
  if (device == c10::kCUDA) return {c10::kFloat, c10::kHalf, c10::kBFloat16};
  return {c10::kFloat, c10::kDouble, c10::kHalf, c10::kBFloat16};
}

}  // namespace mmdgt
