// Cosines of pixels with a few vectors in one pass over the pixels, and their gradients: what cosine_similarity_map and
// masked_similarity share.
//
// sum_products and write_cosines are the forward of a stretch of pixels, gradient_factors and differentiate its
// backward. A stretch is read in place in either layout. Channels first, a few channels are taken at a time: the lanes
// are pixels, the channels' factors stay in registers, and the sums of the stretch, in L1, are loaded and stored once
// for all of these channels. Channels last, the lanes are channels, and a few pixels share each load of a prototype.
#pragma once

#include <cmath>
#include <initializer_list>

#include "gingham/cosine_similarity_map.h"
#include "simd.h"

namespace {

// ---------------------------------------------------------------------------------------------- pixels and norms

// Pixels of one image that lie one after the other. Element (channel, pixel) is
// data[channel * channel_stride + pixel * pixel_stride]; one of the strides is 1.
template <class E>
struct Pixels {
  E* data;
  int64_t channel_stride, pixel_stride;

  Pixels from(int64_t channel, int64_t pixel) const {
    return {data + channel * channel_stride + pixel * pixel_stride, channel_stride, pixel_stride};
  }
};

// The pixels of maps of one size as lines that all of them can be read along: one of an image, unless rows lie apart.
struct Lines {
  using Maps = std::initializer_list<const gingham::MapView*>;

  int64_t count, length;  // of one image
  bool channels_last;

  // `features` have the channels and are all in one layout; `others` may be in any.
  Lines(int64_t rows, int64_t columns, int64_t channels, Maps features, Maps others) : columns_(columns) {
    const auto all = [](Maps maps, const auto& condition) {
      for (const gingham::MapView* map : maps) {
        if (!condition(*map)) return false;
      }
      return true;
    };
    const bool pixels_adjacent = all(features, [&](const auto& map) { return pixel_stride(map) == 1; });
    const bool channels_adjacent = all(features, [&](const auto& map) { return map.channel_stride == 1; });
    channels_last = rows * columns == 1 ? channels_adjacent : !pixels_adjacent && (channels_adjacent || channels <= 1);
    const auto continues = [&](const auto& map) { return map.row_stride == columns * map.column_stride; };
    const bool one = rows <= 1 || (columns > 1 ? all(features, continues) && all(others, continues)
                                               : channels_last || pixels_adjacent);
    count = one ? 1 : rows, length = one ? rows * columns : columns;
  }

  template <class E>
  Pixels<E> line(const gingham::MapView& map, int64_t image, int64_t index) const {
    E* data = static_cast<E*>(map.data) + image * map.batch_stride + (count > 1 ? index * map.row_stride : 0);
    return {data, map.channel_stride, length > 1 ? pixel_stride(map) : channels_last ? 0 : 1};
  }

 private:
  int64_t columns_;

  int64_t pixel_stride(const gingham::MapView& map) const { return columns_ > 1 ? map.column_stride : map.row_stride; }
};

// What divides by a norm. All functions take vectors of norms or one norm.
template <class Sum>
struct NormRule {
  Sum eps, inverse_eps;  // inverse_eps: what counts as the inverse of a norm that is not above eps

  explicit NormRule(gingham::CosineNorms norms)
      : eps(Sum(norms.eps)), inverse_eps(norms.torch_compat ? 1 / Sum(norms.eps) : 0) {}

