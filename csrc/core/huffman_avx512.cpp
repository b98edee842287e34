// 8-bit symbols with AVX-512 (VBMI, VBMI2, GFNI): decoding with 32 chunks in the 16-bit lanes of a register, encoding
// of 64 symbols at a time, both with tables in registers. All else is the portable code, compiled for this instruction
// set.
#include <immintrin.h>

#include "huffman_kernels.inl"

namespace hflfnerv {
namespace {

// Four registers of 64-bit lanes against four of their 16-bit words: the transposition of the 4 x 4 words that lie in
// one 64-bit lane of all four. It is its own inverse.
inline void transpose4x4(__m512i v[4]) {
  const __mmask32 odd_words = 0xAAAAAAAA;
  const __mmask16 odd_dwords = 0xAAAA;
  const __m512i t0 = _mm512_mask_blend_epi16(odd_words, v[0], _mm512_slli_epi64(v[1], 16));
  const __m512i t1 = _mm512_mask_blend_epi16(odd_words, _mm512_srli_epi64(v[0], 16), v[1]);
  const __m512i t2 = _mm512_mask_blend_epi16(odd_words, v[2], _mm512_slli_epi64(v[3], 16));
  const __m512i t3 = _mm512_mask_blend_epi16(odd_words, _mm512_srli_epi64(v[2], 16), v[3]);
  v[0] = _mm512_mask_blend_epi32(odd_dwords, t0, _mm512_slli_epi64(t2, 32));
  v[1] = _mm512_mask_blend_epi32(odd_dwords, t1, _mm512_slli_epi64(t3, 32));
  v[2] = _mm512_mask_blend_epi32(odd_dwords, _mm512_srli_epi64(t0, 32), t2);
  v[3] = _mm512_mask_blend_epi32(odd_dwords, _mm512_srli_epi64(t1, 32), t3);
}

constexpr int kPerRound = 5;  // 5 codes of at most 11 bits fit in the 57 bits of a refill
constexpr int kBatch = 40;    // 8 rounds: 5 times 8 symbols of each chunk
constexpr int kLanes = 32;

template <int n>
struct Streams {
  static constexpr int value = n;
};

// What the canonical code needs instead of a table: a code of length l left-justified in 16 bits is below limit[l];
// then its rank among all symbols is the code plus an offset.
struct Canonical8 {
  // By a window's first 5 bits: what to subtract the window from, to get 16 - length in the highest 4 bits. A window
  // behind the bucket's first limit borrows 1 from them.
  __m512i buckets;
  __m512i limits[4];  // minus 1: of several limits in a bucket all but the first; those not needed are never exceeded
  __m512i offsets;    // by 16 - length, in each 128-bit lane
  __m512i symbols[4];
};

inline Canonical8 canonical8(const HuffmanDecodeTable& table, unsigned* extra) {
  constexpr std::uint32_t kBucket = 1u << 11;
  Canonical8 c;
  for (__m512i& unused : c.limits) unused = _mm512_set1_epi16(-1);
  alignas(64) std::uint8_t offsets[64] = {};
  std::uint32_t first[32] = {};   // the first limit within each bucket, from its start
  std::uint32_t before[33] = {};  // how many limits are passed where a bucket starts
  unsigned min_bits = 1;
  while (table.limit[min_bits] == 0) ++min_bits;
  std::uint32_t limit = 0;
  *extra = 0;
  for (unsigned l = min_bits; l <= table.max_bits; ++l) {
    if (table.limit[l] != 0) {
      limit = table.limit[l] << (16 - table.max_bits);
      for (int lane = 0; lane < 64; lane += 16) offsets[lane + 16 - l] = static_cast<std::uint8_t>(table.offset[l]);
    }
    if (l == table.max_bits) break;
    const std::uint32_t bucket = limit / kBucket, inside = limit % kBucket;
    if (inside == 0) {
      ++before[bucket];
    } else if (first[bucket] == 0) {
      first[bucket] = inside;
      ++before[bucket + 1];
    } else {
      // Only lengths 6 to 10 have limits inside a bucket, so there are at most four of these.
      c.limits[(*extra)++] = _mm512_set1_epi16(static_cast<short>(limit - 1));
    }
  }
  alignas(64) std::uint16_t buckets[32];
  std::uint32_t shift = 16 - min_bits;
  for (std::uint32_t b = 0; b < 32; ++b) {
    shift -= before[b];
    const std::uint32_t last = first[b] == 0 ? kBucket - 1 : first[b] - 1;
    buckets[b] = static_cast<std::uint16_t>((shift << 12) + b * kBucket + last);
  }
  alignas(64) std::uint8_t symbols[256] = {};
  for (std::size_t i = 0; i < table.symbols; ++i) symbols[i] = static_cast<std::uint8_t>(table.sorted[i]);
  c.buckets = _mm512_load_si512(buckets);
  c.offsets = _mm512_load_si512(offsets);
  for (int i = 0; i < 4; ++i) c.symbols[i] = _mm512_load_si512(symbols + 64 * i);
  return c;
}

// Bytes of ranks to bytes of symbols.
inline __m512i map_ranks(const Canonical8& c, __m512i ranks) {
  const __m512i low = _mm512_permutex2var_epi8(c.symbols[0], ranks, c.symbols[1]);
  const __m512i high = _mm512_permutex2var_epi8(c.symbols[2], ranks, c.symbols[3]);
  return _mm512_mask_blend_epi8(_mm512_movepi8_mask(ranks), low, high);
}

// Writes 40 symbols of each of 32 chunks; 8 of them of chunk 4q + i are 64-bit lane q of eights[..][i].
inline void write_batch(const __m512i eights[5][4], std::uint8_t* const rows[kLanes], std::size_t at) {
  const __m512i first = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11);
  const __m512i second = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
  for (int i = 0; i < 4; ++i) {
    const __m512i even[2] = {_mm512_unpacklo_epi64(eights[0][i], eights[1][i]),
                             _mm512_unpacklo_epi64(eights[2][i], eights[3][i])};
    const __m512i odd[2] = {_mm512_unpackhi_epi64(eights[0][i], eights[1][i]),
                            _mm512_unpackhi_epi64(eights[2][i], eights[3][i])};
    const auto store = [&](int q, __m512i two) {
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(rows[4 * q + i] + at), _mm512_castsi512_si256(two));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(rows[4 * (q + 2) + i] + at), _mm512_extracti64x4_epi64(two, 1));
    };
    store(0, _mm512_permutex2var_epi64(even[0], first, even[1]));
    store(1, _mm512_permutex2var_epi64(odd[0], first, odd[1]));
    store(4, _mm512_permutex2var_epi64(even[0], second, even[1]));
    store(5, _mm512_permutex2var_epi64(odd[0], second, odd[1]));
    const auto store_pair = [&](int q, __m128i pair) {
      _mm_storel_pi(reinterpret_cast<__m64*>(rows[4 * q + i] + at + 32), _mm_castsi128_ps(pair));
      _mm_storeh_pi(reinterpret_cast<__m64*>(rows[4 * (q + 1) + i] + at + 32), _mm_castsi128_ps(pair));
    };
    store_pair(0, _mm512_castsi512_si128(eights[4][i]));
    store_pair(2, _mm512_extracti64x2_epi64(eights[4][i], 1));
    store_pair(4, _mm512_extracti64x2_epi64(eights[4][i], 2));
    store_pair(6, _mm512_extracti64x2_epi64(eights[4][i], 3));
  }
}

