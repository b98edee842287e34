#include <cstring>

#include "amx.h"
#include "output_stage_kernels.h"
#include "simd_avx512.h"

namespace hflfnerv {
namespace {

constexpr std::int64_t kTilePixels = kPixelsAmx * kTile;  // a row of a tile is five pixels
constexpr int kTiles = 4;

// Where the rows of four tiles go, and how many of their elements: none where there is no pixel.
struct Block {
  std::int64_t at[kBlockRows];
  std::uint16_t lanes[kBlockRows];
};

// Bias, tanh, sum and rounding of a block's products, some rows at a time. A local variable, so that the compiler keeps
// it in registers.
class Finish {
 public:
  inline __attribute__((always_inline)) Finish(const OutputRows& rows, const Block& block, const float* products)
      : rows_(rows), tanh_(*rows.table), at_(block.at), lanes_(block.lanes), products_(products) {}

  template <int kRows>
  inline __attribute__((always_inline)) void rows() {
    for (int row = 0; row < kRows; ++row, ++at_, ++lanes_, products_ += kTile) {
      if (*lanes_ == 0) continue;
      __m512 value = _mm512_set1_ps(rows_.offset);
      for (int group = 0; group < rows_.groups; ++group) {
        const __m512 sum = _mm512_add_ps(_mm512_load_ps(products_ + group * kBlockRows * kTile),
                                         _mm512_loadu_ps(rows_.biases + group * kBiasLanes));
        value = _mm512_fmadd_ps(_mm512_set1_ps(rows_.scales[group]), tanh_(sum), value);
      }
      if (rows_.bytes) {
        const __m512 unit = _mm512_min_ps(_mm512_max_ps(value, _mm512_setzero_ps()), _mm512_set1_ps(1.0f));
        const __m512i levels = _mm512_cvtps_epi32(_mm512_mul_ps(unit, _mm512_set1_ps(255.0f)));
        _mm_mask_storeu_epi8(static_cast<std::uint8_t*>(rows_.out) + *at_, *lanes_, _mm512_cvtepi32_epi8(levels));
      } else {
        _mm512_mask_storeu_ps(static_cast<float*>(rows_.out) + *at_, *lanes_, value);
      }
    }
  }

 private:
  const OutputRows& rows_;
  const Simd::Tanh tanh_;
  const std::int64_t* at_;
  const std::uint16_t* lanes_;
  const float* products_;
};

class Worker {
 public:
  Worker(const OutputRows& rows, float* scratch) : rows_(rows), products_(scratch) {
    std::memset(&blocks_[0], 0, sizeof(Block));
  }

  template <int kShare>
  void run() {
    int last = 0;  // nothing yet: its pixels go nowhere
    const std::int64_t row_tiles = (rows_.width + kTilePixels - 1) / kTilePixels;
    for (std::int64_t first = rows_.begin; first < rows_.end; first += kTiles) {
      std::int64_t count = rows_.end - first;
      if (count > kTiles) count = kTiles;
      for (std::int64_t tile = 0; tile < count * row_tiles; tile += kTiles) {
        place(first, count, tile, count * row_tiles, blocks_[last ^ 1]);
        multiply<kShare>(products(last ^ 1), Finish(rows_, blocks_[last], products(last)));
        last ^= 1;
      }
    }
    Finish(rows_, blocks_[last], products(last)).rows<kBlockRows>();
  }

 private:
  // Four tiles from `tile` on, one column of tiles after the other; the last one is repeated, and not kept.
  void place(std::int64_t first, std::int64_t count, std::int64_t tile, std::int64_t tiles, Block& block) {
    for (int t = 0; t < kTiles; ++t) {
      const bool kept = tile + t < tiles;
      const std::int64_t one = kept ? tile + t : tiles - 1;
      y_[t] = first + one % count;
      x_[t] = one / count * kTilePixels;
      for (std::int64_t p = 0; p < kTile; ++p) {
        const std::int64_t x = x_[t] + p * kPixelsAmx;
        std::int64_t pixels = kept ? rows_.width - x : 0;
        if (pixels > kPixelsAmx) pixels = kPixelsAmx;
        block.at[t * kTile + p] = (y_[t] * rows_.out_width + x) * kColours;
        block.lanes[t * kTile + p] = static_cast<std::uint16_t>(pixels > 0 ? (1u << pixels * kColours) - 1 : 0);
      }
    }
    memory_barrier();
  }

  float* products(int block) const { return products_ + block * rows_.groups * kBlockRows * kTile; }

  template <int kShare>
  inline __attribute__((always_inline)) void multiply(float* products, Finish finish) const {
    int shares = kBlockRows / kShare, stream = 0;
    for (int group = 0; group < rows_.groups; ++group) {
      zero_products();
      for (; stream < rows_.count && rows_.streams[stream].group == group; ++stream) {
        const OutputStream& s = rows_.streams[stream];
        const BFloat16* weights = static_cast<const BFloat16*>(s.weights);
        const std::int64_t stride = kPixelsAmx * s.pixel * 2;
        for (std::int64_t ky = 0; ky < kTaps; ++ky) {
          const BFloat16* from[kTiles];
          for (int t = 0; t < kTiles; ++t) {
            const std::int64_t row = y_[t] + ky - 1;
            const bool inside = row >= s.top && row < s.height;
            from[t] = static_cast<const BFloat16*>(inside ? s.x : s.zeros) + x_[t] * s.pixel;
            if (inside) from[t] += row % s.ring * s.row;
          }
          for (std::int64_t step = 0; step < s.steps; ++step, weights += kTileElements) {
            const std::int64_t at = step * kStep;
            add_products(from[0] + at, from[1] + at, from[2] + at, from[3] + at, stride, weights);
            if (shares > 0) {
              finish.rows<kShare>();
              --shares;
            }
          }
        }
      }
      store_products(products + group * kBlockRows * kTile);
    }
  }

  const OutputRows& rows_;
  float* const products_;
  Block blocks_[2];  // one is being multiplied, the other one finished
  std::int64_t y_[kTiles] = {}, x_[kTiles] = {};
};

}  // namespace

void output_rows_amx(const OutputRows& rows, float* scratch) {
  const Tiles tiles;
  std::int64_t steps = 0;
  for (int i = 0; i < rows.count; ++i) steps += kTaps * rows.streams[i].steps;
  Worker worker(rows, scratch);
  switch (rows_per_step(steps)) {
    case 1:
      worker.run<1>();
      break;
    case 2:
      worker.run<2>();
      break;
    case 4:
      worker.run<4>();
      break;
    case 8:
      worker.run<8>();
      break;
    case 16:
      worker.run<16>();
      break;
    default:
      worker.run<32>();
  }
}

}  // namespace hflfnerv
