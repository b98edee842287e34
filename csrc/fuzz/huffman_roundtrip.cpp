// Whatever is encoded, at any level, gives the same bytes, and those give back what was encoded.
// The first bytes choose the chunk size, the symbol types and how the symbols are cut into arrays and groups.
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#include "core/huffman.h"

using hflfnerv::SimdLevel;
using hflfnerv::SymbolType;

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  if (size < 4) return 0;
  const std::uint64_t chunk_symbols = 1 + data[0] + 16 * (data[1] & 15);
  const std::size_t pieces = 1 + (data[1] >> 4);
  const std::uint8_t types = data[2];
  const unsigned repeat = 1 + (data[3] & 63);
  data += 4;
  size -= 4;
  std::vector<std::vector<std::uint16_t>> storage;  // aligned for either type
  std::vector<SymbolType> kinds;
  std::vector<std::uint64_t> counts;
  for (std::size_t p = 0; p < pieces; ++p) {
    const SymbolType type = types >> (p % 8) & 1 ? SymbolType::i16 : SymbolType::u8;
    const std::size_t begin = size * p / pieces, end = size * (p + 1) / pieces;
    const std::size_t bytes = (end - begin) / 2 * 2;
    storage.emplace_back(bytes * repeat / 2);
    for (unsigned r = 0; r < repeat && bytes > 0; ++r) {
      std::memcpy(reinterpret_cast<std::uint8_t*>(storage.back().data()) + r * bytes, data + begin, bytes);
    }
    kinds.push_back(type);
    counts.push_back(bytes * repeat / hflfnerv::symbol_bytes(type));
  }

  std::vector<std::uint8_t> first;
  for (int level = 0; level <= static_cast<int>(hflfnerv::best_simd_level()); ++level) {
    hflfnerv::HuffmanEncoder encoder(static_cast<SimdLevel>(level));
    int group_of[2] = {-1, -1};
    int groups = 0;
    for (std::size_t p = 0; p < pieces; ++p) {
      int& group = group_of[static_cast<int>(kinds[p])];
      if (group < 0 || (types & 0x80)) group = groups++;
      encoder.add(kinds[p], {counts[p]}, storage[p].data(), static_cast<std::uint32_t>(group));
    }
    encoder.plan(true, chunk_symbols);
    const std::unique_ptr<std::uint8_t[]> out(new std::uint8_t[encoder.bound()]);
    const std::size_t written = encoder.write(out.get());
    if (written > encoder.bound()) std::abort();
    const std::vector<std::uint8_t> bytes(out.get(), out.get() + written);
    if (level == 0) first = bytes;
    if (bytes != first) std::abort();

    hflfnerv::HuffmanDecoder decoder(static_cast<SimdLevel>(level));
    if (!decoder.open(bytes.data(), bytes.size(), std::uint64_t{1} << 40).ok()) std::abort();
    std::vector<std::vector<std::uint16_t>> back;
    std::vector<void*> pointers;
    for (const auto& words : storage) back.emplace_back(words.size());
    for (auto& words : back) pointers.push_back(words.data());
    if (!decoder.decode_all(pointers.data()).ok() || back != storage) std::abort();
  }
  return 0;
}
