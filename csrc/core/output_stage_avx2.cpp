// The output stage in float32 for AVX2. Lanes are the inner elements of a kernel row, which lie one after the other in
// memory. With colours as lanes, as in output_stage_kernels.inl, a vector would be two pixels: two of its lanes idle, and a
// quarter of the matrix zeros.
#include "output_stage_kernels.h"
#include "simd_avx2.h"

namespace hflfnerv {
namespace {

using F = Simd::F;
constexpr int L = Simd::kLanes;
constexpr int kShared = 4;  // pixels that share a load of weights
constexpr int kPixels = L;  // of a block: the colours of eight pixels fill three vectors
constexpr int kSums = kPixels * kColours;

// The sums of eight vectors, in their order.
inline F sums_of(const F* v) {
  const F low = _mm256_hadd_ps(_mm256_hadd_ps(v[0], v[1]), _mm256_hadd_ps(v[2], v[3]));
  const F high = _mm256_hadd_ps(_mm256_hadd_ps(v[4], v[5]), _mm256_hadd_ps(v[6], v[7]));
  return Simd::add(_mm256_permute2f128_ps(low, high, 0x20), _mm256_permute2f128_ps(low, high, 0x31));
}

// Adds the products of kShared pixels from x on, lane by lane.
inline void add(const OutputStream& stream, std::int64_t y, std::int64_t x, F* sums) {
  F s[kShared][kColours];
  for (int p = 0; p < kShared; ++p) {
    for (int c = 0; c < kColours; ++c) s[p][c] = sums[p * kColours + c];
  }
  const float* weights = static_cast<const float*>(stream.weights);
  for (std::int64_t ky = 0; ky < kTaps; ++ky) {
    const std::int64_t row = y + ky - 1;
    const bool inside = row >= stream.top && row < stream.height;
    const float* from = static_cast<const float*>(inside ? stream.x : stream.zeros);
    if (inside) from += row % stream.ring * stream.row;
    from += x * stream.pixel;
    for (std::int64_t k = 0; k < stream.steps; ++k, from += L, weights += kColours * L) {
      F w[kColours];
      for (int c = 0; c < kColours; ++c) w[c] = Simd::load(weights + c * L);
      for (int p = 0; p < kShared; ++p) {
        const F value = Simd::load(from + p * stream.pixel);
        for (int c = 0; c < kColours; ++c) s[p][c] = Simd::fma(value, w[c], s[p][c]);
      }
    }
  }
  for (int p = 0; p < kShared; ++p) {
    for (int c = 0; c < kColours; ++c) sums[p * kColours + c] = s[p][c];
  }
}

void store(const OutputRows& rows, std::int64_t at, const F* values, int n) {
  if (rows.bytes) {
    alignas(32) int levels[kSums];
    for (int v = 0; v < kColours; ++v) {
      const F unit = Simd::min(Simd::max(values[v], Simd::zero()), Simd::set(1));
      Simd::store_rounded(levels + v * L, Simd::mul(unit, Simd::set(255)));
    }
    for (int i = 0; i < n; ++i) static_cast<std::uint8_t*>(rows.out)[at + i] = static_cast<std::uint8_t>(levels[i]);
  } else {
    alignas(32) float floats[kSums];
    for (int v = 0; v < kColours; ++v) Simd::store(floats + v * L, values[v]);
    for (int i = 0; i < n; ++i) static_cast<float*>(rows.out)[at + i] = floats[i];
  }
}

void block(const OutputRows& rows, const Simd::Tanh& tanh, std::int64_t y, std::int64_t x) {
  F values[kColours];
  for (F& value : values) value = Simd::set(rows.offset);
  int stream = 0;
  for (int group = 0; group < rows.groups; ++group) {
    F sums[kSums];
    for (F& sum : sums) sum = Simd::zero();
    for (; stream < rows.count && rows.streams[stream].group == group; ++stream) {
      for (int p = 0; p < kPixels; p += kShared) add(rows.streams[stream], y, x + p, sums + p * kColours);
    }
    for (int v = 0; v < kColours; ++v) {
      // Colours repeat every three lanes: the bias of lane v L is that of lane v L mod 3.
      const F bias = Simd::load(rows.biases + group * kTile + v * L % kColours);
      values[v] = Simd::fma(Simd::set(rows.scales[group]), tanh(Simd::add(sums_of(sums + v * L), bias)), values[v]);
    }
  }
  const std::int64_t left = rows.width - x;
  store(rows, (y * rows.width + x) * kColours, values, static_cast<int>((left < kPixels ? left : kPixels) * kColours));
}

}  // namespace

void output_rows_avx2(const OutputRows& rows) {
  const Simd::Tanh tanh(*rows.table);
  for (std::int64_t y = rows.begin; y < rows.end; ++y) {
    for (std::int64_t x = 0; x < rows.width; x += kPixels) block(rows, tanh, y, x);
  }
}

}  // namespace hflfnerv
