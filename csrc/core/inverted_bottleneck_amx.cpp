#include "inverted_bottleneck_amx.h"

#include "amx.h"
#include "registers.h"
#include "simd_avx512.h"

namespace hflfnerv {
namespace {

__mmask16 lanes_of(std::int64_t n) { return static_cast<__mmask16>(first_lanes(n)); }

__m512 load_bfloat16(__mmask16 lanes, const BFloat16* p) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes, p)), 16));
}

void store_bfloat16(BFloat16* p, __m512 v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), Simd::to_bfloat16(v)); }

// 64 rows times a column tile: kBlockRows x kTile products. Rows of the left factor are `stride` elements apart.
void multiply(const BFloat16* rows, std::int64_t stride, const BFloat16* packed, std::int64_t steps, float* products) {
  memory_barrier();
  zero_products();
  for (std::int64_t step = 0; step < steps; ++step, rows += kStep, packed += kTileElements) {
    add_products(rows, rows + kTile * stride, rows + 2 * kTile * stride, rows + 3 * kTile * stride, stride * 2, packed);
  }
  store_products(products);
  memory_barrier();
}

// Sums over a block's pixels, of products of two tensors: `left` transposed and `right` in pairs of pixels.
void add_weight_gradient(const BFloat16* left, const BFloat16* right, std::int64_t row_tiles, std::int64_t column_tiles,
                         float* sums) {
  memory_barrier();
  constexpr std::int64_t kTensor = kBottleneckSteps * kTileElements;  // of 16 channels
  for (std::int64_t row = 0; row < row_tiles; row += 2) {
    for (std::int64_t column = 0; column < column_tiles; column += 2) {
      const BFloat16 *const a = left + row * kTensor, *const b = right + column * kTensor;
      float* const of = sums + (row * column_tiles + column) * kProducts;
      add_block<2, 2>(a, a + kTensor, b, b + kTensor, kBottleneckSteps, of, of + column_tiles * kProducts);
    }
  }
  memory_barrier();
}

class Block {
 public:
  Block(const BottleneckPlan& plan, std::int64_t block, BFloat16* scratch)
      : plan_(plan),
        channels_(plan.channels()),
        hidden_(plan.hidden()),
        first_(block * kBottleneckPixels),
        pixels_(smaller(plan.shape.pixels - first_, kBottleneckPixels)),
        norm_(scratch),
        after_norm_(norm_ + kBottleneckPixels * channels_) {}

  void forward(const BFloat16* u, const void* x, float* out) {
    norm(u);
    BFloat16* const activated = after_norm_;
    const Simd::Gelu gelu(*plan_.gelu);
    for (std::int64_t row = 0; row < pixels_; row += kBlockRows) {
      alignas(64) float products[kBlockRows * kTile];
      BFloat16* const of_rows = activated + row * hidden_;
      for (std::int64_t column = 0; column < hidden_; column += kTile) {
        multiply(norm_ + row * channels_, channels_, plan_.expand + column * channels_, channels_ / kStep, products);
        const __m512 bias = _mm512_loadu_ps(plan_.weights.b1 + column);
        for (std::int64_t i = 0; i < kBlockRows; ++i) {
          store_bfloat16(of_rows + i * hidden_ + column, gelu(_mm512_add_ps(_mm512_load_ps(products + i * kTile), bias)));
        }
      }
      for (std::int64_t column = 0; column < plan_.shape.channels; column += kTile) {
        multiply(of_rows, hidden_, plan_.project + column * hidden_, hidden_ / kStep, products);
        const __mmask16 lanes = lanes_of(plan_.shape.channels - column);
        const __m512 bias = _mm512_loadu_ps(plan_.weights.b2 + column), gamma = _mm512_loadu_ps(plan_.weights.gamma + column);
        const std::int64_t at = (first_ + row) * plan_.shape.channels + column;
        for (std::int64_t i = 0; i < smaller(pixels_ - row, kBlockRows); ++i) {
          const __m512 branch = _mm512_add_ps(_mm512_load_ps(products + i * kTile), bias);
          const std::int64_t of_row = at + i * plan_.shape.channels;
          const __m512 residual = plan_.shape.type == FloatType::f32
                                      ? _mm512_maskz_loadu_ps(lanes, static_cast<const float*>(x) + of_row)
                                      : load_bfloat16(lanes, static_cast<const BFloat16*>(x) + of_row);
          _mm512_mask_storeu_ps(out + of_row, lanes, _mm512_fmadd_ps(gamma, branch, residual));
        }
      }
    }
  }

