// A video network's decoders on AMX: from the stems' output to the frame, in bfloat16 with float32 sums.
//
// What one block writes is what the next one reads, zeros around it included, in memory that is kept from frame to frame;
// the last blocks and the output stage run together, a few rows at a time, so that the largest activations never leave the
// second cache.
#pragma once

#include <memory>
#include <mutex>
#include <vector>

#include "conv_kernel.h"
#include "output_stage.h"

namespace hflfnerv {

// An upsampling block whose convolution keeps the size of the image.
struct DecoderBlock {
  std::int64_t in_channels, channels, r, kernel;
  bool tanh_form;
  const BFloat16* weight;  // channels-last
  const float* bias;       // one float per output channel of the convolution, or null
};

struct DecoderStream {
  std::int64_t height, width;        // of the first block's input
  std::vector<DecoderBlock> blocks;  // at least one
  const float* head;                 // [3, channels of the last block, 3, 3]
  int group;
};

class FrameDecoder {
 public:
  // Streams are in the order of their groups, and their images are at least as large as the frame. Nothing given is
  // needed afterwards.
  FrameDecoder(const OutputShape& shape, const std::vector<DecoderStream>& streams, int threads);
  ~FrameDecoder();

  // inputs[i] is the first block's input of stream i, [channels, height, width]. `out` is [height, width, 3], of bytes or
  // floats. One frame at a time: a second caller waits.
  void decode(const float* const* inputs, void* out, bool bytes, int threads);

  std::size_t streams() const { return streams_.size(); }

 private:
  class Stream;
  struct Rings;

  OutputShape shape_;
  std::vector<float> scales_;
  Aligned<float> biases_;
  std::vector<std::unique_ptr<Stream>> streams_;
  std::vector<Rings> rings_;  // of the threads
  std::mutex mutex_;
};

}  // namespace hflfnerv
