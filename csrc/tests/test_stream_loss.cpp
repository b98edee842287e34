// Tests of the loss in csrc/core without Python, meant to be built with -fsanitize=address,undefined: against plain loops in
// double, at sizes that no vector divides, and on several threads.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <random>
#include <vector>

#include "core/pixel_shuffle_gelu.h"
#include "core/stream_loss.h"
#include "tests/check.h"

namespace {

using namespace hflfnerv;
using Floats = std::vector<float>;

std::mt19937 generator(1);

struct Image {
  std::int64_t height, width;
  Floats x;
  Image(std::int64_t batch, std::int64_t height, std::int64_t width) : height(height), width(width) {
    std::normal_distribution<float> normal(0, 2);
    x.resize(static_cast<std::size_t>(batch * height * width * 3));
    for (float& value : x) value = normal(generator);
  }
};

// `high` with no rows stands for none.
void check(std::int64_t batch, std::int64_t height, std::int64_t width, const Image& low, const Image& high, SimdLevel level) {
  std::vector<std::uint8_t> target(static_cast<std::size_t>(batch * height * width * 3));
  for (std::uint8_t& value : target) value = static_cast<std::uint8_t>(generator());
  const bool both = !high.x.empty();
  const Floats dloss{0.5f, -2.0f, 3.0f};
  const auto run = [&](int threads) {
    // What a kernel forgets to write stays NaN.
    std::vector<Floats> results{Floats(static_cast<std::size_t>(batch), std::nanf("")), Floats(low.x.size(), std::nanf("")),
                                Floats(high.x.size(), std::nanf(""))};
    const StreamLoss task{batch, height, width, FloatType::f32, {low.x.data(), low.height, low.width, results[1].data()},
                          {both ? high.x.data() : nullptr, high.height, high.width, both ? results[2].data() : nullptr},
                          target.data()};
    stream_loss_fwd(task, results[0].data(), threads, level);
    stream_loss_bwd(task, dloss.data(), threads, level);
    return results;
  };
  const std::vector<Floats> results = run(1);
  CHECK(results == run(3));
  // Values are differences of numbers up to 2 that are each within 2^-22, and slopes are at most 1.
  constexpr double kAllowed = 4 * 0x1p-22;
  for (std::int64_t frame = 0; frame < batch; ++frame) {
    double loss = 0;
    for (std::int64_t row = 0; row < std::max(low.height, high.height); ++row) {
      for (std::int64_t column = 0; column < std::max(low.width, high.width) * 3; ++column) {
        const auto at = [&](const Image& image) {
          return static_cast<std::size_t>((frame * image.height + row) * image.width * 3 + column);
        };
        const bool in_low = row < low.height && column < low.width * 3, in_high = row < high.height && column < high.width * 3;
        const bool inside = row < height && column < width * 3;
        double dlow = 0, dhigh = 0;
        if (inside) {
          const double dark = std::tanh(static_cast<double>(low.x[at(low)]));
          const double fine = both ? std::tanh(static_cast<double>(high.x[at(high)])) : 0;
          const double error = dark / 2 + 0.5 + fine -
                               target[static_cast<std::size_t>((frame * height + row) * width * 3 + column)] / 255.0;
          loss += error * error / static_cast<double>(3 * height * width);
          const double slope = 2 * static_cast<double>(dloss[static_cast<std::size_t>(frame)]) * error;
          dlow = slope * (1 - dark * dark) / 2;
          dhigh = slope * (1 - fine * fine);
        }
        const double scale = static_cast<double>(3 * height * width), allowed = inside ? 6 * 2 * kAllowed : 0;
        if (in_low) CHECK(std::abs(static_cast<double>(results[1][at(low)]) * scale - dlow) <= allowed);
        if (in_high) CHECK(std::abs(static_cast<double>(results[2][at(high)]) * scale - dhigh) <= allowed);
      }
    }
    CHECK(std::abs(static_cast<double>(results[0][static_cast<std::size_t>(frame)]) - loss) <= 2 * 2 * kAllowed);
  }
}

}  // namespace

int main() {
  if (pixel_shuffle_gelu_level() == SimdLevel::scalar) {
    std::puts("loss: this machine has no AVX2");
    return 0;
  }
  for (int level = 1; level <= static_cast<int>(pixel_shuffle_gelu_level()); ++level) {
    const auto with = static_cast<SimdLevel>(level);
    check(1, 1, 1, {1, 1, 1}, {1, 1, 1}, with);
    check(1, 1, 1, {1, 3, 2}, {1, 0, 0}, with);
    check(3, 33, 40, {3, 33, 40}, {3, 33, 40}, with);
    check(2, 17, 50, {2, 18, 51}, {2, 20, 50}, with);
    check(2, 5, 7, {2, 5, 9}, {2, 0, 0}, with);
    check(1, 2, 130, {1, 40, 130}, {1, 2, 131}, with);
  }
  std::puts("loss: ok");
  return 0;
}
