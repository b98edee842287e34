#include "pixel_shuffle_gelu.h"

#if defined(HFLFNERV_HAVE_AVX2)
#include <cpuid.h>
#endif

#include <algorithm>
#include <vector>

#include "memory.h"
#include "parallel.h"
#include "pixel_shuffle_gelu_kernels.h"

namespace hflfnerv {
namespace {

using Items = void (*)(const PixelShuffleTask&, std::int64_t, std::int64_t, float*);

// A thread is worth its start from about this much on.
constexpr std::int64_t kElementsPerThread = 1 << 16;

#if defined(HFLFNERV_HAVE_AVX2)
Items kernel_of(const PixelShuffleShape& shape, SimdLevel level, bool forward) {
#if defined(HFLFNERV_HAVE_AVX512)
  // Few channels fill the shorter vectors only. Their GELU is another one, as exact.
  if (shape.channels_last && shape.channels >= 8 && shape.channels < 16) level = SimdLevel::avx2;
  if (level == SimdLevel::avx512) return forward ? pixel_shuffle_gelu_fwd_avx512 : pixel_shuffle_gelu_bwd_avx512;
#endif
  if (level == SimdLevel::avx2) return forward ? pixel_shuffle_gelu_fwd_avx2 : pixel_shuffle_gelu_bwd_avx2;
  return nullptr;
}
#else
Items kernel_of(const PixelShuffleShape&, SimdLevel, bool) { return nullptr; }
#endif

void run(const PixelShuffleTask& task, Items kernel, int threads) {
  const std::int64_t elements = task.shape.elements();
  advise_large_pages(task.out, static_cast<std::size_t>(elements * size_bytes(task.type)));
  threads = static_cast<int>(std::min<std::int64_t>(threads, 1 + elements / kElementsPerThread));
  const std::int64_t floats = task.scratch_floats();
  const Aligned<float> scratch = new_zeros<float>(floats * std::max(threads, 1));
  parallel_parts(task.items(), threads, [&](int thread, std::int64_t begin, std::int64_t end) {
    kernel(task, begin, end, scratch.get() + thread * floats);
  });
}

// The biases of all channels: zeros where there are none.
Aligned<float> biases_of(const PixelShuffleShape& shape, const float* bias) {
  Aligned<float> all = new_zeros<float>(shape.in_channels());
  if (bias != nullptr) std::copy(bias, bias + shape.in_channels(), all.get());
  return all;
}

}  // namespace

SimdLevel pixel_shuffle_gelu_level() {
#if defined(HFLFNERV_HAVE_AVX2)
  static const bool complete = [] {
    unsigned a = 0, b = 0, c = 0, d = 0;
    return __get_cpuid(1, &a, &b, &c, &d) != 0 && (c >> 12 & 1) != 0 && (c >> 29 & 1) != 0;  // FMA, F16C
  }();
  if (complete) return best_simd_level();
#endif
  return SimdLevel::scalar;
}

void pixel_shuffle_gelu_fwd(const PixelShuffleShape& shape, const GeluForm& form, const void* x, const float* bias, void* y,
                            int threads, SimdLevel level) {
  const Aligned<float> biases = biases_of(shape, bias);
  const GeluTable& table = gelu_table(form.tanh_form, false);
  const PixelShuffleTask task{shape, form.type, &table, x, biases.get(), bias != nullptr, nullptr, y, nullptr};
  run(task, kernel_of(shape, level, true), threads);
}

void pixel_shuffle_gelu_bwd(const PixelShuffleShape& shape, const GeluForm& form, const void* dy, const void* x,
                            const float* bias, void* dx, float* dbias, int threads, SimdLevel level) {
  const Aligned<float> biases = biases_of(shape, bias);
  const GeluTable& table = gelu_table(form.tanh_form, true);
  PixelShuffleTask task{shape, form.type, &table, x, biases.get(), bias != nullptr, dy, dx, nullptr};
  std::vector<double> sums(static_cast<std::size_t>(task.items() * task.item_sums()), 0.0);
  task.sums = sums.data();
  run(task, kernel_of(shape, level, false), threads);
  if (dbias == nullptr) return;
  // Items are ordered by image, then plane (where there are planes), then rows.
  const std::int64_t planes = shape.channels_last ? 1 : shape.channels, blocks = task.row_blocks();
  std::vector<double> total(static_cast<std::size_t>(shape.in_channels()), 0.0);
  for (std::int64_t item = 0; item < task.items(); ++item) {
    double* to = total.data() + item / blocks % planes * task.item_sums();
    for (std::int64_t k = 0; k < task.item_sums(); ++k) to[k] += sums[static_cast<std::size_t>(item * task.item_sums() + k)];
  }
  std::copy(total.begin(), total.end(), dbias);
}

}  // namespace hflfnerv
