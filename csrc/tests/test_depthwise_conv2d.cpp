// Tests of the depthwise convolution in csrc/core without Python, meant to be built with -fsanitize=address,undefined: against
// plain loops in double, at sizes that no vector or block divides, and on several threads.
#include <cstdint>
#include <cstdio>

#include "core/depthwise_conv2d.h"
#include "core/pixel_shuffle_gelu.h"
#include "tests/convolution.h"

namespace {

using namespace hflfnerv;

void check(const DepthwiseShape& s, SimdLevel level) {
  const std::int64_t pixels = s.batch * s.height * s.width, taps = s.kernel_rows * s.kernel_columns;
  const Floats x = random_floats(pixels * s.channels), weight = random_floats(s.channels * taps), bias = random_floats(s.channels),
               dy = random_floats(pixels * s.channels);
  const auto run = [&](int threads) {
    ConvolutionResults r(x.size(), x.size(), weight.size(), bias.size());
    depthwise_conv2d_fwd(s, x.data(), weight.data(), bias.data(), r.y.data(), threads, level);
    depthwise_conv2d_bwd(s, dy.data(), x.data(), weight.data(), r.dx.data(), r.dweight.data(), r.dbias.data(), threads, level);
    return r;
  };
  const ConvolutionResults results = run(1);
  CHECK(results == run(3));
  ConvolutionResults alone(x.size(), x.size(), weight.size(), bias.size());
  alone.y = results.y;
  depthwise_conv2d_bwd(s, dy.data(), x.data(), weight.data(), alone.dx.data(), nullptr, nullptr, 2, level);
  depthwise_conv2d_bwd(s, dy.data(), x.data(), weight.data(), nullptr, alone.dweight.data(), nullptr, 2, level);
  depthwise_conv2d_bwd(s, dy.data(), x.data(), weight.data(), nullptr, nullptr, alone.dbias.data(), 2, level);
  CHECK(alone == results);

  Sums y(x.size()), dx(x.size()), dweight(weight.size()), dbias(bias.size());
  for (std::int64_t image = 0; image < s.batch; ++image) {
    for (std::int64_t h = 0; h < s.height; ++h) {
      for (std::int64_t w = 0; w < s.width; ++w) {
        for (std::int64_t c = 0; c < s.channels; ++c) {
          const auto at = static_cast<std::size_t>(((image * s.height + h) * s.width + w) * s.channels + c);
          const double slope = dy[at];
          y.add(at, bias[static_cast<std::size_t>(c)]);
          dbias.add(static_cast<std::size_t>(c), slope);
          for (std::int64_t i = 0; i < s.kernel_rows; ++i) {
            for (std::int64_t j = 0; j < s.kernel_columns; ++j) {
              const std::int64_t row = h + i - s.kernel_rows / 2, column = w + j - s.kernel_columns / 2;
              if (row < 0 || row >= s.height || column < 0 || column >= s.width) continue;
              const auto xi = static_cast<std::size_t>(((image * s.height + row) * s.width + column) * s.channels + c);
              const auto wi = static_cast<std::size_t>(c * taps + i * s.kernel_columns + j);
              const double value = x[xi], factor = weight[wi];
              y.add(at, value * factor);
              dx.add(xi, slope * factor);
              dweight.add(wi, slope * value);
            }
          }
        }
      }
    }
  }
  y.check(results.y, taps + 1);
  dx.check(results.dx, taps);
  dweight.check(results.dweight, 8 * s.width);  // bands of eight rows are added up in double
  dbias.check(results.dbias, 8 * s.width);
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
