#include "conv2d_head.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "conv2d_head_kernels.h"
#include "convert.h"
#include "output_weights.h"
#include "scratch.h"

namespace hflfnerv {

#if defined(HFLFNERV_HAVE_AVX2)
namespace {

constexpr std::int64_t kBand = 16;  // rows that are computed one after the other

const HeadKernels& kernels_of([[maybe_unused]] SimdLevel level) {
#if defined(HFLFNERV_HAVE_AVX512)
  if (level == SimdLevel::avx512) return conv2d_head_kernels_avx512();
#endif
  return conv2d_head_kernels_avx2();
}

// The element of the weight that belongs to a row and column of the kernel.
float weight_at(const HeadShape& shape, const float* weight, std::int64_t colour, std::int64_t channel, std::int64_t tap) {
  return weight[(colour * shape.channels + channel) * kHeadTaps * kHeadTaps + tap];
}

struct Band {
  std::int64_t image, first, rows;
};

// Bands of all images; items are divided by the shape alone.
struct Bands {
  explicit Bands(const HeadShape& shape)
      : height(shape.height), per_image((shape.height + kBand - 1) / kBand), count(shape.batch * per_image) {}
  Band operator[](std::int64_t item) const {
    const std::int64_t first = item % per_image * kBand;
    return {item / per_image, first, std::min(kBand, height - first)};
  }
  std::int64_t height, per_image, count;
};

// Rows of all images, one after the other, of `size` elements each.
struct Rows {
  FloatType type;
  std::int64_t size;
  const void* at(const void* data, std::int64_t row) const {
    return static_cast<const char*>(data) + row * size * size_bytes(type);
  }
  void* at(void* data, std::int64_t row) const { return static_cast<char*>(data) + row * size * size_bytes(type); }
  std::size_t bytes() const { return static_cast<std::size_t>(size * size_bytes(type)); }
};

}  // namespace

void conv2d_head_fwd(const HeadShape& shape, const void* x, const float* weight, const float* bias, void* y, int threads,
                     SimdLevel level) {
  const Bands bands(shape);
  const std::int64_t lanes = lanes_of(level), steps = output_vector_steps(shape.channels, lanes);
  const Aligned<float> weights = output_vectors(weight, shape.channels, lanes);
  constexpr float kNone[kHeadColours] = {};
  const Aligned<float> biases = output_biases(bias != nullptr ? bias : kNone, 1);
  const Rows in{shape.type, shape.width * shape.channels}, out{shape.type, shape.width * kHeadColours};
  const bool direct = shape.type == FloatType::f32;
  const Aligned<float> zeros = new_zeros<float>(in.size);
  const auto kernel = kernels_of(level).fwd;
  // What is beyond the ends of a row, and a row of y where those are not floats.
  const std::int64_t edges = kHeadTaps * steps * lanes, floats = edges + (direct ? 0 : out.size);
  parallel_items_with_scratch(bands.count, threads, floats, [&](float* edge, std::int64_t item) {
    const Band band = bands[item];
    for (std::int64_t i = band.first; i < band.first + band.rows; ++i) {
      const std::int64_t row = band.image * shape.height + i;
      const void* const above = i > 0 ? in.at(x, row - 1) : zeros.get();
      const void* const below = i + 1 < shape.height ? in.at(x, row + 1) : zeros.get();
      float* const to = direct ? static_cast<float*>(out.at(y, row)) : edge + edges;
      kernel({shape.type, shape.channels, shape.width, steps, weights.get(), {above, in.at(x, row), below}, biases.get(), to,
              edge});
      if (!direct) from_floats(shape.type, to, out.size, out.at(y, row), level);
    }
  });
}

void conv2d_head_bwd(const HeadShape& shape, const void* dy, const void* x, const float* weight, void* dx,
                     float* dweight, float* dbias, int threads, SimdLevel level) {
  const Bands bands(shape);
  const std::int64_t lanes = lanes_of(level), channels = shape.channels;
  std::vector<std::int64_t> first;
  for (std::int64_t c = 0; c < channels; c += lanes) first.push_back(std::max<std::int64_t>(0, std::min(c, channels - lanes)));
  const std::int64_t vectors = static_cast<std::int64_t>(first.size());
  const Aligned<float> weights = new_zeros<float>(vectors * kHeadProducts * lanes);
  for (std::int64_t k = 0; k < vectors * kHeadProducts; ++k) {
    // Rows and columns of dy, from those above and left of a pixel on, are those of the kernel in reversed order.
    const std::int64_t begin = first[static_cast<std::size_t>(k / kHeadProducts)], place = k % kHeadProducts;
    const std::int64_t tap = kHeadTaps * kHeadTaps - 1 - place / kHeadColours;
    for (std::int64_t lane = 0; lane < std::min(lanes, channels); ++lane) {
      weights[static_cast<std::size_t>(k * lanes + lane)] =
          weight_at(shape, weight, place % kHeadColours, begin + lane, tap);
    }
  }
  const Rows in{shape.type, shape.width * channels}, out{shape.type, shape.width * kHeadColours};
  const std::int64_t padded = out.size + 2 * kHeadColours, slopes = (kBand + kHeadTaps - 1) * padded;
  const std::int64_t products = kHeadProducts * channels;
  // Rows of pixels that fill no vector get a margin.
  const bool copied = channels < lanes;
  const std::int64_t copy = copied ? in.size + lanes : 0;
  // Rows of dy with zeros around them, sums of a row, and a row of x and one of dx.
  const std::int64_t floats = slopes + products + 2 * copy;
  std::vector<double> sums(static_cast<std::size_t>(bands.count * (products + kHeadColours)), 0.0);
  if (dx != nullptr) advise_large_pages(dx, static_cast<std::size_t>(shape.batch * shape.height) * in.bytes());
  const HeadKernels& kernels = kernels_of(level);
  parallel_items_with_scratch(bands.count, threads, floats, [&](float* own, std::int64_t item) {
    const Band band = bands[item];
    float* const row_sums = own + slopes;
    float* const copies = row_sums + products;
    double* const own_sums = sums.data() + item * (products + kHeadColours);
    const std::int64_t first_row = band.image * shape.height;
    for (std::int64_t i = 0; i < band.rows + kHeadTaps - 1; ++i) {
      const std::int64_t row = band.first - 1 + i;
      float* const to = own + i * padded + kHeadColours;
      if (row < 0 || row >= shape.height) {
        std::fill(to, to + out.size, 0.0f);
      } else {
        to_floats(shape.type, out.at(dy, first_row + row), out.size, to, level);
      }
    }
    for (std::int64_t i = 0; i < band.rows; ++i) {
      const std::int64_t at = first_row + band.first + i;
      HeadInputRow task{shape.type, channels, shape.width, vectors, first.data(), weights.get(),
                        {own + i * padded, own + (i + 1) * padded, own + (i + 2) * padded}, copies, copies + copy, row_sums};
      if (!copied) {
        task.x = in.at(x, at);
        task.dx = dx != nullptr ? in.at(dx, at) : nullptr;
      } else if (dweight != nullptr) {
        std::memcpy(copies, in.at(x, at), in.bytes());
      }
      if (dx != nullptr) {
        kernels.dgrad(task);
        if (copied) std::memcpy(in.at(dx, at), task.dx, in.bytes());
      }
      if (dweight != nullptr) {
        kernels.wgrad(task);
        for (std::int64_t k = 0; k < products; ++k) own_sums[k] += static_cast<double>(row_sums[k]);
      }
      if (dbias != nullptr) {
        const float* const slopes_here = task.dy[1] + kHeadColours;
        for (std::int64_t k = 0; k < out.size; k += kHeadColours) {
          for (std::int64_t c = 0; c < kHeadColours; ++c) own_sums[products + c] += static_cast<double>(slopes_here[k + c]);
        }
      }
    }
  });
  std::vector<double> total(sums.begin(), sums.begin() + products + kHeadColours);
  for (std::int64_t item = 1; item < bands.count; ++item) {
    for (std::size_t k = 0; k < total.size(); ++k) total[k] += sums[static_cast<std::size_t>(item) * total.size() + k];
  }
  for (std::int64_t k = 0; dweight != nullptr && k < products; ++k) {
    const std::int64_t channel = k % channels, place = k / channels;
    const std::int64_t tap = kHeadTaps * kHeadTaps - 1 - place / kHeadColours;
    dweight[(place % kHeadColours * channels + channel) * kHeadTaps * kHeadTaps + tap] =
        static_cast<float>(total[static_cast<std::size_t>(k)]);
  }
  for (std::int64_t k = 0; dbias != nullptr && k < kHeadColours; ++k) {
    dbias[k] = static_cast<float>(total[static_cast<std::size_t>(products + k)]);
  }
}

#else

void conv2d_head_fwd(const HeadShape&, const void*, const float*, const float*, void*, int, SimdLevel) {}
void conv2d_head_bwd(const HeadShape&, const void*, const void*, const float*, void*, float*, float*, int, SimdLevel) {}

#endif

}  // namespace hflfnerv
