#include "conv_weight_gradient_amx.h"

#include <algorithm>

namespace hflfnerv {
namespace {

constexpr std::int64_t kMostColumns = 512;                  // of a band
constexpr std::int64_t kSumsBytes = std::int64_t{3} << 18;  // of an item, and
constexpr std::int64_t kBandBytes = std::int64_t{3} << 18;  // what it multiplies: both stay in the second cache
constexpr std::int64_t kItems = 16;                         // for as many threads to share
constexpr std::int64_t kMostBytes = std::int64_t{1} << 28;  // of sums, beyond which there are fewer parts

std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

}  // namespace

WeightGradientPlan::WeightGradientPlan(const WeightGradientShape& of) : shape(of) {
  const std::int64_t taps = shape.taps();
  groups = shape.in_channels / kTile;
  rest = shape.in_channels % kTile;
  // Copies for each tap are worth it where they save more than half of the tiles of another, padded group.
  if (rest_tiles() * 2 > taps) {
    ++groups;
    rest = 0;
  }
  columns = ceil_div(shape.out_width(), ceil_div(shape.out_width(), kMostColumns));
  columns += columns % 2;  // pixels are in pairs
  pitch = columns + shape.kernel_w - 1;
  pitch += pitch % 2;
  row_tiles = ceil_div(shape.out_channels, kTile);
  const std::int64_t fit = std::max<std::int64_t>(kSumsBytes / (column_tiles() * kTile * kTile * 4), 2);
  share = ceil_div(row_tiles, ceil_div(row_tiles, fit));

  rows = 1;
  const auto bytes = [&](std::int64_t n) {
    const std::int64_t of_result = (share + rest_tiles()) * kTile * n, of_x = 2 * groups * kTile * (n + shape.kernel_h - 1);
    return (of_result + of_x) * pitch * 2;
  };
  while (rows < shape.out_height() && bytes(rows + 1) <= kBandBytes) ++rows;
  rows = ceil_div(shape.out_height(), ceil_div(shape.out_height(), rows));
  steps = ceil_div(rows * pitch, kStep);

  parts = std::min({bands(), kItems, std::max<std::int64_t>(kMostBytes / (part_floats() * 4), 1)});
  const std::int64_t shares_wanted = std::min(ceil_div(kItems, parts), ceil_div(row_tiles, 2));
  share = std::min(share, ceil_div(row_tiles, shares_wanted));
}

}  // namespace hflfnerv
