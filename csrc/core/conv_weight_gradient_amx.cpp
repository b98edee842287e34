#include "conv_weight_gradient_amx.h"

#include <cstring>

#include "amx.h"
#include "simd_avx512.h"

namespace hflfnerv {
namespace {

constexpr std::int64_t kChunk = 16;  // steps whose gradient stays in the first cache

// 32 pixels from column w of a row on, of up to 32 channels each, and zeros where there are none.
inline __attribute__((always_inline)) void load_pixels(const BFloat16* row, std::int64_t channels, std::int64_t w,
                                                       std::int64_t width, __mmask32 lanes, __m512i* v) {
  const BFloat16* const at = row + w * channels;
  if (w >= 0 && w + kStep <= width) {
#pragma GCC unroll 32
    for (int k = 0; k < 32; ++k) v[k] = _mm512_maskz_loadu_epi16(lanes, at + k * channels);
  } else {
#pragma GCC unroll 32
    for (int k = 0; k < 32; ++k) {
      const __mmask32 inside = w + k >= 0 && w + k < width ? lanes : 0;
      v[k] = _mm512_maskz_loadu_epi16(inside, at + k * channels);
    }
  }
}

class Worker {
 public:
  Worker(const WeightGradientPlan& plan, const WeightGradientItem& item, BFloat16* scratch)
      : plan_(plan),
        shape_(plan.shape),
        item_(item),
        dz_(scratch),
        pairs_(dz_ + plan.share * plan.gradient_stride()),
        rest_pairs_(pairs_ + 2 * plan.groups * plan.pairs_stride()),
        rest_(rest_pairs_ + plan.rest_tiles() * plan.gradient_stride()),
        first_tile_(item.index * plan.share),
        tiles_(smaller(plan.share, plan.row_tiles - first_tile_)) {}

  void run() {
    const std::int64_t image_bands = plan_.band_rows() * plan_.band_columns();
    for (std::int64_t index = item_.begin; index < item_.end; ++index) {
      const std::int64_t in_image = index % image_bands;
      Band band{index / image_bands, in_image / plan_.band_columns() * plan_.rows,
                in_image % plan_.band_columns() * plan_.columns};
      band.rows = smaller(plan_.rows, shape_.out_height() - band.row);
      band.columns = smaller(plan_.columns, shape_.out_width() - band.column);
      band.steps = (band.rows * plan_.pitch + kStep - 1) / kStep;
      put_gradient(band);
      put_pairs(band);
      if (plan_.rest > 0) put_rest(band);
      memory_barrier();
      multiply(band.steps);
      memory_barrier();
    }
  }

 private:
  struct Band {
    std::int64_t image, row, column;
    std::int64_t rows = 0, columns = 0, steps = 0;
  };

  // Row i of x under a band. One outside of the image has no columns.
  struct Row {
    const BFloat16* x;
    std::int64_t width;
  };
  Row row_of_x(const Band& band, std::int64_t i) const {
    const std::int64_t h = band.row + i - shape_.padding_h;
    if (h < 0 || h >= shape_.height) return {item_.x, 0};
    return {item_.x + (band.image * shape_.height + h) * shape_.width * shape_.in_channels, shape_.width};
  }

  // The gradient of the result, transposed, of the row tiles of this item.
  void put_gradient(const Band& band) const {
    const std::int64_t channels = shape_.out_channels, stride = plan_.gradient_stride(), pitch = plan_.pitch;
    const BFloat16* const corner =
        item_.dz + ((band.image * shape_.out_height() + band.row) * shape_.out_width() + band.column) * channels;
    std::int64_t i = 0, w = 0;  // of the first pixel of a step
    for (std::int64_t step = 0; step < band.steps; ++step) {
      for (std::int64_t tile = 0; tile < tiles_; tile += 2) {
        const std::int64_t n = (first_tile_ + tile) * kTile;
        const __mmask32 lanes = first_lanes(smaller(channels - n, (tiles_ - tile) * kTile));
        const BFloat16* const row = corner + i * shape_.out_width() * channels + n;
        __m512i v[32];
        if (w + kStep <= band.columns) {
          load_pixels(row, channels, w, band.columns, lanes, v);
        } else {
          const BFloat16* at = row;
          for (std::int64_t k = 0, r = i, c = w; k < kStep; ++k) {
            v[k] = _mm512_maskz_loadu_epi16(r < band.rows && c < band.columns ? lanes : 0, at + c * channels);
            if (++c < pitch) continue;
            c = 0;
            ++r;
            at += shape_.out_width() * channels;
          }
        }
        transpose_32(v);
        BFloat16* const to = dz_ + tile * stride + step * kTileElements;
        for (int k = 0; k < 16; ++k) _mm512_store_si512(to + k * kStep, v[k]);
        if (tile + 1 < tiles_) {
          for (int k = 0; k < 16; ++k) _mm512_store_si512(to + stride + k * kStep, v[16 + k]);
        }
      }
      for (w += kStep; w >= pitch; w -= pitch) ++i;
    }
  }

