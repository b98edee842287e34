// The upsampling block on Hopper's tensor cores. What lies where is in conv_pixel_shuffle_gelu_layout.h.
//
// One block stays on each multiprocessor and takes tiles of 256 pixels in turn. One thread copies the tile's input
// with its halo into shared memory, once for all taps, a chunk of channels at a time; another one the weight
// in stages, or once and for all where it fits. Four warpgroups multiply, a patch each. The first two are ahead of the other
// two, so that one pair has the tensor cores while the other applies GELU and stores. What a product takes besides its
// instruction has to be little: a stage of one patch is five products, no more than 400 cycles.
#include "cuda/conv_pixel_shuffle_gelu.h"

#include <cuda_runtime.h>

#include "cuda/gelu.h"
#include "cuda/hopper.h"
#include "cuda/pairs.h"

namespace hflfnerv {

namespace {

using namespace conv_layout;

constexpr int kThreads = kConsumers * 128 + 128;  // the last warpgroup copies
// Registers of a thread: at launch, and as the warpgroups share them out afterwards. What one takes another must have given.
constexpr int kLaunchRegisters = 65536 / kThreads / 8 * 8, kConsumerRegisters = 112, kProducerRegisters = 32;
static_assert(kConsumers * kConsumerRegisters + kProducerRegisters <= (kConsumers + 1) * kLaunchRegisters,
              "a block that waits for more registers than it began with waits for ever");

template <class T>
struct Arguments {
  Plan plan;
  bool activates;
  Gelu gelu;
  const T* packed;
  const T* bias;
  T* y;
  T* z;
};

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

using namespace hopper;

static_assert(kConsumers == kPatches, "each warpgroup has one patch");

// The barriers of a ring: one pair for each of its places.
struct Ring {
  std::uint32_t full, empty;
  int count, index = 0;
  std::uint32_t phase = 0;

