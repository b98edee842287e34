#include "depthwise_conv2d.h"

#include <algorithm>

#include "depthwise_conv2d_kernels.h"
#include "scratch.h"

namespace hflfnerv {

#if defined(HFLFNERV_HAVE_AVX2)
namespace {

constexpr std::int64_t kBand = 8;  // rows of results that are computed from one tile

const DepthwiseKernels& kernels_of([[maybe_unused]] SimdLevel level) {
#if defined(HFLFNERV_HAVE_AVX512)
  if (level == SimdLevel::avx512) return depthwise_conv2d_kernels_avx512();
#endif
  return depthwise_conv2d_kernels_avx2();
}

// A vector of channels in a band of rows of an image.
struct Part {
  std::int64_t vector, channel, lanes;  // the vector's number, its first channel, and how many there are
  std::int64_t image, band, row, rows;
};

class Parts {
 public:
  Parts(const DepthwiseShape& shape, SimdLevel level)
      : shape_(shape), lanes_(lanes_of(level)) {}

  std::int64_t lanes() const { return lanes_; }
  std::int64_t vectors() const { return (shape_.channels + lanes_ - 1) / lanes_; }
  std::int64_t bands() const { return (shape_.height + kBand - 1) / kBand; }
  std::int64_t count() const { return shape_.batch * bands() * vectors(); }
  std::int64_t taps() const { return shape_.kernel_rows * shape_.kernel_columns; }
  std::int64_t tile_floats() const {
    return (kBand + shape_.kernel_rows - 1) * (shape_.width + shape_.kernel_columns - 1) * lanes_;
  }
  std::int64_t result_floats() const { return kBand * shape_.width * lanes_; }

  Part operator[](std::int64_t item) const {
    const std::int64_t vector = item % vectors(), band = item / vectors() % bands(), channel = vector * lanes_;
    return {vector, channel, std::min(lanes_, shape_.channels - channel), item / vectors() / bands(), band, band * kBand,
            std::min(kBand, shape_.height - band * kBand)};
  }

  DepthwiseTile tile(const Part& part) const { return {part.rows, shape_.width, shape_.kernel_rows, shape_.kernel_columns}; }

  // The rows of a part and those above and below it, with zeros around the image and in lanes that are of no channel.
  void read(const Part& part, const float* images, float* to) const {
    const std::int64_t border = shape_.kernel_columns / 2 * lanes_, first = part.row - shape_.kernel_rows / 2;
    for (std::int64_t row = first; row < first + part.rows + shape_.kernel_rows - 1; ++row) {
      if (row < 0 || row >= shape_.height) {
        to = std::fill_n(to, 2 * border + shape_.width * lanes_, 0.0f);
        continue;
      }
      to = std::fill_n(to, border, 0.0f);
      const float* from = images + pixel(part, row);
      for (std::int64_t w = 0; w < shape_.width; ++w, from += shape_.channels, to += lanes_) {
        std::fill_n(std::copy_n(from, part.lanes, to), lanes_ - part.lanes, 0.0f);
      }
      to = std::fill_n(to, border, 0.0f);
    }
  }

  void write(const Part& part, const float* from, float* images) const {
    for (std::int64_t row = part.row; row < part.row + part.rows; ++row) {
      float* to = images + pixel(part, row);
      for (std::int64_t w = 0; w < shape_.width; ++w, from += lanes_, to += shape_.channels) {
        std::copy_n(from, part.lanes, to);
      }
    }
  }

  // [vector][tap][lane]; in reversed order of taps for the gradient of x.
  Aligned<float> weights(const float* weight, bool reversed) const {
    Aligned<float> ordered = new_zeros<float>(vectors() * taps() * lanes_);
    for (std::int64_t channel = 0; channel < shape_.channels; ++channel) {
      for (std::int64_t tap = 0; tap < taps(); ++tap) {
        const std::int64_t at = (channel / lanes_ * taps() + (reversed ? taps() - 1 - tap : tap)) * lanes_ + channel % lanes_;
        ordered[static_cast<std::size_t>(at)] = weight[channel * taps() + tap];
      }
    }
    return ordered;
  }

 private:
  // Where a row begins.
  std::int64_t pixel(const Part& part, std::int64_t row) const {
    return (part.image * shape_.height + row) * shape_.width * shape_.channels + part.channel;
  }