// Decodes 8 rounds of `groups` times 32 chunks, 40 symbols of each, into the stages from `eight` on.
template <int groups, int extra>
void decode_batch(const Canonical8& c, const std::uint8_t* begin, __m512i position[][4],
                  std::uint8_t* const rows[][kLanes], std::size_t at) {
  const __m512i bytes_reversed =
      _mm512_broadcast_i32x4(_mm_set_epi8(8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7));
  const __m512i bits_reversed = _mm512_set1_epi64(static_cast<long long>(0x8040201008040201));
  const __m512i one = _mm512_set1_epi16(1);
  const __m512i low_byte = _mm512_set1_epi16(0xFF);
  __m512i pairs[groups][kBatch / 2];
  for (int round = 0; round < kBatch / kPerRound; round += 2) {
    __m512i ranks[groups][2 * kPerRound];
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      __m512i v[groups][4], taken[groups];
#pragma GCC unroll 2
      for (int g = 0; g < groups; ++g) {
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
          const __m512i at = _mm512_srli_epi64(position[g][i], 3);
          __m512i w = _mm512_i64gather_epi64(at, begin, 1);
          w = _mm512_srlv_epi64(w, _mm512_and_si512(position[g][i], _mm512_set1_epi64(7)));
          // The first bit of the stream becomes the most significant one, and the first word register 0.
          w = _mm512_gf2p8affine_epi64_epi8(_mm512_shuffle_epi8(w, bytes_reversed), bits_reversed, 0);
          v[g][i] = w;
        }
        transpose4x4(v[g]);
        taken[g] = _mm512_set1_epi16(16 * kPerRound);  // less five times 16 - length
      }
      // Registers 3, 2, 1, 0 now hold the words of each chunk in the order of the stream.
#pragma GCC unroll 5
      for (int i = 0; i < kPerRound; ++i) {
#pragma GCC unroll 2
        for (int g = 0; g < groups; ++g) {
          const __m512i window = v[g][3];
          __m512i shift = _mm512_permutexvar_epi16(_mm512_srli_epi16(window, 11), c.buckets);
          shift = _mm512_srli_epi16(_mm512_sub_epi16(shift, window), 12);
#pragma GCC unroll 4
          for (int t = 0; t < extra; ++t) {
            const __mmask32 beyond = _mm512_cmpgt_epu16_mask(window, c.limits[t]);
            shift = _mm512_mask_sub_epi16(shift, beyond, shift, one);
          }
          taken[g] = _mm512_sub_epi16(taken[g], shift);
          ranks[g][half * kPerRound + i] =
              _mm512_add_epi16(_mm512_srlv_epi16(window, shift), _mm512_shuffle_epi8(c.offsets, shift));
          // Only the words that later symbols of this round can reach are kept up to date.
          if (i < 4) v[g][3] = _mm512_shrdv_epi16(v[g][2], v[g][3], shift);
          if (i < 3) v[g][2] = _mm512_shrdv_epi16(v[g][1], v[g][2], shift);
          if (i < 2) v[g][1] = _mm512_shrdv_epi16(v[g][0], v[g][1], shift);
          if (i < 1) v[g][0] = _mm512_shrdv_epi16(_mm512_setzero_si512(), v[g][0], shift);
        }
      }
#pragma GCC unroll 2
      for (int g = 0; g < groups; ++g) {
        const __m512i word = _mm512_set1_epi64(0xFFFF);
        position[g][0] = _mm512_add_epi64(position[g][0], _mm512_and_si512(taken[g], word));
        position[g][1] = _mm512_add_epi64(position[g][1], _mm512_and_si512(_mm512_srli_epi64(taken[g], 16), word));
        position[g][2] = _mm512_add_epi64(position[g][2], _mm512_and_si512(_mm512_srli_epi64(taken[g], 32), word));
        position[g][3] = _mm512_add_epi64(position[g][3], _mm512_srli_epi64(taken[g], 48));
      }
    }
    for (int g = 0; g < groups; ++g) {
      for (int i = 0; i < kPerRound; ++i) {
        // low byte of the first, low byte of the second
        pairs[g][round / 2 * kPerRound + i] =
            _mm512_ternarylogic_epi64(low_byte, ranks[g][2 * i], _mm512_slli_epi16(ranks[g][2 * i + 1], 8), 0xEA);
      }
    }
  }
  for (int g = 0; g < groups; ++g) {
    __m512i eights[kBatch / 8][4];
    for (int e = 0; e < kBatch / 8; ++e) {
      for (int i = 0; i < 4; ++i) eights[e][i] = map_ranks(c, pairs[g][4 * e + i]);
      transpose4x4(eights[e]);
    }
    write_batch(eights, rows[g], at);
  }
}