  __device__ Ring(std::uint32_t barriers, int count_) : full(barriers), empty(barriers + 8 * count_), count(count_) {}
  __device__ std::uint32_t full_barrier() const { return full + 8 * index; }
  __device__ std::uint32_t empty_barrier() const { return empty + 8 * index; }
  __device__ void next() {
    if (++index == count) index = 0, phase ^= 1;
  }
};

__device__ std::uint64_t join(std::uint32_t low, std::uint32_t high) {
  return static_cast<std::uint64_t>(high) << 32 | low;
}

// A value of which the compiler does not know where it comes from, so that it keeps it in a register.
__device__ int opaque(int value) {
  asm volatile("" : "+r"(value));
  return value;
}

// Offsets of slots, from the first element of a pixel's results: -1 where there is none; of those that begin what a thread
// stores, alone() of it unless all of that can be stored at once.
__device__ int alone(int offset) { return -2 - offset; }

// Stores the elements of kCount neighbouring slots, as pairs, where `offsets` says.
template <int kCount, class T>
__device__ void store(T* to, const int* offsets, const std::uint32_t (&pairs)[kCount / 2]) {
  const int first = offsets[0];
  if (first >= 0) {
    if constexpr (kCount == 8) *reinterpret_cast<uint4*>(to + first) = {pairs[0], pairs[1], pairs[2], pairs[3]};
    if constexpr (kCount == 4) *reinterpret_cast<uint2*>(to + first) = {pairs[0], pairs[1]};
    if constexpr (kCount == 2) *reinterpret_cast<std::uint32_t*>(to + first) = pairs[0];
    return;
  }
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const int offset = i == 0 && first < -1 ? alone(first) : offsets[i];
    const std::uint16_t bits = static_cast<std::uint16_t>(pairs[i / 2] >> i % 2 * 16);
    if (offset >= 0) *reinterpret_cast<std::uint16_t*>(to + offset) = bits;
  }
}

// The biases of kCount neighbouring slots.
template <int kCount>
__device__ void load(float (&values)[kCount], const float* from) {
  if constexpr (kCount == 2) {
    const float2 two = *reinterpret_cast<const float2*>(from);
    values[0] = two.x, values[1] = two.y;
  } else {
#pragma unroll
    for (int k = 0; k < kCount; k += 4) {
      const float4 four = *reinterpret_cast<const float4*>(from + k);
      values[k] = four.x, values[k + 1] = four.y, values[k + 2] = four.z, values[k + 3] = four.w;
    }
  }
}

// Where the results of one pixel go.
template <class T>
struct Target {
  T* to;
  const int* offsets;
};

// Bias, GELU and the stores of slots kStart and following of one pixel: row i of the two that a thread has.
template <int kColumns, int kStart, class T>
__device__ void finish(const float (&sums)[kColumns / 2], int i, int lane, const Arguments<T>& call, const float* biases,
                       const Target<T>& y, const Target<T>& z) {
  if constexpr (kStart < kColumns) {
    constexpr int kWidth = block_width(kColumns, kStart), kCount = kWidth / 4;
    const int slot = first_slot(lane, kStart, kWidth);
    std::uint32_t pairs[kCount / 2];
    float values[kCount];
    load(values, biases + slot);
#pragma unroll
    for (int k = 0; k < kCount; ++k) values[k] += sums[sum_of_slot(kStart, k, i)];
    if (z.to != nullptr) {
#pragma unroll
      for (int k = 0; k < kCount; k += 2) pairs[k / 2] = two(T(), values[k], values[k + 1]);
      store<kCount>(z.to, z.offsets + slot, pairs);
    }
    if (call.activates) {
#pragma unroll
      for (int k = 0; k < kCount; ++k) values[k] = activate(call.gelu, values[k]);
    }
#pragma unroll
    for (int k = 0; k < kCount; k += 2) pairs[k / 2] = two(T(), values[k], values[k + 1]);
    store<kCount>(y.to, y.offsets + slot, pairs);
    finish<kColumns, kStart + kWidth>(sums, i, lane, call, biases, y, z);
  }
}

// What the threads of a block share beside slots and stages.
struct Tables {
  std::uint32_t* changes;  // of descriptors, by table_entry
  int* y_offsets;
  int* z_offsets;
  float* biases;
  int* gathered;  // offset in bytes, in a slot, of each (tap, channel) of the gathered chunk
};

// Elements to which all pixels' first results are aligned where `elements` lie between them, at most 8.
__device__ int alignment(int elements) {
  return elements % 8 == 0 ? 8 : elements % 4 == 0 ? 4 : elements % 2 == 0 ? 2 : 1;
}

template <class T>
__device__ void fill_tables(const Arguments<T>& call, const Tables& tables) {
  const Plan& plan = call.plan;
  const Problem& p = plan.problem;
  const Runs runs = runs_of(p);
  for (int entry = threadIdx.x; entry < plan.full_entries() + plan.half_entries(); entry += kThreads) {
    tables.changes[entry] = table_entry(plan, entry);
  }
  const int y_align = alignment(p.r * p.y_pixel), z_align = alignment(p.n());
  for (int slot = threadIdx.x; slot < plan.column_tiles * plan.columns; slot += kThreads) {
    const int n = runs.n_of_slot(slot), within = slot % plan.columns, start = block_start(plan.columns, within);
    const int count = block_width(plan.columns, start) / 4, last = runs.n_of_slot(slot + count - 1);
    const int y = n < 0 ? -1 : y_offset(p, n);
    const auto first = [&](int offset, int align, int last_offset) {
      const bool begins = (within - start) % count == 0 && offset >= 0;
      const bool at_once = align >= count && offset % count == 0 && last_offset == offset + count - 1;
      return begins && !at_once ? alone(offset) : offset;
    };
    tables.y_offsets[slot] = first(y, y_align, last < 0 ? -1 : y_offset(p, last));
    tables.z_offsets[slot] = first(n, z_align, last);
    tables.biases[slot] =
        n < 0 || call.bias == nullptr ? 0.0f : static_cast<float>(call.bias[shuffle_channel(n, p.out_channels, p.r)]);
  }
  if (plan.cut.gathered_channels == 0) return;
  const int chunk = plan.cut.chunks() - 1, taps = p.taps();
  for (int k = threadIdx.x; k < plan.cut.steps(chunk, taps) * kStepK; k += kThreads) {
    tables.gathered[k] = gathered_offset(plan, k);
  }
}

// One thread: the boxes of every tile, chunk after chunk.
__device__ void load_input(const Plan& plan, const CUtensorMap* map, std::uint32_t shared, Ring ring) {
  const Problem& p = plan.problem;
  const int boxes = plan.boxes(), bytes = boxes * plan.halo_rows * plan.pitch * kGroup * kElementBytes;
  for (int tile = blockIdx.x; tile < plan.tiles; tile += gridDim.x) {
    for (int chunk = 0; chunk < plan.cut.chunks(); ++chunk, ring.next()) {
      const int planes = plan.cut.planes(chunk);
      barrier_wait(ring.empty_barrier(), ring.phase ^ 1);
      barrier_arrive_and_expect(ring.full_barrier(), planes * bytes);
      for (int box = 0; box < boxes; ++box) {
        const Place place = plan.box(tile, box);
        for (int plane = 0; plane < planes; ++plane) {
          copy_box(shared + ring.index * plan.slot_bytes + plane * plan.plane_bytes + box * plan.box_pixels * 16, map,
                   plan.cut.first_channel(chunk) + plane * kGroup, place.column - p.padding_w, place.row - p.padding_h,
                   place.image, ring.full_barrier());
        }
      }
    }
  }
}

// One thread: the weight of every tile, stage after stage; once, if it stays.
template <class T>
__device__ void load_weight(const Plan& plan, const T* packed, std::uint32_t shared, Ring ring) {
  const int step_bytes = plan.step_bytes(), taps = plan.problem.taps();
  const std::int64_t tile_bytes = std::int64_t(plan.cut.all_steps(taps)) * step_bytes;
  for (int tile = blockIdx.x; tile < plan.tiles; tile += gridDim.x) {
    const char* from = reinterpret_cast<const char*>(packed) + tile % plan.column_tiles * tile_bytes;
    std::uint32_t resident = shared;
    for (int chunk = 0; chunk < plan.cut.chunks(); ++chunk) {
      for (int left = plan.cut.steps(chunk, taps); left > 0; left -= kStageSteps, ring.next()) {
        const int bytes = min(left, kStageSteps) * step_bytes;
        if (!plan.resident) barrier_wait(ring.empty_barrier(), ring.phase ^ 1);
        barrier_arrive_and_expect(ring.full_barrier(), bytes);
        copy_bulk(plan.resident ? resident : shared + ring.index * plan.stage_bytes, from, bytes, ring.full_barrier());
        from += bytes;
        resident += bytes;
      }
    }
    if (plan.resident) return;
  }
}

// One stage of a full or half chunk: afterwards the products of the stages before it are done. The number of steps is a
// constant in each copy: only in straight code does the assembler let products follow each other without waiting.
template <class T, int kCount = kStageSteps, int kSums>
__device__ void multiply_stage(float (&sums)[kSums], std::uint32_t slot_low, std::uint32_t input_high,
                               std::uint32_t weight_low, std::uint32_t weight_high, int add,
                               const std::uint32_t (&changes)[kStageSteps], int count) {
  if constexpr (kCount > 1) {
    if (count < kCount) {
      multiply_stage<T, kCount - 1>(sums, slot_low, input_high, weight_low, weight_high, add, changes, count);
      return;
    }
  }
  constexpr std::uint32_t kStepUnits = 2 * kSums * kStepK * kElementBytes / 16;
  wgmma_fence();
#pragma unroll
  for (int step = 0; step < kCount; ++step) {
    wgmma(T(), sums, join(slot_low + changes[step], input_high), join(weight_low + step * kStepUnits, weight_high),
          step > 0 ? 1 : add);
  }
  wgmma_commit();
  wgmma_wait<1>();
}

// A warpgroup that multiplies: its patch of every tile.
template <class T, int kColumns>
__device__ void multiply(const Arguments<T>& call, int patch, std::uint32_t shared, const char* shared_pointer,
                         const Tables& tables, Ring inputs, Ring weights, Ring turns) {
  const Plan& plan = call.plan;
  const Problem& p = plan.problem;
  constexpr std::uint32_t kStepUnits = kColumns * kStepK * kElementBytes / 16;
  const bool resident = plan.resident, behind = patch >= kConsumers / 2;
  const int taps = p.taps(), lane = opaque(threadIdx.x % 32), row = fragment_row(threadIdx.x / 32 % 4, lane);
  const int channels_n = p.n(), y_row = p.out_width() * p.r * p.y_pixel;
  const std::uint32_t input_high = descriptor_high(plan.pitch * 16), weight_high = descriptor_high(kWeightStrideBytes);
  const std::uint32_t patch_low = descriptor_low(shared + plan.patch_offset(patch) * 16, 0);
  const std::uint32_t slot_units = plan.slot_bytes / 16, stage_units = plan.stage_bytes / 16;
  const std::uint32_t weight_base = descriptor_low(shared + plan.weight_offset, kWeightLeadingBytes);
  bool weight_is_there = false;  // to stay
  float sums[kColumns / 2];

  for (int tile = blockIdx.x; tile < plan.tiles; tile += gridDim.x, turns.next()) {
    int add = 0, lead = behind ? 0 : plan.lead;
    if (behind) {
      barrier_wait(turns.full_barrier(), turns.phase);
      __syncwarp();
      if (lane == 0) barrier_arrive(turns.empty_barrier());
    }
    std::uint32_t resident_low = weight_base;
    std::uint32_t used_weight = 0, used_input = 0;  // barriers of what the products under way read
    for (int chunk = 0; chunk < plan.cut.chunks(); ++chunk, inputs.next()) {
      const ChunkKind kind = plan.cut.kind(chunk);
      const std::uint32_t slot_low = patch_low + inputs.index * slot_units;
      const std::uint32_t* changes_at = tables.changes + (kind == ChunkKind::full ? 0 : plan.full_entries());
      barrier_wait(inputs.full_barrier(), inputs.phase);
      const int all = plan.cut.steps(chunk, taps);
      for (int first = 0; first < all; first += kStageSteps, weights.next(), changes_at += kStageEntries) {
        const int count = min(all - first, kStageSteps);
        if (!weight_is_there) barrier_wait(weights.full_barrier(), weights.phase);
        const std::uint32_t b = resident ? resident_low : weight_base + weights.index * stage_units;
        if (kind == ChunkKind::gathered) {
          const char* pixel = shared_pointer + inputs.index * plan.slot_bytes +
                              (plan.patch_offset(patch) + patch_row(row) * plan.pitch + patch_column(row)) * 16;
          for (int step = 0; step < count; ++step, add = 1) {
            std::uint32_t a[4];
#pragma unroll
            for (int half = 0; half < 2; ++half) {
              const int* offsets = tables.gathered + (first + step) * kStepK + half * 8 + fragment_column(lane);
              const int left = offsets[0], right = offsets[1];
#pragma unroll
              for (int i = 0; i < 2; ++i) {
                // Row 8 of a fragment is the pixel below row 0.
                const char* at = pixel + i * plan.pitch * 16;
                a[2 * half + i] = *reinterpret_cast<const std::uint16_t*>(at + left) |
                                  *reinterpret_cast<const std::uint16_t*>(at + right) << 16;
              }
            }
            wgmma_fence();
            wgmma(T(), sums, a, join(b + step * kStepUnits, weight_high), add);
            wgmma_commit();
            wgmma_wait<0>();
          }
        } else {
          const uint4 four = *reinterpret_cast<const uint4*>(changes_at);
          const std::uint32_t changes[kStageSteps] = {four.x, four.y, four.z, four.w, changes_at[4]};
          multiply_stage<T>(sums, slot_low, input_high, b, weight_high, add, changes, count);
          add = 1;
        }
        // What came before this stage is done.
        if (lane == 0 && used_weight != 0) barrier_arrive(used_weight);
        if (lane == 0 && used_input != 0) barrier_arrive(used_input);
        if (--lead == 0) {
          barrier_wait(turns.empty_barrier(), turns.phase ^ 1);
          __syncwarp();
          if (lane == 0) barrier_arrive(turns.full_barrier());
        }
        used_weight = resident ? 0 : weights.empty_barrier();
        used_input = first + count == all ? inputs.empty_barrier() : 0;
        resident_low += count * kStepUnits;
      }
    }
    weight_is_there = resident;
    wgmma_wait<0>();
    keep_in_place(sums);
    if (lane == 0 && used_weight != 0) barrier_arrive(used_weight);
    if (lane == 0) barrier_arrive(used_input);

    const Place place = plan.patch(tile, patch);
    const int slot = plan.first_slot(tile);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int h = place.row + patch_row(row + 8 * i), w = place.column + patch_column(row + 8 * i);
      if (place.image >= p.batch || h >= p.out_height() || w >= p.out_width()) continue;
      const std::int64_t y_line = (std::int64_t(place.image) * p.out_height() + h) * p.r;
      const std::int64_t pixel = (std::int64_t(place.image) * p.out_height() + h) * p.out_width() + w;
      const Target<T> y{call.y + y_line * y_row + std::int64_t(w) * p.r * p.y_pixel, tables.y_offsets + slot};
      const Target<T> z{call.z == nullptr ? nullptr : call.z + pixel * channels_n, tables.z_offsets + slot};
      finish<kColumns, 0>(sums, i, lane, call, tables.biases + slot, y, z);
    }
    __syncwarp();  // behind pixels that are not in the image
  }
}

