// Canonical, length-limited Huffman coding of arrays of 8-bit and 16-bit symbols, and the container round it.
// The layout of the bytes is hflfnerv/codec/HUFFMAN.md; hflfnerv/reference/huffman.py defines them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "cpu.h"
#include "status.h"

namespace hflfnerv {

constexpr std::size_t kHuffmanMaxDims = 32;
constexpr std::uint64_t kHuffmanMaxElements = std::uint64_t{1} << 40;
constexpr std::uint64_t kHuffmanMaxChunkSymbols = std::uint64_t{1} << 28;

enum class SymbolType : std::uint8_t { u8 = 0, i16 = 1 };

constexpr std::size_t symbol_bytes(SymbolType type) { return type == SymbolType::u8 ? 1 : 2; }
constexpr unsigned huffman_max_bits(SymbolType type) { return type == SymbolType::u8 ? 11 : 20; }

struct ArrayShape {
  SymbolType type = SymbolType::u8;
  std::vector<std::uint64_t> dims;
  std::uint64_t count = 0;   // product of dims
  std::uint32_t group = 0;   // which group holds it
  std::uint64_t offset = 0;  // first symbol within the group
};

struct HuffmanGroup;

// Lengths of an optimal code of at most `max_bits` bits (package-merge). `lengths` gets `size` entries; a symbol of
// count 0 gets 0, and a lone symbol gets 1. The caller ensures that at most 2^max_bits counts are not zero.
void huffman_code_lengths(const std::uint64_t* counts, std::size_t size, unsigned max_bits, std::uint8_t* lengths);

// Codes arrays. First `add`, then `plan`, then `write` into a buffer of at least `bound` bytes.
class HuffmanEncoder {
 public:
  explicit HuffmanEncoder(SimdLevel level);
  ~HuffmanEncoder();

  // `data` is read until `write` has returned. Groups are numbered in the order in which they first occur.
  void add(SymbolType type, std::vector<std::uint64_t> dims, const void* data, std::uint32_t group);
  void plan(bool list, std::uint64_t chunk_symbols);
  std::size_t bound() const { return bound_; }
  std::size_t write(std::uint8_t* out);

 private:
  SimdLevel level_;
  bool list_ = false;
  std::uint64_t chunk_symbols_ = 0;
  std::size_t bound_ = 0;
  std::vector<ArrayShape> arrays_;
  std::vector<const void*> data_;
  std::vector<std::unique_ptr<HuffmanGroup>> groups_;
};

// When a decoder computes the checksum of its data.
enum class ChecksumUse {
  first,           // before anything else of the data is believed
  while_decoding,  // `decode_all` of all arrays must be next: of one stored as it is, it computes it while it copies
  never,           // the caller knows the data to be whole; if it is not, symbols may be wrong, and nothing worse
};

// Decodes arrays. `open` checks everything that can be checked without decoding; the data must outlive the decoder.
class HuffmanDecoder {
 public:
  explicit HuffmanDecoder(SimdLevel level);
  ~HuffmanDecoder();

  Status open(const std::uint8_t* data, std::size_t size, std::uint64_t max_symbols,
              ChecksumUse use = ChecksumUse::first);
  bool list() const { return list_; }
  const std::vector<ArrayShape>& arrays() const { return arrays_; }

  // Writes symbols [begin, end) of an array.
  Status decode(std::size_t array, std::uint64_t begin, std::uint64_t end, void* out) const;
  // Writes every array, `out[i]` for array i; one that is null is not wanted.
  Status decode_all(void* const* out) const;
  // Where the symbols of an array lie in the data as they are in memory, or null where they have to be decoded.
  const void* stored(std::size_t array) const;

 private:
  Status parse(std::uint64_t max_symbols);
  Status check(std::uint32_t crc) const;
  std::uint32_t checksum() const;

  SimdLevel level_;
  const std::uint8_t* data_ = nullptr;
  std::size_t size_ = 0;
  bool checksum_due_ = false;  // left to decode_all
  bool list_ = false;
  std::vector<ArrayShape> arrays_;
  std::vector<std::unique_ptr<HuffmanGroup>> groups_;
};

}  // namespace hflfnerv
