// The cosine of every pixel with a set of prototypes on CUDA, forward and backward.
//
// Up to kFewPrototypes are one pass over the features (cosine.cuh), bound by the bytes of that pass; backward reads the
// features once more and writes their gradient. More of them are matrix products in tiles of 64 x 64 on the CUDA cores
// (operands pass through shared memory, widened to the type of the sums), bound by their 2 P C operations a pixel
// forward and twice that backward:
//   forward   cosines[pixel][prototype], the pixels' norms summed up from the same tiles;
//   backward  grad_features[pixel][channel] = a x prototypes - b features, with the factors of find_factors, and
//             sums[prototype][channel] = a x features over parts of the pixels, added up in order by finish_vectors.
#include <cstdint>
#include <type_traits>

#include "cosine.cuh"
#include "elements.cuh"
#include "gingham/cosine_similarity_map.h"
#include "primitives.cuh"
#include "workspace.cuh"

namespace gingham::cuda {
namespace {

constexpr int64_t kFewPrototypes = 8;

// ---------------------------------------------------------------------------------------------- a product in tiles

constexpr int kTile = 64, kDepth = 16, kRow = kTile + 1, kTileThreads = 256, kEach = 4;

template <class S>
struct TileMemory {
  S left[kDepth][kRow], right[kDepth][kRow];
};

// Which axis of an operand is adjacent in memory.
enum class Adjacent { row, depth };

// tile[d][r] = value(r, d), by all threads. value gives zero where there is nothing.
template <class S, class Value>
__device__ void load_tile(S (&tile)[kDepth][kRow], Adjacent adjacent, const Value& value) {
#pragma unroll
  for (int i = 0; i < kTile * kDepth / kTileThreads; ++i) {
    const int index = static_cast<int>(threadIdx.x) + i * kTileThreads;
    const int row = adjacent == Adjacent::row ? index % kTile : index / kDepth;
    const int depth = adjacent == Adjacent::row ? index / kTile : index % kDepth;
    tile[depth][row] = value(row, depth);
  }
}

// sums[i][j], of row y + 16 i and column x + 16 j of the tile, with x, y = thread % 16, thread / 16: the sums over
// [begin, end) of left(row, depth) * right(column, depth). use_tiles is called with each pair of tiles in memory.
template <class S, class Left, class Right, class Use>
__device__ void multiply_tiles(S (&sums)[kEach][kEach], TileMemory<S>& memory, int64_t begin, int64_t end,
                               Adjacent left_adjacent, const Left& left, Adjacent right_adjacent, const Right& right,
                               const Use& use_tiles) {
  const int x = static_cast<int>(threadIdx.x) % 16, y = static_cast<int>(threadIdx.x) / 16;
  for (int64_t at = begin; at < end; at += kDepth) {
    load_tile(memory.left, left_adjacent, [&](int row, int d) { return at + d < end ? left(row, at + d) : S(0); });
    load_tile(memory.right, right_adjacent, [&](int row, int d) { return at + d < end ? right(row, at + d) : S(0); });
    __syncthreads();
#pragma unroll
    for (int d = 0; d < kDepth; ++d) {
      S a[kEach], b[kEach];
#pragma unroll
      for (int i = 0; i < kEach; ++i) a[i] = memory.left[d][y + 16 * i], b[i] = memory.right[d][x + 16 * i];
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
#pragma unroll
        for (int j = 0; j < kEach; ++j) sums[i][j] += a[i] * b[j];
      }
    }
    use_tiles();
    __syncthreads();
  }
}
template <class S, class Store>
__device__ void for_each_sum(const S (&sums)[kEach][kEach], const Store& store) {
  const int x = static_cast<int>(threadIdx.x) % 16, y = static_cast<int>(threadIdx.x) / 16;
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
#pragma unroll
    for (int j = 0; j < kEach; ++j) store(y + 16 * i, x + 16 * j, sums[i][j]);
  }
}

inline int64_t tiles_of(int64_t extent) { return (extent + kTile - 1) / kTile; }

// ---------------------------------------------------------------------------------------------- many prototypes

