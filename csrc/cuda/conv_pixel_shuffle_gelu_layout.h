// Where everything lies for the upsampling block on Hopper's tensor cores: tiles, halo, K steps, packed weight, fragments
// and the shuffled result, as index arithmetic alone. The kernel uses it on the device, the launch function on the host,
// and csrc/tests/test_conv_pixel_shuffle_gelu_cuda.cpp puts it through an emulation of the hardware's operand layouts.
//
// The block is an implicit GEMM: rows are pixels, K runs over (channel, tap), columns are the convolution's channels.
//
//   Tile.   256 pixels in patches of 8 x 8, the 64 rows of one wgmma, times `columns` output channels. The patches are a
//           rectangle, or any that follow each other where rectangles would reach far beyond the image.
//   Box.    What is copied at once: a rectangle's pixels with their halo, or a patch's with its own.
//   Chunk.  The input comes in chunks of 16 channels: two planes [halo row][halo column][8 channels]. 8 pixels of a row are
//           then a core matrix of wgmma without swizzle, and every tap reads the same planes from another start address.
//   Step.   K = 16 of one wgmma: a tap of 16 channels ("full"), two taps of the last 8 ("half"), or 16 (tap, channel)
//           pairs of the last 1 to 7, gathered in registers ("gathered").
//   Slot.   Columns of the product in the order in which a thread stores them: see column_of_slot and n_of_slot.
#pragma once

#include <cstdint>
#include <initializer_list>

#ifdef __CUDACC__
#define HFLFNERV_HOST_DEVICE __host__ __device__
#else
#define HFLFNERV_HOST_DEVICE
#endif

namespace hflfnerv {
namespace conv_layout {

constexpr int kGroup = 8;         // channels of a plane: 16 bytes, a row of a core matrix
constexpr int kStepK = 16;        // K of one wgmma
constexpr int kPatch = 8;         // rows and columns of a patch
constexpr int kPatches = 4;       // of a tile
constexpr int kConsumers = 4;     // warpgroups that multiply, one patch each
constexpr int kStageSteps = 5;    // K steps of one stage of the weight, at most
constexpr int kStageEntries = 8;  // of a stage in the table of descriptor changes: two aligned loads of four
constexpr int kMaxSlots = 8;      // chunks of input in shared memory
constexpr int kMaxStages = 16;    // stages of the weight in shared memory, unless all of it stays there
constexpr int kElementBytes = 2;  // bfloat16, float16
constexpr int kColumnChoices[] = {32, 40, 48, 64, 80, 96, 112, 128, 136};

HFLFNERV_HOST_DEVICE inline int divide_up(int a, int b) { return (a + b - 1) / b; }

// Sizes of one call. Strides count elements; channels are adjacent.
struct Problem {
  int batch, channels, height, width;  // of x
  int out_channels, r;                 // of y
  int kernel_h, kernel_w, padding_h, padding_w;
  std::int64_t x_pixel, x_row, x_image;
  int y_pixel;  // out_channels, or more where each pixel of y is padded
  // 0; or, where this is the gradient of a block's x from that of its convolution, whose channels are in the order of n, the
  // block's upscale factor: the weight is then the block's own.
  int gradient_of_r;

  HFLFNERV_HOST_DEVICE int taps() const { return kernel_h * kernel_w; }
  HFLFNERV_HOST_DEVICE int n() const { return out_channels * r * r; }
  HFLFNERV_HOST_DEVICE int out_height() const { return height + 2 * padding_h - kernel_h + 1; }
  HFLFNERV_HOST_DEVICE int out_width() const { return width + 2 * padding_w - kernel_w + 1; }
};

// ---- K: chunks and steps ----

enum class ChunkKind { full, half, gathered };

// How the channels are cut: full chunks of 16, then at most one half chunk of 8, then at most one gathered chunk.
struct Channels {
  int full, half, gathered_channels;

