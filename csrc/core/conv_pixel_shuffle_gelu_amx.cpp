#include "conv_pixel_shuffle_gelu_amx.h"

#include <cstring>

#include "simd_avx512.h"

namespace hflfnerv {
namespace {

constexpr std::int64_t kTileElements = kTile * kStep;
constexpr std::int64_t kStepBytes = kStep * 2;
constexpr int kRows = static_cast<int>(kBlockTiles * kTile);

// All eight tiles are full: 16 rows of 64 bytes.
struct alignas(64) TileConfig {
  std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
  std::uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  std::uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// The compiler does not know that tile loads read memory: what was written has to be there before them.
inline void memory_barrier() { __asm__ volatile("" ::: "memory"); }

inline __mmask32 first_lanes(std::int64_t n) {
  return n >= 32 ? 0xffffffffu : static_cast<__mmask32>((std::uint64_t{1} << n) - 1);
}

inline void copy_elements(BFloat16* to, const BFloat16* from, std::int64_t n) {
  for (std::int64_t i = 0; i < n; i += 32) {
    const __mmask32 lanes = first_lanes(n - i);
    _mm512_mask_storeu_epi16(to + i, lanes, _mm512_maskz_loadu_epi16(lanes, from + i));
  }
}

// Four tiles of pixels, and where each pixel goes: to its first element in y, or nowhere.
struct Block {
  const BFloat16* from[kBlockTiles];
  BFloat16* to[kRows];
};

// Products of one block and column tile that still need bias, GELU and their place in y.
struct Pending {
  const float* products = nullptr;  // kRows times kTile, or null
  BFloat16* const* to = nullptr;
  std::int64_t column_tile = 0;
};

class Worker {
 public:
  Worker(const ConvTask& task, BFloat16* memory)
      : task_(task),
        s_(task.shape),
        planes_(memory),
        rest_(planes_ + task.planes_elements()),
        gathered_(rest_ + task.rest_elements()),
        products_(reinterpret_cast<float*>(gathered_ + task.gathered_elements())) {
    // What lies behind the gathered taps meets weights of 0, and stays 0 itself.
    std::memset(gathered_, 0, static_cast<std::size_t>(task.gathered_elements()) * 2);
  }

  void rows(std::int64_t begin, std::int64_t end) {
    const std::int64_t height = s_.out_height();
    while (begin < end) {
      const std::int64_t image = begin / height, row = begin % height;
      std::int64_t count = task_.band_rows();
      if (count > height - row) count = height - row;
      if (count > end - begin) count = end - begin;
      convert(image, row, count);
      band(image, row, count);
      begin += count;
    }
    flush();
  }

 private:
  // Brings the rows of input that the band needs into groups and rest, with zeros around them.
  void convert(std::int64_t image, std::int64_t first, std::int64_t count) {
    const std::int64_t width = task_.padded_width(), channels = s_.in_channels, groups = task_.groups, rest = task_.rest;
    for (std::int64_t row = 0; row < count + s_.kernel_h - 1; ++row) {
      const std::int64_t in = first + row - s_.padding_h;
      BFloat16* planes = planes_ + row * task_.plane_row();
      BFloat16* others = rest_ + row * task_.rest_row();
      if (in < 0 || in >= s_.height) {
        std::memset(planes, 0, static_cast<std::size_t>(task_.plane_row()) * 2);
        std::memset(others, 0, static_cast<std::size_t>(task_.rest_row()) * 2);
        continue;
      }
      const BFloat16* x = task_.x + (image * s_.height + in) * s_.width * channels;
      // Columns beyond what any output needs do not exist where the padding is less than the kernel.
      const std::int64_t columns = s_.width < width - s_.padding_w ? s_.width : width - s_.padding_w;
      for (std::int64_t g = 0; g < groups; ++g) {
        BFloat16* plane = planes + g * width * kStep;
        std::memset(plane, 0, static_cast<std::size_t>(s_.padding_w) * kStepBytes);
        const __mmask32 lanes = first_lanes(channels - g * kStep);
        for (std::int64_t w = 0; w < columns; ++w) {
          const BFloat16* from = x + w * channels + g * kStep;
          _mm_prefetch(reinterpret_cast<const char*>(from) + 2048, _MM_HINT_T0);
          _mm512_store_si512(plane + (s_.padding_w + w) * kStep, _mm512_maskz_loadu_epi16(lanes, from));
        }
        std::memset(plane + (s_.padding_w + columns) * kStep, 0,
                    static_cast<std::size_t>(width - s_.padding_w - columns) * kStepBytes);
      }
      if (rest == 0) continue;
      std::memset(others, 0, static_cast<std::size_t>(s_.padding_w * rest) * 2);
      if (rest == 1) {
        for (std::int64_t w = 0; w < columns; ++w) others[s_.padding_w + w] = x[(w + 1) * channels - 1];
      } else {
        for (std::int64_t w = 0; w < columns; ++w) {
          copy_elements(others + (s_.padding_w + w) * rest, x + w * channels + groups * kStep, rest);
        }
      }
      std::memset(others + (s_.padding_w + columns) * rest, 0,
                  static_cast<std::size_t>((width - s_.padding_w - columns) * rest) * 2);
    }
  }

