// The last blocks by Winograd's method and the output stage, alternating in strips of columns: the largest activation of a
// network, 92 MB at 640 x 1280, is never written to memory, and what is made of it next finds it in the second cache.
#pragma once

#include "conv_pixel_shuffle_gelu_winograd.h"
#include "output_stage.h"

namespace hflfnerv {

// A stream's last block and its head, whose weight is [3, channels, 3, 3]. What the block makes is at least as large as the
// frame, and the batch of both shapes is 1.
struct WinogradStream {
  WinogradShape shape;
  ConvActivation activation;
  const float *x, *points, *bias;  // as for winograd_fwd
  const float* head;
  int group;
};

// Whether the streams' blocks have tiles of the same size.
bool winograd_output_fits(const WinogradStream* streams, int count, SimdLevel level);

// The bytes or floats that winograd_fwd and output_stage_fwd give, bit for bit. The streams are in the order of their groups.
void winograd_output_fwd(const OutputShape& shape, const WinogradStream* streams, int count, void* out, bool bytes, int threads,
                         SimdLevel level);

}  // namespace hflfnerv
