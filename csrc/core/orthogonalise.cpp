#include "orthogonalise.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <new>
#include <numeric>

#include "convert.h"
#include "memory.h"
#include "orthogonalise_amx.h"
#include "orthogonalise_kernels.h"
#include "parallel.h"

namespace hflfnerv {

#if defined(HFLFNERV_HAVE_AVX2)
namespace {

// Threads share the products of a matrix from about this many rows and columns on; smaller ones are shared out.
constexpr std::int64_t kLarge = 128;
// Rows of blocks whose operands stay in the second cache.
[[maybe_unused]] constexpr std::int64_t kBlockRowsAtOnce = 5;
[[maybe_unused]] constexpr std::int64_t kSquared = 4096;  // elements of 16 bits that are converted at once

const OrthogonaliseKernels& kernels_of([[maybe_unused]] SimdLevel level) {
#if defined(HFLFNERV_HAVE_AVX512)
  if (level == SimdLevel::avx512) return orthogonalise_kernels_avx512();
#endif
  return orthogonalise_kernels_avx2();
}

std::int64_t in_wholes(std::int64_t count, std::int64_t of) { return (count + of - 1) / of * of; }

// The shorter side is that of the Gram matrix.
std::int64_t shorter(const OrthogonaliseMatrix& m) { return std::min(m.rows, m.columns); }

constexpr std::int64_t kSide = 16;  // of what is transposed at once: its lines stay in the first cache

// to[j][i] = scale from[i][j] of up to kSide rows i and of columns j.
void transpose(const float* from, std::int64_t from_row, std::int64_t rows, std::int64_t columns, float* to,
               std::int64_t to_row, float scale) {
  for (std::int64_t j = 0; j < columns; ++j) {
    for (std::int64_t i = 0; i < rows; ++i) to[j * to_row + i] = scale * from[i * from_row + j];
  }
}

double sum_of_squares(const float* x, std::int64_t count) {
  constexpr int kSums = 8;  // that do not wait for each other
  double sums[kSums] = {};
  for (std::int64_t i = 0; i < count; ++i) sums[i % kSums] += static_cast<double>(x[i]) * static_cast<double>(x[i]);
  return std::accumulate(sums, sums + kSums, 0.0);
}

// By which a matrix is multiplied first.
float scale_of(double squares) { return static_cast<float>(1 / std::max(std::sqrt(squares), 1e-20)); }

class Orthogonaliser {
 public:
  Orthogonaliser(const OrthogonaliseMatrix& matrix, const Quintic& quintic, int threads, const OrthogonaliseKernels& kernels)
      : matrix_(matrix),
        quintic_(quintic),
        threads_(threads),
        kernels_(kernels),
        n_(shorter(matrix)),
        length_(std::max(matrix.rows, matrix.columns)),
        chunks_((n_ + kernels.columns - 1) / kernels.columns),
        // In cache lines, an odd number of them: rows are then in different sets of the cache.
        row_((std::max(in_wholes(n_, kernels.columns), in_wholes(n_, kernels.rows) + 15) / 16 | 1) * 16),
        square_(in_wholes(n_, kernels.rows) * row_),
        memory_(new_zeros<float>(2 * in_wholes(length_, kernels.rows) * row_ + 6 * square_)) {
    float* next = memory_.get();
    const auto take = [&](std::int64_t floats) {
      float* const taken = next;
      next += floats;
      return taken;
    };
    x_ = take(in_wholes(length_, kernels.rows) * row_);
    y_ = take(in_wholes(length_, kernels.rows) * row_);
    for (float** const square : {&gram_, &square_of_gram_, &factor_, &product_, &half_, &next_}) *square = take(square_);
  }