  // Gathers the rest of all taps for 16 pixels.
  void gather(std::int64_t row, std::int64_t column, BFloat16* to) const {
    const std::int64_t n = s_.kernel_w * task_.rest, rest = task_.rest, stride = task_.rest_steps() * kStep;
    const __mmask32 lanes = first_lanes(n);
    for (std::int64_t ky = 0; ky < s_.kernel_h; ++ky, to += n) {
      const BFloat16* from = rest_ + (row + ky) * task_.rest_row() + column * rest;
      for (int p = 0; p < kTile; ++p) {
        if (n <= 32) {
          _mm512_mask_storeu_epi16(to + p * stride, lanes, _mm512_maskz_loadu_epi16(lanes, from + p * rest));
        } else {
          copy_elements(to + p * stride, from + p * rest, n);
        }
      }
    }
  }

  void band(std::int64_t image, std::int64_t first, std::int64_t count) {
    const std::int64_t tiles = count * task_.row_tiles(), rC = s_.r * s_.channels, width = s_.out_width();
    const std::int64_t gathered_tile = kTile * task_.rest_steps() * kStep;
    for (std::int64_t tile = 0; tile < tiles; tile += kBlockTiles) {
      // The other one's results may still be pending.
      Block& block = blocks_[tile / kBlockTiles & 1];
      if (pending_.to == block.to) flush();
      for (std::int64_t t = 0; t < kBlockTiles; ++t) {
        // A block that is not full repeats its last tile, and keeps nothing of it.
        const std::int64_t one = tile + t < tiles ? tile + t : tiles - 1;
        const std::int64_t row = one / task_.row_tiles(), column = one % task_.row_tiles() * kTile;
        block.from[t] = planes_ + row * task_.plane_row() + column * kStep;
        BFloat16* const y = task_.y + ((image * s_.out_height() + first + row) * s_.r * width + column) * rC;
        for (std::int64_t p = 0; p < kTile; ++p) {
          block.to[t * kTile + p] = tile + t < tiles && column + p < width ? y + p * rC : nullptr;
        }
        if (task_.rest > 0) gather(row, column, gathered_ + t * gathered_tile);
      }
      memory_barrier();
      const BFloat16* weights = task_.packed;
      for (std::int64_t column_tile = 0; column_tile < task_.column_tiles(); ++column_tile) {
        weights = multiply(block.from, weights);
        float* const products = pending_.products == products_ ? products_ + kRows * kTile : products_;
        store_products(products);
        pending_ = {products, block.to, column_tile};
      }
    }
  }

