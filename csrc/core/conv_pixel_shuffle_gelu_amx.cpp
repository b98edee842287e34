#include "conv_pixel_shuffle_gelu_amx.h"

#include <cstring>
#include <type_traits>

#include "amx.h"
#include "simd_avx512.h"

namespace hflfnerv {
namespace {

// Four tiles of pixels, and where each pixel goes: to its first elements in y, or nowhere.
struct Block {
  const BFloat16* from[kBlockTiles];
  BFloat16* plane[kBlockRows];
  BFloat16* rest[kBlockRows];
  BFloat16* z[kBlockRows];
};

// Products of one block and column tile that still need bias, GELU and their place in y.
struct Pending {
  const Block* block;
  std::int64_t tile;
  const float* products;
};

// What is done with sums: no GELU; GELU; or GELU, and what it is applied to is kept.
enum class After { identity, gelu, gelu_and_z };

struct Identity {
  explicit Identity(const GeluTable*) {}
  __m512 operator()(__m512 v) const { return v; }
};

struct Gelu : Simd::Gelu {
  explicit Gelu(const GeluTable* table) : Simd::Gelu(*table) {}
};

// Bias, GELU, rounding and shuffle of what is pending, some rows at a time. A local variable, so that the compiler keeps
// it in registers.
template <After kAfter>
class Finish {
 public:
  inline __attribute__((always_inline)) Finish(const ConvPlan& plan, const Pending& pending)
      : gelu_(plan.table),
        bias_(_mm512_loadu_ps(plan.bias + pending.tile * kTile)),
        products_(pending.products),
        to_(pending.tile < plan.plane_tiles ? pending.block->plane : pending.block->rest),
        z_(pending.block->z),
        z_offset_(pending.tile * kTile),
        z_lanes_(static_cast<__mmask16>(first_lanes(plan.out_channels - z_offset_))) {
    const ConvStore* const stores = plan.stores + plan.first_store[pending.tile];
    // Nearly always there are one or two.
    first_ = stores[0];
    more_ = stores + 1;
    end_ = plan.stores + plan.first_store[pending.tile + 1];
    second_ = more_ < end_ ? *more_++ : ConvStore{0, first_.offset};
  }

  template <int kRows>
  inline __attribute__((always_inline)) void rows() {
#pragma GCC unroll 4
    for (int row = 0; row < kRows; ++row) {
      BFloat16* const to = to_[row];
      if (to == nullptr) continue;
      const __m512 sum = _mm512_add_ps(_mm512_load_ps(products_ + row * kTile), bias_);
      if (kAfter == After::gelu_and_z) {
        _mm256_mask_storeu_epi16(z_[row] + z_offset_, z_lanes_, Simd::to_bfloat16(sum));
      }
      const __m256i value = Simd::to_bfloat16(gelu_(sum));
      _mm256_mask_storeu_epi16(to + first_.offset, first_.mask, value);
      if (second_.mask == 0) continue;
      _mm256_mask_storeu_epi16(to + second_.offset, second_.mask, value);
      for (const ConvStore* store = more_; store < end_; ++store) {
        _mm256_mask_storeu_epi16(to + store->offset, store->mask, value);
      }
    }
    products_ += kRows * kTile;
    to_ += kRows;
    z_ += kRows;
  }

 private:
  const std::conditional_t<kAfter == After::identity, Identity, Gelu> gelu_;
  const __m512 bias_;
  const float* products_;
  BFloat16* const* to_;
  BFloat16* const* z_;
  const std::int64_t z_offset_;
  const __mmask16 z_lanes_;
  ConvStore first_, second_;
  const ConvStore* more_;
  const ConvStore* end_;
};

template <After kAfter>
class Worker {
 public:
  Worker(const ConvPlan& plan, const ConvRows& rows, void* scratch)
      : plan_(plan),
        rows_(rows),
        products_(static_cast<float*>(scratch)),
        gathered_(reinterpret_cast<BFloat16*>(products_ + 2 * kBlockRows * kTile)) {
    std::memset(&blocks_[0], 0, sizeof(Block));
  }

