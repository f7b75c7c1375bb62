// Masked similarity on the CPU: the pooled means of mask_pooling.h and, with them, the cosines of cosine.h.
//
// Forward reads the masks, the supports and the query once. Backward reads the query and writes its gradient, which
// gives the prototype's on the way; the supports' gradient is written from that and the weights alone. Held: two
// numbers a pixel of the query, a few vectors of channels, and sums of some pixels a thread.
#include "gingham/masked_similarity.h"

#include "cosine.h"
#include "mask_pooling.h"

namespace {

using gingham::MaskedSimilarityBackward;
using gingham::MaskedSimilarityForward;
using gingham::MaskedSimilarityShape;

template <class Call>
Supports supports_of(const Call& call, const MapView& mask) {
  const MaskedSimilarityShape& s = call.shape;
  const Extent full{s.support_rows, s.support_columns, s.mask_rows, s.mask_columns};
  return {s.batch, s.shots, s.channels, full, call.mask_type, call.resize, call.support, mask, call.valid_sizes};
}
template <class Call>
int threads_for(const Call& call, const Supports& supports, int threads) {
  const MaskedSimilarityShape& s = call.shape;
  return threads_for_elements(supports.elements() + s.batch * s.channels * s.rows * s.columns, threads);
}

// ---------------------------------------------------------------------------------------------- forward

template <class E>
struct Forward {
  using Sum = Accumulator<E>;
  static constexpr int kN = kLanes<Sum>;

  const MaskedSimilarityForward& call;
  const MaskedSimilarityShape& shape;
  Supports supports;
  int threads;
  Sum *weights, *totals, *prototypes;
  MaskWeights<Sum> mask;
  Pooling<E> pooling;
  NormRule<Sum> rule;
  Lines lines;
  int64_t step;   // pixels of a line at a time
  Sum* inverses;  // of the prototypes' norms
  Sum* sums;      // [worker][2][step]

  Forward(const MaskedSimilarityForward& call, int most_threads, Workspace& workspace)
      : call(call),
        shape(call.shape),
        supports(supports_of(call, call.mask)),
        threads(threads_for(call, supports, most_threads)),
        weights(static_cast<Sum*>(call.weights)),
        totals(static_cast<Sum*>(call.totals)),
        prototypes(static_cast<Sum*>(call.prototype)),
        mask(supports, weights, threads, workspace),
        pooling(supports, weights, supports.positions(), threads, workspace),
        rule(call.norms),
        lines(shape.rows, shape.columns, shape.channels, {&call.query}, {}) {
    // The longer a stretch, the better memory is read; a pixel's sums do not depend on where its line is cut.
    const int64_t pixels = shape.batch * lines.count * lines.length;
    step = smaller(round_up(lines.length, kN), smaller(4096, larger(128, round_up(pixels / (3 * threads) + 1, kN))));
    inverses = workspace.take<Sum>(shape.batch);
    sums = workspace.take<Sum>(2 * step * threads);
  }

  void pixels(int64_t index, int64_t worker) const {
    const int64_t blocks = (lines.length + step - 1) / step;
    const int64_t image = index / blocks / lines.count, line = index / blocks % lines.count;
    const int64_t begin = index % blocks * step, count = smaller(step, lines.length - begin);
    const int64_t pixel = (image * lines.count + line) * lines.length + begin;
    Sum* memory = sums + worker * 2 * step;
    sum_products<1>(lines.line<const E>(call.query, image, line).from(0, begin), shape.channels, count,
                    prototypes + image * shape.channels, shape.channels, memory, step);
    write_cosines(memory, step, count, 1, inverses + image, rule,
                  Pixels<E>{static_cast<E*>(call.similarity) + pixel, 0, 1},
                  static_cast<Sum*>(call.query_norms) + pixel);
  }

