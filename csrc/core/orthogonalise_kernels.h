// What orthogonalise.cpp hands to the code compiled for one instruction set.
#pragma once

#include <cstdint>

#include "orthogonalise.h"

namespace hflfnerv {

// c = a b. Rows of c, and of a, are whole blocks, and rows of b and c whole vectors of all chunks.
struct MatrixProduct {
  const float* a;
  std::int64_t a_row, a_inner;  // strides
  const float* b;
  std::int64_t b_row;
  float* c;
  std::int64_t c_row;
  std::int64_t rows, inner;
  bool symmetric;  // then only what is on and above the diagonal is wanted
};

struct OrthogonaliseKernels {
  std::int64_t rows, columns;  // of a block of rows, and of a chunk of columns
  // Chunks [begin, end) of columns.
  void (*multiply)(const MatrixProduct&, std::int64_t begin, std::int64_t end);
};

const OrthogonaliseKernels& orthogonalise_kernels_avx2();
const OrthogonaliseKernels& orthogonalise_kernels_avx512();

}  // namespace hflfnerv
