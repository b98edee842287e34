#include "cpu.h"

#if defined(HFLFNERV_HAVE_AVX2)
#include <cpuid.h>
#endif

namespace hflfnerv {
#if defined(HFLFNERV_HAVE_AVX2)
namespace {

// LZCNT, which not every compiler knows by name: without it the instruction silently means another.
bool has_lzcnt() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid(0x80000001, &a, &b, &c, &d) != 0 && (c >> 5 & 1) != 0;
}

}  // namespace
#endif

SimdLevel best_simd_level() {
#if defined(HFLFNERV_HAVE_AVX2)
  static const SimdLevel level = [] {
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("bmi") &&
                      __builtin_cpu_supports("bmi2") && has_lzcnt() && __builtin_cpu_supports("pclmul");
    if (!avx2) return SimdLevel::scalar;
#if defined(HFLFNERV_HAVE_AVX512)
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                        __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512vbmi") &&
                        __builtin_cpu_supports("avx512vbmi2") && __builtin_cpu_supports("avx512vnni") &&
                        __builtin_cpu_supports("gfni") &&
                        __builtin_cpu_supports("vpclmulqdq");
    if (avx512) return SimdLevel::avx512;
#endif
    return SimdLevel::avx2;
  }();
  return level;
#else
  return SimdLevel::scalar;
#endif
}

bool has_vpclmulqdq() {
#if defined(HFLFNERV_HAVE_AVX2)
  static const bool has = best_simd_level() >= SimdLevel::avx2 && __builtin_cpu_supports("vpclmulqdq");
  return has;
#else
  return false;
#endif
}

}  // namespace hflfnerv
