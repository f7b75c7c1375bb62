// The cosine of every pixel with a set of prototypes on the CPU, forward and backward; compiled once per instruction
// set.
//
// With few prototypes the work is one pass over the features (cosine.h): forward is bound by reading them, backward by
// reading them and writing their gradient. With more it is bound by the products: stretches of some 128 pixels are
// packed as panels (lines.h) and multiplied (panel_gemm.h), bfloat16 as pairs where the machine multiplies these:
//   forward   sums[prototype][pixel] = prototypes x features, some channels at a time; the pixels' squares are summed
//             from the same panels; then both norms divide.
//   backward  With the factors a and b of gradient_factors, features as panels [pixel][channel] of 64 channels:
//             grad_features[pixel][channel] = a x prototypes - b features, grad_prototypes[prototype][channel] += a x
//             features. One task has all pixels of its channels, so that the second sum has one order.
// Held: the prototypes in the type of the sums, backward's a, as large as the output, for a few images at a time, and
// some panels a thread.
#include "gingham/cosine_similarity_map.h"

#include <cstring>
#include <type_traits>

#include "cosine.h"
#include "elements.h"
#include "lines.h"
#include "panel_gemm.h"
#include "parallel.h"
#include "simd.h"
#include "workspace.h"

namespace {

using gingham::CosineSimilarityMapBackward;
using gingham::CosineSimilarityMapForward;
using gingham::CosineSimilarityMapShape;
using gingham::ParallelFor;

// ---------------------------------------------------------------------------------------------- how a call is cut

constexpr int64_t kFewPrototypes = 8;

// [0, length) in blocks of `step`. For products one or two positions beyond whole vectors make a block of their own, so
// that there are none of what panel_gemm.h calls single columns.
struct Blocks {
  int64_t length, step, ragged, count;

  static Blocks of(int64_t length, int64_t step) { return {length, step, 0, (length + step - 1) / step}; }
  static Blocks for_products(int64_t length, int64_t step, int lanes) {
    const int64_t rest = length % step, ragged = has_single_columns(rest, lanes) ? rest % lanes : 0;
    return {length, step, ragged, length / step + (rest > 0) + (ragged > 0)};
  }
  int64_t begin(int64_t block) const { return ragged && block == count - 1 ? length - ragged : block * step; }
  int64_t size(int64_t block) const { return (block == count - 1 ? length : begin(block + 1)) - begin(block); }
};

constexpr int64_t kPanelPixels = 128, kPanelChannels = 64, kChannelsAtOnce = 128;

// Work by the cut of one axis of each line: (image, line, block).
struct Place {
  int64_t image, line, block;
};
inline Place place_of(int64_t index, int64_t lines, int64_t blocks) {
  return {index / blocks / lines, index / blocks % lines, index % blocks};
}

// Waking threads takes longer than so many multiplications.
inline int threads_for(double operations, int threads) { return operations < 5e4 ? 1 : threads; }

template <class Function>
inline void with_few(int64_t prototypes, const Function& function) {
  static_assert(kFewPrototypes == 8);
  switch (prototypes) {
    case 0:
    case 1:
      return function(std::integral_constant<int, 1>());
    case 2:
      return function(std::integral_constant<int, 2>());
    case 3:
      return function(std::integral_constant<int, 3>());
    case 4:
      return function(std::integral_constant<int, 4>());
    case 5:
      return function(std::integral_constant<int, 5>());
    case 6:
      return function(std::integral_constant<int, 6>());
    case 7:
      return function(std::integral_constant<int, 7>());
    default:
      return function(std::integral_constant<int, 8>());
  }
}

// Panels [channel][pixel], and [pixel][channel].
template <class E>
inline LineView<E> by_channel(const Pixels<E>& pixels) {
  return {pixels.data, pixels.channel_stride, 0, pixels.pixel_stride};
}
template <class E>
inline LineView<E> by_pixel(const Pixels<E>& pixels) {
  return {pixels.data, pixels.pixel_stride, 0, pixels.channel_stride};
}
template <class E>
inline void prefetch_block(Prefetcher& prefetcher, const Pixels<E>& pixels, int64_t channels, int64_t count) {
  constexpr int64_t kSize = sizeof(E);
  if (pixels.pixel_stride == 1) {
    prefetcher.add(pixels.data, channels, 1, pixels.channel_stride * kSize, 0, count * kSize);
  } else {
    prefetcher.add(pixels.data, count, 1, pixels.pixel_stride * kSize, 0, channels * kSize);
  }
}
// ---------------------------------------------------------------------------------------------- both directions

template <class E>
struct Common {
  using U = UnitOf<E>;
  using Unit = typename U::Unit;
  using Sum = typename U::Sum;
  using Plain = std::conditional_t<std::is_same_v<Sum, double>, DoubleUnit, FloatUnit>;
  static constexpr int kN = kLanes<Sum>;