  void backward(const BFloat16* u, const float* dout, BFloat16* du, float* sums) {
    const std::int64_t of_channels = kBottleneckPixels * channels_, of_hidden = kBottleneckPixels * hidden_;
    BFloat16* next = after_norm_;
    const auto take = [&](std::int64_t elements) {
      BFloat16* const taken = next;
      next += elements;
      return taken;
    };
    BFloat16 *const slopes = take(of_channels), *const hidden_slopes = take(of_hidden);
    BFloat16 *const norm_columns = take(of_channels), *const slope_columns = take(of_channels);
    BFloat16 *const activated_pairs = take(of_hidden), *const hidden_pairs = take(of_hidden);
    float* const of_norm = reinterpret_cast<float*>(take(2 * of_channels));  // the gradient of the norm's result
    float* const moments = reinterpret_cast<float*>(take(2 * kBottleneckPixels * 2));

    float* const projected = sums + plan_.weight_elements();
    float* const of_b1 = projected + plan_.weight_elements();
    float *const of_gain = of_b1 + hidden_, *const of_shift = of_gain + channels_, *const of_dout = of_shift + channels_;

    norm(u, moments);
    put_slopes(dout, slopes, of_dout);
    const std::int64_t rows = (pixels_ + kBlockRows - 1) / kBlockRows * kBlockRows;
    for (std::int64_t row = 0; row < rows; row += kBlockRows) {
      for (std::int64_t column = 0; column < hidden_; column += kTile) {
        put_hidden(row, column, slopes, hidden_slopes, activated_pairs, hidden_pairs, of_b1);
      }
      for (std::int64_t column = 0; column < channels_; column += kTile) {
        alignas(64) float products[kBlockRows * kTile];
        multiply(hidden_slopes + row * hidden_, hidden_, plan_.project_back + column * hidden_, hidden_ / kStep, products);
        for (std::int64_t i = 0; i < kBlockRows; ++i) {
          _mm512_store_ps(of_norm + (row + i) * channels_ + column, _mm512_load_ps(products + i * kTile));
        }
      }
    }
    // Pixels that are not there give nothing: their slopes are zero.
    for (std::int64_t row = rows; row < kBottleneckPixels; row += 2) {
      for (std::int64_t column = 0; column < hidden_; column += kTile) {
        _mm512_store_si512(activated_pairs + pair_at(row, column), _mm512_setzero_si512());
        _mm512_store_si512(hidden_pairs + pair_at(row, column), _mm512_setzero_si512());
      }
    }
    put_columns(norm_, norm_columns);
    put_columns(slopes, slope_columns);
    add_weight_gradient(norm_columns, hidden_pairs, channels_ / kTile, hidden_ / kTile, sums);
    add_weight_gradient(slope_columns, activated_pairs, channels_ / kTile, hidden_ / kTile, projected);
    norm_back(u, moments, of_norm, du, of_gain, of_shift);
  }

