// A head's 3x3 convolution in training, on tensor cores, in one pass over memory each way.
//
// Forward a block goes down a strip, see strips.h.
//
// On the way back a pixel of x meets 27 values of dy. They are rows of a matrix G that is nowhere in memory: dy lies in shared
// memory four values to a pixel, the last one zero, so that a pixel and its three right neighbours are 32 adjacent bytes, a row
// of a product's operand for a row of the kernel. The fourth neighbour meets nothing. As ldmatrix wants 16 bytes aligned, there
// is a second copy of dy, a pixel further. dx = G w, and with G and x transposed by ldmatrix, the gradient of the weight is
// Gᵀ x, which stays in registers over all tiles of a block.
#include "cuda/conv2d.h"

#include <cuda_runtime.h>

#include <algorithm>
#include <type_traits>

#include "cuda/ampere.h"
#include "cuda/pairs.h"
#include "cuda/strips.h"

namespace hflfnerv {

namespace {

using namespace strips;

constexpr int kTaps = 9, kMeetings = kTaps * kConv2dOutputs;

// Of kBlocks times 8 channels.
template <int kBlocks>
constexpr int kPixelPitch = pixel_pitch(8 * kBlocks);
// Moves of chunks that are in the instructions one after the other.
template <int kBlocks>
constexpr int kUnrolled = kBlocks > 3 ? 4 : 1;
constexpr int kSegmentRows = 8;  // whose time the beginning and the end of a segment take

// There are fewer than 2³¹ pixels.
__device__ std::int64_t image_offset(const Conv2dCuda& call, int image, int apart) {
  return std::int64_t(image * call.height * call.width) * apart;
}

__device__ Image image_of_x(const Conv2dCuda& call, int image) {
  return {static_cast<const std::uint16_t*>(call.x) + image_offset(call, image, call.pixel), call.height, call.width};
}

// An element of the weight, zero where there is none.
__device__ std::uint32_t weight_bits(const Conv2dCuda& call, int output, int channel, int row, int column) {
  if (output >= call.outputs || channel >= call.channels) return 0;
  const std::int64_t* strides = call.weight_strides;
  return static_cast<const std::uint16_t*>(
      call.weight)[output * strides[0] + channel * strides[1] + row * strides[2] + column * strides[3]];
}

// ---- Forward ----

template <int kBlocks>
struct Forward {
  static constexpr int kPitch = kPixelPitch<kBlocks>, kSteps = (kBlocks + 1) / 2;  // of 16 channels
  // Places for steps in shared memory, and blocks on a multiprocessor.
  static constexpr int kStages = kBlocks == 1 ? 6 : kBlocks <= 3 ? 4 : kBlocks == 8 ? 2 : 3;
  static constexpr int kResident = kBlocks == 1 ? 4 : kBlocks <= 3 ? 3 : 2;
  static constexpr int kStageBytes = kStepPixels * kPitch;
  static constexpr int kSharedBytes = kStages * kStageBytes + 2 * kStepShares * 4;
  static_assert(3 * kSteps * 512 <= 2 * kStepShares * 4, "the weight takes the place of shares");
};

struct ForwardArguments {
  Conv2dCuda head;
  Conv2dCudaForward result;
  Cut cut;
  Chunks copies;
};

// Eight pixels' channels as products take them, zeros behind the last one.
template <int kBlocks>
__device__ void load_pixels(const Conv2dCuda& call, const char* x, int lane, std::uint32_t (&b)[2 * ((kBlocks + 1) / 2)]) {
  const char* row = x + lane % 8 * kPixelPitch<kBlocks> + lane / 8 * 16;
  constexpr int kFours = kBlocks / 4 * 4;
#pragma unroll
  for (int j = 0; j < kFours; j += 4) {
    std::uint32_t four[4];
    ampere::load_matrices<4, false>(four, row + 16 * j);
#pragma unroll
    for (int i = 0; i < 4; ++i) b[j + i] = four[i];
  }
  if constexpr (kBlocks % 4 >= 2) {
    std::uint32_t pair[2];
    ampere::load_matrices<2, false>(pair, x + lane % 8 * kPixelPitch<kBlocks> + (kFours + lane / 8 % 2) * 16);
    b[kFours] = pair[0], b[kFours + 1] = pair[1];
  }
  if constexpr (kBlocks % 2 == 1) {
    std::uint32_t one[1];
    ampere::load_matrices<1, false>(one, x + lane % 8 * kPixelPitch<kBlocks> + (kBlocks - 1) * 16);
    b[kBlocks - 1] = one[0], b[kBlocks] = 0;
  }
  // Of 6 and 8 times 8 channels the last 15 may not be there.
#pragma unroll
  for (int j = kBlocks > 4 ? kBlocks - 2 : kBlocks - 1; j < kBlocks; ++j) {
    b[j] &= two_of(8 * j + lane % 4 * 2, call.channels);
  }
}

template <class T, int kBlocks>
__global__ void __launch_bounds__(kThreads, Forward<kBlocks>::kResident)
    conv2d_fwd_kernel(const __grid_constant__ ForwardArguments call) {
  using Shape = Forward<kBlocks>;
  constexpr int kPitch = Shape::kPitch, kStages = Shape::kStages, kSteps = Shape::kSteps;
  const Conv2dCuda& head = call.head;
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  char* const x = ampere::shared_memory();
  auto* const shares = reinterpret_cast<float*>(x + kStages * Shape::kStageBytes);
  const Segment segment(call.cut, head.height);

  // A warp copies half of a row.
  const Image image = image_of_x(head, segment.image);
  const Chunk copied(call.copies, lane);
  const int copy_row = segment.first - 1 + warp * kRun / kStripColumns;
  const int copy_column = segment.column - 1 + warp * kRun % kStripColumns;
  const auto copy = [&](int step, int stage) {
    if (step < segment.steps) {
      copy_run<kUnrolled<kBlocks>>(image, copy_row + step * kStepRows, copy_column, call.copies, copied,
                                   x + stage * Shape::kStageBytes + warp * kRun * kPitch);
    }
    ampere::copies_commit();
  };
#pragma unroll 1
  for (int i = 0; i < kStages - 1; ++i) copy(i, i);
  // Row 3 t + n of a product is for the kernel's column t and output n; the rest of 16 is zero. In the order in which lanes take
  // them the weights are where later the shares will be.
  for (int at = thread; at < 3 * kSteps * 128; at += kThreads) {
    const int k = at / 128 / kSteps, i = at % 4, share = at % 128 / 16 + i % 2 * 8;
    const int channel = at / 128 % kSteps * 16 + i / 2 * 8 + at / 4 % 4 * 2;
    const int output = share < kShares ? share % kConv2dOutputs : kConv2dOutputs, t = share / kConv2dOutputs;
    reinterpret_cast<std::uint32_t*>(shares)[at] =
        weight_bits(head, output, channel, k, t) | weight_bits(head, output, channel + 1, k, t) << 16;
  }
  __syncthreads();
  std::uint32_t weight[3][kSteps][4];
#pragma unroll
  for (int k = 0; k < 3; ++k) {
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      const uint4 four = reinterpret_cast<const uint4*>(shares)[(k * kSteps + s) * 32 + lane];
      weight[k][s][0] = four.x, weight[k][s][1] = four.y, weight[k][s][2] = four.z, weight[k][s][3] = four.w;
    }
  }
  float bias[kConv2dOutputs];
#pragma unroll
  for (int n = 0; n < kConv2dOutputs; ++n) {
    const bool there = call.result.bias != nullptr && n < head.outputs;
    bias[n] = there ? to_float<T>(static_cast<const std::uint16_t*>(call.result.bias)[n]) : 0.0f;
  }
  const int of_row = thread / kStripColumns, of_column = thread % kStripColumns;
  const bool has_output = of_column < kStripOutputs && segment.column + of_column < head.width;
  // Adds up and stores this thread's pixel of a step's y, which is two rows behind its x.
  const auto finish = [&](int step) {
    const int row = step * kStepRows - 2 + of_row;
    if (!has_output || row < 0 || row >= segment.rows) return;
    float result[kConv2dOutputs];
#pragma unroll
    for (int n = 0; n < kConv2dOutputs; ++n) result[n] = bias[n];
    add_shares(shares + step % 2 * kStepShares + of_row * kShares * kSharePitch + of_column, result);
    auto* y = static_cast<std::uint16_t*>(call.result.y) + image_offset(head, segment.image, head.outputs) +
              std::int64_t((segment.first + row) * head.width + segment.column + of_column) * head.outputs;
#pragma unroll
    for (int n = 0; n < kConv2dOutputs; ++n) {
      if (n < head.outputs) y[n] = static_cast<std::uint16_t>(two(T(), result[n], result[n]));
    }
  };