// Columns of the tile are what is adjacent in the output: pixels, or prototypes where channels are last.
template <class T, bool channels_last>
__global__ void __launch_bounds__(kTileThreads) cosines_by_tile(const __grid_constant__ CosinePass<T, T> pass) {
  using S = Sum<T>;
  GINGHAM_SHARED_MEMORY(bytes);
  auto& memory = *reinterpret_cast<TileMemory<S>*>(bytes);
  S* inverses = reinterpret_cast<S*>(bytes + sizeof(TileMemory<S>));  // of the pixels' norms
  const int64_t pixel_tiles = (pass.pixels + kTile - 1) / kTile,
                prototype_tiles = (pass.prototypes + kTile - 1) / kTile;
  const int64_t first_prototype = blockIdx.x % prototype_tiles * kTile;
  const int64_t first_pixel = blockIdx.x / prototype_tiles % pixel_tiles * kTile;
  const int64_t image = blockIdx.x / prototype_tiles / pixel_tiles;
  const auto feature = [&](int row, int64_t c) {
    return first_pixel + row < pass.pixels ? to_sum(*pass.features.at(image, c, first_pixel + row)) : S(0);
  };
  const auto vector = [&](int row, int64_t c) {
    return first_prototype + row < pass.prototypes ? to_sum(*pass.vectors.at(image, first_prototype + row, c)) : S(0);
  };
  S sums[kEach][kEach] = {}, square = 0;
  const auto add_squares = [&](const S(&tile)[kDepth][kRow]) {
    if (threadIdx.x >= kTile) return;
#pragma unroll
    for (int d = 0; d < kDepth; ++d) square += tile[d][threadIdx.x] * tile[d][threadIdx.x];
  };
  if constexpr (channels_last) {
    multiply_tiles(sums, memory, 0, pass.channels, Adjacent::depth, feature, Adjacent::depth, vector,
                   [&] { add_squares(memory.left); });
  } else {
    multiply_tiles(sums, memory, 0, pass.channels, Adjacent::depth, vector, Adjacent::row, feature,
                   [&] { add_squares(memory.right); });
  }
  const int64_t own_pixel = first_pixel + static_cast<int>(threadIdx.x);
  if (threadIdx.x < kTile) {
    const S norm = sqrt(square);
    inverses[threadIdx.x] = pass.rule.inverse(norm);
    if (own_pixel < pass.pixels && first_prototype == 0) pass.norms[image * pass.pixels + own_pixel] = norm;
  }
  __syncthreads();
  for_each_sum(sums, [&](int row, int column, S product) {
    const int pixel = channels_last ? row : column, k = channels_last ? column : row;
    if (first_pixel + pixel >= pass.pixels || first_prototype + k >= pass.prototypes) return;
    const S norm = pass.vector_norms[image * pass.prototypes + first_prototype + k];
    *pass.output.at(image, first_prototype + k, first_pixel + pixel) =
        from_sum<T>(product * inverses[pixel] * pass.rule.inverse(norm));
  });
}

// Columns of the tile are pixels, or channels where these are last.
template <class T, bool channels_last>
__global__ void __launch_bounds__(kTileThreads)
    feature_gradients_by_tile(const __grid_constant__ GradientPass<T, T> pass) {
  using S = Sum<T>;
  GINGHAM_SHARED_MEMORY(bytes);
  auto& memory = *reinterpret_cast<TileMemory<S>*>(bytes);
  const int64_t pixel_tiles = (pass.pixels + kTile - 1) / kTile, channel_tiles = (pass.channels + kTile - 1) / kTile;
  const int64_t first_channel = blockIdx.x % channel_tiles * kTile;
  const int64_t first_pixel = blockIdx.x / channel_tiles % pixel_tiles * kTile;
  const int64_t image = blockIdx.x / channel_tiles / pixel_tiles;
  const auto weight = [&](int row, int64_t k) {
    const int64_t pixel = first_pixel + row;
    return pixel < pass.pixels ? pass.a[(image * pass.prototypes + k) * pass.pixels + pixel] : S(0);
  };
  const auto vector = [&](int row, int64_t k) {
    return first_channel + row < pass.channels ? to_sum(*pass.vectors.at(image, k, first_channel + row)) : S(0);
  };
  S sums[kEach][kEach] = {};
  if constexpr (channels_last) {
    multiply_tiles(sums, memory, 0, pass.prototypes, Adjacent::row, weight, Adjacent::row, vector, [] {});
  } else {
    multiply_tiles(sums, memory, 0, pass.prototypes, Adjacent::row, vector, Adjacent::row, weight, [] {});
  }
  for_each_sum(sums, [&](int row, int column, S product) {
    const int64_t pixel = first_pixel + (channels_last ? row : column);
    const int64_t c = first_channel + (channels_last ? column : row);
    if (pixel >= pass.pixels || c >= pass.channels) return;
    const S x = to_sum(*pass.features.at(image, c, pixel));
    *pass.grad_features.at(image, c, pixel) = from_sum<T>(product - pass.b[image * pass.pixels + pixel] * x);
  });
}

