// Vectors of 8 floats for code that is compiled for AVX2, FMA and F16C; see simd_avx512.h. Results are the same but for the
// rounding of GELU and tanh.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "exp2.inl"
#include "float_types.h"
#include "gelu_table.h"

namespace hflfnerv {
namespace {

struct Simd {
  using F = __m256;
  using I = __m256i;  // integers of 32 bits, each of which may be a pair of 16 bits
  static constexpr int kLanes = 8;

  static F zero() { return _mm256_setzero_ps(); }
  static F set(float v) { return _mm256_set1_ps(v); }
  static F add(F a, F b) { return _mm256_add_ps(a, b); }
  static F sub(F a, F b) { return _mm256_sub_ps(a, b); }
  static F mul(F a, F b) { return _mm256_mul_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  static F min(F a, F b) { return _mm256_min_ps(a, b); }
  static F max(F a, F b) { return _mm256_max_ps(a, b); }
  static F div(F a, F b) { return _mm256_div_ps(a, b); }
  static F abs(F a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }
  static F with_sign_of(F size, F x) { return _mm256_or_ps(size, _mm256_and_ps(x, _mm256_set1_ps(-0.0f))); }

  static F load(const float* p) { return _mm256_loadu_ps(p); }
  static F load(const std::uint8_t* p) {
    return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
  }
  static F load(const Half* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
  static F load(const BFloat16* p) {
    const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
  }

  static void store(float* p, F v) { _mm256_storeu_ps(p, v); }
  static void store_rounded(std::uint8_t* p, F v) {
    const __m256i levels = _mm256_cvtps_epi32(v), pairs = _mm256_packus_epi32(levels, levels);
    const __m128i packed = _mm256_castsi256_si128(_mm256_permute4x64_epi64(pairs, 0x08));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packus_epi16(packed, packed));
  }
  static void store(Half* p, F v) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
  }
  static void store(BFloat16* p, F v) {
    const __m256i bits = _mm256_castps_si256(v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
    const __m256i high = _mm256_srli_epi32(rounded, 16);
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(high, high), 0x08);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
  }

  template <class T>
  static F load_lanes(const T* p, int n) {
    T lanes[kLanes] = {};
    std::memcpy(lanes, p, static_cast<std::size_t>(n) * sizeof(T));
    return load(lanes);
  }

  // A masked store is microcode on some processors.
  template <class T>
  static void store_lanes(T* p, F v, int first, int last) {
    alignas(32) T lanes[kLanes];
    store(lanes, v);
    std::memcpy(p + first, lanes + first, static_cast<std::size_t>(last - first) * sizeof(T));
  }

  struct Mask {
    alignas(32) int lanes[kLanes];  // all bits or none
  };
  static Mask mask(const bool* lanes) {
    Mask mask;
    for (int i = 0; i < kLanes; ++i) mask.lanes[i] = -static_cast<int>(lanes[i]);
    return mask;
  }
  static F permute(F v, const Mask& mask, I index, const float* p) {
    const F all = _mm256_permutevar8x32_ps(_mm256_loadu_ps(p), index);
    return _mm256_blendv_ps(v, all, _mm256_load_ps(reinterpret_cast<const float*>(mask.lanes)));
  }

  static void unzip(F& a, F& b) {
    const __m256d even = _mm256_castps_pd(_mm256_shuffle_ps(a, b, 0x88));
    const __m256d odd = _mm256_castps_pd(_mm256_shuffle_ps(a, b, 0xdd));
    a = _mm256_castpd_ps(_mm256_permute4x64_pd(even, 0xd8));
    b = _mm256_castpd_ps(_mm256_permute4x64_pd(odd, 0xd8));
  }
  static void zip(F& a, F& b) {
    const F low = _mm256_unpacklo_ps(a, b), high = _mm256_unpackhi_ps(a, b);
    a = _mm256_permute2f128_ps(low, high, 0x20);
    b = _mm256_permute2f128_ps(low, high, 0x31);
  }

