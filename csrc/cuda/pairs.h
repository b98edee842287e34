// 16-bit floats, alone and in pairs that share a register.
#pragma once

#include <cstring>

#include "cuda/hopper.h"

namespace hflfnerv {

__device__ inline std::uint32_t two(__nv_bfloat16, float a, float b) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(a, b);
  std::uint32_t bits;
  memcpy(&bits, &pair, 4);
  return bits;
}
__device__ inline std::uint32_t two(__half, float a, float b) {
  const __half2 pair = __floats2half2_rn(a, b);
  std::uint32_t bits;
  memcpy(&bits, &pair, 4);
  return bits;
}

__device__ inline float2 both(__nv_bfloat16, std::uint32_t bits) {  // an instruction each, unlike __bfloat1622float2's
  return {__uint_as_float(bits << 16), __uint_as_float(bits & 0xffff0000u)};
}
__device__ inline float2 both(__half, std::uint32_t bits) {
  __half2 pair;
  memcpy(static_cast<void*>(&pair), &bits, 4);
  return __half22float2(pair);
}

template <class T>
__device__ inline float to_float(std::uint16_t bits) {
  T value;
  memcpy(static_cast<void*>(&value), &bits, 2);
  return static_cast<float>(value);
}

}  // namespace hflfnerv
