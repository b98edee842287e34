// Tests of the Winograd kernels in csrc/core without Python, meant to be built with -fsanitize=address,undefined: against
// plain loops in double, at sizes that no tile, vector or block divides, and on several threads.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#include "core/conv_pixel_shuffle_gelu_winograd.h"
#include "core/pixel_shuffle_gelu.h"
#include "core/undo_shuffle_gelu.h"
#include "core/winograd_output.h"
#include "tests/bfloat16.h"
#include "tests/check.h"

namespace {

using namespace hflfnerv;
using Floats = std::vector<float>;
using Doubles = std::vector<double>;

std::mt19937 generator(1);

Floats random(std::int64_t count, double scale) {
  std::normal_distribution<float> normal(0, static_cast<float>(scale));
  Floats values(static_cast<std::size_t>(count));
  for (float& value : values) value = normal(generator);
  return values;
}

double gelu_gradient(double z) {
  return 0.5 * std::erfc(-z * std::sqrt(0.5)) + z * std::exp(-0.5 * z * z) / std::sqrt(2 * std::acos(-1.0));
}

// The largest error, as a part of the largest value.
double error(const Floats& actual, const Doubles& expected) {
  double worst = 0, largest = 0;
  CHECK(actual.size() == expected.size());
  for (std::size_t i = 0; i < actual.size(); ++i) {
    CHECK(std::isfinite(actual[i]));
    worst = std::max(worst, std::abs(actual[i] - expected[i]));
    largest = std::max(largest, std::abs(expected[i]));
  }
  return largest > 0 ? worst / largest : worst;
}

struct Results {
  Floats y, z, dz, dbias, dx, dweight;
  bool operator==(const Results& o) const {
    return y == o.y && z == o.z && dz == o.dz && dbias == o.dbias && dx == o.dx && dweight == o.dweight;
  }
};

// The shape for the gradient of the weight, which is not made at 18 x 18 points.
WinogradShape for_wgrad(WinogradShape s) {
  if (s.points == 18) s.points = 8;
  return s;
}

UndoShape undo_of(const WinogradShape& s) { return {s.batch, s.channels, s.r, s.height, s.width, s.type}; }

Results run(const WinogradShape& s, const Floats& x, const Floats& weight, const Floats& bias, const Floats& dy, int threads,
            SimdLevel level) {
  // What a kernel forgets to write stays NaN.
  const auto fresh = [](std::size_t n) { return Floats(n, std::nanf("")); };
  Results r{fresh(dy.size()), fresh(dy.size()), fresh(dy.size()), fresh(bias.size()), fresh(x.size()),
            fresh(weight.size())};
  Floats points = fresh(static_cast<std::size_t>(winograd_weight_floats(s, false, level)));
  winograd_weight(s, false, weight.data(), points.data(), threads, level);
  winograd_fwd(s, ConvActivation::gelu, x.data(), points.data(), bias.data(), r.y.data(), r.z.data(), threads, level);
  Floats only_y = fresh(dy.size());
  winograd_fwd(s, ConvActivation::gelu, x.data(), points.data(), bias.data(), only_y.data(), nullptr, threads, level);
  CHECK(only_y == r.y);
  if (s.r == 1) {
    winograd_fwd(s, ConvActivation::identity, x.data(), points.data(), bias.data(), only_y.data(), nullptr, threads,
                 level);
    CHECK(only_y == r.z);
  }
  undo_shuffle_gelu(undo_of(s), false, dy.data(), r.z.data(), r.dz.data(), r.dbias.data(), threads, level);
  points = fresh(static_cast<std::size_t>(winograd_weight_floats(s, true, level)));
  winograd_weight(s, true, weight.data(), points.data(), threads, level);
  winograd_dgrad(s, r.dz.data(), points.data(), r.dx.data(), threads, level);
  winograd_wgrad(for_wgrad(s), x.data(), r.dz.data(), r.dweight.data(), threads, level);
  return r;
}

void check(const WinogradShape& s, SimdLevel level) {
  const std::int64_t in = s.in_channels, out = s.out_channels(), k = s.kernel, r = s.r, pixels = s.height * s.width;
  const double scale = 1 / std::sqrt(static_cast<double>(in * k * k));
  const Floats x = random(s.batch * pixels * in, 1), weight = random(out * k * k * in, scale), bias = random(out, 1),
               dy = random(s.batch * pixels * out, 1);
  const Results results = run(s, x, weight, bias, dy, 1, level);
  CHECK(results == run(s, x, weight, bias, dy, 3, level));

  Doubles y(dy.size()), z(dy.size()), dbias(bias.size()), dx(x.size()), dweight(weight.size());
  for (std::int64_t image = 0; image < s.batch; ++image) {
    for (std::int64_t h = 0; h < s.height; ++h) {
      for (std::int64_t w = 0; w < s.width; ++w) {
        for (std::int64_t n = 0; n < out; ++n) {
          const auto taps = [&](auto&& visit) {
            for (std::int64_t i = 0; i < k; ++i) {
              for (std::int64_t j = 0; j < k; ++j) {
                const std::int64_t row = h + i - k / 2, column = w + j - k / 2;
                if (row < 0 || row >= s.height || column < 0 || column >= s.width) continue;
                for (std::int64_t c = 0; c < in; ++c) {
                  visit(static_cast<std::size_t>(((image * s.height + row) * s.width + column) * in + c),
                        static_cast<std::size_t>(((n * k + i) * k + j) * in + c));
                }
              }
            }
          };
          double sum = bias[static_cast<std::size_t>(n)];
          taps([&](std::size_t xi, std::size_t wi) { sum += static_cast<double>(x[xi]) * static_cast<double>(weight[wi]); });
          const std::int64_t c = n / (r * r), i = n % (r * r) / r, j = n % r;
          const auto yi = static_cast<std::size_t>(
              ((image * s.height * r + h * r + i) * s.width * r + w * r + j) * s.channels + c);
          const auto zi =
              static_cast<std::size_t>(((image * s.height + h) * s.width + w) * out + (i * r + j) * s.channels + c);
          z[zi] = sum;
          y[yi] = gelu(sum, false);
          const double slope = gelu_gradient(sum) * static_cast<double>(dy[yi]);
          dbias[static_cast<std::size_t>(n)] += slope;
          taps([&](std::size_t xi, std::size_t wi) {
            dx[xi] += slope * static_cast<double>(weight[wi]);
            dweight[wi] += slope * static_cast<double>(x[xi]);
          });
        }
      }
    }
  }
  // A wrong tap or channel is an error of 0.01 and more; tests/ops holds the results to their rounding errors.
  const double kAllowed = s.points == 18 ? 1e-3 : 1e-4;
  CHECK(error(results.y, y) < kAllowed);
  CHECK(error(results.z, z) < kAllowed);
  CHECK(error(results.dbias, dbias) < kAllowed);
  CHECK(error(results.dx, dx) < kAllowed);
  CHECK(error(results.dweight, dweight) < kAllowed);
}

// Images of 16 bits give what those of floats give, rounded where it is stored.
void check_16_bits(WinogradShape s, SimdLevel level) {
  using Halves = std::vector<BFloat16>;
  const std::int64_t out = s.out_channels(), pixels = s.batch * s.height * s.width;
  const double scale = 1 / std::sqrt(static_cast<double>(s.in_channels * s.kernel * s.kernel));
  const Halves x16 = narrow(random(pixels * s.in_channels, 1)), dy16 = narrow(random(pixels * out, 1));
  const Floats x = widen(x16), dy = widen(dy16), bias = random(out, 1);
  const Floats weight = random(out * s.kernel * s.kernel * s.in_channels, scale);
  Floats points(static_cast<std::size_t>(winograd_weight_floats(s, false, level)));
  winograd_weight(s, false, weight.data(), points.data(), 1, level);
  Floats reversed(static_cast<std::size_t>(winograd_weight_floats(s, true, level)));
  winograd_weight(s, true, weight.data(), reversed.data(), 1, level);
  const auto gelu = ConvActivation::gelu;

  Floats y(dy.size()), z(dy.size()), dz(dy.size()), dbias(bias.size()), dx(x.size()), dweight(weight.size());
  winograd_fwd(s, gelu, x.data(), points.data(), bias.data(), y.data(), z.data(), 1, level);
  const Floats stored_z = widen(narrow(z));
  undo_shuffle_gelu(undo_of(s), false, dy.data(), stored_z.data(), dz.data(), dbias.data(), 1, level);
  const Floats stored_dz = widen(narrow(dz));
  winograd_dgrad(s, stored_dz.data(), reversed.data(), dx.data(), 1, level);
  winograd_wgrad(for_wgrad(s), x.data(), stored_dz.data(), dweight.data(), 1, level);

  s.type = FloatType::bf16;
  Halves y16(y.size()), z16(z.size()), dz16(dz.size()), dx16(dx.size());
  Floats dbias16(dbias.size()), dweight16(dweight.size());
  winograd_fwd(s, gelu, x16.data(), points.data(), bias.data(), y16.data(), z16.data(), 3, level);
  undo_shuffle_gelu(undo_of(s), false, dy16.data(), z16.data(), dz16.data(), dbias16.data(), 3, level);
  winograd_dgrad(s, dz16.data(), reversed.data(), dx16.data(), 3, level);
  winograd_wgrad(for_wgrad(s), x16.data(), dz16.data(), dweight16.data(), 3, level);
  check_narrowed(y16, y);
  check_narrowed(z16, z);
  check_narrowed(dz16, dz);
  check_narrowed(dx16, dx);
  CHECK(dbias16 == dbias);
  CHECK(dweight16 == dweight);
}

// In strips, frames are those of the blocks and the output stage one after the other, with rows and columns cut off or not.
void check_frames(std::int64_t height, std::int64_t width, const std::vector<WinogradShape>& shapes, SimdLevel level) {
  const int count = static_cast<int>(shapes.size()), groups = count > 1 ? 2 : 1;
  std::vector<Floats> kept;
  const auto keep = [&](std::int64_t floats, double scale) {
    kept.push_back(random(floats, scale));
    return kept.back().data();
  };
  std::vector<WinogradStream> streams;
  std::vector<OutputFeature> features;
  for (int i = 0; i < count; ++i) {
    const WinogradShape& s = shapes[static_cast<std::size_t>(i)];
    const std::int64_t pixels = s.height * s.width, inner = s.in_channels * s.kernel * s.kernel;
    const float* const x = keep(pixels * s.in_channels, 1);
    const float* const weight = keep(s.out_channels() * inner, 1 / std::sqrt(static_cast<double>(inner)));
    const float* const bias = keep(s.out_channels(), 1);
    const float* const head = keep(3 * s.channels * 9, 0.1);
    float* const points = keep(winograd_weight_floats(s, false, level), 0);
    winograd_weight(s, false, weight, points, 1, level);
    float* const y = keep(pixels * s.out_channels(), 0);
    winograd_fwd(s, ConvActivation::gelu, x, points, bias, y, nullptr, 2, level);
    const int group = i == 0 ? 0 : groups - 1;
    streams.push_back({s, ConvActivation::gelu, x, points, bias, head, group});
    features.push_back({y, s.channels, s.height * s.r, s.width * s.r, head, group});
  }
  const Floats scales = random(groups, 1), biases = random(groups * 3, 0.1);
  const OutputShape shape{1, height, width, groups, scales.data(), biases.data(), 0.5f};
  CHECK(winograd_output_fits(streams.data(), count, level));
  const auto size = static_cast<std::size_t>(height * width * 3);
  Floats expected(size, std::nanf(""));
  std::vector<std::uint8_t> expected_bytes(size, 7);
  output_stage_fwd(shape, features.data(), count, FloatType::f32, expected.data(), false, 1, level, false);
  output_stage_fwd(shape, features.data(), count, FloatType::f32, expected_bytes.data(), true, 1, level, false);
  for (const int threads : {1, 2, 5}) {
    Floats frame(size, std::nanf(""));
    winograd_output_fwd(shape, streams.data(), count, frame.data(), false, threads, level);
    CHECK(frame == expected);
    std::vector<std::uint8_t> bytes(size, 9);
    winograd_output_fwd(shape, streams.data(), count, bytes.data(), true, threads, level);
    CHECK(bytes == expected_bytes);
  }
}

}  // namespace

