// The CUDA output stage without a GPU: its kernel, compiled by the C++ compiler, on an emulation of what it uses of a GPU
// (emulation/), against convolutions in double.
#include "cuda/output_stage.cu"

#include <cmath>
#include <cstdio>
#include <random>
#include <vector>

#include "tests/check.h"

namespace {

using namespace hflfnerv;
using BFloat16 = __nv_bfloat16;

std::mt19937 generator(1);

std::vector<BFloat16> random(std::size_t count, float scale) {
  std::normal_distribution<float> normal(0, scale);
  std::vector<BFloat16> values(count);
  for (BFloat16& value : values) value = BFloat16::round(normal(generator));
  return values;
}

struct Map {
  int channels, more_rows, more_columns, pixel, group;  // rows and columns beyond the frame's
};

void check(int batch, int height, int width, const std::vector<Map>& maps, bool as_bytes, bool bfloat16) {
  OutputStageCuda call{};
  call.bfloat16 = bfloat16;
  call.as_bytes = as_bytes;
  call.batch = batch;
  call.height = height;
  call.width = width;
  call.features = static_cast<int>(maps.size());
  call.groups = maps.back().group + 1;
  call.offset = 0.5f;
  emulation::multiprocessors = 1;
  std::vector<std::vector<BFloat16>> xs, weights, packed;
  std::vector<float> biases(9);
  for (std::size_t i = 0; i < 9; ++i) biases[i] = 0.125f * static_cast<float>(i) - 0.5f;
  for (std::size_t f = 0; f < maps.size(); ++f) {
    const Map& map = maps[f];
    const int rows = height + map.more_rows, columns = width + map.more_columns;
    xs.push_back(random(static_cast<std::size_t>(batch * rows * columns * map.pixel), 1));
    for (std::size_t i = 0; i < xs[f].size(); ++i) {  // what lies behind the channels must not matter
      if (static_cast<int>(i) % map.pixel >= map.channels) xs[f][i].bits = 0xffff;
    }
    weights.push_back(random(static_cast<std::size_t>(3 * map.channels * 9), 1 / std::sqrt(9.0f * map.channels)));
    packed.emplace_back(output_weight_elements(map.channels));
    for (std::size_t at = 0; at < packed[f].size(); ++at) {
      const int e = at % 2, i = at / 2 % 4, lane = at / 8 % 32, steps = (map.channels + 15) / 16;
      const int s = static_cast<int>(at / 256) % steps, k = static_cast<int>(at / 256) / steps;
      const int row = lane / 4 + i % 2 * 8, channel = 16 * s + i / 2 * 8 + lane % 4 * 2 + e;
      if (channel < map.channels && row < 9) {
        packed[f][at] = weights[f][static_cast<std::size_t>((row % 3 * map.channels + channel) * 9 + 3 * k + row / 3)];
      }
    }
    call.feature[f] = {xs[f].data(), packed[f].data(), map.channels, rows, columns, map.pixel, map.group};
    call.scales[map.group] = map.group == 0 ? 1.0f : 0.5f;
  }
  call.biases = biases.data();
  const std::size_t count = static_cast<std::size_t>(batch * height * width * 3);
  std::vector<float> frames(count + 2, -7);
  std::vector<std::uint8_t> levels(count + 2, 111);
  call.y = as_bytes ? static_cast<void*>(levels.data() + 1) : frames.data() + 1;
  CHECK(output_stage_cuda_fwd(call, 0, nullptr) == nullptr);
  CHECK(frames.front() == -7 && frames.back() == -7 && levels.front() == 111 && levels.back() == 111);
  for (std::size_t at = 0; at < count; ++at) {
    const int c = static_cast<int>(at % 3), pixel = static_cast<int>(at / 3);
    const int column = pixel % width, row = pixel / width % height, frame = pixel / width / height;
    double image = 0.5;
    for (int group = 0; group < call.groups; ++group) {
      double sum = biases[static_cast<std::size_t>(3 * group + c)];
      for (std::size_t f = 0; f < maps.size(); ++f) {
        const OutputFeatureCuda& of = call.feature[f];
        if (of.group != group) continue;
        for (int tap = 0; tap < 9; ++tap) {
          const int h = row + tap / 3 - 1, w = column + tap % 3 - 1;
          if (h < 0 || h >= of.rows || w < 0 || w >= of.columns) continue;
          for (int k = 0; k < of.channels; ++k) {
            sum += double(xs[f][static_cast<std::size_t>(((frame * of.rows + h) * of.columns + w) * of.pixel + k)]) *
                   double(weights[f][static_cast<std::size_t>((c * of.channels + k) * 9 + tap)]);
          }
        }
      }
      image += double(call.scales[group]) * std::tanh(sum);
    }
    if (as_bytes) {
      const double level = std::min(std::max(image, 0.0), 1.0) * 255;
      CHECK(std::abs(levels[at + 1] - level) <= 0.5 + 1e-3);
    } else {
      CHECK(std::abs(double(frames[at + 1]) - image) <= 2e-5);
    }
  }
}

}  // namespace

int main() {
  for (const bool as_bytes : {true, false}) {
    check(2, 9, 65, {{28, 0, 0, 28, 0}}, as_bytes, true);
    check(1, 40, 9, {{10, 0, 0, 16, 0}, {24, 0, 0, 24, 0}}, as_bytes, true);
    check(1, 8, 32, {{24, 0, 0, 24, 0}, {5, 1, 0, 8, 1}, {10, 0, 3, 16, 1}}, as_bytes, true);
    check(1, 1, 1, {{3, 2, 2, 3, 0}, {33, 0, 0, 40, 0}}, as_bytes, false);
    check(1, 17, 70, {{16, 0, 0, 17, 0}, {1, 0, 0, 1, 1}, {26, 0, 0, 32, 2}}, as_bytes, false);
  }
  std::printf("output_stage_cuda: ok\n");
  return 0;
}