  HFLFNERV_HOST_DEVICE int chunks() const { return full + half + (gathered_channels > 0); }
  HFLFNERV_HOST_DEVICE ChunkKind kind(int chunk) const {
    return chunk < full ? ChunkKind::full : chunk < full + half ? ChunkKind::half : ChunkKind::gathered;
  }
  HFLFNERV_HOST_DEVICE int first_channel(int chunk) const {
    return chunk <= full ? chunk * 2 * kGroup : full * 2 * kGroup + kGroup;
  }
  HFLFNERV_HOST_DEVICE int planes(int chunk) const { return chunk < full ? 2 : 1; }
  HFLFNERV_HOST_DEVICE int steps(int chunk, int taps) const {
    if (chunk < full) return taps;
    return chunk < full + half ? (taps + 1) / 2 : divide_up(taps * gathered_channels, kStepK);
  }
  HFLFNERV_HOST_DEVICE int all_steps(int taps) const {
    int sum = 0;
    for (int chunk = 0; chunk < chunks(); ++chunk) sum += steps(chunk, taps);
    return sum;
  }
};

// Channels that are left over are gathered where that halves the steps, since a gathered step waits for its operands.
inline Channels cut_channels(int channels, int taps) {
  Channels cut{channels / 16, 0, 0};
  const int tail = channels % 16, rest = tail % kGroup;
  const bool gather = rest > 0 && 2 * divide_up(taps * rest, kStepK) <= (taps + 1) / 2;
  const int groups = tail / kGroup + (rest > 0 && !gather);
  if (gather) cut.gathered_channels = rest;
  if (groups == 2 || (groups == 1 && taps == 1)) {
    ++cut.full;
  } else {
    cut.half = groups;
  }
  return cut;
}

// The steps of a full or half chunk: where the two 8-wide halves of K read, in pixels of 16 bytes from where the first tap
// reads in the chunk's first plane, as it is to be added to a descriptor that has no leading bytes. A half chunk with an odd
// number of taps repeats a tap in its last step, with zero weights.
HFLFNERV_HOST_DEVICE inline std::uint32_t descriptor_change(ChunkKind kind, int step, int taps, int kernel_w, int pitch,
                                                            int plane_bytes) {
  const auto at = [&](int tap) { return tap / kernel_w * pitch + tap % kernel_w; };
  const bool pairs = kind == ChunkKind::half;
  const int second_tap = 2 * step + 1 < taps ? 2 * step + 1 : taps - 1;
  const int first = at(!pairs ? step : 2 * step + 1 < taps ? 2 * step : taps - 1);
  const int second = pairs ? at(second_tap) : first + plane_bytes / 16;
  return static_cast<std::uint32_t>(first) | static_cast<std::uint32_t>(second - first) << 16;
}

// What row k of a step's weight is for: a tap and a channel, or tap -1 where it is zero.
struct KSource {
  int tap, channel;
};

HFLFNERV_HOST_DEVICE inline KSource k_source(const Channels& cut, int channels, int taps, int chunk, int step, int k) {
  const ChunkKind kind = cut.kind(chunk);
  KSource source{step, cut.first_channel(chunk) + k};
  if (kind == ChunkKind::half) {
    const bool repeats = 2 * step == taps - 1;
    source.tap = repeats ? (k < kGroup ? -1 : taps - 1) : 2 * step + k / kGroup;
    source.channel = cut.first_channel(chunk) + k % kGroup;
  } else if (kind == ChunkKind::gathered) {
    const int element = step * kStepK + k;
    source.tap = element / cut.gathered_channels;
    source.channel = cut.first_channel(chunk) + element % cut.gathered_channels;
  }
  if (source.tap >= taps || source.channel >= channels) source.tap = -1;
  return source;
}

// ---- Columns: slots, the packed weight, the result ----

// Slots come in blocks of 32, then 16 and 8 for the rest of a tile. Thread t of a quad stores a quarter of each block,
// neighbouring slots, and finds them among its sums: it holds columns 8 g + 2 t and the next for every g.
HFLFNERV_HOST_DEVICE constexpr int block_width(int columns, int start) {
  return columns - start >= 32 ? 32 : columns - start >= 16 ? 16 : 8;
}
HFLFNERV_HOST_DEVICE inline int first_slot(int lane, int start, int width) { return start + lane % 4 * (width / 4); }
// The sum that belongs to the k-th slot of a thread in the block at `start`, for row i of its two.
HFLFNERV_HOST_DEVICE constexpr int sum_of_slot(int start, int k, int i) {
  return (start / 8 + k / 2) * 4 + 2 * i + k % 2;
}

// First slot, or column, of the block in which one of a tile is.
HFLFNERV_HOST_DEVICE inline int block_start(int columns, int slot) {
  int start = 0;
  while (slot >= start + block_width(columns, start)) start += block_width(columns, start);
  return start;
}

// The column of the product for a slot of a tile: the same, seen from the weight; and the slot for a column.
HFLFNERV_HOST_DEVICE inline int column_of_slot(int columns, int slot) {
  const int start = block_start(columns, slot), each = block_width(columns, start) / 4, k = (slot - start) % each;
  return start + k / 2 * 8 + (slot - start) / each * 2 + k % 2;
}
HFLFNERV_HOST_DEVICE inline int slot_of_column(int columns, int column) {
  const int start = block_start(columns, column), each = block_width(columns, start) / 4, within = column - start;
  return start + within % 8 / 2 * each + within / 8 * 2 + within % 2;
}

// Channels of the result are numbered n = (i r + j) out_channels + c. In memory a pixel's results are runs of adjacent
// elements: one for each i, or for each (i, j) where pixels are padded. Slots take eights of all runs first and what is
// left of them behind, so that eight slots are 16 adjacent bytes wherever possible.
struct Runs {
  int length, count;

