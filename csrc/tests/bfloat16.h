// Values of bfloat16 as float, and back, rounded to nearest even.
#pragma once

#include <cstdint>
#include <cstring>
#include <vector>

#include "core/float_types.h"
#include "tests/check.h"

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

inline std::vector<BFloat16> narrow(const std::vector<float>& values) {
  std::vector<BFloat16> narrowed;
  for (const float value : values) narrowed.push_back(narrow(value));
  return narrowed;
}

inline std::vector<float> widen(const std::vector<BFloat16>& values) {
  std::vector<float> widened;
  for (const BFloat16 value : values) widened.push_back(widen(value));
  return widened;
}

// That a result is that of floats, rounded.
inline void check_narrowed(const std::vector<BFloat16>& actual, const std::vector<float>& exact) {
  CHECK(actual.size() == exact.size());
  for (std::size_t i = 0; i < actual.size(); ++i) CHECK(actual[i].bits == narrow(exact[i]).bits);
}

}  // namespace hflfnerv
