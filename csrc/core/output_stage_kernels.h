// What output_stage.cpp and frame_decoder.cpp hand to the code compiled for one instruction set.
//
// The pixels under a kernel lie one after the other in channels-last memory and are the inner dimension. With AMX several
// pixels of a row are computed as one row of a tile: their colours are its columns, and the matrix is banded. In float32 the
// lanes of vectors are of the inner dimension, and added up at the end.
#pragma once

#include "gelu_table.h"
#include "output_stage.h"
#include "planes.h"

namespace hflfnerv {

constexpr std::int64_t kColours = 3;
constexpr std::int64_t kTaps = 3;  // rows and columns of the kernel
constexpr std::int64_t kBiasLanes = 32;  // in which the three colours' biases repeat

// One feature map and its weights.
struct OutputStream {
  const void* x;          // the pixel left of column 0, in row 0
  std::int64_t row;       // elements from row to row
  std::int64_t pixel;     // elements from pixel to pixel
  std::int64_t top, height;  // the first row, and the one behind the last; what lies above and below is zero
  std::int64_t ring;         // rows of memory: row y is at y % ring
  const void* zeros;      // a row of zeros
  const void* weights;    // the matrix of each kernel row
  std::int64_t steps;     // of the inner dimension of a kernel row: vectors, or AMX steps
  int group;
};

// Rows [begin, end) of the frame, and of each the first `width` pixels; `out` is row 0, and `out_width` pixels lie between rows.
struct OutputRows {
  const OutputStream* streams;
  int count, groups;
  const float* scales;    // of the groups
  const float* biases;    // kBiasLanes for each group
  float offset;
  const GeluTable* table;  // tanh_table()
  std::int64_t begin, end, width, out_width;
  void* out;
  bool bytes;
};

// What computes a frame's rows: `streams[i].x` and so on are of type float.
void output_rows_avx2(const OutputRows& rows);
void output_rows_avx512(const OutputRows& rows);
void output_rows(const OutputRows& rows, SimdLevel level);  // by the one of a level

// For bfloat16 streams; `scratch` has output_scratch_floats(groups), aligned to cache lines.
constexpr std::int64_t kPixelsAmx = 5;
void output_rows_amx(const OutputRows& rows, float* scratch);
inline std::int64_t output_scratch_floats(int groups) { return 2 * groups * 64 * kTile; }

}  // namespace hflfnerv
