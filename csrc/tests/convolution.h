// What the tests of convolutions with three gradients share: random tensors, results of which nothing may be left out, and the
// error that a sum may have. It knows nothing of csrc/core.
#pragma once

#include <cmath>
#include <cstdint>
#include <random>
#include <vector>

#include "tests/check.h"

using Floats = std::vector<float>;
using Doubles = std::vector<double>;

inline Floats random_floats(std::int64_t count) {
  static std::mt19937 generator(1);
  std::normal_distribution<float> normal(0, 1);
  Floats values(static_cast<std::size_t>(count));
  for (float& value : values) value = normal(generator);
  return values;
}

// Of a forward pass and its gradients. What a kernel forgets to write stays NaN.
struct ConvolutionResults {
  ConvolutionResults(std::size_t outputs, std::size_t inputs, std::size_t weights, std::size_t biases)
      : y(outputs, std::nanf("")), dx(inputs, std::nanf("")), dweight(weights, std::nanf("")), dbias(biases, std::nanf("")) {}
  Floats y, dx, dweight, dbias;
  bool operator==(const ConvolutionResults& o) const {
    return y == o.y && dx == o.dx && dweight == o.dweight && dbias == o.dbias;
  }
};

// Sums in double, with those of the absolute terms.
struct Sums {
  explicit Sums(std::size_t count) : values(count), sizes(count) {}
  void add(std::size_t at, double term) {
    values[at] += term;
    sizes[at] += std::abs(term);
  }
  // Each result within the error of a sum of `terms` in any order, each of them rounded to float.
  void check(const Floats& actual, std::int64_t terms) const {
    CHECK(actual.size() == values.size());
    for (std::size_t i = 0; i < actual.size(); ++i) {
      CHECK(std::abs(actual[i] - values[i]) <= static_cast<double>(terms + 1) * 0x1p-24 * sizes[i]);
    }
  }
  Doubles values, sizes;
};