template <class T, bool channels_last>
__global__ void __launch_bounds__(kTileThreads)
    vector_gradients_by_tile(const __grid_constant__ GradientPass<T, T> pass) {
  using S = Sum<T>;
  GINGHAM_SHARED_MEMORY(bytes);
  auto& memory = *reinterpret_cast<TileMemory<S>*>(bytes);
  const int64_t channel_tiles = (pass.channels + kTile - 1) / kTile;
  const int64_t prototype_tiles = (pass.prototypes + kTile - 1) / kTile;
  const int64_t first_channel = blockIdx.x % channel_tiles * kTile;
  const int64_t first_prototype = blockIdx.x / channel_tiles % prototype_tiles * kTile;
  const int64_t part = blockIdx.x / channel_tiles / prototype_tiles % pass.parts;
  const int64_t image = blockIdx.x / channel_tiles / prototype_tiles / pass.parts;
  const auto weight = [&](int row, int64_t pixel) {
    const int64_t k = first_prototype + row;
    return k < pass.prototypes ? pass.a[(image * pass.prototypes + k) * pass.pixels + pixel] : S(0);
  };
  const auto feature = [&](int row, int64_t pixel) {
    const int64_t c = first_channel + row;
    return c < pass.channels ? to_sum(*pass.features.at(image, c, pixel)) : S(0);
  };
  S sums[kEach][kEach] = {};
  multiply_tiles(sums, memory, pass.pixels * part / pass.parts, pass.pixels * (part + 1) / pass.parts, Adjacent::depth,
                 weight, channels_last ? Adjacent::row : Adjacent::depth, feature, [] {});
  for_each_sum(sums, [&](int row, int column, S total) {
    const int64_t k = first_prototype + row, c = first_channel + column;
    if (k >= pass.prototypes || c >= pass.channels) return;
    pass.sums[((image * pass.parts + part) * pass.prototypes + k) * pass.channels + c] = total;
  });
}

// Enough blocks to fill a device, by the shape alone.
int64_t parts_of_many(const CosineSimilarityMapShape& shape) {
  const int64_t tiles = tiles_of(shape.prototypes) * tiles_of(shape.channels);
  const int64_t wanted = 256 / tiles + 1, most = tiles_of(shape.rows * shape.columns);
  return wanted < most ? wanted : most > 0 ? most : 1;
}

// ---------------------------------------------------------------------------------------------- calls

template <class T>
Vectors<T> vectors_of(const PrototypeView& view) {
  return {static_cast<T*>(view.data), view.batch_stride, view.prototype_stride};
}

template <class T>
void forward(const CosineSimilarityMapForward& call, void* stream) {
  using S = Sum<T>;
  const auto& s = call.shape;
  const auto rule = norm_rule<S>(call.norms);
  const auto vectors = vectors_of<T>(call.prototypes);
  auto* const vector_norms = static_cast<S*>(call.prototype_norms);
  launch_find_norms<T, T>({s.batch, s.prototypes, s.channels, vectors, vector_norms}, stream);
  const CosinePass<T, T> pass{s.batch,
                              s.channels,
                              s.rows * s.columns,
                              s.prototypes,
                              0,
                              static_cast<int>(s.prototypes < kFewPrototypes ? s.prototypes : kFewPrototypes),
                              rule,
                              pixel_map<const T>(call.features, s.rows, s.columns),
                              vectors,
                              vector_norms,
                              pixel_map<T>(call.output, s.rows, s.columns),
                              static_cast<S*>(call.feature_norms)};
  const bool channels_last = lanes_are_channels(call.features, s.rows, s.columns);
  if (s.prototypes <= 1) return launch_cosines<1>(pass, channels_last, stream);
  if (s.prototypes <= 4) return launch_cosines<4>(pass, channels_last, stream);
  if (s.prototypes <= kFewPrototypes) return launch_cosines<8>(pass, channels_last, stream);
  launch(channels_last ? cosines_by_tile<T, true> : cosines_by_tile<T, false>,
         s.batch * tiles_of(s.prototypes) * tiles_of(pass.pixels), kTileThreads,
         sizeof(TileMemory<S>) + kTile * sizeof(S), stream, pass);
}

