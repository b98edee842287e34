// Included behind the Simd of one instruction set; see stream_loss_kernels.h.
#include <cstring>

#include "stream_loss_kernels.h"

namespace hflfnerv {
namespace {

using F = Simd::F;
constexpr int kLanes = Simd::kLanes;

// tanh(x) = ±(1 - e) / (1 + e) with e = exp(-2 |x|), within 1e-7; NaN for a NaN.
inline F tanh(F x) {
  const F size = Simd::min(Simd::set(kTanhLimit), Simd::abs(x));  // the second of them where that is a NaN
  const F e = exp2_minus<Simd>(Simd::mul(size, Simd::set(2.8853901f)));
  const F value = Simd::div(Simd::sub(Simd::set(1), e), Simd::add(Simd::set(1), e));
  return Simd::with_sign_of(Simd::fma(size, Simd::zero(), value), x);
}

struct Values {
  F error, low, high;  // the difference of frame and target, and tanh of the images
};

template <class T, bool kBoth>
inline Values values(const T* low, const T* high, const std::uint8_t* target) {
  Values v;
  v.low = tanh(Simd::load(low));
  F frame = Simd::fma(v.low, Simd::set(0.5f), Simd::set(0.5f));
  v.high = kBoth ? tanh(Simd::load(high)) : Simd::zero();
  if (kBoth) frame = Simd::add(frame, v.high);
  v.error = Simd::sub(frame, Simd::div(Simd::load(target), Simd::set(255)));
  return v;
}

// The last values of a row, in whole vectors.
template <class T, bool kBoth>
struct Rest {
  Rest(const StreamLossRow& row, std::int64_t begin) : count(static_cast<std::size_t>(row.count - begin)) {
    std::memcpy(low, static_cast<const T*>(row.low) + begin, count * sizeof(T));
    if (kBoth) std::memcpy(high, static_cast<const T*>(row.high) + begin, count * sizeof(T));
    std::memcpy(target, row.target + begin, count);
  }
  T low[kLanes] = {}, high[kLanes] = {};
  std::uint8_t target[kLanes] = {};
  std::size_t count;
};

template <class T, bool kBoth>
double fwd_of(const StreamLossRow& row) {
  constexpr std::int64_t kPiece = 16 * kLanes;  // that is summed in float32
  const T* const low = static_cast<const T*>(row.low);
  const T* const high = static_cast<const T*>(row.high);
  const std::int64_t whole = row.count / kLanes * kLanes;
  double total = 0;
  const auto add = [&](F sum, std::int64_t lanes) {
    float squares[kLanes];
    Simd::store(squares, sum);
    for (std::int64_t i = 0; i < lanes; ++i) total += static_cast<double>(squares[i]);
  };
  for (std::int64_t piece = 0; piece < whole; piece += kPiece) {
    const std::int64_t end = piece + kPiece < whole ? piece + kPiece : whole;
    F sum = Simd::zero();
    for (std::int64_t i = piece; i < end; i += kLanes) {
      const F error = values<T, kBoth>(low + i, kBoth ? high + i : nullptr, row.target + i).error;
      sum = Simd::fma(error, error, sum);
    }
    add(sum, kLanes);
  }
  if (whole < row.count) {
    const Rest<T, kBoth> rest(row, whole);
    const F error = values<T, kBoth>(rest.low, rest.high, rest.target).error;
    add(Simd::mul(error, error), static_cast<std::int64_t>(rest.count));
  }
  return total;
}

template <class T, bool kBoth>
inline void gradients(const Values& v, F scale, T* dlow, T* dhigh) {
  const F slope = Simd::mul(v.error, scale), one = Simd::set(1);
  Simd::store(dlow, Simd::mul(Simd::mul(slope, Simd::set(0.5f)), Simd::sub(one, Simd::mul(v.low, v.low))));
  if (kBoth) Simd::store(dhigh, Simd::mul(slope, Simd::sub(one, Simd::mul(v.high, v.high))));
}

template <class T, bool kBoth>
void bwd_of(const StreamLossRow& row) {
  const T* const low = static_cast<const T*>(row.low);
  const T* const high = static_cast<const T*>(row.high);
  T* const dlow = static_cast<T*>(row.dlow);
  T* const dhigh = static_cast<T*>(row.dhigh);
  const F scale = Simd::set(row.scale);
  const std::int64_t whole = row.count / kLanes * kLanes;
  for (std::int64_t i = 0; i < whole; i += kLanes) {
    const Values v = values<T, kBoth>(low + i, kBoth ? high + i : nullptr, row.target + i);
    gradients<T, kBoth>(v, scale, dlow + i, kBoth ? dhigh + i : nullptr);
  }
  if (whole < row.count) {
    const Rest<T, kBoth> rest(row, whole);
    T low_end[kLanes], high_end[kLanes];
    gradients<T, kBoth>(values<T, kBoth>(rest.low, rest.high, rest.target), scale, low_end, high_end);
    std::memcpy(dlow + whole, low_end, rest.count * sizeof(T));
    if (kBoth) std::memcpy(dhigh + whole, high_end, rest.count * sizeof(T));
  }
}

template <bool kBoth>
double fwd_for(const StreamLossRow& row) {
  if (row.type == FloatType::f16) return fwd_of<Half, kBoth>(row);
  return row.type == FloatType::bf16 ? fwd_of<BFloat16, kBoth>(row) : fwd_of<float, kBoth>(row);
}

template <bool kBoth>
void bwd_for(const StreamLossRow& row) {
  if (row.type == FloatType::f16) return bwd_of<Half, kBoth>(row);
  return row.type == FloatType::bf16 ? bwd_of<BFloat16, kBoth>(row) : bwd_of<float, kBoth>(row);
}

double fwd(const StreamLossRow& row) { return row.high != nullptr ? fwd_for<true>(row) : fwd_for<false>(row); }
void bwd(const StreamLossRow& row) { row.high != nullptr ? bwd_for<true>(row) : bwd_for<false>(row); }

}  // namespace
}  // namespace hflfnerv
