// Tiles of images: where they are read, and where their results go. Included behind the Simd of one instruction set.
#pragma once

#include <cstdint>
#include <cstring>

#include "conv_pixel_shuffle_gelu_winograd_kernels.h"

namespace hflfnerv {
namespace {

template <class T>
struct Images {
  const T* data;
  std::int64_t batch, height, width, channels;
};

// A square of pixels: that at (i, j) begins at p + i * row + j * pixel.
template <class T>
struct Window {
  const T* p;
  std::int64_t row, pixel;
};

// `count` channels from `first` on of the square of `size` at (y, x), zero outside of the image. What lies behind an
// image's last channel is another pixel, which is read only where there is one: else the square is copied.
template <class T>
inline Window<T> window(const Images<T>& images, std::int64_t image, std::int64_t y, std::int64_t x, std::int64_t size,
                        std::int64_t first, std::int64_t count, T* copy) {
  const std::int64_t row = images.width * images.channels;
  const T* const origin = images.data + image * images.height * row;
  if (y >= 0 && x >= 0 && y + size <= images.height && x + size <= images.width) {
    const std::int64_t last = (y + size - 1) * row + (x + size - 1) * images.channels + first;
    if (last + count <= (images.batch - image) * images.height * row) {
      return {origin + y * row + x * images.channels + first, row, images.channels};
    }
  }
  const std::int64_t real = count < images.channels - first ? count : images.channels - first;
  std::memset(copy, 0, static_cast<std::size_t>(size * size * count) * sizeof(T));
  for (std::int64_t i = y < 0 ? -y : 0; i < size && y + i < images.height; ++i) {
    for (std::int64_t j = x < 0 ? -x : 0; j < size && x + j < images.width; ++j) {
      const T* const from = origin + (y + i) * row + (x + j) * images.channels + first;
      std::memcpy(copy + (i * size + j) * count, from, static_cast<std::size_t>(real) * sizeof(T));
    }
  }
  return {copy, size * count, count};
}

struct Tile {
  std::int64_t image, row, column;  // of its first result
};

inline Tile tile_of(const WinogradPlan& plan, std::int64_t tile) {
  const std::int64_t columns = plan.tile_columns(), rows = plan.tile_rows();
  return {tile / columns / rows, tile / columns % rows * plan.outputs(), tile % columns * plan.outputs()};
}

// Stores the results of a tile for one vector of output channels: row(i, y) makes kSize vectors, those of its row i.
template <class T, int kSize, class Row>
inline __attribute__((always_inline)) void store_tile(const WinogradPlan& plan, const Tile& tile, const WinogradOutput& out,
                                                      std::int64_t vector, const Simd::Gelu* gelu, const Row& row) {
  using F = Simd::F;
  const std::int64_t rows_left = plan.height - tile.row, columns_left = plan.width - tile.column;
  const int rows = rows_left < kSize ? static_cast<int>(rows_left) : kSize;
  const int columns = columns_left < kSize ? static_cast<int>(columns_left) : kSize;
  const std::int64_t first = vector * Simd::kLanes, left = plan.out_channels - first;
  const F bias = out.bias != nullptr ? Simd::load(out.bias + first) : Simd::zero();
  const WinogradStore* const begin = out.stores + out.first_store[vector];
  const WinogradStore* const end = out.stores + out.first_store[vector + 1];
  for (int i = 0; i < rows; ++i) {
    F y[kSize];
    row(i, y);
    for (F& value : y) value = Simd::add(value, bias);
    T* const to = static_cast<T*>(out.y) + tile.image * out.image + (tile.row + i - out.first_row) * out.row +
                  tile.column * out.pixel;
    if (out.z != nullptr) {
      const std::int64_t at = tile.image * plan.height + tile.row + i;
      T* z = static_cast<T*>(out.z) + (at * plan.width + tile.column) * plan.out_channels + first;
      for (int j = 0; j < columns; ++j, z += plan.out_channels) {
        if (left >= Simd::kLanes) {
          Simd::store(z, y[j]);
        } else {
          Simd::store_lanes(z, y[j], 0, static_cast<int>(left));
        }
      }
    }
    if (gelu != nullptr) {
      for (F& value : y) value = (*gelu)(value);
    }
    for (const WinogradStore* store = begin; store != end; ++store) {
      T* p = to + store->offset;
      if (store->last - store->first == Simd::kLanes) {
        for (int j = 0; j < columns; ++j, p += out.pixel) Simd::store(p, y[j]);
      } else {
        for (int j = 0; j < columns; ++j, p += out.pixel) Simd::store_lanes(p, y[j], store->first, store->last);
      }
    }
  }
}

}  // namespace
}  // namespace hflfnerv
