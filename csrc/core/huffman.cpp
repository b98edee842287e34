#include "huffman.h"

#include <algorithm>
#include <cstring>

#include "crc32.h"
#include "huffman_kernels.h"

namespace hflfnerv {
namespace {

constexpr std::uint8_t kMagic[4] = {'H', 'F', 'L', 'H'};
constexpr std::uint8_t kVersion = 1;
constexpr std::size_t kCrcAt = 5;
constexpr std::size_t kBodySizeAt = 9;
constexpr std::size_t kBodyAt = 15;

// From how many symbols on, and up to which mean length of a code, a table that yields several symbols a look-up pays.
constexpr std::uint64_t kMultiSymbols = 1 << 14;
constexpr double kMultiMeanBits = 5;

// From how many 8-bit symbols on a sample of them is looked at first.
constexpr std::uint64_t kSampledSymbols = 1 << 16;

enum Mode : std::uint8_t { kRaw = 0, kConstant = 1, kHuffman = 2 };

const HuffmanKernels& kernels(SimdLevel level) {
#if defined(HFLFNERV_HAVE_AVX512)
  if (level == SimdLevel::avx512) return kHuffmanKernelsAvx512;
#endif
#if defined(HFLFNERV_HAVE_AVX2)
  if (level >= SimdLevel::avx2) return kHuffmanKernelsAvx2;
#endif
  (void)level;
  return kHuffmanKernelsScalar;
}

constexpr std::uint32_t alphabet_size(SymbolType type) { return type == SymbolType::u8 ? 256 : 65536; }

// An index counts symbols from the smallest value of their type; memory holds the two's complement pattern.
constexpr std::uint16_t pattern_of(SymbolType type, std::uint32_t index) {
  return static_cast<std::uint16_t>(type == SymbolType::u8 ? index : index ^ 0x8000u);
}

std::uint32_t reverse_bits(std::uint32_t value, unsigned count) {
  std::uint32_t result = 0;
  for (unsigned i = 0; i < count; ++i) result |= (value >> i & 1) << (count - 1 - i);
  return result;
}

#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
constexpr bool kLittleEndian = false;
#else
constexpr bool kLittleEndian = true;
#endif

// Turns little-endian words, as data has them, into the machine's, in place.
void from_little(std::uint16_t* words, std::uint64_t count) {
  if constexpr (kLittleEndian) return;
  for (std::uint64_t i = 0; i < count; ++i) words[i] = __builtin_bswap16(words[i]);
}

unsigned bit_width(std::uint64_t value) { return value == 0 ? 0 : 64 - static_cast<unsigned>(__builtin_clzll(value)); }

// ---- reading and writing fields ----

void put_little(std::uint8_t* at, std::uint64_t value, unsigned bytes) {
  for (unsigned i = 0; i < bytes; ++i) at[i] = static_cast<std::uint8_t>(value >> (8 * i));
}

std::uint64_t get_little(const std::uint8_t* at, unsigned bytes) {
  std::uint64_t value = 0;
  for (unsigned i = 0; i < bytes; ++i) value |= std::uint64_t{at[i]} << (8 * i);
  return value;
}

void put_varint(std::vector<std::uint8_t>& out, std::uint64_t value) {
  while (value >= 0x80) {
    out.push_back(static_cast<std::uint8_t>(value | 0x80));
    value >>= 7;
  }
  out.push_back(static_cast<std::uint8_t>(value));
}

struct BitWriter {
  std::vector<std::uint8_t>& out;
  unsigned used = 8;  // bits of the last byte

  void put(std::uint64_t value, unsigned count) {
    for (unsigned i = 0; i < count; ++i) {
      if (used == 8) {
        out.push_back(0);
        used = 0;
      }
      out.back() = static_cast<std::uint8_t>(out.back() | (value >> i & 1) << used);
      ++used;
    }
  }
  void put_unary(unsigned ones) {
    for (unsigned i = 0; i < ones; ++i) put(1, 1);
    put(0, 1);
  }
};

struct Reader {
  const std::uint8_t* at;
  const std::uint8_t* end;
  unsigned used = 0;  // bits of *at that are taken
  bool good = true;

  std::size_t left() const { return static_cast<std::size_t>(end - at); }

