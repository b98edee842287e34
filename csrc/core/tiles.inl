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

// Where the results of a tile, kSize rows and columns of them, go, for one vector of output channels. It holds copies: what is
// stored could be what a reference refers to, as far as a compiler knows.
template <class T, int kSize>
class TileStores {
 public:
  inline __attribute__((always_inline)) TileStores(const WinogradPlan& plan, const Tile& tile, const WinogradOutput& out,
                                                   std::int64_t vector, const Simd::Gelu* gelu)
      : rows(static_cast<int>(plan.height - tile.row < kSize ? plan.height - tile.row : kSize)),
        columns_(static_cast<int>(plan.width - tile.column < kSize ? plan.width - tile.column : kSize)),
        y_(static_cast<T*>(out.y) + tile.image * out.image + (tile.row - out.first_row) * out.row + tile.column * out.pixel),
        row_(out.row),
        pixel_(out.pixel),
        channels_(plan.out_channels),
        left_(channels_ - vector * Simd::kLanes),
        z_row_(plan.width * channels_),
        gelu_(gelu),
        bias_(out.bias != nullptr ? Simd::load(out.bias + vector * Simd::kLanes) : Simd::zero()),
        begin_(out.stores + out.first_store[vector]),
        end_(out.stores + out.first_store[vector + 1]) {
    if (out.z != nullptr) {
      z_ = static_cast<T*>(out.z) + ((tile.image * plan.height + tile.row) * plan.width + tile.column) * channels_ +
           vector * Simd::kLanes;
    }
  }

  const int rows;  // that the image has

  // Row i, kSize vectors, which become what is stored.
  inline __attribute__((always_inline)) void row(int i, Simd::F* y) const {
    for (int j = 0; j < kSize; ++j) y[j] = Simd::add(y[j], bias_);
    if (z_ != nullptr) store(z_ + i * z_row_, channels_, 0, left_ < Simd::kLanes ? static_cast<int>(left_) : Simd::kLanes, y);
    if (gelu_ != nullptr) {
      for (int j = 0; j < kSize; ++j) y[j] = (*gelu_)(y[j]);
    }
    for (const WinogradStore* at = begin_; at != end_; ++at) store(y_ + i * row_ + at->offset, pixel_, at->first, at->last, y);
  }

 private:
  inline __attribute__((always_inline)) void store(T* p, std::int64_t pixel, int first, int last, const Simd::F* y) const {
    if (last - first == Simd::kLanes) {
      for (int j = 0; j < columns_; ++j, p += pixel) Simd::store(p, y[j]);
    } else {
      for (int j = 0; j < columns_; ++j, p += pixel) Simd::store_lanes(p, y[j], first, last);
    }
  }

  const int columns_;
  T* const y_;
  const std::int64_t row_, pixel_, channels_, left_, z_row_;
  T* z_ = nullptr;
  const Simd::Gelu* const gelu_;
  const Simd::F bias_;
  const WinogradStore *const begin_, *const end_;
};

}  // namespace
}  // namespace hflfnerv