  float sums[3][4] = {};  // of the rows of y that the next row of x is the first, second and third one for
  int stage = 0;
#pragma unroll 1
  for (int step = 0; step < segment.steps; ++step) {
    ampere::copies_wait<kStages - 2>();
    __syncthreads();  // the step's x is there, and the shares of the one before it; nobody needs its x any more
    copy(step + kStages - 1, stage == 0 ? kStages - 1 : stage - 1);
    if (step > 0) finish(step - 1);
    const char* from = x + stage * Shape::kStageBytes + warp * 8 * kPitch;
    float* to = shares + step % 2 * kStepShares + share_of(8 * warp, lane);
#pragma unroll
    for (int row = 0; row < kStepRows; ++row) {
      std::uint32_t b[2 * kSteps];
      load_pixels<kBlocks>(head, from + row * kStripColumns * kPitch, lane, b);
#pragma unroll
      for (int s = 0; s < kSteps; ++s) {
#pragma unroll
        for (int k = 0; k < 3; ++k) ampere::multiply_add(T(), sums[k], weight[k][s], b[2 * s], b[2 * s + 1]);
      }
      store_shares(to + row * kShares * kSharePitch, lane, sums[2]);
#pragma unroll
      for (int i = 0; i < 4; ++i) sums[2][i] = sums[1][i], sums[1][i] = sums[0][i], sums[0][i] = 0;
    }
    stage = stage + 1 == kStages ? 0 : stage + 1;
  }
  __syncthreads();
  finish(segment.steps - 1);
}

// ---- Back ----

constexpr int kTileRows = kWarps, kTileColumns = kRun, kTilePixels = kTileRows * kTileColumns;  // a row to a warp
// dy of a tile with its border, and where the copy begins whose first pixel is the border's second one.
constexpr int kDyRows = kTileRows + 2, kDyColumns = kTileColumns + 2;
constexpr int kDyCopy = 320, kDyPitch = kDyCopy + 8 * kDyColumns, kDyBytes = kDyRows * kDyPitch;
constexpr int kDyHalf = 8 * 16;  // from a row's first 16 pixels to the others
constexpr int kDyRest = kDyRows * kDyColumns - kThreads;  // beyond a pixel for each thread
static_assert(kDyCopy >= 8 * kDyColumns && kDyCopy % 128 == 64, "even and odd pixels lie in different banks");
static_assert(kDyPitch % 16 == 0, "rows of matrices are aligned");

template <int kBlocks>
struct Backward {
  static constexpr int kPitch = kPixelPitch<kBlocks>, kChannels = 8 * kBlocks;
  static constexpr int kStages = kBlocks == 1 ? 5 : kBlocks == 4 || kBlocks == 6 ? 3 : 4;
  static constexpr int kResident = kBlocks == 1 ? 4 : kBlocks == 2 ? 3 : kBlocks <= 4 ? 2 : 1;
  static constexpr int kStageBytes = kTilePixels * kPitch;
  static constexpr int kWeightBytes = 3 * kBlocks * 32 * 8;
  static constexpr int kSharedBytes = kWeightBytes + 2 * kDyBytes + kStages * kStageBytes;
  static constexpr int kSums = kMeetings * kChannels, kPartial = kSums + kConv2dOutputs;  // of a block, in floats
  static_assert(kWarps * kSums * 4 <= kStages * kStageBytes, "sums of the warps take the place of x");
  static_assert(kConv2dOutputs * kThreads * 4 <= 2 * kDyBytes, "sums of the threads take the place of dy");
};

// A place in an image, which may be outside.
struct Place {
  int image, row, column;
};

struct BackwardArguments {
  Conv2dCuda head;
  Conv2dCudaBackward gradients;
  int across, down;     // tiles of an image
  Place step;           // in tiles, from one of a block's to its next
  Chunks copies, stores;
};

// A block's tiles, one after the other; behind the last one the image is none.
struct Walk {
  Place tile;

