#include "winograd_output.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "memory.h"
#include "output_weights.h"
#include "scratch.h"

namespace hflfnerv {
namespace {

// Rows of the band before that are kept: the head of a band's last row takes the next band's first.
constexpr std::int64_t kKept = kTaps - 1;

std::int64_t band_rows(const WinogradShape& shape) { return (shape.points + 1 - shape.kernel) * shape.r; }

#if defined(HFLFNERV_HAVE_AVX2)

// Rows of a stream's features in a thread's memory, with a pixel of zeros on the left and zeros on the right.
struct Prepared {
  WinogradBands bands;
  std::int64_t pixel, row, height, offset;
  Aligned<float> weights;
};

#endif

}  // namespace

bool winograd_output_fits(const WinogradStream* streams, int count, SimdLevel level) {
  if (level == SimdLevel::scalar) return false;
  return std::all_of(streams, streams + count,
                     [&](const WinogradStream& s) { return band_rows(s.shape) == band_rows(streams[0].shape); });
}

void winograd_output_fwd(const OutputShape& shape, const WinogradStream* streams, int count, void* out, bool bytes, int threads,
                         SimdLevel level) {
#if defined(HFLFNERV_HAVE_AVX2)
  const std::int64_t lanes = lanes_of(level);
  const std::int64_t rows = band_rows(streams[0].shape);
  std::vector<Prepared> prepared;
  std::int64_t feature_floats = 0, scratch_floats = 0;
  for (const WinogradStream* s = streams; s != streams + count; ++s) {
    const std::int64_t pixel = s->shape.channels, width = s->shape.width * s->shape.r;
    const std::int64_t row = std::max(width + kTaps, shape.width + output_vector_margin(lanes)) * pixel;
    prepared.push_back({WinogradBands(s->shape, s->activation, s->x, s->points, s->bias, row, level), pixel, row,
                        s->shape.height * s->shape.r, feature_floats, output_vectors(s->head, pixel, lanes)});
    // The last row is zeros.
    feature_floats += in_lines((kKept + rows + 1) * row + kRestMargin);
    scratch_floats = std::max(scratch_floats, prepared.back().bands.scratch_floats());
  }
  const Aligned<float> biases = output_biases(shape.biases, shape.groups);
  // The frame's last row takes one more of the features.
  const std::int64_t bands = (shape.height + rows) / rows, floats = feature_floats + scratch_floats;
  threads = threads_for(bands, threads);
  const Aligned<float> memory = new_zeros<float>(floats * threads);
  std::vector<std::int64_t> last(static_cast<std::size_t>(threads), -1);
  std::vector<OutputStream> inputs(static_cast<std::size_t>(count) * static_cast<std::size_t>(threads));
  const std::int64_t frame_row = shape.width * kColours * (bytes ? 1 : 4);
  parallel_items(bands, threads, [&](int thread, std::int64_t band) {
    float* const own = memory.get() + thread * floats;
    float* const scratch = own + feature_floats;
    std::int64_t& done = last[static_cast<std::size_t>(thread)];
    const auto compute = [&](std::int64_t which) {
      for (const Prepared& p : prepared) {
        float* const at = own + p.offset;
        std::memcpy(at, at + rows * p.row, static_cast<std::size_t>(kKept * p.row) * sizeof(float));
        if (which < p.bands.count()) p.bands.run(which, at + kKept * p.row + p.pixel, scratch);
      }
      done = which;
    };
    // A thread begins its part, or another's, with the rows above it.
    if (band > 0 && done != band - 1) compute(band - 1);
    compute(band);
    const std::int64_t top = band * rows;  // of the band among the features
    const std::int64_t begin = std::max<std::int64_t>(0, top - 1);
    const std::int64_t end = band + 1 < bands ? std::min(shape.height, top + rows - 1) : shape.height;
    if (begin >= end) return;
    // Rows are counted from the first one in memory that there is.
    const std::int64_t first = band > 0 ? top - kKept : 0;
    OutputStream* const in = inputs.data() + thread * count;
    for (int i = 0; i < count; ++i) {
      const Prepared& p = prepared[static_cast<std::size_t>(i)];
      const float* const at = own + p.offset;
      in[i] = {at + (band > 0 ? 0 : kKept * p.row), p.row, p.pixel, 0, p.height - first, INT64_MAX,
               at + (kKept + rows) * p.row, p.weights.get(), output_vector_steps(p.pixel, lanes), streams[i].group};
    }
    const OutputRows task{in,            count,         shape.groups, shape.scales, biases.get(),
                          shape.offset,  &tanh_table(), begin - first, end - first,  shape.width,
                          static_cast<char*>(out) + first * frame_row, bytes};
    output_rows(task, level);
  });
#endif
}

}  // namespace hflfnerv
