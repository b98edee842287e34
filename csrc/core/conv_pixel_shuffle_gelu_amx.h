// The upsampling block on AMX: what conv_kernel.cpp hands to the code compiled for it.
//
// The matrix product has pixels as rows, output channels as columns, and as inner dimension taps times input channels, 32
// at a time: a step. Input channels come in groups of 32, whose planes lie in memory so that 16 pixels are 16 cache lines,
// one tap after the other by moving the address; and the rest, which is gathered for each pixel, all taps together, so
// that it takes few steps. Columns are in the order in which the results lie in memory.
#pragma once

#include "gelu_table.h"
#include "planes.h"

namespace hflfnerv {

constexpr std::int64_t kBlockTiles = 4;  // tiles of pixels that share one tile of weights

// The part of a column tile that goes to one place: pixel + offset + lane for the lanes of the mask.
struct ConvStore {
  std::uint16_t mask;
  std::int64_t offset;
};

// A piece of a gathered step: for the lanes of the mask, row ky of the rest from `shift` elements after the pixel on.
struct ConvGather {
  std::uint32_t mask;
  std::int64_t ky, shift;
};

// How results lie in memory: channel c of a pixel at c / group * group_stride + c % group elements, but the last `rest`
// channels in a memory of their own.
struct ConvOutputLayout {
  std::int64_t plane_row, plane_pixel, group, group_stride, rest_row, rest;
};

// A convolution made ready. Pointers are to what its ConvKernel keeps.
struct ConvPlan {
  std::int64_t in_channels, out_channels, r, kernel_h, kernel_w;
  PlanesLayout in;
  ConvOutputLayout out;
  const GeluTable* table;           // null for none
  std::int64_t tiles, plane_tiles;  // of columns: all, and those before the rest's
  const std::int32_t* column;       // output channel of each column, -1 where there is none
  const std::int64_t* steps;        // of the groups: where the tile of a step begins, after the tile's first pixel
  const ConvGather* gathers;        // of all rest steps
  const int* first_gather;          // of each rest step, and the end of the last
  const float* bias;                // of the columns
  const ConvStore* stores;          // of all column tiles
  const int* first_store;           // of each column tile, and the end of the last
  BFloat16* packed;                 // weights: column tile, step, pair of inner elements, column, element of the pair

  std::int64_t taps() const { return kernel_h * kernel_w; }
  std::int64_t group_steps() const { return in.groups * taps(); }
  std::int64_t rest_steps() const { return (in.rest * taps() + kStep - 1) / kStep; }
  std::int64_t tile_elements() const { return (group_steps() + rest_steps()) * kTile * kStep; }  // weights of a column tile
  // Two column tiles of products (floats), and the gathered rest.
  std::int64_t scratch_bytes() const {
    return 2 * kBlockTiles * kTile * kTile * 4 + rest_steps() * kBlockTiles * kTile * kStep * 2;
  }
};

// Where results go: pixel (h r, w r) of y begins at plane + h % ring * r * plane_row + w r * plane_pixel, and in rest
// likewise. What GELU is applied to goes to z, unless that is null: that of pixel (h, w) to h * z_row + w * out_channels, in
// the order of the columns.
struct ConvOutput {
  BFloat16* plane;
  BFloat16* rest;
  std::int64_t ring;
  BFloat16* z = nullptr;
  std::int64_t z_row = 0;
};

// Rows [begin, end) of y / r and columns [0, columns), column tiles [first_tile, last_tile). `in` points to what lies under
// the kernel's first tap at row 0, column 0.
struct ConvRows {
  PlanesPointer in;
  ConvOutput out;
  std::int64_t begin, end, columns, first_tile, last_tile;
};

// `scratch` is aligned to cache lines.
void conv_rows_amx(const ConvPlan& plan, const ConvRows& rows, void* scratch);

// Where the elements of a weight are.
struct ConvWeight {
  const BFloat16* data;
  // Of a convolution whose output channels r shuffles, channels-last, in whose data gradient they are input channels in the
  // order (row of the shuffle, column of the shuffle, c), and input channels output channels; 0 for the weight of the
  // convolution itself.
  std::int64_t gradient_r = 0;
};

// Fills plan.packed for the column tiles [begin, end).
void conv_pack_amx(const ConvPlan& plan, const ConvWeight& weight, std::int64_t begin, std::int64_t end);

// Rows of a channels-last image: `count` of them from `row` on, and of each the columns from `column` on. What lies outside
// of the image is zero.
struct ImageRows {
  const BFloat16* x;
  std::int64_t height, width, channels, row, count, column;
};

void convert_rows_amx(const ImageRows& image, const PlanesLayout& layout, BFloat16* plane, BFloat16* rest);

}  // namespace hflfnerv