  const CosineSimilarityMapShape& shape;
  const gingham::PrototypeView& vectors;
  const NormRule<Sum> rule;
  const Lines lines;
  const int64_t prototypes, channels, stride;  // of a row of channels

  template <class Call>
  Common(const Call& call, Lines lines)
      : shape(call.shape),
        vectors(call.prototypes),
        rule(call.norms),
        lines(lines),
        prototypes(shape.prototypes),
        channels(shape.channels),
        stride(round_up(shape.channels, kN)) {}

  bool is_few() const { return prototypes <= kFewPrototypes; }
  // Rows of what is held per prototype: without any the kernels for one run, on zeros.
  int64_t rows() const { return larger(1, prototypes); }

  const E* vector(int64_t image, int64_t prototype) const {
    return static_cast<const E*>(vectors.data) + image * vectors.batch_stride + prototype * vectors.prototype_stride;
  }
  // Zeros beyond the end.
  void widen(const E* from, Sum* to) const {
    int64_t c = 0;
    for (; c + kN <= channels; c += kN) store(to + c, load_widened(from + c));
    if (c < channels) store(to + c, load_widened(from + c, int(channels - c)));
  }
};

// ---------------------------------------------------------------------------------------------- forward

template <class E>
struct Forward : Common<E> {
  using Base = Common<E>;
  using Base::channels, Base::is_few, Base::kN, Base::lines, Base::prototypes, Base::rows, Base::rule, Base::shape,
      Base::stride;
  using typename Base::Sum;
  using typename Base::U;
  using typename Base::Unit;

  const CosineSimilarityMapForward& call;
  const Blocks blocks;        // of the pixels of a line
  const int64_t left_stride;  // of many prototypes as a left operand, in units
  Sum* widened;               // [image][prototype][stride], of few
  Sum* inverse;               // [image][prototype]
  Unit* left;                 // [image][prototype][left_stride], of many
  char* scratch;
  size_t scratch_size;
  size_t size;

  Forward(const CosineSimilarityMapForward& call, int threads, void* workspace)
      : Base(call, Lines(call.shape.rows, call.shape.columns, call.shape.channels, {&call.features}, {&call.output})),
        call(call),
        blocks(is_few() ? Blocks::of(lines.length, stretch(threads))
                        : Blocks::for_products(lines.length, kPanelPixels, kN)),
        left_stride(panel_stride<U, PairAxis::position>(channels)) {
    Workspace pieces(workspace);
    widened = pieces.take<Sum>((is_few() ? shape.batch * rows() : threads) * stride);
    inverse = pieces.take<Sum>(shape.batch * prototypes);
    left = pieces.take<Unit>(is_few() ? 0 : shape.batch * left_size());
    scratch_size = Scratch(*this, nullptr).size;
    scratch = pieces.take<char>(int64_t(scratch_size) * threads);
    size = pieces.size();
  }

