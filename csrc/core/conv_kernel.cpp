#include "conv_kernel.h"

#if defined(HFLFNERV_HAVE_AMX)

#include <algorithm>

#include "parallel.h"

namespace hflfnerv {
namespace {

// Where a channel of one of the r² cells lies after the pixel (h r, w r).
struct Place {
  bool rest;
  std::int64_t offset;
};

Place place_of(const ConvSizes& sizes, const ConvOutputLayout& out, std::int64_t cell, std::int64_t c) {
  const std::int64_t i = cell / sizes.r, j = cell % sizes.r, planes = sizes.channels - out.rest;
  if (c >= planes) return {true, i * out.rest_row + j * out.rest + c - planes};
  return {false, i * out.plane_row + j * out.plane_pixel + c / out.group * out.group_stride + c % out.group};
}

}  // namespace

ConvOutputLayout channels_last_output(std::int64_t row_pixels, std::int64_t channels) {
  return {row_pixels * channels, channels, channels, 0, 0, 0};
}

ConvOutputLayout planes_output(const PlanesLayout& layout) {
  return {layout.plane_row(), kStep, kStep, layout.columns * kStep, layout.rest_row(), layout.rest};
}

PlanesLayout split_channels(std::int64_t channels, std::int64_t taps) {
  PlanesLayout layout;
  layout.groups = channels / kStep;
  layout.rest = channels % kStep;
  // The rest is gathered where that saves a fifth of the steps of another, padded group.
  if ((layout.rest * taps + kStep - 1) / kStep * 5 > taps * 4) {
    ++layout.groups;
    layout.rest = 0;
  }
  return layout;
}

ConvKernel::ConvKernel(const ConvSizes& sizes, const GeluTable* table, const ConvWeight& weight, const float* bias,
                       const PlanesLayout& in, const ConvOutputLayout& out, int threads) {
  plan_.in_channels = sizes.in_channels;
  plan_.out_channels = sizes.channels * sizes.r * sizes.r;
  plan_.r = sizes.r;
  plan_.kernel_h = sizes.kernel_h;
  plan_.kernel_w = sizes.kernel_w;
  plan_.in = in;
  plan_.out = out;
  plan_.table = table;

  for (std::int64_t ky = 0; ky < sizes.kernel_h; ++ky) {
    for (std::int64_t kx = 0; kx < sizes.kernel_w; ++kx) {
      for (std::int64_t g = 0; g < in.groups; ++g) steps_.push_back(ky * in.plane_row() + (g * in.columns + kx) * kStep);
    }
  }
  const std::int64_t run = sizes.kernel_w * in.rest;  // elements that one row of the rest has for a pixel
  for (std::int64_t step = 0; step < plan_.rest_steps(); ++step) {
    first_gather_.push_back(static_cast<int>(gathers_.size()));
    for (std::int64_t ky = 0; ky < sizes.kernel_h; ++ky) {
      const std::int64_t begin = std::max<std::int64_t>(ky * run - step * kStep, 0);
      const std::int64_t end = std::min((ky + 1) * run - step * kStep, kStep);
      if (begin >= end) continue;
      const std::uint64_t mask = ((std::uint64_t{1} << end) - 1) & ~((std::uint64_t{1} << begin) - 1);
      gathers_.push_back({static_cast<std::uint32_t>(mask), ky, step * kStep - ky * run});
    }
  }
  first_gather_.push_back(static_cast<int>(gathers_.size()));

  const std::int64_t cells = sizes.r * sizes.r, planes = sizes.channels - out.rest;
  const auto add_columns = [&](std::int64_t first, std::int64_t last) {
    Place before{};
    for (std::int64_t cell = 0; cell < cells; ++cell) {
      for (std::int64_t c = first; c < last; ++c) {
        const std::int64_t lane = static_cast<std::int64_t>(column_.size()) % kTile;
        const Place place = place_of(sizes, out, cell, c);
        if (lane == 0) first_store_.push_back(static_cast<int>(stores_.size()));
        if (lane == 0 || place.offset != before.offset + 1) stores_.push_back({0, place.offset - lane});
        stores_.back().mask = static_cast<std::uint16_t>(stores_.back().mask | 1u << lane);
        column_.push_back(static_cast<std::int32_t>(c * cells + cell));
        before = place;
      }
    }
    while (column_.size() % kTile != 0) column_.push_back(-1);
  };
  add_columns(0, planes);
  plan_.plane_tiles = static_cast<std::int64_t>(first_store_.size());
  add_columns(planes, sizes.channels);
  plan_.tiles = static_cast<std::int64_t>(first_store_.size());
  first_store_.push_back(static_cast<int>(stores_.size()));

  bias_.assign(column_.size(), 0.0f);
  for (std::size_t i = 0; i < column_.size(); ++i) {
    if (bias != nullptr && column_[i] >= 0) bias_[i] = bias[column_[i]];
  }
  packed_ = new_aligned<BFloat16>(plan_.tiles * plan_.tile_elements());

  plan_.column = column_.data();
  plan_.steps = steps_.data();
  plan_.gathers = gathers_.data();
  plan_.first_gather = first_gather_.data();
  plan_.bias = bias_.data();
  plan_.stores = stores_.data();
  plan_.first_store = first_store_.data();
  plan_.packed = packed_.get();
  parallel_parts(plan_.tiles, threads,
                 [&](int, std::int64_t begin, std::int64_t end) { conv_pack_amx(plan_, weight, begin, end); });
}

}  // namespace hflfnerv

#endif
