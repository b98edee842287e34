// Included behind the Simd of one instruction set; see conv_pixel_shuffle_gelu_fourier_kernels.h.
#include "conv_pixel_shuffle_gelu_fourier_kernels.h"
#include "fourier.inl"
#include "multiply.inl"
#include "tiles.inl"

namespace hflfnerv {
namespace {

using I = Simd::I;
constexpr int kColumns = kWinogradVectors * kLanes;
constexpr int kLine = kFourierLine;
static_assert(kLine == kFourierAxis, "");
constexpr int kGroups = 2 * kFourierColumns;  // of positions that share a scale: of each column the root 1, and the others
constexpr float kLargest = static_cast<float>(kFourierLargest);

// The largest absolute values of squares' groups. What is not finite may be lost there, and makes `invalid` not a number, else zero:
// each value of a tile is a term of one at least of the positions at zero, infinity and the root 1 on both axes.
struct Range {
  F largest[kGroups];
  F invalid;

  inline __attribute__((always_inline)) void real(int column, const F (&line)[kLine]) {
#pragma GCC unroll 18
    for (int i = 0; i < kLine; ++i) extend(2 * column + (i != kFourierOne), line[i]);
    for (int i = 0; i <= kFourierOne && column <= kFourierOne; ++i) invalid = Simd::fma(Simd::zero(), line[i], invalid);
  }
  inline __attribute__((always_inline)) void complex(int column, const Complex (&line)[kLine]) {
    F others = largest[2 * column + 1];
#pragma GCC unroll 18
    for (int i = 0; i < kLine; ++i) {
      if (i == kFourierOne) continue;
      others = Simd::max(others, Simd::max(Simd::abs(line[i].re), Simd::abs(line[i].im)));
    }
    largest[2 * column + 1] = others;
    extend(2 * column, line[kFourierOne].re);
    extend(2 * column, line[kFourierOne].im);
  }
  void extend(int group, F value) { largest[group] = Simd::max(largest[group], Simd::abs(value)); }
};

// For squares of which nothing else is wanted.
struct Ignore {
  void real(int, const F (&)[kLine]) const {}
  void complex(int, const Complex (&)[kLine]) const {}
};

// The values of two squares in integers, scaled by scale(group): put(shorts) for one plane after the other.
template <class Scale, class Put>
inline __attribute__((always_inline)) void round_squares(const float* a, const float* b, const Scale& scale, const Put& put) {
  constexpr std::int64_t kStep = kFourierAxis * kLanes;
  const auto round = [&](std::int64_t at, F factor) {
    const Simd::Shorts shorts = Simd::to_shorts(Simd::mul(Simd::load(a + at), factor), Simd::mul(Simd::load(b + at), factor));
    put(shorts);
    return shorts;
  };
  const auto round_complex = [&](std::int64_t at, std::int64_t imaginary, F factor) {
    const Simd::Shorts re = round(at, factor), im = round(at + imaginary, factor);
    put(Simd::add_shorts(re, im));
  };
  int column = 0;
  for (; column < kFourierRealColumns; ++column, a += kLanes, b += kLanes) {
    const F one = scale(2 * column), others = scale(2 * column + 1);
    for (int i = 0; i < 4; ++i) round(i * kStep, i == kFourierOne ? one : others);
    for (int i = 4; i < kLine; i += 2) round_complex(i * kStep, kStep, others);
  }
  for (; column < kFourierColumns; ++column, a += 2 * kLanes, b += 2 * kLanes) {
    const F one = scale(2 * column), others = scale(2 * column + 1);
#pragma GCC unroll 18
    for (int i = 0; i < kLine; ++i) round_complex(i * kStep, kLanes, i == kFourierOne ? one : others);
  }
}

// A tile's values are rounded after `largest` of their group became kLargest.
inline float rounding_scale(float largest) { return kLargest / (largest > 1e-30f ? largest : 1e-30f); }

struct Scratch {
  Scratch(const FourierPlan& plan, float* evaluated, float* p)
      : tiles(reinterpret_cast<std::int16_t*>(evaluated)),
        scales(evaluated + plan.integer_floats()),
        products(reinterpret_cast<std::int32_t*>(p)),
        halves(p + plan.block() * plan.product_floats()),
        factors(halves + plan.block() * kWinogradVectors * plan.half_floats()),
        squares(factors + plan.block() * kFourierScales),
        rest(squares + plan.vectors() * plan.square_floats()),
        rest_largest(rest + plan.rest_vectors() * plan.square_floats()),
        gathered(rest_largest + plan.rest_vectors() * kGroups * kLanes),
        copy(gathered + plan.square_floats()) {}
  std::int16_t* tiles;
  float* scales;  // of each tile, by position
  std::int32_t* products;
  float* halves;
  float* factors;  // the scales times those of a chunk
  float *squares, *rest, *rest_largest, *gathered, *copy;
};

// `count` channels of a square of pixels, to lanes of vectors.
template <class T>
inline void gather(const Window<T>& in, std::int64_t count, T* to) {
  for (int row = 0; row < kLine; ++row) {
    const T* from = in.p + row * in.row;
    if (count == 1) {
      for (int column = 0; column < kLine; ++column, from += in.pixel, to += kLanes) *to = *from;
      continue;
    }
    for (int column = 0; column < kLine; ++column, from += in.pixel, to += kLanes) {
      for (std::int64_t c = 0; c < count; ++c) to[c] = from[c];
    }
  }
}

// The rest of the channels of `count` tiles in squares of their own, with the largest value of each lane.
template <class T>
inline void evaluate_rest(const WinogradPlan& plan, const FourierPlan& fourier, const Images<T>& images, const Tile* tiles,
                          int count, const Scratch& scratch) {
  const std::int64_t rest = fourier.rest(), first = plan.in_channels - rest, half = plan.kernel / 2;
  const int shared = static_cast<int>(fourier.rest_tiles());
  T* const gathered = reinterpret_cast<T*>(scratch.gathered);
  for (int begin = 0, vector = 0; begin < count; begin += shared, ++vector) {
    for (int i = begin; i < begin + shared && i < count; ++i) {
      const Window<T> in = window(images, tiles[i].image, tiles[i].row - half, tiles[i].column - half, kLine, first, rest,
                                  reinterpret_cast<T*>(scratch.copy));
      gather(in, rest, gathered + (i - begin) * rest);
    }
    Range range{};
    fourier_square(gathered, kLine * kLanes, kLanes, scratch.rest + vector * fourier.square_floats(), range);
    for (int group = 0; group < kGroups; ++group) {
      Simd::store(scratch.rest_largest + (vector * kGroups + group) * kLanes, Simd::add(range.largest[group], range.invalid));
    }
  }
}

// A tile's channels but for the rest, and the scales of all of them.
template <class T>
inline void evaluate_tile(const WinogradPlan& plan, const FourierPlan& fourier, const Images<T>& images, const Tile& tile,
                          int index, const Scratch& scratch) {
  const std::int64_t half = plan.kernel / 2, vectors = fourier.vectors(), rest = fourier.rest();
  Range range{};
  if (vectors > 0) {
    const Window<T> in = window(images, tile.image, tile.row - half, tile.column - half, kLine, 0, vectors * kLanes,
                                reinterpret_cast<T*>(scratch.copy));
    for (std::int64_t v = 0; v < vectors; ++v) {
      fourier_square(in.p + v * kLanes, in.row, in.pixel, scratch.squares + v * fourier.square_floats(), range);
    }
  }
  // The rest's largest values, those of the tile's lanes of each group.
  const std::int64_t shared = rest > 0 ? fourier.rest_tiles() : 1;
  const float* const others =
      rest > 0 ? scratch.rest_largest + index / shared * kGroups * kLanes + index % shared * rest : nullptr;
  float invalid = Simd::sum(range.invalid);
  for (std::int64_t c = 0; c < rest; ++c) invalid += 0 * others[c];
  float rounding[kGroups];
  float* const scales = scratch.scales + index * kFourierScales;
  for (int column = 0; column < kFourierColumns; ++column) {
    float both[2];
    for (int i = 0; i < 2; ++i) {
      const int group = 2 * column + i;
      float largest = Simd::highest(range.largest[group]);
      for (std::int64_t c = 0; c < rest; ++c) {
        const float other = others[group * kLanes + c];
        largest = other > largest ? other : largest;
      }
      largest += invalid;
      rounding[group] = rounding_scale(largest);
      both[i] = largest * (1 / kLargest);
    }
    float* const to = scales + fourier_position(column);
    for (int i = 0; i < fourier_positions(column); ++i) to[i] = both[i == kFourierOne ? 0 : 1];
  }
  const std::int64_t plane_shorts = fourier.plane_shorts();
  for (std::int64_t v = 0; v < vectors; v += 2) {
    std::int16_t* to = scratch.tiles + index * fourier.tile_shorts() + v * kLanes;
    const float* const square = scratch.squares + v * fourier.square_floats();
    round_squares(
        square, v + 1 < vectors ? square + fourier.square_floats() : square,
        [&](int group) { return Simd::set(rounding[group]); },
        [&](Simd::Shorts shorts) {
          Simd::store_shorts(to, shorts);
          to += plane_shorts;
        });
  }
}

// The rest of the channels, whose scales are known now.
inline void round_rest(const FourierPlan& fourier, int count, const Scratch& scratch) {
  const int rest = static_cast<int>(fourier.rest()), shared = static_cast<int>(fourier.rest_tiles());
  const std::int64_t first = fourier.in_channels - rest;
  for (int begin = 0, vector = 0; begin < count; begin += shared, ++vector) {
    const int tiles = begin + shared < count ? shared : count - begin, used = tiles * rest;
    std::int64_t offset[kLanes] = {};
    for (int lane = 0; lane < used; ++lane) offset[lane] = (begin + lane / rest) * fourier.tile_shorts() + first + lane % rest;
    const auto scale = [&](int group) {
      alignas(64) float lanes[kLanes] = {};
      const std::int64_t at = fourier_position(group / 2) + (group % 2 == 0 ? kFourierOne : 0);
      for (int lane = 0; lane < used; ++lane) {
        lanes[lane] = rounding_scale(scratch.scales[(begin + lane / rest) * kFourierScales + at] * kLargest);
      }
      return Simd::load(lanes);
    };
    const float* const square = scratch.rest + vector * fourier.square_floats();
    std::int16_t* to = scratch.tiles;
    round_squares(square, square, scale, [&](Simd::Shorts shorts) {
      alignas(64) std::int16_t lanes[2 * kLanes];
      Simd::store_shorts(lanes, shorts);
      for (int lane = 0; lane < used; ++lane) to[offset[lane]] = lanes[lane];
      to += fourier.plane_shorts();
    });
  }
}

template <class T>
inline void evaluate(const WinogradPlan& plan, const FourierPlan& fourier, const Images<T>& images, const Tile* tiles, int count,
                     const Scratch& scratch) {
  if (fourier.rest() > 0) evaluate_rest(plan, fourier, images, tiles, count, scratch);
  for (int i = 0; i < count; ++i) evaluate_tile(plan, fourier, images, tiles[i], i, scratch);
  if (fourier.rest() > 0) round_rest(fourier, count, scratch);
}

// Of pairs of 16-bit integers: the inner dimension is that of pairs of channels.
struct Pairs {
  using A = std::int16_t;
  using C = std::int32_t;
  using Vector = I;
  static Vector zero() { return Simd::zero_ints(); }
  static Vector set(const A* p) {
    C pair;
    std::memcpy(&pair, p, sizeof pair);
    return Simd::set_ints(pair);
  }
  static Vector load(const C* p) { return Simd::load_ints(p); }
  static void store(C* p, Vector v) { Simd::store_ints(p, v); }
  static Vector add_product(Vector sum, Vector a, Vector b) { return Simd::add_products(sum, a, b); }
};

// The planes of a column, for 1 to kCount tiles.
template <int kCount, int kVectors>
inline void multiply_planes(const FourierPlan& fourier, int count, const std::int16_t* tiles, const std::int32_t* weight,
                            std::int64_t planes, std::int32_t* products) {
  if constexpr (kCount > 0) {
    if (count < kCount) {
      return multiply_planes<kCount - 1, kVectors>(fourier, count, tiles, weight, planes, products);
    }
    const std::int64_t pairs = fourier.pairs();
    for (std::int64_t plane = 0; plane < planes; ++plane) {
      multiply<kCount, kVectors, false, Pairs>(tiles + plane * fourier.plane_shorts(), fourier.tile_shorts(), 2,
                                               weight + plane * pairs * kColumns, kColumns, pairs,
                                               products + plane * kColumns, fourier.product_floats());
    }
  }
}

// Where the i-th result is on the circle.
constexpr int on_circle(int i) { return (i + kFourier - 1) % kFourier; }

// The products of a tile at a column become rows of results, still to be transformed along the other axis.
template <bool kReal, int kOutputs>
inline void finish_column(const std::int32_t* products, const float* factors, float* half) {
  const auto real = [&](I v) { return Simd::mul(Simd::to_floats(v), Simd::set(*factors)); };
  const auto next_real = [&] {
    const F value = real(Simd::load_ints(products));
    products += kColumns;
    ++factors;
    return value;
  };
  const auto next = [&] {
    const I re = Simd::load_ints(products), im = Simd::load_ints(products + kColumns);
    const I sum = Simd::load_ints(products + 2 * kColumns);
    const Complex value{real(Simd::sub_ints(re, im)), real(Simd::sub_ints(Simd::sub_ints(sum, re), im))};
    products += 3 * kColumns;
    ++factors;
    return value;
  };
  constexpr int kLast = kOutputs - 1;
  if constexpr (kReal) {
    F re[kFourier / 2 + 1], im[kFourier / 2 + 1], circle[kFourier];
    const F zero = next_real(), infinity = next_real();
    re[0] = next_real();
    re[kFourier / 2] = next_real();
    for (int k = 1; k < kFourier / 2; ++k) {
      const Complex both = next();
      re[k] = both.re;
      im[k] = both.im;
    }
    fourier_real_inverse<kFourier>(re, im, circle, 1);
    for (int i = 0; i < kOutputs; ++i) {
      F y = circle[on_circle(i)];
      if (i == 0) y = Simd::add(y, zero);
      if (i == kLast) y = Simd::add(y, infinity);
      Simd::store(half + i * kLanes, y);
    }
  } else {
    Complex transform[kFourier], circle[kFourier];
    const Complex zero = next(), infinity = next();
    for (Complex& value : transform) value = next();
    fourier_complex<kFourier, 1>(transform, 1, circle);
    for (int i = 0; i < kOutputs; ++i) {
      Complex y = circle[on_circle(i)];
      if (i == 0) y = {Simd::add(y.re, zero.re), Simd::add(y.im, zero.im)};
      if (i == kLast) y = {Simd::add(y.re, infinity.re), Simd::add(y.im, infinity.im)};
      Simd::store(half + 2 * i * kLanes, y.re);
      Simd::store(half + (2 * i + 1) * kLanes, y.im);
    }
  }
}

// Rows of results of a column begin there.
template <int kOutputs>
constexpr std::int64_t half_of(std::int64_t column) {
  return fourier_begin(column, kOutputs, 2 * kOutputs) * kLanes;
}

template <class T, int kOutputs>
inline void finish_tile(const WinogradPlan& plan, const Tile& tile, const float* half, const WinogradOutput& out,
                        std::int64_t vector, const Simd::Gelu* gelu) {
  store_tile<T, kOutputs>(plan, tile, out, vector, gelu, [&](int i, F* y) {
    const float* const at = half + i * kLanes;
    F re[kFourier / 2 + 1], im[kFourier / 2 + 1], circle[kFourier];
    re[0] = Simd::load(at + half_of<kOutputs>(2));
    re[kFourier / 2] = Simd::load(at + half_of<kOutputs>(3));
    for (int k = 1; k < kFourier / 2; ++k) {
      const float* const both = at + half_of<kOutputs>(3 + k) + i * kLanes;  // complex: twice as far apart
      re[k] = Simd::load(both);
      im[k] = Simd::load(both + kLanes);
    }
    fourier_real_inverse<kFourier>(re, im, circle, 1);
    for (int j = 0; j < kOutputs; ++j) y[j] = circle[on_circle(j)];
    y[0] = Simd::add(y[0], Simd::load(at + half_of<kOutputs>(0)));
    y[kOutputs - 1] = Simd::add(y[kOutputs - 1], Simd::load(at + half_of<kOutputs>(1)));
  });
}

template <class T, int kTaps>
void conv_of(const WinogradPlan& plan, const T* x, const float* points, const WinogradOutput& out,
             const WinogradPart& part, float* memory) {
  constexpr int kOutputs = kLine + 1 - kTaps;
  const FourierPlan fourier(plan);
  const Scratch scratch(fourier, part.tiles, memory);
  const Images<T> images{x, plan.batch, plan.height, plan.width, plan.in_channels};
  const int count = static_cast<int>(part.end - part.begin);
  Tile at[FourierPlan::block()];
  for (int i = 0; i < count; ++i) at[i] = tile_of(plan, part.begin + i);
  if (!part.evaluated) evaluate(plan, fourier, images, at, count, scratch);

  const GeluTable none{};
  const Simd::Gelu function(out.gelu != nullptr ? *out.gelu : none);
  const Simd::Gelu* const gelu = out.gelu != nullptr ? &function : nullptr;
  for (std::int64_t chunk = part.first_chunk; chunk < part.last_chunk; ++chunk) {
    const int vectors = plan.out_channels - chunk * kColumns > kLanes ? 2 : 1;
    const float* const scales = points + (chunk + 1) * fourier.chunk_floats() - kFourierScales;
    const std::int32_t* const weight = reinterpret_cast<const std::int32_t*>(points + chunk * fourier.chunk_floats());
    for (std::int64_t i = 0; i < count * kFourierScales; i += kLanes) {
      Simd::store(scratch.factors + i, Simd::mul(Simd::load(scratch.scales + i), Simd::load(scales + i % kFourierScales)));
    }
    for (std::int64_t column = 0; column < kFourierColumns; ++column) {
      const std::int16_t* const tiles = scratch.tiles + fourier_plane(column) * fourier.plane_shorts();
      const std::int32_t* const columns = weight + fourier_plane(column) * fourier.pairs() * kColumns;
      for (int row = 0; row < count; row += kRows) {
        const int rows = count - row < kRows ? count - row : kRows;
        (vectors == 2 ? multiply_planes<kRows, 2> : multiply_planes<kRows, 1>)(
            fourier, rows, tiles + row * fourier.tile_shorts(), columns, fourier_planes(column), scratch.products);
        for (int i = 0; i < rows; ++i) {
          for (int v = 0; v < vectors; ++v) {
            const std::int32_t* const products = scratch.products + i * fourier.product_floats() + v * kLanes;
            const float* const factors = scratch.factors + (row + i) * kFourierScales + fourier_position(column);
            float* const half =
                scratch.halves + ((row + i) * kWinogradVectors + v) * fourier.half_floats() + half_of<kOutputs>(column);
            (fourier_is_real(column) ? finish_column<true, kOutputs> : finish_column<false, kOutputs>)(products, factors, half);
          }
        }
      }
    }
    for (int i = 0; i < count; ++i) {
      for (int v = 0; v < vectors; ++v) {
        finish_tile<T, kOutputs>(plan, at[i], scratch.halves + (i * kWinogradVectors + v) * fourier.half_floats(), out,
                                 chunk * kWinogradVectors + v, gelu);
      }
    }
  }
}

void conv(const WinogradPlan& plan, const void* x, const float* points, const WinogradOutput& out, const WinogradPart& part,
          float* scratch) {
  with_type(plan.type, [&](auto zero) {
    using T = decltype(zero);
    (plan.kernel == 3 ? conv_of<T, 3> : conv_of<T, 5>)(plan, static_cast<const T*>(x), points, out, part, scratch);
  });
}

// The square of a vector of output channels and one input channel: of taps at the inner points, and such that the ones at zero
// and at infinity are the first and the last tap. `window` is zeros where nothing is written. A convolution with padding
// is a correlation, whose transform is conjugated: imaginary parts are negative where they are used.
inline void weight_square(const WinogradPlan& plan, const WinogradWeight& at, const float* weight, std::int64_t first,
                          std::int64_t k, float* window, float* square) {
  const std::int64_t taps = plan.kernel, all = taps * taps, left = plan.out_channels - first;
  for (std::int64_t lane = 0; lane < kLanes && lane < left; ++lane) {
    const float* const from = weight + at.out[first + lane] + at.in[k];
    const auto tap = [&](std::int64_t i, std::int64_t j) {
      const std::int64_t index = i * taps + j;
      return from[(at.reversed ? all - 1 - index : index) * at.tap];
    };
    // On each axis: [0] the first tap, [1 ...] all of them, [17] the sum of the last and of what is taken from it, [1].
    const auto line = [&](std::int64_t i, const auto& value) {
      return i == 0 ? value(0) : i == kLine - 1 ? value(0) + value(taps - 1) : value(i - 1);
    };
    const auto used = [&](std::int64_t i) { return i <= taps || i == kLine - 1; };
    for (std::int64_t i = 0; i < kLine; ++i) {
      for (std::int64_t j = 0; j < kLine && used(i); ++j) {
        if (!used(j)) continue;
        window[(i * kLine + j) * kLanes + lane] =
            line(i, [&](std::int64_t row) { return line(j, [&](std::int64_t column) { return tap(row, column); }); });
      }
    }
  }
  Ignore ignore;
  fourier_square(window, kLine * kLanes, kLanes, square, ignore);
}

// The positions in their order: visit(index, roots, re, im), with what a sum over roots is divided by, 16 for each axis that has
// them, and the vectors of a square with the real and the imaginary part, which is kNone where there is none.
constexpr int kNone = -1;
template <class Visit>
inline void each_position(const Visit& visit) {
  int index = 0;
  for (int column = 0; column < kFourierColumns; ++column) {
    const bool real = fourier_is_real(column);
    for (int i = 0; i < fourier_positions(column); ++i) {
      const int roots = (column < kFourierOne ? 1 : kFourier) * (i < kFourierOne ? 1 : kFourier);
      // Of real columns the first four positions are real.
      const int re = real ? (i < 4 ? i : 2 * i - 4) * kLine + column : i * kLine + 2 * column - 4;
      visit(index++, roots, re, !real ? re + 1 : i < 4 ? kNone : re + kLine);
    }
  }
}

void weight(const WinogradPlan& plan, const WinogradWeight& at, const float* weight, float* points, std::int64_t begin,
            std::int64_t end) {
  const FourierPlan fourier(plan);
  const std::int64_t in = plan.in_channels, pairs = fourier.pairs();
  // What sums over input channels may be, when each integer may be off by a half.
  const float limit = static_cast<float>(INT32_MAX / kFourierLargest - in - 1);
  alignas(64) float window[kLine * kLine * kLanes], square[kLine * kLine * kLanes];
  // Calls visit(k) when the square of input channel k and a vector of the chunk's output channels is made.
  const auto squares = [&](std::int64_t chunk, int v, const auto& visit) {
    const std::int64_t first = chunk * kColumns + v * kLanes;
    std::memset(window, 0, sizeof window);
    for (std::int64_t k = 0; k < in && first < plan.out_channels; ++k) {
      weight_square(plan, at, weight, first, k, window, square);
      visit(k);
    }
  };
  for (std::int64_t chunk = begin; chunk < end; ++chunk) {
    float* const out = points + chunk * fourier.chunk_floats();
    float* const scales = out + fourier.chunk_floats() - kFourierScales;
    float sums[kFourierPositions] = {}, largest[kFourierPositions] = {}, rounding[kFourierPositions];
    float invalid = 0;  // or not a number, where a weight of the chunk is not finite
    for (int v = 0; v < kWinogradVectors; ++v) {
      alignas(64) float vector_sums[kFourierPositions][kLanes] = {};
      squares(chunk, v, [&](std::int64_t) {
        each_position([&](int index, int, int re_at, int im_at) {
          const F re = Simd::abs(Simd::load(square + re_at * kLanes));
          const F im = im_at == kNone ? Simd::zero() : Simd::abs(Simd::load(square + im_at * kLanes));
          Simd::store(vector_sums[index], Simd::add(Simd::load(vector_sums[index]), Simd::add(re, im)));
          const float highest = Simd::highest(Simd::max(re, im));
          largest[index] = highest > largest[index] ? highest : largest[index];
        });
      });
      for (int index = 0; index < kFourierPositions; ++index) {
        for (const float sum : vector_sums[index]) {
          sums[index] = sum > sums[index] ? sum : sums[index];
          invalid += 0 * sum;
        }
      }
    }
    std::memset(out, 0, static_cast<std::size_t>(fourier.chunk_floats()) * sizeof(float));
    each_position([&](int index, int roots, int, int) {
      const float by_sum = limit / (sums[index] > 1e-30f ? sums[index] : 1e-30f), by_size = rounding_scale(largest[index]);
      rounding[index] = by_sum < by_size ? by_sum : by_size;
      scales[index] = 1 / (rounding[index] * static_cast<float>(roots)) + invalid;
    });
    for (int v = 0; v < kWinogradVectors; ++v) {
      squares(chunk, v, [&](std::int64_t k) {
        std::int16_t* to = reinterpret_cast<std::int16_t*>(out) + (k / 2 * kColumns + v * kLanes) * 2 + k % 2;
        const auto round = [&](int at, float scale) {
          const F value = Simd::mul(Simd::load(square + at * kLanes), Simd::set(scale));
          return Simd::to_shorts(value, value);
        };
        const auto put = [&](Simd::Shorts shorts) {
          alignas(64) std::int16_t lanes[2 * kLanes];
          Simd::store_shorts(lanes, shorts);
          for (int lane = 0; lane < kLanes; ++lane) to[2 * lane] = lanes[lane];
          to += pairs * kColumns * 2;
        };
        each_position([&](int index, int, int re_at, int im_at) {
          const Simd::Shorts re = round(re_at, rounding[index]);
          put(re);
          if (im_at == kNone) return;
          const Simd::Shorts im = round(im_at, -rounding[index]);
          put(im);
          put(Simd::add_shorts(re, im));
        });
      });
    }
  }
}

}  // namespace
}  // namespace hflfnerv