#endif

template <class T, int kColumns>
__global__ void __launch_bounds__(kThreads, 1)
    conv_pixel_shuffle_gelu_kernel(const __grid_constant__ CUtensorMap map, const __grid_constant__ Arguments<T> call) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  char* shared_pointer = shared_memory();
  const Plan& plan = call.plan;
  const std::uint32_t shared = shared_address(shared_pointer), barriers = shared + plan.barriers_offset;
  const int slots = plan.column_tiles * plan.columns;
  std::uint32_t* changes = reinterpret_cast<std::uint32_t*>(shared_pointer + plan.tables_offset);
  int* table = reinterpret_cast<int*>(changes + plan.full_entries() + plan.half_entries());
  const Tables tables{changes, table, table + slots, reinterpret_cast<float*>(table + 2 * slots), table + 3 * slots};
  Ring inputs(barriers, plan.slots), weights(barriers + 16 * plan.slots, plan.stages);
  Ring turns(barriers + 16 * (plan.slots + plan.stages), 1);  // of a tile's products: given, taken
  if (threadIdx.x == 0) {
    for (int i = 0; i < plan.slots; ++i) {
      barrier_init(inputs.full + 8 * i, 1);
      barrier_init(inputs.empty + 8 * i, kConsumers * 4);
    }
    for (int i = 0; i < plan.stages; ++i) {
      barrier_init(weights.full + 8 * i, 1);
      barrier_init(weights.empty + 8 * i, kConsumers * 4);
    }
    barrier_init(turns.full, kConsumers / 2 * 4);
    barrier_init(turns.empty, kConsumers / 2 * 4);
    fence_barrier_init();
  }
  fill_tables(call, tables);
  __syncthreads();

  const int patch = __shfl_sync(~0u, threadIdx.x / 128, 0);  // the compiler sees that a warp agrees on it
  if (patch < kConsumers) {
    registers_grow<kConsumerRegisters>();
    multiply<T, kColumns>(call, patch, shared, shared_pointer, tables, inputs, weights, turns);
  } else {
    registers_shrink<kProducerRegisters>();
    if (threadIdx.x == kConsumers * 128) load_input(plan, &map, shared, inputs);
    if (threadIdx.x == kConsumers * 128 + 32) load_weight(plan, call.packed, shared + plan.weight_offset, weights);
  }
