// Cosines of pixels with a few vectors in one pass over the pixels, and their gradients: what cosine_similarity_map and
// masked_similarity share.
//
// Channels first, a lane is a pixel and the warps of a block share the channels; channels last, the lanes of a warp are
// the channels, 16 bytes at a time where memory allows it, and a warp takes some pixels. Backward goes along the other
// axis, so that each sum over pixels stays in one thread's registers as long as can be: channels first a block takes a
// few channels of all pixels, channels last a block takes all channels of some pixels, whose sums are added up in order
// by the kernel after it. Loads of several pixels are under way before the first of them is used or anything is stored.
// No atomics: the order of every sum follows from the shape.
//
// V is the type of the prototypes in memory, T or Sum<T>.
#pragma once

#include <cmath>
#include <cstdint>
#include <initializer_list>
#include <type_traits>

#include "elements.cuh"
#include "gingham/cosine_similarity_map.h"
#include "pack.cuh"
#include "primitives.cuh"
#include "reduce.cuh"

namespace gingham::cuda {

// ---------------------------------------------------------------------------------------------- maps and norms

// A map as [image][channel][pixel]; pixels of one line where rows do not lie apart. Strides in elements.
template <class T>
struct PixelMap {
  T* data;
  int64_t image, channel, row, column, columns;  // columns: of a line

  __device__ int64_t offset(int64_t pixel) const {
    if (row == 0) return pixel * column;
    const int64_t y = pixel / columns;
    return y * row + (pixel - y * columns) * column;
  }
  __device__ T* at(int64_t i, int64_t c, int64_t pixel) const { return data + i * image + c * channel + offset(pixel); }
};

template <class T>
PixelMap<T> pixel_map(const MapView& view, int64_t rows, int64_t columns) {
  const bool one_line = rows <= 1 || columns <= 1 || view.row_stride == columns * view.column_stride;
  return {static_cast<T*>(view.data),
          view.batch_stride,
          view.channel_stride,
          one_line ? 0 : view.row_stride,
          columns > 1 ? view.column_stride : view.row_stride,
          columns};
}

// Which axis the lanes of a warp run along.
inline bool lanes_are_channels(const MapView& features, int64_t rows, int64_t columns) {
  const int64_t pixel_stride = columns > 1 ? features.column_stride : features.row_stride;
  return rows * columns > 1 && pixel_stride != 1 && features.channel_stride == 1;
}

template <class S>
struct NormRule {
  S eps;
  bool torch_compat;

  // The factor that makes a vector a direction.
  __host__ __device__ S inverse(S norm) const {
    if (norm <= eps) return torch_compat ? 1 / eps : S(0);
    return 1 / norm;
  }
  // That times the inverse of the norm itself: by it the direction's gradient loses its part along the vector.
  __host__ __device__ S inverse_square(S norm) const { return norm == 0 ? S(0) : inverse(norm) * (1 / norm); }
};
template <class S>
NormRule<S> norm_rule(CosineNorms norms) {
  return {static_cast<S>(norms.eps), norms.torch_compat};
}

template <class T>
struct Vectors {  // [image][prototype][channel], channels adjacent
  T* data;
  int64_t image, prototype;

