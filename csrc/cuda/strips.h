// What kernels of heads share: moves of channels-last pixels between memory and shared memory, and going down strips of columns.
//
// A block goes down a strip of x, 64 pixels wide, and each warp has eight columns of it. A row of pixels is multiplied for the
// three rows of y that it meets, whose sums stay in registers until their last row of x has come: 9 of a product's 16 rows, one
// for each column of the kernel and output. What is complete lies in shared memory for a moment, where an output pixel adds up
// its left neighbour's, its own and its right neighbour's.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cuda/ampere.h"

namespace hflfnerv {
namespace strips {

constexpr int kWarps = 8, kThreads = 32 * kWarps;
constexpr int kOutputs = 3;  // the most

// ---- Runs of pixels ----

constexpr int kRun = 32;  // neighbouring pixels of a row, which a warp moves together

inline int divide_up(int value, int by) { return (value + by - 1) / by; }

// A run's chunks of channels, of which each lane has as many as a pixel, every 32nd. A lane's next one is some pixels and
// chunks on, and if it would be behind its pixel's last one, a pixel on and as many chunks back.
struct Chunks {
  int elements;             // that are moved at once
  int per_pixel;            // chunks
  int apart, shared_apart;  // pixels, in memory in elements, in shared memory in bytes
  int pixels_on, chunks_on;
  // What is added to a place for the next one, and where a pixel further.
  int on, carry, shared_on, shared_carry;
};

// As large as pixels that are `apart` allow.
inline Chunks chunks_of(const void* pointer, int channels, int apart, int shared_apart) {
  Chunks chunks{};
  chunks.elements = 8;
  while (apart % chunks.elements != 0 || reinterpret_cast<std::uintptr_t>(pointer) % (2 * chunks.elements) != 0) {
    chunks.elements /= 2;
  }
  chunks.per_pixel = divide_up(channels, chunks.elements);
  chunks.apart = apart;
  chunks.shared_apart = shared_apart;
  chunks.pixels_on = kRun / chunks.per_pixel;
  chunks.chunks_on = kRun % chunks.per_pixel;
  chunks.on = chunks.pixels_on * apart + chunks.chunks_on * chunks.elements;
  chunks.carry = apart - chunks.per_pixel * chunks.elements;
  chunks.shared_on = chunks.pixels_on * shared_apart + chunks.chunks_on * chunks.elements * 2;
  chunks.shared_carry = shared_apart - chunks.per_pixel * chunks.elements * 2;
  return chunks;
}

// A lane's first one.
struct Chunk {
  int pixel, index;