// Decodes up to 32 * groups whole chunks. Lanes to spare repeat the last chunk.
template <int groups, int extra>
bool decode_lanes(const HuffmanDecodeTable& table, const Canonical8& c, const HuffmanChunks& chunks, std::size_t first,
                  std::size_t available, std::uint8_t* out) {
  const std::size_t count = chunks.chunk_symbols;
  const std::uint64_t size = static_cast<std::uint64_t>(chunks.payload_end - chunks.payload);
  constexpr std::uint64_t kMost = kBatch * kHuffmanRootBits8;
  alignas(64) std::uint64_t bits[groups][4][8];
  __m512i position[groups][4];
  for (std::size_t lane = 0; lane < groups * kLanes; ++lane) {
    const std::size_t chunk = first + (lane < available ? lane : available - 1);
    bits[lane / kLanes][lane % 4][lane % kLanes / 4] = chunks.offsets[chunk] * 8;
  }
  for (int g = 0; g < groups; ++g) {
    for (int i = 0; i < 4; ++i) position[g][i] = _mm512_load_si512(bits[g][i]);
  }
  std::uint8_t* rows[groups][kLanes];
  for (std::size_t lane = 0; lane < groups * kLanes; ++lane) {
    rows[lane / kLanes][lane % kLanes] = out + (lane < available ? lane : available - 1) * count;
  }
  std::size_t done = 0;
  // Whatever the bits are, a batch moves no chunk by more than kMost.
  for (;;) {
    __m512i furthest = position[0][0];
    for (int g = 0; g < groups; ++g) {
      for (int i = 0; i < 4; ++i) furthest = _mm512_max_epu64(furthest, position[g][i]);
    }
    const std::uint64_t bit = _mm512_reduce_max_epu64(furthest);
    const std::uint64_t safe = bit + 64 > size * 8 ? 0 : (size * 8 - 64 - bit) / kMost;
    std::size_t batches = (count - done) / kBatch;
    if (safe < batches) batches = safe;
    if (batches == 0) break;
    for (; batches > 0; --batches, done += kBatch) {
      decode_batch<groups, extra>(c, chunks.payload, position, rows, done);
    }
  }
  for (int g = 0; g < groups; ++g) {
    for (int i = 0; i < 4; ++i) _mm512_store_si512(bits[g][i], position[g][i]);
  }
  bool good = true;
  std::size_t lane = 0;
  while (lane < available) {
    const auto rest = [&](auto streams) {
      constexpr int n = decltype(streams)::value;
      std::uint64_t at[n];
      for (int s = 0; s < n; ++s) at[s] = bits[(lane + s) / kLanes][(lane + s) % 4][(lane + s) % kLanes / 4];
      good &=
          decode_streams<Symbol8, n>(table, chunks.payload, chunks.payload_end, at, chunks.offsets + first + lane + 1,
                                     count - done, count, out + lane * count + done);
      lane += n;
    };
    if (lane + 8 <= available) {
      rest(Streams<8>{});
    } else {
      rest(Streams<1>{});
    }
  }
  return good;
}