  // While the tiles multiply, the vector units finish what was multiplied before, kShare rows in each of the first steps.
  template <int kShare>
  void run() {
    Pending pending{&blocks_[0], rows_.first_tile, products_};  // nothing yet: its pixels go nowhere
    const std::int64_t row_tiles = (rows_.columns + kTile - 1) / kTile;
    int slot = 0;
    for (std::int64_t first = rows_.begin; first < rows_.end; first += kBlockTiles) {
      std::int64_t count = rows_.end - first;
      if (count > kBlockTiles) count = kBlockTiles;
      for (std::int64_t tile = 0; tile < count * row_tiles; tile += kBlockTiles) {
        Block& block = blocks_[last_block_ ^= 1];
        place(first, count, tile, count * row_tiles, block);
        for (std::int64_t column = rows_.first_tile; column < rows_.last_tile; ++column) {
          multiply<kShare>(block.from, plan_.packed + column * plan_.tile_elements(), pending);
          pending = {&block, column, products_ + slot * kBlockRows * kTile};
          store_products(products_ + slot * kBlockRows * kTile);
          slot ^= 1;
        }
      }
    }
    Finish<kAfter>(plan_, pending).template rows<kBlockRows>();
  }

 private:
  // Four tiles from `tile` on, of `tiles` in `count` rows of y / r: one column of tiles after the other, so that the rows
  // of input under them are shared. A block that is not full repeats its last tile, and keeps nothing of it.
  void place(std::int64_t first, std::int64_t count, std::int64_t tile, std::int64_t tiles, Block& block) const {
    const ConvOutputLayout& out = plan_.out;
    const std::int64_t r = plan_.r;
    for (std::int64_t t = 0; t < kBlockTiles; ++t) {
      const std::int64_t one = tile + t < tiles ? tile + t : tiles - 1;
      const std::int64_t row = first + one % count, column = one / count * kTile;
      block.from[t] = rows_.in.plane + row * plan_.in.plane_row() + column * kStep;
      const std::int64_t y = row % rows_.out.ring * r;
      BFloat16* const plane = rows_.out.plane + y * out.plane_row + column * r * out.plane_pixel;
      BFloat16* const rest = rows_.out.rest + y * out.rest_row + column * r * out.rest;
      const std::int64_t valid = tile + t < tiles ? rows_.columns - column : 0;
      for (std::int64_t p = 0; p < kTile; ++p) {
        block.plane[t * kTile + p] = p < valid ? plane + p * r * out.plane_pixel : nullptr;
        block.rest[t * kTile + p] = p < valid ? rest + p * r * out.rest : nullptr;
        if (kAfter == After::gelu_and_z) {
          block.z[t * kTile + p] = rows_.out.z + row * rows_.out.z_row + (column + p) * plan_.out_channels;
        }
      }
      if (plan_.in.rest > 0) gather(rows_.in.rest + row * plan_.in.rest_row() + column * plan_.in.rest, t);
    }
    memory_barrier();
  }

  // Gathers the rest of all taps for 16 pixels.
  void gather(const BFloat16* from, std::int64_t tile) const {
    const std::int64_t pixel = plan_.in.rest, row = plan_.in.rest_row();
    for (std::int64_t step = 0; step < plan_.rest_steps(); ++step) {
      __m512i rows[kTile];
      for (__m512i& all : rows) all = _mm512_setzero_si512();
      for (const ConvGather* g = plan_.gathers + plan_.first_gather[step];
           g < plan_.gathers + plan_.first_gather[step + 1]; ++g) {
        const BFloat16* const at = from + g->ky * row + g->shift;
        const __mmask32 mask = g->mask;
#pragma GCC unroll 16
        for (int p = 0; p < kTile; ++p) rows[p] = _mm512_mask_loadu_epi16(rows[p], mask, at + p * pixel);
      }
      BFloat16* const to = gathered_ + (step * kBlockTiles + tile) * kTileElements;
#pragma GCC unroll 16
      for (int p = 0; p < kTile; ++p) _mm512_store_si512(to + p * kStep, rows[p]);
    }
  }

  template <int kShare>
  inline __attribute__((always_inline)) void multiply(const BFloat16* const* from, const BFloat16* weights,
                                                      const Pending& pending) const {
    Finish<kAfter> finish(plan_, pending);
    const std::int64_t group_steps = plan_.group_steps(), rest_steps = plan_.rest_steps();
    int shares = kBlockRows / kShare;
    zero_products();
    const BFloat16 *from0 = from[0], *from1 = from[1], *from2 = from[2], *from3 = from[3];
    for (std::int64_t step = 0; step < group_steps; ++step, weights += kTileElements) {
      const std::int64_t at = plan_.steps[step];
      add_products(from0 + at, from1 + at, from2 + at, from3 + at, 64, weights);
      if (shares > 0) {
        finish.template rows<kShare>();
        --shares;
      }
    }
    const BFloat16* gathered = gathered_;
    for (std::int64_t step = 0; step < rest_steps; ++step, weights += kTileElements, gathered += 4 * kTileElements) {
      add_products(gathered, gathered + kTileElements, gathered + 2 * kTileElements, gathered + 3 * kTileElements, 64,
                   weights);
      if (shares > 0) {
        finish.template rows<kShare>();
        --shares;
      }
    }
  }