  HFLFNERV_HOST_DEVICE int n_of_slot(int slot) const {
    const int whole = length / 8 * 8, rest = length - whole;
    if (slot < count * whole) return slot / whole * length + slot % whole;
    slot -= count * whole;
    return slot < count * rest ? slot / rest * length + whole + slot % rest : -1;
  }
};

HFLFNERV_HOST_DEVICE inline Runs runs_of(const Problem& p) {
  return p.y_pixel == p.out_channels ? Runs{p.r * p.out_channels, p.r} : Runs{p.out_channels, p.r * p.r};
}

// Number of n among the weight's output channels, which PixelShuffle takes in the order (c, i, j).
HFLFNERV_HOST_DEVICE inline int shuffle_channel(int n, int out_channels, int r) {
  return n % out_channels * (r * r) + n / out_channels;
}

// Offset in y of n, from the first of the r x r pixels that come from one.
HFLFNERV_HOST_DEVICE inline int y_offset(const Problem& p, int n) {
  const int i = n / (p.r * p.out_channels), j = n / p.out_channels % p.r;
  return (i * p.out_width() * p.r + j) * p.y_pixel + n % p.out_channels;
}

// Element of a step's weight, in core matrices of 8 columns by 8 of K: those of the two halves of K are neighbours.
constexpr int kWeightLeadingBytes = 128, kWeightStrideBytes = 256;
HFLFNERV_HOST_DEVICE inline int step_element(int column, int k) {
  return (column / 8 * 2 + k / 8) * 64 + column % 8 * 8 + k % 8;
}

// ---- Rows: patches and fragments ----

// Row and column, in its patch, of the pixel that row `row` of a wgmma's 64 stands for.
HFLFNERV_HOST_DEVICE inline int patch_row(int row) { return row / kPatch; }
HFLFNERV_HOST_DEVICE inline int patch_column(int row) { return row % kPatch; }

// wgmma's fragments: thread `lane` of warp `warp` holds rows fragment_row and that plus 8, of which accumulator 4 g + 2 i + e
// is column 8 g + fragment_column + e in row i of the two; of A's four registers the pairs (row i, K half h) are i + 2 h.
HFLFNERV_HOST_DEVICE inline int fragment_row(int warp, int lane) { return warp * 16 + lane / 4; }
HFLFNERV_HOST_DEVICE inline int fragment_column(int lane) { return lane % 4 * 2; }

// ---- What a launch is made of ----

// A descriptor of an operand in shared memory without swizzle: `leading` bytes between its two halves of K, `stride` bytes
// between eights of rows (or columns). The upper half does not depend on the address, and no field of the lower half
// overflows into the next as long as addresses are below 256 KB.
HFLFNERV_HOST_DEVICE inline std::uint32_t descriptor_low(std::uint32_t address, std::uint32_t leading) {
  return address >> 4 | leading >> 4 << 16;
}
HFLFNERV_HOST_DEVICE inline std::uint32_t descriptor_high(std::uint32_t stride) { return stride >> 4; }

struct Place {
  int image, row, column;
};

struct Plan {
  Problem problem;
  Channels cut;
  int columns, column_tiles;             // of a tile, and tiles that cover all of them
  int patch_columns;                     // patches of a tile side by side: 1, 2 or 4; 0 where each has a box of its own
  int pitch, halo_rows;                  // pixels of a row of a box, its rows
  int box_pixels, plane_bytes;           // pixels from a box to the next, bytes of a plane, which are whole 128 bytes
  int box_rows, box_columns, tiles;      // boxes of an image in both directions, and all tiles there are
  int slots, slot_bytes, stages, stage_bytes;
  bool resident;                         // the whole weight stays in shared memory
  int lead;                              // stages of a tile by which half of the warpgroups is ahead of the other
  int weight_offset, tables_offset, barriers_offset, shared_bytes;  // shared memory begins with the slots
  int blocks;

