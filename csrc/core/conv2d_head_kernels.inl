// Included behind the Simd of one instruction set; see conv2d_head_kernels.h.
#include <cstring>

#include "colours.inl"
#include "conv2d_head_kernels.h"

namespace hflfnerv {
namespace {

using F = Simd::F;
constexpr int kLanes = Simd::kLanes;
constexpr bool kManyRegisters = kLanes == 16;  // 32 of them, where vectors of 8 lanes have 16
constexpr int kRun = kHeadTaps * kHeadColours;  // floats of dy in a row that a pixel of x meets, one after the other

// Products of n pixels, lane by lane; the pixels left of them, in each row, begin at `from`.
template <int n, class T>
inline void products(const HeadOutputRow& row, const T* const* from, F* products) {
  F sums[n][kHeadColours];
  for (int p = 0; p < n; ++p) {
    for (F& sum : sums[p]) sum = Simd::zero();
  }
  const float* weights = row.weights;
  for (std::int64_t i = 0; i < kHeadTaps; ++i) {
    weights = add_kernel_row(from[i], row.channels, row.steps, weights, sums);
  }
  for (int p = 0; p < n; ++p) {
    for (int c = 0; c < kHeadColours; ++c) products[p * kHeadColours + c] = sums[p][c];
  }
}

// y of a block of pixels from column x on.
template <class T>
inline void outputs(const HeadOutputRow& row, const T* const* from, std::int64_t x) {
  F sums[kBlockPixels * kHeadColours];
  for (int p = 0; p < kBlockPixels; p += kSharedPixels) {
    const T* here[kHeadTaps];
    for (int i = 0; i < kHeadTaps; ++i) here[i] = from[i] + p * row.channels;
    products<kSharedPixels>(row, here, sums + p * kHeadColours);
  }
  for (int c = 0; c < kHeadColours; ++c) {
    const F bias = Simd::load(row.bias + c * kLanes % kHeadColours);  // colours repeat every three lanes
    Simd::store(row.y + x * kHeadColours + c * kLanes, Simd::add(Simd::sums(sums + c * kLanes), bias));
  }
}

// That of one pixel.
template <class T>
inline void output(const HeadOutputRow& row, const T* const* from, std::int64_t x) {
  F sums[kHeadColours];
  products<1>(row, from, sums);
  for (int c = 0; c < kHeadColours; ++c) row.y[x * kHeadColours + c] = Simd::sum(sums[c]) + row.bias[c];
}

// The same for a pixel at an end of the row: zeros stand for the pixels that are not there.
template <class T>
void output_at_edge(const HeadOutputRow& row, std::int64_t x) {
  const std::int64_t begin = x > 0 ? x - 1 : 0, end = x + 2 < row.width ? x + 2 : row.width, size = row.steps * kLanes;
  const T* from[kHeadTaps];
  for (std::int64_t i = 0; i < kHeadTaps; ++i) {
    T* const copy = static_cast<T*>(row.edge) + i * size;
    std::memset(copy, 0, static_cast<std::size_t>(size) * sizeof(T));
    std::memcpy(copy + (begin + 1 - x) * row.channels, static_cast<const T*>(row.x[i]) + begin * row.channels,
                static_cast<std::size_t>((end - begin) * row.channels) * sizeof(T));
    from[i] = copy;
  }
  output(row, from, x);
}

template <class T>
void fwd_of(const HeadOutputRow& row) {
  // Vectors of pixels before this one end within the row.
  const std::int64_t rest = row.width * row.channels - row.steps * kLanes;
  const std::int64_t end = rest < 0 ? 1 : rest / row.channels + 2;
  output_at_edge<T>(row, 0);
  std::int64_t x = 1;
  const T* from[kHeadTaps];
  for (int i = 0; i < kHeadTaps; ++i) from[i] = static_cast<const T*>(row.x[i]);
  const auto advance = [&](std::int64_t pixels) {
    for (const T*& p : from) p += pixels * row.channels;
    x += pixels;
  };
  for (; x + kBlockPixels <= end; advance(kBlockPixels)) outputs(row, from, x);
  for (; x < end; advance(1)) output(row, from, x);
  for (; x < row.width; ++x) output_at_edge<T>(row, x);
}

void fwd(const HeadOutputRow& row) {
  with_type(row.type, [&](auto zero) { fwd_of<decltype(zero)>(row); });
}

// dx of n pixels from column x on, in kVectors vectors. Pixels are written in their order: what lies behind the channels of one
// is the next one's.
template <class T, int n, int kVectors>
inline void inputs(const HeadInputRow& row, std::int64_t vector, std::int64_t x) {
  F sums[n][kVectors];
  for (int p = 0; p < n; ++p) {
    for (F& sum : sums[p]) sum = Simd::zero();
  }
  const float* weights = row.weights + vector * kHeadProducts * kLanes;
  for (const float* dy : row.dy) {
    dy += x * kHeadColours;
    for (int e = 0; e < kRun; ++e, ++dy, weights += kLanes) {
      hide(dy);  // which several pixels meet
      F w[kVectors];
      for (int v = 0; v < kVectors; ++v) w[v] = Simd::load(weights + v * kHeadProducts * kLanes);
      for (int p = 0; p < n; ++p) {
        const F slope = Simd::set(dy[p * kHeadColours]);
        for (int v = 0; v < kVectors; ++v) sums[p][v] = Simd::fma(slope, w[v], sums[p][v]);
      }
    }
  }
  for (int p = 0; p < n; ++p) {
    T* const to = static_cast<T*>(row.dx) + (x + p) * row.channels;
    for (int v = 0; v < kVectors; ++v) Simd::store(to + row.first[vector + v], sums[p][v]);
  }
}

// Of all pixels; the last ones may be computed twice.
template <class T, int n, int kVectors>
inline void all_inputs(const HeadInputRow& row, std::int64_t vector) {
  if (row.width < n) {
    for (std::int64_t x = 0; x < row.width; ++x) inputs<T, 1, kVectors>(row, vector, x);
  } else {
    const std::int64_t last = row.width - n;
    for (std::int64_t x = 0; x < last; x += n) inputs<T, n, kVectors>(row, vector, x);
    inputs<T, n, kVectors>(row, vector, last);
  }
}

template <class T>
void dgrad_of(const HeadInputRow& row) {
  constexpr int n = kManyRegisters ? 12 : 6;
  std::int64_t vector = 0;
  for (; vector + 2 <= row.vectors; vector += 2) all_inputs<T, n, 2>(row, vector);
  if (vector < row.vectors) all_inputs<T, 2 * n, 1>(row, vector);
}

void dgrad(const HeadInputRow& row) {
  with_type(row.type, [&](auto zero) { dgrad_of<decltype(zero)>(row); });
}

template <class T>
void wgrad_of(const HeadInputRow& row) {
  for (std::int64_t vector = 0; vector < row.vectors; ++vector) {
    for (int i = 0; i < kHeadTaps; ++i) {
      F sums[kRun];
      for (F& sum : sums) sum = Simd::zero();
      const T* x = static_cast<const T*>(row.x) + row.first[vector];
      const float* dy = row.dy[i];
      for (std::int64_t pixel = 0; pixel < row.width; ++pixel, x += row.channels, dy += kHeadColours) {
        const F value = Simd::load(x);
        for (int e = 0; e < kRun; ++e) sums[e] = Simd::fma(value, Simd::set(dy[e]), sums[e]);
      }
      const int lanes = row.channels < kLanes ? static_cast<int>(row.channels) : kLanes;
      for (int e = 0; e < kRun; ++e) {
        Simd::store_lanes(row.sums + (i * kRun + e) * row.channels + row.first[vector], sums[e], 0, lanes);
      }
    }
  }
}

void wgrad(const HeadInputRow& row) {
  with_type(row.type, [&](auto zero) { wgrad_of<decltype(zero)>(row); });
}

}  // namespace
}  // namespace hflfnerv
