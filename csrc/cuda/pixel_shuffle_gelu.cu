// Bias, PixelShuffle and GELU between channels-last tensors.
//
// A run of pixels of one row of x is adjacent in memory, and so is what becomes of it in each of r rows of y. A block takes
// such tiles in turn, with the next ones on their way into shared memory; the permutation between the two orders is one of
// 16-bit accesses there, and memory sees 16 bytes at a time.
//
// A thread takes a vector of a tile in each of a few steps, so many pixels apart that its channels are the same ones in all of
// them, and in all tiles. So places and biases of its elements stay in registers, and so do its sums of the bias's gradient: a
// block writes one row of sums in the end, and a second kernel, which is waiting by then, adds up the rows.
#include "cuda/pixel_shuffle_gelu.h"

#include <cuda_runtime.h>

#include <algorithm>
#include <climits>
#include <numeric>

#include "cuda/ampere.h"
#include "cuda/gelu.h"
#include "cuda/pairs.h"

namespace hflfnerv {

namespace {

constexpr int kTileBytes = 9216, kSteps = 2;  // of a tile of x; vectors that a thread takes of it
constexpr int kFewThreads = 96, kThreads = 320, kMostThreads = 1024;
constexpr int kMultiprocessorBytes = 227 * 1024, kBlockBytes = 1024;  // shared memory, and what a block takes beyond its own
constexpr int kElementBytes = 2;

// What a kernel does its own way: stages of its ring, threads on a multiprocessor, tensors in a stage.
struct Kind {
  int stages, resident, tensors;
  bool stores_tiles;  // shuffled ones go through shared memory on their way out
};
constexpr Kind kForward{2, 1280, 1, true};
constexpr Kind kBackward{2, 960, 2, false};
static_assert(kForward.stages >= 2 && kBackward.stages >= 2, "one tile is waited for while another one is on its way");

struct Plan {
  int vector;  // elements of one access to memory
  bool pairs;  // elements k and k + 4 of a vector are neighbouring channels of a pixel of y
  int blocks, threads, shared_bytes;

  int channels, r, width;
  int run, pixel;       // elements that a pixel of x has in one row of y, and in all
  int columns, steps;   // threads that take vectors, and how many each of a tile
  int step, tile;       // pixels
  int across, tiles;    // tiles of a row, and of all
  int pitch;            // elements from one run of a shuffled tile to the next in shared memory
  int jump_rows, jump_columns;  // from a block's tile to its next one
  float inverse_across, inverse_pixel, inverse_square, inverse_r;

  __device__ int tile_elements() const { return tile * pixel; }
  __device__ int shuffled_elements() const { return r * pitch; }
};

// a / b for a below 2^20: what is rounded is less than the distance of (a + 1/2) / b from an integer.
__device__ int quotient(int a, float inverse) { return static_cast<int>((static_cast<float>(a) + 0.5f) * inverse); }

struct Position {
  int row, column;  // of a tile; rows of all images