  __device__ explicit Walk(const BackwardArguments& call) {
    const int index = static_cast<int>(blockIdx.x), row = index / call.across;
    tile = {row / call.down, row % call.down, index % call.across};
  }
  __device__ void next(const BackwardArguments& call) {
    tile.column += call.step.column;
    tile.row += call.step.row;
    tile.image += call.step.image;
    if (tile.column >= call.across) tile.column -= call.across, ++tile.row;
    if (tile.row >= call.down) tile.row -= call.down, ++tile.image;
  }
  __device__ bool is_there(const BackwardArguments& call) const { return tile.image < call.head.batch; }
  __device__ Place first() const { return {tile.image, tile.row * kTileRows, tile.column * kTileColumns}; }
};

// What a thread reads of dy, and has to put into shared memory: a pixel that is neither in the border's last two columns nor
// rows, and some threads one of those.
struct DyPixels {
  struct Pixel {
    int row, column;  // from the border's first one
    std::int64_t offset;
    std::uint16_t values[kConv2dOutputs];

    __device__ Pixel(const BackwardArguments& call, int row_, int column_) : row(row_), column(column_) {
      offset = (row - 1) * call.gradients.dy_strides[2] + (column - 1) * call.gradients.dy_strides[3];
    }
    // `dy` is the tile's first pixel, at `first`.
    __device__ void read(const BackwardArguments& call, const std::uint16_t* dy, const Place& first) {
      const Conv2dCuda& head = call.head;
      const bool there = first.image < head.batch && inside(first.row - 1 + row, head.height) &&
                         inside(first.column - 1 + column, head.width);
#pragma unroll
      for (int c = 0; c < kConv2dOutputs; ++c) {
        values[c] = there && c < head.outputs ? dy[offset + c * call.gradients.dy_strides[1]] : std::uint16_t{0};
      }
    }
    // And adds it to the sums if the tile's border is elsewhere.
    template <class T>
    __device__ void write(char* to, float (&sums)[kConv2dOutputs]) const {
      const uint2 pixel{values[0] | static_cast<std::uint32_t>(values[1]) << 16, values[2]};
      char* at = to + row * kDyPitch + 8 * column;
      *reinterpret_cast<uint2*>(at) = pixel;
      if (column > 0) *reinterpret_cast<uint2*>(at + kDyCopy - 8) = pixel;
      if (row < 1 || row > kTileRows || column < 1 || column > kTileColumns) return;
#pragma unroll
      for (int c = 0; c < kConv2dOutputs; ++c) sums[c] += to_float<T>(values[c]);
    }
  };

