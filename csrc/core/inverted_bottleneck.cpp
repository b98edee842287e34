#include "inverted_bottleneck.h"

#if defined(HFLFNERV_HAVE_AMX)
#include <algorithm>
#include <vector>

#include "convert.h"
#include "inverted_bottleneck_amx.h"
#include "scratch.h"
#endif

namespace hflfnerv {

#if defined(HFLFNERV_HAVE_AMX)
namespace {

constexpr std::int64_t kParts = 8;  // of the pixels, with sums of their own

using Floats = std::vector<float>;

Floats floats_of(const BFloat16* from, std::int64_t count) {
  Floats floats(static_cast<std::size_t>(count));
  to_floats(FloatType::bf16, from, count, floats.data(), SimdLevel::avx512);  // which there is where there is AMX
  return floats;
}

// Packs a factor with `inner` rows and `columns` columns, both already padded; element(k, n) is that of row k < from_inner
// and column n < from_columns.
template <class Element>
void pack(std::int64_t inner, std::int64_t columns, std::int64_t from_inner, std::int64_t from_columns, const Element& element,
          BFloat16* to) {
  for (std::int64_t tile = 0; tile < columns; tile += kTile) {
    for (std::int64_t k = 0; k < inner; k += 2, to += 2 * kTile) {
      for (std::int64_t n = tile; n < std::min(tile + kTile, from_columns); ++n) {
        for (std::int64_t i = 0; i < 2 && k + i < from_inner; ++i) to[2 * (n - tile) + i] = element(k + i, n);
      }
    }
  }
}

// The plan of a call, and what it points to.
class Bottleneck {
 public:
  Bottleneck(const BottleneckShape& shape, const BottleneckWeights& weights, bool backward) {
    plan_.shape = shape;
    plan_.weights = weights;
    const std::int64_t channels = shape.channels, hidden = shape.hidden;
    const std::int64_t padded = plan_.channels(), padded_hidden = plan_.hidden(), elements = plan_.weight_elements();
    packed_ = new_zeros<BFloat16>((backward ? 3 : 2) * elements);
    BFloat16* const first = packed_.get();
    pack(padded, padded_hidden, channels, hidden,
         [&](std::int64_t c, std::int64_t n) { return weights.w1[n * channels + c]; }, first);
    plan_.expand = first;
    if (backward) {
      Floats floats = floats_of(weights.w2, channels * hidden);
      for (std::int64_t i = 0; i < channels * hidden; ++i) floats[static_cast<std::size_t>(i)] *= weights.gamma[i / hidden];
      const Aligned<BFloat16> scaled = new_aligned<BFloat16>(channels * hidden);
      from_floats(FloatType::bf16, floats.data(), channels * hidden, scaled.get(), SimdLevel::avx512);
      pack(padded, padded_hidden, channels, hidden,
           [&](std::int64_t c, std::int64_t n) { return scaled[static_cast<std::size_t>(c * hidden + n)]; },
           first + elements);
      pack(padded_hidden, padded, hidden, channels,
           [&](std::int64_t n, std::int64_t c) { return weights.w1[n * channels + c]; }, first + 2 * elements);
      plan_.expand_back = first + elements;
      plan_.project_back = first + 2 * elements;
    } else {
      pack(padded_hidden, padded, hidden, channels,
           [&](std::int64_t n, std::int64_t c) { return weights.w2[c * hidden + n]; }, first + elements);
      plan_.project = first + elements;
    }
    const auto extend = [&](const float*& vector, std::int64_t size, std::int64_t to) {
      vectors_.emplace_back(static_cast<std::size_t>(to), 0.0f);
      std::copy_n(vector, size, vectors_.back().begin());
      vector = vectors_.back().data();
    };
    for (const float** const vector : {&plan_.weights.gain, &plan_.weights.shift, &plan_.weights.b2, &plan_.weights.gamma}) {
      extend(*vector, channels, padded);
    }
    extend(plan_.weights.b1, hidden, padded_hidden);
    plan_.gelu = &gelu_table(false, false);
    plan_.gelu_gradient = &gelu_table(false, true);
  }

