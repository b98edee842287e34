// A head's convolution and its gradients in CUDA without a GPU: the kernels, compiled by the C++ compiler, on an emulation of
// what they use of a GPU (emulation/), against sums in double.
#include "cuda/conv2d.cu"

#include <array>
#include <cmath>
#include <cstdio>
#include <random>
#include <vector>

#include "tests/check.h"

namespace {

using namespace hflfnerv;
using BFloat16 = __nv_bfloat16;

constexpr BFloat16 kPoison{0xffff};  // a NaN

std::mt19937 generator(1);

BFloat16 random(float scale) { return BFloat16::round(std::normal_distribution<float>(0, scale)(generator)); }

// Memory aligned to 16 bytes but for `offset` elements, with NaNs on both sides and wherever nothing was written.
struct Memory {
  static constexpr std::size_t kMargin = 64;
  std::vector<BFloat16> memory;
  std::size_t first, count;

  explicit Memory(std::int64_t elements, int offset = 0) : count(static_cast<std::size_t>(elements)) {
    memory.assign(count + 2 * kMargin + 8, kPoison);
    first = kMargin + (16 - reinterpret_cast<std::uintptr_t>(memory.data()) % 16) % 16 / 2 + static_cast<std::size_t>(offset);
  }
  BFloat16* data() { return memory.data() + first; }
  BFloat16& operator[](std::int64_t i) { return memory.at(first + static_cast<std::size_t>(i)); }
  bool margins_are_untouched() const {
    for (std::size_t i = 0; i < memory.size(); ++i) {
      if ((i < first || i >= first + count) && memory[i].bits != kPoison.bits) return false;
    }
    return true;
  }
};

struct Case {
  int batch, channels, height, width, outputs;
  int gap = 0;     // between the pixels of x
  int offset = 0;  // of x, in elements
  bool planes = false;  // dy and the weight as the contiguous format has them, not channels-last
  bool bfloat16 = true, wants_dx = true, wants_sums = true;
};

struct Strides {
  std::array<std::int64_t, 4> of;

