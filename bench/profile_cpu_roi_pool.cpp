// Runs the CPU kernel of RoI max pooling again and again for a profiler: bench/profile_cpu.sh.
//   profile_cpu_roi_pool forward|keeping|kept|backward float32|bfloat16 contiguous|channels_last BOXES POOLED REPEATS
// keeping: forward that keeps the places of the maxima; kept: backward that takes them. One image of 256 x 200 x 336
// and the boxes of `gingham bench roi_pool`, one thread; memory that was touched before, so that its pages cost
// nothing.
#include <cmath>

#include "gingham/roi_pool.h"
#include "profile_cpu.h"

namespace gingham::cpu::profiled {
size_t workspace_size(const RoiPoolForward&, int);
size_t workspace_size(const RoiPoolBackward&, int);
void run(const RoiPoolForward&, int, void*, ParallelFor);
void run(const RoiPoolBackward&, int, void*, ParallelFor);
}  // namespace gingham::cpu::profiled

using namespace profile;

namespace {

constexpr int64_t kChannels = 256, kRows = 200, kColumns = 336;
constexpr float kScale = 0.25f;

// Sides from a twentieth to two thirds of the image's, evenly spread over the scale of their logarithms.
std::vector<float> draw_boxes(int64_t count) {
  std::minstd_rand random(0);
  const auto uniform = [&] { return float(random() % 100000) / 100000.0f; };
  std::vector<float> boxes;
  for (int64_t n = 0; n < count; ++n) {
    float corners[4];
    for (int i = 0; i < 2; ++i) {
      const float extent = float(i == 0 ? kColumns : kRows) / kScale;
      const float side = extent * 0.05f * std::pow(0.67f / 0.05f, uniform());
      corners[i] = (extent - side) * uniform(), corners[i + 2] = corners[i] + side;
    }
    boxes.push_back(0);
    boxes.insert(boxes.end(), corners, corners + 4);
  }
  return boxes;
}

}  // namespace

int main(int count, char** arguments) {
  if (count != 7) return std::fprintf(stderr, "see the head of bench/profile_cpu_roi_pool.cpp\n"), 2;
  const std::string what = arguments[1];
  const DType dtype = std::string(arguments[2]) == "bfloat16" ? DType::bfloat16 : DType::float32;
  const bool last = std::string(arguments[3]) == "channels_last";
  const int64_t box_count = std::atoi(arguments[4]), pooled = std::atoi(arguments[5]);

  const std::vector<float> boxes = draw_boxes(box_count);
  const Map features(1, kChannels, kRows, kColumns, dtype, last, 1, 0.0f);  // as after a ReLU
  const Map grad_features(1, kChannels, kRows, kColumns, dtype, last, 2);
  const Map output(box_count, kChannels, pooled, pooled, dtype, last, 3);
  const Map grad_output(box_count, kChannels, pooled, pooled, dtype, last, 4);
  const Map places(box_count, kChannels, pooled, pooled, DType::float32, last, 5);

  const RoiPoolShape shape = {1, kChannels, kRows, kColumns, box_count, pooled, pooled};
  const auto forward = [&](const MapView& kept) {
    return RoiPoolForward{shape, dtype, kScale, features.view, boxes.data(), output.view, kept};
  };
  const auto backward = [&](const MapView& kept) {
    return RoiPoolBackward{shape,        dtype, kScale,           features.view,
                           boxes.data(), kept,  grad_output.view, grad_features.view};
  };
  const auto repeat = [&](const auto& call) {
    void* workspace = allocate(cpu::profiled::workspace_size(call, 1));
    return time_calls(std::atoi(arguments[6]),
                      [&](int) { cpu::profiled::run(call, 1, workspace, one_after_the_other); });
  };
  double milliseconds = 0;
  if (what == "forward") milliseconds = repeat(forward({}));
  if (what == "keeping") milliseconds = repeat(forward(places.view));
  if (what == "backward") milliseconds = repeat(backward({}));
  if (what == "kept") {
    void* workspace = allocate(cpu::profiled::workspace_size(forward(places.view), 1));
    cpu::profiled::run(forward(places.view), 1, workspace, one_after_the_other);
    milliseconds = repeat(backward(places.view));
  }
  std::printf("%s, %s, %s, %s boxes, %sx%s: %.1f ms\n", arguments[1], arguments[2], arguments[3], arguments[4],
              arguments[5], arguments[5], milliseconds);
}