  void run() {
    read();
    // Of x with its longer side as rows, X^T X of it.
    multiply_symmetric(x_, 1, row_, x_, length_, gram_);
    for (int step = 0; step < quintic_.steps; ++step) {
      const bool first = step == 0, last = step + 1 == quintic_.steps;
      multiply_symmetric(gram_, row_, 1, gram_, n_, square_of_gram_);
      set_factor(first ? product_ : factor_);
      if (!first) {
        multiply_symmetric(factor_, row_, 1, product_, n_, next_);
        std::swap(product_, next_);
      }
      if (last) break;
      const float* const factor = first ? product_ : factor_;
      multiply_symmetric(gram_, row_, 1, factor, n_, half_);
      multiply_symmetric(half_, row_, 1, factor, n_, gram_);
    }
    multiply({x_, row_, 1, product_, row_, y_, row_, in_wholes(length_, kernels_.rows), n_, false});
    write();
  }

 private:
  bool tall() const { return matrix_.rows > matrix_.columns; }

  // x / |x|, the longer side as rows.
  void read() {
    const std::int64_t count = matrix_.rows * matrix_.columns;
    const float scale = scale_of(sum_of_squares(matrix_.x, count));
    if (tall()) {
      each_rows(length_, [&](std::int64_t first, std::int64_t rows) {
        for (std::int64_t row = first; row < first + rows; ++row) {
          for (std::int64_t i = 0; i < n_; ++i) x_[row * row_ + i] = scale * matrix_.x[row * n_ + i];
        }
      });
    } else {
      each_rows(n_, [&](std::int64_t first, std::int64_t rows) {
        transpose(matrix_.x + first * length_, length_, rows, length_, x_ + first, row_, scale);
      });
    }
  }

  void write() const {
    each_rows(length_, [&](std::int64_t first, std::int64_t rows) {
      if (tall()) {
        for (std::int64_t row = first; row < first + rows; ++row) std::copy_n(y_ + row * row_, n_, matrix_.y + row * n_);
      } else {
        transpose(y_ + first * row_, row_, rows, n_, matrix_.y + first, length_, 1);
      }
    });
  }

  // a + b G + c G^2, by which a step multiplies.
  void set_factor(float* factor) const {
    each_rows(n_, [&](std::int64_t first, std::int64_t rows) {
      for (std::int64_t i = first * row_; i < (first + rows) * row_; ++i) {
        factor[i] = quintic_.b * gram_[i] + quintic_.c * square_of_gram_[i];
      }
      for (std::int64_t i = first; i < first + rows; ++i) factor[i * row_ + i] += quintic_.a;
    });
  }

  // A product of matrices that commute, or of one with itself, is symmetric.
  void multiply_symmetric(const float* a, std::int64_t a_row, std::int64_t a_inner, const float* b, std::int64_t inner,
                          float* c) const {
    multiply({a, a_row, a_inner, b, row_, c, row_, in_wholes(n_, kernels_.rows), inner, true});
    // What is below the diagonal; of the blocks on it, both triangles are there, and become each other's.
    each_rows(n_, [&](std::int64_t first, std::int64_t rows) {
      float* const diagonal = c + first * row_ + first;
      transpose(diagonal, row_, rows, n_ - first, diagonal, row_, 1);
    });
  }

  // run(first, rows) for up to kSide rows after the other.
  template <class Run>
  void each_rows(std::int64_t count, const Run& run) const {
    parallel_items((count + kSide - 1) / kSide, threads_, [&](int, std::int64_t item) {
      run(item * kSide, std::min(kSide, count - item * kSide));
    });
  }

  void multiply(const MatrixProduct& task) const {
    parallel_items(chunks_, threads_, [&](int, std::int64_t chunk) { kernels_.multiply(task, chunk, chunk + 1); });
  }

