// Any bytes must decode to the same arrays, or to the same error, at every instruction-set level, whenever the checksum is
// computed, within the bounds of all buffers. An odd first byte puts a valid header round the rest, so that the fuzzer gets behind the checksum.
#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <vector>

#include "core/crc32.h"
#include "core/huffman.h"

using hflfnerv::SimdLevel;

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  if (size == 0) return 0;
  std::vector<std::uint8_t> file;
  if (data[0] & 1) {
    const std::size_t body = size - 1;
    file = {'H', 'F', 'L', 'H', 1, 0, 0, 0, 0};
    for (int i = 0; i < 6; ++i) file.push_back(static_cast<std::uint8_t>(std::uint64_t{body} >> (8 * i)));
    file.insert(file.end(), data + 1, data + size);
    std::uint32_t crc = hflfnerv::crc32(0, file.data(), 5, SimdLevel::scalar);
    crc = hflfnerv::crc32(crc, file.data() + 9, file.size() - 9, SimdLevel::scalar);
    for (int i = 0; i < 4; ++i) file[5 + i] = static_cast<std::uint8_t>(crc >> (8 * i));
  } else {
    file.assign(data + 1, data + size);
  }
  // An allocation of exactly this size, so that the sanitizer sees a read behind its end.
  const std::unique_ptr<std::uint8_t[]> exact(new std::uint8_t[file.size()]);
  std::copy(file.begin(), file.end(), exact.get());

  hflfnerv::StatusCode first_code{};
  std::vector<std::vector<std::uint8_t>> first;
  for (int run = 0; run <= 2 * static_cast<int>(hflfnerv::best_simd_level()) + 1; ++run) {
    hflfnerv::HuffmanDecoder decoder(static_cast<SimdLevel>(run / 2));
    hflfnerv::Status status = decoder.open(exact.get(), file.size(), 1 << 18, run % 2 == 1);
    std::vector<std::unique_ptr<std::uint8_t[]>> arrays;
    std::vector<void*> pointers;
    std::vector<std::vector<std::uint8_t>> decoded;
    if (status.ok()) {
      for (const hflfnerv::ArrayShape& shape : decoder.arrays()) {
        arrays.emplace_back(new std::uint8_t[shape.count * hflfnerv::symbol_bytes(shape.type)]());
        pointers.push_back(arrays.back().get());
      }
      status = decoder.decode_all(pointers.data());
    }
    if (status.ok()) {
      for (std::size_t i = 0; i < arrays.size(); ++i) {
        const hflfnerv::ArrayShape& shape = decoder.arrays()[i];
        const std::size_t width = hflfnerv::symbol_bytes(shape.type);
        decoded.emplace_back(arrays[i].get(), arrays[i].get() + shape.count * width);
        // A part of the array is that part of the whole.
        const std::uint64_t begin = shape.count / 3, end = shape.count - shape.count / 5;
        const std::unique_ptr<std::uint8_t[]> part(new std::uint8_t[(end - begin) * width]);
        if (!decoder.decode(i, begin, end, part.get()).ok()) std::abort();
        if (!std::equal(part.get(), part.get() + (end - begin) * width, arrays[i].get() + begin * width)) std::abort();
      }
    }
    if (run == 0) {
      first_code = status.code;
      first = decoded;
    } else if (status.code != first_code || decoded != first) {
      std::abort();
    }
  }
  return 0;
}