  __device__ T* at(int64_t i, int64_t k, int64_t c) const { return data + i * image + k * prototype + c; }
};

template <class T>
bool is_wide(const PixelMap<T>& map, int64_t channels) {
  return is_wide<T>(map.data, {map.image, map.row, map.column, channels});
}

// ---------------------------------------------------------------------------------------------- norms of prototypes

constexpr int kNormWarps = 4;

template <class T, class V>
struct VectorNorms {
  int64_t images, prototypes, channels;
  Vectors<V> vectors;
  Sum<T>* norms;  // [image][prototype]
};

// A warp takes a prototype.
template <class T, class V>
__global__ void __launch_bounds__(kNormWarps * 32) find_norms(const __grid_constant__ VectorNorms<T, V> work) {
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kNormWarps + warp;
  const bool active = index < work.images * work.prototypes;
  Sum<T> total = 0;
  if (active) {
    const V* vector = work.vectors.at(index / work.prototypes, index % work.prototypes, 0);
    for (int64_t c = lane; c < work.channels; c += 32) {
      const Sum<T> x = to_sum(vector[c]);
      total += x * x;
    }
  }
  total = sum_of_warp(total);
  if (active && lane == 0) work.norms[index] = sqrt(total);
}

template <class T, class V>
void launch_find_norms(const VectorNorms<T, V>& work, void* stream) {
  const int64_t blocks = (work.images * work.prototypes + kNormWarps - 1) / kNormWarps;
  launch(find_norms<T, V>, blocks, kNormWarps * 32, 0, stream, work);
}

// ---------------------------------------------------------------------------------------------- forward

// Cosines of `count` prototypes from `first` on; the first of several such launches writes the pixels' norms.
template <class T, class V>
struct CosinePass {
  int64_t images, channels, pixels, prototypes, first;
  int count;
  NormRule<Sum<T>> rule;
  PixelMap<const T> features;
  Vectors<V> vectors;
  const Sum<T>* vector_norms;  // [image][prototype]
  PixelMap<T> output;
  Sum<T>* norms;  // [image][pixel]
};

template <class T, class V>
__device__ void write_cosine(const CosinePass<T, V>& pass, int64_t image, int64_t pixel, int k, Sum<T> product,
                             Sum<T> inverse) {
  const int64_t prototype = pass.first + k;
  const Sum<T> norm = pass.vector_norms[image * pass.prototypes + prototype];
  *pass.output.at(image, prototype, pixel) = from_sum<T>(product * inverse * pass.rule.inverse(norm));
}

constexpr int kCosineWarps = 8;

// Channels first: a block takes 32 pixels, a warp every kCosineWarps-th channel of them.
template <class T, class V, int P>
__global__ void __launch_bounds__(kCosineWarps * 32) cosines_by_pixel(const __grid_constant__ CosinePass<T, V> pass) {
  using S = Sum<T>;
  GINGHAM_SHARED_MEMORY(memory);
  S* shared = reinterpret_cast<S*>(memory);  // [warp][1 + P][lane]
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int64_t groups = (pass.pixels + 31) / 32;
  const int64_t image = blockIdx.x / groups, pixel = blockIdx.x % groups * 32 + lane;
  S totals[P + 1] = {};
  if (pixel < pass.pixels) {
    const T* p = pass.features.at(image, 0, pixel);
#pragma unroll 8
    for (int64_t c = warp; c < pass.channels; c += kCosineWarps) {
      const S x = to_sum(p[c * pass.features.channel]);
      totals[0] += x * x;
#pragma unroll
      for (int k = 0; k < P; ++k) {
        if (k < pass.count) totals[1 + k] += x * to_sum(*pass.vectors.at(image, pass.first + k, c));
      }
    }
  }
#pragma unroll
  for (int k = 0; k <= P; ++k) shared[(warp * (P + 1) + k) * 32 + lane] = totals[k];
  __syncthreads();
  if (pixel >= pass.pixels) return;
  S square = 0;
  for (int w = 0; w < kCosineWarps; ++w) square += shared[w * (P + 1) * 32 + lane];
  const S norm = sqrt(square);
  if (warp == 0 && pass.first == 0) pass.norms[image * pass.pixels + pixel] = norm;
  for (int k = warp; k < pass.count; k += kCosineWarps) {
    S product = 0;
    for (int w = 0; w < kCosineWarps; ++w) product += shared[(w * (P + 1) + 1 + k) * 32 + lane];
    write_cosine(pass, image, pixel, k, product, pass.rule.inverse(norm));
  }
}

constexpr int kPixelsOfWarp = 4;

// Channels last: a warp takes kPixelsOfWarp pixels.
template <class T, class V, int P, bool wide>
__global__ void __launch_bounds__(kCosineWarps * 32) cosines_by_channel(const __grid_constant__ CosinePass<T, V> pass) {
  using S = Sum<T>;
  constexpr int kCount = Pack<T, wide>::kCount;
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int64_t groups = (pass.pixels + kPixelsOfWarp - 1) / kPixelsOfWarp;
  const int64_t group = static_cast<int64_t>(blockIdx.x) * kCosineWarps + warp;
  if (group >= pass.images * groups) return;  // a whole warp
  const int64_t image = group / groups, first = group % groups * kPixelsOfWarp;
  const T* p[kPixelsOfWarp];
#pragma unroll
  for (int i = 0; i < kPixelsOfWarp; ++i) {
    p[i] = pass.features.at(image, 0, first + i < pass.pixels ? first + i : pass.pixels - 1);
  }
  S totals[kPixelsOfWarp][P + 1] = {};
  for (int64_t c = lane * kCount; c < pass.channels; c += 32 * kCount) {
    Pack<T, wide> x[kPixelsOfWarp];
#pragma unroll
    for (int i = 0; i < kPixelsOfWarp; ++i) x[i] = *reinterpret_cast<const Pack<T, wide>*>(p[i] + c);
#pragma unroll
    for (int e = 0; e < kCount; ++e) {
      S factors[P];
#pragma unroll
      for (int k = 0; k < P; ++k) {
        factors[k] = k < pass.count ? to_sum(*pass.vectors.at(image, pass.first + k, c + e)) : S(0);
      }
#pragma unroll
      for (int i = 0; i < kPixelsOfWarp; ++i) {
        const S value = to_sum(x[i].x[e]);
        totals[i][0] += value * value;
#pragma unroll
        for (int k = 0; k < P; ++k) totals[i][1 + k] += value * factors[k];
      }
    }
  }
#pragma unroll
  for (int i = 0; i < kPixelsOfWarp; ++i) {
    const S norm = sqrt(sum_of_warp(totals[i][0]));
    const bool writes = lane == 0 && first + i < pass.pixels;
    if (writes && pass.first == 0) pass.norms[image * pass.pixels + first + i] = norm;
#pragma unroll
    for (int k = 0; k < P; ++k) {
      const S product = sum_of_warp(totals[i][1 + k]);
      if (writes && k < pass.count) write_cosine(pass, image, first + i, k, product, pass.rule.inverse(norm));
    }
  }
}

// One pass over the features for up to P prototypes. channels_last: as lanes_are_channels says.
template <int P, class T, class V>
void launch_cosines(const CosinePass<T, V>& pass, bool channels_last, void* stream) {
  if (channels_last) {
    const int64_t groups = pass.images * ((pass.pixels + kPixelsOfWarp - 1) / kPixelsOfWarp);
    const auto kernel =
        is_wide(pass.features, pass.channels) ? cosines_by_channel<T, V, P, true> : cosines_by_channel<T, V, P, false>;
    launch(kernel, (groups + kCosineWarps - 1) / kCosineWarps, kCosineWarps * 32, 0, stream, pass);
  } else {
    const size_t bytes = static_cast<size_t>(kCosineWarps) * (P + 1) * 32 * sizeof(Sum<T>);
    launch(cosines_by_pixel<T, V, P>, pass.images * ((pass.pixels + 31) / 32), kCosineWarps * 32, bytes, stream, pass);
  }
}

// ---------------------------------------------------------------------------------------------- backward

// With g the gradient of the cosines s, i(x) the inverse norm of x and j(x) the inverse square of NormRule,
//   grad_features[:, p]  = sum_k a[k, p] prototypes[k] - b[p] features[:, p]
//   grad_prototypes[k]   = sum_p a[k, p] features[:, p] - j(prototypes[k]) t[k] prototypes[k]
//   a[k, p] = g[k, p] i(features[:, p]) i(prototypes[k]),  b[p] = j(features[:, p]) sum_k g[k, p] s[k, p],
//   t[k] = sum_p g[k, p] s[k, p].
constexpr int kFactorWarps = 4, kFactorThreads = kFactorWarps * 32;
inline int64_t factor_blocks(int64_t pixels) { return (pixels + kFactorThreads - 1) / kFactorThreads; }

template <class T>
struct FactorPass {
  int64_t images, pixels, prototypes;
  NormRule<Sum<T>> rule;
  PixelMap<const T> output, grad_output;
  const Sum<T>* norms;         // [image][pixel]
  const Sum<T>* vector_norms;  // [image][prototype]
  Sum<T>* a;                   // [image][prototype][pixel]
  Sum<T>* b;                   // [image][pixel]
  Sum<T>* t;                   // [image][factor block][prototype]: each block's share
};

// A thread takes a pixel.
template <class T>
__global__ void __launch_bounds__(kFactorThreads) find_factors(const __grid_constant__ FactorPass<T> pass) {
  using S = Sum<T>;
  GINGHAM_SHARED_MEMORY(memory);
  S* shared = reinterpret_cast<S*>(memory);
  const int64_t groups = (pass.pixels + kFactorThreads - 1) / kFactorThreads;
  const int64_t image = blockIdx.x / groups, group = blockIdx.x % groups;
  const int64_t pixel = group * kFactorThreads + static_cast<int>(threadIdx.x);
  const bool active = pixel < pass.pixels;
  const S norm = active ? pass.norms[image * pass.pixels + pixel] : S(1);
  S total = 0;
  for (int64_t k = 0; k < pass.prototypes; ++k) {
    S product = 0;
    if (active) {
      const S gradient = to_sum(*pass.grad_output.at(image, k, pixel));
      product = gradient * to_sum(*pass.output.at(image, k, pixel));
      pass.a[(image * pass.prototypes + k) * pass.pixels + pixel] =
          gradient * pass.rule.inverse(norm) * pass.rule.inverse(pass.vector_norms[image * pass.prototypes + k]);
    }
    total += product;
    const S of_block = sum_of_block<kFactorWarps>(product, shared);
    if (threadIdx.x == 0) pass.t[(image * groups + group) * pass.prototypes + k] = of_block;
  }
  if (active) pass.b[image * pass.pixels + pixel] = total * pass.rule.inverse_square(norm);
}

template <class T>
void launch_find_factors(const FactorPass<T>& pass, void* stream) {
  launch(find_factors<T>, pass.images * factor_blocks(pass.pixels), kFactorThreads, kFactorWarps * sizeof(Sum<T>),
         stream, pass);
}

// grad_features, and each part's share of the sums over pixels.
template <class T, class V>
struct GradientPass {
  int64_t images, channels, pixels, prototypes, parts;
  PixelMap<const T> features;
  PixelMap<T> grad_features;
  Vectors<V> vectors;
  const Sum<T>* a;  // [image][prototype][pixel]
  const Sum<T>* b;  // [image][pixel]
  Sum<T>* sums;     // [image][part][prototype][channel]
  int along;        // threads of a block along the channels, where these are last
};

constexpr int kGradientWarps = 8, kGradientThreads = kGradientWarps * 32;
template <int P>
constexpr int kPixelsAhead = P == 1 ? 4 : 2;

// Channels first: a block takes kChannels channels of all pixels.
template <class T, class V, int P, int kChannels>
__global__ void __launch_bounds__(kGradientThreads)
    gradients_by_pixel(const __grid_constant__ GradientPass<T, V> pass) {
  using S = Sum<T>;
  GINGHAM_SHARED_MEMORY(memory);
  S* shared = reinterpret_cast<S*>(memory);
  const int64_t groups = (pass.channels + kChannels - 1) / kChannels;
  const int64_t image = blockIdx.x / groups, first = blockIdx.x % groups * kChannels;
  S factors[kChannels][P], totals[kChannels][P] = {};
#pragma unroll
  for (int c = 0; c < kChannels; ++c) {
#pragma unroll
    for (int k = 0; k < P; ++k) {
      const bool exists = first + c < pass.channels && k < pass.prototypes;
      factors[c][k] = exists ? to_sum(*pass.vectors.at(image, k, first + c)) : S(0);
    }
  }
  constexpr int kAhead = kPixelsAhead<P>;
  for (int64_t begin = static_cast<int>(threadIdx.x); begin < pass.pixels; begin += kAhead * kGradientThreads) {
    int64_t from[kAhead], to[kAhead];
    S own[kAhead], weights[kAhead][P];
    T x[kAhead][kChannels];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const int64_t next = begin + i * kGradientThreads, pixel = next < pass.pixels ? next : begin;
      from[i] = pass.features.offset(pixel), to[i] = pass.grad_features.offset(pixel);
    }
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const int64_t next = begin + i * kGradientThreads, pixel = next < pass.pixels ? next : begin;
      own[i] = pass.b[image * pass.pixels + pixel];
#pragma unroll
      for (int k = 0; k < P; ++k) {
        weights[i][k] = k < pass.prototypes ? pass.a[(image * pass.prototypes + k) * pass.pixels + pixel] : S(0);
      }
#pragma unroll
      for (int c = 0; c < kChannels; ++c) {
        const int64_t channel = first + c < pass.channels ? first + c : first;
        x[i][c] = pass.features.data[image * pass.features.image + channel * pass.features.channel + from[i]];
      }
    }
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      if (begin + i * kGradientThreads >= pass.pixels) break;
      T* pixel = pass.grad_features.data + image * pass.grad_features.image + to[i];
#pragma unroll
      for (int c = 0; c < kChannels; ++c) {
        if (first + c >= pass.channels) break;
        S gradient = -(own[i] * to_sum(x[i][c]));
#pragma unroll
        for (int k = 0; k < P; ++k) {
          gradient += weights[i][k] * factors[c][k];
          totals[c][k] += weights[i][k] * to_sum(x[i][c]);
        }
        pixel[(first + c) * pass.grad_features.channel] = from_sum<T>(gradient);
      }
    }
  }
