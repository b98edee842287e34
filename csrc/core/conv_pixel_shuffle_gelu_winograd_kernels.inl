// Included behind the Simd of one instruction set; see conv_pixel_shuffle_gelu_winograd_kernels.h.
#include "conv_pixel_shuffle_gelu_winograd_kernels.h"
#include "multiply.inl"
#include "partial.inl"
#include "tiles.inl"

namespace hflfnerv {
namespace {

constexpr int kColumns = kWinogradVectors * kLanes;

// The points of an axis: 0, pairs of p and -p, and infinity, the highest coefficient alone. With points p_j, the j-th
// evaluates a tile of inputs as a polynomial that vanishes at all others (`evaluate_inputs`, B^T), n weights or gradients as
// sum_i p_j^i w_i (`evaluate`), and n results are sum_j p_j^i m_j (`combine`). These scales, of the weight, make the product
// of the three a convolution.
template <int kAxis>
struct Points;

template <>
struct Points<8> {
  static constexpr double pairs[] = {1, 2, 0.5};
  static constexpr float scales[] = {-1.0f, -2.0f / 9, -2.0f / 9, 1.0f / 90, 1.0f / 90, 32.0f / 45, 32.0f / 45, 1.0f};
};

// Of the sets that are closed under 1/p, which halves the work on inputs, one with the smallest errors.
template <>
struct Points<10> {
  static constexpr double pairs[] = {0.4, 2.5, 0.8, 1.25};
  static constexpr float scales[] = {1, -0.762234535f, -0.762234535f, 0.000499538025f, 0.000499538025f, 0.314499209f, 0.314499209f, -0.0527642115f, -0.0527642115f, 1};
};

// Powers of the pairs' points.
template <int kAxis>
struct Powers {
  constexpr Powers() : of() {
    for (int i = 0; i < kAxis / 2 - 1; ++i) {
      double power = 1;
      for (int n = 0; n < 6; ++n, power *= Points<kAxis>::pairs[i]) of[i][n] = static_cast<float>(power);
    }
  }
  float of[kAxis / 2 - 1][6];
};
template <int kAxis>
constexpr Powers<kAxis> kPowers{};

inline F times(float a, F b) { return a == 1 ? b : Simd::mul(Simd::set(a), b); }
inline F plus(F a, float b, F c) { return b == 1 ? Simd::add(a, c) : Simd::fma(Simd::set(b), c, a); }  // a + b c

// kAxis inputs; t may be d.
template <int kAxis>
inline __attribute__((always_inline)) void evaluate_inputs(const F* d, F* t) {
  if constexpr (kAxis == 8) {
    const F t0 = plus(Simd::sub(d[6], d[0]), 5.25f, Simd::sub(d[2], d[4]));
    const F t7 = plus(Simd::sub(d[7], d[1]), 5.25f, Simd::sub(d[3], d[5]));
    const F even1 = plus(Simd::add(d[2], d[6]), -4.25f, d[4]);
    const F odd1 = plus(Simd::add(d[1], d[5]), -4.25f, d[3]);
    const F even2 = plus(plus(d[6], -1.25f, d[4]), 0.25f, d[2]);
    const F odd2 = plus(plus(times(2, d[5]), -2.5f, d[3]), 0.5f, d[1]);
    const F even3 = plus(plus(d[6], -5, d[4]), 4, d[2]);
    const F odd3 = plus(plus(times(0.5f, d[5]), -2.5f, d[3]), 2, d[1]);
    t[0] = t0;
    t[1] = Simd::add(even1, odd1);
    t[2] = Simd::sub(even1, odd1);
    t[3] = Simd::add(even2, odd2);
    t[4] = Simd::sub(even2, odd2);
    t[5] = Simd::add(even3, odd3);
    t[6] = Simd::sub(even3, odd3);
    t[7] = t7;
  } else {
    static_assert(kAxis == 10, "");
    // (u - a²)(u - 1/a²) = u² - s u + 1 of the first and of the second two pairs, in u = p².
    constexpr double a = Points<10>::pairs[0], b = Points<10>::pairs[2], sum_a = a * a + 1 / (a * a), sum_b = b * b + 1 / (b * b);
    constexpr float sums[] = {static_cast<float>(sum_a), static_cast<float>(sum_b)};
    constexpr float first = static_cast<float>(-sum_a - sum_b), second = static_cast<float>(2 + sum_a * sum_b);
    const F t0 = plus(plus(Simd::add(d[0], d[8]), first, Simd::add(d[2], d[6])), second, d[4]);
    const F t9 = plus(plus(Simd::add(d[1], d[9]), first, Simd::add(d[3], d[7])), second, d[5]);
    F even[4], odd[4];
    for (int i = 0; i < 4; i += 2) {
      // What the other two pairs' points vanish at, of even and odd inputs, and of those two before.
      const float s = sums[1 - i / 2], p = kPowers<10>.of[i][1], square = kPowers<10>.of[i][2];
      const float inverse = kPowers<10>.of[i + 1][1], inverse_square = kPowers<10>.of[i + 1][2];
      const F even_high = plus(Simd::add(d[4], d[8]), -s, d[6]), even_low = plus(Simd::add(d[2], d[6]), -s, d[4]);
      const F odd_high = plus(Simd::add(d[3], d[7]), -s, d[5]), odd_low = plus(Simd::add(d[1], d[5]), -s, d[3]);
      even[i] = plus(even_high, -inverse_square, even_low);
      even[i + 1] = plus(even_high, -square, even_low);
      odd[i] = plus(times(p, odd_high), -inverse, odd_low);
      odd[i + 1] = plus(times(inverse, odd_high), -p, odd_low);
    }
    t[0] = t0;
    for (int i = 0; i < 4; ++i) {
      t[1 + 2 * i] = Simd::add(even[i], odd[i]);
      t[2 + 2 * i] = Simd::sub(even[i], odd[i]);
    }
    t[9] = t9;
  }
}

template <int n, int kAxis>
inline __attribute__((always_inline)) void evaluate(const F* y, F* t) {
  static_assert(n >= 3 && n <= 6, "");
  for (int pair = 0; pair < kAxis / 2 - 1; ++pair) {
    const float* const powers = kPowers<kAxis>.of[pair];
    F even = y[0], odd = times(powers[1], y[1]);
    for (int i = 2; i < n; i += 2) even = plus(even, powers[i], y[i]);
    for (int i = 3; i < n; i += 2) odd = plus(odd, powers[i], y[i]);
    t[1 + 2 * pair] = Simd::add(even, odd);
    t[2 + 2 * pair] = Simd::sub(even, odd);
  }
  t[0] = y[0];
  t[kAxis - 1] = y[n - 1];
}

template <int n, int kAxis>
inline __attribute__((always_inline)) void combine(const F* m, F* y) {
  static_assert(n >= 3 && n <= 6, "");
  constexpr int kPairs = kAxis / 2 - 1;
  F sums[kPairs], differences[kPairs];
  for (int i = 0; i < kPairs; ++i) {
    sums[i] = Simd::add(m[1 + 2 * i], m[2 + 2 * i]);
    differences[i] = Simd::sub(m[1 + 2 * i], m[2 + 2 * i]);
  }
  for (int row = 0; row < n; ++row) {
    const F* const terms = row % 2 == 0 ? sums : differences;
    y[row] = times(kPowers<kAxis>.of[0][row], terms[0]);
    for (int i = 1; i < kPairs; ++i) y[row] = plus(y[row], kPowers<kAxis>.of[i][row], terms[i]);
  }
  y[0] = Simd::add(m[0], y[0]);
  y[n - 1] = Simd::add(y[n - 1], m[kAxis - 1]);
}

// The inputs of a tile at kPointRows rows of points from kFirst on, point_floats apart. What is written behind its channels
// is the next tile's, which is evaluated after it.
template <class T, int kAxis, int kFirst, int kPointRows>
inline void evaluate_tile(const WinogradPlan& plan, const T* x, const Tile& tile, std::int64_t point_floats, float* points,
                          float* copy) {
  const std::int64_t inner = plan.inner(), half = plan.kernel / 2;
  const Images<T> images{x, plan.batch, plan.height, plan.width, plan.in_channels};
  const Window<T> in = window(images, tile.image, tile.row - half, tile.column - half, kAxis, 0, inner,
                              reinterpret_cast<T*>(copy));
  for (std::int64_t c = 0; c < inner; c += kLanes) {
    F half_way[kPointRows][kAxis];
    for (int j = 0; j < kAxis; ++j) {
      F d[kAxis];
      for (int i = 0; i < kAxis; ++i) d[i] = Simd::load(in.p + i * in.row + j * in.pixel + c);
      evaluate_inputs<kAxis>(d, d);
      for (int i = 0; i < kPointRows; ++i) half_way[i][j] = d[kFirst + i];
    }
    for (int i = 0; i < kPointRows; ++i) {
      F d[kAxis];
      evaluate_inputs<kAxis>(half_way[i], d);
      for (int j = 0; j < kAxis; ++j) Simd::store(points + (i * kAxis + j) * point_floats + c, d[j]);
    }
  }
}

template <int kTaps, int kAxis>
void weight_of(const WinogradPlan& plan, const WinogradWeight& at, const float* weight, float* points, std::int64_t begin,
               std::int64_t end) {
  constexpr int kAll = kTaps * kTaps;
  for (std::int64_t chunk = begin; chunk < end; ++chunk) {
    float* const out = points + chunk * plan.chunk_floats();
    for (int column = 0; column < kColumns; column += kLanes) {
      alignas(64) float taps[kAll][kLanes] = {};
      const std::int64_t first = chunk * kColumns + column;
      const std::int64_t left = plan.out_channels - first;
      const int lanes = left >= kLanes ? kLanes : left > 0 ? static_cast<int>(left) : 0;
      for (std::int64_t k = 0; k < plan.in_channels; ++k) {
        for (int lane = 0; lane < lanes; ++lane) {
          const float* const from = weight + at.out[first + lane] + at.in[k];
          for (int tap = 0; tap < kAll; ++tap) taps[at.reversed ? kAll - 1 - tap : tap][lane] = from[tap * at.tap];
        }
        F half_way[kAxis][kTaps];
        for (int j = 0; j < kTaps; ++j) {
          F w[kTaps], d[kAxis];
          for (int i = 0; i < kTaps; ++i) w[i] = Simd::load(taps[i * kTaps + j]);
          evaluate<kTaps, kAxis>(w, d);
          for (int i = 0; i < kAxis; ++i) half_way[i][j] = times(Points<kAxis>::scales[i], d[i]);
        }
        for (int i = 0; i < kAxis; ++i) {
          F d[kAxis];
          evaluate<kTaps, kAxis>(half_way[i], d);
          for (int j = 0; j < kAxis; ++j) {
            Simd::store(out + ((i * kAxis + j) * plan.in_channels + k) * kColumns + column, times(Points<kAxis>::scales[j], d[j]));
          }
        }
      }
    }
  }
}

void weight(const WinogradPlan& plan, const WinogradWeight& at, const float* weight, float* points, std::int64_t begin,
            std::int64_t end) {
  (plan.kernel == 3 ? weight_of<3, 8> : plan.axis == 8 ? weight_of<5, 8> : weight_of<5, 10>)(plan, at, weight, points, begin, end);
}

// The products of a tile with one vector of output channels, `products` [point][kColumns], become results.
template <class T, int kTaps, int kAxis>
inline void finish_tile(const WinogradPlan& plan, const Tile& tile, const float* products, const WinogradOutput& out,
                        std::int64_t vector, const Simd::Gelu* gelu) {
  constexpr int kOutputs = kAxis + 1 - kTaps;
  F half_way[kOutputs][kAxis];
  for (int j = 0; j < kAxis; ++j) {
    F m[kAxis], y[kOutputs];
    for (int i = 0; i < kAxis; ++i) m[i] = Simd::load(products + (i * kAxis + j) * kColumns);
    combine<kOutputs, kAxis>(m, y);
    for (int i = 0; i < kOutputs; ++i) half_way[i][j] = y[i];
  }
  store_tile<T, kOutputs>(plan, tile, out, vector, gelu, [&](int i, F* y) { combine<kOutputs, kAxis>(half_way[i], y); });
}

// Half of the rows of a product.
template <int kVectors>
__attribute__((noinline)) void multiply_half(const float* a, std::int64_t in, const float* b, float* c, std::int64_t c_row) {
  multiply<kRows / 2, kVectors, false>(a, in, 1, b, kColumns, in, c, c_row);
}

template <class T, int kTaps, int kAxis>
void conv_of(const WinogradPlan& plan, const T* x, const float* points, const WinogradOutput& out,
             const WinogradPart& part, float* scratch) {
  const std::int64_t in = plan.in_channels, point_floats = plan.point_floats(plan.block()), product_floats = plan.product_floats();
  const std::int64_t count = part.end - part.begin;
  float* const products = scratch;
  float* const copy = products + plan.block() * product_floats;
  Tile at[kWinogradTiles];
  for (std::int64_t i = 0; i < count; ++i) at[i] = tile_of(plan, part.begin + i);
  for (std::int64_t i = 0; i < count && !part.evaluated; ++i) {
    evaluate_tile<T, kAxis, 0, kAxis>(plan, x, at[i], point_floats, part.tiles + i * in, copy);
  }
  const GeluTable none{};
  const Simd::Gelu function(out.gelu != nullptr ? *out.gelu : none);
  const Simd::Gelu* const gelu = out.gelu != nullptr ? &function : nullptr;
  for (std::int64_t chunk = part.first_chunk; chunk < part.last_chunk; ++chunk) {
    const bool whole = plan.out_channels - chunk * kColumns > kLanes;  // or its second vector is all padding
    const float* const columns = points + chunk * plan.chunk_floats();
    for (std::int64_t point = 0; point < plan.points(); ++point) {
      const float* const b = columns + point * in * kColumns;
      // The last rows may be of tiles that are not there, as many as fill up half of the rows of a product.
      for (std::int64_t row = 0; row < count; row += kRows) {
        const float* const a = part.tiles + point * point_floats + row * in;
        float* const c = products + row * product_floats + point * kColumns;
        if (count - row <= kRows / 2) {
          (whole ? multiply_half<2> : multiply_half<1>)(a, in, b, c, product_floats);
        } else if (whole) {
          multiply<kRows, 2, false>(a, in, 1, b, kColumns, in, c, product_floats);
        } else {
          multiply<kRows, 1, false>(a, in, 1, b, kColumns, in, c, product_floats);
        }
      }
    }
    for (std::int64_t i = 0; i < count; ++i) {
      for (int v = 0; v < (whole ? 2 : 1); ++v) {
        finish_tile<T, kTaps, kAxis>(plan, at[i], products + i * product_floats + v * kLanes, out, chunk * kWinogradVectors + v,
                                  gelu);
      }
    }
  }
}

void conv(const WinogradPlan& plan, const void* x, const float* points, const WinogradOutput& out, const WinogradPart& part,
          float* scratch) {
  with_type(plan.type, [&](auto zero) {
    using T = decltype(zero);
    const auto of_kernel = plan.kernel == 3 ? conv_of<T, 3, 8> : plan.axis == 8 ? conv_of<T, 5, 8> : conv_of<T, 5, 10>;
    of_kernel(plan, static_cast<const T*>(x), points, out, part, scratch);
  });
}

// The gradients of a tile's results at kPointRows rows of points from kFirst on, for the columns of a chunk:
// [point][tile of the block][kColumns].
template <class T, int kTaps, int kAxis, int kFirst, int kPointRows>
inline void evaluate_gradient(const WinogradPlan& plan, const T* dz, const Tile& tile, std::int64_t chunk, int vectors,
                              float* points, float* copy) {
  constexpr int kOutputs = kAxis + 1 - kTaps;
  const std::int64_t gradient_floats = plan.gradient_floats();
  const Images<T> images{dz, plan.batch, plan.height, plan.width, plan.out_channels};
  const Window<T> in = window(images, tile.image, tile.row, tile.column, kOutputs, chunk * kColumns, vectors * kLanes,
                              reinterpret_cast<T*>(copy));
  for (int c = 0; c < vectors * kLanes; c += kLanes) {
    F half_way[kPointRows][kOutputs];
    for (int j = 0; j < kOutputs; ++j) {
      F y[kOutputs], d[kAxis];
      for (int i = 0; i < kOutputs; ++i) y[i] = Simd::load(in.p + i * in.row + j * in.pixel + c);
      evaluate<kOutputs, kAxis>(y, d);
      for (int i = 0; i < kPointRows; ++i) half_way[i][j] = d[kFirst + i];
    }
    for (int i = 0; i < kPointRows; ++i) {
      F d[kAxis];
      evaluate<kOutputs, kAxis>(half_way[i], d);
      for (int j = 0; j < kAxis; ++j) Simd::store(points + (i * kAxis + j) * gradient_floats + c, d[j]);
    }
  }
}

template <class T, int kTaps, int kAxis, int kHalf>
void wgrad_of(const WinogradPlan& plan, const WinogradGradient& task, float* scratch) {
  constexpr int kPointRows = kAxis / 2, kFirst = kHalf * kPointRows, kPoints = kPointRows * kAxis;
  const T* const x = static_cast<const T*>(task.x);
  const T* const dz = static_cast<const T*>(task.dz);
  const std::int64_t in = plan.in_channels, point_floats = plan.point_floats(plan.gradient_block());
  const std::int64_t gradient_floats = plan.gradient_floats(), count = task.end - task.begin;
  float* const tiles = scratch;
  float* const gradients = tiles + kPoints * point_floats;
  float* const copy = gradients + kPoints * gradient_floats;
  for (std::int64_t i = 0; i < count; ++i) {
    evaluate_tile<T, kAxis, kFirst, kPointRows>(plan, x, tile_of(plan, task.begin + i), point_floats, tiles + i * in, copy);
  }
  for (std::int64_t chunk = task.first_chunk; chunk < task.last_chunk; ++chunk) {
    const bool whole = plan.out_channels - chunk * kColumns > kLanes;
    for (std::int64_t i = 0; i < count; ++i) {
      evaluate_gradient<T, kTaps, kAxis, kFirst, kPointRows>(plan, dz, tile_of(plan, task.begin + i), chunk, whole ? 2 : 1,
                                                             gradients + i * kColumns, copy);
    }
    float* const sums = task.sums + chunk * plan.chunk_floats() + kFirst * kAxis * in * kColumns;
    for (std::int64_t point = 0; point < kPoints; ++point) {
      float* const c = sums + point * in * kColumns;
      const float* const b = gradients + point * gradient_floats;
      for (std::int64_t k = 0; k < in; k += kRows) {
        const float* const a = tiles + point * point_floats + k;
        const int rows = in - k < kRows ? static_cast<int>(in - k) : kRows;
        if (whole) {
          accumulate<kRows, 2>(rows, a, 1, in, b, kColumns, count, c + k * kColumns, kColumns);
        } else {
          accumulate<kRows, 1>(rows, a, 1, in, b, kColumns, count, c + k * kColumns, kColumns);
        }
      }
    }
  }
}

template <class T, int kTaps, int kAxis>
void wgrad_half(const WinogradPlan& plan, const WinogradGradient& task, float* scratch) {
  (task.half == 0 ? wgrad_of<T, kTaps, kAxis, 0> : wgrad_of<T, kTaps, kAxis, 1>)(plan, task, scratch);
}

void wgrad(const WinogradPlan& plan, const WinogradGradient& task, float* scratch) {
  with_type(plan.type, [&](auto zero) {
    using T = decltype(zero);
    (plan.kernel == 3 ? wgrad_half<T, 3, 8> : plan.axis == 8 ? wgrad_half<T, 5, 8> : wgrad_half<T, 5, 10>)(plan, task, scratch);
  });
}

template <int kTaps, int kAxis>
void weight_gradient_of(const WinogradPlan& plan, const WinogradWeight& at, const float* sums, std::int64_t parts,
                        std::int64_t part_floats, float* dweight, std::int64_t chunk) {
  for (int column = 0; column < kColumns; column += kLanes) {
    const std::int64_t first = chunk * kColumns + column, left = plan.out_channels - first;
    const int lanes = left >= kLanes ? kLanes : left > 0 ? static_cast<int>(left) : 0;
    if (lanes == 0) return;
    for (std::int64_t k = 0; k < plan.in_channels; ++k) {
      const float* const from = sums + chunk * plan.chunk_floats() + k * kColumns + column;
      F half_way[kTaps][kAxis];
      for (int j = 0; j < kAxis; ++j) {
        F m[kAxis], w[kTaps];
        for (int i = 0; i < kAxis; ++i) {
          const float* const p = from + (i * kAxis + j) * plan.in_channels * kColumns;
          F sum = Simd::load(p);
          for (std::int64_t part = 1; part < parts; ++part) sum = Simd::add(sum, Simd::load(p + part * part_floats));
          m[i] = times(Points<kAxis>::scales[i], sum);
        }
        combine<kTaps, kAxis>(m, w);
        for (int i = 0; i < kTaps; ++i) half_way[i][j] = times(Points<kAxis>::scales[j], w[i]);
      }
      for (int i = 0; i < kTaps; ++i) {
        F w[kTaps];
        combine<kTaps, kAxis>(half_way[i], w);
        for (int j = 0; j < kTaps; ++j) {
          alignas(64) float values[kLanes];
          Simd::store(values, w[j]);
          for (int lane = 0; lane < lanes; ++lane) {
            dweight[at.out[first + lane] + at.in[k] + (i * kTaps + j) * at.tap] = values[lane];
          }
        }
      }
    }
  }
}

void weight_gradient(const WinogradPlan& plan, const WinogradWeight& at, const float* sums, std::int64_t parts,
                     std::int64_t part_floats, float* dweight, std::int64_t chunk) {
  const auto of_kernel = plan.kernel == 3 ? weight_gradient_of<3, 8>
                         : plan.axis == 8 ? weight_gradient_of<5, 8>
                                          : weight_gradient_of<5, 10>;
  of_kernel(plan, at, sums, parts, part_floats, dweight, chunk);
}

}  // namespace
}  // namespace hflfnerv
