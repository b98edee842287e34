// The steps of Newton and Schulz for many small matrices at once.
//
// All factors of the steps are polynomials of the first Gram matrix G = X Xᵀ, so they commute, are symmetric, and have its
// size. One kernel makes G, a block for each 128 columns of X; in the second a block takes all steps of a matrix, without
// leaving shared memory; the third multiplies X by what came of it, a block for each 64 columns. Of a symmetric matrix only
// the tiles on and above the diagonal are computed.
//
// A product of float32 is three of TF32: an error in the small eigenvalues of G grows to a^8 times itself, and those of one
// alone would be too large.
#include "cuda/orthogonalise.h"

#include <cuda_runtime.h>

#include "cuda/ampere.h"

namespace hflfnerv {

namespace {

constexpr int kThreads = 512, kWarps = kThreads / 32;
constexpr int kSide = 16;    // rows and columns of a tile, which a warp computes
constexpr int kDepth = 128;  // columns of X in a block's share of G
constexpr int kWidth = 64;   // columns of Y that a block makes
constexpr int kMostSides = kMostMatrixRows / kSide;
constexpr int kRounds = (kMostSides * (kMostSides + 1) / 2 + kWarps - 1) / kWarps;  // of tiles of a symmetric matrix

struct Task {
  const float* x;
  float* y;
  float* scratch;  // the blocks' shares of G, tile by tile, then P of `padded` rows and columns
  int rows, columns, row, column;
  int first_share, first_part;  // blocks of the first and of the third kernel
};

struct Tasks {
  int count, steps;
  float a, b, c;
  Task task[kMostMatrices];
};

__host__ __device__ inline int blocks(int n, int size) { return (n + size - 1) / size; }
__host__ __device__ inline int padded(const Task& task) { return blocks(task.rows, kSide) * kSide; }
__host__ __device__ inline int triangle(int sides) { return sides * (sides + 1) / 2; }
// Of rows of `depth` elements, a multiple of 16: eight rows by four elements then lie in different banks.
__host__ __device__ inline int pitch_of(int depth) { return depth + 4; }

template <int Task::*first>
__device__ const Task& task_of_block(const Tasks& tasks) {
  int i = 0;
  while (i + 1 < tasks.count && static_cast<int>(blockIdx.x) >= tasks.task[i + 1].*first) ++i;
  return tasks.task[i];
}

struct Tile {
  int i, j;
};

// Tile `index` of those on and above the diagonal.
__device__ Tile upper_tile(int index, int sides) {
  int i = 0;
  while (index >= sides - i) index -= sides - i++;
  return {i, i + index};
}

// A tile of left rightᵀ: element k of sums[h] is row g + 8 (k / 2), column 8 h + 2 q + k % 2 of lane 4 g + q.
struct Sums {
  float of[2][4] = {};
};

// Splits a float32 into a TF32 and a rest, of which a product takes all but 2^-21 of the value. What is not finite stays so
// in the rest.
__device__ inline void split(float value, std::uint32_t& high, std::uint32_t& low) {
  high = (__float_as_uint(value) + 0x1000) & 0xffffe000;
  low = __float_as_uint(value - __uint_as_float(high));
}

__device__ Sums multiply(const float* left, const float* right, int pitch, int depth, Tile tile) {
  const int lane = threadIdx.x % 32;
  left += (kSide * tile.i + lane / 4) * pitch + lane % 4;
  right += (kSide * tile.j + lane / 4) * pitch + lane % 4;
  Sums sums, low_by_high, high_by_low;  // three chains of products, since each waits for the one before
#pragma unroll 2
  for (int k = 0; k < depth; k += 8, left += 8, right += 8) {
    std::uint32_t high[4], low[4];
#pragma unroll
    for (int r = 0; r < 4; ++r) split(left[r % 2 * 8 * pitch + r / 2 * 4], high[r], low[r]);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      std::uint32_t b_high[2], b_low[2];
#pragma unroll
      for (int r = 0; r < 2; ++r) split(right[h * 8 * pitch + r * 4], b_high[r], b_low[r]);
      ampere::multiply_add_tf32(low_by_high.of[h], low, b_high[0], b_high[1]);
      ampere::multiply_add_tf32(high_by_low.of[h], high, b_low[0], b_low[1]);
      ampere::multiply_add_tf32(sums.of[h], high, b_high[0], b_high[1]);
    }
  }
#pragma unroll
  for (int h = 0; h < 2; ++h) {
#pragma unroll
    for (int k = 0; k < 4; ++k) sums.of[h][k] += low_by_high.of[h][k] + high_by_low.of[h][k];
  }
  return sums;
}

// Calls f(row, column, value) for each element of a tile that this thread holds.
template <class Sum, class Function>
__device__ void for_elements(Tile tile, Sum& sums, Function f) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      f(kSide * tile.i + lane / 4 + k / 2 * 8, kSide * tile.j + 8 * h + lane % 4 * 2 + k % 2, sums.of[h][k]);
    }
  }
}

