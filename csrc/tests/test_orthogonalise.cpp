// Tests of orthogonalise in csrc/core without Python, meant to be built with -fsanitize=address,undefined: against the steps
// of the definition in double, at sizes that no vector or block divides, and on several threads.
#include <array>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <random>
#include <vector>

#include "core/orthogonalise.h"
#include "core/pixel_shuffle_gelu.h"
#include "tests/check.h"

namespace {

using namespace hflfnerv;
using Floats = std::vector<float>;
using Doubles = std::vector<double>;

constexpr Quintic kQuintic{3.4445f, -4.7750f, 2.0315f, 5};
std::mt19937 generator(1);

// a b, or a b^T.
Doubles multiply(const Doubles& a, std::int64_t rows, std::int64_t inner, const Doubles& b, std::int64_t columns,
                 bool transposed) {
  Doubles c(static_cast<std::size_t>(rows * columns));
  for (std::int64_t i = 0; i < rows; ++i) {
    for (std::int64_t j = 0; j < columns; ++j) {
      for (std::int64_t k = 0; k < inner; ++k) {
        const std::int64_t of_b = transposed ? j * inner + k : k * columns + j;
        c[static_cast<std::size_t>(i * columns + j)] +=
            a[static_cast<std::size_t>(i * inner + k)] * b[static_cast<std::size_t>(of_b)];
      }
    }
  }
  return c;
}

Doubles steps(const Floats& start, std::int64_t rows, std::int64_t columns) {
  double squares = 0;
  for (const float value : start) squares += static_cast<double>(value) * static_cast<double>(value);
  Doubles x(start.begin(), start.end());
  for (double& value : x) value /= std::sqrt(squares);
  for (int step = 0; step < kQuintic.steps; ++step) {
    const Doubles gram = multiply(x, rows, columns, x, rows, true);
    Doubles factor = multiply(gram, rows, rows, gram, rows, false);
    for (std::size_t i = 0; i < factor.size(); ++i) {
      factor[i] = static_cast<double>(kQuintic.b) * gram[i] + static_cast<double>(kQuintic.c) * factor[i];
    }
    const Doubles added = multiply(factor, rows, rows, x, columns, false);
    for (std::size_t i = 0; i < x.size(); ++i) x[i] = static_cast<double>(kQuintic.a) * x[i] + added[i];
  }
  return x;
}

void check(const std::vector<std::array<std::int64_t, 2>>& shapes, SimdLevel level) {
  std::normal_distribution<float> normal(0, 3);
  std::vector<Floats> xs, ys;
  for (const auto& [rows, columns] : shapes) {
    xs.emplace_back(static_cast<std::size_t>(rows * columns));
    for (float& value : xs.back()) value = normal(generator);
  }
  const auto run = [&](int threads) {
    std::vector<Floats> results;
    std::vector<OrthogonaliseMatrix> matrices;
    for (const Floats& x : xs) results.emplace_back(x.size(), std::nanf(""));
    for (std::size_t i = 0; i < xs.size(); ++i) {
      matrices.push_back({shapes[i][0], shapes[i][1], xs[i].data(), results[i].data()});
    }
    orthogonalise(matrices.data(), static_cast<std::int64_t>(matrices.size()), kQuintic, threads, level);
    return results;
  };
  const std::vector<Floats> results = run(1);
  CHECK(results == run(3));
  for (std::size_t i = 0; i < xs.size(); ++i) {
    const Doubles expected = steps(xs[i], shapes[i][0], shapes[i][1]);
    double error = 0, size = 0;
    for (std::size_t k = 0; k < expected.size(); ++k) {
      error += std::pow(static_cast<double>(results[i][k]) - expected[k], 2);
      size += std::pow(expected[k], 2);
    }
    // The bound of tests/train/test_muon.py.
    CHECK(std::sqrt(error) <= 2 * std::pow(static_cast<double>(kQuintic.a), 8) * 0x1p-23 * std::sqrt(size));
  }
}

}  // namespace

int main() {
  if (pixel_shuffle_gelu_level() == SimdLevel::scalar) {
    std::puts("orthogonalise: this machine has no AVX2");
    return 0;
  }
  for (int level = 1; level <= static_cast<int>(pixel_shuffle_gelu_level()); ++level) {
    for (const std::array<std::int64_t, 2> shape : {std::array<std::int64_t, 2>{1, 1}, {1, 9}, {9, 1}, {16, 16}, {17, 16},
                                                    {5, 300}, {33, 31}, {48, 49}, {140, 131}}) {
      check({shape}, static_cast<SimdLevel>(level));
    }
    check({}, static_cast<SimdLevel>(level));
    check({{3, 40}, {129, 128}, {64, 32}, {7, 7}, {40, 3}}, static_cast<SimdLevel>(level));
  }
  std::puts("orthogonalise: ok");
  return 0;
}