  void run(ParallelFor parallel_for) const {
    mask.run(parallel_for);
    pooling.run(parallel_for);
    for (int64_t image = 0; image < shape.batch; ++image) {
      for (int64_t sample = image * shape.shots; sample < (image + 1) * shape.shots; ++sample) {
        totals[sample] = mask.total(sample);
      }
      Sum* prototype = prototypes + image * shape.channels;
      pooling.mean(image, totals, prototype);
      inverses[image] = rule.inverse(norm_of(prototype, shape.channels));
    }
    if (step == 0) return;
    for_each_index(0, shape.batch * lines.count * ((lines.length + step - 1) / step), threads, parallel_for,
                   [&](int64_t index, int64_t worker) { pixels(index, worker); });
  }
};

// ---------------------------------------------------------------------------------------------- backward

template <class E>
struct Backward {
  using Sum = Accumulator<E>;
  static constexpr int kN = kLanes<Sum>;
  static constexpr int64_t kChannels = 16, kPixels = 2048;  // of a task, and of these at a time
  static constexpr int64_t kMostParts = 32, kFewestPixels = 64;

  const MaskedSimilarityBackward& call;
  const MaskedSimilarityShape& shape;
  Supports supports, query;  // the query as what a weighted sum is taken of
  int threads;
  const Sum *weights, *totals, *prototypes, *norms;
  NormRule<Sum> rule;
  Lines lines;
  int64_t image_pixels, stride;  // of an image; of what is held per pixel
  int64_t parts;                 // channels last, whose sums are added in order
  Sum *a, *b;                    // [image][stride], of cosine.h's backward
  Sum* t;                        // [image]
  Sum* sums;                     // [image][part][channel]
  Sum* slopes;                   // [image][channel]: of the pooled vectors
  Pooling<E> weighted;
  FeatureGradient<E> features;
  MaskGradient<E> mask;

  Backward(const MaskedSimilarityBackward& call, int most_threads, Workspace& workspace)
      : call(call),
        shape(call.shape),
        supports(supports_of(call, {})),
        query{shape.batch, 1,  shape.channels, {shape.rows, shape.columns, 1, 1}, call.mask_type, call.resize,
              call.query,  {}, nullptr},
        threads(threads_for(call, supports, most_threads)),
        weights(static_cast<const Sum*>(call.weights)),
        totals(static_cast<const Sum*>(call.totals)),
        prototypes(static_cast<const Sum*>(call.prototype)),
        norms(static_cast<const Sum*>(call.query_norms)),
        rule(call.norms),
        lines(call.grad_query.data
                  ? Lines(shape.rows, shape.columns, shape.channels, {&call.query, &call.grad_query}, {})
                  : Lines(shape.rows, shape.columns, shape.channels, {&call.query}, {})),
        image_pixels(shape.rows * shape.columns),
        stride(round_up(image_pixels, kN) + kN),
        parts(lines.channels_last ? smaller(kMostParts, (image_pixels + kFewestPixels - 1) / kFewestPixels) : 1),
        a(workspace.take<Sum>(shape.batch * stride)),
        b(workspace.take<Sum>(shape.batch * stride)),
        t(workspace.take<Sum>(shape.batch)),
        sums(workspace.take<Sum>(shape.batch * larger(1, parts) * shape.channels)),
        slopes(workspace.take<Sum>(shape.batch * shape.channels)),
        weighted(query, a, stride, threads, workspace),
        features(supports, call.grad_support, weights, totals, slopes, threads),
        mask(supports, call.grad_mask, weights, totals, slopes, threads, workspace) {}

  const Sum* prototype(int64_t image) const { return prototypes + image * shape.channels; }

  void factors(int64_t image) const {
    const Sum inverse = rule.inverse(norm_of(prototype(image), shape.channels));
    t[image] = 0;
    for (int64_t at = 0; at < image_pixels; at += lines.length) {  // a line writes beyond its end
      const int64_t pixel = image * image_pixels + at;
      Sum part = 0;
      gradient_factors(Pixels<const E>{static_cast<const E*>(call.grad_similarity) + pixel, 0, 1},
                       Pixels<const E>{static_cast<const E*>(call.similarity) + pixel, 0, 1}, norms + pixel,
                       lines.length, 1, &inverse, rule, a + image * stride + at, 0, b + image * stride + at, &part);
      t[image] += part;
    }
  }

