// Tests of the kernels for AMX in csrc/core without Python, meant to be built with -fsanitize=address,undefined: convolution,
// its gradients and orthogonalisation against plain loops in double, at sizes that no tile, vector or band divides, on several
// threads. The sanitizers do not see what masked and tile instructions read and write: memory is between pages that cannot
// be touched, and what is left of its own pages has to stay as it was.
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <memory>
#include <vector>

#include "core/conv_pixel_shuffle_gelu.h"
#include "core/orthogonalise.h"
#include "tests/bfloat16.h"
#include "tests/convolution.h"

namespace {

using namespace hflfnerv;
using Halves = std::vector<BFloat16>;

enum class Side { begin, end };  // of its pages, at which memory lies

// What a kernel forgets to write stays NaN, and so does what is around it.
template <class T>
class Fenced {
 public:
  Fenced(std::size_t count, Side side) : count_(count), page_(static_cast<std::size_t>(sysconf(_SC_PAGESIZE))) {
    pages_ = (count * sizeof(T) + page_ - 1) / page_ * page_;
    void* const mapped = mmap(nullptr, pages_ + 2 * page_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    CHECK(mapped != MAP_FAILED);
    first_ = static_cast<unsigned char*>(mapped) + page_;
    CHECK(mprotect(first_, pages_, PROT_READ | PROT_WRITE) == 0);
    std::memset(first_, 0xff, pages_);
    at_ = side == Side::begin ? 0 : pages_ - count * sizeof(T);
  }
  Fenced(const std::vector<T>& values, Side side) : Fenced(values.size(), side) {
    std::memcpy(data(), values.data(), values.size() * sizeof(T));
  }
  Fenced(const Fenced&) = delete;
  Fenced& operator=(const Fenced&) = delete;
  ~Fenced() { munmap(first_ - page_, pages_ + 2 * page_); }

  T* data() { return reinterpret_cast<T*>(first_ + at_); }
  // What was written, once it is sure that nothing else was.
  std::vector<T> values() {
    for (std::size_t i = 0; i < pages_; ++i) {
      if (i < at_ || i >= at_ + count_ * sizeof(T)) CHECK(first_[i] == 0xff);
    }
    return std::vector<T>(data(), data() + count_);
  }

 private:
  std::size_t count_, page_, pages_ = 0, at_ = 0;
  unsigned char* first_ = nullptr;
};

bool equal(const Halves& a, const Halves& b) {
  return std::equal(a.begin(), a.end(), b.begin(), b.end(), [](BFloat16 x, BFloat16 y) { return x.bits == y.bits; });
}

Halves random_halves(std::int64_t count, double scale = 1) {
  Floats values = random_floats(count);
  for (float& value : values) value *= static_cast<float>(scale);
  return narrow(values);
}

// Each result within the error of a sum of `terms` floats, which grows by at most 1.13 in GELU, with that of GELU, and of one
// rounding to bfloat16.
void check_rounded(const Halves& actual, const Doubles& expected, const Doubles& sizes, std::int64_t terms, bool with_gelu) {
  CHECK(actual.size() == expected.size());
  for (std::size_t i = 0; i < actual.size(); ++i) {
    double error = static_cast<double>(terms + 1) * 0x1p-24 * sizes[i];
    if (with_gelu) error = 1.13 * error + 1e-7 + 1.2e-7 * std::abs(expected[i]);
    CHECK(std::abs(static_cast<double>(widen(actual[i])) - expected[i]) <= 0x1p-8 * (std::abs(expected[i]) + error) + error);
  }
}

struct Results {
  Halves y, plain_y, linear, z, dx, dweight;
  bool operator==(const Results& o) const {
    return equal(y, o.y) && equal(plain_y, o.plain_y) && equal(linear, o.linear) && equal(z, o.z) && equal(dx, o.dx) &&
           equal(dweight, o.dweight);
  }
};

struct Inputs {
  Halves x, weight, dz;
  Floats bias;
};

Results run(const ConvPixelShuffleShape& s, const Inputs& in, bool tanh_form, int threads, Side side) {
  Fenced<BFloat16> x(in.x, side), weight(in.weight, side), dz(in.dz, side);
  Fenced<float> bias(in.bias, side);
  Fenced<BFloat16> y(in.dz.size(), side), plain_y(in.dz.size(), side), linear(in.dz.size(), side), z(in.dz.size(), side);
  Fenced<BFloat16> dx(in.x.size(), side), dweight(in.weight.size(), side);
  const ConvActivation activation = tanh_form ? ConvActivation::gelu_tanh : ConvActivation::gelu;
  conv_pixel_shuffle_gelu_fwd(s, activation, x.data(), weight.data(), bias.data(), y.data(), z.data(), threads);
  conv_pixel_shuffle_gelu_fwd(s, activation, x.data(), weight.data(), nullptr, plain_y.data(), nullptr, threads);
  conv_pixel_shuffle_gelu_fwd(s, ConvActivation::identity, x.data(), weight.data(), bias.data(), linear.data(), nullptr,
                              threads);
  Results r;
  if (s.padding_h < s.kernel_h && s.padding_w < s.kernel_w) {
    conv_pixel_shuffle_gelu_dgrad(s, dz.data(), weight.data(), dx.data(), threads);
    r.dx = dx.values();
  }
  conv_pixel_shuffle_gelu_wgrad(s, x.data(), dz.data(), dweight.data(), threads);
  r.y = y.values();
  r.plain_y = plain_y.values();
  r.linear = linear.values();
  r.z = z.values();
  r.dweight = dweight.values();
  CHECK(equal(x.values(), in.x) && equal(weight.values(), in.weight) && equal(dz.values(), in.dz));
  return r;
}

void check(const ConvPixelShuffleShape& s, bool tanh_form) {
  const std::int64_t in = s.in_channels, out = s.out_channels(), taps = s.kernel_h * s.kernel_w, r = s.r;
  const std::int64_t height = s.out_height(), width = s.out_width(), pixels = s.batch * height * width;
  const Inputs inputs{random_halves(s.batch * s.height * s.width * in),
                      random_halves(out * taps * in, 1 / std::sqrt(static_cast<double>(taps * in))),
                      random_halves(pixels * out), random_floats(out)};
  const Results results = run(s, inputs, tanh_form, 1, Side::end);
  CHECK(results == run(s, inputs, tanh_form, 1, Side::begin));
  for (const int threads : {2, 5}) CHECK(results == run(s, inputs, tanh_form, threads, Side::end));

  const Floats x = widen(inputs.x), weight = widen(inputs.weight), dz = widen(inputs.dz);
  const auto outputs = static_cast<std::size_t>(pixels * out);
  Doubles y(outputs), plain_y(outputs), linear(outputs), z(outputs), y_sizes(outputs), z_sizes(outputs);
  Sums dx(x.size()), dweight(weight.size());
  for (std::int64_t image = 0; image < s.batch; ++image) {
    for (std::int64_t h = 0; h < height; ++h) {
      for (std::int64_t w = 0; w < width; ++w) {
        for (std::int64_t n = 0; n < out; ++n) {
          const std::int64_t c = n / (r * r), i = n % (r * r) / r, j = n % r;
          const auto yi = static_cast<std::size_t>(((image * height * r + h * r + i) * width * r + w * r + j) * s.channels + c);
          const auto zi = static_cast<std::size_t>(((image * height + h) * width + w) * out + (i * r + j) * s.channels + c);
          const double slope = dz[zi], added = inputs.bias[static_cast<std::size_t>(n)];
          double sum = 0, size = 0;
          for (std::int64_t tap = 0; tap < taps; ++tap) {
            const std::int64_t row = h + tap / s.kernel_w - s.padding_h, column = w + tap % s.kernel_w - s.padding_w;
            if (row < 0 || row >= s.height || column < 0 || column >= s.width) continue;
            for (std::int64_t k = 0; k < in; ++k) {
              const auto xi = static_cast<std::size_t>(((image * s.height + row) * s.width + column) * in + k);
              const auto wi = static_cast<std::size_t>((n * taps + tap) * in + k);
              const double value = x[xi], factor = weight[wi];
              sum += value * factor;
              size += std::abs(value * factor);
              dx.add(xi, slope * factor);
              dweight.add(wi, slope * value);
            }
          }
          z[zi] = linear[yi] = sum + added;
          y[yi] = gelu(sum + added, tanh_form);
          plain_y[yi] = gelu(sum, tanh_form);
          z_sizes[zi] = y_sizes[yi] = size + std::abs(added);
        }
      }
    }
  }
  check_rounded(results.y, y, y_sizes, taps * in + 1, true);
  check_rounded(results.plain_y, plain_y, y_sizes, taps * in, true);
  check_rounded(results.linear, linear, y_sizes, taps * in + 1, false);
  check_rounded(results.z, z, z_sizes, taps * in + 1, false);
  if (!results.dx.empty()) check_rounded(results.dx, dx.values, dx.sizes, taps * out, false);
  check_rounded(results.dweight, dweight.values, dweight.sizes, pixels, false);
}

constexpr Quintic kQuintic{3.4445f, -4.7750f, 2.0315f, 5};

Doubles product(const Doubles& a, std::int64_t rows, std::int64_t inner, const Doubles& b, std::int64_t columns) {
  Doubles c(static_cast<std::size_t>(rows * columns));
  for (std::int64_t i = 0; i < rows; ++i) {
    for (std::int64_t k = 0; k < inner; ++k) {
      const double factor = a[static_cast<std::size_t>(i * inner + k)];
      for (std::int64_t j = 0; j < columns; ++j) {
        c[static_cast<std::size_t>(i * columns + j)] += factor * b[static_cast<std::size_t>(k * columns + j)];
      }
    }
  }
  return c;
}

Doubles transposed(const Doubles& a, std::int64_t rows, std::int64_t columns) {
  Doubles b(a.size());
  for (std::int64_t i = 0; i < rows; ++i) {
    for (std::int64_t j = 0; j < columns; ++j) {
      b[static_cast<std::size_t>(j * rows + i)] = a[static_cast<std::size_t>(i * columns + j)];
    }
  }
  return b;
}

// The steps, with x, its Gram matrix and the polynomial of that rounded to bfloat16 or not.
Doubles steps(const Halves& start, std::int64_t rows, std::int64_t columns, bool rounded) {
  const auto round = [&](Doubles& values) {
    for (double& value : values) {
      if (rounded) value = static_cast<double>(widen(narrow(static_cast<float>(value))));
    }
  };
  const Floats wide = widen(start);
  Doubles x(wide.begin(), wide.end());
  const bool tall = rows > columns;
  if (tall) {
    x = transposed(x, rows, columns);
    std::swap(rows, columns);
  }
  double squares = 0;
  for (const double value : x) squares += value * value;
  for (double& value : x) value /= std::max(std::sqrt(squares), 1e-20);
  round(x);
  for (int step = 0; step < kQuintic.steps; ++step) {
    Doubles gram = product(x, rows, columns, transposed(x, rows, columns), rows);
    round(gram);
    Doubles factor = product(gram, rows, rows, gram, rows);
    for (std::size_t i = 0; i < factor.size(); ++i) {
      factor[i] = static_cast<double>(kQuintic.b) * gram[i] + static_cast<double>(kQuintic.c) * factor[i];
    }
    round(factor);
    const Doubles added = product(factor, rows, rows, x, columns);
    for (std::size_t i = 0; i < x.size(); ++i) x[i] = static_cast<double>(kQuintic.a) * x[i] + added[i];
    round(x);
  }
  return tall ? transposed(x, rows, columns) : x;
}

double distance(const Doubles& a, const Doubles& b) {
  double squares = 0;
  for (std::size_t i = 0; i < a.size(); ++i) squares += (a[i] - b[i]) * (a[i] - b[i]);
  return std::sqrt(squares);
}

void check_orthogonalise(const std::vector<std::array<std::int64_t, 2>>& shapes) {
  std::vector<Halves> xs;
  for (const auto& [rows, columns] : shapes) xs.push_back(random_halves(rows * columns, 3));
  const auto run = [&](int threads, Side side) {
    std::vector<std::unique_ptr<Fenced<BFloat16>>> inputs, outputs;
    std::vector<OrthogonaliseBFloat16> matrices;
    for (std::size_t i = 0; i < xs.size(); ++i) {
      inputs.push_back(std::make_unique<Fenced<BFloat16>>(xs[i], side));
      outputs.push_back(std::make_unique<Fenced<BFloat16>>(xs[i].size(), side));
      matrices.push_back({shapes[i][0], shapes[i][1], inputs.back()->data(), outputs.back()->data()});
    }
    orthogonalise_bfloat16(matrices.data(), static_cast<std::int64_t>(matrices.size()), kQuintic, threads);
    std::vector<Halves> results;
    for (const auto& output : outputs) results.push_back(output->values());
    for (std::size_t i = 0; i < xs.size(); ++i) CHECK(equal(inputs[i]->values(), xs[i]));
    return results;
  };
  const std::vector<Halves> results = run(1, Side::end);
  for (const int threads : {1, 3, 5}) {
    const std::vector<Halves> again = run(threads, Side::begin);
    for (std::size_t i = 0; i < xs.size(); ++i) CHECK(equal(results[i], again[i]));
  }
  for (std::size_t i = 0; i < xs.size(); ++i) {
    const Floats made = widen(results[i]);
    const Doubles rounded = steps(xs[i], shapes[i][0], shapes[i][1], true);
    const double own = distance(rounded, steps(xs[i], shapes[i][0], shapes[i][1], false));
    // As in tests/ops/test_orthogonalise.py: a few of the roundings go the other way, for sums are in float32.
    CHECK(distance(Doubles(made.begin(), made.end()), rounded) <= own);
  }
  const Halves zeros(35);
  Halves y(35, BFloat16{0xffff});
  const OrthogonaliseBFloat16 matrix{5, 7, zeros.data(), y.data()};
  orthogonalise_bfloat16(&matrix, 1, kQuintic, 1);
  CHECK(equal(y, zeros));
}

}  // namespace

int main() {
  if (const char* const reason = amx_unavailable()) {
    std::printf("AMX: %s\n", reason);
    return 0;
  }
  // batch, input channels, height, width, channels, r, kernel, padding: one of everything; channels in whole groups, with a
  // rest and as one alone; shuffles of up to 5 x 5; kernels that are even, not square, larger than the image; paddings less
  // and more than half of the kernel; several bands of columns, of rows and of both.
  const ConvPixelShuffleShape shapes[] = {{1, 1, 1, 1, 1, 1, 1, 1, 0, 0},      {1, 33, 9, 14, 7, 2, 5, 5, 2, 2},
                                          {2, 7, 5, 23, 3, 3, 3, 3, 1, 1},     {1, 40, 6, 8, 9, 2, 5, 5, 2, 2},
                                          {3, 16, 4, 4, 1, 4, 3, 3, 1, 1},     {1, 3, 7, 70, 5, 2, 1, 1, 0, 0},
                                          {1, 31, 20, 9, 3, 2, 5, 3, 0, 2},    {1, 64, 3, 40, 17, 1, 3, 3, 1, 1},
                                          {2, 2, 8, 5, 4, 1, 3, 1, 1, 0},      {1, 5, 6, 7, 2, 1, 2, 4, 1, 3},
                                          {1, 48, 4, 6, 4, 1, 7, 7, 3, 3},     {1, 57, 3, 5, 1, 5, 3, 3, 1, 1},
                                          {2, 1, 3, 1, 1, 1, 3, 3, 1, 1},      {1, 24, 2, 3, 2, 3, 3, 5, 2, 4},
                                          {1, 130, 20, 141, 1, 1, 3, 3, 1, 1}, {1, 2, 70, 530, 1, 1, 3, 3, 1, 1},
                                          {1, 17, 5, 6, 3, 1, 2, 2, 3, 2}};
  bool tanh_form = false;
  for (const ConvPixelShuffleShape& shape : shapes) check(shape, tanh_form = !tanh_form);
  for (const std::array<std::int64_t, 2> shape : {std::array<std::int64_t, 2>{1, 1}, {1, 9}, {9, 1}, {32, 32}, {17, 16},
                                                  {5, 300}, {33, 31}, {64, 49}, {140, 131}, {130, 200}}) {
    check_orthogonalise({shape});
  }
  check_orthogonalise({});
  check_orthogonalise({{3, 40}, {129, 128}, {64, 32}, {7, 7}, {40, 3}, {135, 161}});
  std::puts("AMX: ok");
  return 0;
}
