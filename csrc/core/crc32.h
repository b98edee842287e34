// CRC-32 as in zlib, PNG and gzip: reflected polynomial 0xEDB88320, initial and final value inverted.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cpu.h"

namespace hflfnerv {

// `crc` is the value of the bytes before `data`, 0 at the start.
std::uint32_t crc32(std::uint32_t crc, const std::uint8_t* data, std::size_t size, SimdLevel level);

// The same, and copies the bytes to `out`.
std::uint32_t crc32_copy(std::uint32_t crc, std::uint8_t* out, const std::uint8_t* data, std::size_t size,
                         SimdLevel level);

namespace detail {
// Modulo the polynomial, a block is the sum of itself moved on by each of these numbers of blocks, so exclusive or
// alone folds it onto later ones (Russell, "Chorba: A novel CRC32 implementation", 2024). That 1 = x^-145 + x^-183 +
// x^-211 + x^-300 holds for x^256, which is a block, because it holds for x. None of them is near, so no load waits for
// a store. A ring holds the last blocks, each with what is folded onto it.
constexpr std::size_t kBlock = 32;
constexpr std::size_t kDistances[] = {145, 183, 211, 300};
constexpr std::size_t kRingBlocks = kDistances[3];
constexpr std::size_t kRingBytes = kRingBlocks * kBlock;
constexpr std::size_t kQuarters[] = {0, kDistances[0], kDistances[1], kDistances[2], kDistances[3]};

// `state` is the inverted value. All fold as many bytes as they can and return how many they took.
std::size_t crc32_fold_avx2(std::uint32_t* state, const std::uint8_t* data, std::size_t size);
std::size_t crc32_fold_vpclmulqdq(std::uint32_t* state, const std::uint8_t* data, std::size_t size);
std::size_t crc32_fold_avx512(std::uint32_t* state, const std::uint8_t* data, std::size_t size);
// The same, and copies what it took to `out`.
std::size_t crc32_fold_copy_vpclmulqdq(std::uint32_t* state, std::uint8_t* out, const std::uint8_t* data,
                                       std::size_t size);
// The same, and copies what it took past the caches to `out`, which is aligned to 64 bytes.
std::size_t crc32_fold_stream_avx512(std::uint32_t* state, std::uint8_t* out, const std::uint8_t* data,
                                     std::size_t size);
// Advances the inverted value over bytes, by table.
std::uint32_t crc32_update(std::uint32_t state, const std::uint8_t* data, std::size_t size);
}  // namespace detail

}  // namespace hflfnerv
