// Bias, PixelShuffle and GELU without a GPU: the kernels, compiled by the C++ compiler, on an emulation of what they use of a
// GPU (emulation/), against the formula in double.
#include "cuda/pixel_shuffle_gelu.cu"

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

// Memory that begins `offset` elements behind a multiple of 16 bytes, with NaNs on both sides, which must stay.
struct Tensor {
  static constexpr std::size_t kMargin = 64;
  std::vector<BFloat16> memory;
  std::size_t first, count;

  Tensor(std::size_t elements, int offset) : count(elements) {
    memory.assign(count + 2 * kMargin + 16, kPoison);
    const auto address = reinterpret_cast<std::uintptr_t>(memory.data());
    first = kMargin + (16 - address % 16) % 16 / 2 + static_cast<std::size_t>(offset);
  }
  Tensor& randomize(float scale) {
    std::normal_distribution<float> normal(0, scale);
    for (std::size_t i = 0; i < count; ++i) memory[first + i] = BFloat16::round(normal(generator));
    return *this;
  }
  BFloat16* data() { return memory.data() + first; }
  double operator[](std::size_t i) const { return memory.at(first + i); }
  bool margins_are_untouched() const {
    for (std::size_t i = 0; i < memory.size(); ++i) {
      if ((i < first || i >= first + count) && memory[i].bits != kPoison.bits) return false;
    }
    return true;
  }
};

double slope(double x, bool tanh_form) {
  const double h = 1e-4;
  return (gelu(x + h, tanh_form) - gelu(x - h, tanh_form)) / (2 * h);
}

struct Case {
  int batch, channels, r, height, width, offset;
  bool bias, tanh_form, bfloat16;
};

void check(const Case& of) {
  const int square = of.r * of.r, pixel = of.channels * square;
  const auto count = static_cast<std::size_t>(of.batch) * of.height * of.width * pixel;
  Tensor x = Tensor(count, of.offset).randomize(2), dy = Tensor(count, of.offset).randomize(1);
  Tensor y(count, of.offset), dx(count, of.offset), bias = Tensor(static_cast<std::size_t>(pixel), 1).randomize(1);
  Tensor dbias(static_cast<std::size_t>(pixel), 1);
  PixelShuffleGeluCuda call{of.bfloat16, of.tanh_form, of.batch, of.channels, of.r, of.height, of.width,
                            x.data(), of.bias ? bias.data() : nullptr, y.data()};
  CHECK(pixel_shuffle_gelu_cuda_fwd(call, 0, nullptr) == nullptr);
  PixelShuffleGeluGradientCuda gradient{call, dy.data(), dx.data(), nullptr, nullptr};
  std::int64_t floats = 0;
  CHECK(pixel_shuffle_gelu_cuda_sums(gradient, 0, floats) == nullptr);
  std::vector<float> sums(static_cast<std::size_t>(floats) + 2, NAN);
  if (of.bias) gradient.sums = sums.data() + 1, gradient.dbias = dbias.data();
  CHECK(pixel_shuffle_gelu_cuda_bwd(gradient, 0, nullptr) == nullptr);
  CHECK(std::isnan(sums.front()) && std::isnan(sums.back()));
  for (const Tensor* t : {&x, &dy, &y, &dx, &bias, &dbias}) CHECK(t->margins_are_untouched());

  std::vector<double> exact(static_cast<std::size_t>(pixel)), magnitudes(exact);
  for (std::size_t at = 0; at < count; ++at) {
    const int channel = static_cast<int>(at % static_cast<std::size_t>(pixel)), c = channel / square;
    const int i = channel / of.r % of.r, j = channel % of.r;
    const auto position = at / static_cast<std::size_t>(pixel), w = position % of.width, row = position / of.width;
    const auto to = ((row * of.r + i) * of.width * of.r + w * of.r + j) * of.channels + c;
    const double z = x[at] + (of.bias ? bias[static_cast<std::size_t>(channel)] : 0);
    // Rounded to 8 bits; the fitted form is within 3e-5, its derivative within 6e-5.
    const double expected = gelu(z, of.tanh_form), expected_dx = dy[to] * slope(z, of.tanh_form);
    CHECK(std::abs(y[to] - expected) <= 3e-5 + std::abs(expected) / 256);
    CHECK(std::abs(dx[at] - expected_dx) <= 6e-5 * std::abs(dy[to]) + 1e-6 + std::abs(expected_dx) / 256);
    exact[static_cast<std::size_t>(channel)] += expected_dx;
    magnitudes[static_cast<std::size_t>(channel)] += std::abs(dy[to]);
  }
  for (std::size_t channel = 0; of.bias && channel < exact.size(); ++channel) {
    CHECK(std::abs(dbias[channel] - exact[channel]) <= 7e-5 * magnitudes[channel] + std::abs(exact[channel]) / 256);
  }
}

