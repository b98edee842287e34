// CRC-32 by carry-less multiplication: 128 bits are folded onto the 128 bits that follow D bits later by multiplying
// their halves with x^(D+32) and x^(D-32) mod P, bit-reversed. The 16 bytes left at the end are congruent to all before
// them and go through the table.
#include <immintrin.h>

#include "crc32.h"

// For single functions, since the level AVX2 does not promise the instruction.
#define HFLFNERV_VPCLMULQDQ __attribute__((target("avx2,vpclmulqdq")))

namespace hflfnerv::detail {
namespace {

inline __m128i load(const std::uint8_t* at) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(at)); }

inline __m128i fold(__m128i value, __m128i next, __m128i keys) {
  const __m128i low = _mm_clmulepi64_si128(value, keys, 0x00);
  const __m128i high = _mm_clmulepi64_si128(value, keys, 0x11);
  return _mm_xor_si128(next, _mm_xor_si128(low, high));
}

inline __m128i by_512() { return _mm_set_epi64x(0x1C6E41596, 0x154442BD4); }
inline __m128i by_128() { return _mm_set_epi64x(0x0CCAA009E, 0x1751997D0); }

inline void finish(std::uint32_t* state, __m128i sum) {
  alignas(16) std::uint8_t rest[16];
  _mm_store_si128(reinterpret_cast<__m128i*>(rest), sum);
  *state = crc32_update(0, rest, 16);
}

HFLFNERV_VPCLMULQDQ inline __m256i fold(__m256i value, __m256i next, __m256i keys) {
  const __m256i low = _mm256_clmulepi64_epi128(value, keys, 0x00);
  const __m256i high = _mm256_clmulepi64_epi128(value, keys, 0x11);
  return _mm256_xor_si256(next, _mm256_xor_si256(low, high));
}

// Loads 32 bytes, and copies them where that is asked for.
template <bool kCopy>
inline __m256i take(const std::uint8_t*& at, std::uint8_t*& out) {
  const __m256i value = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at));
  at += 32;
  if constexpr (kCopy) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), value);
    out += 32;
  }
  return value;
}

template <bool kCopy>
HFLFNERV_VPCLMULQDQ std::size_t fold_wide(std::uint32_t* state, std::uint8_t* out, const std::uint8_t* data,
                                          std::size_t size) {
  if (size < 256) return 0;
  const __m256i by_1024 = _mm256_set_epi64x(0x14A7FE880, 0x1E88EF372, 0x14A7FE880, 0x1E88EF372);
  const __m256i by_256 = _mm256_set_epi64x(0x15A546366, 0x0F1DA05AA, 0x15A546366, 0x0F1DA05AA);
  const std::uint8_t* at = data;
  const __m256i before = _mm256_zextsi128_si256(_mm_cvtsi32_si128(static_cast<int>(*state)));
  __m256i a = _mm256_xor_si256(take<kCopy>(at, out), before);
  __m256i b = take<kCopy>(at, out), c = take<kCopy>(at, out), d = take<kCopy>(at, out);
  while (data + size - at >= 128) {
    a = fold(a, take<kCopy>(at, out), by_1024);
    b = fold(b, take<kCopy>(at, out), by_1024);
    c = fold(c, take<kCopy>(at, out), by_1024);
    d = fold(d, take<kCopy>(at, out), by_1024);
  }
  a = fold(fold(fold(a, b, by_256), c, by_256), d, by_256);
  finish(state, fold(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1), by_128()));
  return static_cast<std::size_t>(at - data);
}

// Four sums that are folded in turn, the oldest first.
struct Sums {
  __m256i a, b, c, d;
  const std::uint8_t* at;
  std::uint8_t* out;
};

inline __m256i load_block(const std::uint8_t* at) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at)); }

// The blocks of a ring from one distance up to the next, and as many blocks of other data by multiplication: that is
// bound by the multiplier and this by loads, so both together take hardly longer than one. In the last round only what
// the round before has left is folded, and nothing is multiplied.
template <int quarter, bool kCopy, bool kLast>
HFLFNERV_VPCLMULQDQ inline void fold_quarter(Sums& sums, std::uint8_t* ring, std::uint8_t* out,
                                             const std::uint8_t* data) {
  constexpr int kFirst = kLast ? quarter : 0;
  constexpr std::size_t kBegin = kQuarters[quarter], kEnd = kQuarters[quarter + 1];
  const __m256i by_1024 = _mm256_set_epi64x(0x14A7FE880, 0x1E88EF372, 0x14A7FE880, 0x1E88EF372);
  const std::uint8_t* from[3];
  for (int i = 0; i < 3; ++i) {
    from[i] = ring + (kBegin + (i < quarter ? 0 : kRingBlocks) - kDistances[i]) * kBlock;
  }
  ring += kBegin * kBlock;
  data += kBegin * kBlock;
  if constexpr (kCopy) out += kBegin * kBlock;
  Sums s = sums;
  for (std::size_t at = 0; at < (kEnd - kBegin) * kBlock; at += kBlock) {
    const __m256i block = load_block(data + at);
    if constexpr (kCopy) _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + at), block);
    __m256i sum = _mm256_xor_si256(load_block(ring + at), block);
    if constexpr (kFirst <= 0) sum = _mm256_xor_si256(sum, load_block(from[0] + at));
    if constexpr (kFirst <= 1) sum = _mm256_xor_si256(sum, load_block(from[1] + at));
    if constexpr (kFirst <= 2) sum = _mm256_xor_si256(sum, load_block(from[2] + at));
    _mm256_store_si256(reinterpret_cast<__m256i*>(ring + at), sum);
    if constexpr (!kLast) {
      const __m256i folded = fold(s.a, take<kCopy>(s.at, s.out), by_1024);
      s.a = s.b;
      s.b = s.c;
      s.c = s.d;
      s.d = folded;
    }
  }
  sums = s;
}