  const BottleneckPlan& plan() const { return plan_; }

 private:
  BottleneckPlan plan_{};
  Aligned<BFloat16> packed_;
  std::vector<Floats> vectors_;
};

}  // namespace

void inverted_bottleneck_fwd(const BottleneckShape& shape, const BottleneckWeights& weights, const BFloat16* u,
                             const void* x, float* out, int threads) {
  const Bottleneck bottleneck(shape, weights, false);
  const BottleneckPlan& plan = bottleneck.plan();
  parallel_items_with_scratch(plan.blocks(), threads, plan.forward_elements() / 2, [&](float* scratch, std::int64_t block) {
    bottleneck_forward_amx(plan, u, x, out, block, reinterpret_cast<BFloat16*>(scratch));
  });
}

void inverted_bottleneck_bwd(const BottleneckShape& shape, const BottleneckWeights& weights, const BFloat16* u,
                             const float* dout, BFloat16* du, const BottleneckGradients& gradients, int threads) {
  const Bottleneck bottleneck(shape, weights, true);
  const BottleneckPlan& plan = bottleneck.plan();
  const std::int64_t parts = std::min(plan.blocks(), kParts), floats = in_lines(plan.sums());
  const Aligned<float> sums = new_zeros<float>(parts * floats);
  parallel_items_with_scratch(parts, threads, plan.backward_elements() / 2, [&](float* scratch, std::int64_t part) {
    const std::int64_t last = plan.blocks() * (part + 1) / parts;
    for (std::int64_t block = plan.blocks() * part / parts; block < last; ++block) {
      bottleneck_backward_amx(plan, u, dout, du, sums.get() + part * floats, block, reinterpret_cast<BFloat16*>(scratch));
    }
  });
  for (std::int64_t part = 1; part < parts; ++part) {
    const float* const from = sums.get() + part * floats;
    for (std::int64_t i = 0; i < floats; ++i) sums[static_cast<std::size_t>(i)] += from[i];
  }
  const std::int64_t channels = shape.channels, hidden = shape.hidden, tiles = plan.hidden() / kTile;
  const float *const expand = sums.get(), *const project = expand + plan.weight_elements();
  const float* const of_b1 = project + plan.weight_elements();
  const float *const of_gain = of_b1 + plan.hidden(), *const of_shift = of_gain + plan.channels();
  const float* const of_dout = of_shift + plan.channels();
  const Floats w2 = floats_of(weights.w2, channels * hidden);
  for (std::int64_t c = 0; c < channels; ++c) {
    double of_gamma = static_cast<double>(weights.b2[c]) * static_cast<double>(of_dout[c]);
    for (std::int64_t n = 0; n < hidden; ++n) {
      const std::int64_t at = ((c / kTile * tiles + n / kTile) * kTile + c % kTile) * kTile + n % kTile;
      gradients.w1[n * channels + c] = expand[at];
      gradients.w2[c * hidden + n] = weights.gamma[c] * project[at];
      of_gamma += static_cast<double>(w2[static_cast<std::size_t>(c * hidden + n)]) * static_cast<double>(project[at]);
    }
    gradients.gamma[c] = static_cast<float>(of_gamma);
    gradients.b2[c] = weights.gamma[c] * of_dout[c];
    gradients.gain[c] = of_gain[c];
    gradients.shift[c] = of_shift[c];
  }
  std::copy_n(of_b1, hidden, gradients.b1);
}

#else

void inverted_bottleneck_fwd(const BottleneckShape&, const BottleneckWeights&, const BFloat16*, const void*, float*, int) {}
void inverted_bottleneck_bwd(const BottleneckShape&, const BottleneckWeights&, const BFloat16*, const float*, BFloat16*,
                             const BottleneckGradients&, int) {}

#endif

}  // namespace hflfnerv