  std::uint8_t byte() {
    if (at == end) {
      good = false;
      return 0;
    }
    return *at++;
  }
  std::uint64_t little(unsigned bytes) {
    if (left() < bytes) {
      good = false;
      return 0;
    }
    const std::uint64_t value = get_little(at, bytes);
    at += bytes;
    return value;
  }
  // At most 8 bytes, the shortest form only.
  std::uint64_t varint() {
    std::uint64_t value = 0;
    for (unsigned i = 0; i < 8; ++i) {
      const std::uint8_t next = byte();
      value |= std::uint64_t{next & 0x7Fu} << (7 * i);
      if (next < 0x80) {
        if (next == 0 && i > 0) good = false;
        return value;
      }
    }
    good = false;
    return 0;
  }
  // At most 32 bits.
  std::uint64_t bits(unsigned count) {
    if (left() >= 8) {
      const std::uint64_t value = get_little(at, 8) >> used & ((std::uint64_t{1} << count) - 1);
      at += (used + count) >> 3;
      used = (used + count) & 7;
      return value;
    }
    std::uint64_t value = 0;
    for (unsigned i = 0; i < count; ++i) {
      if (at == end) {
        good = false;
        return 0;
      }
      value |= std::uint64_t{*at >> used & 1u} << i;
      if (++used == 8) {
        used = 0;
        ++at;
      }
    }
    return value;
  }
  unsigned unary(unsigned most) {
    unsigned ones = 0;
    while (good && bits(1) == 1) {
      if (++ones > most) {
        good = false;
        return 0;
      }
    }
    return ones;
  }
  // Skips to the next byte; what is skipped must be zero.
  void align() {
    if (used > 0) {
      if (*at >> used != 0) good = false;
      used = 0;
      ++at;
    }
  }
};

// ---- code tables ----

struct CodedSymbol {
  std::uint16_t index;
  std::uint8_t length;
};

// Appends the code lengths, symbols in ascending order.
void write_table(const std::vector<CodedSymbol>& symbols, std::vector<std::uint8_t>& out) {
  put_varint(out, symbols.front().index);
  put_varint(out, static_cast<std::uint64_t>(symbols.back().index - symbols.front().index));
  BitWriter bits{out};
  bits.put(symbols.front().length, 5);
  for (std::size_t i = 1; i < symbols.size(); ++i) {
    const unsigned absent = static_cast<unsigned>(symbols[i].index - symbols[i - 1].index - 1);
    if (absent > 0) {
      const unsigned width = bit_width(absent) - 1;
      bits.put(3, 3);
      bits.put_unary(width);
      bits.put(absent, width);
    }
    const int delta = int{symbols[i].length} - int{symbols[i - 1].length};
    const unsigned size = static_cast<unsigned>(delta < 0 ? -delta : delta);
    if (size == 0) {
      bits.put(0, 1);
    } else if (size == 1) {
      bits.put(1, 2);
      bits.put(delta < 0, 1);
    } else {
      bits.put(7, 3);
      bits.put_unary(size - 2);
      bits.put(delta < 0, 1);
    }
  }
}

bool read_table(Reader& in, SymbolType type, std::vector<CodedSymbol>& symbols) {
  const std::uint64_t first = in.varint();
  const std::uint64_t span = in.varint();
  if (!in.good || first >= alphabet_size(type) || span == 0 || span >= alphabet_size(type) - first) return false;
  const std::uint32_t last = static_cast<std::uint32_t>(first + span);
  const unsigned max_bits = huffman_max_bits(type);
  std::uint32_t index = static_cast<std::uint32_t>(first);
  int length = static_cast<int>(in.bits(5));
  bool after_gap = false;
  std::uint64_t kraft = 0;
  const std::uint64_t whole = std::uint64_t{1} << max_bits;
  for (;;) {
    if (!in.good || length < 1 || length > static_cast<int>(max_bits)) return false;
    symbols.push_back({static_cast<std::uint16_t>(index), static_cast<std::uint8_t>(length)});
    kraft += whole >> length;
    if (kraft > whole) return false;
    if (index == last) break;
    ++index;
    after_gap = false;
    for (;;) {
      if (in.bits(1) == 0) break;
      if (in.bits(1) == 0) {
        length += in.bits(1) ? -1 : 1;
        break;
      }
      if (in.bits(1) == 1) {
        const int size = static_cast<int>(in.unary(max_bits)) + 2;
        length += in.bits(1) ? -size : size;
        break;
      }
      const unsigned width = in.unary(16);
      if (!in.good) return false;
      const std::uint64_t absent = std::uint64_t{1} << width | in.bits(width);
      if (after_gap || absent > last - index) return false;
      index += static_cast<std::uint32_t>(absent);
      after_gap = true;
    }
  }
  in.align();
  return in.good && kraft == whole;
}

// The canonical code: codes ascend with (length, index). `visit(symbol, code)` is called in that order.
template <class Visit>
void assign_codes(const std::vector<CodedSymbol>& symbols, Visit&& visit) {
  std::uint32_t counts[kHuffmanMaxBits + 2] = {};
  for (const CodedSymbol& symbol : symbols) ++counts[symbol.length];
  std::uint32_t starts[kHuffmanMaxBits + 2] = {};
  for (unsigned length = 1; length <= kHuffmanMaxBits; ++length) starts[length + 1] = starts[length] + counts[length];
  std::vector<CodedSymbol> sorted(symbols.size());
  for (const CodedSymbol& symbol : symbols) sorted[starts[symbol.length]++] = symbol;
  std::uint32_t code = 0;
  unsigned length = sorted.front().length;
  for (const CodedSymbol& symbol : sorted) {
    code <<= symbol.length - length;
    length = symbol.length;
    visit(symbol, code++);
  }
}

}  // namespace

// What a group of arrays shares: the mode, the table, the chunks.
struct HuffmanGroup {
  SymbolType type = SymbolType::u8;
  Mode mode = kRaw;
  std::uint64_t count = 0;
  std::vector<std::size_t> members;  // its arrays that are not empty
  std::vector<CodedSymbol> symbols;
  std::uint64_t chunk_symbols = 0;
  std::uint64_t chunks = 0;
  // Encoder.
  std::vector<std::uint8_t> head;
  std::vector<std::uint32_t> codes;  // by bit pattern
  unsigned max_bits = 0;
  // Decoder.
  const std::uint8_t* payload = nullptr;
  const std::uint8_t* payload_end = nullptr;
  std::uint16_t constant = 0;
  std::vector<std::uint64_t> offsets;

