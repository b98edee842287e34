#include "simd_avx2.h"

#include "output_stage_kernels.inl"

namespace hflfnerv {

void output_rows_avx2(const OutputRows& rows) { Worker(rows).run(); }

}  // namespace hflfnerv
