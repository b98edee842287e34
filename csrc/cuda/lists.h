// Operations on the tensors of a list, all in one kernel: the weights of a network, which are many and small.
#pragma once

#include <cstdint>

namespace hflfnerv {

constexpr int kMostTensors = 64;  // of one call

enum class ListType { float32, float16, bfloat16 };

// What elements a, b and c of as many values each are depends on the operation; float32, but for those of a cast.
struct ListEntry {
  const void* a;
  void* b;
  void* c;
  float factor;
  std::int64_t elements;  // from 1 to 2^31 - 1
};

struct TensorList {
  int count;  // at least 1
  ListEntry entry[kMostTensors];
};

// b = a, rounded to its type.
const char* list_cast(const TensorList& list, ListType from, ListType to, int device, void* stream);
// With the gradient a, the momentum b and its factor mu: b <- mu b + (1 - mu) a, c = (1 - mu) a + mu b.
const char* list_momentum(const TensorList& list, float mu, int device, void* stream);
// b <- (1 - rate decay) b - rate factor a, the rate on the device.
const char* list_subtract(const TensorList& list, const float* rate, float decay, int device, void* stream);
// Each returns null, or what went wrong in words. The device becomes the current one.

}  // namespace hflfnerv