  // As in simd_avx512.h, by transpositions: these processors have no permutation across two registers in one step.
  template <int n>
  static inline __attribute__((always_inline)) void part(F* v) {
    static_assert(n == 2 || n == 4 || n == 16);
    if constexpr (n == 2) {
      unzip(v[0], v[1]);
    } else if constexpr (n == 4) {
      const F a = _mm256_permute2f128_ps(v[0], v[2], 0x20), b = _mm256_permute2f128_ps(v[0], v[2], 0x31);
      const F c = _mm256_permute2f128_ps(v[1], v[3], 0x20), d = _mm256_permute2f128_ps(v[1], v[3], 0x31);
      transpose_halves(a, b, c, d, v);
    } else {
      F low[8], high[8];
      for (int i = 0; i < 8; ++i) {
        low[i] = v[2 * i];
        high[i] = v[2 * i + 1];
      }
      transpose(low);
      transpose(high);
      for (int i = 0; i < 8; ++i) {
        v[i] = low[i];
        v[i + 8] = high[i];
      }
    }
  }
  template <int n>
  static inline __attribute__((always_inline)) void merge(F* v) {
    static_assert(n == 2 || n == 4 || n == 16);
    if constexpr (n == 2) {
      zip(v[0], v[1]);
    } else if constexpr (n == 4) {
      F t[4];
      transpose_halves(v[0], v[1], v[2], v[3], t);
      v[0] = _mm256_permute2f128_ps(t[0], t[1], 0x20);
      v[1] = _mm256_permute2f128_ps(t[2], t[3], 0x20);
      v[2] = _mm256_permute2f128_ps(t[0], t[1], 0x31);
      v[3] = _mm256_permute2f128_ps(t[2], t[3], 0x31);
    } else {
      F low[8], high[8];
      for (int i = 0; i < 8; ++i) {
        low[i] = v[i];
        high[i] = v[i + 8];
      }
      transpose(low);
      transpose(high);
      for (int i = 0; i < 8; ++i) {
        v[2 * i] = low[i];
        v[2 * i + 1] = high[i];
      }
    }
  }
  // 4x4 in each half of four registers.
  static void transpose_halves(F a, F b, F c, F d, F* to) {
    const F ab_low = _mm256_unpacklo_ps(a, b), ab_high = _mm256_unpackhi_ps(a, b);
    const F cd_low = _mm256_unpacklo_ps(c, d), cd_high = _mm256_unpackhi_ps(c, d);
    to[0] = _mm256_shuffle_ps(ab_low, cd_low, 0x44);
    to[1] = _mm256_shuffle_ps(ab_low, cd_low, 0xee);
    to[2] = _mm256_shuffle_ps(ab_high, cd_high, 0x44);
    to[3] = _mm256_shuffle_ps(ab_high, cd_high, 0xee);
  }
  // Of as many vectors as there are lanes.
  static void transpose(F* v) {
    F low[4], high[4];
    transpose_halves(v[0], v[1], v[2], v[3], low);
    transpose_halves(v[4], v[5], v[6], v[7], high);
    for (int i = 0; i < 4; ++i) {
      v[i] = _mm256_permute2f128_ps(low[i], high[i], 0x20);
      v[i + 4] = _mm256_permute2f128_ps(low[i], high[i], 0x31);
    }
  }

  // n = 4 or 8 columns of as many rows in memory as there are lanes, `stride` apart: halves are read to where they belong.
  template <int n>
  static inline __attribute__((always_inline)) void load_columns(const float* from, std::int64_t stride, F* v) {
    for (int column = 0; column < n; column += 4) {
      F rows[4];
      for (int i = 0; i < 4; ++i) {
        const float* const p = from + i * stride + column;
        rows[i] = _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(p)), _mm_loadu_ps(p + 4 * stride), 1);
      }
      transpose_halves(rows[0], rows[1], rows[2], rows[3], v + column);
    }
  }

  static F drop(F v, int n) {
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return _mm256_and_ps(v, _mm256_castsi256_ps(_mm256_cmpgt_epi32(lane, _mm256_set1_epi32(n - 1))));
  }

  static float sum(F v) {
    const __m128 quarter = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    const __m128 pair = _mm_add_ps(quarter, _mm_movehl_ps(quarter, quarter));
    return _mm_cvtss_f32(_mm_add_ss(pair, _mm_movehdup_ps(pair)));
  }

  static float highest(F v) {
    const __m128 quarter = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    const __m128 pair = _mm_max_ps(quarter, _mm_movehl_ps(quarter, quarter));
    return _mm_cvtss_f32(_mm_max_ss(pair, _mm_movehdup_ps(pair)));
  }

  static F sums(const F* v) {
    const F low = _mm256_hadd_ps(_mm256_hadd_ps(v[0], v[1]), _mm256_hadd_ps(v[2], v[3]));
    const F high = _mm256_hadd_ps(_mm256_hadd_ps(v[4], v[5]), _mm256_hadd_ps(v[6], v[7]));
    return add(_mm256_permute2f128_ps(low, high, 0x20), _mm256_permute2f128_ps(low, high, 0x31));
  }