  const ConvPlan& plan_;
  const ConvRows& rows_;
  float* const products_;
  BFloat16* const gathered_;
  Block blocks_[2];  // what is pending points into the one before
  int last_block_ = 0;
};

template <After kAfter>
void run(const ConvPlan& plan, const ConvRows& rows, void* scratch) {
  Worker<kAfter> worker(plan, rows, scratch);
  switch (rows_per_step(plan.group_steps() + plan.rest_steps())) {
    case 1:
      worker.template run<1>();
      break;
    case 2:
      worker.template run<2>();
      break;
    case 4:
      worker.template run<4>();
      break;
    case 8:
      worker.template run<8>();
      break;
    case 16:
      worker.template run<16>();
      break;
    case 32:
      worker.template run<32>();
      break;
    default:
      worker.template run<64>();
  }
}

}  // namespace

void conv_rows_amx(const ConvPlan& plan, const ConvRows& rows, void* scratch) {
  const Tiles tiles;
  if (plan.table == nullptr) {
    run<After::identity>(plan, rows, scratch);
  } else if (rows.out.z == nullptr) {
    run<After::gelu>(plan, rows, scratch);
  } else {
    run<After::gelu_and_z>(plan, rows, scratch);
  }
}

namespace {

// An input channel under a tap.
struct Inner {
  std::int64_t tap, channel;
};

// 16 columns of a weight of which each is an output channel's, wherever those are.
class GatheredColumns {
 public:
  GatheredColumns(const ConvPlan& plan, const ConvWeight& weight, std::int64_t tile)
      : weight_(weight.data), channels_(plan.in_channels) {
    alignas(64) std::int32_t rows[kTile] = {};  // where the weights of each column begin
    for (std::int64_t lane = 0; lane < kTile; ++lane) {
      const std::int32_t column = plan.column[tile * kTile + lane];
      if (column < 0) continue;
      lanes_ = static_cast<__mmask16>(lanes_ | 1u << lane);
      rows[lane] = static_cast<std::int32_t>(column * plan.taps() * channels_);
    }
    index_ = _mm512_load_si512(rows);
  }

  // The columns' elements of two inner ones, or of one.
  __m512i pair(const Inner& first, const Inner* second) const {
    const std::int64_t at = first.tap * channels_ + first.channel;
    const std::int64_t next = second == nullptr ? -1 : second->tap * channels_ + second->channel;
    if (next == at + 1) return _mm512_mask_i32gather_epi32(_mm512_setzero_si512(), lanes_, index_, weight_ + at, 2);
    alignas(64) std::int32_t rows[kTile];
    alignas(64) std::uint16_t pairs[2 * kTile] = {};
    _mm512_store_si512(rows, index_);
    for (std::int64_t lane = 0; lane < kTile; ++lane) {
      if ((lanes_ >> lane & 1) == 0) continue;
      pairs[2 * lane] = weight_[rows[lane] + at].bits;
      if (second != nullptr) pairs[2 * lane + 1] = weight_[rows[lane] + next].bits;
    }
    return _mm512_load_si512(pairs);
  }

 private:
  const BFloat16* weight_;
  std::int64_t channels_;
  __mmask16 lanes_ = 0;
  __m512i index_;
};

// 16 columns of a data gradient's weight: they are neighbours, the inner elements are output channels, and taps are
// in reversed order.
class NeighbouringColumns {
 public:
  NeighbouringColumns(const ConvPlan& plan, const ConvWeight& weight, std::int64_t tile)
      : weight_(weight.data + tile * kTile),
        columns_(plan.out_channels),
        taps_(plan.taps()),
        cells_(weight.gradient_r * weight.gradient_r),
        channels_(plan.in_channels / cells_),
        lanes_(static_cast<__mmask16>(first_lanes(columns_ - tile * kTile))) {}

  __m512i pair(const Inner& first, const Inner* second) const {
    const __m256i none = _mm256_setzero_si256();
    const __m512i low = _mm512_cvtepu16_epi32(elements(first));
    const __m512i high = _mm512_cvtepu16_epi32(second == nullptr ? none : elements(*second));
    return _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
  }

 private:
  __m256i elements(const Inner& inner) const {
    const std::int64_t channel = inner.channel % channels_ * cells_ + inner.channel / channels_;
    return _mm256_maskz_loadu_epi16(lanes_, weight_ + (channel * taps_ + taps_ - 1 - inner.tap) * columns_);
  }