  int thread;
  Pixel main, rest;

  // The rest is two whole rows, then two pixels of each other one.
  static constexpr int kWhole = 2 * kDyColumns;
  static_assert(kDyRest == kWhole + 2 * kTileRows && kDyRest <= kThreads, "the rest is a pixel of some threads");

  __device__ DyPixels(const BackwardArguments& call, int thread_)
      : thread(thread_),
        main(call, thread / kTileColumns, thread % kTileColumns),
        rest(call, thread < kWhole ? kTileRows + thread / kDyColumns : (thread - kWhole) / 2,
             thread < kWhole ? thread % kDyColumns : kTileColumns + thread % 2) {}
  __device__ void read(const BackwardArguments& call, const Place& first) {
    const std::int64_t* strides = call.gradients.dy_strides;
    const auto* dy = static_cast<const std::uint16_t*>(call.gradients.dy) + first.image * strides[0] +
                     first.row * strides[2] + first.column * strides[3];
    main.read(call, dy, first);
    if (thread < kDyRest) rest.read(call, dy, first);
  }
  template <class T>
  __device__ void write(char* to, float (&sums)[kConv2dOutputs]) const {
    main.write<T>(to, sums);
    if (thread < kDyRest) rest.write<T>(to, sums);
  }
};

// Adds Gᵀ x for 16 pixels of a row. `g` is the lane's part of G for the kernel's first row, `x` the first pixel.
template <class T, int kBlocks>
__device__ void add_weight_gradient(const char* g, const char* x, int lane, float (&sums)[3][kBlocks][4]) {
  constexpr int kPitch = kPixelPitch<kBlocks>;
  std::uint32_t b[kBlocks + 1][2];
  const char* row = x + lane % 16 * kPitch + lane / 16 * 16;
#pragma unroll
  for (int j = 0; j + 1 < kBlocks; j += 2) {
    std::uint32_t four[4];
    ampere::load_matrices<4, true>(four, row + 16 * j);
    b[j][0] = four[0], b[j][1] = four[1], b[j + 1][0] = four[2], b[j + 1][1] = four[3];
  }
  if constexpr (kBlocks % 2 == 1) {
    ampere::load_matrices<2, true>(b[kBlocks - 1], x + lane % 16 * kPitch + 16 * (kBlocks - 1));
  }
#pragma unroll
  for (int k = 0; k < 3; ++k) {
    std::uint32_t a[4];
    ampere::load_matrices<4, true>(a, g + k * kDyPitch);
#pragma unroll
    for (int j = 0; j < kBlocks; ++j) ampere::multiply_add(T(), sums[k][j], a, b[j][0], b[j][1]);
  }
}

// Stores a run of dx.
template <int kChunk, int kUnrolled>
__device__ void store_run(const BackwardArguments& call, const Place& first, const Chunk& of_lane, const char* values) {
  const Conv2dCuda& head = call.head;
  const int apart = call.gradients.dx_pixel, pixels = head.width - first.column;
  auto* dx = static_cast<std::uint16_t*>(call.gradients.dx) + image_offset(head, first.image, apart) +
             std::int64_t(first.row * head.width + first.column) * apart;
  for_chunks<kChunk, kUnrolled>(call.stores, of_lane, [&](int pixel, int to, int at) {
    if (pixel >= pixels) return;
    const char* from = values + at;
    if constexpr (kChunk == 8) *reinterpret_cast<uint4*>(dx + to) = *reinterpret_cast<const uint4*>(from);
    if constexpr (kChunk == 4) *reinterpret_cast<uint2*>(dx + to) = *reinterpret_cast<const uint2*>(from);
    if constexpr (kChunk == 2) *reinterpret_cast<std::uint32_t*>(dx + to) = *reinterpret_cast<const std::uint32_t*>(from);
    if constexpr (kChunk == 1) dx[to] = *reinterpret_cast<const std::uint16_t*>(from);
  });
}

// G w for a row of the tile, in the place of its x.
template <class T, int kBlocks>
__device__ void input_gradient(const char* g, const uint2* weight, char* x, int lane) {
  constexpr int kPitch = kPixelPitch<kBlocks>;
  // Both halves share what is read of the weight where there are registers for that.
  constexpr int kAtOnce = kBlocks <= 2 ? 1 : 2;
#pragma unroll
  for (int half = 0; half < 2; half += kAtOnce) {
    std::uint32_t a[kAtOnce][3][4];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
#pragma unroll
      for (int k = 0; k < 3; ++k) {
        ampere::load_matrices<4, false>(a[i][k], g + (half + i) * kDyHalf + k * kDyPitch);
        // The fourth neighbour meets zeros, which it must not make NaNs of.
        if (lane % 4 >= 2) a[i][k][2] = a[i][k][3] = 0;
      }
    }
#pragma unroll
    for (int j = 0; j < kBlocks; ++j) {
      float sums[kAtOnce][4] = {};
#pragma unroll
      for (int k = 0; k < 3; ++k) {
        const uint2 b = weight[(k * kBlocks + j) * 32 + lane];
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) ampere::multiply_add(T(), sums[i], a[i][k], b.x, b.y);
      }
#pragma unroll
      for (int i = 0; i < 2 * kAtOnce; ++i) {
        char* to = x + (16 * half + 8 * i + lane / 4) * kPitch + 16 * j + lane % 4 * 4;
        const float* pair = &sums[i / 2][i % 2 * 2];
        *reinterpret_cast<std::uint32_t*>(to) = two(T(), pair[0], pair[1]);
      }
    }
  }
}

