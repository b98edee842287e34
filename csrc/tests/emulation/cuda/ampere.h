// The functions of csrc/cuda/ampere.h by threads of the host, as the PTX ISA defines the instructions behind them.
#pragma once

#include "tests/emulation/cuda/hopper.h"

inline float __expf(float x) { return std::exp(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline int __float2int_rn(float x) { return static_cast<int>(std::nearbyint(x)); }
using std::fmaxf;
using std::fminf;

namespace hflfnerv {
namespace ampere {

inline char* shared_memory() { return emulation::shared; }

template <class T>
void multiply_add(T, float (&sums)[4], const std::uint32_t (&a)[4], std::uint32_t b0, std::uint32_t b1) {
  static std::uint32_t held[640][6];
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32 * 32, lane = thread % 32;
  std::memcpy(held[thread], a, sizeof(a));
  held[thread][4] = b0;
  held[thread][5] = b1;
  emulation::warps[thread / 32]->wait();
  const auto half = [](std::uint32_t bits, int k) {
    T value;
    value.bits = static_cast<std::uint16_t>(bits >> k % 2 * 16);
    return static_cast<float>(value);
  };
  for (int i = 0; i < 2; ++i) {
    for (int e = 0; e < 2; ++e) {
      const int column = lane % 4 * 2 + e;
      for (int k = 0; k < 16; ++k) {
        sums[2 * i + e] += half(held[warp + lane / 4 * 4 + k % 8 / 2][i + k / 8 * 2], k) *
                           half(held[warp + column * 4 + k % 8 / 2][4 + k / 8], k);
      }
    }
  }
  emulation::warps[thread / 32]->wait();
}

// A lane's addresses and what the lanes get of the matrices whose rows lie there.
template <int kCount, bool kTransposed>
void load_matrices(std::uint32_t (&to)[kCount], const void* row) {
  static const char* rows[640];
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32 * 32, lane = thread % 32;
  rows[thread] = static_cast<const char*>(row);
  emulation::require(lane >= 8 * kCount || (rows[thread] >= emulation::shared && (rows[thread] - emulation::shared) % 16 == 0 &&
                                            rows[thread] + 16 <= emulation::shared + emulation::kSharedBytes),
                     "a matrix's row is not in shared memory, or not aligned");
  emulation::warps[thread / 32]->wait();
  for (int m = 0; m < kCount; ++m) {
    std::uint16_t pair[2];
    for (int e = 0; e < 2; ++e) {
      const int i = lane / 4, j = lane % 4 * 2 + e;
      std::memcpy(&pair[e], rows[warp + 8 * m + (kTransposed ? j : i)] + 2 * (kTransposed ? i : j), 2);
    }
    to[m] = pair[0] | static_cast<std::uint32_t>(pair[1]) << 16;
  }
  emulation::warps[thread / 32]->wait();
}

template <int kBytes>
void copy_async(void* to, const void* from, bool there) {
  const auto aligned = [](const void* p) { return reinterpret_cast<std::uintptr_t>(p) % kBytes == 0; };
  emulation::require(aligned(to) && (!there || aligned(from)), "an asynchronous copy is not aligned");
  if (there) {
    std::memcpy(to, from, kBytes);
  } else {
    std::memset(to, 0, kBytes);
  }
}
inline void copy_commit() {}
template <int>
void copy_wait() {}

inline std::uint32_t two(__nv_bfloat16, float a, float b) {
  return __nv_bfloat16::round(a).bits | static_cast<std::uint32_t>(__nv_bfloat16::round(b).bits) << 16;
}
inline std::uint32_t two(__half, float a, float b) { return two(__nv_bfloat16(), a, b); }

template <class T>
float to_float(std::uint16_t bits) {
  T value;
  value.bits = bits;
  return static_cast<float>(value);
}

}  // namespace ampere
}  // namespace hflfnerv
