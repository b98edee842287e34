#include "frame_decoder.h"

#if defined(HFLFNERV_HAVE_AMX)

#include <algorithm>
#include <cstring>

#include "output_weights.h"
#include "parallel.h"

namespace hflfnerv {
namespace {

constexpr std::int64_t kBand = 8;                  // rows of the frame that are finished together
constexpr std::int64_t kItemsPerThread = 4;        // at least, so that threads finish together
constexpr std::int64_t kChunkBytes = 1 << 19;      // of weights that stay in the second cache

std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

// A block's input, zeros around it included, and how much of its output is needed.
struct Stage {
  DecoderBlock block{};
  std::int64_t height = 0, width = 0;  // of the image
  std::int64_t rows = 0, columns = 0;  // of the image under the outputs that are needed
  PlanesLayout layout;
  Aligned<BFloat16> plane, rest;
  std::unique_ptr<ConvKernel> kernel;

  std::int64_t padding() const { return block.kernel / 2; }
  PlanesPointer in() const { return {plane.get(), rest.get() + kRestMargin}; }
  // The image's first pixel.
  ConvOutput out() {
    return {plane.get() + padding() * (layout.plane_row() + kStep),
            rest.get() + kRestMargin + padding() * (layout.rest_row() + layout.rest), INT64_MAX};
  }
};

}  // namespace

class FrameDecoder::Stream {
 public:
  Stream(const DecoderStream& stream, std::int64_t frame_height, std::int64_t frame_width, int threads)
      : group_(stream.group), channels_(stream.blocks.back().channels) {
    std::int64_t height = stream.height, width = stream.width;
    for (const DecoderBlock& block : stream.blocks) {
      Stage stage;
      stage.block = block;
      stage.height = height;
      stage.width = width;
      stages_.push_back(std::move(stage));
      height *= block.r;
      width *= block.r;
    }
    height_ = height;
    // From the frame back to the first block: what is needed of each.
    std::int64_t rows = std::min(height, frame_height + 1), columns = std::min(width, frame_width + 1);
    for (std::size_t i = stages_.size(); i-- > 0;) {
      Stage& stage = stages_[i];
      stage.rows = ceil_div(rows, stage.block.r);
      stage.columns = ceil_div(columns, stage.block.r);
      rows = std::min(stage.height, stage.rows + stage.padding());
      columns = std::min(stage.width, stage.columns + stage.padding());
    }
    std::int64_t written_rows = stream.height, written_columns = stream.width;
    for (Stage& stage : stages_) {
      const std::int64_t kernel = stage.block.kernel;
      stage.layout = split_channels(stage.block.in_channels, kernel * kernel);
      stage.layout.columns =
          std::max(ceil_div(stage.columns, kTile) * kTile + kernel - 1, stage.padding() + written_columns);
      const std::int64_t memory_rows = std::max(stage.rows + kernel - 1, stage.padding() + written_rows);
      stage.plane = new_zeros<BFloat16>(memory_rows * stage.layout.plane_row());
      stage.rest = new_zeros<BFloat16>(memory_rows * stage.layout.rest_row() + 2 * kRestMargin);
      written_rows = stage.rows * stage.block.r;
      written_columns = stage.columns * stage.block.r;
    }
    features_ = output_layout(channels_, frame_width);
    features_.columns = std::max(features_.columns, 1 + written_columns);
    head_ = output_tiles(stream.head, channels_, output_pixel(features_));
    zeros_ = new_zeros<BFloat16>(output_row(features_) + kRestMargin);
    ring_ = (kBand + 1) / stages_.back().block.r + 2;
    for (std::size_t i = 0; i < stages_.size(); ++i) {
      const DecoderBlock& b = stages_[i].block;
      const PlanesLayout& next = i + 1 < stages_.size() ? stages_[i + 1].layout : features_;
      stages_[i].kernel =
          std::make_unique<ConvKernel>(ConvSizes{b.in_channels, b.channels, b.r, b.kernel, b.kernel},
                                       &gelu_table(b.tanh_form, false), ConvWeight{b.weight}, b.bias, stages_[i].layout,
                                       planes_output(next), threads);
    }
  }

  std::int64_t ring_elements() const {
    return ring_ * last().block.r * output_row(features_) + kRestMargin;
  }
  std::int64_t scratch_bytes() const {
    std::int64_t most = 0;
    for (const Stage& stage : stages_) most = std::max(most, stage.kernel->plan().scratch_bytes());
    return ceil_div(most, 64) * 64;
  }

  void load(const float* input) {
    Stage& stage = stages_.front();
    const ConvOutput to = stage.out();
    const std::int64_t channels = stage.block.in_channels, cells = stage.height * stage.width;
    for (std::int64_t c = 0; c < channels; ++c) {
      const std::int64_t group = c / kStep;
      for (std::int64_t cell = 0; cell < cells; ++cell) {
        const std::int64_t y = cell / stage.width, x = cell % stage.width;
        BFloat16* const at =
            group < stage.layout.groups
                ? to.plane + y * stage.layout.plane_row() + (group * stage.layout.columns + x) * kStep + c % kStep
                : to.rest + y * stage.layout.rest_row() + x * stage.layout.rest + c % kStep;
        *at = to_bfloat16(input[c * cells + cell]);
      }
    }
  }

