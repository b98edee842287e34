// Portable kernels, compiled once per instruction set. Everything is in an anonymous namespace and nothing from the
// standard library is instantiated here, so that no function built for one processor can be linked into another's path.

#include <cstring>

#include "huffman_kernels.h"

namespace hflfnerv {
namespace {

#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
inline std::uint64_t little(std::uint64_t value) { return __builtin_bswap64(value); }
#else
inline std::uint64_t little(std::uint64_t value) { return value; }
#endif

inline std::uint64_t load64(const std::uint8_t* at) {
  std::uint64_t value;
  std::memcpy(&value, at, 8);
  return little(value);
}

inline void store64(std::uint8_t* at, std::uint64_t value) {
  value = little(value);
  std::memcpy(at, &value, 8);
}

// Bits from `bit` on; bytes from `end` on read as zero. At least 57 bits are valid.
inline std::uint64_t peek(const std::uint8_t* begin, const std::uint8_t* end, std::uint64_t bit) {
  const std::uint64_t byte = bit >> 3;
  const std::uint64_t size = static_cast<std::uint64_t>(end - begin);
  std::uint64_t value = 0;
  if (byte + 8 <= size) {
    value = load64(begin + byte);
  } else {
    for (std::uint64_t i = byte; i < size; ++i) value |= std::uint64_t{begin[i]} << (8 * (i - byte));
  }
  return value >> (bit & 7);
}

struct Symbol8 {
  using Type = std::uint8_t;
  using Entry = std::uint16_t;
  static const Entry* root(const HuffmanDecodeTable& table) { return table.root8; }
  static Type symbol(Entry entry) { return static_cast<Type>(entry >> 8); }
  // Only the low 6 bits count, as in a 64-bit shift.
  static unsigned shift(Entry entry) { return entry & 63; }
  static constexpr bool kEscape = false;
};

struct Symbol16 {
  using Type = std::uint16_t;
  using Entry = std::uint32_t;
  static const Entry* root(const HuffmanDecodeTable& table) { return table.root16; }
  static Type symbol(Entry entry) { return static_cast<Type>(entry >> 16); }
  static unsigned shift(Entry entry) { return entry & 63; }
  static constexpr bool kEscape = true;
};

// The code that begins `bits`, which is longer than the root table's index.
inline std::uint32_t long_code(const HuffmanDecodeTable& table, std::uint64_t bits) {
  std::uint32_t value = __builtin_bswap32(static_cast<std::uint32_t>(bits));
  value = (value >> 4 & 0x0F0F0F0F) | (value & 0x0F0F0F0F) << 4;
  value = (value >> 2 & 0x33333333) | (value & 0x33333333) << 2;
  value = (value >> 1 & 0x55555555) | (value & 0x55555555) << 1;
  value >>= 32 - table.max_bits;
  unsigned length = table.root_bits + 1;
  while (length < table.max_bits && value >= table.limit[length]) ++length;
  const std::int32_t code = static_cast<std::int32_t>(value >> (table.max_bits - length));
  return std::uint32_t{table.sorted[code + table.offset[length]]} << 16 | length;
}

template <class S>
inline typename S::Entry next(const HuffmanDecodeTable& table, const typename S::Entry* root, std::uint64_t mask,
                              std::uint64_t bits) {
  typename S::Entry entry = root[bits & mask];
  if (S::kEscape && __builtin_expect(S::shift(entry) == 0, 0)) {
    entry = static_cast<typename S::Entry>(long_code(table, bits));
  }
  return entry;
}

// Decodes `count` symbols from bit position `bit` on and returns the position behind them; reads nothing from `end` on.
template <class S>
std::uint64_t decode_careful(const HuffmanDecodeTable& table, const std::uint8_t* begin, const std::uint8_t* end,
                             std::uint64_t bit, std::size_t count, typename S::Type* out) {
  const typename S::Entry* root = S::root(table);
  const std::uint64_t mask = (std::uint64_t{1} << table.root_bits) - 1;
  for (std::size_t i = 0; i < count; ++i) {
    const auto entry = next<S>(table, root, mask, peek(begin, end, bit));
    out[i] = S::symbol(entry);
    bit += S::shift(entry);
  }
  return bit;
}

// Whether a chunk that ends before byte `end` was used up at bit `bit`: less than a byte is left, and it is zero.
inline bool ends_at(const std::uint8_t* begin, std::uint64_t end, std::uint64_t bit) {
  if (bit > end * 8 || bit + 8 <= end * 8) return false;
  return (bit & 7) == 0 || begin[end - 1] >> (bit & 7) == 0;
}

// Decodes `count` symbols of each of `streams` chunks at once, from bit `starts[s]` to a byte before byte `ends[s]`. A
// stream holds at least 57 bits after a refill; a 1 above the valid bits marks how many have been taken, so that
// nothing has to be counted symbol by symbol.
template <class S, int streams, int per_refill>
bool decode_streams(const HuffmanDecodeTable& table, const std::uint8_t* begin, const std::uint8_t* end,
                    const std::uint64_t* starts, const std::uint64_t* ends, std::size_t count, std::size_t stride,
                    typename S::Type* out) {
  const typename S::Entry* root = S::root(table);
  const std::uint64_t mask = (std::uint64_t{1} << table.root_bits) - 1;
  const std::uint64_t size = static_cast<std::uint64_t>(end - begin);
  const std::uint64_t most = std::uint64_t{per_refill} * table.max_bits;
  std::uint64_t position[streams];
  for (int s = 0; s < streams; ++s) position[s] = starts[s];
  std::size_t done = 0;
  // A round takes at most `most` bits of a stream, so `rounds` of them cannot read behind the end, whatever the bits
  // are.
  while (count - done >= per_refill && size >= 8) {
    std::uint64_t rounds = (count - done) / per_refill;
    const std::uint64_t last = (size - 8) * 8 + 7;
    for (int s = 0; s < streams; ++s) {
      const std::uint64_t safe = position[s] > last ? 0 : (last - position[s]) / most + 1;
      if (safe < rounds) rounds = safe;
    }
    if (rounds == 0) break;
    typename S::Type* to = out + done;
    done += rounds * per_refill;
    for (; rounds > 0; --rounds, to += per_refill) {
      std::uint64_t bits[streams];
      for (int s = 0; s < streams; ++s) {
        bits[s] = load64(begin + (position[s] >> 3)) >> (position[s] & 7) | std::uint64_t{1} << 63;
      }
#pragma GCC unroll 8
      for (int i = 0; i < per_refill; ++i) {
#pragma GCC unroll 8
        for (int s = 0; s < streams; ++s) {
          const auto entry = next<S>(table, root, mask, bits[s]);
          to[s * stride + i] = S::symbol(entry);
          bits[s] >>= S::shift(entry);
        }
      }
      for (int s = 0; s < streams; ++s) position[s] += static_cast<unsigned>(__builtin_clzll(bits[s]));
    }
  }
  bool good = true;
  for (int s = 0; s < streams; ++s) {
    position[s] = decode_careful<S>(table, begin, end, position[s], count - done, out + s * stride + done);
    good &= ends_at(begin, ends[s], position[s]);
  }
  return good;
}

template <class S, int streams>
bool decode_streams(const HuffmanDecodeTable& table, const std::uint8_t* begin, const std::uint8_t* end,
                    const std::uint64_t* starts, const std::uint64_t* ends, std::size_t count, std::size_t stride,
                    typename S::Type* out) {
  if (table.max_bits <= 11) return decode_streams<S, streams, 5>(table, begin, end, starts, ends, count, stride, out);
  if (table.max_bits <= 14) return decode_streams<S, streams, 4>(table, begin, end, starts, ends, count, stride, out);
  if (table.max_bits <= 18) return decode_streams<S, streams, 3>(table, begin, end, starts, ends, count, stride, out);
  return decode_streams<S, streams, 2>(table, begin, end, starts, ends, count, stride, out);
}

// Decodes whole chunks of 8-bit symbols by the table that yields several symbols a look-up.
template <int streams>
bool decode_multi(const HuffmanDecodeTable& table, const HuffmanChunks& chunks, std::size_t first, std::size_t count,
                  std::uint8_t* out) {
  constexpr int kPerRefill = 5;
  constexpr std::size_t kMostSymbols = kPerRefill * kHuffmanMultiMost;
  static_assert(kPerRefill * kHuffmanMultiBits <= 56, "a refill lasts for its look-ups");
  constexpr std::uint64_t kMask = kHuffmanMultiWindows - 1;
  const std::uint64_t root_mask = (std::uint64_t{1} << table.root_bits) - 1;
  const std::uint8_t* const begin = chunks.payload;
  const std::uint64_t size = static_cast<std::uint64_t>(chunks.payload_end - begin);
  const std::uint64_t* const symbols = table.multi_symbols;
  const std::uint16_t* const steps = table.multi_steps;
  std::uint64_t position[streams];
  std::size_t at[streams], end[streams];
  for (int s = 0; s < streams; ++s) {
    position[s] = chunks.offsets[first + s] * 8;
    at[s] = (first + s) * chunks.chunk_symbols;
    end[s] = at[s] + count;
  }
  for (;;) {
    bool room = true;
    for (int s = 0; s < streams; ++s) room = room && at[s] + kMostSymbols <= end[s] && (position[s] >> 3) + 8 <= size;
    if (!room) break;
    std::uint64_t bits[streams];
    for (int s = 0; s < streams; ++s) {
      bits[s] = load64(begin + (position[s] >> 3)) >> (position[s] & 7) | std::uint64_t{1} << 63;
    }
#pragma GCC unroll 8
    for (int i = 0; i < kPerRefill; ++i) {
#pragma GCC unroll 8
      for (int s = 0; s < streams; ++s) {
        const std::uint64_t window = bits[s] & kMask;
        const std::uint64_t step = steps[window];
        store64(out + at[s], symbols[window]);
        at[s] += step >> 6;
        bits[s] >>= step & 63;
      }
    }
    for (int s = 0; s < streams; ++s) position[s] += static_cast<unsigned>(__builtin_clzll(bits[s]));
  }
  // The ends, still in turn: a look-up must not give more than what is left.
  for (bool more = true; more;) {
    more = false;
    for (int s = 0; s < streams; ++s) {
      if (at[s] == end[s]) continue;
      const std::uint64_t bits = peek(begin, chunks.payload_end, position[s]);
      if (end[s] - at[s] >= kHuffmanMultiMost) {
        const std::uint64_t window = bits & kMask;
        store64(out + at[s], symbols[window]);
        at[s] += steps[window] >> 6;
        position[s] += steps[window] & 63;
      } else {
        const std::uint16_t entry = table.root8[bits & root_mask];
        out[at[s]++] = Symbol8::symbol(entry);
        position[s] += Symbol8::shift(entry);
      }
      more = true;
    }
  }
  bool good = true;
  for (int s = 0; s < streams; ++s) good &= ends_at(begin, chunks.offsets[first + s + 1], position[s]);
  return good;
}

template <class S, int streams>
bool decode_chunks(const HuffmanDecodeTable& table, const HuffmanChunks& chunks, std::size_t first, std::size_t count,
                   typename S::Type* out) {
  std::uint64_t starts[streams];
  for (int s = 0; s < streams; ++s) starts[s] = chunks.offsets[first + s] * 8;
  return decode_streams<S, streams>(table, chunks.payload, chunks.payload_end, starts, chunks.offsets + first + 1,
                                    count, chunks.chunk_symbols, out + first * chunks.chunk_symbols);
}

template <class S>
bool decode_chunks(const HuffmanDecodeTable& table, const HuffmanChunks& chunks, typename S::Type* out) {
  const std::size_t full = chunks.last_symbols == chunks.chunk_symbols ? chunks.chunks : chunks.chunks - 1;
  std::size_t c = 0;
  bool good = true;
  if constexpr (sizeof(typename S::Type) == 1) {
    if (table.multi_steps != nullptr) {
      for (; c + 5 <= full; c += 5) good &= decode_multi<5>(table, chunks, c, chunks.chunk_symbols, out);
      for (; c < full; ++c) good &= decode_multi<1>(table, chunks, c, chunks.chunk_symbols, out);
      return (c == chunks.chunks || decode_multi<1>(table, chunks, c, chunks.last_symbols, out)) && good;
    }
  }
  for (; c + 8 <= full; c += 8) good &= decode_chunks<S, 8>(table, chunks, c, chunks.chunk_symbols, out);
  for (; c + 2 <= full; c += 2) good &= decode_chunks<S, 2>(table, chunks, c, chunks.chunk_symbols, out);
  for (; c < full; ++c) good &= decode_chunks<S, 1>(table, chunks, c, chunks.chunk_symbols, out);
  if (c < chunks.chunks) good &= decode_chunks<S, 1>(table, chunks, c, chunks.last_symbols, out);
  return good;
}

template <class S>
bool decode_prefix(const HuffmanDecodeTable& table, const std::uint8_t* begin, const std::uint8_t* end,
                   std::size_t count, typename S::Type* out) {
  return decode_careful<S>(table, begin, end, 0, count, out) <= static_cast<std::uint64_t>(end - begin) * 8;
}

template <class T, int per_flush>
std::uint8_t* encode_chunk(const std::uint32_t* codes, const T* symbols, std::size_t count, std::uint8_t* out) {
  std::uint64_t bits = 0;
  unsigned used = 0;
  const auto put = [&](T symbol) {
    const std::uint32_t code = codes[symbol];
    bits |= std::uint64_t{code & 0xFFFFFF} << used;
    used += code >> 24;
  };
  const auto flush = [&] {
    store64(out, bits);
    out += used >> 3;
    bits >>= used & 56;
    used &= 7;
  };
  std::size_t i = 0;
  for (; i + per_flush <= count; i += per_flush) {
#pragma GCC unroll 8
    for (int j = 0; j < per_flush; ++j) put(symbols[i + j]);
    flush();
  }
  for (; i < count; ++i) {
    put(symbols[i]);
    flush();
  }
  if (used > 0) *out++ = static_cast<std::uint8_t>(bits);
  return out;
}

template <class T, int per_flush>
std::uint8_t* encode_chunks(const std::uint32_t* codes, const T* symbols, std::size_t count, std::size_t chunk_symbols,
                            std::uint8_t* out, std::uint32_t* sizes) {
  while (count > 0) {
    const std::size_t take = count < chunk_symbols ? count : chunk_symbols;
    std::uint8_t* end = encode_chunk<T, per_flush>(codes, symbols, take, out);
    *sizes++ = static_cast<std::uint32_t>(end - out);
    out = end;
    symbols += take;
    count -= take;
  }
  return out;
}

// At most 7 bits are left over from the last flush.
template <class T>
std::uint8_t* encode_chunks(const std::uint32_t* codes, unsigned max_bits, const T* symbols, std::size_t count,
                            std::size_t chunk_symbols, std::uint8_t* out, std::uint32_t* sizes) {
  if (max_bits <= 11) return encode_chunks<T, 5>(codes, symbols, count, chunk_symbols, out, sizes);
  if (max_bits <= 14) return encode_chunks<T, 4>(codes, symbols, count, chunk_symbols, out, sizes);
  if (max_bits <= 18) return encode_chunks<T, 3>(codes, symbols, count, chunk_symbols, out, sizes);
  return encode_chunks<T, 2>(codes, symbols, count, chunk_symbols, out, sizes);
}

// Eight tables, so that a run of equal symbols does not wait for its own last increment.
void count_symbols8(const std::uint8_t* symbols, std::size_t count, std::uint64_t* counts) {
  constexpr std::size_t kBlock = std::size_t{1} << 30;
  std::uint32_t tables[8][256];
  while (count > 0) {
    const std::size_t block = count < kBlock ? count : kBlock;
    std::memset(tables, 0, sizeof(tables));
    std::size_t i = 0;
    for (; i + 8 <= block; i += 8) {
      const std::uint64_t eight = load64(symbols + i);
#pragma GCC unroll 8
      for (int j = 0; j < 8; ++j) ++tables[j][eight >> (8 * j) & 0xFF];
    }
    for (; i < block; ++i) ++tables[0][symbols[i]];
    for (int symbol = 0; symbol < 256; ++symbol) {
      for (int j = 0; j < 8; ++j) counts[symbol] += tables[j][symbol];
    }
    symbols += block;
    count -= block;
  }
}

}  // namespace
}  // namespace hflfnerv
