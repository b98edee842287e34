// What pixel_shuffle_gelu.cpp hands to the code compiled for one instruction set.
#pragma once

#include "gelu_table.h"
#include "pixel_shuffle_gelu.h"

namespace hflfnerv {

constexpr std::int64_t kBufferElements = 2048;  // of a piece of a row that stays in the first cache
constexpr std::int64_t kItemElements = 1 << 14;
constexpr std::int64_t kMaxItemRows = 8;

// One call, cut into items that can run in any order.
struct PixelShuffleTask {
  PixelShuffleShape shape;
  FloatType type;
  const GeluTable* table;
  const void* x;
  const float* bias;  // of all channels of x, zeros where there is none
  bool biased;        // whether there is one
  const void* dy;     // backward only
  void* out;          // y or dx
  double* sums;       // backward only: item_sums() of each item, or null

  // Rows of x of an item, of one plane (contiguous) or of all channels (channels-last).
  std::int64_t item_rows() const {
    if (!shape.channels_last) return kMaxItemRows;
    const std::int64_t rows = kItemElements / (shape.width * shape.in_channels());
    return rows < 1 ? 1 : rows < kMaxItemRows ? rows : kMaxItemRows;
  }
  std::int64_t row_blocks() const { return (shape.height + item_rows() - 1) / item_rows(); }
  std::int64_t items() const { return shape.batch * (shape.channels_last ? 1 : shape.channels) * row_blocks(); }
  std::int64_t item_sums() const { return shape.channels_last ? shape.in_channels() : shape.r * shape.r; }
  // Pixels (channels-last) or columns (contiguous) handled at once where the general code runs.
  std::int64_t piece() const {
    // Columns in whole vectors.
    const std::int64_t most = shape.channels_last ? kBufferElements / shape.in_channels() : kBufferElements / shape.r / 16 * 16;
    const std::int64_t least = shape.channels_last ? 1 : 16;
    return most < least ? least : (most < shape.width ? most : shape.width);
  }
  // Rows of a plane handled at once where the general code runs and as many fit a piece.
  std::int64_t rows_at_once() const {
    const std::int64_t columns = (shape.width + 15) / 16 * 16, rows = kBufferElements / shape.r / columns;
    return shape.channels_last || rows < 1 ? 1 : rows < kMaxItemRows ? rows : kMaxItemRows;
  }
  // What belongs to a piece, and vectors behind each of its rows: whole cache lines.
  std::int64_t piece_floats() const {
    const std::int64_t columns = rows_at_once() * ((piece() + 15) / 16 * 16);
    return (columns * (shape.channels_last ? shape.in_channels() : shape.r) + (shape.r + 4) * 16 + 15) / 16 * 16;
  }
  // Floats of scratch that each thread needs: elements, biases and sums of a piece.
  std::int64_t scratch_floats() const { return 3 * piece_floats(); }
};

void pixel_shuffle_gelu_fwd_avx2(const PixelShuffleTask& task, std::int64_t begin, std::int64_t end, float* scratch);
void pixel_shuffle_gelu_bwd_avx2(const PixelShuffleTask& task, std::int64_t begin, std::int64_t end, float* scratch);
void pixel_shuffle_gelu_fwd_avx512(const PixelShuffleTask& task, std::int64_t begin, std::int64_t end, float* scratch);
void pixel_shuffle_gelu_bwd_avx512(const PixelShuffleTask& task, std::int64_t begin, std::int64_t end, float* scratch);

}  // namespace hflfnerv
