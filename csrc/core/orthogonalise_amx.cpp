#include "orthogonalise_amx.h"

#include "amx.h"
#include "simd_avx512.h"

namespace hflfnerv {
namespace {

// The elements of a block: `columns[p][q]` of a pair of neighbours p of row q. Where rows are tiles of the left factor, they
// are those of the right one that multiplies by the transpose.
void put_columns(const __m512i* v, BFloat16* to) {
  for (int half = 0; half < 2; ++half) {
    __m512 pairs[kTile];
    for (int i = 0; i < kTile; ++i) pairs[i] = _mm512_castsi512_ps(v[half * kTile + i]);
    Simd::transpose(pairs);
    for (int i = 0; i < kTile; ++i) _mm512_store_ps(reinterpret_cast<float*>(to + (half * kTile + i) * kStep), pairs[i]);
  }
}

void put_rows(const __m512i* v, BFloat16* to) {
  for (int i = 0; i < kBlock; ++i) _mm512_store_si512(to + i * kStep, v[i]);
}

// Pairs of rows: two tiles of 16 columns.
void put_pairs(const __m512i* v, BFloat16* to) {
  const Pairs pairs;
  for (int i = 0; i < kTile; ++i) {
    _mm512_store_si512(to + i * kStep, pairs.low(v[2 * i], v[2 * i + 1]));
    _mm512_store_si512(to + (kTile + i) * kStep, pairs.high(v[2 * i], v[2 * i + 1]));
  }
}

// A block of floats, as four tiles of products, in rows of bfloat16.
void round_rows(const float* block, __m512i* v) {
  for (int i = 0; i < kBlock; ++i) {
    const float* const row = block + i / kTile * 2 * kProducts + i % kTile * kTile;
    const __m256i low = Simd::to_bfloat16(_mm512_load_ps(row)), high = Simd::to_bfloat16(_mm512_load_ps(row + kProducts));
    v[i] = _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
  }
}

// The product of a row of `steps` blocks and of a column of them, `right_stride` elements apart.
void multiply(const BFloat16* left, const BFloat16* right, std::int64_t right_stride, std::int64_t steps, float* products) {
  memory_barrier();
  zero_products();
  for (std::int64_t step = 0; step < steps; ++step, left += kBlockElements, right += right_stride) {
    _tile_loadd(6, right, 64);
    _tile_loadd(4, left, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, right + kTileElements, 64);
    _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(5, left + kTileElements, 64);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  store_products(products);
  memory_barrier();
}

// A row of bfloat16 in two halves of floats.
struct Row {
  explicit Row(__m512i v)
      : low(_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_castsi512_si256(v)), 16))),
        high(_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(v, 1)), 16))) {}
  __m512 low, high;
};

// Products, times `scale`, plus `factor` times a block in rows.
void add_rows(float* products, __m512 scale, __m512 factor, const BFloat16* rows) {
  for (int i = 0; i < kBlock; ++i) {
    const Row row(_mm512_load_si512(rows + i * kStep));
    float* const low = products + i / kTile * 2 * kProducts + i % kTile * kTile;
    float* const high = low + kProducts;
    _mm512_store_ps(low, _mm512_fmadd_ps(factor, row.low, _mm512_mul_ps(scale, _mm512_load_ps(low))));
    _mm512_store_ps(high, _mm512_fmadd_ps(factor, row.high, _mm512_mul_ps(scale, _mm512_load_ps(high))));
  }
}

// What is known of a row of x once it has its values, but for the last step.
void put_x(const AmxOrthogonalisation& task, std::int64_t block, const __m512i* v, BFloat16* pairs) {
  put_rows(v, task.x_rows + block * kBlockElements);
  put_columns(v, task.x_columns + block * kBlockElements);
  put_pairs(v, pairs + block * kBlockElements);
}

// Rows of bfloat16 from or to a matrix in memory, at element (row, column) of x with its shorter side as rows.
struct Place {
  Place(const AmxOrthogonalisation& task, std::int64_t row, std::int64_t column) {
    const std::int64_t across = smaller(task.shorter() - row, kBlock), along = smaller(task.longer() - column, kBlock);
    offset = task.tall() ? column * task.matrix.columns + row : row * task.matrix.columns + column;
    count = task.tall() ? along : across;
    lanes = first_lanes(task.tall() ? across : along);
  }
  std::int64_t offset, count;
  __mmask32 lanes;
};