  HFLFNERV_HOST_DEVICE int boxes() const { return patch_columns == 0 ? kPatches : 1; }  // of a tile
  HFLFNERV_HOST_DEVICE int box_height() const { return patch_columns == 0 ? kPatch : kPatches / patch_columns * kPatch; }
  HFLFNERV_HOST_DEVICE int box_width() const { return patch_columns == 0 ? kPatch : patch_columns * kPatch; }
  HFLFNERV_HOST_DEVICE int step_bytes() const { return columns * kStepK * kElementBytes; }
  // Pixels, in a plane, from a tile's first to a patch's first.
  HFLFNERV_HOST_DEVICE int patch_offset(int patch) const {
    return patch_columns == 0 ? patch * box_pixels
                              : (patch / patch_columns * pitch + patch % patch_columns) * kPatch;
  }
  HFLFNERV_HOST_DEVICE int first_slot(int tile) const { return tile % column_tiles * columns; }
  // The first pixel whose result a box of a tile is for. Behind the last box the image is one that is not there.
  HFLFNERV_HOST_DEVICE Place box(int tile, int number) const {
    const int at = tile / column_tiles * boxes() + number, row = at / box_columns;
    return {row / box_rows, row % box_rows * box_height(), at % box_columns * box_width()};
  }
  HFLFNERV_HOST_DEVICE Place patch(int tile, int number) const {
    if (patch_columns == 0) return box(tile, number);
    const Place first = box(tile, 0);
    return {first.image, first.row + number / patch_columns * kPatch, first.column + number % patch_columns * kPatch};
  }
  // Entries of the table of descriptor changes: the stages of a full chunk, then those of a half one.
  HFLFNERV_HOST_DEVICE int full_entries() const { return divide_up(problem.taps(), kStageSteps) * kStageEntries; }
  HFLFNERV_HOST_DEVICE int half_entries() const {
    return divide_up((problem.taps() + 1) / 2, kStageSteps) * kStageEntries;
  }
  HFLFNERV_HOST_DEVICE std::int64_t packed_elements() const {
    return std::int64_t(column_tiles) * cut.all_steps(problem.taps()) * columns * kStepK;
  }
};

// Entry of the table of descriptor changes; those of no step are never used.
HFLFNERV_HOST_DEVICE inline std::uint32_t table_entry(const Plan& plan, int entry) {
  const int in_half = entry - plan.full_entries(), within = in_half < 0 ? entry : in_half;
  const int step = within / kStageEntries * kStageSteps + within % kStageEntries;
  return descriptor_change(in_half < 0 ? ChunkKind::full : ChunkKind::half, step, plan.problem.taps(),
                           plan.problem.kernel_w, plan.pitch, plan.plane_bytes);
}

// Where element k of the gathered chunk's (tap, channel) pairs lies, in bytes from a pixel's place in the plane. Beyond the
// last pair, where the weight is zero: the first one, whose value is as finite as the image.
HFLFNERV_HOST_DEVICE inline int gathered_offset(const Plan& plan, int k) {
  const int channels = plan.cut.gathered_channels, tap = k / channels, kernel_w = plan.problem.kernel_w;
  if (tap >= plan.problem.taps()) return 0;
  return (tap / kernel_w * plan.pitch + tap % kernel_w) * 16 + k % channels * kElementBytes;
}

// Elements between neighbours of a weight [n, channels, taps].
struct WeightStrides {
  std::int64_t n, channel, tap;
};

// The weight in the order of the packed one: source of an element, or -1 where that is zero.
HFLFNERV_HOST_DEVICE inline std::int64_t packed_source(const Plan& plan, const WeightStrides& strides,
                                                       std::int64_t element) {
  const Problem& p = plan.problem;
  const int per_step = plan.columns * kStepK, within = static_cast<int>(element % per_step);
  const int all_steps = plan.cut.all_steps(p.taps());
  int step = static_cast<int>(element / per_step % all_steps), chunk = 0;
  const int first_slot = static_cast<int>(element / per_step / all_steps) * plan.columns;
  while (step >= plan.cut.steps(chunk, p.taps())) step -= plan.cut.steps(chunk++, p.taps());
  // The inverse of step_element, then of column_of_slot, which permutes a few slots.
  const int core = within / 64, column = core / 2 * 8 + within % 64 / 8, k = core % 2 * 8 + within % 8;
  const int n = runs_of(p).n_of_slot(first_slot + slot_of_column(plan.columns, column));
  const KSource source = k_source(plan.cut, p.channels, p.taps(), chunk, step, k);
  if (n < 0 || source.tap < 0) return -1;
  if (p.gradient_of_r > 0) {  // taps turned, and the two kinds of channels exchanged
    const int row = shuffle_channel(source.channel, p.channels / (p.gradient_of_r * p.gradient_of_r), p.gradient_of_r);
    return row * strides.n + n * strides.channel + (p.taps() - 1 - source.tap) * strides.tap;
  }
  return shuffle_channel(n, p.out_channels, p.r) * strides.n + source.channel * strides.channel + source.tap * strides.tap;
}

// Cycles, about, that the busiest multiprocessor needs for its tiles. A wgmma of n columns takes n / 2, but not less than
// reading its operands does, at 112 bytes a cycle, since copies write at the same time: of the 128 that there are. Boxes are
// copied meanwhile, at 64, and waited for now and then; and a tile begins and ends, which its neighbours hide in part.
constexpr int kReadBytes = 112, kCopyBytes = 64, kTileCycles = 1000;

inline std::int64_t cost_of(const Plan& plan, int columns, int multiprocessors) {
  const Problem& p = plan.problem;
  const std::int64_t boxes = std::int64_t(p.batch) * plan.box_rows * plan.box_columns;
  const std::int64_t tiles = (boxes + plan.boxes() - 1) / plan.boxes() * divide_up(p.n(), columns);
  const std::int64_t rounds = (tiles + multiprocessors - 1) / multiprocessors;
  const int reads = divide_up((64 + columns) * kStepK * kElementBytes, kReadBytes), multiplies = columns / 2;
  int planes = 0;
  for (int chunk = 0; chunk < plan.cut.chunks(); ++chunk) planes += plan.cut.planes(chunk);
  const int copies = planes * plan.plane_bytes / kCopyBytes, products = kPatches * plan.cut.all_steps(p.taps());
  return rounds * (std::int64_t(products) * (reads > multiplies ? reads : multiplies) + copies + kTileCycles);
}

// Arranges patches in boxes and columns in tiles.
inline void arrange(Plan& plan, int patch_columns, int columns) {
  const Problem& p = plan.problem;
  plan.patch_columns = patch_columns;
  plan.box_rows = divide_up(p.out_height(), plan.box_height());
  plan.box_columns = divide_up(p.out_width(), plan.box_width());
  plan.pitch = plan.box_width() + p.kernel_w - 1;
  plan.halo_rows = plan.box_height() + p.kernel_h - 1;
  plan.box_pixels = divide_up(plan.halo_rows * plan.pitch, 8) * 8;
  plan.plane_bytes = plan.boxes() * plan.box_pixels * kGroup * kElementBytes;
  plan.columns = columns;
}

// Chooses what keeps the busiest multiprocessor busy for the shortest time.
inline void choose_tiles(Plan& plan, int multiprocessors) {
  std::int64_t best = 0;
  int best_arrangement = 0, best_columns = 0;
  for (const int patch_columns : {2, 4, 1, 0}) {
    for (const int columns : kColumnChoices) {
      arrange(plan, patch_columns, columns);
      const std::int64_t cost = cost_of(plan, columns, multiprocessors);
      if (best == 0 || cost < best) best = cost, best_arrangement = patch_columns, best_columns = columns;
    }
  }
  arrange(plan, best_arrangement, best_columns);
}

// Fills a plan for a device; returns why there is none, or null.
inline const char* make_plan(const Problem& p, int multiprocessors, int shared_limit, Plan& plan) {
  plan.problem = p;
  plan.cut = cut_channels(p.channels, p.taps());
  choose_tiles(plan, multiprocessors);
  plan.column_tiles = divide_up(p.n(), plan.columns);
  plan.tiles = divide_up(p.batch * plan.box_rows * plan.box_columns, plan.boxes()) * plan.column_tiles;
  plan.blocks = plan.tiles < multiprocessors ? plan.tiles : multiprocessors;

  const int chunks = plan.cut.chunks(), all_steps = plan.cut.all_steps(p.taps());
  plan.slot_bytes = plan.plane_bytes * (plan.cut.full > 0 ? 2 : 1);
  const int gathered = plan.cut.gathered_channels > 0 ? plan.cut.steps(chunks - 1, p.taps()) * kStepK : 0;
  const int table_bytes =
      (plan.full_entries() + plan.half_entries() + plan.column_tiles * plan.columns * 3 + gathered) * 4;
  const int left = shared_limit - divide_up(table_bytes, 8) * 8 - 2 * (kMaxSlots + kMaxStages + 1) * 8;
  int all_stages = 0;
  for (int chunk = 0; chunk < chunks; ++chunk) all_stages += divide_up(plan.cut.steps(chunk, p.taps()), kStageSteps);
  plan.stage_bytes = kStageSteps * plan.step_bytes();
  const int wanted = chunks < 2 ? 2 : chunks > 4 ? 4 : chunks;
  const int whole_bytes = all_steps * plan.step_bytes();
  plan.resident =
      plan.column_tiles == 1 && all_stages <= kMaxStages && whole_bytes + wanted * plan.slot_bytes <= left;
  plan.stages = all_stages;
  if (!plan.resident) {
    plan.stages = (left - wanted * plan.slot_bytes) / plan.stage_bytes;
    if (plan.stages > kMaxStages) plan.stages = kMaxStages;
    if (plan.stages < 3) return "a tile's operands do not fit in shared memory";
  }
  const int weight_bytes = plan.resident ? whole_bytes : plan.stages * plan.stage_bytes;
  plan.slots = (left - weight_bytes) / plan.slot_bytes;
  if (plan.slots > kMaxSlots) plan.slots = kMaxSlots;
  // As far as slots and stages reach that nobody has released yet.
  plan.lead = 0;
  for (int chunk = 0; chunk < chunks && chunk < plan.slots; ++chunk) {
    plan.lead += divide_up(plan.cut.steps(chunk, p.taps()), kStageSteps);
  }
  if (!plan.resident && plan.lead >= plan.stages) plan.lead = plan.stages - 1;
  plan.weight_offset = plan.slots * plan.slot_bytes;
  plan.tables_offset = plan.weight_offset + weight_bytes;
  plan.barriers_offset = plan.tables_offset + divide_up(table_bytes, 8) * 8;
  plan.shared_bytes = plan.barriers_offset + 2 * (plan.slots + plan.stages + 1) * 8;
  return nullptr;
}

}  // namespace conv_layout
}  // namespace hflfnerv
