// Batch norm of GELU over rows of channels: what stands between the convolutions of
// stem and feed-forward network, in as few passes over memory as its statistics allow.
#pragma once

namespace mmdgt::cpu {

// The normal distribution at x: s = GELU(x) = x cdf(x), its derivative is
// cdf(x) + x density(x).
template <class V>
struct Normal {
  typename V::Reg cdf, density;
};

template <class V>
MMDGT_INLINE Normal<V> normal(typename V::Reg x) {
  using Scalar = typename V::Scalar;
  constexpr auto kSqrtHalf = static_cast<Scalar>(0.70710678118654752);
  constexpr auto kDensity = static_cast<Scalar>(0.39894228040143268);  // 1/sqrt(2 pi)
  if constexpr (std::is_same_v<Scalar, double>) {
    Normal<V> at;
    for (int i = 0; i < V::kWidth; ++i) {
      at.cdf[i] = 0.5 * std::erfc(-x[i] * kSqrtHalf);
      at.density[i] = kDensity * std::exp(-0.5 * x[i] * x[i]);
    }
    return at;
  } else {
    // Abramowitz and Stegun 7.1.26, absolute error 1.5e-7: the tail beyond |x| is a
    // polynomial of 1 / (1 + p |x| / sqrt(2)) times the exponential that the density
    // needs too.
    constexpr Scalar kTail[] = {0.254829592f, -0.284496736f, 1.421413741f, -1.453152027f,
                                1.061405429f};
    const auto exponent = x * x * V::broadcast(-0.72134752f);  // -log2(e) / 2
    // Zero from |x| = 9.5 on, far below that error: gradients times less would be
    // subnormal, with which products take many times as long. NaN stays.
    const auto lowest = V::broadcast(-64);
    const auto power = exponent < lowest ? V::zero() : V::exp2(V::max(lowest, exponent));
    const auto distance = V::max(x, V::zero() - x);
    const auto t =
        V::broadcast(1) /
        V::fmadd(distance, V::broadcast(0.3275911f * kSqrtHalf), V::broadcast(1));
    auto poly = V::broadcast(kTail[4]);
#pragma GCC unroll 4
    for (int i = 3; i >= 0; --i) poly = V::fmadd(poly, t, V::broadcast(kTail[i]));
    const auto tail = poly * t * power * V::broadcast(0.5f);
    return {x < V::zero() ? tail : V::broadcast(1) - tail,
            power * V::broadcast(kDensity)};
  }
}

template <class V, class T>
MMDGT_INLINE typename V::Reg gelu(const T* from) {
  const auto x = V::load(from);
  return x * normal<V>(x).cdf;
}

// The mean of s over the rows, and the sum of squared deviations from it. The first row
// is taken from all before they are summed, which keeps the digits of a large mean.
template <class V, class T>
void gelu_batch_norm_stats(const GeluRows<T>& rows, accumulate_t<T>* mean,
                           accumulate_t<T>* deviation, Scratch& scratch) {
  using Scalar = typename V::Scalar;
  const int64_t channels = rows.channels;
  scratch.start(sizeof(Scalar) * channels);
  Scalar* shift = scratch.take<Scalar>(channels);
  for (int64_t c = 0; c < channels; c += V::kWidth) {
    V::store(shift + c, gelu<V>(rows.x + c));
    V::store(mean + c, V::zero());
    V::store(deviation + c, V::zero());
  }
  for (int64_t row = 0; row < rows.count; ++row) {
    for (int64_t c = 0; c < channels; c += V::kWidth) {
      const auto apart = gelu<V>(rows.x + row * channels + c) - V::load(shift + c);
      V::store(mean + c, V::load(mean + c) + apart);
      V::store(deviation + c, V::fmadd(apart, apart, V::load(deviation + c)));
    }
  }
  const auto share = V::broadcast(Scalar(1) / static_cast<Scalar>(rows.count));
  for (int64_t c = 0; c < channels; c += V::kWidth) {
    const auto total = V::load(mean + c), average = total * share;
    V::store(deviation + c, V::max(V::zero(), V::load(deviation + c) - total * average));
    V::store(mean + c, V::load(shift + c) + average);
  }
}

// y = scale * s + shift, channel by channel.
template <class V, class T>
void gelu_batch_norm_elemt(const GeluRows<T>& rows, const accumulate_t<T>* scale,
                           const accumulate_t<T>* shift, T* y) {
  for (int64_t row = 0; row < rows.count; ++row) {
    const int64_t first = row * rows.channels;
    for (int64_t c = 0; c < rows.channels; c += V::kWidth) {
      const auto s = gelu<V>(rows.x + first + c);
      V::store(y + first + c, V::fmadd(s, V::load(scale + c), V::load(shift + c)));
    }
  }
}

// The sums over the rows of dy, and of dy * (s - mean).
template <class V, class T>
void gelu_batch_norm_backward_reduce(const GeluRows<T>& rows, const T* dy,
                                     const accumulate_t<T>* mean, accumulate_t<T>* sum_dy,
                                     accumulate_t<T>* sum_dy_xmu) {
  for (int64_t c = 0; c < rows.channels; c += V::kWidth) {
    V::store(sum_dy + c, V::zero());
    V::store(sum_dy_xmu + c, V::zero());
  }
  for (int64_t row = 0; row < rows.count; ++row) {
    const int64_t first = row * rows.channels;
    for (int64_t c = 0; c < rows.channels; c += V::kWidth) {
      const auto apart = gelu<V>(rows.x + first + c) - V::load(mean + c);
      const auto g = V::load(dy + first + c);
      V::store(sum_dy + c, V::load(sum_dy + c) + g);
      V::store(sum_dy_xmu + c, V::fmadd(g, apart, V::load(sum_dy_xmu + c)));
    }
  }
}

// dx = (scale * dy + slope * s + shift) * GELU'(x), channel by channel.
template <class V, class T>
void gelu_batch_norm_backward_elemt(const GeluRows<T>& rows, const T* dy,
                                    const accumulate_t<T>* scale,
                                    const accumulate_t<T>* slope,
                                    const accumulate_t<T>* shift, T* dx) {
  for (int64_t row = 0; row < rows.count; ++row) {
    const int64_t first = row * rows.channels;
    for (int64_t c = 0; c < rows.channels; c += V::kWidth) {
      const auto x = V::load(rows.x + first + c);
      const auto at = normal<V>(x);
      const auto rest = V::fmadd(x * at.cdf, V::load(slope + c), V::load(shift + c));
      const auto ds = V::fmadd(V::load(dy + first + c), V::load(scale + c), rest);
      V::store(dx + first + c, ds * V::fmadd(x, at.density, at.cdf));
    }
  }
}

}  // namespace mmdgt::cpu