 private:
  // LayerNorm of the pixels, zeros for those that are not there. Of each, `moments` are the mean and one over the deviation.
  void norm(const BFloat16* u, float* moments = nullptr) {
    const std::int64_t channels = plan_.shape.channels;
    for (std::int64_t row = 0; row < kBottleneckPixels; ++row) {
      BFloat16* const to = norm_ + row * channels_;
      if (row >= pixels_) {
        for (std::int64_t c = 0; c < channels_; c += kStep) _mm512_storeu_si512(to + c, _mm512_setzero_si512());
        continue;
      }
      const BFloat16* const from = u + (first_ + row) * channels;
      __m512 sum = _mm512_setzero_ps();
      for (std::int64_t c = 0; c < channels; c += kTile) {
        sum = _mm512_add_ps(sum, load_bfloat16(lanes_of(channels - c), from + c));
      }
      const float mean = _mm512_reduce_add_ps(sum) / static_cast<float>(channels);
      const __m512 center = _mm512_set1_ps(mean);
      __m512 squares = _mm512_setzero_ps();
      for (std::int64_t c = 0; c < channels; c += kTile) {
        const __mmask16 lanes = lanes_of(channels - c);
        const __m512 off = _mm512_maskz_sub_ps(lanes, load_bfloat16(lanes, from + c), center);
        squares = _mm512_fmadd_ps(off, off, squares);
      }
      const float variance = _mm512_reduce_add_ps(squares) / static_cast<float>(channels);
      const float scale = 1 / __builtin_sqrtf(variance + plan_.weights.epsilon);
      for (std::int64_t c = 0; c < channels; c += kTile) {
        const __m512 off = _mm512_sub_ps(load_bfloat16(lanes_of(channels - c), from + c), center);
        const __m512 gain = _mm512_loadu_ps(plan_.weights.gain + c), shift = _mm512_loadu_ps(plan_.weights.shift + c);
        const __m512 value = _mm512_fmadd_ps(_mm512_mul_ps(off, _mm512_set1_ps(scale)), gain, shift);
        store_bfloat16(to + c, value);  // of channels that are not there gain and shift are zero
      }
      if (moments != nullptr) {
        moments[2 * row] = mean;
        moments[2 * row + 1] = scale;
      }
    }
  }

  // dout rounded, and its sum.
  void put_slopes(const float* dout, BFloat16* slopes, float* of_dout) const {
    const std::int64_t channels = plan_.shape.channels;
    for (std::int64_t c = 0; c < channels_; c += kTile) {
      const __mmask16 lanes = lanes_of(larger(channels - c, 0));
      __m512 sum = _mm512_loadu_ps(of_dout + c);
      for (std::int64_t row = 0; row < kBottleneckPixels; ++row) {
        const __m512 value = _mm512_maskz_loadu_ps(row < pixels_ ? lanes : 0, dout + (first_ + row) * channels + c);
        sum = _mm512_add_ps(sum, value);
        store_bfloat16(slopes + row * channels_ + c, value);
      }
      _mm512_storeu_ps(of_dout + c, sum);
    }
  }

  // Where the pair of pixels `row` and `row` + 1 of the column tile is.
  static std::int64_t pair_at(std::int64_t row, std::int64_t column) {
    return column / kTile * kBottleneckSteps * kTileElements + row / 2 * kStep;
  }