// What backward keeps in its workspace.
template <class T>
struct Held {
  using S = Sum<T>;
  int64_t parts, factors;
  S *a, *b, *t, *sums;

  Held(const CosineSimilarityMapBackward& call, Workspace& workspace) {
    const auto& s = call.shape;
    const int64_t pixels = s.rows * s.columns;
    parts = s.prototypes > kFewPrototypes ? parts_of_many(s) : gradient_parts(pixels, is_channels_last(call));
    factors = factor_blocks(pixels);
    a = workspace.take<S>(s.batch * s.prototypes * pixels);
    b = workspace.take<S>(s.batch * pixels);
    t = workspace.take<S>(s.batch * factors * s.prototypes);
    sums = workspace.take<S>(s.batch * parts * s.prototypes * s.channels);
  }

  static bool is_channels_last(const CosineSimilarityMapBackward& call) {
    return lanes_are_channels(call.features, call.shape.rows, call.shape.columns) &&
           call.grad_features.channel_stride == 1;
  }
};

template <class T>
void backward(const CosineSimilarityMapBackward& call, void* workspace, void* stream) {
  using S = Sum<T>;
  const auto& s = call.shape;
  const int64_t pixels = s.rows * s.columns;
  Workspace pieces(workspace);
  const Held<T> held(call, pieces);
  const auto rule = norm_rule<S>(call.norms);
  const auto vectors = vectors_of<T>(call.prototypes);
  const auto* const vector_norms = static_cast<const S*>(call.prototype_norms);
  launch_find_factors<T>({s.batch, pixels, s.prototypes, rule, pixel_map<const T>(call.output, s.rows, s.columns),
                          pixel_map<const T>(call.grad_output, s.rows, s.columns),
                          static_cast<const S*>(call.feature_norms), vector_norms, held.a, held.b, held.t},
                         stream);
  const GradientPass<T, T> pass{s.batch,
                                s.channels,
                                pixels,
                                s.prototypes,
                                held.parts,
                                pixel_map<const T>(call.features, s.rows, s.columns),
                                pixel_map<T>(call.grad_features, s.rows, s.columns),
                                vectors,
                                held.a,
                                held.b,
                                held.sums};
  const bool channels_last = Held<T>::is_channels_last(call);
  if (s.prototypes <= 1) {
    launch_gradients<1>(pass, channels_last, stream);
  } else if (s.prototypes <= 4) {
    launch_gradients<4>(pass, channels_last, stream);
  } else if (s.prototypes <= kFewPrototypes) {
    launch_gradients<8>(pass, channels_last, stream);
  } else {
    const int64_t channel_tiles = tiles_of(s.channels);
    launch(channels_last ? feature_gradients_by_tile<T, true> : feature_gradients_by_tile<T, false>,
           s.batch * channel_tiles * tiles_of(pixels), kTileThreads, sizeof(TileMemory<S>), stream, pass);
    launch(channels_last ? vector_gradients_by_tile<T, true> : vector_gradients_by_tile<T, false>,
           s.batch * held.parts * channel_tiles * tiles_of(s.prototypes), kTileThreads, sizeof(TileMemory<S>), stream,
           pass);
  }
  launch_finish<T, T>({s.batch, s.channels, s.prototypes, held.parts, held.factors, rule, vectors, vector_norms, held.t,
                       held.sums, vectors_of<T>(call.grad_prototypes)},
                      stream);
}

}  // namespace

size_t workspace_size(const CosineSimilarityMapForward&) { return 0; }

size_t workspace_size(const CosineSimilarityMapBackward& call) { return size_of_workspace<Held>(call); }

void run(const CosineSimilarityMapForward& call, void*, void* stream) {
  with_element(call.dtype, [&](auto element) { forward<decltype(element)>(call, stream); });
}

void run(const CosineSimilarityMapBackward& call, void* workspace, void* stream) {
  with_element(call.dtype, [&](auto element) { backward<decltype(element)>(call, workspace, stream); });
}

}  // namespace gingham::cuda
