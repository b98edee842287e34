// Vectors of 16 floats for code that is compiled for AVX-512; simd_avx2.h has the same names with 8.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "exp2.inl"
#include "float_types.h"
#include "gelu_table.h"

namespace hflfnerv {
namespace {

struct Simd {
  using F = __m512;
  using I = __m512i;  // integers of 32 bits, each of which may be a pair of 16 bits
  static constexpr int kLanes = 16;

  static F zero() { return _mm512_setzero_ps(); }
  static F set(float v) { return _mm512_set1_ps(v); }
  static F add(F a, F b) { return _mm512_add_ps(a, b); }
  static F sub(F a, F b) { return _mm512_sub_ps(a, b); }
  static F mul(F a, F b) { return _mm512_mul_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  // Of a NaN as first operand, the second.
  static F min(F a, F b) { return _mm512_min_ps(a, b); }
  static F max(F a, F b) { return _mm512_max_ps(a, b); }
  static F div(F a, F b) { return _mm512_div_ps(a, b); }
  static F abs(F a) { return _mm512_abs_ps(a); }
  static F with_sign_of(F size, F x) { return _mm512_or_ps(size, _mm512_and_ps(x, _mm512_set1_ps(-0.0f))); }

  static F load(const float* p) { return _mm512_loadu_ps(p); }
  static F load(const std::uint8_t* p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
  }
  static F load(const Half* p) { return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
  static F load(const BFloat16* p) {
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
  }

  static void store(float* p, F v) { _mm512_storeu_ps(p, v); }
  // Of values from 0 to 255.
  static void store_rounded(std::uint8_t* p, F v) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(v)));
  }
  static void store(Half* p, F v) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
  }
  static void store(BFloat16* p, F v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), to_bfloat16(v)); }

  // The first n elements, n less than there are lanes, and zeros behind them.
  static F load_lanes(const float* p, int n) { return _mm512_maskz_loadu_ps(lanes(0, n), p); }
  static F load_lanes(const Half* p, int n) { return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(lanes(0, n), p)); }
  static F load_lanes(const BFloat16* p, int n) {
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes(0, n), p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
  }

  // Lanes [first, last) of v, to the same places after p.
  static void store_lanes(float* p, F v, int first, int last) {
    _mm512_mask_storeu_ps(p, lanes(first, last), v);
  }
  static void store_lanes(Half* p, F v, int first, int last) {
    _mm256_mask_storeu_epi16(p, lanes(first, last), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
  }
  static void store_lanes(BFloat16* p, F v, int first, int last) {
    _mm256_mask_storeu_epi16(p, lanes(first, last), to_bfloat16(v));
  }
  static __mmask16 lanes(int first, int last) { return static_cast<__mmask16>((1u << last) - (1u << first)); }

  // Rounds to the nearest, ties to even. NaNs made from 16-bit inputs have no low bits that could carry over.
  // A permutation drops the low halves: a narrowing store would be slow where it crosses cache lines.
  static __m256i to_bfloat16(F v) {
    const __m512i bits = _mm512_castps_si512(v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
    const __m512i high = _mm512_setr_epi32(0x30001, 0x70005, 0xb0009, 0xf000d, 0x130011, 0x170015, 0x1b0019, 0x1f001d, 0, 0,
                                           0, 0, 0, 0, 0, 0);
    return _mm512_castsi512_si256(_mm512_permutexvar_epi16(high, rounded));
  }

  using Mask = __mmask16;
  static Mask mask(const bool* lanes) {
    unsigned bits = 0;
    for (int i = 0; i < kLanes; ++i) bits |= static_cast<unsigned>(lanes[i]) << i;
    return static_cast<Mask>(bits);
  }
  // In lanes of the mask, those of the vector at p whose numbers are in index; elsewhere v.
  static F permute(F v, Mask mask, I index, const float* p) {
    return _mm512_mask_permutexvar_ps(v, mask, index, _mm512_loadu_ps(p));
  }

  // a, b = the even and the odd elements of the 32 in a, b.
  static void unzip(F& a, F& b) {
    const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    const F evens = _mm512_permutex2var_ps(a, even, b);
    b = _mm512_permutex2var_ps(a, _mm512_or_si512(even, _mm512_set1_epi32(1)), b);
    a = evens;
  }
  // The inverse.
  static void zip(F& a, F& b) {
    const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    const F lower = _mm512_permutex2var_ps(a, low, b);
    b = _mm512_permutex2var_ps(a, _mm512_add_epi32(low, _mm512_set1_epi32(8)), b);
    a = lower;
  }

  // n vectors of consecutive elements become those of residue 0, 1, ... n - 1 modulo n, for n = 2, 4, 16.
  template <int n>
  static inline __attribute__((always_inline)) void part(F* v) {
    if constexpr (n == 2) {
      unzip(v[0], v[1]);
    } else {
      F even[n / 2], odd[n / 2];
      for (int i = 0; i < n / 2; ++i) {
        even[i] = v[2 * i];
        odd[i] = v[2 * i + 1];
        unzip(even[i], odd[i]);
      }
      part<n / 2>(even);
      part<n / 2>(odd);
      for (int i = 0; i < n / 2; ++i) {
        v[2 * i] = even[i];
        v[2 * i + 1] = odd[i];
      }
    }
  }
  // The inverse of part.
  template <int n>
  static inline __attribute__((always_inline)) void merge(F* v) {
    if constexpr (n == 2) {
      zip(v[0], v[1]);
    } else {
      F even[n / 2], odd[n / 2];
      for (int i = 0; i < n / 2; ++i) {
        even[i] = v[2 * i];
        odd[i] = v[2 * i + 1];
      }
      merge<n / 2>(even);
      merge<n / 2>(odd);
      for (int i = 0; i < n / 2; ++i) {
        zip(even[i], odd[i]);
        v[2 * i] = even[i];
        v[2 * i + 1] = odd[i];
      }
    }
  }

  // Of as many vectors as there are lanes.
  static inline __attribute__((always_inline)) void transpose(F* v) { part<kLanes>(v); }
  // n = 4 or 8 columns of as many rows in memory as there are lanes, `stride` apart: quarters or halves are read to where they
  // belong, so that less is left to do in registers.
  template <int n>
  static inline __attribute__((always_inline)) void load_columns(const float* from, std::int64_t stride, F* v) {
    F rows[4];
    if constexpr (n == 4) {
      for (int i = 0; i < 4; ++i) {
        const float* const p = from + i * stride;
        rows[i] = _mm512_castps128_ps512(_mm_loadu_ps(p));
        rows[i] = _mm512_mask_broadcast_f32x4(rows[i], 0x00f0, _mm_loadu_ps(p + 4 * stride));
        rows[i] = _mm512_mask_broadcast_f32x4(rows[i], 0x0f00, _mm_loadu_ps(p + 8 * stride));
        rows[i] = _mm512_mask_broadcast_f32x4(rows[i], 0xf000, _mm_loadu_ps(p + 12 * stride));
      }
      transpose_quarters(rows, v);
    } else {
      static_assert(n == 8);
      F low[4], high[4];  // of the first eight rows and of the others
      for (F* part : {low, high}) {
        for (int i = 0; i < 4; ++i) {
          const float* const p = from + (part == low ? i : i + 8) * stride;
          rows[i] = _mm512_insertf32x8(_mm512_castps256_ps512(_mm256_loadu_ps(p)), _mm256_loadu_ps(p + 4 * stride), 1);
        }
        transpose_quarters(rows, part);
      }
      for (int i = 0; i < 4; ++i) {
        v[i] = _mm512_shuffle_f32x4(low[i], high[i], 0x88);
        v[i + 4] = _mm512_shuffle_f32x4(low[i], high[i], 0xdd);
      }
    }
  }
  // 4x4 in each quarter of four registers.
  static inline __attribute__((always_inline)) void transpose_quarters(const F* v, F* to) {
    const F a = _mm512_unpacklo_ps(v[0], v[1]), b = _mm512_unpackhi_ps(v[0], v[1]);
    const F c = _mm512_unpacklo_ps(v[2], v[3]), d = _mm512_unpackhi_ps(v[2], v[3]);
    to[0] = _mm512_shuffle_ps(a, c, 0x44);
    to[1] = _mm512_shuffle_ps(a, c, 0xee);
    to[2] = _mm512_shuffle_ps(b, d, 0x44);
    to[3] = _mm512_shuffle_ps(b, d, 0xee);
  }

  // v with its first n lanes zeroed.
  static F drop(F v, int n) { return _mm512_maskz_mov_ps(static_cast<__mmask16>(0xffffu << n), v); }

  static float sum(F v) {
    const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
    const __m128 quarter = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
    const __m128 pair = _mm_add_ps(quarter, _mm_movehl_ps(quarter, quarter));
    return _mm_cvtss_f32(_mm_add_ss(pair, _mm_movehdup_ps(pair)));
  }

  static float highest(F v) { return _mm512_reduce_max_ps(v); }

  // The sums of as many vectors as there are lanes, in their order.
  static F sums(const F* v) {
    F fours[4];  // of four vectors each: in every quarter, a part of the sums of one vector after the other
    for (int i = 0; i < 4; ++i, v += 4) {
      const F first = add(_mm512_unpacklo_ps(v[0], v[1]), _mm512_unpackhi_ps(v[0], v[1]));
      const F second = add(_mm512_unpacklo_ps(v[2], v[3]), _mm512_unpackhi_ps(v[2], v[3]));
      fours[i] = add(_mm512_shuffle_ps(first, second, 0x44), _mm512_shuffle_ps(first, second, 0xee));
    }
    const F low = halves(fours[0], fours[1]), high = halves(fours[2], fours[3]);
    return halves(low, high);
  }
  // The sums of even and odd quarters of a, then of b.
  static F halves(F a, F b) { return add(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd)); }

  static I zero_ints() { return _mm512_setzero_si512(); }
  static I set_ints(std::int32_t v) { return _mm512_set1_epi32(v); }
  static I load_ints(const std::int32_t* p) { return _mm512_loadu_si512(p); }
  static void store_ints(std::int32_t* p, I v) { _mm512_storeu_si512(p, v); }
  static I sub_ints(I a, I b) { return _mm512_sub_epi32(a, b); }
  static F to_floats(I v) { return _mm512_cvtepi32_ps(v); }
  // sum + a.low b.low + a.high b.high, modulo 2^32.
  static I add_products(I sum, I a, I b) { return _mm512_dpwssd_epi32(sum, a, b); }

  // Integers of 16 bits, the nearest ones to those of two vectors of values in their range.
  using Shorts = __m512i;
  static Shorts to_shorts(F a, F b) {
    const __m512i quarters = _mm512_packs_epi32(_mm512_cvtps_epi32(a), _mm512_cvtps_epi32(b));
    return _mm512_permutexvar_epi64(_mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7), quarters);
  }
  static Shorts add_shorts(Shorts a, Shorts b) { return _mm512_add_epi16(a, b); }
  static void store_shorts(std::int16_t* p, Shorts v) { _mm512_storeu_si512(p, v); }

  // value times two to the power of the integer in the low bits of `integer`.
  static F add_exponent(F value, F integer) {
    const __m512i exponent = _mm512_slli_epi32(_mm512_castps_si512(integer), 23);
    return _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(value), exponent));
  }

  // A table's polynomial at a = min(|x|, limit), coefficients in registers. A NaN stays one.
  template <int kTerms>
  struct Polynomial {
    explicit Polynomial(const GeluTable& table) {
      for (int i = 0; i < kTerms; ++i) c[i] = _mm512_load_ps(table.coefficients[i]);
    }
    inline __attribute__((always_inline)) F operator()(F a) const {
      const F rounded = _mm512_add_ps(a, _mm512_set1_ps(kGeluRound * kGeluStep));
      const __m512i piece = _mm512_castps_si512(rounded);
      const F d = _mm512_sub_ps(a, _mm512_sub_ps(rounded, _mm512_set1_ps(kGeluRound * kGeluStep)));
      F value = _mm512_permutexvar_ps(piece, c[kTerms - 1]);
      for (int i = kTerms - 2; i >= 0; --i) value = _mm512_fmadd_ps(value, d, _mm512_permutexvar_ps(piece, c[i]));
      return value;
    }
    F c[kTerms];
  };

  static F limited_abs(F x) { return _mm512_min_ps(_mm512_set1_ps(kGeluLimit), _mm512_abs_ps(x)); }

  struct Gelu {
    explicit Gelu(const GeluTable& table) : t(table) {}
    inline __attribute__((always_inline)) F operator()(F x) const {
      const F a = _mm512_range_ps(x, _mm512_set1_ps(kGeluLimit), 0x0a);  // of the smaller magnitude, its sign cleared
      return _mm512_fnmadd_ps(a, t(a), _mm512_max_ps(zero(), x));  // a NaN is none in a, but in the maximum
    }
    Polynomial<kGeluTerms> t;
  };

  struct Tanh {
    explicit Tanh(const GeluTable& table) : t(table) {}
    inline __attribute__((always_inline)) F operator()(F x) const {
      const F value = _mm512_fnmadd_ps(set(2), t(limited_abs(mul(x, set(1 / kTanhScale)))), set(1));
      return _mm512_or_ps(value, _mm512_and_ps(x, set(-0.0f)));
    }
    Polynomial<kGeluTerms> t;
  };

  struct GeluGradient {
    explicit GeluGradient(const GeluTable& table) : d(table) {}
    inline __attribute__((always_inline)) F operator()(F x) const {
      const F value = d(limited_abs(x));
      const __mmask16 positive = _mm512_cmp_ps_mask(x, zero(), _CMP_GE_OQ);
      return _mm512_mask_sub_ps(value, positive, set(1), value);
    }
    Polynomial<kGeluGradientTerms> d;
  };
};

}  // namespace
}  // namespace hflfnerv
