#include "conv_pixel_shuffle_gelu.h"

#if defined(HFLFNERV_HAVE_AMX) && defined(__linux__)
#define HFLFNERV_AMX 1
#endif

#if defined(HFLFNERV_AMX)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>

#include "conv_kernel.h"
#include "cpu.h"
#include "scratch.h"
#endif

namespace hflfnerv {

#if defined(HFLFNERV_AMX)
namespace {

constexpr std::int64_t kBandBytes = 1 << 19;  // of converted input that stays in the second cache

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

// Rows of y / r that are computed from one conversion of the input under them.
std::int64_t band_rows(const ConvPixelShuffleShape& shape, const PlanesLayout& layout) {
  const std::int64_t fit = kBandBytes / (2 * (layout.plane_row() + layout.rest_row())) - (shape.kernel_h - 1);
  return std::min(std::max<std::int64_t>(fit / kBlockTiles, 1) * kBlockTiles, shape.out_height());
}

}  // namespace

const char* amx_unavailable() {
  static const char* const reason = find_reason();
  return reason;
}

void conv_pixel_shuffle_gelu_fwd(const ConvPixelShuffleShape& shape, bool tanh_form, const BFloat16* x,
                                 const BFloat16* weight, const float* bias, BFloat16* y, int threads) {
  const std::int64_t height = shape.out_height(), width = shape.out_width();
  PlanesLayout layout = split_channels(shape.in_channels, shape.kernel_h * shape.kernel_w);
  layout.columns = (width + kTile - 1) / kTile * kTile + shape.kernel_w - 1;
  const ConvKernel kernel({shape.in_channels, shape.channels, shape.r, shape.kernel_h, shape.kernel_w}, tanh_form, weight,
                          bias, layout, channels_last_output(width * shape.r, shape.channels), threads);
  const ConvPlan& plan = kernel.plan();

  const std::int64_t rows = shape.batch * height, band = band_rows(shape, layout);
  threads = threads_for(rows, threads);
  // Each thread's memory: planes, rest with margins, scratch.
  const std::int64_t in_rows = band + shape.kernel_h - 1;
  const std::int64_t plane_elements = in_rows * layout.plane_row();
  const std::int64_t rest_elements = (in_rows * layout.rest_row() + 2 * kRestMargin + kStep - 1) / kStep * kStep;
  const std::int64_t elements = plane_elements + rest_elements + plan.scratch_bytes() / 2;
  const Aligned<BFloat16> memory = new_aligned<BFloat16>(elements * threads);
  const std::int64_t y_image = shape.channels * shape.r * shape.r * height * width;
  advise_large_pages(y, static_cast<std::size_t>(shape.batch * y_image) * sizeof(BFloat16));
  parallel_parts(rows, threads, [&](int thread, std::int64_t begin, std::int64_t end) {
    BFloat16* const planes = memory.get() + thread * elements;
    BFloat16* const rest = planes + plane_elements + kRestMargin;
    BFloat16* const scratch = planes + plane_elements + rest_elements;
    while (begin < end) {
      const std::int64_t image = begin / height, row = begin % height;
      const std::int64_t count = std::min({band, height - row, end - begin});
      convert_rows_amx({x + image * shape.height * shape.width * shape.in_channels, shape.height, shape.width,
                        shape.in_channels, row - shape.padding_h, count + shape.kernel_h - 1, shape.padding_w},
                       layout, planes, rest);
      BFloat16* const to = y + image * y_image + row * shape.r * plan.out.plane_row;
      conv_rows_amx(plan, {{planes, rest}, {to, nullptr, INT64_MAX}, 0, count, width, 0, plan.tiles}, scratch);
      begin += count;
    }
  });
}

#else

const char* amx_unavailable() { return "needs AMX (bf16): this build has no code for it"; }

void conv_pixel_shuffle_gelu_fwd(const ConvPixelShuffleShape&, bool, const BFloat16*, const BFloat16*, const float*,
                                 BFloat16*, int) {}

#endif

}  // namespace hflfnerv
