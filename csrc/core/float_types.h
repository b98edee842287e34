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

}  // namespace hflfnerv
