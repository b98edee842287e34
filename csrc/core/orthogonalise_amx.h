// Orthogonalisation in bfloat16 on AMX: what orthogonalise.cpp hands to the code compiled for it.
//
// Steps are taken one after the other, X <- a X + (b G + c G^2) X with G = X X^T and X's shorter side as rows. X, G and the
// polynomial of it are rounded, and each is the same number wherever it stands: the error of one with a singular value near 1
// then counts by the quintic's slope there, 0.7, which it would not if some places had the number before it was rounded.
//
// Matrices are divided into blocks of 32 x 32, and these are kept in the forms that tiles have: rows, pairs of neighbours of
// which each column has one, and pairs of rows. G is symmetric, and so is its polynomial: of both only the blocks on and below
// the diagonal are computed.
#pragma once

#include <cstdint>

#include "orthogonalise.h"
#include "planes.h"

namespace hflfnerv {

constexpr std::int64_t kBlock = 32;
constexpr std::int64_t kBlockElements = kBlock * kBlock;

struct AmxOrthogonalisation {
  OrthogonaliseBFloat16 matrix;
  Quintic quintic;
  float scale;          // by which x is multiplied first
  BFloat16* x_rows;     // x's blocks, [rows of blocks][blocks of a row], as rows, as pairs of neighbours,
  BFloat16* x_columns;
  BFloat16* x_pairs[2]; // and as pairs of rows: those before and after a step
  BFloat16* gram_rows;
  BFloat16* gram_columns;
  BFloat16* factor_rows;

  std::int64_t shorter() const { return matrix.rows < matrix.columns ? matrix.rows : matrix.columns; }
  std::int64_t longer() const { return matrix.rows < matrix.columns ? matrix.columns : matrix.rows; }
  bool tall() const { return matrix.rows > matrix.columns; }
  std::int64_t rows() const { return (shorter() + kBlock - 1) / kBlock; }     // of blocks
  std::int64_t columns() const { return (longer() + kBlock - 1) / kBlock; }
  std::int64_t x_elements() const { return rows() * columns() * kBlockElements; }
  std::int64_t gram_elements() const { return rows() * rows() * kBlockElements; }
};

// Rows of blocks that share what they are multiplied by while it is in the caches: every `step`-th from `first` on.
struct BlockRows {
  std::int64_t first, step;
};

// With all rows of what was called before done; x_pairs[step % 2] are read in a step, and the last one writes y.
void orthogonalise_read_amx(const AmxOrthogonalisation& task, const BlockRows& rows);
void orthogonalise_gram_amx(const AmxOrthogonalisation& task, const BlockRows& rows);
void orthogonalise_factor_amx(const AmxOrthogonalisation& task, const BlockRows& rows);
void orthogonalise_update_amx(const AmxOrthogonalisation& task, int step, const BlockRows& rows);

}  // namespace hflfnerv