  __device__ void next(const Plan& plan) {
    row += plan.jump_rows;
    column += plan.jump_columns;
    if (column >= plan.across) column -= plan.across, ++row;
  }
  __device__ std::int64_t first_of_row(const Plan& plan) const { return std::int64_t(row) * plan.width * plan.pixel; }
  __device__ int first_pixel(const Plan& plan) const { return column * plan.tile; }
  __device__ int pixels(const Plan& plan) const { return min(plan.tile, plan.width - first_pixel(plan)); }
};

__device__ Position first_position(const Plan& plan) {
  const int block = static_cast<int>(blockIdx.x), row = quotient(block, plan.inverse_across);
  return {row, block - row * plan.across};
}

// ---- Vectors ----

template <int kWidth>
struct Vector {
  static constexpr int kWords = (kWidth + 1) / 2;
  std::uint32_t words[kWords];
};

// Of shared memory.
template <int kWidth>
__device__ Vector<kWidth> read(const std::uint16_t* from) {
  if constexpr (kWidth == 8) {
    const uint4 v = ampere::load_16_bytes(from);
    return {{v.x, v.y, v.z, v.w}};
  } else if constexpr (kWidth == 2) {
    return {{*reinterpret_cast<const std::uint32_t*>(from)}};
  } else {
    return {{*from}};
  }
}

template <int kWidth>
__device__ void write(std::uint16_t* to, const Vector<kWidth>& v) {
  if constexpr (kWidth == 8) {
    *reinterpret_cast<uint4*>(to) = {v.words[0], v.words[1], v.words[2], v.words[3]};
  } else if constexpr (kWidth == 2) {
    *reinterpret_cast<std::uint32_t*>(to) = v.words[0];
  } else {
    *to = static_cast<std::uint16_t>(v.words[0]);
  }
}

// Asynchronous where the hardware can, which is not for single elements.
template <int kWidth>
__device__ void copy(std::uint16_t* to, const std::uint16_t* from) {
  if constexpr (kWidth == 1) {
    *to = *from;
  } else {
    ampere::copy_async<kElementBytes * kWidth>(to, from);
  }
}

template <class T, int kWidth>
__device__ void unpack(const Vector<kWidth>& v, float (&values)[kWidth]) {
#pragma unroll
  for (int k = 0; k < kWidth; k += 2) {
    const float2 pair = both(T(), v.words[k / 2]);
    values[k] = pair.x;
    if constexpr (kWidth > 1) values[k + 1] = pair.y;
  }
}

template <class T, int kWidth>
__device__ Vector<kWidth> pack(const float (&values)[kWidth]) {
  Vector<kWidth> v;
#pragma unroll
  for (int k = 0; k < kWidth; k += 2) v.words[k / 2] = two(T(), values[k], kWidth > 1 ? values[k + 1 - (kWidth == 1)] : 0.0f);
  return v;
}

// ---- Tiles ----

// Calls f(vector in the tile) for this thread's vectors of as many elements.
template <int kWidth, class F>
__device__ void for_own_vectors(const Plan& plan, int elements, const F& f) {
  if (static_cast<int>(threadIdx.x) >= plan.columns) return;
  for (int at = static_cast<int>(threadIdx.x) * kWidth; at < elements; at += plan.columns * kWidth) f(at);
}

// Calls f(run, element in it) for this thread's vectors of r runs of as many elements.
template <int kWidth, class F>
__device__ void for_vectors_of_runs(const Plan& plan, int elements, const F& f) {
  int run = 0, at = static_cast<int>(threadIdx.x) * kWidth;
  while (true) {
    while (at >= elements) {
      at -= elements;
      if (++run == plan.r) return;
    }
    f(run, at);
    at += static_cast<int>(blockDim.x) * kWidth;
  }
}

template <int kWidth>
__device__ void fetch(const Plan& plan, const Position& tile, const std::uint16_t* x, std::uint16_t* to) {
  x += tile.first_of_row(plan) + tile.first_pixel(plan) * plan.pixel;
  for_own_vectors<kWidth>(plan, tile.pixels(plan) * plan.pixel, [&](int at) { copy<kWidth>(to + at, x + at); });
}

template <int kWidth>
__device__ void fetch_shuffled(const Plan& plan, const Position& tile, const std::uint16_t* y, std::uint16_t* to) {
  y += tile.first_of_row(plan) + tile.first_pixel(plan) * plan.run;
  for_vectors_of_runs<kWidth>(plan, tile.pixels(plan) * plan.run, [&](int run, int at) {
    copy<kWidth>(to + run * plan.pitch + at, y + run * plan.width * plan.run + at);
  });
}

template <int kWidth>
__device__ void store_shuffled(const Plan& plan, const Position& tile, const std::uint16_t* from, std::uint16_t* y) {
  y += tile.first_of_row(plan) + tile.first_pixel(plan) * plan.run;
  for_vectors_of_runs<kWidth>(plan, tile.pixels(plan) * plan.run, [&](int run, int at) {
    write(y + run * plan.width * plan.run + at, read<kWidth>(from + run * plan.pitch + at));
  });
}

// Of the elements of this thread's vectors: where they are in the shuffled tile, for the first step, and their biases.
template <int kWidth>
struct Elements {
  int places[kWidth];
  float biases[kWidth];
};

template <class T, int kWidth>
__device__ Elements<kWidth> elements_of_thread(const Plan& plan, const T* bias) {
  Elements<kWidth> of;
  const int first = static_cast<int>(threadIdx.x) * kWidth, square = plan.r * plan.r;
  int pixel = quotient(first, plan.inverse_pixel), channel = first - pixel * plan.pixel;
  int c = quotient(channel, plan.inverse_square), i = quotient(channel - c * square, plan.inverse_r);
  int j = channel - c * square - i * plan.r;
#pragma unroll
  for (int k = 0; k < kWidth; ++k) {
    of.places[k] = i * plan.pitch + (pixel * plan.r + j) * plan.channels + c;
    of.biases[k] = bias == nullptr ? 0.0f : static_cast<float>(bias[channel]);
    ++channel;
    if (++j < plan.r) continue;
    j = 0;
    if (++i < plan.r) continue;
    i = 0;
    if (++c < plan.channels) continue;
    c = channel = 0;
    ++pixel;
  }
  return of;
}

template <class T, int kWidth, bool kPairs>
__device__ void scatter(const Elements<kWidth>& of, const float (&values)[kWidth], std::uint16_t* to) {
  if constexpr (kPairs) {
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      *reinterpret_cast<std::uint32_t*>(to + of.places[k]) = two(T(), values[k], values[k + 4]);
    }
  } else {
    const Vector<kWidth> v = pack<T>(values);
#pragma unroll
    for (int k = 0; k < kWidth; ++k) to[of.places[k]] = static_cast<std::uint16_t>(v.words[k / 2] >> k % 2 * 16);
  }
}

template <class T, int kWidth, bool kPairs>
__device__ void gather(const Elements<kWidth>& of, const std::uint16_t* from, float (&values)[kWidth]) {
  if constexpr (kPairs) {
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const float2 pair = both(T(), *reinterpret_cast<const std::uint32_t*>(from + of.places[k]));
      values[k] = pair.x, values[k + 4] = pair.y;
    }
  } else {
#pragma unroll
    for (int k = 0; k < kWidth; ++k) values[k] = both(T(), from[of.places[k]]).x;
  }
}