  // Sums up products of four tiles of pixels and one of columns in tiles 0 to 3, while the vector units finish what is
  // pending; returns where the next column tile's weights begin.
  const BFloat16* multiply(const BFloat16* const* from, const BFloat16* weights) {
    const std::int64_t group_steps = task_.group_steps(), rest_steps = task_.rest_steps();
    const std::int64_t share = (kRows + group_steps + rest_steps - 1) / (group_steps + rest_steps);
    Finish finish(*this);
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    const BFloat16 *from0 = from[0], *from1 = from[1], *from2 = from[2], *from3 = from[3];
    for (std::int64_t step = 0; step < group_steps; ++step, weights += kTileElements) {
      const std::int64_t at = task_.steps[step];
      _tile_loadd(7, weights, 64);
      _tile_loadd(4, from0 + at, 64);
      _tile_dpbf16ps(0, 4, 7);
      _tile_loadd(5, from1 + at, 64);
      _tile_dpbf16ps(1, 5, 7);
      _tile_loadd(6, from2 + at, 64);
      _tile_dpbf16ps(2, 6, 7);
      _tile_loadd(4, from3 + at, 64);
      _tile_dpbf16ps(3, 4, 7);
      prefetch_tile(weights + 2 * kTileElements);
      finish.rows(share);
    }
    const std::int64_t stride = rest_steps * kStepBytes, tile = kTile * rest_steps * kStep;
    for (std::int64_t step = 0; step < rest_steps; ++step, weights += kTileElements) {
      const BFloat16* gathered = gathered_ + step * kStep;
      _tile_loadd(7, weights, 64);
      _tile_loadd(4, gathered, stride);
      _tile_dpbf16ps(0, 4, 7);
      _tile_loadd(5, gathered + tile, stride);
      _tile_dpbf16ps(1, 5, 7);
      _tile_loadd(6, gathered + 2 * tile, stride);
      _tile_dpbf16ps(2, 6, 7);
      _tile_loadd(4, gathered + 3 * tile, stride);
      _tile_dpbf16ps(3, 4, 7);
      prefetch_tile(weights + 2 * kTileElements);
      finish.rows(share);
    }
    finish.rows(kRows);
    return weights;
  }

  static void prefetch_tile(const BFloat16* tile) {
    for (int line = 0; line < kTile; ++line) _mm_prefetch(reinterpret_cast<const char*>(tile + line * kStep), _MM_HINT_T0);
  }

  void store_products(float* to) const {
    _tile_stored(0, to, 64);
    _tile_stored(1, to + kTile * kTile, 64);
    _tile_stored(2, to + 2 * kTile * kTile, 64);
    _tile_stored(3, to + 3 * kTile * kTile, 64);
  }

  // Bias, GELU, rounding and shuffle of what is pending, some rows at a time.
  class Finish {
   public:
    explicit Finish(const Worker& worker)
        : gelu_(*worker.task_.table), products_(worker.pending_.products), to_(worker.pending_.to) {
      if (products_ == nullptr) {
        end_ = to_;
        return;
      }
      end_ = to_ + kRows;
      const std::int64_t column_tile = worker.pending_.column_tile;
      bias_ = _mm512_loadu_ps(worker.task_.bias + column_tile * kTile);
      stores_ = worker.task_.stores + worker.task_.first_store[column_tile];
      more_ = worker.task_.stores + worker.task_.first_store[column_tile + 1];
      // Nearly always there are one or two.
      first_ = stores_[0];
      second_ = more_ - stores_ > 1 ? stores_[1] : ConvStore{0, first_.offset};
    }

    inline __attribute__((always_inline)) void rows(std::int64_t count) {
      for (BFloat16* const* const end = end_ - to_ > count ? to_ + count : end_; to_ < end; ++to_, products_ += kTile) {
        BFloat16* const to = *to_;
        if (to == nullptr) continue;
        const __m256i value = Simd::to_bfloat16(gelu_(_mm512_add_ps(_mm512_load_ps(products_), bias_)));
        _mm256_mask_storeu_epi16(to + first_.offset, first_.mask, value);
        if (second_.mask == 0) continue;
        _mm256_mask_storeu_epi16(to + second_.offset, second_.mask, value);
        for (const ConvStore* store = stores_ + 2; store < more_; ++store) {
          _mm256_mask_storeu_epi16(to + store->offset, store->mask, value);
        }
      }
    }

