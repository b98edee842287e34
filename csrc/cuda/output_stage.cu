// The output stage in one pass: features in, frames out. Blocks go down strips of the features, see strips.h, all of them at
// once: those of a group are added up in registers, and an output pixel takes the groups one after the other.
#include "cuda/output_stage.h"

#include <cuda_runtime.h>

#include "cuda/ampere.h"
#include "cuda/strips.h"

namespace hflfnerv {

namespace {

using namespace strips;

constexpr int kSegmentRows = 8;  // whose time the beginning and the end of a segment take
constexpr int kMostSharedBytes = 232448, kMostOfTwoBytes = 115712;  // of a block on Hopper, alone or with another one

struct StageFeature {
  Chunks copies;
  int pitch, at;         // in shared memory: bytes from pixel to pixel, and where a step begins in a stage
  int steps, weight_at;  // of 16 channels; where its weight begins, in units of 16 bytes
};

struct Arguments {
  OutputStageCuda call;
  StageFeature feature[kMostFeatures];
  Cut cut;
  int stage_bytes, weights;  // of all features; units of 16 bytes
};

// Within 2e-7.
__device__ float tanh_by_exponential(float x) { return 1.0f - __fdividef(2.0f, 1.0f + __expf(2.0f * x)); }

// Adds a feature's products for a step's rows of x and eight columns. sums[i] is of the row of the image that is i - 2 on.
template <class T>
__device__ void multiply(const StageFeature& feature, int channels, const uint4* weight, const char* x, int lane,
                         float (&sums)[kStepRows + 2][4]) {
  const char* pixel = x + (lane / 16 * kStripColumns + lane % 8) * feature.pitch + lane / 8 % 2 * 16;
#pragma unroll 1
  for (int s = 0; s < feature.steps; ++s) {
    std::uint32_t b[kStepRows][2];
#pragma unroll
    for (int row = 0; row < kStepRows; row += 2) {
      std::uint32_t four[4];
      ampere::load_matrices<4, false>(four, pixel + row * kStripColumns * feature.pitch + 32 * s);
      // What lies behind the channels may be anything.
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        b[row + i / 2][i % 2] = four[i] & two_of(16 * s + i % 2 * 8 + lane % 4 * 2, channels);
      }
    }
#pragma unroll
    for (int k = 0; k < 3; ++k) {
      const uint4 four = weight[(k * feature.steps + s) * 32 + lane];
      const std::uint32_t a[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
      for (int row = 0; row < kStepRows; ++row) ampere::multiply_add(T(), sums[row + 2 - k], a, b[row][0], b[row][1]);
    }
  }
}

template <class T, int kGroups, int kStages>
__global__ void __launch_bounds__(kThreads, 2) output_stage_kernel(const __grid_constant__ Arguments arguments) {
  const OutputStageCuda& call = arguments.call;
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  char* const x = ampere::shared_memory();
  auto* const weight = reinterpret_cast<uint4*>(x + kStages * arguments.stage_bytes);
  auto* const shares = reinterpret_cast<float*>(weight + arguments.weights);
  const Segment segment(arguments.cut, call.height);

  // A warp copies half of a row of each feature.
  const int copy_row = segment.first - 1 + warp * kRun / kStripColumns;
  const int copy_column = segment.column - 1 + warp * kRun % kStripColumns;
  const auto copy = [&](int step, int stage) {
    for (int f = 0; f < call.features && step < segment.steps; ++f) {
      const OutputFeatureCuda& of = call.feature[f];
      const StageFeature& feature = arguments.feature[f];
      const Image image{static_cast<const std::uint16_t*>(of.x) +
                            std::int64_t(segment.image) * of.rows * of.columns * of.pixel,
                        of.rows, of.columns};
      copy_run<4>(image, copy_row + step * kStepRows, copy_column, feature.copies, Chunk(feature.copies, lane),
                  x + stage * arguments.stage_bytes + feature.at + warp * kRun * feature.pitch);
    }
    ampere::copies_commit();
  };
#pragma unroll 1
  for (int i = 0; i < kStages - 1; ++i) copy(i, i);
  for (int f = 0; f < call.features; ++f) {
    const StageFeature& feature = arguments.feature[f];
    for (int at = thread; at < 3 * feature.steps * 32; at += kThreads) {
      weight[feature.weight_at + at] = static_cast<const uint4*>(call.feature[f].weight)[at];
    }
  }

  const int of_row = thread / kStripColumns, of_column = thread % kStripColumns;
  const bool has_output = of_column < kStripOutputs && segment.column + of_column < call.width;
  float carried[kGroups][2][4] = {};  // sums of the rows of the image that a step leaves incomplete
  int stage = 0;
#pragma unroll 1
  for (int step = 0; step < segment.steps; ++step) {
    ampere::copies_wait<kStages - 2>();
    __syncthreads();  // the step's x is there; nobody needs the one before it and its shares any more
    copy(step + kStages - 1, stage == 0 ? kStages - 1 : stage - 1);
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
      float sums[kStepRows + 2][4] = {};
#pragma unroll
      for (int i = 0; i < 8; ++i) sums[i / 4][i % 4] = carried[group][i / 4][i % 4];
      for (int f = 0; f < call.features; ++f) {
        if (call.feature[f].group != group) continue;
        const StageFeature& feature = arguments.feature[f];
        multiply<T>(feature, call.feature[f].channels, weight + feature.weight_at,
                    x + stage * arguments.stage_bytes + feature.at + warp * 8 * feature.pitch, lane, sums);
      }
#pragma unroll
      for (int row = 0; row < kStepRows; ++row) {
        store_shares(shares + group * kStepShares + row * kShares * kSharePitch + share_of(8 * warp, lane), lane, sums[row]);
      }
#pragma unroll
      for (int i = 0; i < 8; ++i) carried[group][i / 4][i % 4] = sums[kStepRows + i / 4][i % 4];
    }
    __syncthreads();
    stage = stage + 1 == kStages ? 0 : stage + 1;
    const int row = step * kStepRows - 2 + of_row;
    if (!has_output || row < 0 || row >= segment.rows) continue;
    float image[kOutputs] = {call.offset, call.offset, call.offset};
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
      float head[kOutputs];
#pragma unroll
      for (int c = 0; c < kOutputs; ++c) head[c] = call.biases[kOutputs * group + c];
      add_shares(shares + group * kStepShares + of_row * kShares * kSharePitch + of_column, head);
#pragma unroll
      for (int c = 0; c < kOutputs; ++c) image[c] += call.scales[group] * tanh_by_exponential(head[c]);
    }
    const std::int64_t at = ((std::int64_t(segment.image) * call.height + segment.first + row) * call.width +
                             segment.column + of_column) * kOutputs;
#pragma unroll
    for (int c = 0; c < kOutputs; ++c) {
      if (call.as_bytes) {
        static_cast<std::uint8_t*>(call.y)[at + c] =
            static_cast<std::uint8_t>(__float2int_rn(fminf(fmaxf(image[c], 0.0f), 1.0f) * 255.0f));
      } else {
        static_cast<float*>(call.y)[at + c] = image[c];
      }
    }
  }
}