#pragma unroll
  for (int c = 0; c < kChannels; ++c) {
#pragma unroll
    for (int k = 0; k < P; ++k) {
      const S total = sum_of_block<kGradientWarps>(totals[c][k], shared);
      if (threadIdx.x == 0 && first + c < pass.channels && k < pass.prototypes) {
        pass.sums[(image * pass.prototypes + k) * pass.channels + first + c] = total;
      }
    }
  }
}

// Channels last: how many threads of a block lie along the channels; the others take pixels beside them.
inline int threads_along(int64_t packs, int threads) {
  int along = 1;
  while (along < packs && along < threads) along *= 2;
  return along;
}

// The sums of the block's threads over the same channels, by the first of them. shared: kCount values a thread, free to
// be used again when the function has returned.
template <int kCount, class S>
__device__ void sum_beside(S (&totals)[kCount], int along, int threads, S* shared) {
  const int thread = static_cast<int>(threadIdx.x);
  __syncthreads();
#pragma unroll
  for (int e = 0; e < kCount; ++e) shared[e * threads + thread] = totals[e];
  __syncthreads();
  if (thread >= along) return;
  for (int other = thread + along; other < threads; other += along) {
#pragma unroll
    for (int e = 0; e < kCount; ++e) totals[e] += shared[e * threads + other];
  }
}

