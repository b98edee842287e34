// Included behind the Simd of one instruction set; see convert_kernels.h.
#include "convert_kernels.h"
#include "partial.inl"

namespace hflfnerv {
namespace {

template <class From, class To>
inline void convert(const From* from, std::int64_t count, To* to) {
  const std::int64_t whole = count / Simd::kLanes * Simd::kLanes;
  for (std::int64_t i = 0; i < whole; i += Simd::kLanes) Simd::store(to + i, Simd::load(from + i));
  if (whole < count) store_some(to + whole, load_some(from + whole, count - whole), count - whole);
}

void to_floats(FloatType type, const void* from, std::int64_t count, float* to) {
  with_type(type, [&](auto zero) { convert(static_cast<const decltype(zero)*>(from), count, to); });
}

void from_floats(FloatType type, const float* from, std::int64_t count, void* to) {
  with_type(type, [&](auto zero) { convert(from, count, static_cast<decltype(zero)*>(to)); });
}

}  // namespace
}  // namespace hflfnerv
