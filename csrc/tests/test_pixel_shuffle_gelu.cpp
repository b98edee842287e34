// Tests of the fused blocks in csrc/core without Python, meant to be built with -fsanitize=address,undefined: every
// instruction set against plain loops in double, at sizes that no vector, tile or block divides.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#include "core/conv_pixel_shuffle_gelu.h"
#include "core/pixel_shuffle_gelu.h"
#include "tests/bfloat16.h"
#include "tests/check.h"

namespace {

using namespace hflfnerv;

double gelu_slope(double x, bool tanh_form) {
  const double h = 1e-4;
  return (gelu(x + h, tanh_form) - gelu(x - h, tanh_form)) / (2 * h);
}

float widen(float v) { return v; }

void narrow(float v, float& to) { to = v; }
void narrow(float v, BFloat16& to) { to = hflfnerv::narrow(v); }

std::mt19937 generator(1);

// Vectors of exactly the size that a kernel may touch: the sanitizer sees one element more or less.
template <class T>
std::vector<T> random(std::int64_t count, float scale) {
  std::normal_distribution<float> normal(0, scale);
  std::vector<T> values(static_cast<std::size_t>(count));
  for (T& value : values) narrow(normal(generator), value);
  return values;
}

// Index of [b, c, h, w] in a tensor of the sizes given.
std::size_t at(bool channels_last, std::int64_t b, std::int64_t c, std::int64_t h, std::int64_t w, std::int64_t channels,
               std::int64_t height, std::int64_t width) {
  return static_cast<std::size_t>(channels_last ? ((b * height + h) * width + w) * channels + c
                                                : ((b * channels + c) * height + h) * width + w);
}

template <class T>
void check_pointwise(const PixelShuffleShape& s, bool tanh_form, SimdLevel level, bool with_bias) {
  const GeluForm form{sizeof(T) == 4 ? FloatType::f32 : FloatType::bf16, tanh_form};
  const double unit = sizeof(T) == 4 ? 6e-8 : 3.92e-3, floor = 3e-7;
  const std::vector<T> x = random<T>(s.elements(), 2), dy = random<T>(s.elements(), 1);
  const std::vector<float> bias = random<float>(s.in_channels(), 1);
  std::vector<T> y(x.size()), dx(x.size());
  std::vector<float> dbias(bias.size());
  const float* biases = with_bias ? bias.data() : nullptr;
  pixel_shuffle_gelu_fwd(s, form, x.data(), biases, y.data(), 1, level);
  pixel_shuffle_gelu_bwd(s, form, dy.data(), x.data(), biases, dx.data(), with_bias ? dbias.data() : nullptr, 1, level);
  for (std::int64_t k = 0; k < s.in_channels(); ++k) {
    const std::int64_t c = k / (s.r * s.r), i = k / s.r % s.r, j = k % s.r;
    double sum = 0, sum_abs = 0;
    for (std::int64_t b = 0; b < s.batch; ++b) {
      for (std::int64_t h = 0; h < s.height; ++h) {
        for (std::int64_t w = 0; w < s.width; ++w) {
          const std::size_t in = at(s.channels_last, b, k, h, w, s.in_channels(), s.height, s.width);
          const std::size_t out =
              at(s.channels_last, b, c, h * s.r + i, w * s.r + j, s.channels, s.height * s.r, s.width * s.r);
          const float z = widen(x[in]) + (with_bias ? bias[static_cast<std::size_t>(k)] : 0.0f);
          const double value = gelu(z, tanh_form), slope = gelu_slope(z, tanh_form) * widen(dy[out]);
          CHECK(std::abs(widen(y[out]) - value) <= floor + 2 * unit * std::abs(value));
          CHECK(std::abs(widen(dx[in]) - slope) <= 10 * floor + 2 * unit * std::abs(slope));
          sum += slope;
          sum_abs += std::abs(slope);
        }
      }
    }
    CHECK(!with_bias || std::abs(dbias[static_cast<std::size_t>(k)] - sum) <= 1e-5 * (1 + sum_abs));
  }
}

void test_pointwise() {
  const std::int64_t sizes[][5] = {{2, 3, 2, 5, 7},  {1, 20, 2, 3, 23}, {1, 9, 2, 17, 40}, {1, 17, 4, 2, 21}, {2, 5, 3, 9, 5},
                                   {1, 3, 1, 9, 33}, {1, 1, 4, 1, 1},   {1, 12, 4, 2, 5},  {1, 2, 5, 1, 600}, {1, 3, 5, 3, 90},
                                   {1, 4, 5, 2, 41}, {2, 7, 3, 2, 33},  {1, 2, 7, 2, 19},  {1, 3, 8, 1, 17},  {1, 1, 13, 2, 35},
                                   {1, 20, 3, 2, 9}, {1, 3, 3, 1, 1400}, {2, 20, 1, 5, 23}, {1, 3, 1, 6, 5}, {1, 33, 3, 2, 7},
                                   {2, 16, 5, 3, 4}, {1, 41, 6, 2, 3}, {1, 29, 4, 2, 5}};
  for (int level = 1; level <= static_cast<int>(pixel_shuffle_gelu_level()); ++level) {
    for (const auto& n : sizes) {
      for (const bool channels_last : {false, true}) {
        const PixelShuffleShape shape{n[0], n[1], n[2], n[3], n[4], channels_last};
        check_pointwise<float>(shape, channels_last, static_cast<SimdLevel>(level), true);
        check_pointwise<BFloat16>(shape, !channels_last, static_cast<SimdLevel>(level), n[3] != 9);
      }
    }
  }
}

void check_conv(const ConvPixelShuffleShape& s) {
  const std::int64_t height = s.out_height(), width = s.out_width(), taps = s.kernel_h * s.kernel_w;
  const float scale = 1 / std::sqrt(static_cast<float>(s.in_channels * taps));
  const std::vector<BFloat16> x = random<BFloat16>(s.batch * s.in_channels * s.height * s.width, 1);
  const std::vector<BFloat16> weight = random<BFloat16>(s.out_channels() * s.in_channels * taps, scale);
  const std::vector<float> bias = random<float>(s.out_channels(), 1);
  std::vector<BFloat16> y(static_cast<std::size_t>(s.batch * s.out_channels() * height * width), BFloat16{0x7fc0});
  conv_pixel_shuffle_gelu_fwd(s, ConvActivation::gelu, x.data(), weight.data(), bias.data(), y.data(), nullptr, 1);
  for (std::int64_t b = 0; b < s.batch; ++b) {
    for (std::int64_t n = 0; n < s.out_channels(); ++n) {
      for (std::int64_t h = 0; h < height; ++h) {
        for (std::int64_t w = 0; w < width; ++w) {
          double z = bias[static_cast<std::size_t>(n)];
          for (std::int64_t tap = 0; tap < taps; ++tap) {
            const std::int64_t row = h + tap / s.kernel_w - s.padding_h, column = w + tap % s.kernel_w - s.padding_w;
            if (row < 0 || row >= s.height || column < 0 || column >= s.width) continue;
            for (std::int64_t c = 0; c < s.in_channels; ++c) {
              z += static_cast<double>(widen(x[at(true, b, c, row, column, s.in_channels, s.height, s.width)])) *
                   widen(weight[static_cast<std::size_t>((n * taps + tap) * s.in_channels + c)]);
            }
          }
          const std::int64_t c = n / (s.r * s.r), i = n / s.r % s.r, j = n % s.r;
          const float actual =
              widen(y[at(true, b, c, h * s.r + i, w * s.r + j, s.channels, height * s.r, width * s.r)]);
          const double value = gelu(z, false);
          CHECK(std::abs(actual - value) <= 2e-6 + 3.92e-3 * std::abs(value));
        }
      }
    }
  }
}

void test_conv() {
  if (const char* reason = amx_unavailable()) {
    std::printf("conv_pixel_shuffle_gelu: not tested: %s\n", reason);
    return;
  }
  check_conv({1, 33, 6, 19, 7, 2, 5, 5, 2, 2});
  check_conv({2, 40, 3, 17, 5, 2, 3, 3, 1, 1});
  check_conv({1, 57, 5, 4, 3, 4, 3, 3, 1, 1});
  check_conv({1, 3, 2, 5, 1, 1, 1, 1, 0, 0});
  check_conv({1, 1, 1, 1, 1, 1, 1, 1, 0, 0});
  check_conv({1, 20, 9, 18, 2, 3, 5, 3, 0, 4});
  check_conv({1, 8, 70, 300, 1, 2, 3, 3, 1, 1});
}

}  // namespace

int main() {
  test_pointwise();
  test_conv();
  std::printf("pixel_shuffle_gelu: ok\n");
  return 0;
}
