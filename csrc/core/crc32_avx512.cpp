// As crc32_avx2.cpp, with 4 x 512 bits at a time.
#include <immintrin.h>

#include "crc32.h"

namespace hflfnerv::detail {
namespace {

inline __m512i fold(__m512i value, __m512i next, __m512i keys) {
  const __m512i low = _mm512_clmulepi64_epi128(value, keys, 0x00);
  const __m512i high = _mm512_clmulepi64_epi128(value, keys, 0x11);
  return _mm512_ternarylogic_epi64(next, low, high, 0x96);
}

template <bool kStream>
std::size_t fold_all(std::uint32_t* state, std::uint8_t* out, const std::uint8_t* data, std::size_t size) {
  if (size < 1024) return 0;
  const __m512i by_2048 = _mm512_broadcast_i32x4(_mm_set_epi64x(0x1322D1430, 0x11542778A));
  const __m512i by_512 = _mm512_broadcast_i32x4(_mm_set_epi64x(0x1C6E41596, 0x154442BD4));
  const __m128i by_128 = _mm_set_epi64x(0x0CCAA009E, 0x1751997D0);
  const std::uint8_t* at = data;
  const auto take = [&at, &out]() {
    const __m512i value = _mm512_loadu_si512(at);
    at += 64;
    if constexpr (kStream) {
      _mm512_stream_si512(reinterpret_cast<__m512i*>(out), value);
      out += 64;
    }
    return value;
  };
  __m512i a = _mm512_xor_si512(take(), _mm512_zextsi128_si512(_mm_cvtsi32_si128(static_cast<int>(*state))));
  __m512i b = take(), c = take(), d = take();
  while (data + size - at >= 256) {
    a = fold(a, take(), by_2048);
    b = fold(b, take(), by_2048);
    c = fold(c, take(), by_2048);
    d = fold(d, take(), by_2048);
  }
  if constexpr (kStream) _mm_sfence();
  a = fold(fold(fold(a, b, by_512), c, by_512), d, by_512);
  __m128i lanes[4];
  _mm512_storeu_si512(lanes, a);
  __m128i sum = lanes[0];
  for (int i = 1; i < 4; ++i) {
    sum = _mm_xor_si128(
        lanes[i], _mm_xor_si128(_mm_clmulepi64_si128(sum, by_128, 0x00), _mm_clmulepi64_si128(sum, by_128, 0x11)));
  }
  alignas(16) std::uint8_t rest[16];
  _mm_store_si128(reinterpret_cast<__m128i*>(rest), sum);
  *state = crc32_update(0, rest, 16);
  return static_cast<std::size_t>(at - data);
}

}  // namespace

std::size_t crc32_fold_avx512(std::uint32_t* state, const std::uint8_t* data, std::size_t size) {
  return fold_all<false>(state, nullptr, data, size);
}

std::size_t crc32_fold_stream_avx512(std::uint32_t* state, std::uint8_t* out, const std::uint8_t* data,
                                     std::size_t size) {
  return fold_all<true>(state, out, data, size);
}

}  // namespace hflfnerv::detail
