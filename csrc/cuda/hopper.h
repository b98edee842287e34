// Hopper's own instructions (sm_90a) as functions: barriers in shared memory, bulk copies, matrix products of a warpgroup.
#pragma once

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace hflfnerv {
namespace hopper {

// Dynamic shared memory.
__device__ inline char* shared_memory() {
  extern __shared__ __align__(1024) char memory[];
  return memory;
}

__device__ inline std::uint32_t shared_address(const void* pointer) {
  return static_cast<std::uint32_t>(__cvta_generic_to_shared(pointer));
}

// ---- Barriers: `count` arrivals and all announced bytes end a phase ----

__device__ inline void barrier_init(std::uint32_t barrier, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}

// Makes the initialisation visible to the copy engine.
__device__ inline void fence_barrier_init() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

__device__ inline void barrier_arrive(std::uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

__device__ inline void barrier_arrive_and_expect(std::uint32_t barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

// Waits until the phase of this parity has ended.
__device__ inline void barrier_wait(std::uint32_t barrier, std::uint32_t parity) {
  std::uint32_t done;
  do {
    asm volatile(
        "{\n.reg .pred done;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%1], %2;\n"
        "selp.u32 %0, 1, 0, done;\n}\n"
        : "=r"(done)
        : "r"(barrier), "r"(parity)
        : "memory");
  } while (!done);
}

// ---- Bulk copies to shared memory, which end in arrivals of bytes at a barrier ----

__device__ inline void copy_bulk(std::uint32_t to, const void* from, int bytes, std::uint32_t barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
               "l"(from), "r"(bytes), "r"(barrier)
               : "memory");
}

__device__ inline void copy_box(std::uint32_t to, const CUtensorMap* map, int c0, int c1, int c2, int c3,
                                std::uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4, %5}], "
      "[%6];" ::"r"(to),
      "l"(map), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(barrier)
      : "memory");
}

// ---- Arithmetic ----

// To within 5e-4 of its value.
__device__ inline float tanh_approximately(float x) {
  float t;
  asm("tanh.approx.f32 %0, %1;" : "=f"(t) : "f"(x));
  return t;
}

__device__ inline float exp2_approximately(float x) {
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x));
  return power;
}

// x, or the nearer of -bound and bound; NaN stays NaN.
__device__ inline float clamp(float x, float bound) {
  float clamped;
  asm("{\n.reg .f32 least;\nmax.NaN.f32 least, %1, %2;\nmin.NaN.f32 %0, least, %3;\n}\n"
      : "=f"(clamped)
      : "f"(x), "f"(-bound), "f"(bound));
  return clamped;
}

// ---- A kernel that is launched before the one ahead of it in the stream has ended ----

// By the one ahead: that the other may begin to run.
__device__ inline void launch_dependents() {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}

// By the other: waits until the one ahead has ended and what it wrote can be read.
__device__ inline void wait_for_predecessors() {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// ---- Registers of a warpgroup ----

template <int kRegisters>
__device__ inline void registers_grow() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

template <int kRegisters>
__device__ inline void registers_shrink() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// ---- Matrix products: 64 rows, kColumns columns, K = 16, sums in float32 ----

// Before the first product, and whenever registers of one were written by other instructions.
__device__ inline void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Waits until at most kPending groups of products are under way.
template <int kPending>
__device__ inline void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Keeps the compiler from moving accesses to the sums across the place where it stands.
template <int kCount>
__device__ inline void keep_in_place(float (&sums)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(sums[i])::"memory");
}

#define HFLFNERV_F4(d, i) "+f"(d[kFirst + i]), "+f"(d[kFirst + i + 1]), "+f"(d[kFirst + i + 2]), "+f"(d[kFirst + i + 3])
#define HFLFNERV_F8(d, i) HFLFNERV_F4(d, i), HFLFNERV_F4(d, i + 4)
#define HFLFNERV_F16(d, i) HFLFNERV_F8(d, i), HFLFNERV_F8(d, i + 8)
#define HFLFNERV_F32(d) HFLFNERV_F16(d, 0), HFLFNERV_F16(d, 16)
#define HFLFNERV_F64(d) HFLFNERV_F32(d), HFLFNERV_F16(d, 32), HFLFNERV_F16(d, 48)
#define HFLFNERV_R16 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15"
#define HFLFNERV_R32 HFLFNERV_R16 ",%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define HFLFNERV_R20 HFLFNERV_R16 ",%16,%17,%18,%19"
#define HFLFNERV_R24 HFLFNERV_R20 ",%20,%21,%22,%23"
#define HFLFNERV_R36 HFLFNERV_R32 ",%32,%33,%34,%35"
#define HFLFNERV_R40 HFLFNERV_R36 ",%36,%37,%38,%39"
#define HFLFNERV_R48 HFLFNERV_R40 ",%40,%41,%42,%43,%44,%45,%46,%47"
#define HFLFNERV_R56 HFLFNERV_R48 ",%48,%49,%50,%51,%52,%53,%54,%55"
#define HFLFNERV_R64 HFLFNERV_R56 ",%56,%57,%58,%59,%60,%61,%62,%63"

