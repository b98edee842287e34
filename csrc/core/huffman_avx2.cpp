// The portable loops compiled for AVX2 and BMI2; what eight lanes decode side by side is transposed in registers.
#include <immintrin.h>

#include "huffman_kernels.inl"

namespace hflfnerv {
namespace {

// The lanes' entries side by side: the stores of a step lie in one cache line, and the processor writes them faster.
struct Columns {
  static constexpr int at(int lane, int i) { return i * kLanes8 + lane; }
  static constexpr int kRound = 5 * kLanes8;

  static void write(const std::uint16_t* stage, int count, std::uint8_t* const rows[kLanes8]) {
    int i = 0;
    for (; i + 32 <= count; i += 32) write32(stage + at(0, i), rows, i);
    for (; i < count; ++i) {
      for (int lane = 0; lane < kLanes8; ++lane) rows[lane][i] = Symbol8::symbol(stage[at(lane, i)]);
    }
  }

  static void write32(const std::uint16_t* from, std::uint8_t* const rows[kLanes8], int i) {
    const __m256i high_byte = _mm256_set1_epi16(static_cast<short>(0xFF00));
    // Steps 4k and 4k + 2 of each lane in the words of the low half, 4k + 1 and 4k + 3 in those of the high half.
    __m256i a[8], b[8];
#pragma GCC unroll 8
    for (int k = 0; k < 8; ++k) {
      const __m256i first = _mm256_load_si256(reinterpret_cast<const __m256i*>(from + at(0, 4 * k)));
      const __m256i second = _mm256_load_si256(reinterpret_cast<const __m256i*>(from + at(0, 4 * k + 2)));
      a[k] = _mm256_or_si256(_mm256_srli_epi16(first, 8), _mm256_and_si256(second, high_byte));
    }
    // Transpose 8 x 8 words in each half.
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) {
      b[2 * k] = _mm256_unpacklo_epi16(a[2 * k], a[2 * k + 1]);
      b[2 * k + 1] = _mm256_unpackhi_epi16(a[2 * k], a[2 * k + 1]);
    }
#pragma GCC unroll 2
    for (int k = 0; k < 2; ++k) {
#pragma GCC unroll 2
      for (int j = 0; j < 2; ++j) {
        a[4 * k + 2 * j] = _mm256_unpacklo_epi32(b[4 * k + j], b[4 * k + 2 + j]);
        a[4 * k + 2 * j + 1] = _mm256_unpackhi_epi32(b[4 * k + j], b[4 * k + 2 + j]);
      }
    }
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      b[2 * j] = _mm256_unpacklo_epi64(a[j], a[4 + j]);
      b[2 * j + 1] = _mm256_unpackhi_epi64(a[j], a[4 + j]);
    }
#pragma GCC unroll 8
    for (int lane = 0; lane < kLanes8; ++lane) {
      const __m128i even = _mm256_castsi256_si128(b[lane]), odd = _mm256_extracti128_si256(b[lane], 1);
      __m128i* const to = reinterpret_cast<__m128i*>(rows[lane] + i);
      _mm_storeu_si128(to, _mm_unpacklo_epi8(even, odd));
      _mm_storeu_si128(to + 1, _mm_unpackhi_epi8(even, odd));
    }
  }
};

// memcpy moves strings where the processor has that (ERMS), and on Zen 3 such a move takes up to 20 times as long where the
// output lies less than a cache line ahead of the data, modulo a page, as any two allocations may. Stores of whole
// lines, with both sides fetched a kilobyte ahead (over the ends of pages, where the hardware stops), take 0.99 of what a
// good memcpy takes from the third cache, wherever the data lie.
void copy_lines(std::uint8_t* out, const std::uint8_t* data, std::size_t size) {
  constexpr std::size_t kLine = 64, kAhead = 1024;
  if (size < 2 * kLine) return copy_bytes(out, data, size);
  const std::size_t first = -reinterpret_cast<std::uintptr_t>(out) % kLine;
  copy_bytes(out, data, first);
  out += first, data += first, size -= first;
  for (; size >= kLine; size -= kLine, out += kLine, data += kLine) {
    __builtin_prefetch(data + kAhead);
    __builtin_prefetch(out + kAhead, 1);
    const __m256i low = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(data));
    const __m256i high = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(data) + 1);
    _mm256_store_si256(reinterpret_cast<__m256i*>(out), low);
    _mm256_store_si256(reinterpret_cast<__m256i*>(out) + 1, high);
  }
  copy_bytes(out, data, size);
}

}  // namespace

const HuffmanKernels kHuffmanKernelsAvx2 = {
    decode_chunks8<Columns>,     decode_chunks<Symbol16>,      decode_prefix<Symbol8>, decode_prefix<Symbol16>,
    encode_chunks<std::uint8_t>, encode_chunks<std::uint16_t>, count_symbols8,         copy_lines,
};

}  // namespace hflfnerv