  const DepthwiseShape shape_;
  const std::int64_t lanes_;
};

}  // namespace

void depthwise_conv2d_fwd(const DepthwiseShape& shape, const float* x, const float* weight, const float* bias, float* y,
                          int threads, SimdLevel level) {
  const Parts parts(shape, level);
  const std::int64_t lanes = parts.lanes();
  const Aligned<float> weights = parts.weights(weight, false), biases = new_zeros<float>(parts.vectors() * lanes);
  if (bias != nullptr) std::copy(bias, bias + shape.channels, biases.get());
  const auto conv = kernels_of(level).conv;
  const std::int64_t floats = parts.tile_floats() + parts.result_floats();
  parallel_items_with_scratch(parts.count(), threads, floats, [&](float* tile, std::int64_t item) {
    const Part part = parts[item];
    float* const results = tile + parts.tile_floats();
    parts.read(part, x, tile);
    const float* const own_weights = weights.get() + part.vector * parts.taps() * lanes;
    conv(parts.tile(part), tile, own_weights, biases.get() + part.channel, results);
    parts.write(part, results, y);
  });
}

void depthwise_conv2d_bwd(const DepthwiseShape& shape, const float* dy, const float* x, const float* weight, float* dx,
                          float* dweight, float* dbias, int threads, SimdLevel level) {
  const Parts parts(shape, level);
  const std::int64_t lanes = parts.lanes(), taps = parts.taps(), sums_of_part = (taps + 1) * lanes;
  const Aligned<float> weights = parts.weights(weight, true), zeros = new_zeros<float>(lanes);
  // Of each part: the sums of all taps, and that of dy.
  const Aligned<float> sums = new_aligned<float>(parts.count() * sums_of_part);
  const DepthwiseKernels& kernels = kernels_of(level);
  const std::int64_t floats = 2 * parts.tile_floats() + parts.result_floats();
  parallel_items_with_scratch(parts.count(), threads, floats, [&](float* slopes, std::int64_t item) {
    const Part part = parts[item];
    const DepthwiseTile tile = parts.tile(part);
    float* const inputs = slopes + parts.tile_floats();
    float* const results = inputs + parts.tile_floats();
    float* const own_sums = sums.get() + item * sums_of_part;
    parts.read(part, dy, slopes);
    if (dx != nullptr) {
      kernels.conv(tile, slopes, weights.get() + part.vector * taps * lanes, zeros.get(), results);
      parts.write(part, results, dx);
    }
    if (dweight != nullptr) {
      parts.read(part, x, inputs);
      kernels.wgrad(tile, inputs, slopes, own_sums);
    }
    if (dbias != nullptr) {
      float* const sum = std::fill_n(own_sums + taps * lanes, lanes, 0.0f) - lanes;
      const float* slope = slopes + (shape.kernel_rows / 2 * tile.tile_width() + shape.kernel_columns / 2) * lanes;
      for (std::int64_t row = 0; row < part.rows; ++row, slope += (tile.tile_width() - shape.width) * lanes) {
        for (std::int64_t w = 0; w < shape.width; ++w, slope += lanes) {
          for (std::int64_t lane = 0; lane < lanes; ++lane) sum[lane] += slope[lane];
        }
      }
    }
  });
  const auto total = [&](std::int64_t channel, std::int64_t tap) {
    double sum = 0;
    for (std::int64_t item = channel / lanes; item < parts.count(); item += parts.vectors()) {
      sum += static_cast<double>(sums[static_cast<std::size_t>(item * sums_of_part + tap * lanes + channel % lanes)]);
    }
    return static_cast<float>(sum);
  };
  for (std::int64_t channel = 0; channel < shape.channels; ++channel) {
    for (std::int64_t tap = 0; dweight != nullptr && tap < taps; ++tap) dweight[channel * taps + tap] = total(channel, tap);
    if (dbias != nullptr) dbias[channel] = total(channel, taps);
  }
}

#else

void depthwise_conv2d_fwd(const DepthwiseShape&, const float*, const float*, const float*, float*, int, SimdLevel) {}
void depthwise_conv2d_bwd(const DepthwiseShape&, const float*, const float*, const float*, float*, float*, float*, int,
                          SimdLevel) {}

#endif

}  // namespace hflfnerv