// ---- Kernels ----

struct Forward {
  Plan plan;
  Gelu gelu;
  const std::uint16_t* x;
  const void* bias;
  std::uint16_t* y;
};

struct Backward {
  Plan plan;
  const std::uint16_t* x;
  const void* bias;
  const std::uint16_t* dy;
  std::uint16_t* dx;
  float* sums;  // [blocks, plan.pixel], or null
};

template <class T, int kWidth, bool kPairs, int kMost>
__global__ void __launch_bounds__(kMost, kMost == kThreads ? kForward.resident / kThreads : 1)
    pixel_shuffle_gelu_fwd_kernel(const __grid_constant__ Forward call) {
  constexpr int kStages = kForward.stages;
  const Plan& plan = call.plan;
  const int count = (plan.tiles - static_cast<int>(blockIdx.x) + plan.blocks - 1) / plan.blocks;
  const int elements = plan.tile_elements(), shuffled = plan.shuffled_elements();
  // First the shuffled tiles, which are read 16 bytes at a time like the others; one of two is written while the other is
  // read.
  auto* const tiles = reinterpret_cast<std::uint16_t*>(ampere::shared_memory());
  auto* const ring = tiles + min(2, (plan.tiles + plan.blocks - 1) / plan.blocks) * shuffled;
  Position ahead = first_position(plan), now = ahead;
  int ahead_stage = 0, stage = 0;
  const auto fetch_next = [&] {
    fetch<kWidth>(plan, ahead, call.x, ring + ahead_stage * elements);
    ahead.next(plan);
    if (++ahead_stage == kStages) ahead_stage = 0;
  };
  for (int n = 0; n < kStages - 1; ++n) {
    if (n < count) fetch_next();
    ampere::copies_commit();
  }
  const int stride = plan.columns * kWidth;  // of a step
  const Elements<kWidth> of = elements_of_thread<T, kWidth>(plan, static_cast<const T*>(call.bias));
  const int first = static_cast<int>(threadIdx.x) < plan.columns ? static_cast<int>(threadIdx.x) * kWidth : INT_MAX / 2;
  for (int n = 0; n < count; ++n) {
    // Of x a thread reads what it has copied itself, and has read the tile whose place the next one takes.
    if (n + kStages - 1 < count) fetch_next();
    ampere::copies_commit();
    ampere::copies_wait<kStages - 1>();
    const int valid = now.pixels(plan) * plan.pixel;
    std::uint16_t* const y = tiles + n % 2 * shuffled;
    const std::uint16_t* x = ring + stage * elements + first;
    for (int step = 0; step < plan.steps; ++step, x += stride) {
      if (first + step * stride >= valid) continue;
      float values[kWidth];
      unpack<T>(read<kWidth>(x), values);
#pragma unroll
      for (int k = 0; k < kWidth; ++k) values[k] = activate(call.gelu, values[k] + of.biases[k]);
      scatter<T, kWidth, kPairs>(of, values, y + step * plan.step * plan.run);
    }
    __syncthreads();
    store_shuffled<kWidth>(plan, now, y, call.y);
    now.next(plan);
    if (++stage == kStages) stage = 0;
  }
}