  Status decode(const HuffmanKernels& k, std::uint64_t begin, std::uint64_t end, void* out) const;
  template <class T>
  bool decode_range(const HuffmanKernels& k, const HuffmanDecodeTable& table, std::uint64_t begin, std::uint64_t end,
                    T* out) const;
};

void huffman_code_lengths(const std::uint64_t* counts, std::size_t size, unsigned max_bits, std::uint8_t* lengths) {
  std::memset(lengths, 0, size);
  std::vector<std::size_t> order;
  for (std::size_t i = 0; i < size; ++i) {
    if (counts[i] > 0) order.push_back(i);
  }
  const std::size_t leaves = order.size();
  if (leaves < 2) {
    if (leaves == 1) lengths[order[0]] = 1;
    return;
  }
  std::stable_sort(order.begin(), order.end(), [&](std::size_t a, std::size_t b) { return counts[a] < counts[b]; });
  std::vector<std::uint64_t> weights(leaves);
  for (std::size_t i = 0; i < leaves; ++i) weights[i] = counts[order[i]];
  // Package-merge. Level by level, leaves and pairs of the level before are merged by weight, a leaf before a pair of
  // equal weight; of the last level the 2n - 2 lightest are taken, and of the others what those contain.
  std::vector<std::vector<std::uint8_t>> is_leaf(max_bits);
  std::vector<std::uint64_t> items, pairs;
  for (unsigned level = 0; level < max_bits; ++level) {
    const std::size_t size = leaves + pairs.size();
    items.resize(size);
    is_leaf[level].resize(size);
    std::size_t leaf = 0, pair = 0;
    for (std::size_t i = 0; i < size; ++i) {
      const bool take_leaf = pair == pairs.size() || (leaf < leaves && weights[leaf] <= pairs[pair]);
      items[i] = take_leaf ? weights[leaf++] : pairs[pair++];
      is_leaf[level][i] = take_leaf;
    }
    pairs.resize(size / 2);
    for (std::size_t i = 0; i < size / 2; ++i) pairs[i] = items[2 * i] + items[2 * i + 1];
  }
  std::size_t taken = 2 * leaves - 2;
  for (unsigned level = max_bits; level-- > 0 && taken > 0;) {
    std::size_t leaf = 0;
    for (std::size_t i = 0; i < taken; ++i) {
      if (is_leaf[level][i]) ++lengths[order[leaf++]];
    }
    taken = 2 * (taken - leaf);
  }
}

// ---- encoder ----

HuffmanEncoder::HuffmanEncoder(SimdLevel level) : level_(level) {}
HuffmanEncoder::~HuffmanEncoder() = default;

void HuffmanEncoder::add(SymbolType type, std::vector<std::uint64_t> dims, const void* data, std::uint32_t group) {
  ArrayShape array;
  array.type = type;
  array.count = 1;
  for (const std::uint64_t dim : dims) array.count *= dim;
  array.dims = std::move(dims);
  array.group = group;
  if (group == groups_.size()) {
    groups_.push_back(std::make_unique<HuffmanGroup>());
    groups_.back()->type = type;
  }
  array.offset = groups_[group]->count;
  groups_[group]->count += array.count;
  if (array.count > 0) groups_[group]->members.push_back(arrays_.size());
  arrays_.push_back(std::move(array));
  data_.push_back(data);
}

namespace {

// Adds to the counts of all symbols by index.
void count_symbols(const HuffmanKernels& k, SymbolType type, const void* data, std::uint64_t count,
                   std::uint64_t* counts) {
  const std::uint8_t* bytes = static_cast<const std::uint8_t*>(data);
  const std::size_t width = symbol_bytes(type);
  // Equal symbols are found fast, and would be counted slowly.
  if (std::memcmp(bytes, bytes + width, (count - 1) * width) == 0) {
    std::uint16_t first = bytes[0];
    if (type == SymbolType::i16) std::memcpy(&first, bytes, 2);
    counts[pattern_of(type, first)] += count;  // its own inverse
  } else if (type == SymbolType::u8) {
    k.count8(bytes, count, counts);
  } else {
    const std::uint16_t* symbols = static_cast<const std::uint16_t*>(data);
    for (std::uint64_t i = 0; i < count; ++i) ++counts[pattern_of(type, symbols[i])];
  }
}

// Whether the first 64 of every 1,024 of many symbols would gain less than 1/256 by a code of their own.
bool looks_incompressible(const HuffmanKernels& k, const std::uint8_t* symbols, std::uint64_t count) {
  if (count < kSampledSymbols) return false;
  std::uint64_t counts[256] = {};
  std::vector<std::uint8_t> sample(((count - 64) / 1024 + 1) * 64);
  for (std::size_t i = 0; i < sample.size() / 64; ++i) std::memcpy(sample.data() + 64 * i, symbols + 1024 * i, 64);
  k.count8(sample.data(), sample.size(), counts);
  std::uint8_t lengths[256];
  huffman_code_lengths(counts, 256, huffman_max_bits(SymbolType::u8), lengths);
  std::uint64_t bits = 0;
  for (int index = 0; index < 256; ++index) bits += counts[index] * lengths[index];
  return bits * 256 >= sample.size() * 8 * 255;
}

}  // namespace

void HuffmanEncoder::plan(bool list, std::uint64_t chunk_symbols) {
  list_ = list;
  chunk_symbols_ = chunk_symbols;
  const HuffmanKernels& k = kernels(level_);
  bound_ = kBodyAt + 1 + 16;
  for (const ArrayShape& array : arrays_) bound_ += 2 + 8 * array.dims.size() + 8;

  std::vector<std::uint64_t> counts;
  std::vector<std::uint8_t> lengths;
  for (const std::unique_ptr<HuffmanGroup>& owner : groups_) {
    HuffmanGroup& group = *owner;
    const std::uint32_t alphabet = alphabet_size(group.type);
    const std::uint64_t raw_bytes = group.count * symbol_bytes(group.type);
    counts.assign(alphabet, 0);
    lengths.assign(alphabet, 0);
    if (group.members.size() == 1 && group.type == SymbolType::u8 &&
        looks_incompressible(k, static_cast<const std::uint8_t*>(data_[group.members[0]]), group.count)) {
      bound_ += 1 + raw_bytes;
      continue;
    }
    for (const std::size_t i : group.members) count_symbols(k, group.type, data_[i], arrays_[i].count, counts.data());
    huffman_code_lengths(counts.data(), alphabet, huffman_max_bits(group.type), lengths.data());
    std::uint64_t bits = 0;
    for (std::uint32_t index = 0; index < alphabet; ++index) {
      if (lengths[index] == 0) continue;
      group.symbols.push_back({static_cast<std::uint16_t>(index), lengths[index]});
      bits += counts[index] * lengths[index];
    }
    std::size_t payload_bound = raw_bytes;
    if (group.symbols.size() == 1) {
      group.mode = kConstant;
      payload_bound = 0;
    } else if (group.symbols.size() > 1) {
      group.chunk_symbols = chunk_symbols;
      group.chunks = (group.count + chunk_symbols - 1) / chunk_symbols;
      std::vector<std::uint8_t> head;
      put_varint(head, chunk_symbols);
      write_table(group.symbols, head);
      if (head.size() + (bits + 7) / 8 + 2 * group.chunks < raw_bytes) {
        group.mode = kHuffman;
        group.head = std::move(head);
        group.codes.assign(alphabet, 0);
        assign_codes(group.symbols, [&](const CodedSymbol& symbol, std::uint32_t code) {
          group.codes[pattern_of(group.type, symbol.index)] =
              reverse_bits(code, symbol.length) | std::uint32_t{symbol.length} << 24;
          group.max_bits = std::max<unsigned>(group.max_bits, symbol.length);
        });
        // From the longest code, not from the counts: a caller's other thread may change the symbols meanwhile.
        payload_bound = (group.count * group.max_bits + 7) / 8 + 5 * group.chunks + 32;
      }
    }
    bound_ += 1 + 2 + group.head.size() + payload_bound;
  }
}

std::size_t HuffmanEncoder::write(std::uint8_t* out) {
  const HuffmanKernels& k = kernels(level_);
  std::vector<std::uint8_t> fields;
  fields.push_back(list_ ? 1 : 0);
  if (list_) put_varint(fields, arrays_.size());
  for (const ArrayShape& array : arrays_) {
    fields.push_back(static_cast<std::uint8_t>(array.type));
    fields.push_back(static_cast<std::uint8_t>(array.dims.size()));
    for (const std::uint64_t dim : array.dims) put_varint(fields, dim);
    if (list_) put_varint(fields, array.group);
  }
  std::uint8_t* at = out + kBodyAt;
  std::memcpy(at, fields.data(), fields.size());
  at += fields.size();

  std::vector<std::uint8_t> joined;
  std::vector<std::uint32_t> sizes;
  for (std::size_t g = 0; g < groups_.size(); ++g) {
    const HuffmanGroup& group = *groups_[g];
    const std::size_t width = symbol_bytes(group.type);
    const void* symbols = group.members.size() == 1 ? data_[group.members.front()] : nullptr;
    if (group.members.size() > 1) {
      joined.resize(group.count * width);
      for (const std::size_t i : group.members) {
        std::memcpy(joined.data() + arrays_[i].offset * width, data_[i], arrays_[i].count * width);
      }
      symbols = joined.data();
    }
    *at++ = group.mode;
    if (group.mode == kConstant) {
      put_little(at, pattern_of(group.type, group.symbols.front().index), static_cast<unsigned>(width));
      at += width;
    } else if (group.mode == kRaw) {
      if (width == 1) {
        if (group.count > 0) std::memcpy(at, symbols, group.count);
      } else {
        for (std::uint64_t i = 0; i < group.count; ++i) {
          put_little(at + 2 * i, static_cast<const std::uint16_t*>(symbols)[i], 2);
        }
      }
      at += group.count * width;
    } else {
      std::memcpy(at, group.head.data(), group.head.size());
      at += group.head.size();
      std::uint8_t* payload = at + 6;
      sizes.resize(group.chunks);
      if (width == 1) {
        at = k.encode8(group.codes.data(), group.max_bits, static_cast<const std::uint8_t*>(symbols), group.count,
                       group.chunk_symbols, payload, sizes.data());
      } else {
        at = k.encode16(group.codes.data(), group.max_bits, static_cast<const std::uint16_t*>(symbols), group.count,
                        group.chunk_symbols, payload, sizes.data());
      }
      put_little(payload - 6, static_cast<std::uint64_t>(at - payload), 6);
      const auto [least, most] = std::minmax_element(sizes.begin(), sizes.end());
      std::vector<std::uint8_t> directory;
      put_varint(directory, *least);
      const unsigned bits = bit_width(*most - *least);
      directory.push_back(static_cast<std::uint8_t>(bits));
      BitWriter writer{directory};
      for (const std::uint32_t size : sizes) writer.put(size - *least, bits);
      std::memcpy(at, directory.data(), directory.size());
      at += directory.size();
    }
  }
  std::memcpy(out, kMagic, 4);
  out[4] = kVersion;
  put_little(out + kBodySizeAt, static_cast<std::uint64_t>(at - out) - kBodyAt, 6);
  std::uint32_t crc = crc32(0, out, kCrcAt, level_);
  crc = crc32(crc, out + kBodySizeAt, static_cast<std::size_t>(at - out) - kBodySizeAt, level_);
  put_little(out + kCrcAt, crc, 4);
  return static_cast<std::size_t>(at - out);
}

// ---- decoder ----

HuffmanDecoder::HuffmanDecoder(SimdLevel level) : level_(level) {}
HuffmanDecoder::~HuffmanDecoder() = default;

namespace {

// What the kernels look codes up in. It lives while its group is decoded: a small file may hold many groups.
struct DecodeTables {
  explicit DecodeTables(const HuffmanGroup& group);
  DecodeTables(const DecodeTables&) = delete;
  DecodeTables& operator=(const DecodeTables&) = delete;

