// As much of CUDA as csrc/cuda needs to be compiled by a C++ compiler and run by threads of the processor: a block's threads
// are threads, which take one block after the other. Stands in for the header of this name, and for cuda/hopper.h.
#pragma once

#include <algorithm>
#include <cmath>
#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <mutex>
#include <thread>
#include <vector>

#define __CUDA_ARCH_FEAT_SM90_ALL 1
#define __global__
#define __device__
#define __host__
#define __grid_constant__
#define __launch_bounds__(...)

struct dim3 {
  unsigned x;
  dim3(unsigned x_ = 1) : x(x_) {}
};
struct alignas(16) uint4 {
  std::uint32_t x, y, z, w;
};
struct alignas(8) uint2 {
  std::uint32_t x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
using std::min;

namespace emulation {

constexpr int kSharedBytes = 232448;  // that a block may have on Hopper
inline int multiprocessors = 4;

// Waits of threads for each other: everyone who arrives goes on when `count` have.
class Meeting {
 public:
  explicit Meeting(int count) : count_(count) {}
  void wait() {
    std::unique_lock<std::mutex> lock(mutex_);
    const int round = round_;
    if (++arrived_ == count_) {
      arrived_ = 0;
      ++round_;
      condition_.notify_all();
    } else {
      condition_.wait(lock, [&] { return round_ != round; });
    }
  }

 private:
  std::mutex mutex_;
  std::condition_variable condition_;
  int count_, arrived_ = 0, round_ = 0;
};

inline Meeting* block_meeting = nullptr;
void begin_block();  // of shared memory

}  // namespace emulation

inline thread_local dim3 threadIdx, blockIdx, blockDim, gridDim;
inline void __syncthreads() { emulation::block_meeting->wait(); }
void __syncwarp();
inline int __shfl_sync(unsigned, int value, int) { return value; }  // for values on which the warp agrees

using cudaStream_t = struct CUstream_st*;
enum cudaError_t { cudaSuccess };
enum { cudaDevAttrMultiProcessorCount, cudaDevAttrMaxSharedMemoryPerBlockOptin, cudaEnableDefault };
enum { cudaFuncAttributeMaxDynamicSharedMemorySize };
enum cudaDriverEntryPointQueryResult { cudaDriverEntryPointSuccess };
enum { cudaLaunchAttributeProgrammaticStreamSerialization };
struct cudaLaunchAttribute {
  int id;
  struct {
    int programmaticStreamSerializationAllowed;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  std::size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

inline const char* cudaGetErrorString(cudaError_t) { return "an error"; }
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, int which, int) {
  *value = which == cudaDevAttrMultiProcessorCount ? emulation::multiprocessors : emulation::kSharedBytes;
  return cudaSuccess;
}
template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel, int, int) {
  return cudaSuccess;
}

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...), Arguments&&... arguments) {
  const int count = static_cast<int>(config->blockDim.x);
  if (config->dynamicSmemBytes == 0) {  // threads without shared memory do not meet, so they may come one after the other
    blockDim = config->blockDim;
    gridDim = config->gridDim;
    for (blockIdx.x = 0; blockIdx.x < gridDim.x; ++blockIdx.x) {
      for (threadIdx.x = 0; threadIdx.x < blockDim.x; ++threadIdx.x) kernel(arguments...);
    }
    return cudaSuccess;
  }
  emulation::Meeting meeting(count);
  emulation::block_meeting = &meeting;
  std::vector<std::thread> threads;
  for (int thread = 0; thread < count; ++thread) {
    threads.emplace_back([&, thread] {
      threadIdx.x = static_cast<unsigned>(thread);
      blockDim = config->blockDim;
      gridDim = config->gridDim;
      for (blockIdx.x = 0; blockIdx.x < gridDim.x; ++blockIdx.x) {
        if (thread == 0) emulation::begin_block();
        meeting.wait();
        kernel(arguments...);
        meeting.wait();
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  return cudaSuccess;
}

// ---- The driver: descriptions of tensors for the copy engine ----

using cuuint64_t = std::uint64_t;
using cuuint32_t = std::uint32_t;
enum CUresult { CUDA_SUCCESS, CUDA_ERROR_INVALID_VALUE };
enum { CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, CU_TENSOR_MAP_DATA_TYPE_FLOAT16, CU_TENSOR_MAP_INTERLEAVE_NONE };
enum { CU_TENSOR_MAP_SWIZZLE_NONE, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE };
struct CUtensorMap {
  const char* base;
  cuuint64_t sizes[4], strides[4];  // strides in bytes, the first one of an element
  cuuint32_t box[4];
};

// What the driver documents as wrong is refused.
inline CUresult cuTensorMapEncodeTiled(CUtensorMap* map, int, int rank, void* base, const cuuint64_t* sizes,
                                       const cuuint64_t* strides, const cuuint32_t* box, const cuuint32_t* steps, int, int,
                                       int, int) {
  bool right = rank == 4 && reinterpret_cast<std::uintptr_t>(base) % 16 == 0 && box[0] * 2 % 16 == 0;
  map->base = static_cast<const char*>(base);
  map->strides[0] = 2;
  for (int i = 0; i < 4; ++i) {
    right = right && sizes[i] > 0 && sizes[i] < cuuint64_t{1} << 32 && box[i] > 0 && box[i] <= 256 && steps[i] == 1;
    if (i > 0) map->strides[i] = strides[i - 1];
    right = right && (i == 0 || (map->strides[i] % 16 == 0 && map->strides[i] < cuuint64_t{1} << 40));
    map->sizes[i] = sizes[i];
    map->box[i] = box[i];
  }
  return right ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

inline cudaError_t cudaGetDriverEntryPointByVersion(const char*, void** function, unsigned, int,
                                                    cudaDriverEntryPointQueryResult* found) {
  *function = reinterpret_cast<void*>(&cuTensorMapEncodeTiled);
  *found = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}
