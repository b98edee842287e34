// What convert.cpp hands to the code compiled for one instruction set.
#pragma once

#include "convert.h"

namespace hflfnerv {

struct ConvertKernels {
  void (*to_floats)(FloatType type, const void* from, std::int64_t count, float* to);
  void (*from_floats)(FloatType type, const float* from, std::int64_t count, void* to);
};

const ConvertKernels& convert_kernels_avx2();
const ConvertKernels& convert_kernels_avx512();

}  // namespace hflfnerv
