#include "simd_avx512.h"

#include "output_stage_kernels.inl"

namespace hflfnerv {

void output_rows_avx512(const OutputRows& rows) { Worker(rows).run(); }

}  // namespace hflfnerv