void read(const AmxOrthogonalisation& task, std::int64_t row) {
  const __m512 scale = _mm512_set1_ps(task.scale);
  for (std::int64_t column = 0; column < task.columns(); ++column) {
    const Place place(task, row * kBlock, column * kBlock);
    __m512i v[kBlock];
    for (std::int64_t i = 0; i < kBlock; ++i) {
      const BFloat16* const from = task.matrix.x + place.offset + i * task.matrix.columns;
      v[i] = _mm512_maskz_loadu_epi16(i < place.count ? place.lanes : 0, from);
    }
    if (task.tall()) transpose_32(v);
    for (__m512i& one : v) {
      const Row values(one);
      const __m256i low = Simd::to_bfloat16(_mm512_mul_ps(scale, values.low));
      one = _mm512_inserti64x4(_mm512_castsi256_si512(low), Simd::to_bfloat16(_mm512_mul_ps(scale, values.high)), 1);
    }
    put_x(task, row * task.columns() + column, v, task.x_pairs[0]);
  }
}

// A block of G on or below the diagonal.
void gram(const AmxOrthogonalisation& task, std::int64_t row, std::int64_t column) {
  const std::int64_t rows = task.rows(), stride = task.columns() * kBlockElements;
  const std::int64_t block = row * rows + column, mirrored = column * rows + row;
  alignas(64) float products[kBlockElements];
  multiply(task.x_rows + row * stride, task.x_columns + column * stride, kBlockElements, task.columns(), products);
  __m512i v[kBlock];
  round_rows(products, v);
  put_rows(v, task.gram_rows + block * kBlockElements);
  put_columns(v, task.gram_columns + block * kBlockElements);
  if (column == row) return;
  transpose_32(v);
  put_rows(v, task.gram_rows + mirrored * kBlockElements);
  put_columns(v, task.gram_columns + mirrored * kBlockElements);
}

// Of b G + c G^2 likewise.
void factor(const AmxOrthogonalisation& task, std::int64_t row, std::int64_t column) {
  const std::int64_t rows = task.rows(), stride = rows * kBlockElements, block = row * rows + column;
  alignas(64) float products[kBlockElements];
  multiply(task.gram_rows + row * stride, task.gram_columns + column * stride, kBlockElements, rows, products);
  add_rows(products, _mm512_set1_ps(task.quintic.c), _mm512_set1_ps(task.quintic.b), task.gram_rows + block * kBlockElements);
  __m512i v[kBlock];
  round_rows(products, v);
  put_rows(v, task.factor_rows + block * kBlockElements);
  if (column == row) return;
  transpose_32(v);
  put_rows(v, task.factor_rows + (column * rows + row) * kBlockElements);
}

// Of x after a step.
void update(const AmxOrthogonalisation& task, int step, std::int64_t row, std::int64_t column) {
  const std::int64_t rows = task.rows(), columns = task.columns(), block = row * columns + column;
  alignas(64) float products[kBlockElements];
  multiply(task.factor_rows + row * rows * kBlockElements, task.x_pairs[step % 2] + column * kBlockElements,
           columns * kBlockElements, rows, products);
  add_rows(products, _mm512_set1_ps(1), _mm512_set1_ps(task.quintic.a), task.x_rows + block * kBlockElements);
  __m512i v[kBlock];
  round_rows(products, v);
  if (step + 1 < task.quintic.steps) {
    put_x(task, block, v, task.x_pairs[(step + 1) % 2]);
    return;
  }
  if (task.tall()) transpose_32(v);
  const Place place(task, row * kBlock, column * kBlock);
  for (std::int64_t i = 0; i < place.count; ++i) {
    _mm512_mask_storeu_epi16(task.matrix.y + place.offset + i * task.matrix.columns, place.lanes, v[i]);
  }
}

// run(row, column) for each of some rows, column by column.
template <class Run>
void each(const BlockRows& some, std::int64_t rows, std::int64_t columns, const Run& run) {
  const Tiles tiles;
  for (std::int64_t column = 0; column < columns; ++column) {
    for (std::int64_t row = some.first; row < rows; row += some.step) run(row, column);
  }
}

}  // namespace

void orthogonalise_read_amx(const AmxOrthogonalisation& task, const BlockRows& some) {
  for (std::int64_t row = some.first; row < task.rows(); row += some.step) read(task, row);
}

void orthogonalise_gram_amx(const AmxOrthogonalisation& task, const BlockRows& some) {
  each(some, task.rows(), task.rows(), [&](std::int64_t row, std::int64_t column) {
    if (column <= row) gram(task, row, column);
  });
}

void orthogonalise_factor_amx(const AmxOrthogonalisation& task, const BlockRows& some) {
  each(some, task.rows(), task.rows(), [&](std::int64_t row, std::int64_t column) {
    if (column <= row) factor(task, row, column);
  });
}

void orthogonalise_update_amx(const AmxOrthogonalisation& task, int step, const BlockRows& some) {
  each(some, task.rows(), task.columns(), [&](std::int64_t row, std::int64_t column) { update(task, step, row, column); });
}

}  // namespace hflfnerv
