#include "output_stage.h"

#include <algorithm>
#include <utility>
#include <vector>

#include "conv_pixel_shuffle_gelu_amx.h"
#include "convert.h"
#include "output_weights.h"
#include "scratch.h"

namespace hflfnerv {
namespace {

constexpr std::int64_t kBand = 16;  // rows of the frame that are computed from one conversion of the features under them

// A feature and what the kernels need of it.
struct Prepared {
  OutputFeature feature;
  PlanesLayout layout;  // of a thread's memory, for AMX; otherwise pixels one after the other
  Aligned<BFloat16> tiles;
  Aligned<float> vectors;
  std::int64_t pixel = 0, row = 0, steps = 0, offset_bytes = 0;
};

}  // namespace

#if defined(HFLFNERV_HAVE_AVX2)
void output_rows(const OutputRows& rows, [[maybe_unused]] SimdLevel level) {
#if defined(HFLFNERV_HAVE_AVX512)
  if (level == SimdLevel::avx512) return output_rows_avx512(rows);
#endif
  output_rows_avx2(rows);
}
#endif

void output_stage_fwd(const OutputShape& shape, const OutputFeature* features, int count, FloatType type, void* out,
                      bool bytes, int threads, SimdLevel level, bool amx) {
#if defined(HFLFNERV_HAVE_AVX2)
#if !defined(HFLFNERV_HAVE_AMX)
  amx = false;
#endif
  const std::int64_t lanes = lanes_of(level);
  amx = amx && type == FloatType::bf16;
  const std::int64_t element = amx ? 2 : 4;
  std::vector<Prepared> prepared;
  std::int64_t thread_bytes = 0;
  for (int i = 0; i < count; ++i) {
    Prepared p;
    p.feature = features[i];
    if (amx) {
      p.layout = output_layout(features[i].channels, shape.width);
      p.pixel = output_pixel(p.layout);
      p.row = output_row(p.layout);
      p.steps = output_steps(p.pixel);
      p.tiles = output_tiles(features[i].weight, features[i].channels, p.pixel);
    } else {
      p.pixel = features[i].channels;
      p.row = (shape.width + output_vector_margin(lanes)) * p.pixel;
      p.steps = output_vector_steps(p.pixel, lanes);
      p.vectors = output_vectors(features[i].weight, p.pixel, lanes);
    }
    p.offset_bytes = thread_bytes;
    // The last row is zeros.
    thread_bytes += (((kBand + kTaps - 1 + 1) * p.row + kRestMargin) * element + 63) / 64 * 64;
    prepared.push_back(std::move(p));
  }
  const std::int64_t scratch_bytes = output_scratch_floats(shape.groups) * 4;
  const Aligned<float> biases = output_biases(shape.biases, shape.groups);
  const std::int64_t bands = (shape.height + kBand - 1) / kBand, items = shape.batch * bands;
  threads = threads_for(items, threads);
  const Aligned<char> memory = new_zeros<char>((thread_bytes + scratch_bytes) * threads);
  std::vector<OutputStream> streams(static_cast<std::size_t>(count) * static_cast<std::size_t>(threads));
  advise_large_pages(out, static_cast<std::size_t>(shape.batch * shape.height * shape.width * kColours * (bytes ? 1 : 4)));
  parallel_items(items, threads, [&](int thread, std::int64_t item) {
    char* const own = memory.get() + thread * (thread_bytes + scratch_bytes);
    const std::int64_t image = item / bands, first = item % bands * kBand;
    const std::int64_t rows = std::min(kBand, shape.height - first);
    OutputStream* const own_streams = streams.data() + thread * count;
    for (int i = 0; i < count; ++i) {
      const Prepared& p = prepared[static_cast<std::size_t>(i)];
      const OutputFeature& f = p.feature;
      char* const at = own + p.offset_bytes;
      const std::int64_t size = f.channels * f.width, row_bytes = p.row * element;
#if defined(HFLFNERV_HAVE_AMX)
      if (amx) {
        const BFloat16* x = static_cast<const BFloat16*>(f.x) + image * f.height * size;
        BFloat16* const to = reinterpret_cast<BFloat16*>(at);
        convert_rows_amx({x, f.height, f.width, f.channels, first - 1, rows + kTaps - 1, -1}, p.layout, to, to);
      }
#endif
      if (!amx) {
        const std::int64_t width = std::min(f.width, shape.width + 1) * f.channels;
        for (std::int64_t row = 0; row < rows + kTaps - 1; ++row) {
          const std::int64_t y = first - 1 + row;
          float* const to = reinterpret_cast<float*>(at + row * row_bytes) + p.pixel;
          if (y < 0 || y >= f.height) {
            std::fill(to, to + width, 0.0f);
            continue;
          }
          const std::int64_t begin = (image * f.height + y) * size;
          to_floats(type, static_cast<const char*>(f.x) + begin * size_bytes(type), width, to, level);
        }
      }
      // Row 0 is the first of the band here; the memory has the one above it, too.
      const void* const zeros = at + (kBand + kTaps - 1) * row_bytes;
      const void* const weights = amx ? static_cast<const void*>(p.tiles.get()) : p.vectors.get();
      own_streams[i] = {at + row_bytes, p.row, p.pixel, -1, rows + 1, INT64_MAX, zeros, weights, p.steps, f.group};
    }
    const std::int64_t pixel = (image * shape.height + first) * shape.width * kColours;
    void* const to = bytes ? static_cast<void*>(static_cast<std::uint8_t*>(out) + pixel)
                           : static_cast<void*>(static_cast<float*>(out) + pixel);
    const OutputRows task{own_streams, count, shape.groups, shape.scales, biases.get(), shape.offset,
                          &tanh_table(),  0,     rows,         shape.width,  shape.width,  to,           bytes};
#if defined(HFLFNERV_HAVE_AMX)
    if (amx) return output_rows_amx(task, reinterpret_cast<float*>(own + thread_bytes));
#endif
    output_rows(task, level);
  });
#endif
}

}  // namespace hflfnerv
