// The output stage in one pass: features in, frames out.
//
// A head's three columns would leave a product's columns empty, and its nine taps would read each pixel nine times. So the
// features of a tile with its border are multiplied once, with all taps side by side: 27 columns of 32. What a pixel is worth
// to each of its neighbours then lies in shared memory, and an output pixel adds up its nine.
#include "cuda/output_stage.h"

#include <cuda_runtime.h>

#include "cuda/ampere.h"

namespace hflfnerv {

namespace {

constexpr int kTileRows = 8, kTileColumns = 32, kThreads = kTileRows * kTileColumns, kWarps = kThreads / 32;
constexpr int kHaloColumns = kTileColumns + 2, kHalo = (kTileRows + 2) * kHaloColumns;
constexpr int kRowBlocks = (kHalo + 15) / 16;  // of products
constexpr int kColumns = 27, kColumnBlocks = 4;
constexpr int kPitch = 29;  // odd: neighbouring pixels lie in different banks
constexpr int kSharedBytes = kRowBlocks * 16 * kPitch * 4;

// Two neighbouring channels of a pixel, zeros where it has none.
__device__ std::uint32_t two_channels(const std::uint16_t* pixel, int channel, int channels, bool aligned) {
  if (pixel == nullptr || channel >= channels) return 0;
  if (channel + 1 == channels) return pixel[channel];
  if (aligned) return *reinterpret_cast<const std::uint32_t*>(pixel + channel);
  return pixel[channel] | static_cast<std::uint32_t>(pixel[channel + 1]) << 16;
}

struct Tile {
  int frame, row, column;
};

// Adds a feature's products for 16 pixels of the halo, from `first` on.
template <class T>
__device__ void multiply(const OutputFeatureCuda& feature, const Tile& tile, int first, int lane,
                         float (&sums)[kColumnBlocks][4]) {
  const auto* x = static_cast<const std::uint16_t*>(feature.x) +
                  std::int64_t(tile.frame) * feature.rows * feature.columns * feature.pixel;
  const bool aligned = feature.pixel % 2 == 0;
  const std::uint16_t* pixels[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int at = first + lane / 4 + 8 * i;
    const int row = tile.row - 1 + at / kHaloColumns, column = tile.column - 1 + at % kHaloColumns;
    const bool inside = at < kHalo && row >= 0 && row < feature.rows && column >= 0 && column < feature.columns;
    pixels[i] = inside ? x + (row * feature.columns + column) * feature.pixel : nullptr;
  }
  const auto* weight = static_cast<const uint2*>(feature.weight) + lane;
  for (int channel = lane % 4 * 2; channel - lane % 4 * 2 < feature.channels; channel += 16) {
    std::uint32_t a[4];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      a[i] = two_channels(pixels[i], channel, feature.channels, aligned);
      a[i + 2] = two_channels(pixels[i], channel + 8, feature.channels, aligned);
    }
#pragma unroll
    for (int j = 0; j < kColumnBlocks; ++j, weight += 32) {
      const uint2 b = *weight;
      ampere::multiply_add(T(), sums[j], a, b.x, b.y);
    }
  }
}

// Within 2e-7.
__device__ float tanh_by_exponential(float x) { return 1.0f - __fdividef(2.0f, 1.0f + __expf(2.0f * x)); }

template <class T>
__global__ void __launch_bounds__(kThreads) output_stage_kernel(const __grid_constant__ OutputStageCuda call) {
  float* worth = reinterpret_cast<float*>(ampere::shared_memory());
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int across = (call.width + kTileColumns - 1) / kTileColumns, down = (call.height + kTileRows - 1) / kTileRows;
  const int index = blockIdx.x;
  const Tile tile{index / (across * down), index / across % down * kTileRows, index % across * kTileColumns};
  float image[3] = {call.offset, call.offset, call.offset};
  for (int group = 0, feature = 0; group < call.groups; ++group) {
    int last = feature;
    while (last < call.features && call.feature[last].group == group) ++last;
    if (group > 0) __syncthreads();  // everybody has read the worth of the group before
    for (int block = warp; block < kRowBlocks; block += kWarps) {
      float sums[kColumnBlocks][4] = {};
      for (int f = feature; f < last; ++f) multiply<T>(call.feature[f], tile, block * 16, lane, sums);
#pragma unroll
      for (int j = 0; j < kColumnBlocks; ++j) {
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          const int column = 8 * j + lane % 4 * 2 + k % 2;
          if (column < kColumns) worth[(block * 16 + lane / 4 + k / 2 * 8) * kPitch + column] = sums[j][k];
        }
      }
    }
    feature = last;
    __syncthreads();
    float head[3];
#pragma unroll
    for (int c = 0; c < 3; ++c) head[c] = call.biases[3 * group + c];
#pragma unroll
    for (int tap = 0; tap < 9; ++tap) {
      const float* from = worth + ((warp + tap / 3) * kHaloColumns + lane + tap % 3) * kPitch + 3 * tap;
#pragma unroll
      for (int c = 0; c < 3; ++c) head[c] += from[c];
    }
#pragma unroll
    for (int c = 0; c < 3; ++c) image[c] += call.scales[group] * tanh_by_exponential(head[c]);
  }
  const int row = tile.row + warp, column = tile.column + lane;
  if (row >= call.height || column >= call.width) return;
  const std::int64_t at = ((std::int64_t(tile.frame) * call.height + row) * call.width + column) * 3;
#pragma unroll
  for (int c = 0; c < 3; ++c) {
    if (call.as_bytes) {
      static_cast<std::uint8_t*>(call.y)[at + c] =
          static_cast<std::uint8_t>(__float2int_rn(fminf(fmaxf(image[c], 0.0f), 1.0f) * 255.0f));
    } else {
      static_cast<float*>(call.y)[at + c] = image[c];
    }
  }
}

static_assert(kTileColumns == 32, "a warp makes a row of the tile");

template <class T>
cudaError_t launch(const OutputStageCuda& call, cudaStream_t stream) {
  cudaLaunchConfig_t config{};
  const std::int64_t across = (call.width + kTileColumns - 1) / kTileColumns;
  config.gridDim = dim3(static_cast<unsigned>(call.batch * ((call.height + kTileRows - 1) / kTileRows) * across));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = kSharedBytes;
  config.stream = stream;
  return cudaLaunchKernelEx(&config, output_stage_kernel<T>, call);
}

}  // namespace

const char* output_stage_cuda_fwd(const OutputStageCuda& call, int device, void* stream) {
  cudaError_t error = cudaSetDevice(device);
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  if (error == cudaSuccess) {
    error = call.bfloat16 ? launch<__nv_bfloat16>(call, cuda_stream) : launch<__half>(call, cuda_stream);
  }
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace hflfnerv
