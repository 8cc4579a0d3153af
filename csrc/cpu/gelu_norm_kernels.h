// Batch norm of GELU, with an optional sum before it, over rows of channels: what
// stands between the convolutions of the feed-forward network, in as few passes over
// memory as its statistics allow. To be included inside a target region (target.h).
#pragma once

namespace mmdgt::cpu {

// The normal distribution at x: GELU(x) = x cdf(x), its derivative is
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
    const auto exponent = x * x * V::broadcast(-0.72134752f);          // -log2(e) / 2
    const auto power = V::exp2(V::max(V::broadcast(-126), exponent));  // NaN stays
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

// s = GELU(x) + residual.
template <class V, class T>
MMDGT_INLINE typename V::Reg activation(const GeluRows<T>& rows, int64_t place) {
  const auto x = V::load(rows.x + place);
  const auto gelu = x * normal<V>(x).cdf;
  return rows.residual ? gelu + V::load(rows.residual + place) : gelu;
}

// The mean of s over the rows, and the sum of squared deviations from it; s itself
// into `sum`, unless null. The first row is taken from all before they are summed,
// which keeps the digits of a large mean.
template <class V, class T>
void gelu_statistics(const GeluRows<T>& rows, T* sum, accumulate_t<T>* mean,
                     accumulate_t<T>* deviation, Scratch& scratch) {
  using Scalar = typename V::Scalar;
  const int64_t channels = rows.channels;
  scratch.start(sizeof(Scalar) * channels);
  Scalar* shift = scratch.take<Scalar>(channels);
  for (int64_t c = 0; c < channels; c += V::kWidth) {
    V::store(shift + c, activation<V>(rows, c));
    V::store(mean + c, V::zero());
    V::store(deviation + c, V::zero());
  }
  for (int64_t row = 0; row < rows.count; ++row) {
    for (int64_t c = 0; c < channels; c += V::kWidth) {
      const auto s = activation<V>(rows, row * channels + c);
      if (sum) V::store(sum + row * channels + c, s);
      const auto apart = s - V::load(shift + c);
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

// out = scale * s + shift, channel by channel.
template <class V, class T>
void gelu_norm(const GeluRows<T>& rows, const accumulate_t<T>* scale,
               const accumulate_t<T>* shift, T* out) {
  for (int64_t row = 0; row < rows.count; ++row) {
    const int64_t first = row * rows.channels;
    for (int64_t c = 0; c < rows.channels; c += V::kWidth) {
      const auto s = activation<V>(rows, first + c);
      V::store(out + first + c, V::fmadd(s, V::load(scale + c), V::load(shift + c)));
    }
  }
}

// Adds more, unless null, to the gradient. Then the sums over the rows of the
// gradient, and of its product with s - mean.
template <class V, class T>
void gelu_norm_sums(const GeluRows<T>& rows, T* grad, const T* more,
                    const accumulate_t<T>* mean, accumulate_t<T>* sum,
                    accumulate_t<T>* product) {
  for (int64_t c = 0; c < rows.channels; c += V::kWidth) {
    V::store(sum + c, V::zero());
    V::store(product + c, V::zero());
  }
  for (int64_t row = 0; row < rows.count; ++row) {
    const int64_t first = row * rows.channels;
    for (int64_t c = 0; c < rows.channels; c += V::kWidth) {
      const auto s = activation<V>(rows, first + c) - V::load(mean + c);
      auto g = V::load(grad + first + c);
      if (more) {
        g = g + V::load(more + first + c);
        V::store(grad + first + c, g);
      }
      V::store(sum + c, V::load(sum + c) + g);
      V::store(product + c, V::fmadd(g, s, V::load(product + c)));
    }
  }
}

// The gradient of s, scale * grad + slope * s + shift channel by channel, takes the
// place of `sum`, which holds s; null if s is GELU(x). That of x takes grad's place.
template <class V, class T>
void gelu_norm_backward(const GeluRows<T>& rows, const accumulate_t<T>* scale,
                        const accumulate_t<T>* slope, const accumulate_t<T>* shift,
                        T* grad, T* sum) {
  for (int64_t row = 0; row < rows.count; ++row) {
    const int64_t first = row * rows.channels;
    for (int64_t c = 0; c < rows.channels; c += V::kWidth) {
      const int64_t place = first + c;
      const auto x = V::load(rows.x + place);
      const auto at = normal<V>(x);
      const auto s = sum ? V::load(sum + place) : x * at.cdf;
      const auto rest = V::fmadd(s, V::load(slope + c), V::load(shift + c));
      const auto grad_s = V::fmadd(V::load(grad + place), V::load(scale + c), rest);
      if (sum) V::store(sum + place, grad_s);
      V::store(grad + place, grad_s * V::fmadd(x, at.density, at.cdf));
    }
  }
}

}  // namespace mmdgt::cpu
