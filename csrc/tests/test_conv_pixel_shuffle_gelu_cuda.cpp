// The CUDA block without a GPU: its kernel, compiled by the C++ compiler, on an emulation of what it uses of a GPU
// (emulation/), against a convolution in double. Everything is the kernel's own but the hardware: tiles, rings, copies,
// descriptors, fragments, stores. What this cannot show is whether the hardware is as the PTX ISA says, and what waits too little.
#include "cuda/conv_pixel_shuffle_gelu.cu"

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#include "tests/check.h"

namespace {

using namespace hflfnerv;
using namespace hflfnerv::conv_layout;
using BFloat16 = __nv_bfloat16;

constexpr BFloat16 kPoison{0xffff};  // a NaN

// Memory as the driver wants it, with NaNs on both sides, which must stay.
struct Tensor {
  static constexpr std::size_t kMargin = 64;
  std::vector<BFloat16> memory;
  std::size_t offset, count;

  explicit Tensor(std::int64_t elements) : count(static_cast<std::size_t>(elements)) {
    memory.assign(count + 2 * kMargin + 8, kPoison);
    offset = kMargin + (16 - reinterpret_cast<std::uintptr_t>(memory.data()) % 16) % 16 / 2;
  }
  BFloat16* data() { return memory.data() + offset; }
  BFloat16& operator[](std::int64_t i) { return memory.at(offset + static_cast<std::size_t>(i)); }
  bool margins_are_untouched() const {
    for (std::size_t i = 0; i < memory.size(); ++i) {
      if ((i < offset || i >= offset + count) && memory[i].bits != kPoison.bits) return false;
    }
    return true;
  }
};

std::mt19937 generator(1);

void fill(Tensor& tensor, float scale) {
  std::normal_distribution<float> normal(0, scale);
  for (std::size_t i = 0; i < tensor.count; ++i) {
    tensor[static_cast<std::int64_t>(i)] = BFloat16::round(normal(generator));
  }
}

struct Case {
  int batch, channels, height, width, out_channels, r, kernel_h, kernel_w, padding_h, padding_w;
  bool padded;  // pixels of x and y, beyond what the kernel needs
  bool bfloat16 = true;
  bool tanh_form = false;
  int multiprocessors = 2;
  bool apart = false;  // whether each patch has a box of its own; otherwise it may have
  bool channels_last = false;  // the weight
};

void check(const Case& c) {
  Problem p{c.batch,    c.channels, c.height,    c.width,     c.out_channels, c.r, c.kernel_h,
            c.kernel_w, c.padding_h, c.padding_w, 0,           0,              0,   0,          0};
  p.x_pixel = (c.channels + 7) / 8 * 8 + (c.padded ? 8 : 0);
  p.x_row = p.x_pixel * (c.width + c.padded);
  p.x_image = p.x_row * c.height;
  p.y_pixel = c.padded ? (c.out_channels + 7) / 8 * 8 : c.out_channels;
  emulation::multiprocessors = c.multiprocessors;
  Plan plan;
  CHECK(conv_pixel_shuffle_gelu_cuda_plan(p, 0, plan) == nullptr);
  CHECK(plan.shared_bytes <= emulation::kSharedBytes);
  CHECK(!c.apart || plan.patch_columns == 0);

  const int taps = p.taps(), n_all = p.n();
  const std::int64_t out_pixels = std::int64_t(c.batch) * p.out_height() * p.out_width();
  Tensor x(c.batch * p.x_image), weight(std::int64_t(n_all) * c.channels * taps), bias(n_all);
  Tensor packed(plan.packed_elements()), y(out_pixels * c.r * c.r * p.y_pixel), z(out_pixels * n_all);
  fill(x, 1);
  fill(weight, 1 / std::sqrt(static_cast<float>(c.channels * taps)));
  fill(bias, 0.5f);
  for (std::int64_t i = 0; i < c.batch * p.x_image; ++i) {  // what lies behind the channels must not matter
    if (i % p.x_pixel >= c.channels) x[i] = kPoison;
  }
  // The weight in either order: [n, channels, taps], or with its channels last.
  const WeightStrides strides = c.channels_last
                                    ? WeightStrides{std::int64_t(c.channels) * taps, 1, c.channels}
                                    : WeightStrides{std::int64_t(c.channels) * taps, taps, 1};
  CHECK(conv_pixel_shuffle_gelu_cuda_pack(plan, weight.data(), strides, packed.data(), nullptr) == nullptr);
  const Activation activation = c.tanh_form ? Activation::gelu_tanh : Activation::gelu;
  const ConvPixelShuffleGeluCuda call{plan,          c.bfloat16,  activation, x.data(),
                                      packed.data(), bias.data(), y.data(),   z.data()};
  CHECK(conv_pixel_shuffle_gelu_cuda_fwd(call, nullptr) == nullptr);

  std::int64_t written = 0;
  for (std::size_t i = 0; i < y.count; ++i) written += y[static_cast<std::int64_t>(i)].bits != kPoison.bits;
  CHECK(written == out_pixels * n_all);
  CHECK(y.margins_are_untouched() && z.margins_are_untouched() && packed.margins_are_untouched());
  for (int b = 0; b < c.batch; ++b) {
    for (int h = 0; h < p.out_height(); ++h) {
      for (int w = 0; w < p.out_width(); ++w) {
        for (int m = 0; m < n_all; ++m) {  // the weight's order: (c, i, j)
          double sum = bias[m];
          for (int tap = 0; tap < taps; ++tap) {
            const int row = h + tap / c.kernel_w - c.padding_h, column = w + tap % c.kernel_w - c.padding_w;
            if (row < 0 || row >= c.height || column < 0 || column >= c.width) continue;
            for (int k = 0; k < c.channels; ++k) {
              sum += double(x[b * p.x_image + row * p.x_row + column * p.x_pixel + k]) *
                     double(weight[m * strides.n + k * strides.channel + tap * strides.tap]);
            }
          }
          const int k = m / (c.r * c.r), i = m / c.r % c.r, j = m % c.r, n = (i * c.r + j) * c.out_channels + k;
          const std::int64_t pixel = (std::int64_t(b) * p.out_height() + h) * p.out_width() + w;
          const std::int64_t line = (std::int64_t(b) * p.out_height() + h) * c.r + i;
          // Rounding to bfloat16, and what sums in float32 and the fitted GELU are off.
          const double y_sum = y[(line * p.out_width() * c.r + w * c.r + j) * p.y_pixel + k];
          const double z_sum = z[pixel * n_all + n];
          CHECK(std::abs(z_sum - sum) <= 3.92e-3 * std::abs(sum) + 1e-5);
          CHECK(std::abs(y_sum - gelu(sum, c.tanh_form)) <= 3.92e-3 * std::abs(gelu(sum, c.tanh_form)) + 5e-5);
        }
      }
    }
  }
}

// The gradient of a block's x, from that of its convolution: the transpose of the convolution, by definition.
void check_gradient(int channels, int out_channels, int r, int height, int width, int kernel) {
  const int n = out_channels * r * r, taps = kernel * kernel, dz_pixel = (n + 7) / 8 * 8, dx_pixel = (channels + 7) / 8 * 8;
  const Problem p{1, n, height, width, channels, 1, kernel, kernel, kernel / 2, kernel / 2, dz_pixel, dz_pixel * width,
                  std::int64_t(dz_pixel) * width * height, dx_pixel, r};
  emulation::multiprocessors = 2;
  Plan plan;
  CHECK(conv_pixel_shuffle_gelu_cuda_plan(p, 0, plan) == nullptr);
  Tensor dz(p.x_image), weight(std::int64_t(n) * channels * taps), packed(plan.packed_elements());
  Tensor dx(std::int64_t(height) * width * dx_pixel);
  fill(dz, 1);
  fill(weight, 1 / std::sqrt(static_cast<float>(n * taps)));
  const WeightStrides strides{std::int64_t(channels) * taps, taps, 1};
  CHECK(conv_pixel_shuffle_gelu_cuda_pack(plan, weight.data(), strides, packed.data(), nullptr) == nullptr);
  const ConvPixelShuffleGeluCuda call{plan,          true,    Activation::none, dz.data(),
                                      packed.data(), nullptr, dx.data(),        nullptr};
  CHECK(conv_pixel_shuffle_gelu_cuda_fwd(call, nullptr) == nullptr);
  CHECK(dx.margins_are_untouched());
  std::vector<double> expected(static_cast<std::size_t>(height * width * channels));
  for (int pixel = 0; pixel < height * width; ++pixel) {
    for (int m = 0; m < n; ++m) {  // dz's order: (i, j, c)
      const int of_weight = m % out_channels * r * r + m / out_channels;
      for (int tap = 0; tap < taps; ++tap) {
        const int row = pixel / width + tap / kernel - kernel / 2, column = pixel % width + tap % kernel - kernel / 2;
        if (row < 0 || row >= height || column < 0 || column >= width) continue;
        for (int k = 0; k < channels; ++k) {
          expected[static_cast<std::size_t>((row * width + column) * channels + k)] +=
              double(dz[std::int64_t(pixel) * dz_pixel + m]) *
              double(weight[(std::int64_t(of_weight) * channels + k) * taps + tap]);
        }
      }
    }
  }
  for (int pixel = 0; pixel < height * width; ++pixel) {
    for (int k = 0; k < channels; ++k) {
      const double actual = dx[std::int64_t(pixel) * dx_pixel + k];
      const double true_sum = expected[static_cast<std::size_t>(pixel * channels + k)];
      CHECK(std::abs(actual - true_sum) <= 3.92e-3 * std::abs(true_sum) + 1e-5);
    }
  }
}

void test_gradients() {
  check_gradient(33, 28, 2, 17, 19, 5);
  check_gradient(40, 33, 2, 9, 8, 5);
  check_gradient(48, 10, 4, 5, 7, 3);
  check_gradient(5, 3, 2, 4, 20, 1);
}

void test_blocks() {
  // Cousins of the 1.5 M network's stages: their channels, kernels and factors, on a few pixels.
  check({1, 33, 19, 37, 28, 2, 5, 5, 2, 2, false});
  check({1, 40, 9, 33, 33, 2, 5, 5, 2, 2, false});
  check({1, 40, 9, 17, 33, 2, 5, 5, 2, 2, true, false, true});
  check({1, 48, 9, 7, 40, 4, 5, 5, 2, 2, false, true, false, 132});
  check({2, 57, 10, 5, 48, 4, 3, 3, 1, 1, false, false});
  // Every way to cut channels, taps and columns, and rings that go round.
  check({1, 1, 3, 5, 3, 1, 1, 1, 0, 0, false});
  check({5, 8, 17, 33, 5, 3, 1, 1, 0, 0, false});
  check({1, 9, 5, 9, 4, 2, 3, 3, 1, 1, true});
  check({1, 20, 17, 33, 5, 2, 3, 3, 1, 1, false, false, true});
  check({1, 24, 4, 40, 12, 2, 3, 3, 1, 1, false});
  check({1, 29, 8, 8, 24, 2, 5, 5, 2, 2, false});
  check({1, 35, 8, 8, 29, 2, 5, 5, 2, 2, true});
  check({3, 5, 6, 7, 7, 5, 5, 5, 2, 2, false});
  check({1, 2, 9, 18, 3, 2, 3, 5, 0, 4, false});
  check({1, 7, 40, 3, 80, 1, 2, 2, 1, 0, false});
  check({1, 18, 5, 6, 2, 4, 5, 1, 2, 0, true});
  check({1, 200, 9, 9, 3, 2, 3, 3, 1, 1, false});
  // Patches that are no rectangle, and a number of them that four does not divide.
  check({1, 48, 24, 40, 10, 2, 3, 3, 1, 1, false, true, false, 2, true});
  check({3, 9, 8, 40, 7, 3, 5, 5, 2, 2, true, true, false, 2, true});
  check({2, 33, 23, 39, 5, 2, 5, 5, 2, 2, false, false, false, 2, true, true});
  check({5, 17, 7, 8, 6, 2, 1, 1, 0, 0, false, true, false, 2, true});
}

// Plans for the sizes that the kernel is meant for, on a Hopper GPU.
void test_plans() {
  const auto plan_of = [](int batch, int channels, int height, int width, int out_channels, int r, int kernel) {
    Problem p{batch, channels, height, width, out_channels, r, kernel, kernel, kernel / 2, kernel / 2, 0, 0, 0, 0, 0};
    p.y_pixel = out_channels;
    Plan plan;
    CHECK(make_plan(p, 132, 232448, plan) == nullptr);
    CHECK(plan.shared_bytes <= 232448);
    return plan;
  };
  const Plan s5 = plan_of(1, 33, 320, 640, 28, 2, 5), s4 = plan_of(1, 40, 160, 320, 33, 2, 5);
  CHECK(s5.columns == 112 && s5.resident && s5.cut.all_steps(25) == 52 && s5.slots >= 3);
  CHECK(s5.lead == 11 && s4.lead == s4.stages - 1);
  CHECK(s4.columns == 136 && !s4.resident && s4.cut.all_steps(25) == 63 && s4.stages >= 4);
  CHECK(s5.patch_columns == 2 && s5.tiles == 800 && s4.patch_columns == 2 && s4.tiles == 200);
  // No rectangle of four patches divides 40 x 80 pixels: patches of a row after the other do, also from image to image.
  const Plan s3 = plan_of(8, 48, 40, 80, 40, 4, 5), s3_alone = plan_of(1, 48, 40, 80, 40, 4, 5);
  CHECK(s3.patch_columns == 0 && s3.columns == 128 && s3.column_tiles == 5 && s3.tiles == 8 * 5 * 10 / 4 * 5);
  CHECK(s3_alone.patch_columns == 0 && s3_alone.columns == 64 && s3_alone.tiles == 13 * 10);
  CHECK(s3.box(2 * 5 + 4, 1).image == 0 && s3.box(2 * 5 + 4, 1).row == 0 && s3.box(2 * 5 + 4, 1).column == 72);
  CHECK(s3.patch(2 * 5 + 4, 3).row == 8 && s3.patch(2 * 5 + 4, 3).column == 8);
  CHECK(s3.patch(12 * 5, 2).image == 1 && s3_alone.patch(12 * 10, 2).image == 1);
  plan_of(1, 57, 10, 20, 48, 4, 3);
  plan_of(32, 512, 64, 64, 128, 2, 5);
  // Of the image nothing but the width of the tiles makes a difference to the packed weight.
  const Plan small = plan_of(1, 33, 9, 70, 28, 2, 5);
  CHECK(small.columns != s5.columns && small.packed_elements() != s5.packed_elements());
  const Plan other = plan_of(7, 33, 320, 600, 28, 2, 5);
  CHECK(other.columns == s5.columns && other.packed_elements() == s5.packed_elements());
  for (std::int64_t i = 0; i < s5.packed_elements(); ++i) {
    const WeightStrides strides{33 * 25, 25, 1};
    CHECK(packed_source(s5, strides, i) == packed_source(other, strides, i));
  }
  // The largest that hflfnerv/ops lets through, and one that is too large.
  for (const int out_channels : {2048, 128, 16384}) {
    const int r = out_channels == 128 ? 4 : 1;
    Problem p{1, 1000, 64, 64, out_channels, r, 7, 7, 3, 3, 0, 0, 0, out_channels, 0};
    Plan plan;
    CHECK((make_plan(p, 132, 232448, plan) == nullptr) == (out_channels <= 2048));
  }
}

void test_gelu() {
  for (const bool tanh_form : {false, true}) {
    for (double x = -30; x <= 30; x += 1.0 / 256) {
      const double u = (tanh_form ? kGeluTanh : kGelu).argument(static_cast<float>(x));
      CHECK(std::abs(0.5 * x * (1 + std::tanh(u)) - gelu(x, tanh_form)) <= (tanh_form ? 2e-6 : 2.6e-5));
    }
  }
}

}  // namespace

int main() {
  test_plans();
  test_gelu();
  test_blocks();
  test_gradients();
  std::printf("conv_pixel_shuffle_gelu_cuda: ok\n");
  return 0;
}