  // Pairs of pixels of x under a band that begin at even and at odd ones.
  void put_pairs(const Band& band) const {
    const std::int64_t channels = shape_.in_channels, stride = plan_.pairs_stride(), pitch = plan_.pitch;
    const std::int64_t first = band.column - shape_.padding_w;
    const Pairs pairs;
    for (std::int64_t i = 0; i < band.rows + shape_.kernel_h - 1; ++i) {
      const Row row = row_of_x(band, i);
      for (std::int64_t group = 0; group < plan_.groups; group += 2) {
        const std::int64_t c = group * kTile;
        const bool second = group + 1 < plan_.groups;
        const __mmask32 lanes = first_lanes(smaller(channels - c, (plan_.groups - group) * kTile));
        BFloat16* to = pairs_ + 2 * group * stride + i * pitch / 2 * kStep;
        const auto pixel = [&](std::int64_t p) {
          const std::int64_t w = first + p;
          return _mm512_maskz_loadu_epi16(w >= 0 && w < row.width ? lanes : 0, row.x + w * channels + c);
        };
        __m512i a = pixel(0);
        for (std::int64_t p = 0; p < pitch; p += 2, to += kStep) {
          const __m512i b = pixel(p + 1), next = pixel(p + 2);
          _mm512_store_si512(to, pairs.low(a, b));
          _mm512_store_si512(to + stride, pairs.low(b, next));
          if (second) {
            _mm512_store_si512(to + 2 * stride, pairs.high(a, b));
            _mm512_store_si512(to + 3 * stride, pairs.high(b, next));
          }
          a = next;
        }
      }
    }
  }

  // Pairs of pixels of the channels beyond a multiple of 16, for each tap.
  void put_rest(const Band& band) const {
    const std::int64_t channels = shape_.in_channels, stride = plan_.rest_stride(), pitch = plan_.pitch;
    const std::int64_t c = channels - plan_.rest;
    for (std::int64_t i = 0; i < band.rows + shape_.kernel_h - 1; ++i) {
      const Row row = row_of_x(band, i);
      for (std::int64_t p = 0; p < pitch; p += kStep) {
        __m512i v[32];
        load_pixels(row.x + c, channels, band.column - shape_.padding_w + p, row.width, first_lanes(plan_.rest), v);
        transpose_32(v);
        // What it writes behind the row is written again as the next one.
        for (std::int64_t k = 0; k < plan_.rest; ++k) _mm512_storeu_si512(rest_ + k * stride + i * pitch + p, v[k]);
      }
    }
    for (std::int64_t tile = 0; tile < plan_.rest_tiles(); ++tile) {
      const BFloat16* from[kTile] = {};
      for (std::int64_t k = 0; k < kTile; ++k) {
        const std::int64_t tap = (tile * kTile + k) / plan_.rest, channel = (tile * kTile + k) % plan_.rest;
        if (tap < shape_.taps()) from[k] = rest_ + channel * stride + tap / shape_.kernel_w * pitch + tap % shape_.kernel_w;
      }
      BFloat16* to = rest_pairs_ + tile * plan_.gradient_stride();
      for (std::int64_t step = 0; step < band.steps; ++step, to += kTileElements) {
        __m512 v[kTile];
#pragma GCC unroll 16
        for (int k = 0; k < kTile; ++k) {
          v[k] = from[k] == nullptr ? _mm512_setzero_ps() : _mm512_loadu_ps(reinterpret_cast<const float*>(from[k] + step * kStep));
        }
        Simd::transpose(v);
#pragma GCC unroll 16
        for (int k = 0; k < kTile; ++k) _mm512_store_ps(reinterpret_cast<float*>(to + k * kStep), v[k]);
      }
    }
  }