  const BFloat16* weight_;
  std::int64_t columns_, taps_, cells_, channels_;
  __mmask16 lanes_;
};

template <class Columns>
void pack(const ConvPlan& plan, const ConvWeight& weight, std::int64_t begin, std::int64_t end) {
  const std::int64_t channels = plan.in_channels, groups = plan.in.groups, taps = plan.taps();
  BFloat16* to = plan.packed + begin * plan.tile_elements();
  for (std::int64_t tile = begin; tile < end; ++tile) {
    const Columns columns(plan, weight, tile);
    const auto put = [&](__m512i pairs) {
      _mm512_store_si512(to, pairs);
      to += 2 * kTile;
    };
    for (std::int64_t tap = 0; tap < taps; ++tap) {
      for (std::int64_t c = 0; c < groups * kStep; c += 2) {
        const Inner second{tap, c + 1};
        put(c >= channels ? _mm512_setzero_si512() : columns.pair({tap, c}, c + 1 < channels ? &second : nullptr));
      }
    }
    Inner inner{0, groups * kStep};
    const auto next = [&] {
      const Inner one = inner;
      if (++inner.channel == channels) inner = {inner.tap + 1, groups * kStep};
      return one;
    };
    for (std::int64_t k = 0; k < plan.rest_steps() * kStep; k += 2) {
      if (k >= taps * plan.in.rest) {
        put(_mm512_setzero_si512());
        continue;
      }
      const Inner first = next();
      const bool two = k + 1 < taps * plan.in.rest;
      const Inner second = two ? next() : first;
      put(columns.pair(first, two ? &second : nullptr));
    }
  }
}

}  // namespace

void conv_pack_amx(const ConvPlan& plan, const ConvWeight& weight, std::int64_t begin, std::int64_t end) {
  if (weight.gradient_r > 0) {
    pack<NeighbouringColumns>(plan, weight, begin, end);
  } else {
    pack<GatheredColumns>(plan, weight, begin, end);
  }
}

void convert_rows_amx(const ImageRows& image, const PlanesLayout& layout, BFloat16* plane, BFloat16* rest) {
  const std::int64_t columns = layout.columns, channels = image.channels;
  const std::int64_t left = smaller(larger(-image.column, 0), columns), first = larger(image.column, 0);
  const std::int64_t width = larger(smaller(image.width - first, columns - left), 0);
  const std::int64_t right = columns - left - width;
  for (std::int64_t row = 0; row < image.count; ++row, plane += layout.plane_row(), rest += layout.rest_row()) {
    const std::int64_t in = image.row + row;
    if (in < 0 || in >= image.height) {
      std::memset(static_cast<void*>(plane), 0, static_cast<std::size_t>(layout.plane_row()) * 2);
      std::memset(static_cast<void*>(rest), 0, static_cast<std::size_t>(layout.rest_row()) * 2);
      continue;
    }
    const BFloat16* x = image.x + (in * image.width + first) * channels;
    for (std::int64_t g = 0; g < layout.groups; ++g) {
      BFloat16* to = plane + g * columns * kStep;
      std::memset(static_cast<void*>(to), 0, static_cast<std::size_t>(left * kStep) * 2);
      to += left * kStep;
      const __mmask32 lanes = first_lanes(channels - g * kStep);
      for (std::int64_t w = 0; w < width; ++w, to += kStep) {
        const BFloat16* from = x + w * channels + g * kStep;
        _mm_prefetch(reinterpret_cast<const char*>(from) + 2048, _MM_HINT_T0);
        _mm512_storeu_si512(to, _mm512_maskz_loadu_epi16(lanes, from));
      }
      std::memset(static_cast<void*>(to), 0, static_cast<std::size_t>(right * kStep) * 2);
    }
    if (layout.rest == 0) continue;
    const std::int64_t n = layout.rest;
    BFloat16* to = rest;
    std::memset(static_cast<void*>(to), 0, static_cast<std::size_t>(left * n) * 2);
    to += left * n;
    if (n == 1) {
      for (std::int64_t w = 0; w < width; ++w) to[w] = x[(w + 1) * channels - 1];
    } else {
      for (std::int64_t w = 0; w < width; ++w) copy_elements(to + w * n, x + (w + 1) * channels - n, n);
    }
    std::memset(static_cast<void*>(to + width * n), 0, static_cast<std::size_t>(right * n) * 2);
  }
}

}  // namespace hflfnerv
