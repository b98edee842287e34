#include "simd_avx512.h"

#include "undo_shuffle_gelu_kernels.inl"

namespace hflfnerv {

UndoKernel undo_kernel_avx512() { return undo; }

}  // namespace hflfnerv
