// Depth-wise 3x3 convolutions of maps stored channels last: a pixel at a time, channel
// by channel. To be included inside a target region (target.h).
#pragma once

namespace mmdgt::cpu {

// Calls use(column, taps) for every pixel of the middle row, taps being the nine pixels
// around it, from the upper left to the lower right.
template <class T, class Use>
MMDGT_INLINE void each_neighbourhood(const ThreeRows<T>& rows, const Use& use) {
  const T* taps[9];
  for (int64_t column = 0; column < rows.width; ++column) {
    for (int tap = 0; tap < 9; ++tap) {
      const T* row = rows.x[tap / 3];
      const int64_t other = column + tap % 3 - 1;
      const bool inside = row && other >= 0 && other < rows.width;
      taps[tap] = inside ? row + other * rows.channels : rows.zeros;
    }
    use(column, taps);
  }
}

// out = bias + the sum over the taps of weight[tap] * x, for one row of pixels.
template <class V, class T>
void depthwise_conv(const ThreeRows<T>& rows, const accumulate_t<T>* weight,
                    const accumulate_t<T>* bias, T* out) {
  const int64_t channels = rows.channels;
  each_neighbourhood(rows, [&](int64_t column, const T* const(&taps)[9]) {
    for (int64_t c = 0; c < channels; c += V::kWidth) {
      auto sum = V::load(bias + c);
#pragma GCC unroll 9
      for (int tap = 0; tap < 9; ++tap) {
        sum = V::fmadd(V::load(taps[tap] + c), V::load(weight + tap * channels + c), sum);
      }
      V::store(out + column * channels + c, sum);
    }
  });
}

// Adds the gradients of the weights (9, C), and below them that of the bias (C), that
// come from one row of pixels.
template <class V, class T>
void depthwise_conv_backward_weight(const ThreeRows<T>& rows, const T* grad,
                                    accumulate_t<T>* sums) {
  const int64_t channels = rows.channels;
  each_neighbourhood(rows, [&](int64_t column, const T* const(&taps)[9]) {
    for (int64_t c = 0; c < channels; c += V::kWidth) {
      const auto g = V::load(grad + column * channels + c);
#pragma GCC unroll 9
      for (int tap = 0; tap < 9; ++tap) {
        accumulate_t<T>* to = sums + tap * channels + c;
        V::store(to, V::fmadd(V::load(taps[tap] + c), g, V::load(to)));
      }
      accumulate_t<T>* to = sums + 9 * channels + c;
      V::store(to, V::load(to) + g);
    }
  });
}

}  // namespace mmdgt::cpu
