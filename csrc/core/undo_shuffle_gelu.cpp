#include "undo_shuffle_gelu.h"

#include <algorithm>
#include <vector>

#include "scratch.h"
#include "undo_shuffle_gelu_kernels.h"

namespace hflfnerv {

#if defined(HFLFNERV_HAVE_AVX2)
namespace {

UndoKernel kernel_of(SimdLevel level) {
#if defined(HFLFNERV_HAVE_AVX512)
  if (level == SimdLevel::avx512) return undo_kernel_avx512();
#endif
  static_cast<void>(level);
  return undo_kernel_avx2();
}

}  // namespace

void undo_shuffle_gelu(const UndoShape& shape, bool tanh_form, const void* dy, const void* z, void* dz, float* dbias,
                       int threads, SimdLevel level) {
  constexpr std::int64_t kParts = 64;  // whose sums are added in order, whatever the number of threads
  const std::int64_t r = shape.r, n = shape.channels * r * r, rows = shape.batch * shape.height, parts = std::min(rows, kParts);
  const UndoTask task{rows, shape.width, n, r * shape.channels, shape.type, dy, z, dz, &gelu_table(tanh_form, true)};
  std::vector<double> sums(static_cast<std::size_t>(parts * n), 0.0);
  advise_large_pages(dz, static_cast<std::size_t>(rows * shape.width * n * size_bytes(shape.type)));
  const UndoKernel kernel = kernel_of(level);
  parallel_items_with_scratch(parts, threads, task.scratch_floats(), [&](float* scratch, std::int64_t part) {
    kernel(task, rows * part / parts, rows * (part + 1) / parts, sums.data() + part * n, scratch);
  });
  for (std::int64_t i = 0; dbias != nullptr && i < n; ++i) {
    double sum = 0;
    for (std::int64_t part = 0; part < parts; ++part) sum += sums[static_cast<std::size_t>(part * n + i)];
    dbias[shuffle_channel(shape.channels, r, i)] = static_cast<float>(sum);
  }
}

#else

void undo_shuffle_gelu(const UndoShape&, bool, const void*, const void*, void*, float*, int, SimdLevel) {}

#endif

}  // namespace hflfnerv