template <class T, int kBlocks>
__global__ void __launch_bounds__(kThreads, Backward<kBlocks>::kResident)
    conv2d_bwd_kernel(const __grid_constant__ BackwardArguments call) {
  using Shape = Backward<kBlocks>;
  constexpr int kPitch = Shape::kPitch, kStages = Shape::kStages, kChannels = Shape::kChannels;
  const Conv2dCuda& head = call.head;
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  char* const shared = ampere::shared_memory();
  auto* const weight = reinterpret_cast<uint2*>(shared);
  char* const dy = shared + Shape::kWeightBytes;
  char* const x = dy + 2 * kDyBytes;
  const bool sums_wanted = call.gradients.partial != nullptr;

  const Chunk copy(call.copies, lane), store(call.stores, lane);
  Walk copied(call), tile(call);
  const auto copy_next = [&](int stage) {  // each warp its row
    if (sums_wanted && copied.is_there(call)) {
      Place place = copied.first();
      place.row += warp;
      copy_run<kUnrolled<kBlocks>>(image_of_x(head, place.image), place.row, place.column, call.copies, copy,
                                   x + stage * Shape::kStageBytes + warp * kRun * kPitch);
    }
    ampere::copies_commit();
    copied.next(call);
  };
#pragma unroll 1
  for (int i = 0; i < kStages - 1; ++i) copy_next(i);
  DyPixels ahead(call, thread);
  ahead.read(call, tile.first());
  // In the order in which lanes take them: of G's columns 4 j + c, those of the kernel's row k and the outputs c.
  for (int at = thread; at < 3 * kBlocks * 32; at += kThreads) {
    const int k = at / 32 / kBlocks, channel = at / 32 % kBlocks * 8 + at % 32 / 4;
    std::uint32_t bits[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int column = i / 2 * 8 + at % 4 * 2 + i % 2;
      bits[i] = column < 12 && column % 4 < kConv2dOutputs
                    ? weight_bits(head, column % 4, channel, 2 - k, 2 - column / 4)
                    : 0;
    }
    weight[at] = {bits[0] | bits[1] << 16, bits[2] | bits[3] << 16};
  }
  float sums[3][kBlocks][4] = {}, bias_sums[kConv2dOutputs] = {};
  ahead.write<T>(dy, bias_sums);

  // Of G a lane has a pixel of 16, the first or second 16 bytes: in the order of products with it and with its transpose.
  const auto part_of_g = [&](int pixel, int part) {
    return warp * kDyPitch + pixel % 2 * kDyCopy + (pixel / 2 + part) * 16;
  };
  const int of_g = part_of_g(lane % 16, lane / 16), of_transpose = part_of_g(lane % 8 + lane / 16 * 8, lane / 8 % 2);
  int stage = 0;
#pragma unroll 1
  for (int round = 0; tile.is_there(call); ++round) {
    ampere::copies_wait<kStages - 2>();
    __syncthreads();  // the tile is there, and nobody needs the one before it any more
    copy_next(stage == 0 ? kStages - 1 : stage - 1);
    Place place = tile.first();
    place.row += warp;
    tile.next(call);
    ahead.read(call, tile.first());
    const char* g = dy + round % 2 * kDyBytes;
    char* row_of_x = x + stage * Shape::kStageBytes + warp * kRun * kPitch;
    if (sums_wanted) {
      add_weight_gradient<T, kBlocks>(g + of_transpose, row_of_x, lane, sums);
      add_weight_gradient<T, kBlocks>(g + of_transpose + kDyHalf, row_of_x + 16 * kPitch, lane, sums);
    }
    if (call.gradients.dx != nullptr && place.row < head.height) {
      __syncwarp();  // everybody has read x
      input_gradient<T, kBlocks>(g + of_g, weight, row_of_x, lane);
      __syncwarp();
      if (call.stores.elements == 8) {
        store_run<8, kUnrolled<kBlocks>>(call, place, store, row_of_x);
      } else if (call.stores.elements == 4) {
        store_run<4, kUnrolled<kBlocks>>(call, place, store, row_of_x);
      } else if (call.stores.elements == 2) {
        store_run<2, 1>(call, place, store, row_of_x);
      } else {
        store_run<1, 1>(call, place, store, row_of_x);
      }
    }
    ahead.write<T>(dy + (round + 1) % 2 * kDyBytes, bias_sums);
    stage = stage + 1 == kStages ? 0 : stage + 1;
  }
  if (!sums_wanted) return;

  ampere::copies_wait<0>();
  __syncthreads();
  auto* const all = reinterpret_cast<float*>(x);
  auto* const all_bias = reinterpret_cast<float*>(dy);
#pragma unroll
  for (int k = 0; k < 3; ++k) {
#pragma unroll
    for (int j = 0; j < kBlocks; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int column = lane / 4 + i / 2 * 8, channel = 8 * j + lane % 4 * 2 + i % 2;
        const int tap = (2 - k) * 3 + 2 - column / 4;
        if (column < 12 && column % 4 < kConv2dOutputs) {
          all[warp * Shape::kSums + (tap * kConv2dOutputs + column % 4) * kChannels + channel] = sums[k][j][i];
        }
      }
    }
  }
