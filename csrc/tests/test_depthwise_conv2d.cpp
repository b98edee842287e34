// Tests of the depthwise convolution in csrc/core without Python, meant to be built with -fsanitize=address,undefined: against
// plain loops in double, at sizes that no vector or block divides, and on several threads.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <random>
#include <vector>

#include "core/depthwise_conv2d.h"
#include "core/pixel_shuffle_gelu.h"
#include "tests/check.h"

namespace {

using namespace hflfnerv;
using Floats = std::vector<float>;
using Doubles = std::vector<double>;

std::mt19937 generator(1);

Floats random(std::int64_t count) {
  std::normal_distribution<float> normal(0, 1);
  Floats values(static_cast<std::size_t>(count));
  for (float& value : values) value = normal(generator);
  return values;
}

// Each result within the error of a sum of its terms in any order, each of them rounded to float.
void check(const Floats& actual, const Doubles& expected, const Doubles& magnitude, std::int64_t terms) {
  CHECK(actual.size() == expected.size());
  for (std::size_t i = 0; i < actual.size(); ++i) {
    CHECK(std::abs(actual[i] - expected[i]) <= static_cast<double>(terms + 1) * 0x1p-24 * magnitude[i]);
  }
}

struct Results {
  Floats y, dx, dweight, dbias;
  bool operator==(const Results& o) const { return y == o.y && dx == o.dx && dweight == o.dweight && dbias == o.dbias; }
};

void check(const DepthwiseShape& s, SimdLevel level) {
  const std::int64_t pixels = s.batch * s.height * s.width, taps = s.kernel_rows * s.kernel_columns;
  const Floats x = random(pixels * s.channels), weight = random(s.channels * taps), bias = random(s.channels),
               dy = random(pixels * s.channels);
  // What a kernel forgets to write stays NaN.
  const auto fresh = [](std::size_t n) { return Floats(n, std::nanf("")); };
  const auto run = [&](int threads) {
    Results r{fresh(x.size()), fresh(x.size()), fresh(weight.size()), fresh(bias.size())};
    depthwise_conv2d_fwd(s, x.data(), weight.data(), bias.data(), r.y.data(), threads, level);
    depthwise_conv2d_bwd(s, dy.data(), x.data(), weight.data(), r.dx.data(), r.dweight.data(), r.dbias.data(), threads, level);
    return r;
  };
  const Results results = run(1);
  CHECK(results == run(3));
  Results alone = results;
  depthwise_conv2d_bwd(s, dy.data(), x.data(), weight.data(), alone.dx.data(), nullptr, nullptr, 2, level);
  depthwise_conv2d_bwd(s, dy.data(), x.data(), weight.data(), nullptr, alone.dweight.data(), nullptr, 2, level);
  depthwise_conv2d_bwd(s, dy.data(), x.data(), weight.data(), nullptr, nullptr, alone.dbias.data(), 2, level);
  CHECK(alone == results);

  Doubles y(x.size()), dx(x.size()), dweight(weight.size()), dbias(bias.size());
  Doubles y_size(x.size()), dx_size(x.size()), dweight_size(weight.size()), dbias_size(bias.size());
  for (std::int64_t image = 0; image < s.batch; ++image) {
    for (std::int64_t h = 0; h < s.height; ++h) {
      for (std::int64_t w = 0; w < s.width; ++w) {
        for (std::int64_t c = 0; c < s.channels; ++c) {
          const auto at = static_cast<std::size_t>(((image * s.height + h) * s.width + w) * s.channels + c);
          const double slope = dy[at];
          y[at] += bias[static_cast<std::size_t>(c)];
          y_size[at] += std::abs(y[at]);
          dbias[static_cast<std::size_t>(c)] += slope;
          dbias_size[static_cast<std::size_t>(c)] += std::abs(slope);
          for (std::int64_t i = 0; i < s.kernel_rows; ++i) {
            for (std::int64_t j = 0; j < s.kernel_columns; ++j) {
              const std::int64_t row = h + i - s.kernel_rows / 2, column = w + j - s.kernel_columns / 2;
              if (row < 0 || row >= s.height || column < 0 || column >= s.width) continue;
              const auto xi = static_cast<std::size_t>(((image * s.height + row) * s.width + column) * s.channels + c);
              const auto wi = static_cast<std::size_t>(c * taps + i * s.kernel_columns + j);
              const double value = x[xi], factor = weight[wi];
              y[at] += value * factor;
              y_size[at] += std::abs(value * factor);
              dx[xi] += slope * factor;
              dx_size[xi] += std::abs(slope * factor);
              dweight[wi] += slope * value;
              dweight_size[wi] += std::abs(slope * value);
            }
          }
        }
      }
    }
  }
  check(results.y, y, y_size, taps + 1);
  check(results.dx, dx, dx_size, taps);
  check(results.dweight, dweight, dweight_size, 8 * s.width);  // bands of eight rows are added up in double
  check(results.dbias, dbias, dbias_size, 8 * s.width);
}

}  // namespace

int main() {
  if (pixel_shuffle_gelu_level() == SimdLevel::scalar) {
    std::puts("depthwise convolution: this machine has no AVX2");
    return 0;
  }
  for (int level = 1; level <= static_cast<int>(pixel_shuffle_gelu_level()); ++level) {
    for (const DepthwiseShape& s : {DepthwiseShape{1, 1, 1, 1, 1, 1}, {1, 1, 1, 1, 7, 7}, {2, 16, 2, 4, 7, 7},
                                    {1, 64, 4, 8, 7, 7}, {1, 21, 19, 23, 7, 7}, {3, 5, 9, 10, 3, 5}, {1, 33, 8, 15, 5, 9},
                                    {2, 8, 17, 3, 1, 3}, {1, 4, 10, 31, 11, 1}}) {
      check(s, static_cast<SimdLevel>(level));
    }
  }
  std::puts("depthwise convolution: ok");
  return 0;
}
