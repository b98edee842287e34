// Any bytes must decode to the same arrays, or to the same error, at every instruction-set level, whenever the checksum is
// computed, within the bounds of all buffers; and without a checksum to what they would under one that is right. An odd
// first byte puts a valid header round the rest, so that the fuzzer gets behind the checksum.
#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <vector>

#include "core/crc32.h"
#include "core/huffman.h"

namespace {

using hflfnerv::ChecksumUse;
using hflfnerv::SimdLevel;
using hflfnerv::StatusCode;
using Bytes = std::vector<std::uint8_t>;

constexpr std::size_t kCrcAt = 5, kBodySizeAt = 9, kBodyAt = 15;

void repair_checksum(Bytes& file) {
  std::uint32_t crc = hflfnerv::crc32(0, file.data(), kCrcAt, SimdLevel::scalar);
  crc = hflfnerv::crc32(crc, file.data() + kBodySizeAt, file.size() - kBodySizeAt, SimdLevel::scalar);
  for (unsigned i = 0; i < 4; ++i) file[kCrcAt + i] = static_cast<std::uint8_t>(crc >> (8 * i));
}

struct Outcome {
  StatusCode code{};
  std::vector<Bytes> arrays;          // if it is ok
  std::vector<StatusCode> part_codes;  // of a part of each array, if they could be opened
  std::vector<Bytes> parts;

  bool operator==(const Outcome& other) const {
    return code == other.code && arrays == other.arrays && part_codes == other.part_codes && parts == other.parts;
  }
};

// What is decoded is first filled with a value of its own each time, so that symbols which nobody writes are found.
Outcome decode(const std::uint8_t* data, std::size_t size, SimdLevel level, ChecksumUse use) {
  static std::uint8_t fill = 0;
  Outcome outcome;
  hflfnerv::HuffmanDecoder decoder(level);
  outcome.code = decoder.open(data, size, 1 << 18, use).code;
  if (outcome.code != StatusCode::ok) return outcome;
  const auto allocate = [&](std::uint64_t bytes) {
    std::unique_ptr<std::uint8_t[]> exact(new std::uint8_t[bytes]);
    std::fill_n(exact.get(), bytes, ++fill);
    return exact;
  };
  std::vector<std::unique_ptr<std::uint8_t[]>> arrays;
  std::vector<void*> pointers;
  for (const hflfnerv::ArrayShape& shape : decoder.arrays()) {
    arrays.push_back(allocate(shape.count * hflfnerv::symbol_bytes(shape.type)));
    pointers.push_back(arrays.back().get());
  }
  outcome.code = decoder.decode_all(pointers.data()).code;
  // Of data whose checksum is wrong nothing more is asked.
  if (outcome.code == StatusCode::checksum_mismatch) return outcome;
  const bool whole = outcome.code == StatusCode::ok;
  for (std::size_t i = 0; i < arrays.size(); ++i) {
    const hflfnerv::ArrayShape& shape = decoder.arrays()[i];
    const std::size_t width = hflfnerv::symbol_bytes(shape.type);
    if (whole) outcome.arrays.emplace_back(arrays[i].get(), arrays[i].get() + shape.count * width);
    // What lies in the data as it is, is what is decoded.
    const auto* const stored = static_cast<const std::uint8_t*>(decoder.stored(i));
    if (stored && (stored < data || stored + shape.count * width > data + size)) std::abort();
    if (stored && whole && !std::equal(stored, stored + shape.count * width, arrays[i].get())) std::abort();
    const std::uint64_t begin = shape.count / 3, end = shape.count - shape.count / 5;
    const std::unique_ptr<std::uint8_t[]> part = allocate((end - begin) * width);
    outcome.part_codes.push_back(decoder.decode(i, begin, end, part.get()).code);
    if (outcome.part_codes.back() == StatusCode::ok) {
      outcome.parts.emplace_back(part.get(), part.get() + (end - begin) * width);
    }
    if (!whole) continue;
    // A part of the array is that part of the whole.
    if (outcome.part_codes.back() != StatusCode::ok) std::abort();
    if (!std::equal(outcome.parts.back().begin(), outcome.parts.back().end(), arrays[i].get() + begin * width)) {
      std::abort();
    }
  }
  return outcome;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  if (size == 0) return 0;
  Bytes file;
  if (data[0] & 1) {
    const std::size_t body = size - 1;
    file = {'H', 'F', 'L', 'H', 1, 0, 0, 0, 0};
    for (int i = 0; i < 6; ++i) file.push_back(static_cast<std::uint8_t>(std::uint64_t{body} >> (8 * i)));
    file.insert(file.end(), data + 1, data + size);
    repair_checksum(file);
  } else {
    file.assign(data + 1, data + size);
  }
  // An allocation of exactly this size, so that the sanitizer sees a read behind its end.
  const std::unique_ptr<std::uint8_t[]> exact(new std::uint8_t[file.size()]);
  std::copy(file.begin(), file.end(), exact.get());

  const auto every_level = [&](ChecksumUse use, const Outcome& expected) {
    for (int level = 0; level <= static_cast<int>(hflfnerv::best_simd_level()); ++level) {
      if (!(decode(exact.get(), file.size(), static_cast<SimdLevel>(level), use) == expected)) std::abort();
    }
  };
  Outcome expected = decode(exact.get(), file.size(), SimdLevel::scalar, ChecksumUse::first);
  every_level(ChecksumUse::first, expected);
  every_level(ChecksumUse::while_decoding, expected);
  if (expected.code == StatusCode::checksum_mismatch && file.size() >= kBodyAt) {
    repair_checksum(file);
    expected = decode(file.data(), file.size(), SimdLevel::scalar, ChecksumUse::first);
    if (expected.code == StatusCode::checksum_mismatch) std::abort();
  }
  every_level(ChecksumUse::never, expected);
  return 0;
}
