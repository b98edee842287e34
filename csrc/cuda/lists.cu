// Operations on the tensors of a list, all in one kernel.
//
// PyTorch's kernels for lists give a block 65536 elements, which for the weights of a network of a million occupies a tenth of
// a device. Here it has 2048. Where the tensors lie is an argument of the launch, so that nothing is copied before it.
#include "cuda/lists.h"

#include <cuda_runtime.h>

#include "cuda/ampere.h"
#include "cuda/pairs.h"

namespace hflfnerv {

namespace {

constexpr int kThreads = 256, kEach = 8, kBlockElements = kThreads * kEach;

struct Task {
  const void* a;
  void* b;
  void* c;
  float factor;
  int elements, first_block;
};

struct Tasks {
  int count;
  Task task[kMostTensors];
};

struct Float {};  // the type of elements that are read and written as they are

template <class T>
__device__ float read(const void* values, int i) {
  return to_float<T>(static_cast<const std::uint16_t*>(values)[i]);
}
template <>
__device__ inline float read<Float>(const void* values, int i) {
  return static_cast<const float*>(values)[i];
}

template <class T>
__device__ void write(void* values, int i, float value) {
  static_cast<std::uint16_t*>(values)[i] = static_cast<std::uint16_t>(two(T(), value, 0.0f));
}
template <>
__device__ inline void write<Float>(void* values, int i, float value) {
  static_cast<float*>(values)[i] = value;
}

// What an operation reads of an element, before anything is written: then the next ones can be read meanwhile.
struct Values {
  float a, b;
};

template <class From, class To>
struct Cast {
  __device__ Values load(const Task& task, int i) const { return {read<From>(task.a, i), 0.0f}; }
  __device__ void store(const Task& task, int i, Values values) const { write<To>(task.b, i, values.a); }
};

// a (1 - weight) + b weight, exact at both ends.
__device__ inline float mix(float a, float b, float weight) {
  return weight < 0.5f ? a + weight * (b - a) : b - (b - a) * (1.0f - weight);
}

struct Momentum {
  float mu;

  __device__ Values load(const Task& task, int i) const { return {read<Float>(task.a, i), read<Float>(task.b, i)}; }
  __device__ void store(const Task& task, int i, Values values) const {
    const float average = mix(values.b, values.a, 1.0f - mu);
    write<Float>(task.b, i, average);
    write<Float>(task.c, i, mix(values.a, average, mu));
  }
};

struct Subtract {
  const float* rate;
  float decay;

  __device__ Values load(const Task& task, int i) const { return {read<Float>(task.a, i), read<Float>(task.b, i)}; }
  __device__ void store(const Task& task, int i, Values values) const {
    write<Float>(task.b, i, values.b - *rate * (task.factor * values.a + decay * values.b));
  }
};

template <class Operation>
__global__ void __launch_bounds__(kThreads) list_kernel(const __grid_constant__ Tasks tasks, const Operation operation) {
  const int block = static_cast<int>(blockIdx.x);
  int low = 0, high = tasks.count;  // the block's task is one of low to high - 1
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (block < tasks.task[middle].first_block) {
      high = middle;
    } else {
      low = middle;
    }
  }
  const Task& task = tasks.task[low];
  const int first = (block - task.first_block) * kBlockElements + static_cast<int>(threadIdx.x);
  Values values[kEach];
#pragma unroll
  for (int k = 0; k < kEach; ++k) {
    if (first + k * kThreads < task.elements) values[k] = operation.load(task, first + k * kThreads);
  }
#pragma unroll
  for (int k = 0; k < kEach; ++k) {
    if (first + k * kThreads < task.elements) operation.store(task, first + k * kThreads, values[k]);
  }
}

template <class Operation>
const char* run(const TensorList& list, const Operation& operation, int device, void* stream) {
  Tasks tasks{};
  tasks.count = list.count;
  int blocks = 0;
  for (int i = 0; i < list.count; ++i) {
    const ListEntry& entry = list.entry[i];
    tasks.task[i] = {entry.a, entry.b, entry.c, entry.factor, static_cast<int>(entry.elements), blocks};
    blocks += static_cast<int>((entry.elements + kBlockElements - 1) / kBlockElements);
  }
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(kThreads);
  config.stream = static_cast<cudaStream_t>(stream);
  cudaError_t error = cudaSetDevice(device);
  if (error == cudaSuccess) error = cudaLaunchKernelEx(&config, list_kernel<Operation>, tasks, operation);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

template <class From>
const char* cast_to(const TensorList& list, ListType to, int device, void* stream) {
  switch (to) {
    case ListType::float16:
      return run(list, Cast<From, __half>(), device, stream);
    case ListType::bfloat16:
      return run(list, Cast<From, __nv_bfloat16>(), device, stream);
    default:
      return run(list, Cast<From, Float>(), device, stream);
  }
}

}  // namespace

const char* list_cast(const TensorList& list, ListType from, ListType to, int device, void* stream) {
  switch (from) {
    case ListType::float16:
      return cast_to<__half>(list, to, device, stream);
    case ListType::bfloat16:
      return cast_to<__nv_bfloat16>(list, to, device, stream);
    default:
      return cast_to<Float>(list, to, device, stream);
  }
}

const char* list_momentum(const TensorList& list, float mu, int device, void* stream) {
  return run(list, Momentum{mu}, device, stream);
}

const char* list_subtract(const TensorList& list, const float* rate, float decay, int device, void* stream) {
  return run(list, Subtract{rate, decay}, device, stream);
}

}  // namespace hflfnerv
