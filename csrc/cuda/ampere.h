// Instructions since Ampere (sm_80) as functions: asynchronous copies, products of tensor cores.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace hflfnerv {
namespace ampere {

// Dynamic shared memory.
__device__ inline char* shared_memory() {
  extern __shared__ __align__(16) char memory[];
  return memory;
}

// ---- Copies to shared memory, in groups that end in the order in which they were committed ----

// Copies 4, 8 or 16 bytes, both aligned to as many.
template <int kBytes>
__device__ inline void copy_async(void* to, const void* from) {
  const auto address = static_cast<std::uint32_t>(__cvta_generic_to_shared(to));
  if constexpr (kBytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address), "l"(from) : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(address), "l"(from), "n"(kBytes) : "memory");
  }
}

// The same; zeros if there is nothing there, when `from` is not read.
template <int kBytes>
__device__ inline void copy_async(void* to, const void* from, bool there) {
  const auto address = static_cast<std::uint32_t>(__cvta_generic_to_shared(to));
  if constexpr (kBytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(from), "r"(there ? 16 : 0) : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(address), "l"(from), "n"(kBytes),
                 "r"(there ? kBytes : 0)
                 : "memory");
  }
}

__device__ inline void copies_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most kPending of this thread's groups are under way.
template <int kPending>
__device__ inline void copies_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// 16 bytes of shared memory at once, which the compiler would take apart where it uses them one by one.
__device__ inline uint4 load_16_bytes(const void* from) {
  uint4 v;
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(static_cast<std::uint32_t>(__cvta_generic_to_shared(from)))
               : "memory");
  return v;
}

// ---- Products, and what feeds them ----

// kCount matrices of 8 x 8 elements from shared memory. Lane l gives the address of row l mod 8 of matrix l / 8, 16 bytes that
// are aligned, and gets of each matrix row l / 4, columns 2 (l mod 4) and the next; of the transposed one if it is asked for.
template <int kCount, bool kTransposed>
__device__ inline void load_matrices(std::uint32_t (&to)[kCount], const void* row) {
  const auto address = static_cast<std::uint32_t>(__cvta_generic_to_shared(row));
  if constexpr (kCount == 4 && kTransposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(address)
                 : "memory");
  } else if constexpr (kCount == 4) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(address)
                 : "memory");
  } else if constexpr (kCount == 2 && kTransposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1}, [%2];"
                 : "=r"(to[0]), "=r"(to[1])
                 : "r"(address)
                 : "memory");
  } else if constexpr (kCount == 2) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1}, [%2];"
                 : "=r"(to[0]), "=r"(to[1])
                 : "r"(address)
                 : "memory");
  } else {
    static_assert(kCount == 1 && !kTransposed, "of the other forms there are none yet");
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];" : "=r"(to[0]) : "r"(address) : "memory");
  }
}

// Adds the product of 16 x 16 by 16 x 8 elements, sums in float32. Of lane l: sums 2 i + e are row l / 4 + 8 i, column
// 2 (l mod 4) + e; a's register i + 2 h is row l / 4 + 8 i, K 8 h + 2 (l mod 4) and the next; b's register h is K as that,
// column l / 4.
#define HFLFNERV_MMA(type, name)                                                                                     \
  __device__ inline void multiply_add(type, float(&sums)[4], const std::uint32_t(&a)[4], std::uint32_t b0,           \
                                      std::uint32_t b1) {                                                            \
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." name "." name ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, " \
                 "{%0,%1,%2,%3};"                                                                                    \
                 : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])                                        \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));                                    \
  }
HFLFNERV_MMA(__nv_bfloat16, "bf16")
HFLFNERV_MMA(__half, "f16")
#undef HFLFNERV_MMA

// Adds the product of 16 x 8 by 8 x 8 elements of TF32, which are float32 whose last 13 bits do not count. The sums are as
// above; a's register i + 2 h is row l / 4 + 8 i, K l mod 4 + 4 h; b's register h is K as that, column l / 4.
__device__ inline void multiply_add_tf32(float (&sums)[4], const std::uint32_t (&a)[4], std::uint32_t b0, std::uint32_t b1) {
  asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

}  // namespace ampere
}  // namespace hflfnerv