#pragma unroll
  for (int c = 0; c < kConv2dOutputs; ++c) all_bias[c * kThreads + thread] = bias_sums[c];
  __syncthreads();
  float* const partial = call.gradients.partial + std::int64_t(blockIdx.x) * Shape::kPartial;
  for (int at = thread; at < Shape::kSums; at += kThreads) {
    float sum = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) sum += all[w * Shape::kSums + at];
    partial[at] = sum;
  }
  if (warp < kConv2dOutputs) {
    float* const of = all_bias + warp * kThreads;
    float sum = 0;
#pragma unroll
    for (int i = 0; i < kWarps; ++i) sum += of[32 * i + lane];
    of[lane] = sum;
    __syncwarp();
    if (lane == 0) {
      sum = 0;
#pragma unroll
      for (int i = 0; i < 32; ++i) sum += of[i];
      partial[Shape::kSums + warp] = sum;
    }
  }
}

// The sums of the blocks' sums, always in the same order, to where the gradients are wanted.
constexpr int kSumWarps = 16;

template <class T>
__global__ void __launch_bounds__(32 * kSumWarps)
    conv2d_sums_kernel(const __grid_constant__ Conv2dCuda head, const __grid_constant__ Conv2dCudaBackward gradients, int parts,
                     int channels) {
  auto* const shared = reinterpret_cast<float*>(ampere::shared_memory());
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int at = static_cast<int>(blockIdx.x) * 32 + lane, sums = kMeetings * channels, count = sums + kConv2dOutputs;
  float sum = 0;
  if (at < count) {
    const float* from = gradients.partial + at;
#pragma unroll 8
    for (int part = warp; part < parts; part += kSumWarps) sum += from[std::int64_t(part) * count];
  }
  shared[warp * 32 + lane] = sum;
  __syncthreads();
  if (warp > 0 || at >= count) return;
#pragma unroll
  for (int w = 1; w < kSumWarps; ++w) sum += shared[w * 32 + lane];
  const auto bits = static_cast<std::uint16_t>(two(T(), sum, sum));
  if (at >= sums) {
    if (gradients.dbias != nullptr && at - sums < head.outputs) {
      static_cast<std::uint16_t*>(gradients.dbias)[at - sums] = bits;
    }
    return;
  }
  const int channel = at % channels, output = at / channels % kConv2dOutputs, tap = at / channels / kConv2dOutputs;
  if (gradients.dweight == nullptr || channel >= head.channels || output >= head.outputs) return;
  const std::int64_t* strides = gradients.dweight_strides;
  static_cast<std::uint16_t*>(gradients.dweight)[output * strides[0] + channel * strides[1] + tap / 3 * strides[2] +
                                                 tap % 3 * strides[3]] = bits;
}