  // All blocks but the last.
  template <class Scratch>
  void run(int threads, const Scratch& scratch) {
    for (std::size_t i = 0; i + 1 < stages_.size(); ++i) {
      const Stage& stage = stages_[i];
      const ConvPlan& plan = stage.kernel->plan();
      const ConvOutput out = stages_[i + 1].out();
      const std::int64_t quads = ceil_div(stage.rows, kBlockTiles);
      const std::int64_t packed_bytes = plan.tiles * plan.tile_elements() * 2;
      const std::int64_t chunks = std::min(
          plan.tiles, std::max(ceil_div(kItemsPerThread * threads, quads), ceil_div(packed_bytes, kChunkBytes)));
      parallel_items(quads * chunks, threads, [&](int thread, std::int64_t item) {
        const std::int64_t chunk = item / quads, row = item % quads * kBlockTiles;
        conv_rows_amx(plan,
                      {stage.in(), out, row, std::min(row + kBlockTiles, stage.rows), stage.columns,
                       plan.tiles * chunk / chunks, plan.tiles * (chunk + 1) / chunks},
                      scratch(thread));
      });
    }
  }

  // Rows of the last block's input under the frame's rows [begin, end) and the head's kernel.
  std::int64_t first_row(std::int64_t begin) const { return std::max<std::int64_t>(begin - 1, 0) / last().block.r; }
  std::int64_t end_row(std::int64_t end) const { return std::min(end / last().block.r + 1, last().rows); }

  // The last block, rows [begin, end) of its input, into a ring.
  void run_last(std::int64_t begin, std::int64_t end, BFloat16* ring, void* scratch) const {
    if (begin >= end) return;
    const ConvPlan& plan = last().kernel->plan();
    BFloat16* const pixel = ring + output_pixel(features_);
    conv_rows_amx(plan, {last().in(), {pixel, pixel, ring_}, begin, end, last().columns, 0, plan.tiles}, scratch);
  }

  OutputStream output(const BFloat16* ring) const {
    return {ring,   output_row(features_),      output_pixel(features_), 0,
            height_, ring_ * last().block.r,     zeros_.get(),            head_.get(),
            output_steps(output_pixel(features_)), group_};
  }

 private:
  const Stage& last() const { return stages_.back(); }

  int group_;
  std::int64_t channels_, height_ = 0;
  std::vector<Stage> stages_;
  PlanesLayout features_;  // of the last block's output
  std::int64_t ring_ = 0;  // rows of the last block's input whose output is kept
  Aligned<BFloat16> head_, zeros_;
};

// What a thread keeps of the last blocks' outputs.
struct FrameDecoder::Rings {
  std::vector<Aligned<BFloat16>> features;  // of the streams
  std::vector<OutputStream> outputs;        // how the output stage finds them
  std::vector<std::int64_t> end;            // of the rows of input that were computed
  std::int64_t next = -1;                   // the band that they lead to
  Aligned<char> scratch;
  Aligned<float> products;
};

FrameDecoder::FrameDecoder(const OutputShape& shape, const std::vector<DecoderStream>& streams, int threads)
    : shape_(shape), scales_(shape.scales, shape.scales + shape.groups), biases_(output_biases(shape.biases, shape.groups)) {
  shape_.scales = scales_.data();
  shape_.biases = nullptr;
  for (const DecoderStream& stream : streams) {
    streams_.push_back(std::make_unique<Stream>(stream, shape.height, shape.width, threads));
  }
}

FrameDecoder::~FrameDecoder() = default;

void FrameDecoder::decode(const float* const* inputs, void* out, bool bytes, int threads) {
  const std::lock_guard<std::mutex> lock(mutex_);
  threads = std::max(threads, 1);
  while (rings_.size() < static_cast<std::size_t>(threads)) {
    Rings rings;
    std::int64_t scratch = 0;
    for (const auto& stream : streams_) {
      rings.features.push_back(new_zeros<BFloat16>(stream->ring_elements()));
      rings.outputs.push_back(stream->output(rings.features.back().get()));
      scratch = std::max(scratch, stream->scratch_bytes());
    }
    rings.end.assign(streams_.size(), 0);
    rings.scratch = new_zeros<char>(scratch);
    rings.products = new_zeros<float>(output_scratch_floats(shape_.groups));
    rings_.push_back(std::move(rings));
  }
  for (std::size_t i = 0; i < streams_.size(); ++i) {
    streams_[i]->load(inputs[i]);
    streams_[i]->run(threads, [&](int thread) { return rings_[static_cast<std::size_t>(thread)].scratch.get(); });
  }
  for (Rings& rings : rings_) rings.next = -1;
  parallel_items(ceil_div(shape_.height, kBand), threads, [&](int thread, std::int64_t band) {
    Rings& rings = rings_[static_cast<std::size_t>(thread)];
    const std::int64_t begin = band * kBand, end = std::min(begin + kBand, shape_.height);
    for (std::size_t i = 0; i < streams_.size(); ++i) {
      // After the band before, only the new rows are missing.
      const std::int64_t from = rings.next == band ? rings.end[i] : streams_[i]->first_row(begin);
      rings.end[i] = streams_[i]->end_row(end);
      streams_[i]->run_last(from, rings.end[i], rings.features[i].get(), rings.scratch.get());
    }
    rings.next = band + 1;
    output_rows_amx({rings.outputs.data(), static_cast<int>(streams_.size()), shape_.groups, scales_.data(), biases_.get(),
                     shape_.offset, &tanh_table(), begin, end, shape_.width, shape_.width, out, bytes},
                    rings.products.get());
  });
}

}  // namespace hflfnerv

#endif
