// The loops of the output stage in float32. Lanes are the inner elements of a kernel row, which lie one after the other in
// memory, and are added up at the end. Included behind the Simd of one instruction set.
#include <cstring>

#include "colours.inl"

namespace hflfnerv {
namespace {

using F = Simd::F;
constexpr int L = Simd::kLanes;
constexpr int kSums = kBlockPixels * kColours;

class Worker {
 public:
  explicit Worker(const OutputRows& rows) : rows_(rows), tanh_(*rows.table) {}

  void run() const {
    for (std::int64_t y = rows_.begin; y < rows_.end; ++y) {
      for (std::int64_t x = 0; x < rows_.width; x += kBlockPixels) block(y, x);
    }
  }

 private:
  void block(std::int64_t y, std::int64_t x) const {
    F values[kColours];
    for (F& value : values) value = Simd::set(rows_.offset);
    int stream = 0;
    for (int group = 0; group < rows_.groups; ++group) {
      const int first = stream;
      while (stream < rows_.count && rows_.streams[stream].group == group) ++stream;
      F sums[kSums];
      for (int p = 0; p < kBlockPixels; p += kSharedPixels) products(first, stream, y, x + p, sums + p * kColours);
      for (int v = 0; v < kColours; ++v) {
        // Colours repeat every three lanes: the bias of lane v L is that of lane v L mod 3.
        const F bias = Simd::load(rows_.biases + group * kBiasLanes + v * L % kColours);
        values[v] = Simd::fma(Simd::set(rows_.scales[group]), tanh_(Simd::add(Simd::sums(sums + v * L), bias)), values[v]);
      }
    }
    const std::int64_t left = rows_.width - x;
    store((y * rows_.out_width + x) * kColours, values, static_cast<int>((left < kBlockPixels ? left : kBlockPixels) * kColours));
  }

  // The products of kSharedPixels pixels from x on, summed over streams [first, last) and lane by lane.
  void products(int first, int last, std::int64_t y, std::int64_t x, F* sums) const {
    F s[kSharedPixels][kColours];
    for (int p = 0; p < kSharedPixels; ++p) {
      for (F& sum : s[p]) sum = Simd::zero();
    }
    for (int i = first; i < last; ++i) add(rows_.streams[i], y, x, s);
    for (int p = 0; p < kSharedPixels; ++p) {
      for (int c = 0; c < kColours; ++c) sums[p * kColours + c] = s[p][c];
    }
  }

  static inline __attribute__((always_inline)) void add(const OutputStream& stream, std::int64_t y, std::int64_t x,
                                                        F (&s)[kSharedPixels][kColours]) {
    const float* weights = static_cast<const float*>(stream.weights);
    for (std::int64_t ky = 0; ky < kTaps; ++ky) {
      const std::int64_t row = y + ky - 1;
      const bool inside = row >= stream.top && row < stream.height;
      const float* from = static_cast<const float*>(inside ? stream.x : stream.zeros);
      if (inside) from += row % stream.ring * stream.row;
      weights = add_kernel_row(from + x * stream.pixel, stream.pixel, stream.steps, weights, s);
    }
  }

  void store(std::int64_t at, const F* values, int n) const {
    if (rows_.bytes) {
      std::uint8_t levels[kSums];
      for (int v = 0; v < kColours; ++v) {
        const F unit = Simd::min(Simd::max(values[v], Simd::zero()), Simd::set(1));
        Simd::store_rounded(levels + v * L, Simd::mul(unit, Simd::set(255)));
      }
      std::memcpy(static_cast<std::uint8_t*>(rows_.out) + at, levels, static_cast<std::size_t>(n));
    } else {
      float floats[kSums];
      for (int v = 0; v < kColours; ++v) Simd::store(floats + v * L, values[v]);
      std::memcpy(static_cast<float*>(rows_.out) + at, floats, static_cast<std::size_t>(n) * sizeof(float));
    }
  }

  const OutputRows& rows_;
  const Simd::Tanh tanh_;
};

}  // namespace
}  // namespace hflfnerv
