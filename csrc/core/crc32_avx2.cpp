// CRC-32 by carry-less multiplication: 128 bits are folded onto the 128 bits that follow D bits later by multiplying
// their halves with x^(D+32) and x^(D-32) mod P, bit-reversed. The 16 bytes left at the end are congruent to all before
// them and go through the table.
#include <immintrin.h>

#include "crc32.h"

namespace hflfnerv::detail {
namespace {

inline __m128i load(const std::uint8_t* at) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(at)); }

inline __m128i fold(__m128i value, __m128i next, __m128i keys) {
  const __m128i low = _mm_clmulepi64_si128(value, keys, 0x00);
  const __m128i high = _mm_clmulepi64_si128(value, keys, 0x11);
  return _mm_xor_si128(next, _mm_xor_si128(low, high));
}

}  // namespace

std::size_t crc32_fold_avx2(std::uint32_t* state, const std::uint8_t* data, std::size_t size) {
  if (size < 128) return 0;
  const __m128i by_512 = _mm_set_epi64x(0x1C6E41596, 0x154442BD4);
  const __m128i by_128 = _mm_set_epi64x(0x0CCAA009E, 0x1751997D0);
  const std::uint8_t* at = data;
  __m128i a = _mm_xor_si128(load(at), _mm_cvtsi32_si128(static_cast<int>(*state)));
  __m128i b = load(at + 16), c = load(at + 32), d = load(at + 48);
  at += 64;
  for (; data + size - at >= 64; at += 64) {
    a = fold(a, load(at), by_512);
    b = fold(b, load(at + 16), by_512);
    c = fold(c, load(at + 32), by_512);
    d = fold(d, load(at + 48), by_512);
  }
  a = fold(fold(fold(a, b, by_128), c, by_128), d, by_128);
  alignas(16) std::uint8_t rest[16];
  _mm_store_si128(reinterpret_cast<__m128i*>(rest), a);
  *state = crc32_update(0, rest, 16);
  return static_cast<std::size_t>(at - data);
}

}  // namespace hflfnerv::detail