template <class T, int kGroups, int kStages>
cudaError_t launch(const Arguments& arguments, int bytes, cudaStream_t stream) {
  const auto kernel = output_stage_kernel<T, kGroups, kStages>;
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error != cudaSuccess) return error;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(arguments.cut.blocks));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = static_cast<std::size_t>(bytes);
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, arguments);
}

template <class T, int kGroups>
cudaError_t launch(const Arguments& arguments, int stages, int bytes, cudaStream_t stream) {
  return stages == 3 ? launch<T, kGroups, 3>(arguments, bytes, stream) : launch<T, kGroups, 2>(arguments, bytes, stream);
}

template <class T>
cudaError_t launch(const Arguments& arguments, int stages, int bytes, cudaStream_t stream) {
  if (arguments.call.groups == 1) return launch<T, 1>(arguments, stages, bytes, stream);
  if (arguments.call.groups == 2) return launch<T, 2>(arguments, stages, bytes, stream);
  return launch<T, 3>(arguments, stages, bytes, stream);
}

}  // namespace

const char* output_stage_cuda_fwd(const OutputStageCuda& call, int device, void* stream) {
  Arguments arguments{};
  arguments.call = call;
  for (int f = 0; f < call.features; ++f) {
    const OutputFeatureCuda& of = call.feature[f];
    StageFeature& feature = arguments.feature[f];
    feature.pitch = pixel_pitch(of.channels);
    feature.copies = chunks_of(of.x, of.channels, of.pixel, feature.pitch);
    feature.at = arguments.stage_bytes;
    feature.steps = divide_up(of.channels, 16);
    feature.weight_at = arguments.weights;
    arguments.stage_bytes += kStepPixels * feature.pitch;
    arguments.weights += 3 * feature.steps * 32;
  }
  // Two blocks on a multiprocessor if they fit, with as much under way as fits then.
  const auto bytes = [&](int stages) {
    return stages * arguments.stage_bytes + arguments.weights * 16 + call.groups * kStepShares * 4;
  };
  const int resident = bytes(2) <= kMostOfTwoBytes ? 2 : 1;
  const int stages = bytes(3) <= (resident == 2 ? kMostOfTwoBytes : kMostSharedBytes) ? 3 : 2;
  if (bytes(stages) > kMostSharedBytes) return "the features' channels do not fit into shared memory";
  int multiprocessors = 0;
  cudaError_t error = cudaSetDevice(device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  if (error == cudaSuccess) {
    arguments.cut = cut(call.batch, call.height, call.width, multiprocessors * resident, kSegmentRows);
    const auto cuda_stream = static_cast<cudaStream_t>(stream);
    error = call.bfloat16 ? launch<__nv_bfloat16>(arguments, stages, bytes(stages), cuda_stream)
                          : launch<__half>(arguments, stages, bytes(stages), cuda_stream);
  }
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace hflfnerv