  HuffmanDecodeTable table;
  std::vector<std::uint64_t> multi_symbols;
  std::vector<std::uint16_t> multi_steps;
  std::uint8_t lengths8[256] = {};
  std::vector<std::uint16_t> root8;
  std::vector<std::uint32_t> root16;
  std::vector<std::uint16_t> sorted;

 private:
  void build_multi();
};

DecodeTables::DecodeTables(const HuffmanGroup& group) {
  const SymbolType type = group.type;
  for (const CodedSymbol& symbol : group.symbols) table.max_bits = std::max<unsigned>(table.max_bits, symbol.length);
  const unsigned root_bits = std::min(table.max_bits, type == SymbolType::u8 ? kHuffmanRootBits8 : kHuffmanRootBits16);
  table.root_bits = root_bits;
  const std::size_t root_size = std::size_t{1} << root_bits;
  if (type == SymbolType::u8) {
    root8.assign(root_size, 0);
  } else {
    root16.assign(root_size, 0);
  }
  sorted.reserve(group.symbols.size());
  assign_codes(group.symbols, [&](const CodedSymbol& symbol, std::uint32_t code) {
    const unsigned length = symbol.length;
    const std::uint16_t pattern = pattern_of(type, symbol.index);
    table.limit[length] = (code + 1) << (table.max_bits - length);
    table.offset[length] = static_cast<std::int32_t>(sorted.size()) - static_cast<std::int32_t>(code);
    sorted.push_back(pattern);
    if (length > root_bits) return;
    const std::uint32_t step = 1u << length;
    for (std::size_t i = reverse_bits(code, length); i < root_size; i += step) {
      if (type == SymbolType::u8) {
        root8[i] = static_cast<std::uint16_t>(pattern << 8 | length);
      } else {
        root16[i] = std::uint32_t{pattern} << 16 | length;
      }
    }
  });
  table.root8 = root8.data();
  table.root16 = root16.data();
  table.sorted = sorted.data();
  table.symbols = sorted.size();
  for (const CodedSymbol& symbol : group.symbols) {
    table.mean_bits += symbol.length / static_cast<double>(1u << symbol.length);
  }
  if (type == SymbolType::u8 && table.mean_bits <= kMultiMeanBits && group.count >= kMultiSymbols) build_multi();
}

// Several symbols a look-up, from the table of single ones. A state is a 1 above the bits that are left of a window; it
// holds its first symbol, and then what the state behind that holds, up to the most that one look-up gives.
void DecodeTables::build_multi() {
  for (const std::uint16_t entry : root8) lengths8[entry >> 8] = static_cast<std::uint8_t>(entry);
  multi_symbols.resize(2 * kHuffmanMultiWindows);
  multi_steps.resize(2 * kHuffmanMultiWindows);
  for (unsigned bits = 1; bits <= kHuffmanMultiBits; ++bits) {
    for (std::uint32_t state = 1u << bits; state < 2u << bits; ++state) {
      const std::uint32_t window = state - (1u << bits);
      const std::uint32_t entry = root8[window & ((1u << table.root_bits) - 1)], length = entry & 0xFF;
      if (length > bits) continue;
      std::uint64_t rest = multi_symbols[state >> length];
      std::uint32_t step = multi_steps[state >> length];
      if (step >> 6 == kHuffmanMultiMost) step -= 1u << 6 | lengths8[rest >> 56];
      multi_symbols[state] = rest << 8 | entry >> 8;
      multi_steps[state] = static_cast<std::uint16_t>(step + (1u << 6 | length));
    }
  }
  table.multi_symbols = multi_symbols.data() + kHuffmanMultiWindows;
  table.multi_steps = multi_steps.data() + kHuffmanMultiWindows;
  table.lengths8 = lengths8;
}

bool is_one_raw_array(const std::vector<std::unique_ptr<HuffmanGroup>>& groups) {
  return groups.size() == 1 && groups[0]->mode == kRaw && groups[0]->members.size() == 1;
}

}  // namespace

std::uint32_t HuffmanDecoder::checksum() const {
  const std::uint32_t crc = crc32(0, data_, kCrcAt, level_);
  return crc32(crc, data_ + kBodySizeAt, size_ - kBodySizeAt, level_);
}

Status HuffmanDecoder::check(std::uint32_t crc) const {
  if (crc != get_little(data_ + kCrcAt, 4)) return {StatusCode::checksum_mismatch, "the CRC-32 does not match"};
  return {};
}

Status HuffmanDecoder::open(const std::uint8_t* data, std::size_t size, std::uint64_t max_symbols, ChecksumUse use) {
  if (size > 0 && std::memcmp(data, kMagic, std::min<std::size_t>(size, 4)) != 0) {
    return {StatusCode::bad_magic, "the data does not begin with 'HFLH'"};
  }
  if (size > 4 && data[4] != kVersion) return {StatusCode::unsupported_version, "the format version is not 1"};
  if (size < kBodyAt) return {StatusCode::truncated, "the data ends within the header"};
  const std::uint64_t body_bytes = get_little(data + kBodySizeAt, 6);
  if (body_bytes > size - kBodyAt) return {StatusCode::truncated, "the data is shorter than its header says"};
  if (body_bytes < size - kBodyAt) {
    return {StatusCode::invalid_bitstream, "the data is longer than its header says"};
  }
  data_ = data;
  size_ = size;
  checksum_due_ = use == ChecksumUse::while_decoding;
  if (use == ChecksumUse::first) {
    const Status status = check(checksum());
    if (!status.ok()) return status;
  }
  const Status status = parse(max_symbols);
  if (checksum_due_ && !(status.ok() && is_one_raw_array(groups_))) {
    // Damaged data is called damaged, whatever the damage looks like.
    const Status damage = check(checksum());
    if (!damage.ok()) return damage;
    checksum_due_ = false;
  }
  return status;
}

Status HuffmanDecoder::parse(std::uint64_t max_symbols) {
  const Status invalid_code{StatusCode::invalid_code, "the code lengths are not those of a complete prefix code"};
  const auto invalid = [](const char* message) { return Status{StatusCode::invalid_bitstream, message}; };

  Reader in{data_ + kBodyAt, data_ + size_};
  const std::uint8_t kind = in.byte();
  if (!in.good || kind > 1) return invalid("the kind must be 0 or 1");
  list_ = kind == 1;
  const std::uint64_t count = list_ ? in.varint() : 1;
  if (!in.good || count > in.left()) return invalid("there are more arrays than the data can hold");
  std::uint64_t total = 0;
  for (std::uint64_t i = 0; i < count; ++i) {
    ArrayShape array;
    const std::uint8_t type = in.byte();
    const std::uint8_t ndim = in.byte();
    if (!in.good || type > 1) return invalid("the symbol type must be 0 or 1");
    if (ndim > kHuffmanMaxDims) return invalid("an array has more than 32 dimensions");
    array.type = static_cast<SymbolType>(type);
    std::uint64_t elements = 1;
    bool empty = false;
    for (unsigned d = 0; d < ndim; ++d) {
      const std::uint64_t dim = in.varint();
      if (!in.good || dim > kHuffmanMaxElements) return invalid("a dimension is too large");
      array.dims.push_back(dim);
      if (dim == 0) {
        empty = true;
      } else if (elements > kHuffmanMaxElements / dim) {
        return invalid("an array has too many elements");
      } else {
        elements *= dim;
      }
    }
    array.count = empty ? 0 : elements;
    total += array.count;
    if (total > max_symbols) return invalid("the data declares more symbols than max_symbols allows");
    const std::uint64_t group = list_ ? in.varint() : 0;
    if (!in.good || group > groups_.size()) return invalid("a group number is out of order");
    if (group == groups_.size()) {
      groups_.push_back(std::make_unique<HuffmanGroup>());
      groups_.back()->type = array.type;
    }
    HuffmanGroup& of = *groups_[group];
    if (of.type != array.type) return invalid("arrays of different types share a group");
    array.group = static_cast<std::uint32_t>(group);
    array.offset = of.count;
    of.count += array.count;
    if (array.count > 0) of.members.push_back(arrays_.size());
    arrays_.push_back(std::move(array));
  }

  for (const std::unique_ptr<HuffmanGroup>& owner : groups_) {
    HuffmanGroup& group = *owner;
    const std::size_t width = symbol_bytes(group.type);
    const std::uint8_t mode = in.byte();
    if (!in.good || mode > kHuffman) return invalid("the mode must be 0, 1 or 2");
    group.mode = static_cast<Mode>(mode);
    if (group.mode != kRaw && group.count == 0) return invalid("a group without symbols must be raw");
    if (group.mode == kRaw) {
      if (group.count > in.left() / width) return invalid("the raw symbols run past the end");
      group.payload = in.at;
      in.at += group.count * width;
      group.payload_end = in.at;
      continue;
    }
    if (group.mode == kConstant) {
      group.constant = static_cast<std::uint16_t>(in.little(static_cast<unsigned>(width)));
      if (!in.good) return invalid("the constant runs past the end");
      continue;
    }
    group.chunk_symbols = in.varint();
    if (!in.good || group.chunk_symbols == 0 || group.chunk_symbols > kHuffmanMaxChunkSymbols) {
      return invalid("the number of symbols in a chunk is out of range");
    }
    group.chunks = (group.count - 1) / group.chunk_symbols + 1;
    if (!read_table(in, group.type, group.symbols)) return invalid_code;
    const std::uint64_t payload_bytes = in.little(6);
    if (!in.good || payload_bytes > in.left()) return invalid("the coded symbols run past the end");
    // A symbol takes a bit at least and a chunk a byte, so everything allocated is in proportion to the data.
    if (group.count > payload_bytes * 8 || group.chunks > payload_bytes) {
      return invalid("the coded symbols are too short for their number");
    }
    group.payload = in.at;
    in.at += payload_bytes;
    group.payload_end = in.at;
    const std::uint64_t least = in.varint();
    const unsigned bits = in.byte();
    if (!in.good || bits > 32 || least > payload_bytes / group.chunks)
      return invalid("the chunk sizes are out of range");
    group.offsets.reserve(group.chunks + 1);
    std::uint64_t offset = 0;
    group.offsets.push_back(0);
    for (std::uint64_t c = 0; c < group.chunks; ++c) {
      const std::uint64_t chunk_bytes = least + in.bits(bits);
      if (!in.good || chunk_bytes == 0 || chunk_bytes > payload_bytes - offset) {
        return invalid("the chunk sizes do not add up to the coded symbols");
      }
      offset += chunk_bytes;
      group.offsets.push_back(offset);
    }
    in.align();
    if (!in.good || offset != payload_bytes) return invalid("the chunk sizes do not add up to the coded symbols");
  }
  if (in.left() != 0) return invalid("bytes are left after the last group");
  return {};
}

template <class T>
bool HuffmanGroup::decode_range(const HuffmanKernels& k, const HuffmanDecodeTable& table, std::uint64_t begin,
                                std::uint64_t end, T* out) const {
  const auto prefix = [&](std::uint64_t chunk, std::uint64_t symbols_wanted, T* to) {
    const std::uint8_t* from = payload + offsets[chunk];
    const std::uint8_t* until = payload + offsets[chunk + 1];
    if constexpr (sizeof(T) == 1) {
      return k.decode_prefix8(table, from, until, symbols_wanted, to);
    } else {
      return k.decode_prefix16(table, from, until, symbols_wanted, to);
    }
  };
  std::uint64_t chunk = begin / chunk_symbols;
  const std::uint64_t skip = begin % chunk_symbols;
  if (skip > 0) {
    const std::uint64_t until = std::min(end, (chunk + 1) * chunk_symbols) - chunk * chunk_symbols;
    std::vector<T> part(until);
    if (!prefix(chunk, until, part.data())) return false;
    std::memcpy(out, part.data() + skip, (until - skip) * sizeof(T));
    out += until - skip;
    begin += until - skip;
    ++chunk;
  }
  if (begin == end) return true;
  // Whole chunks, the group's last one among them if the range reaches to the end.
  const std::uint64_t whole_end = end == count ? chunks : end / chunk_symbols;
  if (chunk < whole_end) {
    HuffmanChunks run;
    run.payload = payload;
    run.payload_end = payload_end;
    run.offsets = offsets.data() + chunk;
    run.chunks = whole_end - chunk;
    run.chunk_symbols = chunk_symbols;
    run.last_symbols = whole_end == chunks ? count - (chunks - 1) * chunk_symbols : chunk_symbols;
    bool good;
    if constexpr (sizeof(T) == 1) {
      good = k.decode8(table, run, out);
    } else {
      good = k.decode16(table, run, out);
    }
    if (!good) return false;
    const std::uint64_t decoded = (run.chunks - 1) * chunk_symbols + run.last_symbols;
    out += decoded;
    begin += decoded;
  }
  return begin == end || prefix(whole_end, end - begin, out);
}

Status HuffmanGroup::decode(const HuffmanKernels& k, std::uint64_t begin, std::uint64_t end, void* out) const {
  if (begin == end) return {};
  const std::uint64_t wanted = end - begin;
  if (mode == kHuffman) {
    const DecodeTables tables(*this);
    const bool good = type == SymbolType::u8
                          ? decode_range(k, tables.table, begin, end, static_cast<std::uint8_t*>(out))
                          : decode_range(k, tables.table, begin, end, static_cast<std::uint16_t*>(out));
    if (!good) return {StatusCode::invalid_code, "a chunk does not end where the chunk sizes say"};
  } else if (mode == kRaw) {
    const std::size_t width = symbol_bytes(type);
    k.copy(static_cast<std::uint8_t*>(out), payload + begin * width, wanted * width);
    if (type == SymbolType::i16) from_little(static_cast<std::uint16_t*>(out), wanted);
  } else if (type == SymbolType::u8) {
    std::memset(out, constant, wanted);
  } else {
    std::fill_n(static_cast<std::uint16_t*>(out), wanted, constant);
  }
  return {};
}

Status HuffmanDecoder::decode(std::size_t array, std::uint64_t begin, std::uint64_t end, void* out) const {
  const ArrayShape& of = arrays_[array];
  return groups_[of.group]->decode(kernels(level_), of.offset + begin, of.offset + end, out);
}

const void* HuffmanDecoder::stored(std::size_t array) const {
  const ArrayShape& of = arrays_[array];
  const HuffmanGroup& group = *groups_[of.group];
  const std::size_t width = symbol_bytes(of.type);
  if (group.mode != kRaw || of.count == 0 || (width > 1 && !kLittleEndian)) return nullptr;
  const std::uint8_t* const at = group.payload + of.offset * width;
  return reinterpret_cast<std::uintptr_t>(at) % width == 0 ? at : nullptr;
}

Status HuffmanDecoder::decode_all(void* const* out) const {
  if (checksum_due_) {
    const HuffmanGroup& group = *groups_[0];
    const std::uint8_t* const end = group.payload_end;
    void* const symbols = out[group.members.front()];
    std::uint32_t crc = crc32(0, data_, kCrcAt, level_);
    crc = crc32(crc, data_ + kBodySizeAt, static_cast<std::size_t>(group.payload - data_) - kBodySizeAt, level_);
    crc = crc32_copy(crc, static_cast<std::uint8_t*>(symbols), group.payload,
                     static_cast<std::size_t>(end - group.payload), level_);
    if (group.type == SymbolType::i16) from_little(static_cast<std::uint16_t*>(symbols), group.count);
    return check(crc32(crc, end, static_cast<std::size_t>(data_ + size_ - end), level_));
  }
  std::vector<std::uint8_t> joined;
  for (const std::unique_ptr<HuffmanGroup>& owner : groups_) {
    const HuffmanGroup& group = *owner;
    const std::size_t width = symbol_bytes(group.type);
    const auto wanted = [&](std::size_t array) { return out[array] != nullptr; };
    if (std::none_of(group.members.begin(), group.members.end(), wanted)) continue;
    // One array alone is decoded in place; arrays that share chunks are decoded together and dealt out.
    const bool shared = group.members.size() > 1;
    if (shared) joined.resize(group.count * width);
    const Status status =
        group.decode(kernels(level_), 0, group.count, shared ? joined.data() : out[group.members.front()]);
    if (!status.ok()) return status;
    for (std::size_t i = 0; shared && i < group.members.size(); ++i) {
      const std::size_t array = group.members[i];
      if (!wanted(array)) continue;
      std::memcpy(out[array], joined.data() + arrays_[array].offset * width, arrays_[array].count * width);
    }
  }
  return {};
}

}  // namespace hflfnerv
