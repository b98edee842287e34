// What conv_pixel_shuffle_gelu.cpp hands to the code compiled for AMX.
//
// The matrix product has pixels as rows, output channels as columns, and as inner dimension taps times input channels, 32
// at a time: a step. Input channels are split into groups of 32, whose planes lie in memory so that 16 pixels are 16 cache
// lines, one tap after the other by moving the address; and the rest, which is gathered for each pixel, all taps together,
// so that it takes few steps. Columns are ordered as the shuffle needs them: (i, j, c) for output row i and column j.
#pragma once

#include "conv_pixel_shuffle_gelu.h"
#include "gelu_table.h"

namespace hflfnerv {

constexpr std::int64_t kTile = 16;           // rows and columns of a tile
constexpr std::int64_t kStep = 32;           // elements of the inner dimension in a tile
constexpr std::int64_t kBlockTiles = 4;      // tiles of pixels that share one tile of weights
constexpr std::int64_t kBandBytes = 1 << 19;  // of converted input that stays in the second cache

// The part of a column tile that goes to one row of y: y[pixel + offset + lane] for the lanes of the mask.
struct ConvStore {
  std::uint16_t mask;
  std::int64_t offset;
};

struct ConvTask {
  ConvPixelShuffleShape shape;
  const BFloat16* x;
  const BFloat16* weight;
  const float* bias;  // in the order of columns, 0 where there is no channel
  const GeluTable* table;
  BFloat16* y;
  BFloat16* packed;           // weights: column tile, step, pair of inner elements, column, element of the pair
  const std::int64_t* steps;  // of the groups: where the tile of a step begins, in elements after the tile's first pixel
  const ConvStore* stores;    // of all column tiles
  const int* first_store;     // of each column tile, and the end of the last

  std::int64_t groups, rest;  // of input channels
  std::int64_t taps() const { return shape.kernel_h * shape.kernel_w; }
  std::int64_t group_steps() const { return groups * taps(); }
  std::int64_t rest_steps() const { return (rest * taps() + kStep - 1) / kStep; }
  std::int64_t column_tiles() const { return (shape.out_channels() + kTile - 1) / kTile; }
  std::int64_t row_tiles() const { return (shape.out_width() + kTile - 1) / kTile; }
  std::int64_t packed_elements() const {
    return column_tiles() * (group_steps() + rest_steps()) * kTile * kStep;
  }

  // A band: rows of y / r that are computed together, and the rows of input that they need, padded.
  std::int64_t padded_width() const { return row_tiles() * kTile + shape.kernel_w - 1; }
  std::int64_t plane_row() const { return groups * padded_width() * kStep; }  // elements of a row, all groups
  std::int64_t rest_row() const { return padded_width() * rest; }
  std::int64_t band_rows() const {
    const std::int64_t fit = kBandBytes / (2 * (plane_row() + rest_row())) - (shape.kernel_h - 1);
    return fit < 1 ? 1 : (fit < shape.out_height() ? fit : shape.out_height());
  }
  // Elements of each thread's memory: planes, rest, gathered rest, results of two column tiles (floats).
  std::int64_t planes_elements() const { return (band_rows() + shape.kernel_h - 1) * plane_row(); }
  std::int64_t rest_elements() const { return ((band_rows() + shape.kernel_h - 1) * rest_row() + 31) / 32 * 32; }
  std::int64_t gathered_elements() const { return kBlockTiles * kTile * rest_steps() * kStep; }
  std::int64_t memory_elements() const {
    return planes_elements() + rest_elements() + gathered_elements() + 2 * 2 * kBlockTiles * kTile * kTile;
  }
};

// Fills `packed` for the column tiles [begin, end).
void conv_pack_weights_amx(const ConvTask& task, std::int64_t begin, std::int64_t end);

// Computes the rows [begin, end) of all images' rows of y / r. `memory` is aligned to cache lines.
void conv_pixel_shuffle_gelu_rows_amx(const ConvTask& task, std::int64_t begin, std::int64_t end, BFloat16* memory);

}  // namespace hflfnerv
