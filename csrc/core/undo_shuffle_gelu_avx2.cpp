#include "simd_avx2.h"

#include "undo_shuffle_gelu_kernels.inl"

namespace hflfnerv {

UndoKernel undo_kernel_avx2() { return undo; }

}  // namespace hflfnerv