  static I zero_ints() { return _mm256_setzero_si256(); }
  static I set_ints(std::int32_t v) { return _mm256_set1_epi32(v); }
  static I load_ints(const std::int32_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
  static void store_ints(std::int32_t* p, I v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), v); }
  static I sub_ints(I a, I b) { return _mm256_sub_epi32(a, b); }
  static F to_floats(I v) { return _mm256_cvtepi32_ps(v); }
  static I add_products(I sum, I a, I b) { return _mm256_add_epi32(sum, _mm256_madd_epi16(a, b)); }

  using Shorts = __m256i;
  static Shorts to_shorts(F a, F b) {
    return _mm256_permute4x64_epi64(_mm256_packs_epi32(_mm256_cvtps_epi32(a), _mm256_cvtps_epi32(b)), 0xd8);
  }
  static Shorts add_shorts(Shorts a, Shorts b) { return _mm256_add_epi16(a, b); }
  static void store_shorts(std::int16_t* p, Shorts v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), v); }

  // value times two to the power of the integer in the low bits of `integer`.
  static F add_exponent(F value, F integer) {
    const __m256i exponent = _mm256_slli_epi32(_mm256_castps_si256(integer), 23);
    return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(value), exponent));
  }

  // t, d and s of gelu_table.h by an exponential and a quotient: looking coefficients up takes two permutations and a blend
  // for each where a register has 8 lanes, and permutations are what these processors have least of.

  // For a = min(|x|, limit).
  struct Tail {
    F exponential, ratio;  // t is their product
    F slope;               // -t' / t, of the tanh form alone
    F t() const { return mul(exponential, ratio); }
  };

  // exp(-a²/2) and Phi(-a) exp(a²/2); the quotient of polynomials is fitted to 5e-10.
  static inline __attribute__((always_inline)) Tail normal_tail(F a) {
    const F e = exp2_minus<Simd>(mul(mul(a, set(0.72134752f)), a));
    F p = fma(set(1.0164797e-2f), a, set(8.7649889e-2f));
    p = fma(p, a, set(3.0041605e-1f));
    p = fma(p, a, set(0.5f));
    F q = fma(set(2.5553463e-2f), a, set(2.1830328e-1f));
    q = fma(q, a, set(7.9131538e-1f));
    q = fma(q, a, set(1.3987166f));
    q = fma(q, a, set(1));
    return {e, _mm256_div_ps(p, q), zero()};
  }

  // 1 / (1 + exp(u)) with u = 2 sqrt(2/pi) (a + 0.044715 a³).
  static inline __attribute__((always_inline)) Tail logistic_tail(F a) {
    const F square = mul(a, a);
    const F e = exp2_minus<Simd>(mul(a, fma(square, set(0.10294324f), set(2.3022082f))));  // in powers of 2
    const F ratio = _mm256_div_ps(set(1), add(set(1), e));
    return {e, ratio, mul(ratio, fma(square, set(0.21406445f), set(1.5957691f)))};
  }

  static F limited_abs(F x) {
    return _mm256_min_ps(_mm256_set1_ps(kGeluLimit), _mm256_andnot_ps(_mm256_set1_ps(-0.0f), x));
  }

  struct Gelu {
    explicit Gelu(const GeluTable& table) : tanh_form(table.tanh_form) {}
    inline __attribute__((always_inline)) F operator()(F x) const {
      const F a = limited_abs(x);
      const Tail tail = tanh_form ? logistic_tail(a) : normal_tail(a);
      return _mm256_fnmadd_ps(a, tail.t(), _mm256_max_ps(zero(), x));
    }
    bool tanh_form;
  };

  struct Tanh {
    explicit Tanh(const GeluTable&) {}
    inline __attribute__((always_inline)) F operator()(F x) const {
      const F a = _mm256_min_ps(set(kTanhLimit), _mm256_andnot_ps(set(-0.0f), x));
      const F e = exp2_minus<Simd>(mul(a, set(2.8853901f)));
      const F s = fma(a, zero(), _mm256_div_ps(e, add(set(1), e)));  // NaN for a NaN
      return _mm256_or_ps(_mm256_fnmadd_ps(set(2), s, set(1)), _mm256_and_ps(x, set(-0.0f)));
    }
  };

  struct GeluGradient {
    explicit GeluGradient(const GeluTable& table) : tanh_form(table.tanh_form) {}
    inline __attribute__((always_inline)) F operator()(F x) const {
      const F a = limited_abs(x);
      F value;
      if (tanh_form) {
        const Tail tail = logistic_tail(a);
        const F t = tail.t();
        value = mul(t, _mm256_fnmadd_ps(a, tail.slope, set(1)));
      } else {
        const Tail tail = normal_tail(a);
        value = mul(tail.exponential, _mm256_fnmadd_ps(set(0.39894228f), a, tail.ratio));
      }
      return _mm256_blendv_ps(_mm256_sub_ps(set(1), value), value, x);  // by the sign
    }
    bool tanh_form;
  };
};

}  // namespace
}  // namespace hflfnerv