// Channels last: a block takes some channels of the pixels of one part, a thread a pack of them in every so many
// pixels.
template <class T, class V, int P, bool wide>
__global__ void __launch_bounds__(kGradientThreads)
    gradients_by_channel(const __grid_constant__ GradientPass<T, V> pass) {
  using S = Sum<T>;
  GINGHAM_SHARED_MEMORY(memory);
  constexpr int kCount = Pack<T, wide>::kCount, kAhead = kPixelsAhead<P>;
  const int thread = static_cast<int>(threadIdx.x), along = pass.along, beside = kGradientThreads / along;
  const int64_t groups = (pass.channels + along * kCount - 1) / (along * kCount);
  const int64_t group = blockIdx.x % groups, part = blockIdx.x / groups % pass.parts;
  const int64_t image = blockIdx.x / groups / pass.parts;
  const int64_t c = (group * along + thread % along) * kCount;
  const bool active = c < pass.channels;
  S factors[P][kCount], totals[P][kCount] = {};
#pragma unroll
  for (int k = 0; k < P; ++k) {
#pragma unroll
    for (int e = 0; e < kCount; ++e) {
      factors[k][e] = active && k < pass.prototypes ? to_sum(*pass.vectors.at(image, k, c + e)) : S(0);
    }
  }
  const int64_t end = pass.pixels * (part + 1) / pass.parts;
  const T* features = pass.features.data + image * pass.features.image + c;
  T* grad_features = pass.grad_features.data + image * pass.grad_features.image + c;
  for (int64_t begin = pass.pixels * part / pass.parts + thread / along; active && begin < end;
       begin += kAhead * beside) {
    int64_t from[kAhead], to[kAhead];
    Pack<T, wide> packs[kAhead];
    S own[kAhead], weights[kAhead][P];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const int64_t pixel = begin + i * beside < end ? begin + i * beside : begin;
      from[i] = pass.features.offset(pixel), to[i] = pass.grad_features.offset(pixel);
    }
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const int64_t pixel = begin + i * beside < end ? begin + i * beside : begin;
      packs[i] = *reinterpret_cast<const Pack<T, wide>*>(features + from[i]);
      own[i] = pass.b[image * pass.pixels + pixel];
#pragma unroll
      for (int k = 0; k < P; ++k) {
        weights[i][k] = k < pass.prototypes ? pass.a[(image * pass.prototypes + k) * pass.pixels + pixel] : S(0);
      }
    }
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      if (begin + i * beside >= end) break;
      Pack<T, wide> gradients;