   private:
    const Simd::Gelu gelu_;
    const float* products_;
    BFloat16* const* to_;
    BFloat16* const* end_ = nullptr;
    __m512 bias_ = _mm512_setzero_ps();
    const ConvStore* stores_ = nullptr;
    const ConvStore* more_ = nullptr;
    ConvStore first_{}, second_{};
  };

  void flush() {
    Finish(*this).rows(kRows);
    pending_ = {};
  }

  const ConvTask& task_;
  const ConvPixelShuffleShape& s_;
  BFloat16* planes_;
  BFloat16* rest_;
  BFloat16* gathered_;
  float* products_;
  Block blocks_[2];
  Pending pending_;
};

}  // namespace

void conv_pack_weights_amx(const ConvTask& task, std::int64_t begin, std::int64_t end) {
  const ConvPixelShuffleShape& s = task.shape;
  const std::int64_t channels = s.in_channels, cells = s.r * s.r;
  BFloat16* to = task.packed + begin * (task.group_steps() + task.rest_steps()) * kTileElements;
  for (std::int64_t column_tile = begin; column_tile < end; ++column_tile) {
    alignas(64) std::int32_t rows[kTile] = {};  // where the weights of each column begin
    std::int64_t columns = s.out_channels() - column_tile * kTile;
    if (columns > kTile) columns = kTile;
    for (std::int64_t lane = 0; lane < columns; ++lane) {
      const std::int64_t column = column_tile * kTile + lane;
      rows[lane] = static_cast<std::int32_t>((column % s.channels * cells + column / s.channels) * task.taps() * channels);
    }
    const __m512i index = _mm512_load_si512(rows);
    const __mmask16 lanes = static_cast<__mmask16>((1u << columns) - 1);
    const auto pair_row = [&](std::int64_t first, bool pair, std::int64_t second) {
      if (pair && second == first + 1) {
        const __m512i pairs = _mm512_mask_i32gather_epi32(_mm512_setzero_si512(), lanes, index, task.weight + first, 2);
        _mm512_store_si512(to, pairs);
      } else {
        _mm512_store_si512(to, _mm512_setzero_si512());
        for (std::int64_t lane = 0; lane < columns; ++lane) {
          to[2 * lane] = task.weight[rows[lane] + first];
          if (pair) to[2 * lane + 1] = task.weight[rows[lane] + second];
        }
      }
      to += 2 * kTile;
    };
    for (std::int64_t tap = 0; tap < task.taps(); ++tap) {
      for (std::int64_t c = 0; c < task.groups * kStep; c += 2) {
        if (c < channels) {
          pair_row(tap * channels + c, c + 1 < channels, tap * channels + c + 1);
        } else {
          _mm512_store_si512(to, _mm512_setzero_si512());
          to += 2 * kTile;
        }
      }
    }
    std::int64_t tap = 0, c = 0;
    const auto next = [&] {
      const std::int64_t at = tap * channels + task.groups * kStep + c;
      if (++c == task.rest) {
        c = 0;
        ++tap;
      }
      return at;
    };
    for (std::int64_t k = 0; k < task.rest_steps() * kStep; k += 2) {
      if (k < task.taps() * task.rest) {
        const std::int64_t first = next();
        const bool pair = k + 1 < task.taps() * task.rest;
        pair_row(first, pair, pair ? next() : 0);
      } else {
        _mm512_store_si512(to, _mm512_setzero_si512());
        to += 2 * kTile;
      }
    }
  }
}

void conv_pixel_shuffle_gelu_rows_amx(const ConvTask& task, std::int64_t begin, std::int64_t end, BFloat16* memory) {
  const TileConfig config;
  _tile_loadconfig(&config);
  Worker(task, memory).rows(begin, end);
  _tile_release();
}

}  // namespace hflfnerv
