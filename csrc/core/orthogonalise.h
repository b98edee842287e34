// Matrices whose singular values are taken near 1, by steps of Newton and Schulz with a quintic, as the optimiser Muon takes
// them; what hflfnerv/train/muon.py defines. In float32, as Gram matrices: a step multiplies X by a polynomial of X X^T, all of
// these commute, and their product is found from the first X X^T alone. Each product of that is symmetric, and only a half of
// it is computed.
//
// Sums are in an order that depends on the shape alone; results do not depend on the number of threads.
#pragma once

#include <cstdint>

#include "cpu.h"

namespace hflfnerv {

// Row-major, without gaps, at least one row and one column; y has the shape of x.
struct OrthogonaliseMatrix {
  std::int64_t rows, columns;
  const float* x;
  float* y;
};

// X <- (a + b X X^T + c (X X^T)^2) X, `steps` times, from X = x / |x|.
struct Quintic {
  float a, b, c;
  int steps;
};

// For each of `count` matrices.
void orthogonalise(const OrthogonaliseMatrix* matrices, std::int64_t count, const Quintic& quintic, int threads,
                   SimdLevel level);

}  // namespace hflfnerv