template <int groups>
bool decode_lanes(unsigned extra, const HuffmanDecodeTable& table, const Canonical8& c, const HuffmanChunks& chunks,
                  std::size_t first, std::size_t available, std::uint8_t* out) {
  if (extra == 0) return decode_lanes<groups, 0>(table, c, chunks, first, available, out);
  if (extra <= 2) return decode_lanes<groups, 2>(table, c, chunks, first, available, out);
  return decode_lanes<groups, 4>(table, c, chunks, first, available, out);
}

bool decode8_avx512(const HuffmanDecodeTable& table, const HuffmanChunks& chunks, std::uint8_t* out) {
  constexpr std::size_t kWorthwhile = 20;  // with fewer chunks the portable loops are as fast
  constexpr double kShort = 2.75;          // with codes shorter on average, several symbols a look-up are faster
  const std::size_t full = chunks.last_symbols == chunks.chunk_symbols ? chunks.chunks : chunks.chunks - 1;
  // That loop runs faster as compiled for AVX2.
  if (table.multi_steps != nullptr && table.mean_bits <= kShort) return kHuffmanKernelsAvx2.decode8(table, chunks, out);
  if (full < kWorthwhile || chunks.chunk_symbols < kBatch) return decode_chunks8<Rows>(table, chunks, out);
  unsigned extra = 0;
  const Canonical8 canonical = canonical8(table, &extra);
  std::size_t c = 0;
  bool good = true;
  while (full - c >= kWorthwhile) {
    const std::size_t available = full - c < 2 * kLanes ? full - c : 2 * kLanes;
    std::uint8_t* const to = out + c * chunks.chunk_symbols;
    if (available >= kLanes + kWorthwhile) {
      good &= decode_lanes<2>(extra, table, canonical, chunks, c, available, to);
      c += available;
    } else {
      const std::size_t some = available < kLanes ? available : kLanes;
      good &= decode_lanes<1>(extra, table, canonical, chunks, c, some, to);
      c += some;
    }
  }
  HuffmanChunks rest = chunks;
  rest.offsets += c;
  rest.chunks -= c;
  return (rest.chunks == 0 || decode_chunks8<Rows>(table, rest, out + c * chunks.chunk_symbols)) && good;
}

