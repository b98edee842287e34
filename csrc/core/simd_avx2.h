// Vectors of 8 floats for code that is compiled for AVX2, FMA and F16C; see simd_avx512.h. Results are the same.
#pragma once

#include <immintrin.h>

#include "float_types.h"
#include "gelu_table.h"

namespace hflfnerv {
namespace {

struct Simd {
  using F = __m256;
  static constexpr int kLanes = 8;

  static F zero() { return _mm256_setzero_ps(); }
  static F set(float v) { return _mm256_set1_ps(v); }
  static F add(F a, F b) { return _mm256_add_ps(a, b); }
  static F sub(F a, F b) { return _mm256_sub_ps(a, b); }
  static F mul(F a, F b) { return _mm256_mul_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  static F min(F a, F b) { return _mm256_min_ps(a, b); }
  static F max(F a, F b) { return _mm256_max_ps(a, b); }

  static F load(const float* p) { return _mm256_loadu_ps(p); }
  static F load(const Half* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
  static F load(const BFloat16* p) {
    const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
  }

  static void store(float* p, F v) { _mm256_storeu_ps(p, v); }
  static void store_rounded(int* p, F v) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_cvtps_epi32(v));
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

  // A masked store is microcode on some processors.
  static void store_lanes(float* p, F v, int first, int last) {
    alignas(32) float lanes[kLanes];
    _mm256_store_ps(lanes, v);
    for (int i = first; i < last; ++i) p[i] = lanes[i];
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

  static F drop(F v, int n) {
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return _mm256_and_ps(v, _mm256_castsi256_ps(_mm256_cmpgt_epi32(lane, _mm256_set1_epi32(n - 1))));
  }

  static float sum(F v) {
    const __m128 quarter = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    const __m128 pair = _mm_add_ps(quarter, _mm_movehl_ps(quarter, quarter));
    return _mm_cvtss_f32(_mm_add_ss(pair, _mm_movehdup_ps(pair)));
  }

  template <int kTerms>
  struct Polynomial {
    explicit Polynomial(const GeluTable& table) {
      for (int i = 0; i < kTerms; ++i) {
        low[i] = _mm256_load_ps(table.coefficients[i]);
        high[i] = _mm256_load_ps(table.coefficients[i] + 8);
      }
    }
    F operator()(F a) const {
      const F rounded = _mm256_fmadd_ps(a, _mm256_set1_ps(1 / kGeluStep), _mm256_set1_ps(kGeluRound));
      const __m256i piece = _mm256_castps_si256(rounded);
      const F upper = _mm256_castsi256_ps(_mm256_slli_epi32(piece, 28));  // bit 3 as the sign
      const F d = _mm256_fnmadd_ps(_mm256_sub_ps(rounded, _mm256_set1_ps(kGeluRound)), _mm256_set1_ps(kGeluStep), a);
      F value = coefficient(kTerms - 1, piece, upper);
      for (int i = kTerms - 2; i >= 0; --i) value = _mm256_fmadd_ps(value, d, coefficient(i, piece, upper));
      return value;
    }
    F coefficient(int i, __m256i piece, F upper) const {
      return _mm256_blendv_ps(_mm256_permutevar8x32_ps(low[i], piece), _mm256_permutevar8x32_ps(high[i], piece), upper);
    }
    F low[kTerms], high[kTerms];
  };

  static F limited_abs(F x) {
    return _mm256_min_ps(_mm256_set1_ps(kGeluLimit), _mm256_andnot_ps(_mm256_set1_ps(-0.0f), x));
  }

  struct Gelu {
    explicit Gelu(const GeluTable& table) : t(table) {}
    F operator()(F x) const {
      const F a = limited_abs(x);
      return _mm256_fnmadd_ps(a, t(a), _mm256_max_ps(zero(), x));
    }
    Polynomial<kGeluTerms> t;
  };

  struct Tanh {
    explicit Tanh(const GeluTable& table) : t(table) {}
    F operator()(F x) const {
      const F value = _mm256_fnmadd_ps(set(2), t(limited_abs(mul(x, set(1 / kTanhScale)))), set(1));
      return _mm256_or_ps(value, _mm256_and_ps(x, set(-0.0f)));
    }
    Polynomial<kGeluTerms> t;
  };

  struct GeluGradient {
    explicit GeluGradient(const GeluTable& table) : d(table) {}
    F operator()(F x) const {
      const F value = d(limited_abs(x));
      return _mm256_blendv_ps(value, _mm256_sub_ps(set(1), value), _mm256_cmp_ps(x, zero(), _CMP_GE_OQ));
    }
    Polynomial<kGeluGradientTerms> d;
  };
};

}  // namespace
}  // namespace hflfnerv
