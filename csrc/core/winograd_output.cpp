#include "winograd_output.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "memory.h"
#include "output_weights.h"
#include "scratch.h"

namespace hflfnerv {
namespace {

std::int64_t tile_size(const WinogradShape& shape) { return (shape.points + 1 - shape.kernel) * shape.r; }

#if defined(HFLFNERV_HAVE_AVX2)

// Rows of the row of tiles above, and columns of the strip on the left, that a head needs.
constexpr std::int64_t kKept = kTaps - 1;

std::int64_t whole(std::int64_t value, std::int64_t step) { return (value + step - 1) / step * step; }

// A frame in strips, each of some columns of tiles from the frame's top to its bottom. A thread has the features of one row of
// tiles of a strip, with the last rows of the one above. The last columns of a strip are kept for the next one, if that is
// the thread's next one, too; else the two pixels between them, the seam, are left out, and made in the end of columns
// that both strips keep.
class Strips {
 public:
  Strips(const OutputShape& shape, const WinogradStream* streams, int count, void* out, bool bytes, int threads, SimdLevel level)
      : shape_(shape),
        out_(static_cast<char*>(out)),
        bytes_(bytes),
        level_(level),
        biases_(output_biases(shape.biases, shape.groups)) {
    const std::int64_t lanes = lanes_of(level);
    size_ = tile_size(streams[0].shape);
    std::int64_t block = INT64_MAX, widest = 0;
    for (const WinogradStream* s = streams; s != streams + count; ++s) {
      const WinogradBlock of_shape = winograd_block(s->shape, level);
      block = std::min(block, of_shape.most);
      step_ = std::max(step_, of_shape.step);
      widest = std::max(widest, s->shape.width * s->shape.r);
    }
    block = std::max(step_, block / step_ * step_);
    // The last pixel of a row takes one more of the features, where there is one.
    columns_ = (std::min(widest, shape.width + 1) + size_ - 1) / size_;
    // As many strips for each thread, of about the same width.
    count_ = std::min(whole((columns_ + block - 1) / block, threads), whole(columns_, step_) / step_);
    threads_ = threads_for(count_, threads);
    std::int64_t floats = 0, scratch_floats = 0, zeros = 0;
    for (const WinogradStream* s = streams; s != streams + count; ++s) {
      const std::int64_t pixel = s->shape.channels, height = s->shape.height * s->shape.r, width = s->shape.width * s->shape.r;
      // Vectors that end behind a pixel's window read zeros, and blocks of pixels that end behind a row read on.
      const std::int64_t beyond = (lanes + pixel - 1) / pixel, behind = output_vector_margin(lanes) * pixel;
      const std::int64_t row = (kKept + block * size_ + beyond) * pixel, edge_row = (2 * kKept + beyond) * pixel;
      const std::int64_t edge = height * edge_row + behind;
      streams_.push_back({WinogradTiles(s->shape, s->activation, s->x, s->points, s->bias, row, level), pixel, height, width, row,
                          floats, edge_row, edge, new_aligned<float>(std::max<std::int64_t>(1, count_ - 1) * edge),
                          output_vectors(s->head, pixel, lanes), output_vector_steps(pixel, lanes), s->group});
      floats += in_lines((kKept + size_) * row + behind);
      scratch_floats = std::max(scratch_floats, streams_.back().tiles.scratch_floats());
      zeros = std::max(zeros, row + behind);
    }
    features_floats_ = floats;
    own_floats_ = floats + scratch_floats;
    memory_ = new_aligned<float>(own_floats_ * threads_);
    no_row_ = new_zeros<float>(zeros);
    inputs_.resize(streams_.size() * static_cast<std::size_t>(threads_));
    last_.assign(static_cast<std::size_t>(threads_), -1);
    seams_.assign(static_cast<std::size_t>(count_), 0);
  }

  void run() {
    parallel_items(count_, threads_, [&](int thread, std::int64_t strip) {
      std::int64_t& last = last_[static_cast<std::size_t>(thread)];
      const bool next = strip > 0 && last == strip - 1;
      seams_[static_cast<std::size_t>(strip)] = strip > 0 && !next;
      last = strip;
      this->strip(thread, strip, next);
    });
    parallel_items(count_, threads_, [&](int thread, std::int64_t strip) {
      if (seams_[static_cast<std::size_t>(strip)]) seam(thread, strip);
    });
  }

 private:
  struct Stream {
    WinogradTiles tiles;
    std::int64_t pixel, height, width;  // floats of a pixel; pixels of the features
    std::int64_t row, offset;           // in a thread's memory
    std::int64_t edge_row, edge;        // floats of a row at an edge, and of one between two strips
    Aligned<float> edges, weights;      // at an edge: the last columns of a strip, the first of the next, zeros
    std::int64_t steps;
    int group;
    float* edge_at(std::int64_t strip) const { return edges.get() + (strip - 1) * edge; }
  };

  // The column of tiles that a strip begins with.
  std::int64_t begin(std::int64_t strip) const { return std::min(columns_, whole(columns_ * strip / count_, step_)); }