  // The longer a stretch, the better memory is read; a pixel's sums do not depend on where its line is cut.
  int64_t stretch(int threads) const {
    const int64_t pixels = shape.batch * lines.count * lines.length;
    return smaller(1024, larger(128, round_up(pixels / (2 * threads) + 1, kN)));
  }
  int64_t left_size() const { return round_up(prototypes, kTileRows) * left_stride; }

  struct Scratch {
    int64_t stride;
    Sum* sums = nullptr;      // [1 + prototype][stride]: squares and products
    Unit* panel = nullptr;    // [channel][stride]
    Unit* product = nullptr;  // for multiply
    size_t size;

    Scratch(const Forward& forward, void* base) {
      Workspace pieces(base);
      stride = round_up(smaller(forward.blocks.step, larger(1, forward.lines.length)), kN);
      if (forward.is_few()) {
        sums = pieces.take<Sum>((1 + forward.rows()) * stride);
      } else {  // tiles are whole, and vectors are read to their end
        sums = pieces.take<Sum>(stride + round_up(forward.prototypes, kTileRows) * stride + kN);
        panel = pieces.take<Unit>(kChannelsAtOnce / U::kPair * stride + kN);
        product = pieces.take<Unit>(multiply_scratch<U>(forward.prototypes, kChannelsAtOnce / U::kPair));
      }
      size = pieces.size();
    }
  };

  void prepare(int64_t index, int64_t worker) const {
    const E* vector = Base::vector(index / prototypes, index % prototypes);
    Sum* row = widened + (is_few() ? index : worker) * stride;
    Base::widen(vector, row);
    const Sum norm = norm_of(row, channels);
    static_cast<Sum*>(call.prototype_norms)[index] = norm;
    inverse[index] = rule.inverse(norm);
    if (!is_few()) {
      pack<U, PairAxis::position>(left + index / prototypes * left_size() + index % prototypes * left_stride,
                                  LineView<const E>{vector, 0, 0, 1}, 1, 1, channels, Contiguous::position);
    }
  }

  void few(const Pixels<const E>& features, int64_t image, int64_t count, const Scratch& memory) const {
    with_few(prototypes, [&](auto p) {
      sum_products<decltype(p)::value>(features, channels, count, widened + image * rows() * stride, stride,
                                       memory.sums, memory.stride);
    });
  }

  void many(const Pixels<const E>& features, int64_t image, int64_t count, const Scratch& memory) const {
    [[maybe_unused]] const std::conditional_t<U::kTiles, TileScope, int> tiles{};
    const Contiguous contiguous = lines.channels_last ? Contiguous::channel : Contiguous::position;
    const int64_t panel_row = panel_stride<U, PairAxis::channel>(count);
    Sum* squares = memory.sums;
    std::memset(squares, 0, size_t(memory.stride) * sizeof(Sum));
    for (int64_t c = 0; c < channels; c += kChannelsAtOnce) {
      const int64_t taken = smaller(kChannelsAtOnce, channels - c);
      const int64_t rows = panel_rows<U, PairAxis::channel>(taken);
      pack<U, PairAxis::channel>(memory.panel, by_channel(features.from(c, 0)), taken, 1, count, contiguous);
      for (int64_t at = 0; at < count; at += kN) {
        Vector<Sum> total = load(squares + at);
        for (int64_t r = 0; r < rows; ++r) {
          const auto x = load(memory.panel + r * panel_row + at);
          total = U::multiply_add(x, x, total);
        }
        store(squares + at, total);
      }
      const int64_t next = smaller(kChannelsAtOnce, channels - c - taken);
      Prefetcher prefetcher;
      prefetch_block(prefetcher, features.from(c + taken, 0), next, count);
      prefetcher.spread(Stripes<U>(count).prefetches(prototypes, rows));
      multiply<U>(prototypes, count, rows, {left + image * left_size() + c / U::kPair, left_stride, 1}, memory.panel,
                  panel_row, nullptr, 0, squares + memory.stride, memory.stride, c > 0, memory.product, prefetcher);
    }
  }

