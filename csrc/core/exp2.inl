// Included by the vectors of each instruction set; see simd_avx512.h.
#pragma once

#include "gelu_table.h"

namespace hflfnerv {
namespace {

// 2^-s for 0 <= s < 126, to 1e-7 of its value, in the vectors V.
template <class V>
inline __attribute__((always_inline)) typename V::F exp2_minus(typename V::F s) {
  const auto rounded = V::sub(V::set(kGeluRound), s);
  const auto f = V::sub(V::sub(V::set(kGeluRound), rounded), s);  // in [-1/2, 1/2]; both differences are exact
  auto value = V::fma(V::set(1.3264664e-3f), f, V::set(9.6715121e-3f));
  value = V::fma(value, f, V::set(5.5507340e-2f));
  value = V::fma(value, f, V::set(2.4022242e-1f));
  value = V::fma(value, f, V::set(6.9314700e-1f));
  value = V::fma(value, f, V::set(1));
  return V::add_exponent(value, rounded);
}

}  // namespace
}  // namespace hflfnerv