#endif
}

template <class T>
__global__ void conv_pixel_shuffle_gelu_pack_kernel(const __grid_constant__ Plan plan, const T* weight,
                                                    const __grid_constant__ WeightStrides strides, T* packed) {
  const std::int64_t element = std::int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (element >= plan.packed_elements()) return;
  const std::int64_t source = packed_source(plan, strides, element);
  packed[element] = source < 0 ? T() : weight[source];
}

const char* message(cudaError_t error) { return error == cudaSuccess ? nullptr : cudaGetErrorString(error); }

// Describes x to the copy engine: boxes of a halo's pixels by 8 channels, zeros outside of the image and behind the last
// channel.
const char* describe_input(const ConvPixelShuffleGeluCuda& call, CUtensorMap& map) {
  static const auto encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found{};
    const cudaError_t error =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found);
    const bool usable = error == cudaSuccess && found == cudaDriverEntryPointSuccess;
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(usable ? function : nullptr);
  }();
  if (encode == nullptr) return "the driver has no cuTensorMapEncodeTiled; it must support CUDA 12 or newer";
  const Problem& p = call.plan.problem;
  const cuuint64_t sizes[] = {cuuint64_t(p.channels), cuuint64_t(p.width), cuuint64_t(p.height), cuuint64_t(p.batch)};
  const cuuint64_t strides[] = {cuuint64_t(p.x_pixel) * kElementBytes, cuuint64_t(p.x_row) * kElementBytes,
                                cuuint64_t(p.x_image) * kElementBytes};
  const cuuint32_t box[] = {kGroup, cuuint32_t(call.plan.pitch), cuuint32_t(call.plan.halo_rows), 1};
  const cuuint32_t steps[] = {1, 1, 1, 1};
  const CUresult result = encode(
      &map, call.bfloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 4,
      const_cast<void*>(call.x), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_NONE,
      CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? nullptr : "the driver does not take the strides of x";
}