template <class T, int kWidth, bool kPairs, bool kTanhForm, int kMost>
__global__ void __launch_bounds__(kMost, kMost == kThreads ? kBackward.resident / kThreads : 1)
    pixel_shuffle_gelu_bwd_kernel(const __grid_constant__ Backward call) {
  constexpr int kStages = kBackward.stages;
  hopper::launch_dependents();
  const Plan& plan = call.plan;
  const int count = (plan.tiles - static_cast<int>(blockIdx.x) + plan.blocks - 1) / plan.blocks;
  const int elements = plan.tile_elements(), both_elements = elements + plan.shuffled_elements();
  auto* const ring = reinterpret_cast<std::uint16_t*>(ampere::shared_memory());
  Position ahead = first_position(plan), now = ahead;
  int ahead_stage = 0, stage = 0;
  const auto fetch_next = [&] {
    std::uint16_t* const to = ring + ahead_stage * both_elements;
    fetch<kWidth>(plan, ahead, call.x, to);
    fetch_shuffled<kWidth>(plan, ahead, call.dy, to + elements);
    ahead.next(plan);
    if (++ahead_stage == kStages) ahead_stage = 0;
  };
  for (int n = 0; n < kStages - 1; ++n) {
    if (n < count) fetch_next();
    ampere::copies_commit();
  }
  const int stride = plan.columns * kWidth;  // of a step
  const Elements<kWidth> of = elements_of_thread<T, kWidth>(plan, static_cast<const T*>(call.bias));
  const int first = static_cast<int>(threadIdx.x) < plan.columns ? static_cast<int>(threadIdx.x) * kWidth : INT_MAX / 2;
  float sums[kWidth] = {};
  for (int n = 0; n < count; ++n) {
    ampere::copies_wait<kStages - 2>();
    __syncthreads();  // this tile is there, and everybody has read the one whose place the next one takes
    if (n + kStages - 1 < count) fetch_next();
    ampere::copies_commit();
    const int valid = now.pixels(plan) * plan.pixel;
    const std::uint16_t* const tile = ring + stage * both_elements;
    const std::uint16_t* x = tile + first;
    std::uint16_t* dx = call.dx + now.first_of_row(plan) + now.first_pixel(plan) * plan.pixel + first;
    for (int step = 0; step < plan.steps; ++step, x += stride, dx += stride) {
      if (first + step * stride >= valid) continue;
      float values[kWidth], slopes[kWidth];
      unpack<T>(read<kWidth>(x), values);
      gather<T, kWidth, kPairs>(of, tile + elements + step * plan.step * plan.run, slopes);
#pragma unroll
      for (int k = 0; k < kWidth; ++k) {
        values[k] = slopes[k] * gelu_slope<kTanhForm>(values[k] + of.biases[k]);
        sums[k] += values[k];
      }
      write(dx, pack<T>(values));
    }
    now.next(plan);
    if (++stage == kStages) stage = 0;
  }
  if (call.sums == nullptr) return;
  // A stage has room for a float of each thread's element: two bytes each of x and of dy.
  __syncthreads();
  auto* const of_threads = reinterpret_cast<float*>(ring);
  if (static_cast<int>(threadIdx.x) < plan.columns) {
#pragma unroll
    for (int k = 0; k < kWidth; ++k) of_threads[first + k] = sums[k];
  }
  __syncthreads();
  for (int channel = static_cast<int>(threadIdx.x); channel < plan.pixel; channel += static_cast<int>(blockDim.x)) {
    float sum = 0;
    for (int at = channel; at < plan.columns * kWidth; at += plan.pixel) sum += of_threads[at];
    call.sums[std::int64_t(blockIdx.x) * plan.pixel + channel] = sum;
  }
}

