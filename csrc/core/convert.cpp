#include "convert.h"

#include "convert_kernels.h"

namespace hflfnerv {

#if defined(HFLFNERV_HAVE_AVX2)
namespace {

const ConvertKernels& kernels_of([[maybe_unused]] SimdLevel level) {
#if defined(HFLFNERV_HAVE_AVX512)
  if (level == SimdLevel::avx512) return convert_kernels_avx512();
#endif
  return convert_kernels_avx2();
}

}  // namespace

void to_floats(FloatType type, const void* from, std::int64_t count, float* to, SimdLevel level) {
  kernels_of(level).to_floats(type, from, count, to);
}

void from_floats(FloatType type, const float* from, std::int64_t count, void* to, SimdLevel level) {
  kernels_of(level).from_floats(type, from, count, to);
}

#else

void to_floats(FloatType, const void*, std::int64_t, float*, SimdLevel) {}
void from_floats(FloatType, const float*, std::int64_t, void*, SimdLevel) {}

#endif

}  // namespace hflfnerv