// Three bytes for each symbol: the code's low and high byte, and its length.
struct Codes8 {
  __m512i low[4], high[4], length[4];
};

inline __m512i look_up(const __m512i table[4], __m512i symbols, __mmask64 upper) {
  return _mm512_mask_blend_epi8(upper, _mm512_permutex2var_epi8(table[0], symbols, table[1]),
                                _mm512_permutex2var_epi8(table[2], symbols, table[3]));
}

// Joins the codes of 64 symbols into 16 strings of 4 codes, at most 44 bits each: even ones in strings[0], odd in [1].
inline void join64(const Codes8& codes, __m512i symbols, std::uint64_t strings[2][8], std::uint32_t lengths[16]) {
  const __m512i byte = _mm512_set1_epi16(0xFF);
  const __m512i word = _mm512_set1_epi32(0xFFFF);
  const __m512i dword = _mm512_set1_epi64(0xFFFFFFFF);
  const __mmask64 upper = _mm512_movepi8_mask(symbols);
  const __m512i low = look_up(codes.low, symbols, upper);
  const __m512i high = look_up(codes.high, symbols, upper);
  const __m512i length = look_up(codes.length, symbols, upper);
  // Codes of even and of odd symbols, in 16-bit lanes.
  const __m512i even = _mm512_or_si512(_mm512_and_si512(low, byte), _mm512_slli_epi16(high, 8));
  const __m512i odd = _mm512_or_si512(_mm512_srli_epi16(low, 8), _mm512_andnot_si512(byte, high));
  const __m512i even_length = _mm512_and_si512(length, byte);
  const __m512i pair_length = _mm512_add_epi16(even_length, _mm512_srli_epi16(length, 8));
  // Pairs of them, in 32-bit lanes.
  const __m512i first =
      _mm512_or_si512(_mm512_and_si512(even, word),
                      _mm512_sllv_epi32(_mm512_and_si512(odd, word), _mm512_and_si512(even_length, word)));
  const __m512i second = _mm512_or_si512(
      _mm512_srli_epi32(even, 16), _mm512_sllv_epi32(_mm512_srli_epi32(odd, 16), _mm512_srli_epi32(even_length, 16)));
  const __m512i first_length = _mm512_and_si512(pair_length, word);
  _mm512_store_si512(lengths, _mm512_add_epi32(first_length, _mm512_srli_epi32(pair_length, 16)));
  // And pairs of those, in 64-bit lanes.
  const __m512i shifted_even =
      _mm512_sllv_epi64(_mm512_and_si512(second, dword), _mm512_and_si512(first_length, dword));
  const __m512i shifted_odd = _mm512_sllv_epi64(_mm512_srli_epi64(second, 32), _mm512_srli_epi64(first_length, 32));
  _mm512_store_si512(strings[0], _mm512_or_si512(_mm512_and_si512(first, dword), shifted_even));
  _mm512_store_si512(strings[1], _mm512_or_si512(_mm512_srli_epi64(first, 32), shifted_odd));
}

