// Head weights as the kernels of the output stage read them, see output_stage_kernels.h.
#pragma once

#include "memory.h"
#include "output_stage_kernels.h"

namespace hflfnerv {

// Rounds to the nearest, ties to even.
BFloat16 to_bfloat16(float value);

// How the features of a frame lie in memory for AMX: pixels of a cache line each where that costs no more steps than
// pixels one after the other; one zero pixel on the left, and on the right what full tiles read.
PlanesLayout output_layout(std::int64_t channels, std::int64_t width);
inline std::int64_t output_pixel(const PlanesLayout& layout) { return layout.groups > 0 ? kStep : layout.rest; }
inline std::int64_t output_row(const PlanesLayout& layout) { return layout.plane_row() + layout.rest_row(); }

inline std::int64_t output_steps(std::int64_t pixel) { return ((kPixelsAmx + kTaps - 1) * pixel + kStep - 1) / kStep; }

// The weight is [3, channels, 3, 3]. Kernel row, pair of inner elements, colours of five pixels, element of the pair.
Aligned<BFloat16> output_tiles(const float* weight, std::int64_t channels, std::int64_t pixel);

// For vectors of `lanes` floats: kernel row, vector of the inner dimension, colour, lane.
Aligned<float> output_vectors(const float* weight, std::int64_t channels, std::int64_t lanes);
inline std::int64_t output_vector_steps(std::int64_t channels, std::int64_t lanes) {
  return (kTaps * channels + lanes - 1) / lanes;
}
// Pixels of a row in memory beside the frame's, on both sides, that blocks of pixels and whole vectors read.
inline std::int64_t output_vector_margin(std::int64_t lanes) { return 2 * lanes + kTaps; }

// Three colours for each group become kBiasLanes: those of one pixel after the other.
Aligned<float> output_biases(const float* biases, int groups);

}  // namespace hflfnerv