  void block(int64_t index, int64_t worker) const {
    const Scratch memory(*this, scratch + size_t(worker) * scratch_size);
    const Place place = place_of(index, lines.count, blocks.count);
    const int64_t begin = blocks.begin(place.block), count = blocks.size(place.block);
    const auto features = lines.template line<const E>(call.features, place.image, place.line).from(0, begin);
    const auto output = lines.template line<E>(call.output, place.image, place.line).from(0, begin);
    if (is_few()) {
      few(features, place.image, count, memory);
    } else {
      many(features, place.image, count, memory);
    }
    const int64_t pixel = (place.image * lines.count + place.line) * lines.length + begin;
    write_cosines(memory.sums, memory.stride, count, prototypes, inverse + place.image * prototypes, rule, output,
                  static_cast<Sum*>(call.feature_norms) + pixel);
  }

  void run(int threads, ParallelFor parallel_for) const {
    if (prototypes == 0) std::memset(widened, 0, size_t(shape.batch * stride) * sizeof(Sum));
    const int64_t vectors = shape.batch * prototypes, tasks = shape.batch * lines.count * blocks.count;
    for_each_index(0, vectors, threads_for(vectors * channels, threads), parallel_for,
                   [&](int64_t index, int64_t worker) { prepare(index, worker); });
    const double operations = double(shape.batch) * lines.count * lines.length * channels * (prototypes + 1);
    for_each_index(0, tasks, threads_for(operations, threads), parallel_for,
                   [&](int64_t index, int64_t worker) { block(index, worker); });
  }
};

// ---------------------------------------------------------------------------------------------- backward

template <class E>
struct Backward : Common<E> {
  using Base = Common<E>;
  using Base::channels, Base::is_few, Base::kN, Base::lines, Base::prototypes, Base::rows, Base::rule, Base::shape,
      Base::stride;
  using typename Base::Plain;
  using typename Base::Sum;
  using typename Base::U;
  using typename Base::Unit;

  const CosineSimilarityMapBackward& call;
  const Blocks blocks;          // of the pixels of a line
  const Blocks channel_blocks;  // of the channels
  const int64_t pixel_blocks;   // of an image
  const int64_t groups;         // of pixel blocks that are summed together
  const int64_t images;         // taken at a time
  const int64_t sum_rows;       // of prototypes, padded to whole tiles
  Sum* widened;                 // [image][prototype][stride]
  Sum* inverse;                 // [image][prototype]
  Sum* totals;                  // t: [image][pixel block][prototype]
  Sum* own;                     // b: [image][pixel block][step]
  Unit* weights;                // a: [image][pixel block][prototype][step]; of pairs, those of neighbouring prototypes
  Unit* paired;                 // a as pairs of neighbouring pixels
  Sum* sums;                    // [image][group][sum_rows][stride]
  char* scratch;
  size_t scratch_size;
  size_t size;

  Backward(const CosineSimilarityMapBackward& call, int threads, void* workspace)
      : Base(call, Lines(call.shape.rows, call.shape.columns, call.shape.channels,
                         {&call.features, &call.grad_features}, {&call.output, &call.grad_output})),
        call(call),
        blocks(is_few() ? Blocks::of(lines.length, few_pixels())
                        : Blocks::for_products(lines.length, kPanelPixels, kN)),
        channel_blocks(is_few() ? Blocks::of(channels, kFewChannels)
                                : Blocks::for_products(channels, kPanelChannels, kN)),
        pixel_blocks(lines.count * blocks.count),
        groups(sums_over_channels() ? 1 : larger(1, smaller(pixel_blocks, kMostGroups))),
        images(images_at_a_time(threads)),
        sum_rows(is_few() ? rows() : round_up(prototypes, kTileRows)) {
    Workspace pieces(workspace);
    widened = pieces.take<Sum>(images * rows() * stride);
    inverse = pieces.take<Sum>(images * prototypes);
    totals = pieces.take<Sum>(images * pixel_blocks * prototypes);
    own = pieces.take<Sum>(images * pixel_blocks * step());
    weights = pieces.take<Unit>(images * pixel_blocks * weights_size());
    paired = pieces.take<Unit>(is_paired() ? images * pixel_blocks * paired_size() : 0);
    sums = pieces.take<Sum>(images * groups * sum_rows * stride);
    scratch_size = Scratch(*this, nullptr).size;
    scratch = pieces.take<char>(int64_t(scratch_size) * threads);
    size = pieces.size();
  }