// Adds up the rows of sums, 32 channels to a block: a warp takes every kSumWarps-th row.
constexpr int kSumWarps = 16;

template <class T>
__global__ void __launch_bounds__(32 * kSumWarps)
    pixel_shuffle_gelu_dbias_kernel(const float* sums, int rows, int channels, std::uint16_t* dbias) {
  hopper::wait_for_predecessors();
  auto* const of_warps = reinterpret_cast<float*>(ampere::shared_memory());
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int channel = static_cast<int>(blockIdx.x) * 32 + lane;
  float sum = 0;
  if (channel < channels) {
#pragma unroll 8
    for (int row = warp; row < rows; row += kSumWarps) sum += sums[std::int64_t(row) * channels + channel];
  }
  of_warps[threadIdx.x] = sum;
  __syncthreads();
  if (warp > 0 || channel >= channels) return;
  float total = 0;
#pragma unroll
  for (int other = 0; other < kSumWarps; ++other) total += of_warps[32 * other + lane];
  dbias[channel] = static_cast<std::uint16_t>(two(T(), total, 0.0f));
}

// ---- Launches ----

int divide_up(std::int64_t a, std::int64_t b) { return static_cast<int>((a + b - 1) / b); }

// Vectors as wide as runs and addresses allow.
int vector_width(const PixelShuffleGeluCuda& call, const void* y) {
  const auto address = reinterpret_cast<std::uintptr_t>(call.x) | reinterpret_cast<std::uintptr_t>(y);
  const std::int64_t row = std::int64_t(call.width) * call.r * call.channels;
  for (const int width : {8, 2}) {
    if (row % width == 0 && address % (kElementBytes * width) == 0) return width;
  }
  return 1;
}

// How a row is cut: the threads and steps that take least, where what a tile takes beside its steps is half a step.
void cut_rows(Plan& plan) {
  const int common = std::gcd(plan.vector, plan.run);
  // Threads and pixels after which channels repeat and the runs of a tile are whole vectors.
  const int period = plan.r * (plan.run / common), pixels = plan.vector / common;
  const int most = std::max(1, kThreads / period), least = std::min(most, divide_up(kFewThreads, period));
  std::int64_t best = INT64_MAX;
  for (int periods = least; periods <= most; ++periods) {
    const int columns = periods * period, threads = divide_up(columns, 32) * 32, step = periods * pixels;
    if (threads > kThreads && periods > 1) break;
    const int fit = kTileBytes / (columns * plan.vector * kElementBytes);
    const int most_steps = std::max(1, std::min(fit, kSteps * 8 / plan.vector));
    for (int steps = 1; steps <= most_steps; ++steps) {
      const int across = divide_up(plan.width, std::int64_t(step) * steps);
      const std::int64_t taken = std::int64_t(threads) * (2 * divide_up(plan.width, step) + across);
      if (taken >= best) continue;
      best = taken;
      plan.columns = columns, plan.threads = threads, plan.steps = steps, plan.step = step;
      plan.tile = step * steps, plan.across = across;
    }
  }
}