// ---- Launches ----

// Calls with a number of 8 channels for which there is a kernel.
template <class Call>
cudaError_t for_blocks(int channels, const Call& call) {
  if (channels <= 8) return call(std::integral_constant<int, 1>());
  if (channels <= 16) return call(std::integral_constant<int, 2>());
  if (channels <= 24) return call(std::integral_constant<int, 3>());
  if (channels <= 32) return call(std::integral_constant<int, 4>());
  if (channels <= 48) return call(std::integral_constant<int, 6>());
  return call(std::integral_constant<int, 8>());
}

template <class Kernel, class... Arguments>
cudaError_t launch(Kernel kernel, std::int64_t blocks, int threads, int shared_bytes, cudaStream_t stream,
                   const Arguments&... arguments) {
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
  if (error != cudaSuccess) return error;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = static_cast<std::size_t>(shared_bytes);
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

template <class T, int kBlocks>
cudaError_t forward(const Conv2dCuda& call, const Conv2dCudaForward& result, int device, cudaStream_t stream) {
  using Shape = Forward<kBlocks>;
  int multiprocessors = 0;
  const cudaError_t error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  if (error != cudaSuccess) return error;
  const int resident = multiprocessors * Shape::kResident;
  const ForwardArguments arguments{call, result,
                                   cut(call.batch, call.height, call.width, resident, kSegmentRows),
                                   chunks_of(call.x, call.channels, call.pixel, Shape::kPitch)};
  return launch(conv2d_fwd_kernel<T, kBlocks>, arguments.cut.blocks, kThreads, Shape::kSharedBytes, stream, arguments);
}

int tiles_of(const Conv2dCuda& call) {
  return call.batch * divide_up(call.height, kTileRows) * divide_up(call.width, kTileColumns);
}

template <int kBlocks>
cudaError_t backward_grid(const Conv2dCuda& call, int device, int& blocks) {
  int multiprocessors = 0;
  const cudaError_t error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  blocks = std::min(tiles_of(call), multiprocessors * Backward<kBlocks>::kResident);
  return error;
}

template <class T, int kBlocks>
cudaError_t backward(const Conv2dCuda& call, const Conv2dCudaBackward& gradients, int device, cudaStream_t stream) {
  using Shape = Backward<kBlocks>;
  int blocks = 0;
  cudaError_t error = backward_grid<kBlocks>(call, device, blocks);
  if (error != cudaSuccess) return error;
  const int across = divide_up(call.width, kTileColumns), down = divide_up(call.height, kTileRows);
  const BackwardArguments arguments{call,
                                    gradients,
                                    across,
                                    down,
                                    {blocks / across / down, blocks / across % down, blocks % across},
                                    chunks_of(call.x, call.channels, call.pixel, Shape::kPitch),
                                    chunks_of(gradients.dx, call.channels, gradients.dx_pixel, Shape::kPitch)};
  error = launch(conv2d_bwd_kernel<T, kBlocks>, blocks, kThreads, Shape::kSharedBytes, stream, arguments);
  if (error != cudaSuccess || gradients.partial == nullptr) return error;
  return launch(conv2d_sums_kernel<T>, divide_up(Shape::kPartial, 32), 32 * kSumWarps, 32 * kSumWarps * 4, stream, call,
                gradients, blocks, Shape::kChannels);
}

const char* message(cudaError_t error) { return error == cudaSuccess ? nullptr : cudaGetErrorString(error); }

}  // namespace

