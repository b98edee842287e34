// Elements of any type to floats and back, rounded to the nearest, ties to even.
#pragma once

#include <cstdint>

#include "cpu.h"
#include "float_types.h"

namespace hflfnerv {

void to_floats(FloatType type, const void* from, std::int64_t count, float* to, SimdLevel level);
void from_floats(FloatType type, const float* from, std::int64_t count, void* to, SimdLevel level);

}  // namespace hflfnerv