void test_slope() {
  for (double x = -30; x <= 30; x += 1.0 / 256) {
    CHECK(std::abs(gelu_slope<false>(static_cast<float>(x)) - slope(x, false)) <= 5.2e-5);
    CHECK(std::abs(gelu_slope<true>(static_cast<float>(x)) - slope(x, true)) <= 2e-6);
  }
  for (const float x : {INFINITY, 1e30f, 100.0f}) {
    CHECK(gelu_slope<false>(x) == 1 && gelu_slope<true>(x) == 1);
    CHECK(std::abs(gelu_slope<false>(-x)) < 1e-16f && std::abs(gelu_slope<true>(-x)) < 1e-16f);
  }
  CHECK(std::isnan(gelu_slope<false>(NAN)) && std::isnan(gelu_slope<true>(NAN)));
}

// Every shape has a plan that a block can run: threads, shared memory, whole vectors, all tiles.
void test_plans() {
  for (const Kind& kind : {kForward, kBackward}) {
    for (int r = 1; r <= 32; ++r) {
      for (const int channels : {1, 2, 3, 7, 16, 28, 33, 40, 64, 100, 255, 512}) {
        for (const int width : {1, 3, 8, 40, 127, 160, 1920}) {
          const PixelShuffleGeluCuda call{true, false, 8, channels, r, 100, width, nullptr, nullptr, nullptr};
          Plan plan;
          if (make_plan(call, nullptr, kind, 0, plan) != nullptr) {
            CHECK(channels * r * r > kMostThreads);
            continue;
          }
          CHECK(plan.threads % 32 == 0 && plan.columns <= plan.threads && plan.threads <= kMostThreads);
          CHECK(plan.shared_bytes <= emulation::kSharedBytes && plan.step * plan.pixel == plan.columns * plan.vector);
          CHECK(plan.tile * plan.run % plan.vector == 0 && plan.pitch >= plan.tile * plan.run && plan.pitch % 8 == 0);
          CHECK(plan.across * plan.tile >= width && (plan.across - 1) * plan.tile < width);
          CHECK(plan.blocks >= 1 && plan.blocks <= plan.tiles);
        }
      }
    }
  }
}

}  // namespace

int main() {
  test_slope();
  emulation::multiprocessors = 132;
  test_plans();
  emulation::multiprocessors = 1;
  // Vectors of eight elements, in pairs and not, of two and of one; widths that no tile divides, and more tiles than stages.
  const Case cases[] = {
      {2, 28, 2, 9, 80, 0, true, false, true},   {1, 28, 2, 3, 50, 0, false, true, false},
      {2, 33, 2, 9, 160, 0, true, false, true},  {1, 33, 2, 7, 36, 0, true, true, false},
      {1, 40, 4, 9, 83, 0, true, false, false},  {1, 3, 4, 2, 10, 0, true, true, true},
      {1, 5, 2, 4, 33, 0, true, false, true},    {2, 33, 2, 5, 37, 0, true, true, true},
      {1, 7, 3, 11, 41, 0, true, false, false},  {2, 1, 1, 3, 5, 0, true, false, true},
      {1, 9, 1, 1, 300, 0, true, false, true},   {1, 28, 2, 5, 40, 1, true, false, true},
      {1, 28, 2, 5, 40, 2, true, true, false},   {1, 2, 32, 1, 3, 0, true, false, true},
      {1, 200, 4, 2, 3, 0, true, false, true},   {1, 12, 5, 2, 8, 0, false, false, true},
      {3, 1, 3, 2, 1, 0, true, false, false},    {1, 640, 1, 3, 1, 4, true, false, true},
  };
  for (const Case& of : cases) check(of);
  // A row of sums more than one warp adds up.
  emulation::multiprocessors = 40;
  check({2, 8, 2, 40, 40, 0, true, false, true});
  std::printf("pixel_shuffle_gelu_cuda: ok\n");
  return 0;
}
