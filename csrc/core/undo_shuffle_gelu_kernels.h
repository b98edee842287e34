// What undo_shuffle_gelu.cpp hands to the code compiled for one instruction set.
#pragma once

#include "gelu_table.h"
#include "undo_shuffle_gelu.h"

namespace hflfnerv {

struct UndoTask {
  std::int64_t rows, width, out_channels, run;  // rows of all images; elements of a pixel that lie together in a row of dy
  FloatType type;
  const void* dy;
  const void* z;
  void* dz;
  const GeluTable* gradient;

  // Pixels that are handled at once: what belongs to them stays in the first cache.
  std::int64_t piece() const {
    const std::int64_t most = 2048 / out_channels;
    return most < 1 ? 1 : most < width ? most : width;
  }
  std::int64_t scratch_floats() const { return out_channels + piece() * out_channels + 16; }
};

// Rows [begin, end) of dz; adds each row's sum, over columns, to `bias`, out_channels doubles. `scratch` has
// task.scratch_floats().
using UndoKernel = void (*)(const UndoTask&, std::int64_t begin, std::int64_t end, double* bias, float* scratch);

UndoKernel undo_kernel_avx2();
UndoKernel undo_kernel_avx512();

}  // namespace hflfnerv