template <class T, int kColumns>
const char* launch(const ConvPixelShuffleGeluCuda& call, const CUtensorMap& map, cudaStream_t stream) {
  const auto kernel = conv_pixel_shuffle_gelu_kernel<T, kColumns>;
  const Arguments<T> arguments{call.plan,
                               call.activation != Activation::none,
                               call.activation == Activation::gelu_tanh ? kGeluTanh : kGelu,
                               static_cast<const T*>(call.packed),
                               static_cast<const T*>(call.bias),
                               static_cast<T*>(call.y),
                               static_cast<T*>(call.z)};
  const int bytes = call.plan.shared_bytes;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(call.plan.blocks);
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = bytes;
  config.stream = stream;
  if (const char* error = message(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes))) {
    return error;
  }
  return message(cudaLaunchKernelEx(&config, kernel, map, arguments));
}

template <class T>
const char* launch(const ConvPixelShuffleGeluCuda& call, const CUtensorMap& map, cudaStream_t stream) {
  switch (call.plan.columns) {
    case 32:
      return launch<T, 32>(call, map, stream);
    case 40:
      return launch<T, 40>(call, map, stream);
    case 48:
      return launch<T, 48>(call, map, stream);
    case 64:
      return launch<T, 64>(call, map, stream);
    case 80:
      return launch<T, 80>(call, map, stream);
    case 96:
      return launch<T, 96>(call, map, stream);
    case 112:
      return launch<T, 112>(call, map, stream);
    case 128:
      return launch<T, 128>(call, map, stream);
    default:
      return launch<T, 136>(call, map, stream);
  }
}

}  // namespace