  std::int64_t operator()(int a, int b, int c, int d) const { return a * of[0] + b * of[1] + c * of[2] + d * of[3]; }
};

Strides strides(int b, int c, int d, bool planes) {
  if (planes) return {{std::int64_t(b) * c * d, std::int64_t(c) * d, d, 1}};
  return {{std::int64_t(b) * c * d, 1, std::int64_t(d) * b, b}};
}

bool close(double actual, double expected, double terms) {
  // Rounding to bfloat16, and what sums in float32 are off.
  return std::abs(actual - expected) <= 3.92e-3 * std::abs(expected) + 1e-6 * terms + 1e-6;
}

void check(const Case& c) {
  const int pixel = c.channels + c.gap;
  const std::int64_t pixels = std::int64_t(c.batch) * c.height * c.width;
  Memory x(pixels * pixel, c.offset), weight(std::int64_t(c.outputs) * c.channels * 9), bias(c.outputs);
  Memory dy(pixels * c.outputs), dx(pixels * pixel, c.offset), dweight(std::int64_t(c.outputs) * c.channels * 9);
  Memory dbias(c.outputs), y(pixels * c.outputs);
  for (std::int64_t i = 0; i < pixels; ++i) {
    for (int k = 0; k < c.channels; ++k) x[i * pixel + k] = random(1);
    for (int n = 0; n < c.outputs; ++n) dy[i * c.outputs + n] = random(1);
  }
  for (std::int64_t i = 0; i < c.outputs * c.channels * 9; ++i) {
    weight[i] = random(1 / std::sqrt(9.0f * static_cast<float>(c.channels)));
  }
  for (int n = 0; n < c.outputs; ++n) bias[n] = random(1);
  const Strides of_weight = strides(c.channels, 3, 3, c.planes), of_dy = strides(c.outputs, c.height, c.width, c.planes);
  Conv2dCuda call{c.bfloat16, c.batch, c.channels, c.height, c.width, c.outputs, x.data(), pixel, weight.data(), {}};
  std::copy(of_weight.of.begin(), of_weight.of.end(), call.weight_strides);
  emulation::multiprocessors = 1;
  const auto at = [&](int b, int h, int w) { return (std::int64_t(b) * c.height + h) * c.width + w; };
  const auto outside = [&](int h, int w) { return h < 0 || h >= c.height || w < 0 || w >= c.width; };

  CHECK(conv2d_cuda_fwd(call, {c.wants_sums ? bias.data() : nullptr, y.data()}, 0, nullptr) == nullptr);
  CHECK(y.margins_are_untouched());
  for (std::int64_t i = 0; i < pixels * c.outputs; ++i) {
    const int n = static_cast<int>(i % c.outputs), w = static_cast<int>(i / c.outputs % c.width);
    const int row_of_all = static_cast<int>(i / c.outputs / c.width), h = row_of_all % c.height, b = row_of_all / c.height;
    double sum = c.wants_sums ? double(bias[n]) : 0;
    for (int tap = 0; tap < 9; ++tap) {
      const int row = h + tap / 3 - 1, column = w + tap % 3 - 1;
      if (outside(row, column)) continue;
      for (int k = 0; k < c.channels; ++k) {
        sum += double(x[at(b, row, column) * pixel + k]) * double(weight[of_weight(n, k, tap / 3, tap % 3)]);
      }
    }
    CHECK(close(y[i], sum, 1));
  }

  Conv2dCudaBackward gradients{};
  gradients.dy = dy.data();
  std::copy(of_dy.of.begin(), of_dy.of.end(), gradients.dy_strides);
  gradients.dx = c.wants_dx ? dx.data() : nullptr;
  gradients.dx_pixel = pixel;
  std::copy(of_weight.of.begin(), of_weight.of.end(), gradients.dweight_strides);
  std::int64_t floats = 0;
  CHECK(conv2d_cuda_partial_floats(call, 0, floats) == nullptr);
  std::vector<float> partial(static_cast<std::size_t>(floats), NAN);
  if (c.wants_sums) {
    gradients.dweight = dweight.data();
    gradients.dbias = dbias.data();
    gradients.partial = partial.data();
  }
  CHECK(conv2d_cuda_bwd(call, gradients, 0, nullptr) == nullptr);
  CHECK(dx.margins_are_untouched() && dweight.margins_are_untouched() && dbias.margins_are_untouched());
  std::vector<double> sums(dweight.count), sizes(dweight.count);
  std::array<double, 3> bias_sums{}, bias_sizes{};
  for (int b = 0; b < c.batch; ++b) {
    for (int h = 0; h < c.height; ++h) {
      for (int w = 0; w < c.width; ++w) {
        for (int n = 0; n < c.outputs; ++n) {
          const double slope = dy[of_dy(b, n, h, w)];
          bias_sums[static_cast<std::size_t>(n)] += slope;
          bias_sizes[static_cast<std::size_t>(n)] += std::abs(slope);
          for (int tap = 0; tap < 9; ++tap) {
            const int i = h + tap / 3 - 1, j = w + tap % 3 - 1;
            if (outside(i, j)) continue;
            for (int k = 0; k < c.channels; ++k) {
              const auto of = static_cast<std::size_t>(of_weight(n, k, tap / 3, tap % 3));
              const double term = slope * double(x[at(b, i, j) * pixel + k]);
              sums[of] += term;
              sizes[of] += std::abs(term);
            }
          }
        }
        for (int k = 0; k < c.channels && c.wants_dx; ++k) {
          double sum = 0;
          for (int tap = 0; tap < 9; ++tap) {
            const int i = h - tap / 3 + 1, j = w - tap % 3 + 1;
            if (outside(i, j)) continue;
            for (int n = 0; n < c.outputs; ++n) {
              sum += double(dy[of_dy(b, n, i, j)]) * double(weight[of_weight(n, k, tap / 3, tap % 3)]);
            }
          }
          CHECK(close(dx[at(b, h, w) * pixel + k], sum, 1));
        }
      }
    }
  }
  for (std::size_t i = 0; i < sums.size(); ++i) {
    const BFloat16 actual = dweight[static_cast<std::int64_t>(i)];
    CHECK(c.wants_sums ? close(actual, sums[i], sizes[i]) : actual.bits == kPoison.bits);
  }
  for (int n = 0; n < c.outputs; ++n) {
    const auto i = static_cast<std::size_t>(n);
    CHECK(c.wants_sums ? close(dbias[n], bias_sums[i], bias_sizes[i]) : dbias[n].bits == kPoison.bits);
  }
  if (!c.wants_dx) {
    for (std::int64_t i = 0; i < pixels * pixel; ++i) CHECK(dx[i].bits == kPoison.bits);
  }
}

}  // namespace

int main() {
  check({1, 28, 66, 35, 3});
  check({2, 10, 9, 33, 3, 6, 0, true});
  check({1, 5, 8, 70, 3, 3});
  check({1, 1, 3, 1, 1, 0, 0, true, false});
  check({1, 17, 9, 5, 2, 0, 1});
  check({1, 26, 1, 34, 3, 0, 0, false, false});
  check({1, 33, 7, 11, 3, 7, 0, true});
  check({1, 64, 9, 12, 3});
  check({1, 24, 9, 12, 2, 8, 4, false, true, true, false});
  check({1, 12, 40, 12, 3, 0, 0, false, true, false, true});
  std::printf("conv2d_cuda: ok\n");
  return 0;
}
