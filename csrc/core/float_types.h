// The element types of tensors. Half and BFloat16 only hold bits; the vector code converts them.
#pragma once

#include <cstdint>

namespace hflfnerv {

enum class FloatType { f32, f16, bf16 };

struct Half {
  std::uint16_t bits;
};

struct BFloat16 {
  std::uint16_t bits;
};

constexpr int size_bytes(FloatType type) { return type == FloatType::f32 ? 4 : 2; }

// run(zero), with a zero of the type.
template <class Run>
void with_type(FloatType type, const Run& run) {
  switch (type) {
    case FloatType::f32: return run(float{});
    case FloatType::f16: return run(Half{});
    case FloatType::bf16: return run(BFloat16{});
  }
}

}  // namespace hflfnerv
