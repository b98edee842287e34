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
  const unsigned per_peek = 57 / table.max_bits;
  while (count > 0) {
    std::uint64_t bits = peek(begin, end, bit);
    for (unsigned i = 0; i < per_peek && count > 0; ++i, --count) {
      const auto entry = next<S>(table, root, mask, bits);
      *out++ = S::symbol(entry);
      bits >>= S::shift(entry);
      bit += S::shift(entry);
    }
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

constexpr int kLanes8 = 8;
constexpr int kStageRounds = 32;
constexpr int kStageSymbols = 5 * kStageRounds;  // of each lane

// Where decode_rounds puts the entry of a lane's i-th symbol, how far apart rounds are, and how the stage becomes
// bytes.
struct Rows {
  static constexpr int at(int lane, int i) { return lane * kStageSymbols + i; }
  static constexpr int kRound = 5;

  static void write(const std::uint16_t* stage, int count, std::uint8_t* const rows[kLanes8]) {
    for (int lane = 0; lane < kLanes8; ++lane) narrow(stage + at(lane, 0), count, rows[lane]);
  }
  static void narrow(const std::uint16_t* __restrict from, int count, std::uint8_t* __restrict to) {
    for (int i = 0; i < count; ++i) to[i] = static_cast<std::uint8_t>(from[i] >> 8);
  }
};

// Decodes `rounds` times five symbols of each of eight chunks from bit `position[lane]` on, codes of at most 11 bits.
// Table entries are stored as they are: to take the symbol out of each would be one more instruction for all, and they
// are made bytes many at a time.
// Not inlined, because the loop needs every register.
template <class Layout>
__attribute__((noinline)) void decode_rounds(const HuffmanDecodeTable& table, const std::uint8_t* begin,
                                             std::uint64_t position[kLanes8], int rounds, std::uint16_t* stage) {
  const std::uint16_t* const root = table.root8;
  const std::uint64_t mask = (std::uint64_t{1} << table.root_bits) - 1;
  const std::uint64_t marker = std::uint64_t{1} << 63;
  // Eight streams leave no registers for what is touched once a round. Volatile keeps that in memory and the streams
  // in registers, which compilers would choose the other way round; it also keeps them from joining the stores.
  const std::uint8_t* volatile at[kLanes8];
  std::uint64_t bits[kLanes8];
#pragma GCC unroll 8
  for (int s = 0; s < kLanes8; ++s) {
    const std::uint8_t* const from = begin + (position[s] >> 3);
    at[s] = from;
    bits[s] = (load64(from) | marker) >> (position[s] & 7);
  }
  volatile std::uint16_t* to = stage;
  volatile std::uint16_t* const until = to + rounds * Layout::kRound;
  do {
#pragma GCC unroll 5
    for (int i = 0; i < 5; ++i) {
#pragma GCC unroll 8
      for (int s = 0; s < kLanes8; ++s) {
        const std::uint16_t entry = root[bits[s] & mask];
        to[Layout::at(s, i)] = entry;
        bits[s] >>= Symbol8::shift(entry);
      }
    }
    to += Layout::kRound;
#pragma GCC unroll 8
    for (int s = 0; s < kLanes8; ++s) {
      const unsigned taken = static_cast<unsigned>(__builtin_clzll(bits[s]));
      const std::uint8_t* const from = at[s] + (taken >> 3);
      at[s] = from;
      bits[s] = (load64(from) | marker) >> (taken & 7);
    }
  } while (to != until);
  for (int s = 0; s < kLanes8; ++s) {
    const auto bytes = static_cast<std::uint64_t>(at[s] - begin);
    position[s] = bytes * 8 + static_cast<unsigned>(__builtin_clzll(bits[s]));
  }
}

// Decodes the next `count` symbols of eight chunks to `rows` and advances both.
template <class Layout>
void decode_lanes8(const HuffmanDecodeTable& table, const HuffmanChunks& chunks, std::uint64_t position[kLanes8],
                   std::size_t count, std::uint8_t* rows[kLanes8]) {
  const std::uint64_t size = static_cast<std::uint64_t>(chunks.payload_end - chunks.payload);
  const std::uint64_t most = std::uint64_t{5} * table.max_bits;
  alignas(64) std::uint16_t stage[kLanes8 * kStageSymbols];
  while (count >= 5 && size >= 8) {
    // A round takes at most `most` bits of a lane, so neither these rounds nor the load behind the last of them can
    // read behind the end, whatever the bits are.
    const std::uint64_t last = (size - 8) * 8 + 7;
    std::uint64_t furthest = 0;
    for (int s = 0; s < kLanes8; ++s) furthest = position[s] > furthest ? position[s] : furthest;
    if (furthest + most > last) break;
    std::uint64_t rounds = kStageRounds;
    if (count < kStageSymbols) rounds = count / 5;
    if (last - furthest < rounds * most) rounds = (last - furthest) / most;
    decode_rounds<Layout>(table, chunks.payload, position, static_cast<int>(rounds), stage);
    Layout::write(stage, static_cast<int>(rounds * 5), rows);
    for (int s = 0; s < kLanes8; ++s) rows[s] += rounds * 5;
    count -= rounds * 5;
  }
  for (int s = 0; s < kLanes8; ++s) {
    position[s] = decode_careful<Symbol8>(table, chunks.payload, chunks.payload_end, position[s], count, rows[s]);
    rows[s] += count;
  }
}

// Decodes three to eight chunks from `first` on, the last one perhaps shorter. Lanes to spare repeat another one.
template <class Layout>
bool decode_group8(const HuffmanDecodeTable& table, const HuffmanChunks& chunks, std::size_t first, int lanes,
                   std::uint8_t* out) {
  std::uint64_t position[kLanes8];
  std::uint8_t* rows[kLanes8];
  for (int s = 0; s < kLanes8; ++s) {
    const std::size_t chunk = first + static_cast<std::size_t>(s < lanes ? s : lanes - 1);
    position[s] = chunks.offsets[chunk] * 8;
    rows[s] = out + chunk * chunks.chunk_symbols;
  }
  const bool last = first + static_cast<std::size_t>(lanes) == chunks.chunks;
  const std::size_t common = last ? chunks.last_symbols : chunks.chunk_symbols;
  decode_lanes8<Layout>(table, chunks, position, common, rows);
  bool good = true;
  if (common < chunks.chunk_symbols) {
    good &= ends_at(chunks.payload, chunks.offsets[chunks.chunks], position[lanes - 1]);
    --lanes;
    for (int s = lanes; s < kLanes8; ++s) {
      position[s] = position[lanes - 1];
      rows[s] = rows[lanes - 1];
    }
    decode_lanes8<Layout>(table, chunks, position, chunks.chunk_symbols - common, rows);
  }
  for (int s = 0; s < lanes; ++s) {
    good &= ends_at(chunks.payload, chunks.offsets[first + static_cast<std::size_t>(s) + 1], position[s]);
  }
  return good;
}

constexpr int kMultiLookUps = 5;  // in a round
constexpr std::ptrdiff_t kMultiMostSymbols = kMultiLookUps * kHuffmanMultiMost;
constexpr std::uint64_t kMultiMostBits = kMultiLookUps * kHuffmanMultiBits;
static_assert(kMultiMostBits <= 56, "a refill lasts for its look-ups");

// Decodes the rest of a chunk, symbols [at, end), and says whether it ends at byte `chunk_end`. A look-up of several
// symbols stores eight bytes, so the last few are decoded one at a time.
inline bool finish_multi(const HuffmanDecodeTable& table, const HuffmanChunks& chunks, std::uint64_t position,
                         std::uint64_t chunk_end, std::uint8_t* at, const std::uint8_t* end) {
  constexpr auto kMost = static_cast<std::ptrdiff_t>(kHuffmanMultiMost);
  while (end - at >= kMost) {
    std::uint64_t bits = peek(chunks.payload, chunks.payload_end, position);
    for (int i = 0; i < kMultiLookUps && end - at >= kMost; ++i) {
      const std::uint64_t window = bits & (kHuffmanMultiWindows - 1);
      const std::uint64_t step = table.multi_steps[window];
      store64(at, table.multi_symbols[window]);
      at += step >> 6;
      bits >>= step & 63;
      position += step & 63;
    }
  }
  const auto left = static_cast<std::size_t>(end - at);
  position = decode_careful<Symbol8>(table, chunks.payload, chunks.payload_end, position, left, at);
  return ends_at(chunks.payload, chunk_end, position);
}

// A stream of decode_multi: a chunk, and those up to `last` to be decoded after it. A round that begins with `to` at
// `limit` or before it stores all where this stream is still to decode, and it and the refill behind it load all from
// within the payload.
struct MultiStream {
  const std::uint8_t* at;
  std::uint64_t bits;  // a 1 above the valid bits
  std::uint8_t* to;
  std::uint8_t* limit;
  std::uint8_t* end;  // of the chunk
  std::size_t chunk, last;
};

// Runs rounds until a stream is past its limit.
template <int streams>
__attribute__((noinline)) void run_multi(const HuffmanDecodeTable& table, MultiStream* stream) {
  constexpr std::uint64_t kMask = kHuffmanMultiWindows - 1;
  const std::uint64_t marker = std::uint64_t{1} << 63;
  const std::uint64_t* const symbols = table.multi_symbols;
  const std::uint16_t* const steps = table.multi_steps;
  std::uint64_t bits[streams];
  std::uint8_t* to[streams];
  const std::uint8_t* volatile at[streams];  // in memory, as in decode_rounds
  std::uint8_t* volatile limit[streams];
#pragma GCC unroll 8
  for (int s = 0; s < streams; ++s) {
    bits[s] = stream[s].bits;
    to[s] = stream[s].to;
    at[s] = stream[s].at;
    limit[s] = stream[s].limit;
  }
  bool within;
  do {
#pragma GCC unroll 5
    for (int i = 0; i < kMultiLookUps; ++i) {
#pragma GCC unroll 8
      for (int s = 0; s < streams; ++s) {
        const std::uint64_t window = bits[s] & kMask;
        std::uint64_t step = steps[window];
        asm("" : "+r"(step));  // else it is extended a second time, before it is shifted
        store64(to[s], symbols[window]);
        to[s] += step >> 6;
        bits[s] >>= step & 63;
      }
    }
    within = true;
#pragma GCC unroll 8
    for (int s = 0; s < streams; ++s) {
      const unsigned taken = static_cast<unsigned>(__builtin_clzll(bits[s]));
      const std::uint8_t* const from = at[s] + (taken >> 3);
      at[s] = from;
      bits[s] = (load64(from) | marker) >> (taken & 7);
      within &= to[s] <= limit[s];
    }
  } while (within);
#pragma GCC unroll 8
  for (int s = 0; s < streams; ++s) {
    stream[s].bits = bits[s];
    stream[s].to = to[s];
    stream[s].at = at[s];
  }
}

constexpr int kMultiStreams = 5;

inline void run_multi(const HuffmanDecodeTable& table, MultiStream* stream, int streams) {
  switch (streams) {
    case 5: return run_multi<5>(table, stream);
    case 4: return run_multi<4>(table, stream);
    case 3: return run_multi<3>(table, stream);
    case 2: return run_multi<2>(table, stream);
    default: return run_multi<1>(table, stream);
  }
}

// Decodes chunks by the table that yields several symbols a look-up. Each stream decodes a run of chunks in order, so
// that what it stores behind the end of one is decoded over; when it is through it takes half of what another has left.
inline bool decode_multi(const HuffmanDecodeTable& table, const HuffmanChunks& chunks, std::uint8_t* out) {
  const std::uint8_t* const begin = chunks.payload;
  const std::uint64_t size_bits = static_cast<std::uint64_t>(chunks.payload_end - begin) * 8;
  bool good = true;
  const auto out_of = [&](std::size_t chunk) {
    if (chunk < chunks.chunks) return out + chunk * chunks.chunk_symbols;
    return out + (chunk - 1) * chunks.chunk_symbols + chunks.last_symbols;
  };
  // Loads a stream from a position and sets its limit; false if not even one round is safe. A look-up gives a symbol at
  // least, so symbols measure how far the input may be used up.
  const auto load = [&](MultiStream& stream, std::uint64_t position) {
    const bool over = out_of(stream.last) - stream.end >= kMultiMostSymbols;
    const std::ptrdiff_t room = stream.end - stream.to - (over ? 1 : kMultiMostSymbols);
    if (room < 0 || position + kMultiMostBits + 64 > size_bits) return false;
    const std::uint64_t rounds = (size_bits - 64 - position) / kMultiMostBits;
    const std::uint64_t by_input = (rounds - 1) * kMultiLookUps;
    const auto by_output = static_cast<std::uint64_t>(room);
    stream.limit = stream.to + (by_input < by_output ? by_input : by_output);
    stream.at = begin + (position >> 3);
    stream.bits = (load64(stream.at) | std::uint64_t{1} << 63) >> (position & 7);
    return true;
  };
  const auto enter = [&](MultiStream& stream, std::size_t chunk) {
    stream.chunk = chunk;
    stream.to = out_of(chunk);
    stream.end = out_of(chunk + 1);
    return load(stream, chunks.offsets[chunk] * 8);
  };
  // Decodes what is left of a stream's chunk from `position` on, or goes back to the chunk's end, and checks it.
  const auto finish = [&](const MultiStream& stream, std::uint64_t position) {
    const std::uint64_t chunk_end = chunks.offsets[stream.chunk + 1];
    if (stream.to < stream.end) {
      good &= finish_multi(table, chunks, position, chunk_end, stream.to, stream.end);
      return;
    }
    for (const std::uint8_t* past = stream.end; past < stream.to; ++past) position -= table.lengths8[*past];
    good &= ends_at(begin, chunk_end, position);
  };
  // Enters the next chunk that is long enough for a round; false if the stream has none.
  const auto next = [&](MultiStream& stream) {
    while (stream.chunk + 1 < stream.last) {
      if (enter(stream, stream.chunk + 1)) return true;
      finish(stream, chunks.offsets[stream.chunk] * 8);
    }
    return false;
  };
  const auto start = [&](MultiStream& stream, std::size_t first, std::size_t last) {
    stream.last = last;
    if (enter(stream, first)) return true;
    finish(stream, chunks.offsets[first] * 8);
    return next(stream);
  };
  MultiStream stream[kMultiStreams];
  int running = 0;
  // Starts a stream in the second half of what the one with most left has behind its chunk and out of its reach.
  const auto take = [&](MultiStream& idle) {
    MultiStream* most = stream;
    for (int s = 1; s < running; ++s) {
      if (stream[s].last - stream[s].chunk > most->last - most->chunk) most = stream + s;
    }
    const std::size_t last = most->last, middle = (most->chunk + 1 + last) / 2;
    if (middle == last || out_of(middle) - most->end < kMultiMostSymbols) return false;
    most->last = middle;
    return start(idle, middle, last);
  };
  std::size_t first = 0;
  for (int left = kMultiStreams; left > 0; --left) {
    const std::size_t last = first + (chunks.chunks - first) / static_cast<std::size_t>(left);
    if (first < last && start(stream[running], first, last)) ++running;
    first = last;
  }
  while (running > 0) {
    run_multi(table, stream, running);
    for (int s = 0; s < running; ++s) {
      MultiStream& at = stream[s];
      if (at.to <= at.limit) continue;
      const auto bytes = static_cast<std::uint64_t>(at.at - begin);
      const std::uint64_t position = bytes * 8 + static_cast<unsigned>(__builtin_clzll(at.bits));
      if (at.to < at.end && load(at, position)) continue;
      finish(at, position);
      if (next(at) || take(at)) continue;
      at = stream[--running];
      --s;
    }
  }
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
  for (; c + 8 <= full; c += 8) good &= decode_chunks<S, 8>(table, chunks, c, chunks.chunk_symbols, out);
  for (; c + 2 <= full; c += 2) good &= decode_chunks<S, 2>(table, chunks, c, chunks.chunk_symbols, out);
  for (; c < full; ++c) good &= decode_chunks<S, 1>(table, chunks, c, chunks.chunk_symbols, out);
  if (c < chunks.chunks) good &= decode_chunks<S, 1>(table, chunks, c, chunks.last_symbols, out);
  return good;
}

// All of the above for 8-bit symbols.
template <class Layout>
bool decode_chunks8(const HuffmanDecodeTable& table, const HuffmanChunks& chunks, std::uint8_t* out) {
  if (table.multi_steps != nullptr) return decode_multi(table, chunks, out);
  std::size_t c = 0;
  bool good = true;
  constexpr std::size_t kWorthwhile = 3;  // with fewer chunks lanes to spare cost more than they give
  while (chunks.chunks - c >= kWorthwhile) {
    const std::size_t lanes = chunks.chunks - c < kLanes8 ? chunks.chunks - c : kLanes8;
    good &= decode_group8<Layout>(table, chunks, c, static_cast<int>(lanes), out);
    c += lanes;
  }
  HuffmanChunks rest = chunks;
  rest.offsets += c;
  rest.chunks -= c;
  return (rest.chunks == 0 || decode_chunks<Symbol8>(table, rest, out + c * chunks.chunk_symbols)) && good;
}

template <class S>
bool decode_prefix(const HuffmanDecodeTable& table, const std::uint8_t* begin, const std::uint8_t* end,
                   std::size_t count, typename S::Type* out) {
  return decode_careful<S>(table, begin, end, 0, count, out) <= static_cast<std::uint64_t>(end - begin) * 8;
}

// A code and its length apart: that saves two instructions a symbol.
struct SplitCode {
  std::uint32_t code, length;
};

inline std::uint64_t code_of(std::uint32_t packed) { return packed & 0xFFFFFF; }
inline unsigned length_of(std::uint32_t packed) { return packed >> 24; }
inline std::uint64_t code_of(const SplitCode& split) { return split.code; }
inline unsigned length_of(const SplitCode& split) { return split.length; }

template <class Code, class T, int per_flush>
std::uint8_t* encode_chunk(const Code* codes, const T* symbols, std::size_t count, std::uint8_t* out) {
  std::uint64_t bits = 0;
  unsigned used = 0;
  const auto put = [&](T symbol) {
    bits |= code_of(codes[symbol]) << used;
    used += length_of(codes[symbol]);
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

template <int per_flush, class Code, class T>
std::uint8_t* encode_chunks(const Code* codes, const T* symbols, std::size_t count, std::size_t chunk_symbols,
                            std::uint8_t* out, std::uint32_t* sizes) {
  while (count > 0) {
    const std::size_t take = count < chunk_symbols ? count : chunk_symbols;
    std::uint8_t* end = encode_chunk<Code, T, per_flush>(codes, symbols, take, out);
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
  if constexpr (sizeof(T) == 1) {
    SplitCode split[256];
    for (int symbol = 0; symbol < 256; ++symbol) split[symbol] = {codes[symbol] & 0xFFFFFF, codes[symbol] >> 24};
    return encode_chunks<5>(split, symbols, count, chunk_symbols, out, sizes);
  }
  if (max_bits <= 11) return encode_chunks<5>(codes, symbols, count, chunk_symbols, out, sizes);
  if (max_bits <= 14) return encode_chunks<4>(codes, symbols, count, chunk_symbols, out, sizes);
  if (max_bits <= 18) return encode_chunks<3>(codes, symbols, count, chunk_symbols, out, sizes);
  return encode_chunks<2>(codes, symbols, count, chunk_symbols, out, sizes);
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

inline void copy_bytes(std::uint8_t* out, const std::uint8_t* data, std::size_t size) {
  std::memcpy(out, data, size);
}

}  // namespace
}  // namespace hflfnerv