  __device__ Chunk(const Chunks& chunks, int lane) : pixel(lane / chunks.per_pixel), index(lane % chunks.per_pixel) {}
};

// Calls with each chunk's pixel in the run, and with its place in memory, in elements, and in shared memory, in bytes.
template <int kChunk, int kUnrolled, class Move>
__device__ void for_chunks(const Chunks& chunks, Chunk at, const Move& move) {
  int from = at.pixel * chunks.apart + at.index * kChunk, to = at.pixel * chunks.shared_apart + at.index * kChunk * 2;
#pragma unroll(kUnrolled)
  for (int i = 0; i < chunks.per_pixel; ++i) {
    move(at.pixel, from, to);
    at.pixel += chunks.pixels_on, at.index += chunks.chunks_on;
    from += chunks.on, to += chunks.shared_on;
    if (at.index >= chunks.per_pixel) {
      at.index -= chunks.per_pixel, ++at.pixel;
      from += chunks.carry, to += chunks.shared_carry;
    }
  }
}

// An image's memory and size.
struct Image {
  const std::uint16_t* first;
  int rows, columns;
};

__device__ inline bool inside(int index, int size) { return static_cast<unsigned>(index) < static_cast<unsigned>(size); }

template <int kChunk, int kUnrolled>
__device__ void copy_run_of(const Image& image, int row, int column, const Chunks& chunks, const Chunk& of_lane, char* to) {
  const std::uint16_t* x = image.first + std::int64_t(row * image.columns + column) * chunks.apart;
  const bool row_is_there = inside(row, image.rows);
  for_chunks<kChunk, kUnrolled>(chunks, of_lane, [&](int pixel, int from, int at) {
    const bool there = row_is_there && inside(column + pixel, image.columns);
    if constexpr (kChunk == 1) {
      *reinterpret_cast<std::uint16_t*>(to + at) = there ? x[from] : std::uint16_t{0};
    } else {
      ampere::copy_async<2 * kChunk>(to + at, x + from, there);
    }
  });
}

// Copies a run, zeros outside of the image. Channels behind the last chunk stay as they were.
template <int kUnrolled>
__device__ void copy_run(const Image& image, int row, int column, const Chunks& chunks, const Chunk& of_lane, char* to) {
  if (chunks.elements == 8) {
    copy_run_of<8, kUnrolled>(image, row, column, chunks, of_lane, to);
  } else if (chunks.elements == 4) {
    copy_run_of<4, kUnrolled>(image, row, column, chunks, of_lane, to);
  } else if (chunks.elements == 2) {
    copy_run_of<2, 1>(image, row, column, chunks, of_lane, to);
  } else {
    copy_run_of<1, 1>(image, row, column, chunks, of_lane, to);
  }
}

// ---- Strips ----

constexpr int kStripColumns = 8 * kWarps, kStripOutputs = kStripColumns - 2;
constexpr int kStepRows = 4, kStepPixels = kStepRows * kStripColumns;  // of x
static_assert(kThreads == kStepPixels, "a thread has a pixel of a step's y, a warp copies a run of its x");
constexpr int kShares = 3 * kOutputs;           // of a pixel in its row's outputs
constexpr int kSharePitch = kStripColumns + 8;  // four rows of pairs of floats lie in different banks
constexpr int kStepShares = kStepRows * kShares * kSharePitch;

// Bytes from pixel to pixel in shared memory: eight pixels lie in different banks.
constexpr int pixel_pitch(int channels) { return 16 * ((channels + 7) / 8 | 1); }

// Strips are cut into segments, each for a block.
struct Cut {
  int strips, segments, rows;  // of the image; rows of a segment
  std::int64_t blocks;
};

// As many as leave the busiest multiprocessor with the fewest rows, of which a segment reads two more, and the time of some more
// goes into its beginning and end. `resident` blocks run at a time.
inline Cut cut(int batch, int height, int width, int resident, int more_rows) {
  constexpr int kMostSegments = 64;
  Cut best{divide_up(width, kStripOutputs), 0, 0, 0};
  std::int64_t least = INT64_MAX;
  for (int segments = 1; segments <= std::min(height, kMostSegments); ++segments) {
    const int rows = divide_up(height, segments), count = divide_up(height, rows);
    const std::int64_t blocks = std::int64_t(batch) * best.strips * count;
    const std::int64_t cost = ((blocks - 1) / resident + 1) * (rows + more_rows);
    if (cost < least) least = cost, best.rows = rows, best.segments = count, best.blocks = blocks;
  }
  return best;
}

// A block's segment.
struct Segment {
  int image, first, rows, column, steps;

  __device__ Segment(const Cut& cut, int height) {
    const int block = static_cast<int>(blockIdx.x);
    image = block / cut.strips / cut.segments;
    column = block % cut.strips * kStripOutputs;
    first = block / cut.strips % cut.segments * cut.rows;
    rows = min(cut.rows, height - first);
    steps = (rows + 2 + kStepRows - 1) / kStepRows;
  }
};

// Which of channels `channel` and the next one there are, as bits of a register that holds both.
__device__ inline std::uint32_t two_of(int channel, int channels) {
  return (channel < channels ? 0xffffu : 0u) | (channel + 1 < channels ? 0xffff0000u : 0u);
}

// Where a lane's sums of a row go, of eight columns from `column` on.
__device__ inline int share_of(int column, int lane) { return lane / 4 * kSharePitch + column + lane % 4 * 2; }

__device__ inline void store_shares(float* to, int lane, const float (&sums)[4]) {
  *reinterpret_cast<float2*>(to) = {sums[0], sums[1]};
  if (lane < 4) *reinterpret_cast<float2*>(to + 8 * kSharePitch) = {sums[2], sums[3]};
}

// Adds the three shares of an output pixel, whose row's shares of its column begin at `from`.
__device__ inline void add_shares(const float* from, float (&sums)[kOutputs]) {
#pragma unroll
  for (int n = 0; n < kOutputs; ++n) {
#pragma unroll
    for (int t = 0; t < 3; ++t) sums[n] += from[(kOutputs * t + n) * kSharePitch + t];
  }
}

}  // namespace strips
}  // namespace hflfnerv