__device__ void store_symmetric(float* matrix, int pitch, Tile tile, const Sums& sums) {
  for_elements(tile, sums, [&](int row, int column, float value) {
    matrix[row * pitch + column] = value;
    if (tile.i != tile.j) matrix[column * pitch + row] = value;
  });
}

// Calls f(round, tile) for each tile of a symmetric matrix that is this warp's.
template <class Function>
__device__ void for_upper_tiles(int sides, Function f) {
#pragma unroll
  for (int round = 0; round < kRounds; ++round) {
    const int index = round * kWarps + static_cast<int>(threadIdx.x) / 32;
    if (index < triangle(sides)) f(round, upper_tile(index, sides));
  }
}

// Calls f(row, column, value) for `padded` rows of `width` columns of X, zeros where it has none.
template <class Function>
__device__ void load(const Task& task, int rows, int first, int width, Function f) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const bool wide = task.column == 1;  // neighbouring threads read what is adjacent
  const int outer = wide ? rows : width, inner = wide ? width : rows;
#pragma unroll 2
  for (int o = warp; o < outer; o += kWarps) {
#pragma unroll 4
    for (int i = lane; i < inner; i += 32) {
      const int row = wide ? o : i, column = wide ? i : o;
      const bool inside = row < task.rows && first + column < task.columns;
      f(row, column, inside ? task.x[row * task.row + (first + column) * task.column] : 0.0f);
    }
  }
}

// A share of G.
__global__ void __launch_bounds__(kThreads) gram_kernel(const __grid_constant__ Tasks tasks) {
  const Task& task = task_of_block<&Task::first_share>(tasks);
  float* x = reinterpret_cast<float*>(ampere::shared_memory());
  const int share = static_cast<int>(blockIdx.x) - task.first_share, rows = padded(task), sides = rows / kSide;
  load(task, rows, share * kDepth, kDepth, [&](int row, int column, float value) { x[row * pitch_of(kDepth) + column] = value; });
  __syncthreads();
  auto* to = reinterpret_cast<float4*>(task.scratch) + (share * triangle(sides) * 32 + static_cast<int>(threadIdx.x) % 32) * 2;
  for_upper_tiles(sides, [&](int round, Tile tile) {
    const Sums sums = multiply(x, x, pitch_of(kDepth), kDepth, tile);
    const int index = (round * kWarps + static_cast<int>(threadIdx.x) / 32) * 64;
#pragma unroll
    for (int h = 0; h < 2; ++h) to[index + h] = {sums.of[h][0], sums.of[h][1], sums.of[h][2], sums.of[h][3]};
  });
}

// P, by which X is to be multiplied, out of the shares of G.
__global__ void __launch_bounds__(kThreads) steps_kernel(const __grid_constant__ Tasks tasks) {
  const Task& task = tasks.task[blockIdx.x];
  const int rows = padded(task), sides = rows / kSide, tiles = triangle(sides), pitch = pitch_of(rows);
  const int shares = blocks(task.columns, kDepth);
  float* gram = reinterpret_cast<float*>(ampere::shared_memory());
  float* factor = gram + rows * pitch;
  float* product = factor + rows * pitch;
  Sums sums[kRounds], more[kRounds];

  for_upper_tiles(sides, [&](int round, Tile tile) {
    const auto* from = reinterpret_cast<const float4*>(task.scratch) +
                       ((round * kWarps + static_cast<int>(threadIdx.x) / 32) * 32 + static_cast<int>(threadIdx.x) % 32) * 2;
#pragma unroll 4
    for (int share = 0; share < shares; ++share, from += tiles * 64) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float4 part = from[h];
        const float values[4] = {part.x, part.y, part.z, part.w};
#pragma unroll
        for (int k = 0; k < 4; ++k) sums[round].of[h][k] += values[k];
      }
    }
    store_symmetric(gram, pitch, tile, sums[round]);
  });
  __syncthreads();
  float squares = 0;  // the trace of X Xᵀ
