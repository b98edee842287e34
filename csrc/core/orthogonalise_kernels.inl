// Included behind the Simd of one instruction set; see orthogonalise_kernels.h.
#include "multiply.inl"
#include "orthogonalise_kernels.h"

namespace hflfnerv {
namespace {

constexpr int kVectors = 2;
constexpr std::int64_t kColumns = kVectors * kLanes;  // of a chunk
constexpr std::int64_t kInner = 256;  // rows of b of which a chunk's columns stay in the first cache

void product(const MatrixProduct& task, std::int64_t begin, std::int64_t end) {
  for (std::int64_t k = 0; k < task.inner; k += kInner) {
    const std::int64_t inner = task.inner - k < kInner ? task.inner - k : kInner;
    for (std::int64_t chunk = begin; chunk < end; ++chunk) {
      const std::int64_t last = (chunk + 1) * kColumns;  // of the diagonal, above which the chunk begins
      const std::int64_t rows = task.symmetric && last < task.rows ? last : task.rows;
      const float* const b = task.b + k * task.b_row + chunk * kColumns;
      for (std::int64_t row = 0; row < rows; row += kRows) {
        const float* const a = task.a + row * task.a_row + k * task.a_inner;
        float* const c = task.c + row * task.c_row + chunk * kColumns;
        if (k == 0) {
          multiply<kRows, kVectors, false>(a, task.a_row, task.a_inner, b, task.b_row, inner, c, task.c_row);
        } else {
          multiply<kRows, kVectors, true>(a, task.a_row, task.a_inner, b, task.b_row, inner, c, task.c_row);
        }
      }
    }
  }
}

}  // namespace
}  // namespace hflfnerv