const char* conv2d_cuda_fwd(const Conv2dCuda& call, const Conv2dCudaForward& result, int device, void* stream) {
  cudaError_t error = cudaSetDevice(device);
  if (error != cudaSuccess) return message(error);
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  error = for_blocks(call.channels, [&](auto blocks) {
    return call.bfloat16 ? forward<__nv_bfloat16, decltype(blocks)::value>(call, result, device, cuda_stream)
                         : forward<__half, decltype(blocks)::value>(call, result, device, cuda_stream);
  });
  return message(error);
}

const char* conv2d_cuda_partial_floats(const Conv2dCuda& call, int device, std::int64_t& floats) {
  cudaError_t error = cudaSetDevice(device);
  if (error != cudaSuccess) return message(error);
  error = for_blocks(call.channels, [&](auto blocks) {
    int grid = 0;
    const cudaError_t result = backward_grid<decltype(blocks)::value>(call, device, grid);
    floats = std::int64_t(grid) * Backward<decltype(blocks)::value>::kPartial;
    return result;
  });
  return message(error);
}

const char* conv2d_cuda_bwd(const Conv2dCuda& call, const Conv2dCudaBackward& gradients, int device, void* stream) {
  cudaError_t error = cudaSetDevice(device);
  if (error != cudaSuccess) return message(error);
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  error = for_blocks(call.channels, [&](auto blocks) {
    return call.bfloat16 ? backward<__nv_bfloat16, decltype(blocks)::value>(call, gradients, device, cuda_stream)
                         : backward<__half, decltype(blocks)::value>(call, gradients, device, cuda_stream);
  });
  return message(error);
}

}  // namespace hflfnerv
