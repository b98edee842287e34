#include "conv2d_head.h"

#include <algorithm>
#include <vector>

#include "conv2d_head_kernels.h"
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

// Copies rows [first, first + count) of an image of `height` rows of `size` floats, zeros where there are none.
void copy_rows(const float* image, std::int64_t height, std::int64_t size, std::int64_t first, std::int64_t count, float* to,
               std::int64_t stride) {
  for (std::int64_t row = first; row < first + count; ++row, to += stride) {
    if (row < 0 || row >= height) {
      std::fill(to, to + size, 0.0f);
    } else {
      std::copy(image + row * size, image + (row + 1) * size, to);
    }
  }
}

}  // namespace

void conv2d_head_fwd(const HeadShape& shape, const float* x, const float* weight, const float* bias, float* y, int threads,
                     SimdLevel level) {
  const Bands bands(shape);
  const std::int64_t lanes = lanes_of(level), run = kHeadTaps * shape.channels, steps = (run + lanes - 1) / lanes;
  const Aligned<float> weights = new_zeros<float>(kHeadTaps * steps * kHeadColours * lanes);
  for (std::int64_t i = 0; i < kHeadTaps; ++i) {
    for (std::int64_t e = 0; e < run; ++e) {
      for (std::int64_t colour = 0; colour < kHeadColours; ++colour) {
        const std::int64_t at = ((i * steps + e / lanes) * kHeadColours + colour) * lanes + e % lanes;
        weights[static_cast<std::size_t>(at)] =
            weight_at(shape, weight, colour, e % shape.channels, i * kHeadTaps + e / shape.channels);
      }
    }
  }
  float biases[kHeadColours] = {};
  if (bias != nullptr) std::copy(bias, bias + kHeadColours, biases);
  const std::int64_t row = shape.width * shape.channels;
  const Aligned<float> zeros = new_zeros<float>(row);
  const auto kernel = kernels_of(level).fwd;
  parallel_items_with_scratch(bands.count, threads, kHeadTaps * steps * lanes, [&](float* edge, std::int64_t item) {
    const Band band = bands[item];
    const float* const image = x + band.image * shape.height * row;
    for (std::int64_t at = band.first; at < band.first + band.rows; ++at) {
      const float* const above = at > 0 ? image + (at - 1) * row : zeros.get();
      const float* const below = at + 1 < shape.height ? image + (at + 1) * row : zeros.get();
      float* const to = y + (band.image * shape.height + at) * shape.width * kHeadColours;
      kernel({shape.channels, shape.width, steps, weights.get(), {above, image + at * row, below}, biases, to, edge});
    }
  });
}

void conv2d_head_bwd(const HeadShape& shape, const float* dy, const float* x, const float* weight, float* dx,
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
  const std::int64_t row = shape.width * shape.channels, out_row = shape.width * kHeadColours;
  const std::int64_t padded = out_row + 2 * kHeadColours, slopes = (kBand + kHeadTaps - 1) * padded;
  const std::int64_t products = kHeadProducts * channels, narrow = channels < lanes ? row + lanes : 0;
  // Rows of dy with zeros around them, sums of a row, and a row of x and one of dx.
  const std::int64_t floats = slopes + products + 2 * narrow;
  std::vector<double> sums(static_cast<std::size_t>(bands.count * (products + kHeadColours)), 0.0);
  if (dx != nullptr) advise_large_pages(dx, static_cast<std::size_t>(shape.batch * shape.height * row) * sizeof(float));
  const HeadKernels& kernels = kernels_of(level);
  parallel_items_with_scratch(bands.count, threads, floats, [&](float* own, std::int64_t item) {
    const Band band = bands[item];
    float* const row_sums = own + slopes;
    float* const copies = row_sums + products;
    double* const own_sums = sums.data() + item * (products + kHeadColours);
    copy_rows(dy + band.image * shape.height * out_row, shape.height, out_row, band.first - 1, band.rows + kHeadTaps - 1,
              own + kHeadColours, padded);
    for (std::int64_t i = 0; i < band.rows; ++i) {
      const std::int64_t at = (band.image * shape.height + band.first + i) * row;
      HeadInputRow task{channels, shape.width, vectors, first.data(), weights.get(),
                        {own + i * padded, own + (i + 1) * padded, own + (i + 2) * padded}, x + at,
                        dx != nullptr ? dx + at : nullptr, row_sums};
      if (narrow > 0) {
        task.dx = copies + narrow;
        if (dweight != nullptr) {
          std::copy(x + at, x + at + row, copies);
          task.x = copies;
        }
      }
      if (dx != nullptr) {
        kernels.dgrad(task);
        if (narrow > 0) std::copy(task.dx, task.dx + row, dx + at);
      }
      if (dweight != nullptr) {
        kernels.wgrad(task);
        for (std::int64_t k = 0; k < products; ++k) own_sums[k] += static_cast<double>(row_sums[k]);
      }
      if (dbias != nullptr) {
        const float* const slopes_here = task.dy[1] + kHeadColours;
        for (std::int64_t k = 0; k < out_row; k += kHeadColours) {
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

void conv2d_head_fwd(const HeadShape&, const float*, const float*, const float*, float*, int, SimdLevel) {}
void conv2d_head_bwd(const HeadShape&, const float*, const float*, const float*, float*, float*, float*, int, SimdLevel) {}

#endif

}  // namespace hflfnerv