  const BFloat16* column_tile(std::int64_t tile) const {
    const std::int64_t whole = plan_.group_tiles();
    if (tile >= whole) return rest_pairs_ + (tile - whole) * plan_.gradient_stride();
    const WeightGradientColumns columns = plan_.columns_of(tile);
    return pairs_ + (2 * columns.group + columns.phase) * plan_.pairs_stride() + columns.pair * kStep;
  }

  void multiply(std::int64_t steps) const {
    const std::int64_t chunks = (steps + kChunk - 1) / kChunk;
    for (std::int64_t chunk = 0; chunk < chunks; ++chunk) {
      const std::int64_t begin = steps * chunk / chunks, count = steps * (chunk + 1) / chunks - begin;
      for (std::int64_t tile = 0; tile < tiles_; tile += 2) {
        if (tile + 1 < tiles_) {
          multiply<2>(tile, begin, count);
        } else {
          multiply<1>(tile, begin, count);
        }
      }
    }
  }

  template <int kRows>
  void multiply(std::int64_t tile, std::int64_t begin, std::int64_t count) const {
    const std::int64_t stride = plan_.gradient_stride(), column_tiles = plan_.column_tiles(), from = begin * kTileElements;
    const BFloat16* const dz = dz_ + tile * stride + from;
    float* sums = item_.sums + (first_tile_ + tile) * column_tiles * kProducts;
    std::int64_t column = 0;
    for (; column + 1 < column_tiles; column += 2, sums += 2 * kProducts) {
      add_block<kRows, 2>(dz, dz + stride, column_tile(column) + from, column_tile(column + 1) + from, count, sums,
                          sums + column_tiles * kProducts);
    }
    if (column < column_tiles) {
      add_block<kRows, 1>(dz, dz + stride, column_tile(column) + from, nullptr, count, sums, sums + column_tiles * kProducts);
    }
  }

  const WeightGradientPlan& plan_;
  const WeightGradientShape& shape_;
  const WeightGradientItem& item_;
  BFloat16 *const dz_, *const pairs_, *const rest_pairs_, *const rest_;
  const std::int64_t first_tile_, tiles_;
};

}  // namespace

void weight_gradient_amx(const WeightGradientPlan& plan, const WeightGradientItem& item, BFloat16* scratch) {
  const Tiles tiles;
  Worker(plan, item, scratch).run();
}

void weight_gradient_result_amx(const WeightGradientPlan& plan, const float* sums, const std::int64_t* channels,
                                std::int64_t tile, BFloat16* dweight) {
  const WeightGradientShape& shape = plan.shape;
  const std::int64_t in_channels = shape.in_channels, whole = plan.group_tiles();
  const std::int64_t rows = smaller(kTile, shape.out_channels - tile * kTile);
  for (std::int64_t column = 0; column < plan.column_tiles(); ++column) {
    const float* from = sums + (tile * plan.column_tiles() + column) * kProducts;
    for (std::int64_t row = 0; row < rows; ++row, from += kTile) {
      __m512 sum = _mm512_loadu_ps(from);
      for (std::int64_t part = 1; part < plan.parts; ++part) {
        sum = _mm512_add_ps(sum, _mm512_loadu_ps(from + part * plan.part_floats()));
      }
      const __m256i rounded = Simd::to_bfloat16(sum);
      BFloat16* const to = dweight + channels[tile * kTile + row] * shape.taps() * in_channels;
      if (column < whole) {
        const WeightGradientColumns columns = plan.columns_of(column);
        const std::int64_t first = columns.group * kTile;
        const __mmask16 lanes = static_cast<__mmask16>(first_lanes(in_channels - first));
        _mm256_mask_storeu_epi16(to + columns.tap * in_channels + first, lanes, rounded);
      } else {
        alignas(32) BFloat16 values[kTile];
        _mm256_store_si256(reinterpret_cast<__m256i*>(values), rounded);
        const std::int64_t begin = (column - whole) * kTile, end = smaller(begin + kTile, plan.rest * shape.taps());
        for (std::int64_t i = begin; i < end; ++i) {
          to[i / plan.rest * in_channels + plan.groups * kTile + i % plan.rest] = values[i - begin];
        }
      }
    }
  }
}

}  // namespace hflfnerv