  // 16 hidden channels of 64 pixels, and their gradients.
  void put_hidden(std::int64_t row, std::int64_t column, const BFloat16* slopes, BFloat16* hidden_slopes,
                  BFloat16* activated_pairs, BFloat16* hidden_pairs, float* of_b1) const {
    alignas(64) float products[kBlockRows * kTile], back[kBlockRows * kTile];
    multiply(norm_ + row * channels_, channels_, plan_.expand + column * channels_, channels_ / kStep, products);
    multiply(slopes + row * channels_, channels_, plan_.expand_back + column * channels_, channels_ / kStep, back);
    const Simd::Gelu gelu(*plan_.gelu);
    const Simd::GeluGradient gradient(*plan_.gelu_gradient);
    const __m512 bias = _mm512_loadu_ps(plan_.weights.b1 + column);
    const __m512i interleave = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21,
                                                5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    __m512 sum = _mm512_loadu_ps(of_b1 + column);
    for (std::int64_t i = 0; i < kBlockRows; i += 2) {
      __m256i activated[2], slope[2];
      for (int k = 0; k < 2; ++k) {
        const __m512 hidden = _mm512_add_ps(_mm512_load_ps(products + (i + k) * kTile), bias);
        const __m512 value = _mm512_mul_ps(gradient(hidden), _mm512_load_ps(back + (i + k) * kTile));
        activated[k] = Simd::to_bfloat16(gelu(hidden));
        slope[k] = Simd::to_bfloat16(value);
        sum = _mm512_add_ps(sum, value);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(hidden_slopes + (row + i + k) * hidden_ + column), slope[k]);
      }
      const std::int64_t at = pair_at(row + i, column);
      const __m512i both = _mm512_inserti64x4(_mm512_castsi256_si512(activated[0]), activated[1], 1);
      _mm512_store_si512(activated_pairs + at, _mm512_permutexvar_epi16(interleave, both));
      const __m512i slopes_of_both = _mm512_inserti64x4(_mm512_castsi256_si512(slope[0]), slope[1], 1);
      _mm512_store_si512(hidden_pairs + at, _mm512_permutexvar_epi16(interleave, slopes_of_both));
    }
    _mm512_storeu_ps(of_b1 + column, sum);
  }

  // Tiles of 16 channels as rows.
  void put_columns(const BFloat16* rows, BFloat16* columns) const {
    for (std::int64_t c = 0; c < channels_; c += kStep) {
      for (std::int64_t step = 0; step < kBottleneckSteps; ++step) {
        __m512i v[32];
        for (std::int64_t i = 0; i < kStep; ++i) v[i] = _mm512_loadu_si512(rows + (step * kStep + i) * channels_ + c);
        transpose_32(v);
        for (std::int64_t i = 0; i < kStep; ++i) {
          _mm512_store_si512(columns + ((c + i) / kTile * kBottleneckSteps + step) * kTileElements + i % kTile * kStep, v[i]);
        }
      }
    }
  }

  void norm_back(const BFloat16* u, const float* moments, const float* of_norm, BFloat16* du, float* of_gain,
                 float* of_shift) const {
    const std::int64_t channels = plan_.shape.channels;
    const __m512 count = _mm512_set1_ps(1 / static_cast<float>(channels));
    for (std::int64_t row = 0; row < pixels_; ++row) {
      const BFloat16* const from = u + (first_ + row) * channels;
      const float* const slope = of_norm + row * channels_;
      const __m512 center = _mm512_set1_ps(moments[2 * row]), scale = _mm512_set1_ps(moments[2 * row + 1]);
      const auto value = [&](std::int64_t c) {
        return _mm512_mul_ps(_mm512_sub_ps(load_bfloat16(lanes_of(channels - c), from + c), center), scale);
      };
      __m512 sum = _mm512_setzero_ps(), products = _mm512_setzero_ps();
      for (std::int64_t c = 0; c < channels; c += kTile) {
        // Beyond the channels the slopes are zero.
        const __m512 normed = value(c), of_result = _mm512_load_ps(slope + c);
        const __m512 of_normed = _mm512_mul_ps(of_result, _mm512_loadu_ps(plan_.weights.gain + c));
        sum = _mm512_add_ps(sum, of_normed);
        products = _mm512_fmadd_ps(of_normed, normed, products);
        _mm512_storeu_ps(of_shift + c, _mm512_add_ps(_mm512_loadu_ps(of_shift + c), of_result));
        _mm512_storeu_ps(of_gain + c, _mm512_fmadd_ps(of_result, normed, _mm512_loadu_ps(of_gain + c)));
      }
      const __m512 mean = _mm512_mul_ps(_mm512_set1_ps(_mm512_reduce_add_ps(sum)), count);
      const __m512 along = _mm512_mul_ps(_mm512_set1_ps(_mm512_reduce_add_ps(products)), count);
      for (std::int64_t c = 0; c < channels; c += kTile) {
        // Rounded, as in the mean: with one channel they are the same.
        const __m512 gain = _mm512_loadu_ps(plan_.weights.gain + c);
        const __m512 of_normed = kept(_mm512_mul_ps(_mm512_load_ps(slope + c), gain));
        const __m512 rest = _mm512_fnmadd_ps(value(c), along, _mm512_sub_ps(of_normed, mean));
        _mm256_mask_storeu_epi16(du + (first_ + row) * channels + c, lanes_of(channels - c),
                                 Simd::to_bfloat16(_mm512_mul_ps(rest, scale)));
      }
    }
  }

  const BottleneckPlan& plan_;
  const std::int64_t channels_, hidden_, first_, pixels_;
  BFloat16 *const norm_, *const after_norm_;
};

}  // namespace

void bottleneck_forward_amx(const BottleneckPlan& plan, const BFloat16* u, const void* x, float* out, std::int64_t block,
                            BFloat16* scratch) {
  const Tiles tiles;
  Block(plan, block, scratch).forward(u, x, out);
}

void bottleneck_backward_amx(const BottleneckPlan& plan, const BFloat16* u, const float* dout, BFloat16* du, float* sums,
                             std::int64_t block, BFloat16* scratch) {
  const Tiles tiles;
  Block(plan, block, scratch).backward(u, dout, du, sums);
}

}  // namespace hflfnerv
