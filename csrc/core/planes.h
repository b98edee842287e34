// bfloat16 activations as the AMX kernels read them: rows of pixels with zeros around them, channels in groups of 32, each
// group a plane in which a pixel is a cache line, and the channels beyond a multiple of 32 in a narrow plane of their own.
#pragma once

#include <cstdint>

#include "float_types.h"

namespace hflfnerv {

constexpr std::int64_t kTile = 16;  // rows and columns of a tile of products
constexpr std::int64_t kStep = 32;  // bfloat16 elements in a row of a tile

struct PlanesLayout {
  std::int64_t groups = 0, rest = 0;  // of channels
  std::int64_t columns = 0;           // of memory, with those around the image
  std::int64_t plane_row() const { return groups * columns * kStep; }  // elements of a row: group, column, channel
  std::int64_t rest_row() const { return columns * rest; }
};

// Where rows begin: (row, column) of a pixel is at plane + row * plane_row() + column * kStep, and likewise in rest.
struct PlanesPointer {
  const BFloat16* plane = nullptr;
  const BFloat16* rest = nullptr;
};

// Memory that a gathering load may touch, masked out, before and behind a rest.
constexpr std::int64_t kRestMargin = 64;

}  // namespace hflfnerv
