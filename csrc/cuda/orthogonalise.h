// The steps of Newton and Schulz for many small matrices at once.
#pragma once

#include <cstdint>

namespace hflfnerv {

constexpr int kMostMatrices = 64;  // of one call
constexpr int kMostMatrixRows = 128;

struct MatrixCuda {
  const float* x;
  float* y;           // laid out as x
  int rows, columns;  // at least 1, at most kMostMatrixRows rows; of a tall matrix the columns are taken for rows
  int row, column;    // elements from one to the next
};

// Y = X / |X|, then `steps` times Y <- a Y + (b Y Yᵀ + c (Y Yᵀ)²) Y.
struct OrthogonaliseCuda {
  int count, steps;  // at least 1
  float a, b, c;
  MatrixCuda matrix[kMostMatrices];
  float* scratch;  // aligned to 16 bytes
};

// How many elements of scratch it takes.
std::int64_t orthogonalise_cuda_scratch(const OrthogonaliseCuda& call);

// Returns null, or what went wrong in words. The device becomes the current one.
const char* orthogonalise_cuda(const OrthogonaliseCuda& call, int device, void* stream);

}  // namespace hflfnerv