#pragma unroll
      for (int e = 0; e < kCount; ++e) {
        const S x = to_sum(packs[i].x[e]);
        S gradient = -(own[i] * x);
#pragma unroll
        for (int k = 0; k < P; ++k) {
          gradient += weights[i][k] * factors[k][e];
          totals[k][e] += weights[i][k] * x;
        }
        gradients.x[e] = from_sum<T>(gradient);
      }
      *reinterpret_cast<Pack<T, wide>*>(grad_features + to[i]) = gradients;
    }
  }
#pragma unroll
  for (int k = 0; k < P; ++k) {
    if (k >= pass.prototypes) break;
    sum_beside(totals[k], along, kGradientThreads, reinterpret_cast<S*>(memory));
    if (thread >= along || !active) continue;
    S* sums = pass.sums + ((image * pass.parts + part) * pass.prototypes + k) * pass.channels + c;
#pragma unroll
    for (int e = 0; e < kCount; ++e) sums[e] = totals[k][e];
  }
}

// How many parts the pixels are cut into, by the shape alone.
inline int64_t gradient_parts(int64_t pixels, bool channels_last) {
  return channels_last ? (pixels + 31) / 32 < 128 ? (pixels + 31) / 32 : 128 : 1;
}

template <int P, class T, class V>
void launch_gradients(GradientPass<T, V> pass, bool channels_last, void* stream) {
  if (channels_last) {
    const bool wide = is_wide(pass.features, pass.channels) && is_wide(pass.grad_features, pass.channels);
    const int64_t count = wide ? Pack<T, true>::kCount : 1, packs = (pass.channels + count - 1) / count;
    pass.along = threads_along(packs, kGradientThreads);
    const auto kernel = wide ? gradients_by_channel<T, V, P, true> : gradients_by_channel<T, V, P, false>;
    launch(kernel, pass.images * pass.parts * ((packs + pass.along - 1) / pass.along), kGradientThreads,
           kGradientThreads * static_cast<size_t>(count) * sizeof(Sum<T>), stream, pass);
  } else {
    constexpr int kChannels = P == 1 ? 4 : 2;
    launch(gradients_by_pixel<T, V, P, kChannels>, pass.images * ((pass.channels + kChannels - 1) / kChannels),
           kGradientThreads, kGradientWarps * sizeof(Sum<T>), stream, pass);
  }
}

