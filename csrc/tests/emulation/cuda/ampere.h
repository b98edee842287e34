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

// What a lane's registers of the operands a and b hold is held here while the warp multiplies.
inline std::uint32_t held[640][6];

inline void hold(const std::uint32_t (&a)[4], std::uint32_t b0, std::uint32_t b1) {
  std::memcpy(held[threadIdx.x], a, sizeof(a));
  held[threadIdx.x][4] = b0;
  held[threadIdx.x][5] = b1;
  emulation::warps[threadIdx.x / 32]->wait();
}

// A copy is made when its group is waited for, as late as the hardware might.
struct Copy {
  void* to;
  const void* from;
  int bytes;
};
inline thread_local std::vector<std::vector<Copy>> groups(1);

template <int kBytes>
void copy_async(void* to, const void* from) {
  const auto aligned = [](const void* p) { return reinterpret_cast<std::uintptr_t>(p) % kBytes == 0; };
  emulation::require(aligned(to) && aligned(from), "an asynchronous copy is not aligned");
  groups.back().push_back({to, from, kBytes});
}
template <int kBytes>
void copy_async(void* to, const void* from, bool there) {
  alignas(16) static const char zeros[16] = {};
  copy_async<kBytes>(to, there ? from : zeros);
}
inline void copies_commit() { groups.emplace_back(); }
template <int kPending>
void copies_wait() {
  while (groups.size() - 1 > kPending) {
    for (const Copy& copy : groups.front()) std::memcpy(copy.to, copy.from, static_cast<std::size_t>(copy.bytes));
    groups.erase(groups.begin());
  }
}
inline uint4 load_16_bytes(const void* from) { return *static_cast<const uint4*>(from); }

template <class T>
void multiply_add(T, float (&sums)[4], const std::uint32_t (&a)[4], std::uint32_t b0, std::uint32_t b1) {
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32 * 32, lane = thread % 32;
  hold(a, b0, b1);
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

inline void multiply_add_tf32(float (&sums)[4], const std::uint32_t (&a)[4], std::uint32_t b0, std::uint32_t b1) {
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32 * 32, lane = thread % 32;
  hold(a, b0, b1);
  const auto value = [](std::uint32_t bits) {
    bits &= 0xffffe000;
    float wide;
    std::memcpy(&wide, &bits, 4);
    return wide;
  };
  for (int i = 0; i < 2; ++i) {
    for (int e = 0; e < 2; ++e) {
      const int column = lane % 4 * 2 + e;
      for (int k = 0; k < 8; ++k) {
        sums[2 * i + e] += value(held[warp + lane / 4 * 4 + k % 4][i + k / 4 * 2]) *
                           value(held[warp + column * 4 + k % 4][4 + k / 4]);
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

}  // namespace ampere
}  // namespace hflfnerv
