// What conv_pixel_shuffle_gelu_winograd.cpp hands to the code compiled for one instruction set, for tiles of 18 x 18 points:
// zero, infinity and the 16th roots of unity on each axis, at which polynomials are evaluated by a Fourier transform.
//
// On one axis, with inputs d and taps w, y[i] = sum over t of w[t] d[i + t] is circular in the inner 16 inputs, e[k] = d[k + 1],
// but for the first and the last result: there the circle takes e[15] instead of d[0], and e[0] instead of d[17]. So
//   y[0] = circular[15] + w[0] (d[0] - d[16]),   y[last] = circular[last - 1] + w[last tap] (d[17] - d[1]),
// where the last terms are the products at zero and at infinity, and y[i] = circular[i - 1] elsewhere: of 18 inputs 14
// results with 5 taps, 16 with 3.
//
// On two axes there are four real columns, at zero, at infinity, and of the roots 1 and -1, with four real points and seven
// complex ones each, and seven complex columns with 18 points: 170 positions. A product of two complex numbers takes three of
// real ones, of both real parts, both imaginary parts and both sums, so that there are 16 + 3 * 154 = 478 planes of products,
// 2.4 for each result of a 5 x 5 kernel. Results by Winograd's method with 10 x 10 points take 2.8, and are less accurate,
// as the absolute values of its points differ. That allows 16-bit integers here, of which one instruction makes and adds two
// products per lane.
//
// Tiles and weights are integers with a scale for each tile and position, and for each chunk of output channels and position,
// such that no sum of products overflows, whatever the values: at most kFourierLargest for tiles, and for weights as much
// as the sum of their absolute values over input channels allows. Scales of tiles are shared by positions whose values are
// alike: of a column the root 1, where all is added up, and all others.
#pragma once

#include "conv_pixel_shuffle_gelu_winograd_kernels.h"

namespace hflfnerv {
namespace {  // so that no copy compiled for one instruction set is shared with the others

constexpr std::int64_t kFourierAxis = 18;
constexpr std::int64_t kFourierPlanes = 478, kFourierPositions = 170;
constexpr std::int64_t kFourierColumns = 11, kFourierRealColumns = 4;
constexpr std::int64_t kFourierScales = 176;       // of a tile or a chunk, in whole cache lines
constexpr std::int64_t kFourierColumnPlanes = 54;  // at most, of a column
constexpr std::int64_t kFourierLargest = 16383;    // so that a sum of two fits into 16 bits
constexpr std::int64_t kFourierOne = 2;            // where in a column's positions the root 1 is, behind zero and infinity

// How many planes and positions columns have, and where they begin. Planes are in the order of positions, of complex ones real,
// imaginary, sum.
constexpr bool fourier_is_real(std::int64_t column) { return column < kFourierRealColumns; }
constexpr std::int64_t fourier_planes(std::int64_t column) { return fourier_is_real(column) ? 25 : kFourierColumnPlanes; }
constexpr std::int64_t fourier_positions(std::int64_t column) { return fourier_is_real(column) ? 11 : 18; }
constexpr std::int64_t fourier_begin(std::int64_t column, std::int64_t of_real, std::int64_t of_complex) {
  return fourier_is_real(column) ? column * of_real : kFourierRealColumns * of_real + (column - kFourierRealColumns) * of_complex;
}
constexpr std::int64_t fourier_plane(std::int64_t column) { return fourier_begin(column, 25, kFourierColumnPlanes); }
constexpr std::int64_t fourier_position(std::int64_t column) { return fourier_begin(column, 11, 18); }

// What follows from a plan with kFourierAxis points. Sizes of integers of 32 bits are in floats.
struct FourierPlan {
  explicit FourierPlan(const WinogradPlan& plan)
      : in_channels(plan.in_channels), lanes(plan.lanes), columns(plan.columns()), outputs(plan.outputs()) {}

  std::int64_t in_channels, lanes, columns, outputs;

  // Input channels in pairs, the 16-bit halves of an integer.
  std::int64_t pairs() const { return (in_channels + 1) / 2; }
  std::int64_t tile_shorts() const { return 2 * pairs(); }
  // Tiles of a block: as many as sums in registers have rows, or twice as many with 8 lanes.
  static constexpr std::int64_t block() { return 12; }
  // Channels that fill no vector are evaluated for several tiles at once, if a vector holds those of more than one.
  std::int64_t rest() const { return in_channels % lanes <= lanes / 2 ? in_channels % lanes : 0; }
  std::int64_t vectors() const { return (in_channels - rest() + lanes - 1) / lanes; }
  std::int64_t rest_tiles() const { return lanes / rest(); }  // in a vector
  std::int64_t rest_vectors() const { return rest() == 0 ? 0 : (block() + rest_tiles() - 1) / rest_tiles(); }

  // Of the weight: [plane][pair][column], then the scales.
  std::int64_t chunk_floats() const { return kFourierPlanes * pairs() * columns + kFourierScales; }

  // [plane][tile][channel]; channels are stored two vectors at a time, which may end behind them.
  std::int64_t plane_shorts() const { return 2 * WinogradPlan::odd_lines(block() * pairs() + lanes); }
  std::int64_t integer_floats() const { return kFourierPlanes * plane_shorts() / 2; }
  std::int64_t tile_floats() const { return integer_floats() + block() * kFourierScales; }
  // [tile][plane of a column][column of the chunk]
  std::int64_t product_floats() const { return WinogradPlan::odd_lines(kFourierColumnPlanes * columns); }
  // [tile][vector of the chunk][column][row of results], each of one vector or, of complex columns, two
  std::int64_t half_floats() const { return WinogradPlan::odd_lines(kFourierAxis * outputs * lanes); }
  std::int64_t square_floats() const { return kFourierAxis * kFourierAxis * lanes; }
  // Squares of a tile's vectors or of the rest, with the windows that they are read from.
  std::int64_t window_floats() const { return kFourierAxis * kFourierAxis * (vectors() > 0 ? vectors() * lanes : lanes); }
  std::int64_t scratch_floats() const {
    return block() * (product_floats() + kWinogradVectors * half_floats() + kFourierScales) +
           (vectors() + rest_vectors() + 1) * square_floats() + rest_vectors() * 2 * kFourierColumns * lanes +
           window_floats() + 16;
  }
};

}  // namespace

// As those of WinogradKernels.
struct FourierKernels {
  decltype(WinogradKernels::weight) weight;
  decltype(WinogradKernels::conv) conv;
};

const FourierKernels& fourier_kernels_avx2();
const FourierKernels& fourier_kernels_avx512();

}  // namespace hflfnerv
