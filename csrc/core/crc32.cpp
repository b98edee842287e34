#include "crc32.h"

#include <array>
#include <cstring>

namespace hflfnerv {
namespace {

constexpr std::size_t kSlices = 16;
using Tables = std::array<std::array<std::uint32_t, 256>, kSlices>;

constexpr Tables make_tables() {
  Tables tables{};
  for (std::uint32_t byte = 0; byte < 256; ++byte) {
    std::uint32_t value = byte;
    for (int bit = 0; bit < 8; ++bit) value = (value >> 1) ^ ((value & 1) ? 0xEDB88320u : 0u);
    tables[0][byte] = value;
  }
  for (std::size_t slice = 1; slice < kSlices; ++slice) {
    for (std::size_t byte = 0; byte < 256; ++byte) {
      const std::uint32_t value = tables[slice - 1][byte];
      tables[slice][byte] = (value >> 8) ^ tables[0][value & 0xFF];
    }
  }
  return tables;
}

constexpr Tables kTables = make_tables();

// Without carry-less multiplication.
using detail::kBlock;
using detail::kDistances;
using detail::kQuarters;
using detail::kRingBlocks;
using detail::kRingBytes;

struct Block {
  std::uint64_t words[4];
};

inline Block load(const std::uint8_t* at) {
  Block block;
  std::memcpy(&block, at, kBlock);
  return block;
}

inline Block operator^(Block a, const Block& b) {
  for (int i = 0; i < 4; ++i) a.words[i] ^= b.words[i];
  return a;
}

// One quarter of fold_round: blocks from one distance up to the next.
template <int quarter, bool kCopy, bool kLast>
void fold_quarter(std::uint8_t* ring, std::uint8_t* out, const std::uint8_t* data) {
  constexpr int kFirst = kLast ? quarter : 0;  // of what is added
  constexpr std::size_t kBegin = kQuarters[quarter], kEnd = kQuarters[quarter + 1];
  // Block i - distance is of this round or, where that is below 0, still of the one before.
  const std::uint8_t* from[3];
  for (int i = 0; i < 3; ++i) {
    from[i] = ring + (kBegin + (i < quarter ? 0 : kRingBlocks) - kDistances[i]) * kBlock;
  }
  ring += kBegin * kBlock;
  data += kBegin * kBlock;
  if constexpr (kCopy) out += kBegin * kBlock;
  for (std::size_t at = 0; at < (kEnd - kBegin) * kBlock; at += kBlock) {
    const Block block = load(data + at);
    if constexpr (kCopy) std::memcpy(out + at, &block, kBlock);
    Block sum = load(ring + at) ^ block;
    if constexpr (kFirst <= 0) sum = sum ^ load(from[0] + at);
    if constexpr (kFirst <= 1) sum = sum ^ load(from[1] + at);
    if constexpr (kFirst <= 2) sum = sum ^ load(from[2] + at);
    std::memcpy(ring + at, &sum, kBlock);
  }
}

// Replaces the blocks of the ring by the next ones, each with what is folded onto it. The last ones stay, so only those
// of the round before are folded onto them.
template <bool kCopy, bool kLast>
void fold_round(std::uint8_t* ring, std::uint8_t* out, const std::uint8_t* data) {
  fold_quarter<0, kCopy, kLast>(ring, out, data);
  fold_quarter<1, kCopy, kLast>(ring, out, data);
  fold_quarter<2, kCopy, kLast>(ring, out, data);
  fold_quarter<3, kCopy, kLast>(ring, out, data);
}

// As the functions of crc32.h that fold.
template <bool kCopy>
std::size_t fold_sparse(std::uint32_t* state, std::uint8_t* out, const std::uint8_t* data, std::size_t size) {
  if (size < 4 * kRingBytes) return 0;
  alignas(64) std::uint8_t ring[kRingBytes] = {};
  for (int i = 0; i < 4; ++i) ring[i] = static_cast<std::uint8_t>(*state >> (8 * i));
  std::size_t taken = 0;
  for (; size - taken >= 2 * kRingBytes; taken += kRingBytes) {
    fold_round<kCopy, false>(ring, kCopy ? out + taken : nullptr, data + taken);
  }
  fold_round<kCopy, true>(ring, kCopy ? out + taken : nullptr, data + taken);
  *state = detail::crc32_update(0, ring, kRingBytes);
  return taken + kRingBytes;
}

}  // namespace

namespace detail {

std::uint32_t crc32_update(std::uint32_t state, const std::uint8_t* data, std::size_t size) {
  while (size >= kSlices) {
    std::uint32_t next = 0;
    for (std::size_t i = 0; i < kSlices; ++i) {
      const std::uint32_t mixed = i < 4 ? data[i] ^ (state >> (8 * i) & 0xFF) : data[i];
      next ^= kTables[kSlices - 1 - i][mixed];
    }
    state = next;
    data += kSlices;
    size -= kSlices;
  }
  for (; size > 0; --size) state = (state >> 8) ^ kTables[0][(state ^ *data++) & 0xFF];
  return state;
}

}  // namespace detail

std::uint32_t crc32(std::uint32_t crc, const std::uint8_t* data, std::size_t size, SimdLevel level) {
  std::uint32_t state = ~crc;
  std::size_t taken = 0;
#if defined(HFLFNERV_HAVE_AVX512)
  if (level >= SimdLevel::avx512) taken = detail::crc32_fold_avx512(&state, data, size);
#endif
#if defined(HFLFNERV_HAVE_AVX2)
  if (level >= SimdLevel::avx2) {
    if (has_vpclmulqdq()) taken += detail::crc32_fold_vpclmulqdq(&state, data + taken, size - taken);
    taken += detail::crc32_fold_avx2(&state, data + taken, size - taken);
  }
#endif
  if (level == SimdLevel::scalar) taken = fold_sparse<false>(&state, nullptr, data, size);
  return ~detail::crc32_update(state, data + taken, size - taken);
}

std::uint32_t crc32_copy(std::uint32_t crc, std::uint8_t* out, const std::uint8_t* data, std::size_t size,
                         SimdLevel level) {
  std::size_t taken = 0;
  if (level == SimdLevel::scalar) {
    std::uint32_t state = ~crc;
    taken = fold_sparse<true>(&state, out, data, size);
    crc = ~state;
  }
#if defined(HFLFNERV_HAVE_AVX512)
  // Writing large copies past the caches saves reading the lines that are overwritten.
  constexpr std::size_t kLarge = 1 << 20;
  if (level >= SimdLevel::avx512 && size >= kLarge) {
    std::uint32_t state = ~crc;
    taken = (64 - reinterpret_cast<std::uintptr_t>(out) % 64) % 64;
    std::memcpy(out, data, taken);
    state = detail::crc32_update(state, data, taken);
    taken += detail::crc32_fold_stream_avx512(&state, out + taken, data + taken, size - taken);
    crc = ~state;
  }
#endif
#if defined(HFLFNERV_HAVE_AVX2)
  if (level == SimdLevel::avx2 && has_vpclmulqdq()) {
    std::uint32_t state = ~crc;
    taken = detail::crc32_fold_copy_vpclmulqdq(&state, out, data, size);
    crc = ~state;
  }
#endif
  std::memcpy(out + taken, data + taken, size - taken);
  return crc32(crc, data + taken, size - taken, level);
}

}  // namespace hflfnerv