  void strip(int thread, std::int64_t strip, bool next) {
    float* const own = memory_.get() + thread * own_floats_;
    const std::int64_t first = begin(strip), last = begin(strip + 1), left = first * size_, right = last * size_;
    for (const Stream& s : streams_) clear(s, strip, std::min(right, s.width) - left, own + s.offset);
    const std::int64_t from = strip == 0 ? 0 : next ? left - 1 : left + 1;
    const std::int64_t to = strip + 1 == count_ ? shape_.width : right - 1;
    // The frame's last row takes one more of the features.
    const std::int64_t rows = (shape_.height + size_) / size_;
    for (std::int64_t row = 0; row < rows; ++row) {
      const std::int64_t top = row * size_;
      OutputStream* input = inputs(thread);
      for (const Stream& s : streams_) {
        float* const at = own + s.offset;
        if (row > 0) std::memcpy(at, at + size_ * s.row, floats_size(kKept * s.row));
        if (row < s.tiles.rows()) {
          const std::int64_t end = std::min(last, s.tiles.columns());
          float* const features = at + kKept * (s.row + s.pixel);
          if (first < end) s.tiles.run(row, first, end, features, own + features_floats_);
          keep_edges(s, strip, next, right - left, top, at + kKept * s.row);
        }
        // Rows are counted from the first one in memory.
        *input++ = {at + (from - left + kKept - 1) * s.pixel, s.row, s.pixel, row > 0 ? 0 : kKept, s.height - top + kKept,
                    INT64_MAX, no_row_.get(), s.weights.get(), s.steps, s.group};
      }
      const std::int64_t begin = std::max<std::int64_t>(0, top - 1);
      const std::int64_t end = row + 1 < rows ? std::min(shape_.height, top + size_ - 1) : shape_.height;
      draw(thread, top - kKept, begin, end, from, to);
    }
  }

  // Clears what no tile of a strip writes: left of the frame, and behind its `width` pixels, which may be less than none.
  static void clear(const Stream& s, std::int64_t strip, std::int64_t width, float* at) {
    const std::int64_t used = (kKept + std::max<std::int64_t>(0, width)) * s.pixel;
    const std::int64_t rows = kKept + s.tiles.size();
    for (std::int64_t row = 0; row < rows; ++row) {
      float* const to = at + row * s.row;
      if (strip == 0) std::fill(to, to + kKept * s.pixel, 0.0f);
      std::fill(to + used, to + s.row, 0.0f);
    }
  }

  // Of a row of tiles, `features` with the columns on their left: takes these from the strip before, and keeps the others'.
  void keep_edges(const Stream& s, std::int64_t strip, bool next, std::int64_t width, std::int64_t top, float* features) const {
    const std::int64_t rows = std::min(size_, s.height - top), kept = kKept * s.pixel;
    for (std::int64_t row = 0; row < rows; ++row) {
      float* const at = features + row * s.row;
      if (strip > 0) {
        float* const edge = s.edge_at(strip) + (top + row) * s.edge_row;
        if (next) {
          std::memcpy(at, edge, floats_size(kept));
        } else {
          std::memcpy(edge + kept, at + kept, floats_size(kept));
        }
      }
      if (strip + 1 < count_) {
        float* const edge = s.edge_at(strip + 1) + (top + row) * s.edge_row;
        std::memcpy(edge, at + width * s.pixel, floats_size(kept));
        std::fill(edge + 2 * kept, edge + s.edge_row, 0.0f);
      }
    }
  }

  // The pixels left and right of where a strip begins.
  void seam(int thread, std::int64_t strip) {
    const std::int64_t left = begin(strip) * size_;
    OutputStream* input = inputs(thread);
    for (const Stream& s : streams_) {
      *input++ = {s.edge_at(strip), s.edge_row,      s.pixel, 0,      s.height, INT64_MAX,
                  no_row_.get(),    s.weights.get(), s.steps, s.group};
    }
    draw(thread, 0, 0, shape_.height, left - 1, std::min(shape_.width, left + 1));
  }

  OutputStream* inputs(int thread) { return inputs_.data() + static_cast<std::size_t>(thread) * streams_.size(); }

  // Rows [begin, end) and columns [from, to) of the frame from a thread's inputs, whose row 0 is the frame's row `first`.
  void draw(int thread, std::int64_t first, std::int64_t begin, std::int64_t end, std::int64_t from, std::int64_t to) {
    if (begin >= end || from >= to) return;
    const std::int64_t at = (first * shape_.width + from) * kColours * (bytes_ ? 1 : 4);
    output_rows({inputs(thread), static_cast<int>(streams_.size()), shape_.groups, shape_.scales, biases_.get(), shape_.offset,
                 &tanh_table(), begin - first, end - first, to - from, shape_.width, out_ + at, bytes_},
                level_);
  }

  static std::size_t floats_size(std::int64_t count) { return static_cast<std::size_t>(count) * sizeof(float); }

  const OutputShape& shape_;
  char* const out_;
  const bool bytes_;
  const SimdLevel level_;
  const Aligned<float> biases_;
  std::int64_t size_ = 0, step_ = 1, columns_ = 0, count_ = 0;  // of tiles; and strips
  int threads_ = 1;
  std::vector<Stream> streams_;
  std::int64_t features_floats_ = 0, own_floats_ = 0;
  Aligned<float> memory_, no_row_;
  std::vector<OutputStream> inputs_;  // of each thread, of each stream
  std::vector<std::int64_t> last_;    // strip of each thread
  std::vector<char> seams_;           // whether there is one on a strip's left
};

#endif

}  // namespace

bool winograd_output_fits(const WinogradStream* streams, int count, SimdLevel level) {
  if (level == SimdLevel::scalar) return false;
  return std::all_of(streams, streams + count,
                     [&](const WinogradStream& s) { return tile_size(s.shape) == tile_size(streams[0].shape); });
}

void winograd_output_fwd(const OutputShape& shape, const WinogradStream* streams, int count, void* out, bool bytes, int threads,
                         SimdLevel level) {
#if defined(HFLFNERV_HAVE_AVX2)
  Strips(shape, streams, count, out, bytes, threads, level).run();
#endif
}

}  // namespace hflfnerv