// grad_prototypes from the parts' sums.
template <class T, class V>
struct FinishPass {
  int64_t images, channels, prototypes, parts, factor_blocks;
  NormRule<Sum<T>> rule;
  Vectors<V> vectors;
  const Sum<T>* vector_norms;  // [image][prototype]
  const Sum<T>* t;             // [image][factor block][prototype]
  const Sum<T>* sums;          // [image][part][prototype][channel]
  Vectors<V> grad_vectors;
};

template <class V, class S>
__device__ V as_vector(S x) {
  if constexpr (std::is_same_v<V, S>) {
    return x;
  } else {
    return from_sum<V>(x);
  }
}

constexpr int kFinishWarps = 8;

// A block takes 32 channels of a prototype; its warps share the parts.
template <class T, class V>
__global__ void __launch_bounds__(kFinishWarps * 32, 2) finish_vectors(const __grid_constant__ FinishPass<T, V> pass) {
  using S = Sum<T>;
  GINGHAM_SHARED_MEMORY(memory);
  S* shared = reinterpret_cast<S*>(memory);  // [warp][lane]
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int64_t groups = (pass.channels + 31) / 32;
  const int64_t k = blockIdx.x / groups % pass.prototypes, image = blockIdx.x / groups / pass.prototypes;
  const int64_t c = blockIdx.x % groups * 32 + lane;
  S t = 0;
  for (int64_t block = lane; block < pass.factor_blocks; block += 32) {
    t += pass.t[(image * pass.factor_blocks + block) * pass.prototypes + k];
  }
  t = sum_of_warp(t) * pass.rule.inverse_square(pass.vector_norms[image * pass.prototypes + k]);
  S total = 0;
  if (c < pass.channels && warp < pass.parts) {
    const S* sums = pass.sums + ((image * pass.parts + warp) * pass.prototypes + k) * pass.channels + c;
    total = sum_of_memory<8>(sums, (pass.parts - warp + kFinishWarps - 1) / kFinishWarps,
                             kFinishWarps * pass.prototypes * pass.channels);
  }
  shared[warp * 32 + lane] = total;
  __syncthreads();
  if (warp > 0 || c >= pass.channels) return;
  for (int other = 1; other < kFinishWarps; ++other) total += shared[other * 32 + lane];
  *pass.grad_vectors.at(image, k, c) = as_vector<V>(total - t * to_sum(*pass.vectors.at(image, k, c)));
}

template <class T, class V>
void launch_finish(const FinishPass<T, V>& pass, void* stream) {
  launch(finish_vectors<T, V>, pass.images * pass.prototypes * ((pass.channels + 31) / 32), kFinishWarps * 32,
         kFinishWarps * 32 * sizeof(Sum<T>), stream, pass);
}

}  // namespace gingham::cuda