  static constexpr int64_t kFewChannels = 16, kMostGroups = 32;

  bool is_paired() const { return U::kPair == 2 && !is_few(); }
  // A task has some channels of all pixels, or else some pixels with all of their channels.
  bool sums_over_channels() const { return !is_few() || !lines.channels_last; }
  int64_t few_pixels() const {
    if (!lines.channels_last) return 2048;
    return round_up(larger(64, (lines.count * lines.length + kMostGroups - 1) / kMostGroups), kN);
  }
  // As many images as keep all threads busy for longer than it takes to wake them.
  int64_t images_at_a_time(int threads) const {
    const int64_t tasks = sums_over_channels() ? channel_blocks.count : groups;
    const int64_t elements = channels * lines.count * lines.length;
    const int64_t wanted = larger(4 * threads / larger(1, tasks) + 1, (1 << 18) / larger(1, elements) + 1);
    return smaller(shape.batch, wanted);
  }
  int64_t step() const { return round_up(smaller(blocks.step, larger(1, lines.length)), is_few() ? kN : kPanelPixels); }
  int64_t weights_size() const {
    return (is_few() ? rows() : is_paired() ? summed_units<U>(prototypes) : sum_rows) * step();
  }
  int64_t paired_size() const { return sum_rows * step() / 2; }

  struct Scratch {
    Sum* maps = nullptr;       // grad_output and output, [2][prototype][step]
    Sum* factors = nullptr;    // a of pairs, [prototype + 1][step]
    Unit* right = nullptr;     // prototypes [prototype][channel]
    Unit* panel = nullptr;     // features [pixel][channel]
    Sum* gradients = nullptr;  // their gradient
    Unit* product = nullptr;   // for multiply
    size_t size;

    Scratch(const Backward& backward, void* base) {
      Workspace pieces(base);
      const int64_t rows = backward.prototypes, step = backward.step();
      if (!backward.is_few()) {
        constexpr int64_t kRow = kPanelChannels + kN;
        maps = pieces.take<Sum>(2 * rows * step + kN);
        factors = pieces.take<Sum>(backward.is_paired() ? rows * step : 0);
        right = pieces.take<Unit>(summed_units<U>(rows) * kRow);
        panel = pieces.take<Unit>(summed_units<U>(kPanelPixels) * kRow);
        gradients = pieces.take<Sum>(kPanelPixels * kRow);
        product = pieces.take<Unit>(multiply_scratch<U>(kPanelPixels, summed_units<U>(rows)));
      }
      size = pieces.size();
    }
  };

  const Sum* norms_at(int64_t image, int64_t line, int64_t begin) const {
    return static_cast<const Sum*>(call.feature_norms) + (image * lines.count + line) * lines.length + begin;
  }

  void prepare(int64_t first, int64_t index) const {
    Base::widen(Base::vector(first + index / prototypes, index % prototypes), widened + index * stride);
    inverse[index] = rule.inverse(static_cast<const Sum*>(call.prototype_norms)[first * prototypes + index]);
  }

