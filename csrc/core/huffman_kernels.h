// The inner loops of Huffman coding, once per instruction set. They hold no format decisions beyond the bit order:
// codes are written from their most significant bit into bytes that fill up from their least significant bit.
#pragma once

#include <cstddef>
#include <cstdint>

namespace hflfnerv {

constexpr unsigned kHuffmanRootBits8 = 11;
constexpr unsigned kHuffmanRootBits16 = 14;
constexpr unsigned kHuffmanMaxBits = 20;
constexpr unsigned kHuffmanMultiBits = kHuffmanRootBits8;  // so every window holds a symbol
constexpr std::uint32_t kHuffmanMultiWindows = 1u << kHuffmanMultiBits;
constexpr unsigned kHuffmanMultiMost = 8;

// One table-driven decoder. An index is the next `root_bits` bits of the stream.
struct HuffmanDecodeTable {
  unsigned root_bits = 0;
  unsigned max_bits = 0;
  const std::uint16_t* root8 = nullptr;   // symbol << 8 | length
  const std::uint32_t* root16 = nullptr;  // symbol << 16 | length; length 0: the code is longer than root_bits
  // What the next kHuffmanMultiBits bits hold: up to 8 symbols, and their bits | their number << 6. Made where codes
  // are short, else null.
  const std::uint64_t* multi_symbols = nullptr;
  const std::uint16_t* multi_steps = nullptr;
  const std::uint8_t* lengths8 = nullptr;  // of each 8-bit symbol's code, made with them
  double mean_bits = 0;  // of a code, where symbols occur as often as their codes allow for
  // Canonical search for longer codes, on the next max_bits bits with the first bit most significant.
  std::uint32_t limit[kHuffmanMaxBits + 1] = {};  // codes of at most this length are below it
  std::int32_t offset[kHuffmanMaxBits + 1] = {};  // position in `sorted` minus code
  const std::uint16_t* sorted = nullptr;          // symbols by (length, symbol)
  std::size_t symbols = 0;
};

// A run of chunks. Every chunk holds `chunk_symbols` symbols but the last, which holds `last_symbols`.
struct HuffmanChunks {
  const std::uint8_t* payload = nullptr;  // bytes may be read up to payload_end, whatever the chunks say
  const std::uint8_t* payload_end = nullptr;
  const std::uint64_t* offsets = nullptr;  // chunks + 1 offsets into payload
  std::size_t chunks = 0;
  std::size_t chunk_symbols = 0;
  std::size_t last_symbols = 0;
};

struct HuffmanKernels {
  // Decode whole chunks and check that each ends where it should. False if one does not.
  bool (*decode8)(const HuffmanDecodeTable&, const HuffmanChunks&, std::uint8_t* out);
  bool (*decode16)(const HuffmanDecodeTable&, const HuffmanChunks&, std::uint16_t* out);
  // Decode the first `count` symbols of the bit string [begin, end). False if they do not fit in it.
  bool (*decode_prefix8)(const HuffmanDecodeTable&, const std::uint8_t* begin, const std::uint8_t* end,
                         std::size_t count, std::uint8_t* out);
  bool (*decode_prefix16)(const HuffmanDecodeTable&, const std::uint8_t* begin, const std::uint8_t* end,
                          std::size_t count, std::uint16_t* out);
  // Write chunks one after the other and their sizes. `codes`: code | length << 24, code in stream order (first bit
  // least significant). Up to 8 bytes behind the end may be overwritten. Returns the end.
  std::uint8_t* (*encode8)(const std::uint32_t* codes, unsigned max_bits, const std::uint8_t* symbols,
                           std::size_t count, std::size_t chunk_symbols, std::uint8_t* out, std::uint32_t* sizes);
  std::uint8_t* (*encode16)(const std::uint32_t* codes, unsigned max_bits, const std::uint16_t* symbols,
                            std::size_t count, std::size_t chunk_symbols, std::uint8_t* out, std::uint32_t* sizes);
  // Adds to 256 counts.
  void (*count8)(const std::uint8_t* symbols, std::size_t count, std::uint64_t* counts);
  // As memcpy.
  void (*copy)(std::uint8_t* out, const std::uint8_t* data, std::size_t size);
};

extern const HuffmanKernels kHuffmanKernelsScalar;
extern const HuffmanKernels kHuffmanKernelsAvx2;
extern const HuffmanKernels kHuffmanKernelsAvx512;

}  // namespace hflfnerv
