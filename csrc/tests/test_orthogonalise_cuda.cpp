// The CUDA steps of Newton and Schulz without a GPU: their kernels, compiled by the C++ compiler, on an emulation of what they
// use of a GPU (emulation/), against the definition in double.
#include "cuda/orthogonalise.cu"

#include <cmath>
#include <cstdio>
#include <random>
#include <vector>

#include "tests/check.h"

namespace {

using namespace hflfnerv;
using Matrix = std::vector<double>;

constexpr double kA = 3.4445, kB = -4.7750, kC = 2.0315;
constexpr int kSteps = 5;

// left right, or left rightᵀ.
Matrix product(const Matrix& left, const Matrix& right, int rows, int depth, int columns, bool transposed) {
  Matrix made(static_cast<std::size_t>(rows * columns));
  for (int i = 0; i < rows; ++i) {
    for (int j = 0; j < columns; ++j) {
      double sum = 0;
      for (int k = 0; k < depth; ++k) {
        sum += left[static_cast<std::size_t>(i * depth + k)] *
               right[static_cast<std::size_t>(transposed ? j * depth + k : k * columns + j)];
      }
      made[static_cast<std::size_t>(i * columns + j)] = sum;
    }
  }
  return made;
}

Matrix steps(Matrix x, int rows, int columns) {
  double squares = 0;
  for (const double value : x) squares += value * value;
  for (double& value : x) value /= std::sqrt(squares);
  for (int step = 0; step < kSteps; ++step) {
    const Matrix gram = product(x, x, rows, columns, rows, true);
    Matrix factor = product(gram, gram, rows, rows, rows, false);
    for (std::size_t at = 0; at < factor.size(); ++at) factor[at] = kC * factor[at] + kB * gram[at];
    const Matrix more = product(factor, x, rows, rows, columns, false);
    for (std::size_t at = 0; at < x.size(); ++at) x[at] = kA * x[at] + more[at];
  }
  return x;
}

struct Shape {
  int rows, columns;
  bool tall;  // its columns lie one after the other
};

// Normal values times `scale`, and on them one matrix of rank 1, `dominant` times as large: gradients are like that.
void check(const std::vector<Shape>& shapes, float scale, float dominant = 0) {
  std::mt19937 generator(1);
  std::normal_distribution<float> normal(0, 1);
  std::vector<std::vector<float>> xs, ys;
  OrthogonaliseCuda call{static_cast<int>(shapes.size()), kSteps, float(kA), float(kB), float(kC), {}, nullptr};
  for (const Shape& shape : shapes) {
    const auto count = static_cast<std::size_t>(shape.rows * shape.columns);
    xs.emplace_back(count);
    std::vector<float> of_row(static_cast<std::size_t>(shape.rows)), of_column(static_cast<std::size_t>(shape.columns));
    for (auto* of : {&of_row, &of_column}) {
      for (float& value : *of) value = normal(generator);
    }
    for (std::size_t at = 0; at < count; ++at) {
      const auto rows = static_cast<std::size_t>(shape.rows), columns = static_cast<std::size_t>(shape.columns);
      const std::size_t row = shape.tall ? at % rows : at / columns, column = shape.tall ? at / rows : at % columns;
      xs.back()[at] = scale * (normal(generator) + dominant * of_row[row] * of_column[column]);
    }
    ys.emplace_back(count + 2, -7.0f);
  }
  for (std::size_t i = 0; i < shapes.size(); ++i) {
    const auto [rows, columns, tall] = shapes[i];
    call.matrix[i] = {xs[i].data(), ys[i].data() + 1, rows, columns, tall ? 1 : columns, tall ? rows : 1};
  }
  std::vector<float4> scratch(static_cast<std::size_t>(orthogonalise_cuda_scratch(call) / 4));
  call.scratch = &scratch[0].x;
  CHECK(orthogonalise_cuda(call, 0, nullptr) == nullptr);
  for (std::size_t i = 0; i < shapes.size(); ++i) {
    const auto [rows, columns, tall] = shapes[i];
    CHECK(ys[i].front() == -7.0f && ys[i].back() == -7.0f);
    Matrix x(xs[i].size());
    const auto at = [&, rows = rows, columns = columns, tall = tall](int row, int column) {
      return static_cast<std::size_t>(tall ? column * rows + row : row * columns + column);
    };
    for (int row = 0; row < rows; ++row) {
      for (int column = 0; column < columns; ++column) x[static_cast<std::size_t>(row * columns + column)] = xs[i][at(row, column)];
    }
    const Matrix expected = steps(x, rows, columns);
    double error = 0, size = 0;
    for (int row = 0; row < rows; ++row) {
      for (int column = 0; column < columns; ++column) {
        const double value = expected[static_cast<std::size_t>(row * columns + column)];
        error += std::pow(ys[i][at(row, column) + 1] - value, 2);
        size += value * value;
      }
    }
    // Each of two factors is off by 2^-21 and the product of their rests, 2^-22, is missing; each of four steps multiplies
    // an error in the small eigenvalues by a^2.
    const double bound = 2 * std::pow(kA, 8) * 5 * std::pow(2.0, -22);
    CHECK(std::sqrt(error) <= bound * std::sqrt(size));
  }
}

void check_what_is_zero_or_not_finite() {
  std::vector<float> zeros(12), made(12, -7.0f), ones(12, 1.0f), nans(12);
  ones[5] = std::nanf("");
  OrthogonaliseCuda call{2, kSteps, float(kA), float(kB), float(kC), {}, nullptr};
  call.matrix[0] = {zeros.data(), made.data(), 3, 4, 4, 1};
  call.matrix[1] = {ones.data(), nans.data(), 3, 4, 4, 1};
  std::vector<float4> scratch(static_cast<std::size_t>(orthogonalise_cuda_scratch(call) / 4));
  call.scratch = &scratch[0].x;
  CHECK(orthogonalise_cuda(call, 0, nullptr) == nullptr);
  for (const float value : made) CHECK(value == 0.0f);
  for (const float value : nans) CHECK(std::isnan(value));
}

}  // namespace

int main() {
  check({{20, 150, false}, {33, 40, true}, {1, 1, false}, {16, 300, true}}, 1.0f);
  check({{17, 70, false}}, 1e-15f);
  check({{17, 70, false}, {33, 40, true}}, 1e-9f, 1000.0f);
  check_what_is_zero_or_not_finite();
  std::printf("orthogonalise_cuda: ok\n");
  return 0;
}