template <int kColumns>
struct Columns {};

// Both operands from shared memory, by descriptor, or A's fragment from registers; `add` 0: the sums, those from kFirst, begin
// at zero. o0 to o5 number the operands behind the outputs, which are the last arguments.
#define HFLFNERV_WGMMA(columns, type, name, registers, o0, o1, o2, o3, o4, o5, ...)                                   \
  template <int kFirst, int kSums>                                                                                    \
  __device__ inline void wgmma(Columns<columns>, type, float(&d)[kSums], std::uint64_t a, std::uint64_t b, int add) { \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #o2 ", 0;\n"                                                    \
                 "wgmma.mma_async.sync.aligned.m64n" #columns "k16.f32." name "." name " {" registers "}, %" #o0      \
                 ", %" #o1 ", p, 1, 1, 0, 0;\n}\n"                                                                    \
                 : __VA_ARGS__                                                                                        \
                 : "l"(a), "l"(b), "r"(add));                                                                         \
  }                                                                                                                   \
  template <int kFirst, int kSums>                                                                                    \
  __device__ inline void wgmma(Columns<columns>, type, float(&d)[kSums], const std::uint32_t(&a)[4], std::uint64_t b, \
                               int add) {                                                                             \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #o5 ", 0;\n"                                                    \
                 "wgmma.mma_async.sync.aligned.m64n" #columns "k16.f32." name "." name " {" registers "}, {%" #o0     \
                 ", %" #o1 ", %" #o2 ", %" #o3 "}, %" #o4 ", p, 1, 1, 0;\n}\n"                                        \
                 : __VA_ARGS__                                                                                        \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add));                                     \
  }
#define HFLFNERV_WGMMA_BOTH(columns, registers, ...)                     \
  HFLFNERV_WGMMA(columns, __nv_bfloat16, "bf16", registers, __VA_ARGS__) \
  HFLFNERV_WGMMA(columns, __half, "f16", registers, __VA_ARGS__)

HFLFNERV_WGMMA_BOTH(32, HFLFNERV_R16, 16, 17, 18, 19, 20, 21, HFLFNERV_F16(d, 0))
HFLFNERV_WGMMA_BOTH(40, HFLFNERV_R20, 20, 21, 22, 23, 24, 25, HFLFNERV_F16(d, 0), HFLFNERV_F4(d, 16))
HFLFNERV_WGMMA_BOTH(48, HFLFNERV_R24, 24, 25, 26, 27, 28, 29, HFLFNERV_F16(d, 0), HFLFNERV_F8(d, 16))
HFLFNERV_WGMMA_BOTH(64, HFLFNERV_R32, 32, 33, 34, 35, 36, 37, HFLFNERV_F32(d))
HFLFNERV_WGMMA_BOTH(72, HFLFNERV_R36, 36, 37, 38, 39, 40, 41, HFLFNERV_F32(d), HFLFNERV_F4(d, 32))
HFLFNERV_WGMMA_BOTH(80, HFLFNERV_R40, 40, 41, 42, 43, 44, 45, HFLFNERV_F32(d), HFLFNERV_F8(d, 32))
HFLFNERV_WGMMA_BOTH(96, HFLFNERV_R48, 48, 49, 50, 51, 52, 53, HFLFNERV_F32(d), HFLFNERV_F16(d, 32))
HFLFNERV_WGMMA_BOTH(112, HFLFNERV_R56, 56, 57, 58, 59, 60, 61, HFLFNERV_F32(d), HFLFNERV_F16(d, 32),
                    HFLFNERV_F8(d, 48))
HFLFNERV_WGMMA_BOTH(128, HFLFNERV_R64, 64, 65, 66, 67, 68, 69, HFLFNERV_F64(d))

#undef HFLFNERV_WGMMA_BOTH
#undef HFLFNERV_WGMMA

// The products of all columns. More than 128 are two instructions, which read A twice and need fewer registers at once.
template <class T, class A, int kSums>
__device__ inline void wgmma(T type, float (&sums)[kSums], const A& a, std::uint64_t b, int add) {
  constexpr int kColumns = 2 * kSums, kLeft = kColumns <= 128 ? kColumns : kColumns / 16 * 8 + kColumns % 16;
  wgmma<0>(Columns<kLeft>(), type, sums, a, b, add);
  // Descriptors count units of 16 bytes; eight columns of a step are 256.
  if constexpr (kLeft < kColumns) wgmma<kLeft / 2>(Columns<kColumns - kLeft>(), type, sums, a, b + kLeft / 8 * 16, add);
}

}  // namespace hopper
}  // namespace hflfnerv
