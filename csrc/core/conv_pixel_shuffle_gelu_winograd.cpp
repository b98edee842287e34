#include "conv_pixel_shuffle_gelu_winograd.h"

#include <algorithm>
#include <vector>

#include "conv_pixel_shuffle_gelu_fourier_kernels.h"
#include "conv_pixel_shuffle_gelu_winograd_kernels.h"
#include "scratch.h"
#include "undo_shuffle_gelu.h"

namespace hflfnerv {

#if defined(HFLFNERV_HAVE_AVX2)
namespace {

const WinogradKernels& kernels_of(SimdLevel level) {
#if defined(HFLFNERV_HAVE_AVX512)
  if (level == SimdLevel::avx512) return winograd_kernels_avx512();
#endif
  static_cast<void>(level);
  return winograd_kernels_avx2();
}

const FourierKernels& fourier_kernels_of(SimdLevel level) {
#if defined(HFLFNERV_HAVE_AVX512)
  if (level == SimdLevel::avx512) return fourier_kernels_avx512();
#endif
  static_cast<void>(level);
  return fourier_kernels_avx2();
}

constexpr std::int64_t kLargeWeight = std::int64_t{1} << 21, kSharedTiles = std::int64_t{1} << 22;  // floats

// What runs the tiles of a plan, and the memory that it takes, in floats.
struct Method {
  decltype(WinogradKernels::weight) weight;
  decltype(WinogradKernels::conv) conv;
  std::int64_t chunk_floats;                 // of a chunk of the weight
  std::int64_t tile_floats, scratch_floats;  // of the tiles of a block, and beside them
  std::int64_t block, step;  // of tiles: how many at most, and a number whose multiples leave no products unused
};

Method method_of(const WinogradPlan& plan, SimdLevel level) {
  if (plan.axis != kFourierAxis) {
    const WinogradKernels& kernels = kernels_of(level);
    return {kernels.weight,        kernels.conv, plan.chunk_floats(), plan.tile_floats(),
            plan.scratch_floats(), plan.block(), plan.rows() / 2};
  }
  const FourierKernels& kernels = fourier_kernels_of(level);
  const FourierPlan fourier(plan);
  return {kernels.weight,           kernels.conv,    fourier.chunk_floats(), fourier.tile_floats(),
          fourier.scratch_floats(), fourier.block(), 1};
}

WinogradPlan plan_of(const WinogradShape& shape, bool data_gradient, SimdLevel level) {
  const std::int64_t in = shape.in_channels, out = shape.out_channels();
  return {shape.batch, shape.height, shape.width, data_gradient ? out : in, data_gradient ? in : out, shape.kernel,
          lanes_of(level), shape.points, shape.type};
}

// Where the weights of output and input channels begin.
struct WeightOffsets {
  explicit WeightOffsets(const WinogradShape& shape) {
    for (std::int64_t n = 0; n < shape.out_channels(); ++n) {
      out.push_back(shuffle_channel(shape.channels, shape.r, n) * shape.kernel * shape.kernel * shape.in_channels);
    }
    for (std::int64_t k = 0; k < shape.in_channels; ++k) in.push_back(k);
  }
  std::vector<std::int64_t> out, in;
};

// For lanes that lie in one or several runs of `run` floats, `stride` apart.
struct Stores {
  Stores(const WinogradPlan& plan, std::int64_t run, std::int64_t stride) {
    for (std::int64_t begin = 0; begin < plan.chunks() * plan.columns(); begin += plan.lanes) {
      first.push_back(static_cast<int>(stores.size()));
      const std::int64_t end = std::min(begin + plan.lanes, plan.out_channels);
      for (std::int64_t n = begin; n < end;) {
        const std::int64_t next = std::min(end, (n / run + 1) * run);
        stores.push_back({static_cast<int>(n - begin), static_cast<int>(next - begin), n / run * (stride - run) + begin});
        n = next;
      }
    }
    first.push_back(static_cast<int>(stores.size()));
  }
  std::vector<WinogradStore> stores;
  std::vector<int> first;
};

// A bias for each column, and 0 for those of no output channel.
std::vector<float> ordered_bias(const WinogradShape& shape, const WinogradPlan& plan, const float* bias) {
  std::vector<float> ordered(static_cast<std::size_t>(plan.chunks() * plan.columns()), 0.0f);
  for (std::int64_t n = 0; bias != nullptr && n < plan.out_channels; ++n) {
    ordered[static_cast<std::size_t>(n)] = bias[shuffle_channel(shape.channels, shape.r, n)];
  }
  return ordered;
}

// Asks for large pages for `elements` of images.
void advise(const WinogradShape& shape, void* p, std::int64_t elements) {
  advise_large_pages(p, static_cast<std::size_t>(elements * size_bytes(shape.type)));
}

void run_conv(const WinogradPlan& plan, const void* x, const float* points, const WinogradOutput& out, int threads,
              SimdLevel level) {
  const Method method = method_of(plan, level);
  const std::int64_t tiles = plan.tiles(), chunks = plan.chunks();
  std::int64_t blocks = (tiles + method.block - 1) / method.block;
  // Where blocks may have any size, as many for each thread, all of about the same.
  const bool even = method.step == 1;
  if (even) blocks = std::min((blocks + threads - 1) / threads * threads, tiles);
  const auto part = [&](std::int64_t block, std::int64_t first_chunk, std::int64_t last_chunk, float* own, bool evaluated) {
    const std::int64_t begin = even ? tiles * block / blocks : block * method.block;
    const std::int64_t end = even ? tiles * (block + 1) / blocks : std::min(begin + method.block, tiles);
    return WinogradPart{begin, end, first_chunk, last_chunk, own, evaluated};
  };
  // A weight so large that each block of tiles would read it from memory is read once: all tiles are evaluated before, and the
  // blocks share a chunk of the weight while it is in the second cache.
  if (chunks * method.chunk_floats > kLargeWeight && blocks * method.tile_floats < kSharedTiles) {
    const Aligned<float> all = new_aligned<float>(blocks * method.tile_floats);
    parallel_items_with_scratch(blocks, threads, method.scratch_floats, [&](float* scratch, std::int64_t block) {
      method.conv(plan, x, points, out, part(block, 0, 0, all.get() + block * method.tile_floats, false), scratch);
    });
    parallel_items_with_scratch(chunks * blocks, threads, method.scratch_floats, [&](float* scratch, std::int64_t item) {
      const std::int64_t block = item % blocks, chunk = item / blocks;
      method.conv(plan, x, points, out, part(block, chunk, chunk + 1, all.get() + block * method.tile_floats, true), scratch);
    });
    return;
  }
  const std::int64_t own = in_lines(method.tile_floats);
  parallel_items_with_scratch(blocks, threads, own + method.scratch_floats, [&](float* scratch, std::int64_t block) {
    method.conv(plan, x, points, out, part(block, 0, chunks, scratch, false), scratch + own);
  });
}

}  // namespace

std::int64_t winograd_weight_floats(const WinogradShape& shape, bool data_gradient, SimdLevel level) {
  const WinogradPlan plan = plan_of(shape, data_gradient, level);
  return plan.chunks() * method_of(plan, level).chunk_floats;
}

void winograd_weight(const WinogradShape& shape, bool data_gradient, const float* weight, float* points, int threads,
                     SimdLevel level) {
  const WinogradPlan plan = plan_of(shape, data_gradient, level);
  const WeightOffsets offsets(shape);
  const WinogradWeight at{data_gradient ? offsets.in.data() : offsets.out.data(),
                          data_gradient ? offsets.out.data() : offsets.in.data(), shape.in_channels, data_gradient};
  const Method method = method_of(plan, level);
  advise_large_pages(points, static_cast<std::size_t>(plan.chunks() * method.chunk_floats) * sizeof(float));
  parallel_parts(plan.chunks(), threads,
                 [&](int, std::int64_t begin, std::int64_t end) { method.weight(plan, at, weight, points, begin, end); });
}

void winograd_fwd(const WinogradShape& shape, ConvActivation activation, const void* x, const float* points, const float* bias,
                  void* y, void* z, int threads, SimdLevel level) {
  const WinogradPlan plan = plan_of(shape, false, level);
  const std::vector<float> biases = ordered_bias(shape, plan, bias);
  const std::int64_t run = shape.r * shape.channels, row = shape.width * run;
  const Stores stores(plan, run, row);
  const std::int64_t image = shape.height * shape.r * row;
  advise(shape, y, plan.batch * image);
  if (z != nullptr) advise(shape, z, plan.batch * image);
  run_conv(plan, x, points,
           {y, image, 0, shape.r * row, run, stores.stores.data(), stores.first.data(), biases.data(),
            z, activation_table(activation)},
           threads, level);
}

WinogradBlock winograd_block(const WinogradShape& shape, SimdLevel level) {
  const Method method = method_of(plan_of(shape, false, level), level);
  return {method.block, method.step};
}

struct WinogradTiles::Prepared {
  Prepared(const WinogradShape& shape, ConvActivation activation, const float* x, const float* points, const float* bias,
           std::int64_t row, SimdLevel level)
      : plan(plan_of(shape, false, level)),
        x(x),
        points(points),
        r(shape.r),
        biases(ordered_bias(shape, plan, bias)),
        stores(plan, shape.r * shape.channels, row),
        out{nullptr, 0, 0, shape.r * row, shape.r * shape.channels, stores.stores.data(), stores.first.data(), biases.data(),
            nullptr, activation_table(activation)},
        method(method_of(plan, level)) {}

