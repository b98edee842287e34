#include "conv_pixel_shuffle_gelu.h"

#if defined(HFLFNERV_HAVE_AMX) && defined(__linux__)
#define HFLFNERV_AMX 1
#endif

#if defined(HFLFNERV_AMX)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cstddef>
#include <memory>
#include <new>
#include <vector>

#include "conv_pixel_shuffle_gelu_amx.h"
#include "cpu.h"
#include "memory.h"
#include "parallel.h"
#endif

namespace hflfnerv {

#if defined(HFLFNERV_AMX)
namespace {

const char* find_reason() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  const bool tiles = __get_cpuid_count(7, 0, &a, &b, &c, &d) != 0 && (d >> 24 & 1) != 0 && (d >> 22 & 1) != 0;
  if (!tiles || best_simd_level() != SimdLevel::avx512) return "needs AMX (bf16): this CPU has none";
  constexpr int kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  if (syscall(SYS_arch_prctl, kRequestPermission, kTileData) != 0) {
    return "needs AMX (bf16): the operating system does not allow its use";
  }
  return nullptr;
}

struct Free {
  void operator()(void* p) const { ::operator delete(p, std::align_val_t(64)); }
};
using Elements = std::unique_ptr<BFloat16, Free>;

Elements new_elements(std::int64_t count) {
  return Elements(static_cast<BFloat16*>(::operator new(static_cast<std::size_t>(count) * 2, std::align_val_t(64))));
}

// Input channels beyond groups of 32 are gathered where that saves a fifth of the steps of another, padded group.
void split_channels(ConvTask& task) {
  task.groups = task.shape.in_channels / kStep;
  task.rest = task.shape.in_channels % kStep;
  if (task.rest_steps() * 5 > task.taps() * 4) {
    ++task.groups;
    task.rest = 0;
  }
}

std::vector<std::int64_t> step_offsets(const ConvTask& task) {
  std::vector<std::int64_t> offsets;
  for (std::int64_t ky = 0; ky < task.shape.kernel_h; ++ky) {
    for (std::int64_t kx = 0; kx < task.shape.kernel_w; ++kx) {
      for (std::int64_t g = 0; g < task.groups; ++g) {
        offsets.push_back(ky * task.plane_row() + (g * task.padded_width() + kx) * kStep);
      }
    }
  }
  return offsets;
}

}  // namespace

const char* conv_pixel_shuffle_gelu_unavailable() {
  static const char* const reason = find_reason();
  return reason;
}

void conv_pixel_shuffle_gelu_fwd(const ConvPixelShuffleShape& shape, bool tanh_form, const BFloat16* x,
                                 const BFloat16* weight, const float* bias, BFloat16* y, int threads) {
  ConvTask task{};
  task.shape = shape;
  task.x = x;
  task.weight = weight;
  task.table = &gelu_table(tanh_form, false);
  task.y = y;
  split_channels(task);
  const std::vector<std::int64_t> steps = step_offsets(task);
  task.steps = steps.data();

  // Column (i r + j) channels + c is channel c r² + i r + j.
  std::vector<float> biases(static_cast<std::size_t>(task.column_tiles() * kTile), 0.0f);
  const std::int64_t row_columns = shape.r * shape.channels, row = shape.out_width() * row_columns;
  std::vector<ConvStore> stores;
  std::vector<int> first_store;
  for (std::int64_t column = 0; column < shape.out_channels(); ++column) {
    const std::int64_t lane = column % kTile, i = column / row_columns;
    if (bias != nullptr) {
      biases[static_cast<std::size_t>(column)] = bias[column % shape.channels * shape.r * shape.r + column / shape.channels];
    }
    if (lane == 0) first_store.push_back(static_cast<int>(stores.size()));
    if (lane == 0 || column % row_columns == 0) stores.push_back({0, i * row + column % row_columns - lane});
    stores.back().mask = static_cast<std::uint16_t>(stores.back().mask | 1u << lane);
  }
  first_store.push_back(static_cast<int>(stores.size()));
  task.bias = biases.data();
  task.stores = stores.data();
  task.first_store = first_store.data();

  const std::int64_t rows = shape.batch * shape.out_height();
  threads = static_cast<int>(std::max<std::int64_t>(1, std::min<std::int64_t>(threads, rows)));
  const Elements packed = new_elements(task.packed_elements());
  task.packed = packed.get();
  parallel_parts(task.column_tiles(), threads,
                 [&](int, std::int64_t begin, std::int64_t end) { conv_pack_weights_amx(task, begin, end); });

  const std::int64_t elements = (task.memory_elements() + 31) / 32 * 32;
  const Elements memory = new_elements(elements * threads);
  advise_large_pages(y, static_cast<std::size_t>(rows * shape.r * row * size_bytes(FloatType::bf16)));
  parallel_parts(rows, threads, [&](int thread, std::int64_t begin, std::int64_t end) {
    conv_pixel_shuffle_gelu_rows_amx(task, begin, end, memory.get() + thread * elements);
  });
}

#else

const char* conv_pixel_shuffle_gelu_unavailable() { return "needs AMX (bf16): this build has no code for it"; }

void conv_pixel_shuffle_gelu_fwd(const ConvPixelShuffleShape&, bool, const BFloat16*, const BFloat16*, const float*,
                                 BFloat16*, int) {}

#endif

}  // namespace hflfnerv