std::uint8_t* encode8_avx512(const std::uint32_t* codes, unsigned max_bits, const std::uint8_t* symbols,
                             std::size_t count, std::size_t chunk_symbols, std::uint8_t* out, std::uint32_t* sizes) {
  if (chunk_symbols < 64)
    return encode_chunks<std::uint8_t>(codes, max_bits, symbols, count, chunk_symbols, out, sizes);
  alignas(64) std::uint8_t bytes[3][256];
  for (int symbol = 0; symbol < 256; ++symbol) {
    bytes[0][symbol] = static_cast<std::uint8_t>(codes[symbol]);
    bytes[1][symbol] = static_cast<std::uint8_t>(codes[symbol] >> 8);
    bytes[2][symbol] = static_cast<std::uint8_t>(codes[symbol] >> 24);
  }
  Codes8 tables;
  for (int i = 0; i < 4; ++i) {
    tables.low[i] = _mm512_load_si512(bytes[0] + 64 * i);
    tables.high[i] = _mm512_load_si512(bytes[1] + 64 * i);
    tables.length[i] = _mm512_load_si512(bytes[2] + 64 * i);
  }
  while (count > 0) {
    const std::size_t take = count < chunk_symbols ? count : chunk_symbols;
    // `bits` holds what belongs to the byte of bit `at` and to those behind it.
    std::uint64_t bits = 0, at = 0;
    const auto append = [&](std::uint64_t string, std::uint64_t length) {
      bits |= string << (at & 7);
      store64(out + (at >> 3), bits);
      const std::uint64_t next = at + length;
      bits >>= 8 * ((next >> 3) - (at >> 3));
      at = next;
    };
    std::size_t i = 0;
    for (; i + 64 <= take; i += 64) {
      alignas(64) std::uint64_t strings[2][8];
      alignas(64) std::uint32_t lengths[16];
      join64(tables, _mm512_loadu_si512(symbols + i), strings, lengths);
#pragma GCC unroll 8
      for (int j = 0; j < 8; ++j) {
        append(strings[0][j], lengths[2 * j]);
        append(strings[1][j], lengths[2 * j + 1]);
      }
    }
    for (; i < take; ++i) append(codes[symbols[i]] & 0xFFFFFF, codes[symbols[i]] >> 24);
    const std::uint64_t size = (at + 7) >> 3;
    *sizes++ = static_cast<std::uint32_t>(size);
    out += size;
    symbols += take;
    count -= take;
  }
  return out;
}

}  // namespace

const HuffmanKernels kHuffmanKernelsAvx512 = {
    decode8_avx512, decode_chunks<Symbol16>,      decode_prefix<Symbol8>, decode_prefix<Symbol16>,
    encode8_avx512, encode_chunks<std::uint16_t>, count_symbols8,         copy_bytes,
};

}  // namespace hflfnerv