  // The factors a, b and t of one block of pixels.
  void factors(int64_t first, int64_t index, int64_t worker) const {
    const Place place = place_of(index, lines.count, blocks.count);
    const int64_t image = first + place.image, begin = blocks.begin(place.block), count = blocks.size(place.block);
    const auto output = lines.template line<const E>(call.output, image, place.line).from(0, begin);
    const auto grad_output = lines.template line<const E>(call.grad_output, image, place.line).from(0, begin);
    const Sum* norms = norms_at(image, place.line, begin);
    const Sum* inverse_norms = inverse + place.image * prototypes;
    Sum* b = own + index * step();
    Sum* t = totals + index * prototypes;
    const Scratch memory(*this, scratch + size_t(worker) * scratch_size);
    Sum* a = is_paired() ? memory.factors : reinterpret_cast<Sum*>(weights + index * weights_size());
    if (is_few()) {
      if (prototypes == 0) std::memset(a, 0, size_t(step()) * sizeof(Sum));
      return gradient_factors(grad_output, output, norms, count, prototypes, inverse_norms, rule, a, step(), b, t);
    }
    if (count < step()) std::memset(a, 0, size_t(prototypes * step()) * sizeof(Sum));
    const bool pixels_adjacent = output.pixel_stride == 1 && grad_output.pixel_stride == 1;
    if (pixels_adjacent || output.channel_stride != 1 || grad_output.channel_stride != 1) {
      gradient_factors(grad_output, output, norms, count, prototypes, inverse_norms, rule, a, step(), b, t);
    } else {
      const int64_t row = panel_stride<Plain, PairAxis::channel>(count), size = prototypes * step();
      pack<Plain, PairAxis::channel>(memory.maps, by_channel(grad_output), prototypes, 1, count, Contiguous::channel);
      pack<Plain, PairAxis::channel>(memory.maps + size, by_channel(output), prototypes, 1, count, Contiguous::channel);
      gradient_factors(Pixels<const Sum>{memory.maps, row, 1}, Pixels<const Sum>{memory.maps + size, row, 1}, norms,
                       count, prototypes, inverse_norms, rule, a, step(), b, t);
    }
    if constexpr (U::kPair == 2) pair_factors(a, index);
  }

  // Rounded, as pairs of neighbouring prototypes and as pairs of neighbouring pixels.
  void pair_factors(const Sum* a, int64_t index) const {
#if defined(__AVX512BF16__)
    if constexpr (U::kPair == 2) {
      Unit* across = weights + index * weights_size();
      for (int64_t r = 0; r < summed_units<U>(prototypes); ++r) {
        for (int64_t at = 0; at < step(); at += kN) {
          const auto row = [&](int64_t k) { return k < prototypes ? load(a + k * step() + at) : Vector<Sum>{}; };
          store(across + r * step() + at, pair_bits(row(2 * r), row(2 * r + 1)));
        }
      }
      auto* along = reinterpret_cast<BFloat16*>(paired + index * paired_size());
      for (int64_t at = 0; at < prototypes * step(); at += kN) store_narrowed(along + at, load(a + at));
    }
#endif
  }

  // Few prototypes: some channels of all pixels, or some pixels.
  void few(int64_t first, int64_t task) const {
    const int64_t tasks = sums_over_channels() ? channel_blocks.count : groups;
    const int64_t image = task / tasks, part = task % tasks;
    const int64_t channel = sums_over_channels() ? channel_blocks.begin(part) : 0;
    const int64_t taken = sums_over_channels() ? channel_blocks.size(part) : channels;
    const int64_t begin = sums_over_channels() ? 0 : pixel_blocks * part / groups;
    const int64_t end = sums_over_channels() ? pixel_blocks : pixel_blocks * (part + 1) / groups;
    Sum* target = sums + (image * groups + (sums_over_channels() ? 0 : part)) * sum_rows * stride + channel;
    for (int64_t k = 0; k < rows(); ++k) std::memset(target + k * stride, 0, size_t(taken) * sizeof(Sum));
    for (int64_t i = begin; i < end; ++i) {
      const int64_t line = i / blocks.count, at = blocks.begin(i % blocks.count), count = blocks.size(i % blocks.count);
      const auto features = lines.template line<const E>(call.features, first + image, line).from(channel, at);
      const auto gradient = lines.template line<E>(call.grad_features, first + image, line).from(channel, at);
      const int64_t index = image * pixel_blocks + i;
      with_few(prototypes, [&](auto p) {
        differentiate<decltype(p)::value>(features, gradient, taken, count, widened + image * rows() * stride + channel,
                                          stride, reinterpret_cast<const Sum*>(weights + index * weights_size()),
                                          step(), own + index * step(), target, stride);
      });
    }
  }

