// Values of bfloat16 as float, and back, rounded to nearest even.
#pragma once

#include <cstdint>
#include <cstring>

#include "core/float_types.h"

namespace hflfnerv {

inline float widen(BFloat16 v) {
  const std::uint32_t bits = static_cast<std::uint32_t>(v.bits) << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}

inline BFloat16 narrow(float v) {
  std::uint32_t bits;
  std::memcpy(&bits, &v, 4);
  return {static_cast<std::uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

}  // namespace hflfnerv
