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
  (void)level;
  return ~detail::crc32_update(state, data + taken, size - taken);
}

std::uint32_t crc32_copy(std::uint32_t crc, std::uint8_t* out, const std::uint8_t* data, std::size_t size,
                         SimdLevel level) {
  std::size_t taken = 0;
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