  // Many: a block of channels of all pixels.
  void many(int64_t first, int64_t task, int64_t worker) const {
    [[maybe_unused]] const std::conditional_t<U::kTiles, TileScope, int> tiles{};
    const Scratch memory(*this, scratch + size_t(worker) * scratch_size);
    const int64_t image = task / channel_blocks.count;
    const int64_t channel = channel_blocks.begin(task % channel_blocks.count);
    const int64_t taken = channel_blocks.size(task % channel_blocks.count);
    const int64_t row = panel_stride<U, PairAxis::channel>(taken);
    const int64_t prototype_steps = panel_rows<U, PairAxis::channel>(prototypes);
    pack<U, PairAxis::channel>(memory.right,
                               LineView<const E>{Base::vector(first + image, 0) + channel, vectors_stride(), 0, 1},
                               prototypes, 1, taken, Contiguous::position);
    Sum* target = sums + image * sum_rows * stride + channel;
    for (int64_t i = 0; i < pixel_blocks; ++i) {
      const int64_t line = i / blocks.count, at = blocks.begin(i % blocks.count), count = blocks.size(i % blocks.count);
      const auto features = lines.template line<const E>(call.features, first + image, line).from(channel, at);
      const auto gradient = lines.template line<E>(call.grad_features, first + image, line).from(channel, at);
      const int64_t index = image * pixel_blocks + i;
      const int64_t pixel_steps = panel_rows<U, PairAxis::channel>(count);
      const Contiguous contiguous =
          lines.channels_last ? Contiguous::position : Contiguous::channel;  // of a pixel's row
      pack<U, PairAxis::channel>(memory.panel, by_pixel(features), count, 1, taken, contiguous);
      const Sum* b = own + index * step();
      for (int64_t p = 0; p < count; ++p) {
        for (int64_t c = 0; c < row; c += kN) {
          const auto units = load(memory.panel + p / U::kPair * row + c);
          store(memory.gradients + p * row + c, -b[p] * sum_of_unit<U>(units, p % U::kPair));
        }
      }
      Prefetcher prefetcher;
      if (i + 1 < pixel_blocks) {
        const int64_t next = blocks.begin((i + 1) % blocks.count), next_line = (i + 1) / blocks.count;
        const auto there = lines.template line<const E>(call.features, first + image, next_line).from(channel, next);
        prefetch_block(prefetcher, there, taken, blocks.size((i + 1) % blocks.count));
      }
      const Stripes<U> stripes(taken);
      prefetcher.spread(stripes.prefetches(count, prototype_steps) + stripes.prefetches(prototypes, pixel_steps));
      const Unit* across = weights + index * weights_size();
      const Unit* along = U::kPair == 2 ? paired + index * paired_size() : across;
      multiply<U>(count, taken, prototype_steps, {across, 1, step()}, memory.right, row, nullptr, 0, memory.gradients,
                  row, true, memory.product, prefetcher);
      unpack<Merge::write>(memory.gradients, row, static_cast<const Sum*>(nullptr), 0, by_pixel(gradient), count, 1,
                           taken, contiguous);
      multiply<U>(prototypes, taken, pixel_steps, {along, step() / U::kPair, 1}, memory.panel, row, nullptr, 0, target,
                  stride, i > 0, memory.product, prefetcher);
    }
  }
  int64_t vectors_stride() const { return call.prototypes.prototype_stride; }