  WinogradPlan plan;
  const float *x, *points;
  std::int64_t r;
  std::vector<float> biases;
  Stores stores;
  WinogradOutput out;
  Method method;
};

WinogradTiles::WinogradTiles(const WinogradShape& shape, ConvActivation activation, const float* x, const float* points,
                             const float* bias, std::int64_t row, SimdLevel level)
    : prepared_(std::make_unique<Prepared>(shape, activation, x, points, bias, row, level)) {}
WinogradTiles::~WinogradTiles() = default;
WinogradTiles::WinogradTiles(WinogradTiles&&) noexcept = default;

std::int64_t WinogradTiles::rows() const { return prepared_->plan.tile_rows(); }
std::int64_t WinogradTiles::columns() const { return prepared_->plan.tile_columns(); }
std::int64_t WinogradTiles::size() const { return prepared_->plan.outputs() * prepared_->r; }
std::int64_t WinogradTiles::scratch_floats() const {
  return in_lines(prepared_->method.tile_floats) + in_lines(prepared_->method.scratch_floats);
}

void WinogradTiles::run(std::int64_t row, std::int64_t begin, std::int64_t end, float* y, float* scratch) const {
  const WinogradPlan& plan = prepared_->plan;
  WinogradOutput out = prepared_->out;
  out.y = y - begin * plan.outputs() * out.pixel;
  out.first_row = row * plan.outputs();
  const std::int64_t first = row * plan.tile_columns();
  const Method& method = prepared_->method;
  method.conv(plan, prepared_->x, prepared_->points, out, {first + begin, first + end, 0, plan.chunks(), scratch, false},
              scratch + in_lines(method.tile_floats));
}

void winograd_dgrad(const WinogradShape& shape, const void* dz, const float* points, void* dx, int threads,
                    SimdLevel level) {
  const WinogradPlan plan = plan_of(shape, true, level);
  const std::int64_t row = plan.width * plan.out_channels;
  const Stores stores(plan, plan.out_channels, plan.out_channels);
  advise(shape, dx, plan.batch * plan.height * row);
  run_conv(plan, dz, points,
           {dx, plan.height * row, 0, row, plan.out_channels, stores.stores.data(), stores.first.data(), nullptr, nullptr,
            nullptr},
           threads, level);
}

void winograd_wgrad(const WinogradShape& shape, const void* x, const void* dz, float* dweight, int threads,
                    SimdLevel level) {
  const WinogradPlan plan = plan_of(shape, false, level);
  const WinogradKernels& kernels = kernels_of(level);
  // Work is divided by the shape alone: blocks into parts with sums of their own, chunks into groups, for each of which the
  // tiles of x are evaluated anew, and points into halves, so that an item's sums stay in the second cache. Sums of one part
  // take points / taps times the memory of the weight: those of more parts are not worth more than 256 MB.
  constexpr std::int64_t kBlocks = 4, kParts = 8, kHalves = 2, kItems = 16, kFloats = std::int64_t{1} << 26;
  const std::int64_t part_floats = plan.chunks() * plan.chunk_floats();
  const std::int64_t most = std::clamp<std::int64_t>(kFloats / part_floats, 1, kParts);
  const std::int64_t parts = std::clamp<std::int64_t>(plan.gradient_blocks() / kBlocks, 1, most);
  const std::int64_t share = (part_floats / kHalves + kWinogradSums - 1) / kWinogradSums;
  const std::int64_t groups = std::clamp(share, std::min(plan.chunks(), kItems / kHalves / parts), plan.chunks());
  const Aligned<float> sums = new_zeros<float>(parts * part_floats);
  const std::int64_t scratch_floats = plan.gradient_scratch_floats();
  parallel_items_with_scratch(parts * groups * kHalves, threads, scratch_floats, [&](float* scratch, std::int64_t item) {
    const std::int64_t part = item / kHalves / groups, group = item / kHalves % groups;
    WinogradGradient task{x, dz, sums.get() + part * part_floats, 0, 0, plan.chunks() * group / groups,
                          plan.chunks() * (group + 1) / groups, static_cast<int>(item % kHalves)};
    const std::int64_t last = plan.gradient_blocks() * (part + 1) / parts;
    for (std::int64_t block = plan.gradient_blocks() * part / parts; block < last; ++block) {
      task.begin = block * plan.gradient_block();
      task.end = std::min(task.begin + plan.gradient_block(), plan.tiles());
      kernels.wgrad(plan, task, scratch);
    }
  });
  const WeightOffsets offsets(shape);
  const WinogradWeight at{offsets.out.data(), offsets.in.data(), shape.in_channels, false};
  parallel_items(plan.chunks(), threads, [&](int, std::int64_t chunk) {
    kernels.weight_gradient(plan, at, sums.get(), parts, part_floats, dweight, chunk);
  });
}

#else

std::int64_t winograd_weight_floats(const WinogradShape&, bool, SimdLevel) { return 0; }
void winograd_weight(const WinogradShape&, bool, const float*, float*, int, SimdLevel) {}
void winograd_fwd(const WinogradShape&, ConvActivation, const void*, const float*, const float*, void*, void*, int, SimdLevel) {}
void winograd_dgrad(const WinogradShape&, const void*, const float*, void*, int, SimdLevel) {}
void winograd_wgrad(const WinogradShape&, const void*, const void*, float*, int, SimdLevel) {}

WinogradBlock winograd_block(const WinogradShape&, SimdLevel) { return {1, 1}; }
struct WinogradTiles::Prepared {};
WinogradTiles::WinogradTiles(const WinogradShape&, ConvActivation, const float*, const float*, const float*, std::int64_t,
                             SimdLevel) {}
WinogradTiles::~WinogradTiles() = default;
WinogradTiles::WinogradTiles(WinogradTiles&&) noexcept = default;
std::int64_t WinogradTiles::rows() const { return 0; }
std::int64_t WinogradTiles::columns() const { return 0; }
std::int64_t WinogradTiles::size() const { return 0; }
std::int64_t WinogradTiles::scratch_floats() const { return 0; }
void WinogradTiles::run(std::int64_t, std::int64_t, std::int64_t, float*, float*) const {}

#endif

}  // namespace hflfnerv
