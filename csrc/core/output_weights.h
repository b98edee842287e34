// Head weights as the kernels of the output stage read them: banded matrices, see output_stage_kernels.h.
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

// Kernel row, inner element, lane.
Aligned<float> output_bands(const float* weight, std::int64_t channels, std::int64_t pixels, std::int64_t lanes);

// Three colours for each group become 16 lanes: those of one pixel after the other.
Aligned<float> output_biases(const float* biases, int groups);

}  // namespace hflfnerv
