// Matrices whose singular values are taken near 1, by steps of Newton and Schulz with a quintic, as the optimiser Muon takes
// them; what hflfnerv/train/muon.py defines. In float32, as Gram matrices: a step multiplies X by a polynomial of X X^T, all of
// these commute, and their product is found from the first X X^T alone. Each product of that is symmetric, and only a half of
// it is computed.
//
// Sums are in an order that depends on the shape alone; results do not depend on the number of threads.
#pragma once

#include <cstdint>

#include "cpu.h"
#include "float_types.h"

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

// The same in bfloat16, where amx_unavailable() is null: products of rounded factors, sums in float32. Steps are taken one
// after the other, for the errors of the polynomials' product would be those of bfloat16 times a^8.
struct OrthogonaliseBFloat16 {
  std::int64_t rows, columns;
  const BFloat16* x;
  BFloat16* y;
};
void orthogonalise_bfloat16(const OrthogonaliseBFloat16* matrices, std::int64_t count, const Quintic& quintic, int threads);

}  // namespace hflfnerv
