// The functions of csrc/cuda/hopper.h on memory of the host, as the PTX ISA defines the instructions behind them. Nothing is
// asynchronous: a copy is made, a product is computed when it is asked for.
#pragma once

#include <cuda_runtime.h>

#include <cstdio>
#include <cstdlib>
#include <map>
#include <memory>

// Elements of 16 bits. float16 computes as bfloat16 does, as a type of its own.
template <int kKind>
struct Element {
  std::uint16_t bits = 0;

  operator float() const {
    const std::uint32_t wide = static_cast<std::uint32_t>(bits) << 16;
    float value;
    std::memcpy(&value, &wide, 4);
    return value;
  }
  static Element round(float value) {
    std::uint32_t wide;
    std::memcpy(&wide, &value, 4);
    Element element;
    element.bits = static_cast<std::uint16_t>((wide + 0x7fff + (wide >> 16 & 1)) >> 16);
    return element;
  }
};
using __nv_bfloat16 = Element<0>;
using __half = Element<1>;
struct alignas(4) __nv_bfloat162 {
  __nv_bfloat16 x, y;
};
struct alignas(4) __half2 {
  __half x, y;
};
inline __nv_bfloat162 __floats2bfloat162_rn(float a, float b) {
  return {__nv_bfloat16::round(a), __nv_bfloat16::round(b)};
}
inline __half2 __floats2half2_rn(float a, float b) { return {__half::round(a), __half::round(b)}; }
inline std::uint32_t __float_as_uint(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}
inline float __uint_as_float(std::uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
inline float2 __half22float2(__half2 pair) { return {pair.x, pair.y}; }

namespace emulation {

inline void require(bool condition, const char* what) {
  if (condition) return;
  std::fprintf(stderr, "%s\n", what);
  std::exit(1);
}

// A barrier of shared memory: a phase ends when all arrivals and all announced bytes are there.
struct Barrier {
  std::mutex mutex;
  std::condition_variable condition;
  int count, pending, bytes = 0;
  std::uint32_t phase = 0;

  explicit Barrier(int count_) : count(count_), pending(count_) {}
  void change(int arrivals, int more_bytes) {
    const std::lock_guard<std::mutex> lock(mutex);
    require(pending >= arrivals, "more arrivals at a barrier than it counts");
    pending -= arrivals;
    bytes += more_bytes;
    if (pending != 0 || bytes != 0) return;
    pending = count;
    phase ^= 1;
    condition.notify_all();
  }
};

inline std::map<std::uint32_t, std::unique_ptr<Barrier>> barriers;
inline std::unique_ptr<Meeting> warps[20];
alignas(1024) inline char shared[kSharedBytes];

inline void begin_block() {
  barriers.clear();
  for (auto& warp : warps) warp = std::make_unique<Meeting>(32);
  std::memset(shared, 0xff, sizeof(shared));  // NaNs
}

inline char* at(std::uint32_t address, int bytes, int aligned) {
  require(address % aligned == 0, "an address in shared memory is not aligned");
  require(address + bytes <= sizeof(shared), "an address is beyond shared memory");
  return shared + address;
}

inline float element(std::uint32_t address) {
  __nv_bfloat16 value;
  std::memcpy(&value, at(address, 2, 2), 2);
  return value;
}

// Row `row` of 16 elements of an operand whose K is contiguous, without swizzle: core matrices of 8 rows by 16 adjacent
// bytes, the leading offset between the two in K, the stride offset between eights of rows.
inline void read_row(std::uint64_t descriptor, int row, float (&to)[16]) {
  const auto field = [&](int bit) { return static_cast<std::uint32_t>(descriptor >> bit & 0x3fff) << 4; };
  require((descriptor & ~0x00003fff3fff3fffull) == 0, "a descriptor has bits where there is no field");
  for (int k = 0; k < 16; ++k) {
    to[k] = element(field(0) + row / 8 * field(32) + k / 8 * field(16) + row % 8 * 16 + k % 8 * 2);
  }
}

// Adds what one thread holds of a product: accumulator 4 g + 2 i + e is row i of the thread's two, column
// 8 g + 2 (lane % 4) + e.
template <int kSums>
void add_products(float (&sums)[kSums], const float (&a)[2][16], std::uint64_t b, int add) {
  for (int g = 0; g < kSums / 4; ++g) {
    for (int e = 0; e < 2; ++e) {
      float weight[16];
      read_row(b, 8 * g + static_cast<int>(threadIdx.x) % 4 * 2 + e, weight);
      for (int i = 0; i < 2; ++i) {
        float sum = add ? sums[4 * g + 2 * i + e] : 0.0f;
        for (int k = 0; k < 16; ++k) sum += a[i][k] * weight[k];
        sums[4 * g + 2 * i + e] = sum;
      }
    }
  }
}

}  // namespace emulation

inline void __syncwarp() { emulation::warps[threadIdx.x / 32]->wait(); }

namespace hflfnerv {
namespace hopper {

inline char* shared_memory() { return emulation::shared; }
inline std::uint32_t shared_address(const void* pointer) {
  return static_cast<std::uint32_t>(static_cast<const char*>(pointer) - emulation::shared);
}

inline void barrier_init(std::uint32_t barrier, int count) {
  emulation::at(barrier, 8, 8);
  emulation::barriers[barrier] = std::make_unique<emulation::Barrier>(count);
}
inline void fence_barrier_init() {}
inline void barrier_arrive(std::uint32_t barrier) { emulation::barriers.at(barrier)->change(1, 0); }
inline void barrier_arrive_and_expect(std::uint32_t barrier, int bytes) {
  emulation::barriers.at(barrier)->change(1, bytes);
}
inline void barrier_wait(std::uint32_t barrier, std::uint32_t parity) {
  emulation::Barrier& of = *emulation::barriers.at(barrier);
  std::unique_lock<std::mutex> lock(of.mutex);
  of.condition.wait(lock, [&] { return of.phase != parity; });
}

inline void copy_bulk(std::uint32_t to, const void* from, int bytes, std::uint32_t barrier) {
  emulation::require(bytes % 16 == 0 && reinterpret_cast<std::uintptr_t>(from) % 16 == 0, "a bulk copy is not aligned");
  std::memcpy(emulation::at(to, bytes, 16), from, static_cast<std::size_t>(bytes));
  emulation::barriers.at(barrier)->change(0, -bytes);
}

// A box of a tensor, its first axis innermost, with zeros where the tensor has no element.
inline void copy_box(std::uint32_t to, const CUtensorMap* map, int c0, int c1, int c2, int c3, std::uint32_t barrier) {
  const int bytes = static_cast<int>(map->box[0] * map->box[1] * map->box[2] * map->box[3]) * 2;
  char* target = emulation::at(to, bytes, 128);
  const int first[] = {c0, c1, c2, c3};
  for (int element = 0; element < bytes / 2; ++element, target += 2) {
    bool inside = true;
    const char* from = map->base;
    for (int i = 0, rest = element; i < 4; ++i) {
      const std::int64_t index = first[i] + rest % static_cast<int>(map->box[i]);
      rest /= static_cast<int>(map->box[i]);
      inside = inside && index >= 0 && index < static_cast<std::int64_t>(map->sizes[i]);
      from += index * static_cast<std::int64_t>(map->strides[i]);
    }
    if (inside) {
      std::memcpy(target, from, 2);
    } else {
      std::memset(target, 0, 2);
    }
  }
  emulation::barriers.at(barrier)->change(0, -bytes);
}

inline float tanh_approximately(float x) { return std::tanh(x); }
inline float exp2_approximately(float x) { return std::exp2(x); }
inline float clamp(float x, float bound) { return x > bound ? bound : x < -bound ? -bound : x; }
inline void launch_dependents() {}  // a kernel has ended before the next one begins
inline void wait_for_predecessors() {}

template <int>
void registers_grow() {}
template <int>
void registers_shrink() {}
inline void wgmma_fence() {}
inline void wgmma_commit() {}
template <int>
void wgmma_wait() {
  __syncwarp();  // the threads of a warp execute it together
}
template <int kCount>
void keep_in_place(float (&)[kCount]) {}

template <class T, int kSums>
void wgmma(T, float (&sums)[kSums], std::uint64_t a, std::uint64_t b, int add) {
  const int row = static_cast<int>(threadIdx.x) % 128 / 32 * 16 + static_cast<int>(threadIdx.x) % 32 / 4;
  float rows[2][16];
  emulation::read_row(a, row, rows[0]);
  emulation::read_row(a, row + 8, rows[1]);
  emulation::add_products(sums, rows, b, add);
}

// A from registers: a0 is row lane / 4, K 2 (lane % 4) and the next; a1 is 8 rows below, a2 8 of K further, a3 both.
template <class T, int kSums>
void wgmma(T, float (&sums)[kSums], const std::uint32_t (&a)[4], std::uint64_t b, int add) {
  static std::uint32_t held[640][4];
  const int thread = static_cast<int>(threadIdx.x), quad = thread / 4 * 4;
  std::memcpy(held[thread], a, sizeof(held[thread]));
  emulation::warps[thread / 32]->wait();
  float rows[2][16];
  for (int i = 0; i < 2; ++i) {
    for (int k = 0; k < 16; ++k) {
      __nv_bfloat16 value;
      value.bits = static_cast<std::uint16_t>(held[quad + k % 8 / 2][i + k / 8 * 2] >> k % 2 * 16);
      rows[i][k] = value;
    }
  }
  emulation::warps[thread / 32]->wait();
  emulation::add_products(sums, rows, b, add);
}

}  // namespace hopper
}  // namespace hflfnerv
