// The loops of the output stage in float32 where vectors have lanes for the colours of several pixels: the including file
// defines Simd.
#include "output_stage_kernels.h"

namespace hflfnerv {
namespace {

using F = Simd::F;
constexpr int L = Simd::kLanes;
constexpr int kPixels = L / kColours;
constexpr int kVectors = 8;  // that share a load of weights

class Worker {
 public:
  explicit Worker(const OutputRows& rows) : rows_(rows), tanh_(*rows.table) {}

  void run() {
    for (std::int64_t y = rows_.begin; y < rows_.end; ++y) {
      for (std::int64_t x = 0; x < rows_.width; x += kVectors * kPixels) block(y, x);
    }
  }

 private:
  void block(std::int64_t y, std::int64_t x) {
    F sums[kVectors], values[kVectors];
    for (F& value : values) value = Simd::set(rows_.offset);
    int stream = 0;
    for (int group = 0; group < rows_.groups; ++group) {
      for (F& sum : sums) sum = Simd::load(rows_.biases + group * kTile);
      for (; stream < rows_.count && rows_.streams[stream].group == group; ++stream) add(rows_.streams[stream], y, x, sums);
      for (int v = 0; v < kVectors; ++v) values[v] = Simd::fma(Simd::set(rows_.scales[group]), tanh_(sums[v]), values[v]);
    }
    for (int v = 0; v < kVectors; ++v) {
      const std::int64_t first = x + v * kPixels;
      std::int64_t n = rows_.width - first;
      if (n <= 0) break;
      store((y * rows_.width + first) * kColours, values[v], static_cast<int>((n < kPixels ? n : kPixels) * kColours));
    }
  }

  static void add(const OutputStream& stream, std::int64_t y, std::int64_t x, F* sums) {
    const float* weights = static_cast<const float*>(stream.weights);
    const std::int64_t vector = kPixels * stream.pixel;
    for (std::int64_t ky = 0; ky < kTaps; ++ky) {
      const std::int64_t row = y + ky - 1;
      const bool inside = row >= stream.top && row < stream.height;
      const float* from = static_cast<const float*>(inside ? stream.x : stream.zeros);
      if (inside) from += row % stream.ring * stream.row;
      from += x * stream.pixel;
      F s[kVectors];
      for (int v = 0; v < kVectors; ++v) s[v] = sums[v];
      for (std::int64_t k = 0; k < stream.steps; ++k, weights += L) {
        const F w = Simd::load(weights);
        for (int v = 0; v < kVectors; ++v) s[v] = Simd::fma(Simd::set(from[v * vector + k]), w, s[v]);
      }
      for (int v = 0; v < kVectors; ++v) sums[v] = s[v];
    }
  }

  void store(std::int64_t at, F value, int n) {
    if (rows_.bytes) {
      int levels[L];
      const F unit = Simd::min(Simd::max(value, Simd::zero()), Simd::set(1));
      Simd::store_rounded(levels, Simd::mul(unit, Simd::set(255)));
      for (int i = 0; i < n; ++i) static_cast<std::uint8_t*>(rows_.out)[at + i] = static_cast<std::uint8_t>(levels[i]);
    } else {
      float values[L];
      Simd::store(values, value);
      for (int i = 0; i < n; ++i) static_cast<float*>(rows_.out)[at + i] = values[i];
    }
  }

  const OutputRows& rows_;
  const Simd::Tanh tanh_;
};

}  // namespace
}  // namespace hflfnerv
