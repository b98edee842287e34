// Tiles, for code that is compiled for AMX.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "planes.h"

namespace hflfnerv {
namespace {

// All eight tiles are full: 16 rows of 64 bytes.
struct alignas(64) TileConfig {
  std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
  std::uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  std::uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// The tiles are in use as long as it lives.
class Tiles {
 public:
  Tiles() { _tile_loadconfig(&kConfig); }
  ~Tiles() { _tile_release(); }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;

 private:
  // Not a local one: the compiler takes the instruction to read 8 bytes, and leaves out the others.
  static constexpr TileConfig kConfig{};
};

constexpr std::int64_t kTileElements = kTile * kStep;
constexpr std::int64_t kProducts = kTile * kTile;
constexpr int kBlockRows = 64;  // rows of products of four tiles

// Not std::min, of which a copy compiled for AMX might be shared with other code; and so on.
inline std::int64_t smaller(std::int64_t a, std::int64_t b) { return a < b ? a : b; }
inline std::int64_t larger(std::int64_t a, std::int64_t b) { return a < b ? b : a; }

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

inline void prefetch_tile(const BFloat16* tile) {
  for (int line = 0; line < kTile; ++line) _mm_prefetch(reinterpret_cast<const char*>(tile + line * kStep), _MM_HINT_T0);
}

inline __attribute__((always_inline)) void zero_products() {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
}

// Adds the products of four tiles of pixels and one of weights to tiles 0 to 3.
inline __attribute__((always_inline)) void add_products(const BFloat16* a0, const BFloat16* a1, const BFloat16* a2,
                                                        const BFloat16* a3, std::int64_t stride_bytes,
                                                        const BFloat16* weights) {
  _tile_loadd(7, weights, 64);
  _tile_loadd(4, a0, stride_bytes);
  _tile_dpbf16ps(0, 4, 7);
  _tile_loadd(5, a1, stride_bytes);
  _tile_dpbf16ps(1, 5, 7);
  _tile_loadd(6, a2, stride_bytes);
  _tile_dpbf16ps(2, 6, 7);
  _tile_loadd(4, a3, stride_bytes);
  _tile_dpbf16ps(3, 4, 7);
  prefetch_tile(weights + 2 * kTileElements);
}

inline void store_products(float* to) {
  _tile_stored(0, to, 64);
  _tile_stored(1, to + kTile * kTile, 64);
  _tile_stored(2, to + 2 * kTile * kTile, 64);
  _tile_stored(3, to + 3 * kTile * kTile, 64);
}

// Adds the products of one or two row tiles and one or two column tiles, whose steps lie one after the other, to their sums.
template <int kRows, int kColumns>
inline __attribute__((always_inline)) void add_block(const BFloat16* left, const BFloat16* next_left,
                                                     const BFloat16* right, const BFloat16* next_right, std::int64_t steps,
                                                     float* sums, float* next_sums) {
  constexpr bool rows = kRows > 1, columns = kColumns > 1;
  _tile_loadd(0, sums, 64);
  if (columns) _tile_loadd(1, sums + kProducts, 64);
  if (rows) _tile_loadd(2, next_sums, 64);
  if (rows && columns) _tile_loadd(3, next_sums + kProducts, 64);
  for (std::int64_t at = 0; at < steps * kTileElements; at += kTileElements) {
    _tile_loadd(6, right + at, 64);
    _tile_loadd(4, left + at, 64);
    _tile_dpbf16ps(0, 4, 6);
    if (columns) {
      _tile_loadd(7, next_right + at, 64);
      _tile_dpbf16ps(1, 4, 7);
    }
    if (rows) {
      _tile_loadd(5, next_left + at, 64);
      _tile_dpbf16ps(2, 5, 6);
      if (columns) _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, sums, 64);
  if (columns) _tile_stored(1, sums + kProducts, 64);
  if (rows) _tile_stored(2, next_sums, 64);
  if (rows && columns) _tile_stored(3, next_sums + kProducts, 64);
}

// Makes pairs of the elements of two vectors: those of the first 16, and of the others.
class Pairs {
 public:
  Pairs() {
    alignas(64) std::uint16_t index[32];
    for (std::uint16_t i = 0; i < 32; ++i) index[i] = static_cast<std::uint16_t>(i / 2 + i % 2 * 32);
    low_ = _mm512_load_si512(index);
    high_ = _mm512_add_epi16(low_, _mm512_set1_epi16(16));
  }
  __m512i low(__m512i a, __m512i b) const { return _mm512_permutex2var_epi16(a, low_, b); }
  __m512i high(__m512i a, __m512i b) const { return _mm512_permutex2var_epi16(a, high_, b); }

 private:
  __m512i low_, high_;
};

// Transposes 32 x 32 elements: register i has column i afterwards.
inline __attribute__((always_inline)) void transpose_32(__m512i* v) {
  __m512i t[32];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) {
    t[2 * i] = _mm512_unpacklo_epi16(v[2 * i], v[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_epi16(v[2 * i], v[2 * i + 1]);
  }
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
      v[4 * i + 2 * j] = _mm512_unpacklo_epi32(t[4 * i + j], t[4 * i + 2 + j]);
      v[4 * i + 2 * j + 1] = _mm512_unpackhi_epi32(t[4 * i + j], t[4 * i + 2 + j]);
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      t[8 * i + 2 * j] = _mm512_unpacklo_epi64(v[8 * i + j], v[8 * i + 4 + j]);
      t[8 * i + 2 * j + 1] = _mm512_unpackhi_epi64(v[8 * i + j], v[8 * i + 4 + j]);
    }
  }
  // t[8 g + j] has rows 8 g to 8 g + 7 of the columns j, 8 + j, 16 + j and 24 + j, in quarters.
#pragma GCC unroll 8
  for (int j = 0; j < 8; ++j) {
    const __m512i a = _mm512_shuffle_i32x4(t[j], t[8 + j], 0x44), b = _mm512_shuffle_i32x4(t[j], t[8 + j], 0xee);
    const __m512i c = _mm512_shuffle_i32x4(t[16 + j], t[24 + j], 0x44), d = _mm512_shuffle_i32x4(t[16 + j], t[24 + j], 0xee);
    v[j] = _mm512_shuffle_i32x4(a, c, 0x88);
    v[8 + j] = _mm512_shuffle_i32x4(a, c, 0xdd);
    v[16 + j] = _mm512_shuffle_i32x4(b, d, 0x88);
    v[24 + j] = _mm512_shuffle_i32x4(b, d, 0xdd);
  }
}

// How many of 64 rows to finish in each of the first steps, so that none is left after the last.
inline int rows_per_step(std::int64_t steps) {
  int rows = 1;
  while (rows < kBlockRows && kBlockRows / rows > steps) rows *= 2;
  return rows;
}

}  // namespace
}  // namespace hflfnerv
