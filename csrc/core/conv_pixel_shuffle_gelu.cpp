#include "conv_pixel_shuffle_gelu.h"

#if defined(HFLFNERV_HAVE_AMX) && defined(__linux__)
#define HFLFNERV_AMX 1
#endif

#if defined(HFLFNERV_AMX)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <vector>

#include "conv_kernel.h"
#include "conv_weight_gradient_amx.h"
#include "cpu.h"
#include "scratch.h"
#include "undo_shuffle_gelu.h"
#endif

namespace hflfnerv {

#if defined(HFLFNERV_AMX)
namespace {

constexpr std::int64_t kBandBytes = 1 << 19;  // of converted input that stays in the second cache
constexpr std::int64_t kLeastColumns = 128;  // of a band: fewer of them share too little of what is around them

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

// The pixels of y / r that are computed from one conversion of the input under them: at most so many rows and columns.
struct Band {
  std::int64_t rows, columns;
};

// Columns are divided until there are enough rows, so that few of those under two bands are converted twice.
Band band_of(const ConvPixelShuffleShape& shape, std::int64_t pixel_bytes) {
  const std::int64_t height = shape.out_height(), width = shape.out_width(), halo = shape.kernel_h - 1;
  const std::int64_t wanted = std::min(std::max(4 * halo, 2 * kBlockTiles), height);
  Band band{};
  for (std::int64_t parts = 1;; ++parts) {
    band.columns = std::min((width + parts * kTile - 1) / (parts * kTile) * kTile, width);
    const std::int64_t row_bytes = ((band.columns + kTile - 1) / kTile * kTile + shape.kernel_w - 1) * pixel_bytes;
    const std::int64_t rows = (kBandBytes / row_bytes - halo) / kBlockTiles * kBlockTiles;
    band.rows = std::min(std::max(rows, kBlockTiles), height);
    if (band.rows >= wanted || band.columns <= kLeastColumns) return band;
  }
}

// The convolution of channels-last images, with GELU unless the table is null. z may be null.
void convolve(const ConvPixelShuffleShape& shape, const GeluTable* table, const BFloat16* x, const ConvWeight& weight,
              const float* bias, BFloat16* y, BFloat16* z, int threads) {
  const std::int64_t height = shape.out_height(), width = shape.out_width();
  PlanesLayout layout = split_channels(shape.in_channels, shape.kernel_h * shape.kernel_w);
  const Band band = band_of(shape, 2 * (layout.groups * kStep + layout.rest));
  layout.columns = (band.columns + kTile - 1) / kTile * kTile + shape.kernel_w - 1;
  const ConvKernel kernel({shape.in_channels, shape.channels, shape.r, shape.kernel_h, shape.kernel_w}, table, weight, bias,
                          layout, channels_last_output(width * shape.r, shape.channels), threads);
  const ConvPlan& plan = kernel.plan();

  const std::int64_t rows = shape.batch * height;
  threads = threads_for(rows, threads);
  // Each thread's memory: planes, rest with margins, scratch.
  const std::int64_t in_rows = band.rows + shape.kernel_h - 1;
  const std::int64_t plane_elements = in_rows * layout.plane_row();
  const std::int64_t rest_elements = (in_rows * layout.rest_row() + 2 * kRestMargin + kStep - 1) / kStep * kStep;
  const std::int64_t elements = plane_elements + rest_elements + plan.scratch_bytes() / 2;
  const Aligned<BFloat16> memory = new_aligned<BFloat16>(elements * threads);
  const std::int64_t row_elements = shape.out_channels() * width;  // of y / r, and of z
  for (BFloat16* const result : {y, z}) {
    if (result != nullptr) advise_large_pages(result, static_cast<std::size_t>(rows * row_elements) * sizeof(BFloat16));
  }
  parallel_parts(rows, threads, [&](int thread, std::int64_t begin, std::int64_t end) {
    BFloat16* const planes = memory.get() + thread * elements;
    BFloat16* const rest = planes + plane_elements + kRestMargin;
    BFloat16* const scratch = planes + plane_elements + rest_elements;
    while (begin < end) {
      const std::int64_t image = begin / height, row = begin % height;
      const std::int64_t count = std::min({band.rows, height - row, end - begin});
      for (std::int64_t column = 0; column < width; column += band.columns) {
        convert_rows_amx({x + image * shape.height * shape.width * shape.in_channels, shape.height, shape.width,
                          shape.in_channels, row - shape.padding_h, count + shape.kernel_h - 1, column - shape.padding_w},
                         layout, planes, rest);
        ConvOutput out{y + begin * row_elements + column * shape.r * plan.out.plane_pixel, nullptr, INT64_MAX};
        if (z != nullptr) out.z = z + begin * row_elements + column * shape.out_channels();
        out.z_row = row_elements;
        const std::int64_t columns = std::min(band.columns, width - column);
        conv_rows_amx(plan, {{planes, rest}, out, 0, count, columns, 0, plan.tiles}, scratch);
      }
      begin += count;
    }
  });
}

}  // namespace

const char* amx_unavailable() {
  static const char* const reason = find_reason();
  return reason;
}

void conv_pixel_shuffle_gelu_fwd(const ConvPixelShuffleShape& shape, ConvActivation activation, const BFloat16* x,
                                 const BFloat16* weight, const float* bias, BFloat16* y, BFloat16* z, int threads) {
  convolve(shape, activation_table(activation), x, {weight}, bias, y, z, threads);
}

void conv_pixel_shuffle_gelu_dgrad(const ConvPixelShuffleShape& shape, const BFloat16* dz, const BFloat16* weight,
                                   BFloat16* dx, int threads) {
  const ConvPixelShuffleShape back{shape.batch,       shape.out_channels(), shape.out_height(),
                                   shape.out_width(), shape.in_channels,    1,
                                   shape.kernel_h,    shape.kernel_w,       shape.kernel_h - 1 - shape.padding_h,
                                   shape.kernel_w - 1 - shape.padding_w};
  convolve(back, nullptr, dz, {weight, shape.r}, nullptr, dx, nullptr, threads);
}

void conv_pixel_shuffle_gelu_wgrad(const ConvPixelShuffleShape& shape, const BFloat16* x, const BFloat16* dz,
                                   BFloat16* dweight, int threads) {
  const WeightGradientPlan plan({shape.batch, shape.in_channels, shape.height, shape.width, shape.out_channels(),
                                 shape.kernel_h, shape.kernel_w, shape.padding_h, shape.padding_w});
  const std::int64_t items = plan.parts * plan.shares(), elements = plan.scratch_elements();
  threads = threads_for(items, threads);
  const Aligned<BFloat16> memory = new_zeros<BFloat16>(elements * threads);
  const Aligned<float> sums = new_zeros<float>(plan.parts * plan.part_floats());
  parallel_items(items, threads, [&](int thread, std::int64_t item) {
    const std::int64_t part = item / plan.shares(), index = item % plan.shares();
    weight_gradient_amx(plan,
                        {x, dz, plan.bands() * part / plan.parts, plan.bands() * (part + 1) / plan.parts, index,
                         sums.get() + part * plan.part_floats()},
                        memory.get() + thread * elements);
  });
  std::vector<std::int64_t> channels;
  for (std::int64_t n = 0; n < shape.out_channels(); ++n) {
    channels.push_back(shuffle_channel(shape.channels, shape.r, n));
  }
  parallel_parts(plan.row_tiles, threads, [&](int, std::int64_t begin, std::int64_t end) {
    for (std::int64_t tile = begin; tile < end; ++tile) {
      weight_gradient_result_amx(plan, sums.get(), channels.data(), tile, dweight);
    }
  });
}

#else

const char* amx_unavailable() { return "needs AMX (bf16): this build has no code for it"; }

void conv_pixel_shuffle_gelu_fwd(const ConvPixelShuffleShape&, ConvActivation, const BFloat16*, const BFloat16*, const float*,
                                 BFloat16*, BFloat16*, int) {}
void conv_pixel_shuffle_gelu_dgrad(const ConvPixelShuffleShape&, const BFloat16*, const BFloat16*, BFloat16*, int) {}
void conv_pixel_shuffle_gelu_wgrad(const ConvPixelShuffleShape&, const BFloat16*, const BFloat16*, BFloat16*, int) {}

#endif

}  // namespace hflfnerv