int main() {
  if (pixel_shuffle_gelu_level() == SimdLevel::scalar) {
    std::puts("Winograd: this machine has no AVX2");
    return 0;
  }
  for (int level = 1; level <= static_cast<int>(pixel_shuffle_gelu_level()); ++level) {
    for (const std::int64_t kernel : {3, 5}) {
      // batch, input channels, height, width, channels, r
      for (const WinogradShape& s : {WinogradShape{1, 1, 1, 1, 1, 1, kernel, 8}, {1, 33, 9, 14, 28, 2, kernel, 8},
                                     {2, 7, 5, 23, 3, 3, kernel, 8}, {1, 40, 13, 8, 33, 2, kernel, 8},
                                     {3, 16, 4, 4, 1, 4, kernel, 8}, {1, 5, 31, 29, 2, 1, kernel, 8},
                                     {1, 70, 6, 7, 8, 1, kernel, 8}}) {
        for (const std::int64_t points : {8, 10, 18}) {
          if (points == 10 && kernel == 3) continue;
          WinogradShape shape = s;
          shape.points = points;
          check(shape, static_cast<SimdLevel>(level));
          check_16_bits(shape, static_cast<SimdLevel>(level));
        }
      }
    }
    check_frames(1, 1, {{1, 1, 1, 1, 1, 1, 3, 8}}, static_cast<SimdLevel>(level));
    check_frames(61, 47, {{1, 9, 32, 24, 7, 2, 5, 10}}, static_cast<SimdLevel>(level));
    check_frames(48, 40, {{1, 5, 24, 20, 3, 2, 5, 8}}, static_cast<SimdLevel>(level));
    check_frames(36, 19, {{1, 6, 18, 10, 12, 2, 3, 8}, {1, 4, 19, 12, 2, 2, 5, 10}, {1, 3, 25, 10, 5, 2, 3, 8}},
                 static_cast<SimdLevel>(level));
    // Several strips: of one tile and of many, frames that end with a tile, before its last pixel and behind it, features
    // that go on behind the frame, and streams of different widths.
    check_frames(30, 400, {{1, 4, 15, 200, 3, 2, 5, 8}}, static_cast<SimdLevel>(level));
    check_frames(41, 171, {{1, 5, 21, 90, 2, 2, 5, 18}, {1, 3, 30, 86, 28, 2, 5, 18}}, static_cast<SimdLevel>(level));
    for (const std::int64_t width : {139, 140, 141, 168}) {
      check_frames(56, width, {{1, 17, 28, 84, 4, 2, 5, 18}}, static_cast<SimdLevel>(level));
    }
    check_frames(33, 96, {{1, 8, 33, 97, 9, 1, 3, 18}}, static_cast<SimdLevel>(level));
  }
  std::puts("Winograd: ok");
  return 0;
}