  // The factor that makes a vector a direction.
  template <class T>
  T inverse(T norm) const {
    const T plain = 1 / norm, instead = inverse_eps - T{};
    return norm <= eps ? instead : plain;
  }
  // That times the inverse of the norm itself: by it the direction's gradient loses its part along the vector.
  template <class T>
  T inverse_square(T norm) const {
    const T product = inverse(norm) * (1 / norm);
    return norm == 0 ? T{} : product;
  }
};

template <class Sum>
inline Vector<Sum> square_root(Vector<Sum> x) {
#if defined(__AVX512F__)
  if constexpr (sizeof(Sum) == 4) return (Vector<Sum>)_mm512_sqrt_ps((__m512)x);
  if constexpr (sizeof(Sum) == 8) return (Vector<Sum>)_mm512_sqrt_pd((__m512d)x);
#else
  for (int i = 0; i < kLanes<Sum>; ++i) x[i] = std::sqrt(x[i]);
  return x;
#endif
}

// |vector| of `count` neighbouring elements.
template <class Sum>
inline Sum norm_of(const Sum* vector, int64_t count) {
  Vector<Sum> sum{};
  int64_t i = 0;
  for (; i + kLanes<Sum> <= count; i += kLanes<Sum>) sum += load(vector + i) * load(vector + i);
  const Vector<Sum> rest = load_part(vector + i, count - i);
  return std::sqrt(sum_of_lanes(sum + rest * rest));
}

// ---------------------------------------------------------------------------------------------- forward

// How far ahead memory is asked for. A channel's pixels, or a pixel's channels, are too short a stretch for the
// hardware to see.
constexpr int64_t kPrefetchChannels = 16, kPrefetchPixels = 16;

// Channels whose factors for `prototypes` fit the registers, channels first.
constexpr int channels_at_once(int prototypes) {
  constexpr int kFactors = kRegisters == 32 ? 20 : 8;
  return prototypes >= kFactors ? 1 : kFactors / prototypes >= 8 ? 8 : kFactors / prototypes >= 4 ? 4 : 2;
}
// Pixels whose sums fit the registers, channels last.
constexpr int pixels_at_once(int prototypes) {
  constexpr int kSums = kRegisters == 32 ? 24 : 12;
  return kSums / (prototypes + 1) >= 8 ? 8 : kSums / (prototypes + 1) >= 4 ? 4 : kSums / (prototypes + 1) >= 2 ? 2 : 1;
}

// sums[0] += squares, sums[1 + k] += products with prototype k of kChannels channels.
template <int P, int kChannels, class E, class Sum>
GINGHAM_STEP void add_channels(Pixels<const E> features, int64_t count, const Sum* prototypes, int64_t stride,
                               Sum* sums, int64_t sums_stride) {
  constexpr int kN = kLanes<Sum>;
  Vector<Sum> factors[P][kChannels];
#pragma GCC unroll 16
  for (int k = 0; k < P; ++k) {
#pragma GCC unroll 16
    for (int c = 0; c < kChannels; ++c) factors[k][c] = broadcast(prototypes[k * stride + c]);
  }
  const int64_t next = kPrefetchChannels * features.channel_stride;
  const auto step = [&](int64_t at, const auto& read) __attribute__((always_inline)) {
    Vector<Sum> totals[P + 1];
#pragma GCC unroll 16
    for (int k = 0; k <= P; ++k) totals[k] = load(sums + k * sums_stride + at);
#pragma GCC unroll 16
    for (int c = 0; c < kChannels; ++c) {
      const E* p = features.data + c * features.channel_stride + at;
      if (sizeof(E) == sizeof(Sum) || at % (2 * kN) == 0) __builtin_prefetch(p + next, 0, 2);
      const Vector<Sum> x = read(p);
      totals[0] += x * x;
#pragma GCC unroll 16
      for (int k = 0; k < P; ++k) totals[1 + k] += x * factors[k][c];
    }
#pragma GCC unroll 16
    for (int k = 0; k <= P; ++k) store(sums + k * sums_stride + at, totals[k]);
  };
  int64_t at = 0;
  for (; at + kN <= count; at += kN) step(at, [](const E* p) { return load_widened(p); });
  const int rest = int(count - at);
  if (rest) step(at, [rest](const E* p) { return load_widened(p, rest); });
}

// The same in the other layout, of kPixels pixels and all channels: sums[k][pixel] is written.
template <int P, int kPixels, class E, class Sum>
GINGHAM_STEP void sum_pixels(Pixels<const E> features, int64_t channels, const Sum* prototypes, int64_t stride,
                             Sum* sums, int64_t sums_stride) {
  constexpr int kN = kLanes<Sum>;
  Vector<Sum> totals[kPixels][P + 1] = {};
  const int64_t next = kPrefetchPixels * features.pixel_stride;
  const auto step = [&](int64_t c, const auto& read, const auto& read_sums) __attribute__((always_inline)) {
    Vector<Sum> factors[P];
#pragma GCC unroll 16
    for (int k = 0; k < P; ++k) factors[k] = read_sums(prototypes + k * stride + c);
#pragma GCC unroll 16
    for (int i = 0; i < kPixels; ++i) {
      const E* p = features.data + i * features.pixel_stride + c;
      if (sizeof(E) == sizeof(Sum) || c % (2 * kN) == 0) __builtin_prefetch(p + next, 0, 2);
      const Vector<Sum> x = read(p);
      totals[i][0] += x * x;
#pragma GCC unroll 16
      for (int k = 0; k < P; ++k) totals[i][1 + k] += x * factors[k];
    }
  };
  int64_t c = 0;
  for (; c + kN <= channels; c += kN) {
    step(c, [](const E* p) { return load_widened(p); }, [](const Sum* p) { return load(p); });
  }
  const int rest = int(channels - c);
  if (rest) {
    step(c, [rest](const E* p) { return load_widened(p, rest); }, [rest](const Sum* p) { return load_part(p, rest); });
  }
  for (int i = 0; i < kPixels; ++i) {
    for (int k = 0; k <= P; ++k) sums[k * sums_stride + i] = sum_of_lanes(totals[i][k]);
  }
}

// sums[0][pixel] = |features|^2 and sums[1 + k][pixel] = <features, prototypes[k]> of P prototypes [P][stride]. Rows of
// sums have sums_stride, a multiple of the vector's lanes; they are written to the end of the last vector.
template <int P, class E, class Sum>
inline void sum_products(Pixels<const E> features, int64_t channels, int64_t count, const Sum* prototypes,
                         int64_t stride, Sum* sums, int64_t sums_stride) {
  if (features.pixel_stride == 1) {
    constexpr int kStep = channels_at_once(P);
    const int64_t odd = channels % kStep;
    for (int64_t k = 0; k <= P; ++k) std::memset(sums + k * sums_stride, 0, size_t(count) * sizeof(Sum));
    for (int64_t c = 0; c < odd; ++c) {
      add_channels<P, 1>(features.from(c, 0), count, prototypes + c, stride, sums, sums_stride);
    }
    for (int64_t c = odd; c < channels; c += kStep) {
      add_channels<P, kStep>(features.from(c, 0), count, prototypes + c, stride, sums, sums_stride);
    }
  } else {
    constexpr int kStep = pixels_at_once(P);
    int64_t at = 0;
    for (; at + kStep <= count; at += kStep) {
      sum_pixels<P, kStep>(features.from(0, at), channels, prototypes, stride, sums + at, sums_stride);
    }
    for (; at < count; ++at) {
      sum_pixels<P, 1>(features.from(0, at), channels, prototypes, stride, sums + at, sums_stride);
    }
  }
}

// A row of a map of few rows, such as output: element (k, at), (k, at + 1), ...
template <class E>
inline Vector<Accumulator<E> > load_pixels(Pixels<const E> map, int64_t k, int64_t at, int64_t count) {
  const E* p = map.from(k, at).data;
  if (map.pixel_stride == 1) {
    return count >= kLanes<Accumulator<E> > ? load_widened(p) : load_widened(p, int(count));
  }
  E row[kLanes<Accumulator<E> >] = {};
  for (int64_t i = 0; i < smaller(count, kLanes<Accumulator<E> >); ++i) row[i] = p[i * map.pixel_stride];
  return load_widened(row);
}
template <class E>
inline void store_pixels(Pixels<E> map, int64_t k, int64_t at, Vector<Accumulator<E> > values, int64_t count) {
  E* p = map.from(k, at).data;
  if (map.pixel_stride == 1) {
    return count >= kLanes<Accumulator<E> > ? store_narrowed(p, values) : store_narrowed(p, values, int(count));
  }
  E row[kLanes<Accumulator<E> >];
  store_narrowed(row, values);
  for (int64_t i = 0; i < smaller(count, kLanes<Accumulator<E> >); ++i) p[i * map.pixel_stride] = row[i];
}

// From the sums of sum_products: the cosines with each prototype, whose inverse norms are given, and the pixels' norms.
template <class E, class Sum>
inline void write_cosines(const Sum* sums, int64_t sums_stride, int64_t count, int64_t prototypes,
                          const Sum* inverse_norms, const NormRule<Sum>& rule, Pixels<E> output, Sum* norms) {
  for (int64_t at = 0; at < count; at += kLanes<Sum>) {
    const Vector<Sum> norm = square_root<Sum>(load(sums + at));
    store_part(norms + at, norm, count - at);
    const Vector<Sum> inverse = rule.inverse(norm);
    for (int64_t k = 0; k < prototypes; ++k) {
      const Vector<Sum> product = load(sums + (1 + k) * sums_stride + at);
      store_pixels(output, k, at, product * inverse * inverse_norms[k], count - at);
    }
  }
}

// ---------------------------------------------------------------------------------------------- backward

// With g the gradient of the cosines s, i(x) the inverse norm of x and j(x) the inverse square of NormRule,
//   grad_features[:, p]  = sum_k a[k, p] prototypes[k] - b[p] features[:, p]
//   grad_prototypes[k]   = sum_p a[k, p] features[:, p] - j(prototypes[k]) t[k] prototypes[k]
//   a[k, p] = g[k, p] i(features[:, p]) i(prototypes[k]),  b[p] = j(features[:, p]) sum_k g[k, p] s[k, p],
//   t[k] = sum_p g[k, p] s[k, p].
// This writes a [prototype][a_stride] and b for `count` pixels, with zeros to the end of the last vector, and their
// share of t.
template <class E, class Sum>
inline void gradient_factors(Pixels<const E> grad_output, Pixels<const E> output, const Sum* norms, int64_t count,
                             int64_t prototypes, const Sum* inverse_norms, const NormRule<Sum>& rule, Sum* a,
                             int64_t a_stride, Sum* b, Sum* t) {
  for (int64_t k = 0; k < prototypes; ++k) {
    Vector<Sum> total{};
    for (int64_t at = 0; at < count; at += kLanes<Sum>) {
      const Vector<Sum> norm = load_part(norms + at, smaller(kLanes<Sum>, count - at));
      const Vector<Sum> gradient = load_pixels(grad_output, k, at, count - at);
      const Vector<Sum> product = gradient * load_pixels(output, k, at, count - at);
      total += product;
      store(a + k * a_stride + at, gradient * rule.inverse(norm) * inverse_norms[k]);
      const Vector<Sum> before = k ? load(b + at) : Vector<Sum>{};
      store(b + at, before + product);
    }
    t[k] = sum_of_lanes(total);
    // A norm that is not there may have an infinite inverse.
    for (int64_t at = count; at < round_up(count, kLanes<Sum>); ++at) a[k * a_stride + at] = 0;
  }
  for (int64_t at = 0; at < count; at += kLanes<Sum>) {
    const Vector<Sum> norm = load_part(norms + at, smaller(kLanes<Sum>, count - at));
    store(b + at, prototypes ? load(b + at) * rule.inverse_square(norm) : Vector<Sum>{});
  }
}

// The rest of grad_prototypes: what its features gave, less its part along the prototype itself.
template <class E, class Sum>
inline void write_grad_prototype(const Sum* sums, const Sum* prototype, Sum factor, int64_t channels, E* gradient) {
  for (int64_t c = 0; c < channels; c += kLanes<Sum>) {
    const int64_t count = smaller(kLanes<Sum>, channels - c);
    store_narrowed(gradient + c, load_part(sums + c, count) - factor * load_part(prototype + c, count), int(count));
  }
}

// Channels first: grad_features of kChannels channels of `count` pixels, and sums[k * sums_stride + c] += sum over
// these pixels of a[k] features[c].
template <int P, int kChannels, class E, class Sum>
GINGHAM_STEP void differentiate_channels(Pixels<const E> features, Pixels<E> grad_features, int64_t count,
                                         const Sum* prototypes, int64_t stride, const Sum* a, int64_t a_stride,
                                         const Sum* b, Sum* sums, int64_t sums_stride) {
  constexpr int kN = kLanes<Sum>;
  Vector<Sum> factors[P][kChannels], totals[P][kChannels] = {};
#pragma GCC unroll 16
  for (int k = 0; k < P; ++k) {
#pragma GCC unroll 16
    for (int c = 0; c < kChannels; ++c) factors[k][c] = broadcast(prototypes[k * stride + c]);
  }
  const int64_t next = kPrefetchChannels * features.channel_stride;
  const auto step = [&](int64_t at, const auto& read, const auto& write) __attribute__((always_inline)) {
    Vector<Sum> weights[P];
#pragma GCC unroll 16
    for (int k = 0; k < P; ++k) weights[k] = load(a + k * a_stride + at);
    const Vector<Sum> own = load(b + at);
#pragma GCC unroll 16
    for (int c = 0; c < kChannels; ++c) {
      const E* p = features.data + c * features.channel_stride + at;
      if (sizeof(E) == sizeof(Sum) || at % (2 * kN) == 0) __builtin_prefetch(p + next, 0, 2);
      const Vector<Sum> x = read(p);
      Vector<Sum> gradient = -(own * x);
#pragma GCC unroll 16
      for (int k = 0; k < P; ++k) {
        totals[k][c] += weights[k] * x;
        gradient += weights[k] * factors[k][c];
      }
      write(grad_features.data + c * grad_features.channel_stride + at, gradient);
    }
  };
  int64_t at = 0;
  for (; at + kN <= count; at += kN) {
    step(at, [](const E* p) { return load_widened(p); }, [](E* p, Vector<Sum> x) { store_narrowed(p, x); });
  }
  const int rest = int(count - at);
  if (rest) {
    step(
        at, [rest](const E* p) { return load_widened(p, rest); },
        [rest](E* p, Vector<Sum> x) { store_narrowed(p, x, rest); });
  }
  for (int k = 0; k < P; ++k) {
    for (int c = 0; c < kChannels; ++c) sums[k * sums_stride + c] += sum_of_lanes(totals[k][c]);
  }
}

// Channels last: the same of kPixels pixels and all channels.
template <int P, int kPixels, class E, class Sum>
GINGHAM_STEP void differentiate_pixels(Pixels<const E> features, Pixels<E> grad_features, int64_t channels,
                                       const Sum* prototypes, int64_t stride, const Sum* a, int64_t a_stride,
                                       const Sum* b, Sum* sums, int64_t sums_stride) {
  constexpr int kN = kLanes<Sum>;
  Vector<Sum> weights[kPixels][P], own[kPixels];
#pragma GCC unroll 16
  for (int i = 0; i < kPixels; ++i) {
    own[i] = broadcast(b[i]);
#pragma GCC unroll 16
    for (int k = 0; k < P; ++k) weights[i][k] = broadcast(a[k * a_stride + i]);
  }
  const int64_t next = kPrefetchPixels * features.pixel_stride;
  const auto step = [&](int64_t c, const auto& read, const auto& write, const auto& read_sums, const auto& write_sums)
                        __attribute__((always_inline)) {
                          Vector<Sum> factors[P], totals[P];
#pragma GCC unroll 16
                          for (int k = 0; k < P; ++k) {
                            factors[k] = read_sums(prototypes + k * stride + c);
                            totals[k] = read_sums(sums + k * sums_stride + c);
                          }
#pragma GCC unroll 16
                          for (int i = 0; i < kPixels; ++i) {
                            const E* p = features.data + i * features.pixel_stride + c;
                            if (sizeof(E) == sizeof(Sum) || c % (2 * kN) == 0) __builtin_prefetch(p + next, 0, 2);
                            const Vector<Sum> x = read(p);
                            Vector<Sum> gradient = -(own[i] * x);
#pragma GCC unroll 16
                            for (int k = 0; k < P; ++k) {
                              totals[k] += weights[i][k] * x;
                              gradient += weights[i][k] * factors[k];
                            }
                            write(grad_features.data + i * grad_features.pixel_stride + c, gradient);
                          }
#pragma GCC unroll 16
                          for (int k = 0; k < P; ++k) write_sums(sums + k * sums_stride + c, totals[k]);
                        };
  int64_t c = 0;
  for (; c + kN <= channels; c += kN) {
    step(
        c, [](const E* p) { return load_widened(p); }, [](E* p, Vector<Sum> x) { store_narrowed(p, x); },
        [](const Sum* p) { return load(p); }, [](Sum* p, Vector<Sum> x) { store(p, x); });
  }
  const int rest = int(channels - c);
  if (rest) {
    step(
        c, [rest](const E* p) { return load_widened(p, rest); },
        [rest](E* p, Vector<Sum> x) { store_narrowed(p, x, rest); },
        [rest](const Sum* p) { return load_part(p, rest); }, [rest](Sum* p, Vector<Sum> x) { store_part(p, x, rest); });
  }
}

// grad_features of `channels` channels of `count` pixels from the factors a [P][a_stride] and b of gradient_factors,
// and sums[k][c] += sum over these pixels of a[k] features[c]: the order of that sum follows from the arguments alone.
template <int P, class E, class Sum>
inline void differentiate(Pixels<const E> features, Pixels<E> grad_features, int64_t channels, int64_t count,
                          const Sum* prototypes, int64_t stride, const Sum* a, int64_t a_stride, const Sum* b,
                          Sum* sums, int64_t sums_stride) {
  if (features.pixel_stride == 1 && grad_features.pixel_stride == 1) {
    constexpr int kStep = P == 1 ? 8 : P <= 2 ? 4 : P <= 5 ? 2 : 1;
    const int64_t odd = channels % kStep;
    for (int64_t c = 0; c < odd; ++c) {
      differentiate_channels<P, 1>(features.from(c, 0), grad_features.from(c, 0), count, prototypes + c, stride, a,
                                   a_stride, b, sums + c, sums_stride);
    }
    for (int64_t c = odd; c < channels; c += kStep) {
      differentiate_channels<P, kStep>(features.from(c, 0), grad_features.from(c, 0), count, prototypes + c, stride, a,
                                       a_stride, b, sums + c, sums_stride);
    }
  } else {
    constexpr int kStep = P == 1 ? 8 : P <= 3 ? 4 : P <= 5 ? 2 : 1;
    int64_t at = 0;
    for (; at + kStep <= count; at += kStep) {
      differentiate_pixels<P, kStep>(features.from(0, at), grad_features.from(0, at), channels, prototypes, stride,
                                     a + at, a_stride, b + at, sums, sums_stride);
    }
    for (; at < count; ++at) {
      differentiate_pixels<P, 1>(features.from(0, at), grad_features.from(0, at), channels, prototypes, stride, a + at,
                                 a_stride, b + at, sums, sums_stride);
    }
  }
}

}  // namespace
