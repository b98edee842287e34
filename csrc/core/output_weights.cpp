#include "output_weights.h"

#include <cstring>

namespace hflfnerv {
namespace {

// The weight that links inner element `pixel`, c with lane: pixels x - 1, x, ... and colours of x, x + 1, ...
float banded(const float* weight, std::int64_t channels, std::int64_t ky, std::int64_t pixel, std::int64_t c,
             std::int64_t lane) {
  const std::int64_t kx = pixel - lane / kColours, colour = lane % kColours;
  if (c >= channels || kx < 0 || kx >= kTaps) return 0.0f;
  return weight[((colour * channels + c) * kTaps + ky) * kTaps + kx];
}

}  // namespace

BFloat16 to_bfloat16(float value) {
  std::uint32_t bits = 0;
  std::memcpy(&bits, &value, sizeof bits);
  if (value != value) return {static_cast<std::uint16_t>(bits >> 16 | 0x40)};  // a carry could make it 0
  return {static_cast<std::uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

PlanesLayout output_layout(std::int64_t channels, std::int64_t width) {
  PlanesLayout layout;
  if (channels <= kStep && output_steps(channels) == output_steps(kStep)) {
    layout.groups = 1;
  } else {
    layout.rest = channels;
  }
  constexpr std::int64_t kTilePixels = kPixelsAmx * kTile;
  layout.columns = (width + kTilePixels - 1) / kTilePixels * kTilePixels + kTaps - 1;
  if (layout.rest > 0) {
    // The last step of five pixels reaches beyond them: into zeros of this row, not into another row, which may hold NaNs.
    const std::int64_t beyond = output_steps(channels) * kStep - (kPixelsAmx + kTaps - 1) * channels;
    layout.columns += (beyond + channels - 1) / channels;
  }
  return layout;
}

Aligned<BFloat16> output_tiles(const float* weight, std::int64_t channels, std::int64_t pixel) {
  const std::int64_t steps = output_steps(pixel);
  Aligned<BFloat16> tiles = new_zeros<BFloat16>(kTaps * steps * kStep * kTile);
  for (std::int64_t ky = 0; ky < kTaps; ++ky) {
    for (std::int64_t k = 0; k < (kPixelsAmx + kTaps - 1) * pixel; ++k) {
      for (std::int64_t lane = 0; lane < kPixelsAmx * kColours; ++lane) {
        const std::int64_t pair = ky * steps * kStep / 2 + k / 2;
        tiles[static_cast<std::size_t>((pair * kTile + lane) * 2 + k % 2)] =
            to_bfloat16(banded(weight, channels, ky, k / pixel, k % pixel, lane));
      }
    }
  }
  return tiles;
}

Aligned<float> output_vectors(const float* weight, std::int64_t channels, std::int64_t lanes) {
  const std::int64_t steps = output_vector_steps(channels, lanes);
  Aligned<float> values = new_zeros<float>(kTaps * steps * kColours * lanes);
  for (std::int64_t ky = 0; ky < kTaps; ++ky) {
    for (std::int64_t k = 0; k < kTaps * channels; ++k) {
      for (std::int64_t colour = 0; colour < kColours; ++colour) {
        const std::int64_t at = ((ky * steps + k / lanes) * kColours + colour) * lanes + k % lanes;
        values[static_cast<std::size_t>(at)] = weight[((colour * channels + k % channels) * kTaps + ky) * kTaps + k / channels];
      }
    }
  }
  return values;
}

Aligned<float> output_biases(const float* biases, int groups) {
  Aligned<float> lanes = new_zeros<float>(groups * kBiasLanes);
  for (std::int64_t i = 0; i < groups * kBiasLanes; ++i) {
    lanes[static_cast<std::size_t>(i)] = biases[i / kBiasLanes * kColours + i % kBiasLanes % kColours];
  }
  return lanes;
}

}  // namespace hflfnerv