  void finish(int64_t first, int64_t index) const {
    const int64_t image = index / prototypes, k = index % prototypes;
    Sum total = 0;
    for (int64_t i = 0; i < pixel_blocks; ++i) total += totals[(image * pixel_blocks + i) * prototypes + k];
    Sum* row = sums + (image * groups * sum_rows + k) * stride;
    for (int64_t g = 1; g < groups; ++g) {
      for (int64_t c = 0; c < stride; c += kN) store(row + c, load(row + c) + load(row + g * sum_rows * stride + c));
    }
    if (pixel_blocks == 0) std::memset(row, 0, size_t(stride) * sizeof(Sum));
    const Sum norm = static_cast<const Sum*>(call.prototype_norms)[first * prototypes + index];
    E* target = static_cast<E*>(call.grad_prototypes.data) + (first + image) * call.grad_prototypes.batch_stride +
                k * call.grad_prototypes.prototype_stride;
    write_grad_prototype(row, widened + index * stride, rule.inverse_square(norm) * total, channels, target);
  }

  void run(int threads, ParallelFor parallel_for) const {
    const int64_t tasks = sums_over_channels() ? channel_blocks.count : groups;
    const double pixels = double(lines.count) * lines.length;
    for (int64_t first = 0; first < shape.batch; first += images) {
      const int64_t taken = smaller(images, shape.batch - first);
      const auto for_each = [&](int64_t count, double operations, const auto& task) {
        for_each_index(0, count, threads_for(operations, threads), parallel_for, task);
      };
      const double vectors = double(taken) * prototypes;
      if (prototypes == 0) std::memset(widened, 0, size_t(images * stride) * sizeof(Sum));
      for_each(taken * prototypes, vectors * channels, [&](int64_t i, int64_t) { prepare(first, i); });
      for_each(taken * pixel_blocks, vectors * pixels * 8,
               [&](int64_t i, int64_t worker) { factors(first, i, worker); });
      for_each(taken * tasks, (vectors + taken) * pixels * channels, [&](int64_t i, int64_t worker) {
        if (is_few()) {
          few(first, i);
        } else {
          many(first, i, worker);
        }
      });
      for_each(taken * prototypes, vectors * channels * groups, [&](int64_t i, int64_t) { finish(first, i); });
    }
  }
};

// Without prototypes nothing flows back; without pixels nothing reaches the prototypes, which `finish` sees to.
inline bool is_empty(const CosineSimilarityMapShape& shape) { return shape.batch * shape.channels == 0; }

}  // namespace

namespace gingham::cpu::GINGHAM_ISA {

size_t workspace_size(const CosineSimilarityMapForward& call, int threads) {
  if (is_empty(call.shape)) return 0;
  return with_element(call.dtype, [&](auto e) { return Forward<decltype(e)>(call, threads, nullptr).size; });
}
size_t workspace_size(const CosineSimilarityMapBackward& call, int threads) {
  if (is_empty(call.shape)) return 0;
  return with_element(call.dtype, [&](auto e) { return Backward<decltype(e)>(call, threads, nullptr).size; });
}
void run(const CosineSimilarityMapForward& call, int threads, void* workspace, ParallelFor parallel_for) {
  if (is_empty(call.shape)) return;
  with_element(call.dtype, [&](auto e) { Forward<decltype(e)>(call, threads, workspace).run(threads, parallel_for); });
}
void run(const CosineSimilarityMapBackward& call, int threads, void* workspace, ParallelFor parallel_for) {
  if (is_empty(call.shape)) return;
  with_element(call.dtype, [&](auto e) { Backward<decltype(e)>(call, threads, workspace).run(threads, parallel_for); });
}

}  // namespace gingham::cpu::GINGHAM_ISA