const char* cuda_device_unavailable(int device) { return message(cudaSetDevice(device)); }

const char* conv_pixel_shuffle_gelu_cuda_plan(const Problem& problem, int device, Plan& plan) {
  int multiprocessors = 0, shared = 0;
  cudaError_t error = cudaSetDevice(device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  return error == cudaSuccess ? make_plan(problem, multiprocessors, shared, plan) : message(error);
}

const char* conv_pixel_shuffle_gelu_cuda_pack(const Plan& plan, const void* weight, const WeightStrides& strides,
                                              void* packed, void* stream) {
  // Both types are moved as bits.
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>((plan.packed_elements() + 255) / 256));
  config.blockDim = dim3(256);
  config.stream = static_cast<cudaStream_t>(stream);
  return message(cudaLaunchKernelEx(&config, conv_pixel_shuffle_gelu_pack_kernel<std::uint16_t>, plan,
                                    static_cast<const std::uint16_t*>(weight), strides,
                                    static_cast<std::uint16_t*>(packed)));
}

const char* conv_pixel_shuffle_gelu_cuda_fwd(const ConvPixelShuffleGeluCuda& call, void* stream) {
  CUtensorMap map;
  if (const char* error = describe_input(call, map)) return error;
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  return call.bfloat16 ? launch<__nv_bfloat16>(call, map, cuda_stream) : launch<__half>(call, map, cuda_stream);
}

}  // namespace hflfnerv