  // The query's gradient in [begin, end) of the pixels and some channels.
  void gradient(int64_t image, int64_t begin, int64_t end, int64_t channel, int64_t count, Sum* target) const {
    for (int64_t c = 0; c < count; ++c) target[c] = 0;
    while (begin < end) {
      const int64_t line = begin / lines.length, at = begin % lines.length;
      const int64_t taken = smaller(smaller(kPixels, end - begin), lines.length - at);
      differentiate<1>(lines.line<const E>(call.query, image, line).from(channel, at),
                       lines.line<E>(call.grad_query, image, line).from(channel, at), count, taken,
                       prototype(image) + channel, shape.channels, a + image * stride + begin, stride,
                       b + image * stride + begin, target, shape.channels);
      begin += taken;
    }
  }

  void run_query(ParallelFor parallel_for) const {
    const int64_t tasks = lines.channels_last ? parts : (shape.channels + kChannels - 1) / kChannels;
    for_each_index(0, shape.batch * tasks, threads, parallel_for, [&](int64_t index, int64_t) {
      const int64_t image = index / tasks, task = index % tasks;
      if (lines.channels_last) {
        gradient(image, image_pixels * task / parts, image_pixels * (task + 1) / parts, 0, shape.channels,
                 sums + index * shape.channels);
      } else {
        gradient(image, 0, image_pixels, task * kChannels, smaller(kChannels, shape.channels - task * kChannels),
                 sums + image * shape.channels + task * kChannels);
      }
    });
  }

  // Of each shot's pooled vector, from the sum over pixels of a times the query.
  void slopes_of(int64_t image, const Sum* sum) const {
    const Sum own = rule.inverse_square(norm_of(prototype(image), shape.channels)) * t[image];
    for (int64_t c = 0; c < shape.channels; ++c) {
      slopes[image * shape.channels + c] = (sum[c] - own * prototype(image)[c]) / Sum(shape.shots);
    }
  }

  void run(ParallelFor parallel_for) const {
    for_each_index(0, shape.batch, threads, parallel_for, [&](int64_t image, int64_t) { factors(image); });
    if (call.grad_query.data) {
      run_query(parallel_for);
    } else {
      weighted.run(parallel_for);
    }
    if (!call.grad_support.data && !call.grad_mask.data) return;
    for (int64_t image = 0; image < shape.batch; ++image) {
      Sum* sum = sums + image * parts * shape.channels;
      if (image_pixels == 0) {
        for (int64_t c = 0; c < shape.channels; ++c) slopes[image * shape.channels + c] = 0;
        continue;
      }
      if (!call.grad_query.data) {
        slopes_of(image, weighted.sum(image));
        continue;
      }
      for (int64_t part = 1; part < parts; ++part) {
        for (int64_t c = 0; c < shape.channels; ++c) sum[c] += sum[part * shape.channels + c];
      }
      slopes_of(image, sum);
    }
    if (call.grad_support.data) features.run(parallel_for);
    if (call.grad_mask.data) mask.run(parallel_for);
  }
};

}  // namespace

namespace gingham::cpu::GINGHAM_ISA {

size_t workspace_size(const MaskedSimilarityForward& call, int threads) {
  return size_of_workspace<Forward>(call, threads);
}
size_t workspace_size(const MaskedSimilarityBackward& call, int threads) {
  return size_of_workspace<Backward>(call, threads);
}
void run(const MaskedSimilarityForward& call, int threads, void* workspace, ParallelFor parallel_for) {
  run_in_workspace<Forward>(call, threads, workspace, parallel_for);
}
void run(const MaskedSimilarityBackward& call, int threads, void* workspace, ParallelFor parallel_for) {
  run_in_workspace<Backward>(call, threads, workspace, parallel_for);
}

}  // namespace gingham::cpu::GINGHAM_ISA
