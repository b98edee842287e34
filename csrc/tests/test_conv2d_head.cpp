// Tests of the head's kernels in csrc/core without Python, meant to be built with -fsanitize=address,undefined: against plain
// loops in double, at sizes that no vector or block divides, and on several threads.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <random>
#include <vector>

#include "core/conv2d_head.h"
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

void check(const HeadShape& s, SimdLevel level) {
  const std::int64_t pixels = s.batch * s.height * s.width;
  const Floats x = random(pixels * s.channels), weight = random(3 * s.channels * 9), bias = random(3), dy = random(pixels * 3);
  // What a kernel forgets to write stays NaN.
  const auto fresh = [](std::size_t n) { return Floats(n, std::nanf("")); };
  const auto run = [&](int threads) {
    Results r{fresh(dy.size()), fresh(x.size()), fresh(weight.size()), fresh(3)};
    conv2d_head_fwd(s, x.data(), weight.data(), bias.data(), r.y.data(), threads, level);
    conv2d_head_bwd(s, dy.data(), x.data(), weight.data(), r.dx.data(), r.dweight.data(), r.dbias.data(), threads, level);
    return r;
  };
  const Results results = run(1);
  CHECK(results == run(3));
  // One gradient alone is the same.
  Results alone = results;
  conv2d_head_bwd(s, dy.data(), x.data(), weight.data(), alone.dx.data(), nullptr, nullptr, 2, level);
  conv2d_head_bwd(s, dy.data(), x.data(), weight.data(), nullptr, alone.dweight.data(), nullptr, 2, level);
  conv2d_head_bwd(s, dy.data(), x.data(), weight.data(), nullptr, nullptr, alone.dbias.data(), 2, level);
  CHECK(alone == results);
  // Without bias, one less of each.
  Floats plain = fresh(dy.size());
  conv2d_head_fwd(s, x.data(), weight.data(), nullptr, plain.data(), 1, level);
  for (std::size_t i = 0; i < plain.size(); ++i) CHECK(plain[i] + bias[i % 3] == results.y[i]);

  Doubles y(dy.size()), dx(x.size()), dweight(weight.size()), dbias(3);
  Doubles y_size(dy.size()), dx_size(x.size()), dweight_size(weight.size()), dbias_size(3);
  for (std::int64_t image = 0; image < s.batch; ++image) {
    for (std::int64_t h = 0; h < s.height; ++h) {
      for (std::int64_t w = 0; w < s.width; ++w) {
        for (std::int64_t colour = 0; colour < 3; ++colour) {
          const auto at = static_cast<std::size_t>(((image * s.height + h) * s.width + w) * 3 + colour);
          const double slope = dy[at];
          y[at] += bias[static_cast<std::size_t>(colour)];
          y_size[at] += std::abs(y[at]);
          dbias[static_cast<std::size_t>(colour)] += slope;
          dbias_size[static_cast<std::size_t>(colour)] += std::abs(slope);
          for (std::int64_t i = 0; i < 3; ++i) {
            for (std::int64_t j = 0; j < 3; ++j) {
              const std::int64_t row = h + i - 1, column = w + j - 1;
              if (row < 0 || row >= s.height || column < 0 || column >= s.width) continue;
              for (std::int64_t c = 0; c < s.channels; ++c) {
                const auto xi = static_cast<std::size_t>(((image * s.height + row) * s.width + column) * s.channels + c);
                const auto wi = static_cast<std::size_t>(((colour * s.channels + c) * 3 + i) * 3 + j);
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
  }
  check(results.y, y, y_size, 9 * s.channels + 1);
  check(results.dx, dx, dx_size, 27);
  check(results.dweight, dweight, dweight_size, s.width);  // rows are added up in double
  check(results.dbias, dbias, dbias_size, 1);
}

}  // namespace

int main() {
  if (pixel_shuffle_gelu_level() == SimdLevel::scalar) {
    std::puts("head: this machine has no AVX2");
    return 0;
  }
  for (int level = 1; level <= static_cast<int>(pixel_shuffle_gelu_level()); ++level) {
    for (const std::int64_t channels : {1, 2, 5, 7, 8, 9, 13, 15, 16, 17, 24, 28, 33}) {
      for (const std::int64_t width : {1, 2, 3, 5, 6, 12, 23, 41}) {
        check({1, channels, 3, width}, static_cast<SimdLevel>(level));
      }
      check({2, channels, 1, 19}, static_cast<SimdLevel>(level));
      check({2, channels, 37, 11}, static_cast<SimdLevel>(level));
    }
  }
  std::puts("head: ok");
  return 0;
}