  const OrthogonaliseMatrix matrix_;
  const Quintic quintic_;
  const int threads_;
  const OrthogonaliseKernels& kernels_;
  const std::int64_t n_, length_, chunks_, row_, square_;
  const Aligned<float> memory_;
  float *x_, *y_, *gram_, *square_of_gram_, *factor_, *product_, *half_, *next_;
};

}  // namespace

namespace {

// run(matrix, threads) for each: small ones side by side, large ones after each other with all threads.
template <class Matrix, class Run>
void each_matrix(const Matrix* matrices, std::int64_t count, int threads, const Run& run) {
  const auto is_large = [&](std::int64_t i) { return std::min(matrices[i].rows, matrices[i].columns) >= kLarge; };
  std::atomic<bool> out_of_memory = false;  // no exception leaves a thread
  parallel_items(count, threads, [&](int, std::int64_t i) {
    if (is_large(i)) return;
    try {
      run(matrices[i], 1);
    } catch (const std::bad_alloc&) {
      out_of_memory = true;
    }
  });
  if (out_of_memory) throw std::bad_alloc();
  for (std::int64_t i = 0; i < count; ++i) {
    if (is_large(i)) run(matrices[i], threads);
  }
}

}  // namespace

void orthogonalise(const OrthogonaliseMatrix* matrices, std::int64_t count, const Quintic& quintic, int threads,
                   SimdLevel level) {
  const OrthogonaliseKernels& kernels = kernels_of(level);
  each_matrix(matrices, count, threads, [&](const OrthogonaliseMatrix& matrix, int own) {
    Orthogonaliser(matrix, quintic, own, kernels).run();
  });
}

#if defined(HFLFNERV_HAVE_AMX)
namespace {

double sum_of_squares(const BFloat16* x, std::int64_t count) {
  const Aligned<float> row = new_aligned<float>(kSquared);
  double sum = 0;
  for (std::int64_t begin = 0; begin < count; begin += kSquared) {
    const std::int64_t n = std::min(kSquared, count - begin);
    to_floats(FloatType::bf16, x + begin, n, row.get(), SimdLevel::avx512);  // which there is where there is AMX
    sum += sum_of_squares(row.get(), n);
  }
  return sum;
}

void orthogonalise_one(const OrthogonaliseBFloat16& matrix, const Quintic& quintic, int threads) {
  AmxOrthogonalisation task{};
  task.matrix = matrix;
  task.quintic = quintic;
  task.scale = scale_of(sum_of_squares(matrix.x, matrix.rows * matrix.columns));
  const std::int64_t x = task.x_elements(), gram = task.gram_elements();
  const Aligned<BFloat16> halves = new_aligned<BFloat16>(4 * x + 3 * gram);
  BFloat16* next = halves.get();
  for (BFloat16** const form : {&task.x_rows, &task.x_columns, &task.x_pairs[0], &task.x_pairs[1]}) {
    *form = next;
    next += x;
  }
  for (BFloat16** const form : {&task.gram_rows, &task.gram_columns, &task.factor_rows}) {
    *form = next;
    next += gram;
  }
  const std::int64_t items = std::min(std::max<std::int64_t>(task.rows() / kBlockRowsAtOnce, threads), task.rows());
  const auto each_rows = [&](const auto& run) {
    parallel_items(items, threads, [&](int, std::int64_t item) { run(BlockRows{item, items}); });
  };
  each_rows([&](const BlockRows& rows) { orthogonalise_read_amx(task, rows); });
  for (int step = 0; step < quintic.steps; ++step) {
    each_rows([&](const BlockRows& rows) { orthogonalise_gram_amx(task, rows); });
    each_rows([&](const BlockRows& rows) { orthogonalise_factor_amx(task, rows); });
    each_rows([&](const BlockRows& rows) { orthogonalise_update_amx(task, step, rows); });
  }
}

}  // namespace

void orthogonalise_bfloat16(const OrthogonaliseBFloat16* matrices, std::int64_t count, const Quintic& quintic, int threads) {
  each_matrix(matrices, count, threads,
              [&](const OrthogonaliseBFloat16& matrix, int own) { orthogonalise_one(matrix, quintic, own); });
}
#endif

#else

void orthogonalise(const OrthogonaliseMatrix*, std::int64_t, const Quintic&, int, SimdLevel) {}

#endif

#if !defined(HFLFNERV_HAVE_AMX)
void orthogonalise_bfloat16(const OrthogonaliseBFloat16*, std::int64_t, const Quintic&, int) {}
#endif

}  // namespace hflfnerv