const char* make_plan(const PixelShuffleGeluCuda& call, const void* y, const Kind& kind, int device, Plan& plan) {
  int multiprocessors = 0;
  cudaError_t error = cudaSetDevice(device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  if (error != cudaSuccess) return cudaGetErrorString(error);
  plan.channels = call.channels, plan.r = call.r, plan.width = call.width;
  plan.run = call.r * call.channels, plan.pixel = call.r * plan.run;
  plan.vector = vector_width(call, y);
  plan.pairs = plan.vector == 8 && call.r == 2 && call.channels % 2 == 0;
  if (plan.r * (plan.run / std::gcd(plan.vector, plan.run)) > kMostThreads) return "a pixel has more channels than a block takes";
  cut_rows(plan);
  const std::int64_t tiles = std::int64_t(call.batch) * call.height * plan.across;
  if (tiles > INT_MAX - (1 << 20)) return "x has more tiles than 32 bits count";
  plan.tiles = static_cast<int>(tiles);
  // Whole vectors; and where a warp's elements are two rows apart, as with r = 4, they are in other banks.
  plan.pitch = divide_up(plan.tile * plan.run - 8, 64) * 64 + 8;
  const int tile_bytes = plan.tile * plan.pixel * kElementBytes, shuffled_bytes = plan.r * plan.pitch * kElementBytes;
  // No more stages than a block has tiles, and as many blocks as there is room for.
  for (int stages = 1; stages <= kind.stages; ++stages) {
    const int stage_bytes = tile_bytes + (kind.tensors - 1) * shuffled_bytes;
    plan.shared_bytes = stages * stage_bytes + (kind.stores_tiles ? std::min(stages, 2) * shuffled_bytes : 0);
    const int fit = std::min(kMultiprocessorBytes / (plan.shared_bytes + kBlockBytes), kind.resident / plan.threads);
    plan.blocks = static_cast<int>(std::min<std::int64_t>(tiles, std::int64_t(multiprocessors) * std::max(1, fit)));
    if (divide_up(plan.tiles, plan.blocks) <= stages) break;
  }
  plan.jump_rows = plan.blocks / plan.across, plan.jump_columns = plan.blocks % plan.across;
  plan.inverse_across = 1.0f / static_cast<float>(plan.across), plan.inverse_pixel = 1.0f / static_cast<float>(plan.pixel);
  plan.inverse_square = 1.0f / static_cast<float>(plan.r * plan.r), plan.inverse_r = 1.0f / static_cast<float>(plan.r);
  return nullptr;
}

template <class Kernel, class Arguments>
const char* launch(Kernel kernel, const Arguments& arguments, cudaStream_t stream) {
  const Plan& plan = arguments.plan;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(plan.blocks));
  config.blockDim = dim3(static_cast<unsigned>(plan.threads));
  config.dynamicSmemBytes = static_cast<std::size_t>(plan.shared_bytes);
  config.stream = stream;
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, plan.shared_bytes);
  if (error == cudaSuccess) error = cudaLaunchKernelEx(&config, kernel, arguments);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

template <class T>
const char* forward(const Forward& call, cudaStream_t stream) {
  const Plan& plan = call.plan;
  if (plan.pairs) return launch(pixel_shuffle_gelu_fwd_kernel<T, 8, true, kThreads>, call, stream);
  if (plan.vector == 2) return launch(pixel_shuffle_gelu_fwd_kernel<T, 2, false, kMostThreads>, call, stream);
  if (plan.vector == 1) return launch(pixel_shuffle_gelu_fwd_kernel<T, 1, false, kMostThreads>, call, stream);
  if (plan.threads > kThreads) return launch(pixel_shuffle_gelu_fwd_kernel<T, 8, false, kMostThreads>, call, stream);
  return launch(pixel_shuffle_gelu_fwd_kernel<T, 8, false, kThreads>, call, stream);
}