template <bool kCopy, bool kLast>
HFLFNERV_VPCLMULQDQ inline void fold_round(Sums& sums, std::uint8_t* ring, std::uint8_t* out,
                                           const std::uint8_t* data) {
  fold_quarter<0, kCopy, kLast>(sums, ring, out, data);
  fold_quarter<1, kCopy, kLast>(sums, ring, out, data);
  fold_quarter<2, kCopy, kLast>(sums, ring, out, data);
  fold_quarter<3, kCopy, kLast>(sums, ring, out, data);
}

// a * b * x^32 mod P.
inline std::uint32_t multiply(std::uint32_t a, std::uint32_t b) {
  const __m128i product = _mm_clmulepi64_si128(_mm_cvtsi32_si128(static_cast<int>(a)),
                                               _mm_cvtsi32_si128(static_cast<int>(b)), 0);
  alignas(16) std::uint8_t bytes[16];
  _mm_store_si128(reinterpret_cast<__m128i*>(bytes), _mm_slli_epi64(product, 1));
  return crc32_update(0, bytes, 8);
}

// The value advanced over zeros.
inline std::uint32_t advance(std::uint32_t state, std::size_t blocks) {
  std::uint32_t power = 0xAD2A31B3;  // x^256 / x^32
  for (; blocks > 0; blocks >>= 1) {
    if (blocks & 1) state = multiply(state, power);
    power = multiply(power, power);
  }
  return state;
}

HFLFNERV_VPCLMULQDQ inline void finish(std::uint32_t* state, const Sums& sums) {
  const __m256i by_256 = _mm256_set_epi64x(0x15A546366, 0x0F1DA05AA, 0x15A546366, 0x0F1DA05AA);
  const __m256i sum = fold(fold(fold(sums.a, sums.b, by_256), sums.c, by_256), sums.d, by_256);
  finish(state, fold(_mm256_castsi256_si128(sum), _mm256_extracti128_si256(sum, 1), by_128()));
}

// The first half of large data by multiplication, the second in a ring, side by side.
template <bool kCopy>
HFLFNERV_VPCLMULQDQ std::size_t fold_halves(std::uint32_t* state, std::uint8_t* out, const std::uint8_t* data,
                                            std::size_t size) {
  constexpr std::size_t kHead = 128;
  if (size < kHead + 9 * kRingBytes) return 0;
  const std::size_t rounds = (size - kHead - kRingBytes) / (2 * kRingBytes);
  const std::size_t half = kHead + rounds * kRingBytes;
  Sums sums{};
  sums.at = data;
  sums.out = out;
  const __m256i before = _mm256_zextsi128_si256(_mm_cvtsi32_si128(static_cast<int>(*state)));
  sums.a = _mm256_xor_si256(take<kCopy>(sums.at, sums.out), before);
  sums.b = take<kCopy>(sums.at, sums.out);
  sums.c = take<kCopy>(sums.at, sums.out);
  sums.d = take<kCopy>(sums.at, sums.out);
  alignas(64) std::uint8_t ring[kRingBytes] = {};
  std::size_t at = half;
  for (std::size_t i = 0; i < rounds; ++i, at += kRingBytes) {
    fold_round<kCopy, false>(sums, ring, kCopy ? out + at : nullptr, data + at);
  }
  fold_round<kCopy, true>(sums, ring, kCopy ? out + at : nullptr, data + at);
  std::uint32_t first = 0, second = 0;
  finish(&first, sums);
  const std::size_t folded = fold_wide<false>(&second, nullptr, ring, kRingBytes);
  second = crc32_update(second, ring + folded, kRingBytes - folded);
  *state = advance(first, (rounds + 1) * kRingBlocks) ^ second;
  return at + kRingBytes;
}

}  // namespace

std::size_t crc32_fold_avx2(std::uint32_t* state, const std::uint8_t* data, std::size_t size) {
  if (size < 128) return 0;
  const std::uint8_t* at = data;
  __m128i a = _mm_xor_si128(load(at), _mm_cvtsi32_si128(static_cast<int>(*state)));
  __m128i b = load(at + 16), c = load(at + 32), d = load(at + 48);
  at += 64;
  for (; data + size - at >= 64; at += 64) {
    a = fold(a, load(at), by_512());
    b = fold(b, load(at + 16), by_512());
    c = fold(c, load(at + 32), by_512());
    d = fold(d, load(at + 48), by_512());
  }
  finish(state, fold(fold(fold(a, b, by_128()), c, by_128()), d, by_128()));
  return static_cast<std::size_t>(at - data);
}

std::size_t crc32_fold_vpclmulqdq(std::uint32_t* state, const std::uint8_t* data, std::size_t size) {
  const std::size_t taken = fold_halves<false>(state, nullptr, data, size);
  return taken + fold_wide<false>(state, nullptr, data + taken, size - taken);
}

std::size_t crc32_fold_copy_vpclmulqdq(std::uint32_t* state, std::uint8_t* out, const std::uint8_t* data,
                                       std::size_t size) {
  const std::size_t taken = fold_halves<true>(state, out, data, size);
  return taken + fold_wide<true>(state, out + taken, data + taken, size - taken);
}

}  // namespace hflfnerv::detail
