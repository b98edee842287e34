// Tests of the output stage and of the frame decoder in csrc/core without Python, meant to be built with
// -fsanitize=address,undefined: against plain loops in float32, at sizes that no vector, tile or band divides.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#include "core/conv_pixel_shuffle_gelu.h"
#include "core/frame_decoder.h"
#include "core/output_stage.h"
#include "core/pixel_shuffle_gelu.h"
#include "tests/bfloat16.h"
#include "tests/check.h"

namespace {

using namespace hflfnerv;

std::mt19937 generator(1);

// All values are numbers of bfloat16, so that nothing is rounded on the way in.
std::vector<float> random(std::int64_t count, float scale) {
  std::normal_distribution<float> normal(0, scale);
  std::vector<float> values(static_cast<std::size_t>(count));
  for (float& value : values) value = widen(narrow(normal(generator)));
  return values;
}

std::vector<BFloat16> narrowed(const std::vector<float>& values) {
  std::vector<BFloat16> result;
  for (const float value : values) result.push_back(narrow(value));
  return result;
}

// Channels-last, zero outside.
struct Image {
  std::int64_t channels, height, width;
  std::vector<float> values;
  float at(std::int64_t c, std::int64_t y, std::int64_t x) const {
    if (y < 0 || y >= height || x < 0 || x >= width) return 0;
    return values[static_cast<std::size_t>((y * width + x) * channels + c)];
  }
};

// The weight is [channels out, row, column, channels in], as channels-last memory has it.
float convolve(const Image& in, const std::vector<float>& weight, std::int64_t n, std::int64_t kernel, std::int64_t y,
               std::int64_t x) {
  float sum = 0;
  for (std::int64_t tap = 0; tap < kernel * kernel; ++tap) {
    for (std::int64_t c = 0; c < in.channels; ++c) {
      sum += in.at(c, y + tap / kernel - kernel / 2, x + tap % kernel - kernel / 2) *
             weight[static_cast<std::size_t>((n * kernel * kernel + tap) * in.channels + c)];
    }
  }
  return sum;
}

// Head weights lie as [3, channels, 3, 3].
std::vector<float> head_of(const std::vector<float>& weight, std::int64_t channels) {
  std::vector<float> head(weight.size());
  for (std::int64_t i = 0; i < static_cast<std::int64_t>(weight.size()); ++i) {
    const std::int64_t c = i % channels, tap = i / channels % 9, n = i / channels / 9;
    head[static_cast<std::size_t>((n * channels + c) * 9 + tap)] = weight[static_cast<std::size_t>(i)];
  }
  return head;
}

struct Link {
  std::vector<float> scales, biases;
  float offset;
  OutputShape shape(std::int64_t height, std::int64_t width) const {
    return {1, height, width, static_cast<int>(scales.size()), scales.data(), biases.data(), offset};
  }
};

// The frame of features, weights [3, row, column, channels] and groups.
float frame_at(const Link& link, const std::vector<Image>& features, const std::vector<std::vector<float>>& weights,
               const std::vector<int>& groups, std::int64_t y, std::int64_t x, std::int64_t colour) {
  float value = link.offset;
  for (std::size_t group = 0; group < link.scales.size(); ++group) {
    float sum = link.biases[group * 3 + static_cast<std::size_t>(colour)];
    for (std::size_t i = 0; i < features.size(); ++i) {
      if (groups[i] == static_cast<int>(group)) sum += convolve(features[i], weights[i], colour, 3, y, x);
    }
    value += link.scales[group] * std::tanh(sum);
  }
  return value;
}

void check_frame(const Link& link, const std::vector<Image>& features, const std::vector<std::vector<float>>& weights,
                 const std::vector<int>& groups, std::int64_t height, std::int64_t width, const std::vector<float>& floats,
                 const std::vector<std::uint8_t>& bytes, float tolerance) {
  for (std::int64_t i = 0; i < height * width * 3; ++i) {
    const float value = frame_at(link, features, weights, groups, i / 3 / width, i / 3 % width, i % 3);
    CHECK(std::abs(floats[static_cast<std::size_t>(i)] - value) <= tolerance);
    const float level = 255 * std::min(std::max(value, 0.0f), 1.0f);
    CHECK(std::abs(static_cast<float>(bytes[static_cast<std::size_t>(i)]) - level) <= 0.5f + 256 * tolerance);
  }
}

void check_output_stage(const std::vector<Image>& features, const std::vector<int>& groups, const Link& link,
                        std::int64_t height, std::int64_t width) {
  std::vector<std::vector<float>> weights, heads;
  std::vector<std::vector<BFloat16>> halves;
  for (const Image& image : features) {
    weights.push_back(random(27 * image.channels, 0.2f / std::sqrt(static_cast<float>(image.channels))));
    heads.push_back(head_of(weights.back(), image.channels));
    halves.push_back(narrowed(image.values));
  }
  struct Path {
    FloatType type;
    SimdLevel level;
    bool amx;
  };
  std::vector<Path> paths;
  for (const SimdLevel level : {SimdLevel::avx2, SimdLevel::avx512}) {
    if (level > pixel_shuffle_gelu_level()) continue;
    paths.push_back({FloatType::f32, level, false});
    paths.push_back({FloatType::bf16, level, false});
  }
  if (amx_unavailable() == nullptr) paths.push_back({FloatType::bf16, SimdLevel::avx512, true});
  for (const Path& path : paths) {
    std::vector<OutputFeature> given;
    for (std::size_t i = 0; i < features.size(); ++i) {
      const void* const x = path.type == FloatType::f32 ? static_cast<const void*>(features[i].values.data())
                                                        : static_cast<const void*>(halves[i].data());
      given.push_back({x, features[i].channels, features[i].height, features[i].width, heads[i].data(), groups[i]});
    }
    std::vector<float> floats(static_cast<std::size_t>(height * width * 3), NAN);
    std::vector<std::uint8_t> bytes(floats.size());
    const OutputShape shape = link.shape(height, width);
    const int count = static_cast<int>(given.size());
    output_stage_fwd(shape, given.data(), count, path.type, floats.data(), false, 2, path.level, path.amx);
    output_stage_fwd(shape, given.data(), count, path.type, bytes.data(), true, 2, path.level, path.amx);
    check_frame(link, features, weights, groups, height, width, floats, bytes, 1e-5f);
  }
}

Image random_image(std::int64_t channels, std::int64_t height, std::int64_t width) {
  return {channels, height, width, random(channels * height * width, 1.0f)};
}

void test_output_stage() {
  const Link one{{0.5f}, {0.1f, -0.2f, 0.0f}, 0.5f}, two{{1.0f, 0.5f}, {0.1f, -0.2f, 0, 0, 0.3f, -0.1f}, 0.5f};
  check_output_stage({random_image(28, 19, 83)}, {0}, one, 19, 83);
  check_output_stage({random_image(1, 1, 1)}, {0}, one, 1, 1);
  check_output_stage({random_image(40, 7, 90)}, {0}, one, 5, 81);
  check_output_stage({random_image(24, 9, 20), random_image(5, 10, 18), random_image(2, 9, 30)}, {0, 1, 1}, two, 9, 17);
}

struct BlockSizes {
  std::int64_t channels, r, kernel;
};

// One stream of the decoder, and the features that plain loops make of its input.
struct TestStream {
  DecoderStream stream;
  std::vector<std::vector<BFloat16>> weights;
  std::vector<std::vector<float>> biases;
  std::vector<float> head, input;
  Image features;
  std::vector<float> head_weight;
};

void make_stream(TestStream& made, std::int64_t channels, std::int64_t height, std::int64_t width,
                 const std::vector<BlockSizes>& blocks, int group) {
  Image image = random_image(channels, height, width);
  made.input.resize(image.values.size());
  for (std::int64_t c = 0; c < channels; ++c) {
    for (std::int64_t i = 0; i < height * width; ++i) {
      made.input[static_cast<std::size_t>(c * height * width + i)] = image.at(c, i / width, i % width);
    }
  }
  made.stream = {height, width, {}, nullptr, group};
  for (const BlockSizes& b : blocks) {
    const std::int64_t n = b.channels * b.r * b.r, taps = b.kernel * b.kernel;
    const auto weight = random(n * taps * image.channels, 1.5f / std::sqrt(static_cast<float>(taps * image.channels)));
    made.weights.push_back(narrowed(weight));
    made.biases.push_back(random(n, 0.2f));
    made.stream.blocks.push_back({image.channels, b.channels, b.r, b.kernel, false, made.weights.back().data(),
                                  made.biases.back().data()});
    Image next{b.channels, image.height * b.r, image.width * b.r, {}};
    for (std::int64_t y = 0; y < next.height; ++y) {
      for (std::int64_t x = 0; x < next.width; ++x) {
        for (std::int64_t c = 0; c < b.channels; ++c) {
          const std::int64_t column = (c * b.r + y % b.r) * b.r + x % b.r;
          const float z = convolve(image, weight, column, b.kernel, y / b.r, x / b.r) +
                          made.biases.back()[static_cast<std::size_t>(column)];
          next.values.push_back(widen(narrow(0.5f * z * std::erfc(-z / std::sqrt(2.0f)))));
        }
      }
    }
    image = next;
  }
  made.head_weight = random(27 * image.channels, 0.3f / std::sqrt(static_cast<float>(image.channels)));
  made.head = head_of(made.head_weight, image.channels);
  made.stream.head = made.head.data();
  made.features = image;
}

void check_decoder(std::vector<TestStream>& made, const Link& link, std::int64_t height, std::int64_t width) {
  std::vector<DecoderStream> streams;
  std::vector<const float*> inputs;
  std::vector<Image> features;
  std::vector<std::vector<float>> weights;
  std::vector<int> groups;
  for (const TestStream& stream : made) {
    streams.push_back(stream.stream);
    inputs.push_back(stream.input.data());
    features.push_back(stream.features);
    weights.push_back(stream.head_weight);
    groups.push_back(stream.stream.group);
  }
  FrameDecoder decoder(link.shape(height, width), streams, 2);
  std::vector<float> floats(static_cast<std::size_t>(height * width * 3), NAN), again(floats.size());
  std::vector<std::uint8_t> bytes(floats.size());
  decoder.decode(inputs.data(), floats.data(), false, 1);
  decoder.decode(inputs.data(), bytes.data(), true, 2);
  // A frame that is not finite leaves nothing behind.
  std::vector<std::vector<float>> broken;
  std::vector<const float*> broken_inputs;
  for (const TestStream& stream : made) broken.emplace_back(stream.input.size(), NAN);
  for (const std::vector<float>& input : broken) broken_inputs.push_back(input.data());
  decoder.decode(broken_inputs.data(), again.data(), false, 2);
  decoder.decode(inputs.data(), again.data(), false, 3);
  CHECK(std::memcmp(floats.data(), again.data(), floats.size() * sizeof(float)) == 0);
  // Sums in another order round a few activations to the other neighbour.
  check_frame(link, features, weights, groups, height, width, floats, bytes, 4e-3f);
}

void test_frame_decoder() {
  if (const char* reason = amx_unavailable()) {
    std::printf("frame_decoder: not tested: %s\n", reason);
    return;
  }
  const Link one{{0.5f}, {0.1f, -0.2f, 0.0f}, 0.5f}, two{{1.0f, 0.5f}, {0.1f, -0.2f, 0, 0, 0.3f, -0.1f}, 0.5f};
  std::vector<TestStream> streams(1);
  make_stream(streams[0], 35, 3, 5, {{33, 3, 1}, {40, 2, 3}, {28, 2, 5}}, 0);
  check_decoder(streams, one, 36, 60);
  check_decoder(streams, one, 25, 41);
  check_decoder(streams, one, 1, 1);
  streams = std::vector<TestStream>(3);
  make_stream(streams[0], 6, 4, 5, {{12, 5, 3}, {24, 1, 5}}, 0);
  make_stream(streams[1], 3, 10, 11, {{5, 2, 3}}, 1);
  make_stream(streams[2], 64, 7, 9, {{10, 3, 3}}, 1);
  check_decoder(streams, two, 20, 21);
  // Rows of whole tiles, and a last step that has more elements than a pixel.
  for (const std::int64_t channels : {1, 3, 14, 23}) {
    streams = std::vector<TestStream>(1);
    make_stream(streams[0], 5, 39, 80, {{channels, 1, 3}}, 0);
    check_decoder(streams, one, 39, 80);
  }
}

}  // namespace

int main() {
  test_output_stage();
  test_frame_decoder();
  std::printf("frame_decoder: ok\n");
  return 0;
}