template <class T, bool kTanhForm>
const char* backward(const Backward& call, cudaStream_t stream) {
  const Plan& plan = call.plan;
  if (plan.pairs) return launch(pixel_shuffle_gelu_bwd_kernel<T, 8, true, kTanhForm, kThreads>, call, stream);
  if (plan.vector == 2) return launch(pixel_shuffle_gelu_bwd_kernel<T, 2, false, kTanhForm, kMostThreads>, call, stream);
  if (plan.vector == 1) return launch(pixel_shuffle_gelu_bwd_kernel<T, 1, false, kTanhForm, kMostThreads>, call, stream);
  if (plan.threads > kThreads) {
    return launch(pixel_shuffle_gelu_bwd_kernel<T, 8, false, kTanhForm, kMostThreads>, call, stream);
  }
  return launch(pixel_shuffle_gelu_bwd_kernel<T, 8, false, kTanhForm, kThreads>, call, stream);
}

template <class T>
const char* backward(const PixelShuffleGeluGradientCuda& call, const Backward& arguments, cudaStream_t stream) {
  const auto kernels = call.forward.tanh_form ? backward<T, true> : backward<T, false>;
  const char* const error = kernels(arguments, stream);
  if (error != nullptr || call.dbias == nullptr) return error;
  const Plan& plan = arguments.plan;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(divide_up(plan.pixel, 32)));
  config.blockDim = dim3(32 * kSumWarps);
  config.dynamicSmemBytes = 32 * kSumWarps * sizeof(float);
  config.stream = stream;
  cudaLaunchAttribute early{};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  config.attrs = &early;
  config.numAttrs = 1;
  const float* const sums = call.sums;
  const cudaError_t summed = cudaLaunchKernelEx(&config, pixel_shuffle_gelu_dbias_kernel<T>, sums, plan.blocks, plan.pixel,
                                                static_cast<std::uint16_t*>(call.dbias));
  return summed == cudaSuccess ? nullptr : cudaGetErrorString(summed);
}

// Both tensors that lie in the order of y and those in the order of x have the same vectors.
const void* either(const void* a, const void* b) {
  return reinterpret_cast<const void*>(reinterpret_cast<std::uintptr_t>(a) | reinterpret_cast<std::uintptr_t>(b));
}

}  // namespace

const char* pixel_shuffle_gelu_cuda_fwd(const PixelShuffleGeluCuda& call, int device, void* stream) {
  Forward arguments{{}, call.tanh_form ? kGeluTanh : kGelu, static_cast<const std::uint16_t*>(call.x), call.bias,
                    static_cast<std::uint16_t*>(call.y)};
  if (const char* error = make_plan(call, call.y, kForward, device, arguments.plan)) return error;
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  return call.bfloat16 ? forward<__nv_bfloat16>(arguments, cuda_stream) : forward<__half>(arguments, cuda_stream);
}

const char* pixel_shuffle_gelu_cuda_bwd(const PixelShuffleGeluGradientCuda& call, int device, void* stream) {
  Backward arguments{{}, static_cast<const std::uint16_t*>(call.forward.x), call.forward.bias,
                     static_cast<const std::uint16_t*>(call.dy), static_cast<std::uint16_t*>(call.dx), call.sums};
  if (const char* error = make_plan(call.forward, either(call.dy, call.dx), kBackward, device, arguments.plan)) return error;
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  return call.forward.bfloat16 ? backward<__nv_bfloat16>(call, arguments, cuda_stream)
                               : backward<__half>(call, arguments, cuda_stream);
}

const char* pixel_shuffle_gelu_cuda_sums(const PixelShuffleGeluGradientCuda& call, int device, std::int64_t& count) {
  Plan plan;
  if (const char* error = make_plan(call.forward, either(call.dy, call.dx), kBackward, device, plan)) return error;
  count = std::int64_t(plan.blocks) * plan.pixel;
  return nullptr;
}

}  // namespace hflfnerv
