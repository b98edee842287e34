// Tests of the head's kernels in csrc/core without Python, meant to be built with -fsanitize=address,undefined: against plain
// loops in double, at sizes that no vector or block divides, and on several threads.
#include <cstdint>
#include <cstdio>

#include "core/conv2d_head.h"
#include "core/pixel_shuffle_gelu.h"
#include "tests/bfloat16.h"
#include "tests/convolution.h"

namespace {

using namespace hflfnerv;

void check(const HeadShape& s, SimdLevel level) {
  const std::int64_t pixels = s.batch * s.height * s.width;
  const Floats x = random_floats(pixels * s.channels), weight = random_floats(3 * s.channels * 9), bias = random_floats(3), dy = random_floats(pixels * 3);
  const auto run = [&](int threads) {
    ConvolutionResults r(dy.size(), x.size(), weight.size(), 3);
    conv2d_head_fwd(s, x.data(), weight.data(), bias.data(), r.y.data(), threads, level);
    conv2d_head_bwd(s, dy.data(), x.data(), weight.data(), r.dx.data(), r.dweight.data(), r.dbias.data(), threads, level);
    return r;
  };
  const ConvolutionResults results = run(1);
  CHECK(results == run(3));
  // One gradient alone is the same.
  ConvolutionResults alone(dy.size(), x.size(), weight.size(), 3);
  alone.y = results.y;
  conv2d_head_bwd(s, dy.data(), x.data(), weight.data(), alone.dx.data(), nullptr, nullptr, 2, level);
  conv2d_head_bwd(s, dy.data(), x.data(), weight.data(), nullptr, alone.dweight.data(), nullptr, 2, level);
  conv2d_head_bwd(s, dy.data(), x.data(), weight.data(), nullptr, nullptr, alone.dbias.data(), 2, level);
  CHECK(alone == results);
  // Without bias, one less of each.
  Floats plain(dy.size(), std::nanf(""));
  conv2d_head_fwd(s, x.data(), weight.data(), nullptr, plain.data(), 1, level);
  for (std::size_t i = 0; i < plain.size(); ++i) CHECK(plain[i] + bias[i % 3] == results.y[i]);

  Sums y(dy.size()), dx(x.size()), dweight(weight.size()), dbias(3);
  for (std::int64_t image = 0; image < s.batch; ++image) {
    for (std::int64_t h = 0; h < s.height; ++h) {
      for (std::int64_t w = 0; w < s.width; ++w) {
        for (std::int64_t colour = 0; colour < 3; ++colour) {
          const auto at = static_cast<std::size_t>(((image * s.height + h) * s.width + w) * 3 + colour);
          const double slope = dy[at];
          y.add(at, bias[static_cast<std::size_t>(colour)]);
          dbias.add(static_cast<std::size_t>(colour), slope);
          for (std::int64_t i = 0; i < 3; ++i) {
            for (std::int64_t j = 0; j < 3; ++j) {
              const std::int64_t row = h + i - 1, column = w + j - 1;
              if (row < 0 || row >= s.height || column < 0 || column >= s.width) continue;
              for (std::int64_t c = 0; c < s.channels; ++c) {
                const auto xi = static_cast<std::size_t>(((image * s.height + row) * s.width + column) * s.channels + c);
                const auto wi = static_cast<std::size_t>(((colour * s.channels + c) * 3 + i) * 3 + j);
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
  }
  y.check(results.y, 9 * s.channels + 1);
  dx.check(results.dx, 27);
  dweight.check(results.dweight, s.width);  // rows are added up in double
  dbias.check(results.dbias, 1);
}

// Rows of 16 bits give what those of floats give, rounded where they are stored.
void check_16_bits(HeadShape s, SimdLevel level) {
  using Halves = std::vector<BFloat16>;
  const std::int64_t pixels = s.batch * s.height * s.width;
  const Halves x16 = narrow(random_floats(pixels * s.channels)), dy16 = narrow(random_floats(pixels * 3));
  const Floats x = widen(x16), dy = widen(dy16), weight = random_floats(3 * s.channels * 9), bias = random_floats(3);
  ConvolutionResults r(dy.size(), x.size(), weight.size(), 3);
  conv2d_head_fwd(s, x.data(), weight.data(), bias.data(), r.y.data(), 1, level);
  conv2d_head_bwd(s, dy.data(), x.data(), weight.data(), r.dx.data(), r.dweight.data(), r.dbias.data(), 1, level);
  s.type = FloatType::bf16;
  Halves y16(dy.size()), dx16(x.size());
  Floats dweight(weight.size()), dbias(3);
  conv2d_head_fwd(s, x16.data(), weight.data(), bias.data(), y16.data(), 3, level);
  conv2d_head_bwd(s, dy16.data(), x16.data(), weight.data(), dx16.data(), dweight.data(), dbias.data(), 3, level);
  check_narrowed(y16, r.y);
  check_narrowed(dx16, r.dx);
  CHECK(dweight == r.dweight);
  CHECK(dbias == r.dbias);
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
        check_16_bits({1, channels, 3, width}, static_cast<SimdLevel>(level));
      }
      check({2, channels, 1, 19}, static_cast<SimdLevel>(level));
      check({2, channels, 37, 11}, static_cast<SimdLevel>(level));
      check_16_bits({2, channels, 37, 11}, static_cast<SimdLevel>(level));
    }
  }
  std::puts("head: ok");
  return 0;
}