#pragma unroll 4
  for (int row = 0; row < rows; ++row) squares += gram[row * (pitch + 1)];
  const float norm = sqrtf(squares), scale = 1.0f / (norm < 1e-20f ? 1e-20f : norm);
  __syncthreads();
  for_upper_tiles(sides, [&](int round, Tile tile) {
    for_elements(tile, sums[round], [&](int, int, float& value) { value = value * scale * scale; });
    store_symmetric(gram, pitch, tile, sums[round]);
  });
  __syncthreads();

  for (int step = 0; step < tasks.steps; ++step) {
    const bool last = step + 1 == tasks.steps;
    for_upper_tiles(sides, [&](int, Tile tile) {
      Sums made = multiply(gram, gram, pitch, rows, tile);
      for_elements(tile, made, [&](int row, int column, float& value) {
        value = tasks.c * value + tasks.b * gram[row * pitch + column] + (row == column ? tasks.a : 0.0f);
      });
      store_symmetric(factor, pitch, tile, made);
      if (step == 0) store_symmetric(product, pitch, tile, made);
    });
    __syncthreads();
    for_upper_tiles(sides, [&](int round, Tile tile) {
      if (step > 0) sums[round] = multiply(factor, product, pitch, rows, tile);
      if (!last) more[round] = multiply(factor, gram, pitch, rows, tile);
    });
    __syncthreads();
    for_upper_tiles(sides, [&](int round, Tile tile) {
      if (step > 0) store_symmetric(product, pitch, tile, sums[round]);
      if (!last) store_symmetric(gram, pitch, tile, more[round]);
    });
    __syncthreads();
    if (last) break;
    for_upper_tiles(sides, [&](int round, Tile tile) { sums[round] = multiply(factor, gram, pitch, rows, tile); });
    __syncthreads();
    for_upper_tiles(sides, [&](int round, Tile tile) { store_symmetric(gram, pitch, tile, sums[round]); });
    __syncthreads();
  }

  float* to = task.scratch + shares * tiles * (kSide * kSide);
  for (int at = threadIdx.x; at < rows * rows; at += kThreads) to[at] = scale * product[at / rows * pitch + at % rows];
}

// Columns of Y = P X.
__global__ void __launch_bounds__(kThreads) apply_kernel(const __grid_constant__ Tasks tasks) {
  const Task& task = task_of_block<&Task::first_part>(tasks);
  const int first = (static_cast<int>(blockIdx.x) - task.first_part) * kWidth;
  const int rows = padded(task), sides = rows / kSide, pitch = pitch_of(rows);
  float* product = reinterpret_cast<float*>(ampere::shared_memory());
  float* x = product + rows * pitch;  // transposed
  load(task, rows, first, kWidth, [&](int row, int column, float value) { x[column * pitch + row] = value; });
  const float* from = task.scratch + blocks(task.columns, kDepth) * triangle(sides) * (kSide * kSide);
  for (int at = threadIdx.x; at < rows * rows; at += kThreads) product[at / rows * pitch + at % rows] = from[at];
  __syncthreads();
  constexpr int kAcross = kWidth / kSide;
  for (int index = threadIdx.x / 32; index < sides * kAcross; index += kWarps) {
    const Tile tile{index / kAcross, index % kAcross};
    const Sums sums = multiply(product, x, pitch, rows, tile);
    for_elements(tile, sums, [&](int row, int column, float value) {
      column += first;
      if (row < task.rows && column < task.columns) task.y[row * task.row + column * task.column] = value;
    });
  }
}

std::int64_t scratch_of(const MatrixCuda& matrix) {
  const int sides = blocks(matrix.rows, kSide);
  return std::int64_t(blocks(matrix.columns, kDepth)) * triangle(sides) * (kSide * kSide) + sides * sides * (kSide * kSide);
}

cudaError_t launch(void (*kernel)(Tasks), const Tasks& tasks, int count, int shared_bytes, cudaStream_t stream) {
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
  if (error != cudaSuccess) return error;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(count));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = static_cast<std::size_t>(shared_bytes);
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, tasks);
}

}  // namespace

std::int64_t orthogonalise_cuda_scratch(const OrthogonaliseCuda& call) {
  std::int64_t elements = 0;
  for (int i = 0; i < call.count; ++i) elements += scratch_of(call.matrix[i]);
  return elements;
}

const char* orthogonalise_cuda(const OrthogonaliseCuda& call, int device, void* stream) {
  Tasks tasks{call.count, call.steps, call.a, call.b, call.c, {}};
  float* scratch = call.scratch;
  int shares = 0, parts = 0, most = 0;
  for (int i = 0; i < call.count; ++i) {
    const MatrixCuda& matrix = call.matrix[i];
    tasks.task[i] = {matrix.x, matrix.y, scratch, matrix.rows, matrix.columns, matrix.row, matrix.column, shares, parts};
    scratch += scratch_of(matrix);
    shares += blocks(matrix.columns, kDepth);
    parts += blocks(matrix.columns, kWidth);
    most = most > padded(tasks.task[i]) ? most : padded(tasks.task[i]);
  }
  const auto on = static_cast<cudaStream_t>(stream);
  const int pitch = pitch_of(most) * static_cast<int>(sizeof(float));
  cudaError_t error = cudaSetDevice(device);
  if (error == cudaSuccess) error = launch(gram_kernel, tasks, shares, most * pitch_of(kDepth) * static_cast<int>(sizeof(float)), on);
  if (error == cudaSuccess) error = launch(steps_kernel, tasks, call.count, 3 * most * pitch, on);
  if (error == cudaSuccess) error = launch(apply_kernel, tasks, parts, (most + kWidth) * pitch, on);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace hflfnerv
