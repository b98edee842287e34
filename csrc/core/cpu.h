// Which instruction sets this processor and operating system offer, found out once at run time.
#pragma once

#include <cstdint>

namespace hflfnerv {

enum class SimdLevel { scalar = 0, avx2 = 1, avx512 = 2 };

// Floats in a vector of a level that has vectors.
constexpr std::int64_t lanes_of(SimdLevel level) { return level == SimdLevel::avx512 ? 16 : 8; }

// The best level that this machine can run and that this build contains.
SimdLevel best_simd_level();

// Carry-less multiplication of 256-bit registers, which some processors with AVX2 have and some have not.
bool has_vpclmulqdq();

}  // namespace hflfnerv
