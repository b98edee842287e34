// Fourier transforms of 16 values, and squares of 18 x 18 real ones made of them, a vector at a time. Included behind the Simd
// of one instruction set. None of them is normalised.
#pragma once

#include <cstdint>

namespace hflfnerv {
namespace {

// Loops over a line are unrolled: its vectors are in registers, as far as there are any.
constexpr int kFourier = 16, kFourierLine = kFourier + 2;

struct Complex {
  Simd::F re, im;
};

// cos and sin of 2 pi k / 16.
constexpr double fourier_cos(int k) {
  constexpr double quarter[] = {1, 0.92387953251128676, 0.70710678118654752, 0.38268343236508977, 0};
  k = (k % kFourier + kFourier) % kFourier;
  if (k > kFourier / 2) k = kFourier - k;
  return k <= kFourier / 4 ? quarter[k] : -quarter[kFourier / 2 - k];
}
constexpr double fourier_sin(int k) { return fourier_cos(k - kFourier / 4); }

// a + b c
inline __attribute__((always_inline)) Simd::F fourier_plus(Simd::F a, double b, Simd::F c) {
  if (b == 1) return Simd::add(a, c);
  if (b == -1) return Simd::sub(a, c);
  return Simd::fma(Simd::set(static_cast<float>(b)), c, a);
}

// Of n real values at x[0], x[step], ...: re[0 ... n / 2] and im[1 ... n / 2 - 1].
//
// A transform is that of even and that of odd values, the latter turned by the root w: e + w o and e - w o. With
// w = c (1 - i s / c) both take six operations, not eight.
template <int n>
inline __attribute__((always_inline)) void fourier_real(const Simd::F* x, int step, Simd::F* re, Simd::F* im) {
  if constexpr (n == 2) {
    re[0] = Simd::add(x[0], x[step]);
    re[1] = Simd::sub(x[0], x[step]);
  } else {
    constexpr int m = n / 2;
    Simd::F even_re[m / 2 + 1], even_im[m / 2 + 1], odd_re[m / 2 + 1], odd_im[m / 2 + 1];
    fourier_real<m>(x, 2 * step, even_re, even_im);
    fourier_real<m>(x + step, 2 * step, odd_re, odd_im);
    re[0] = Simd::add(even_re[0], odd_re[0]);
    re[m] = Simd::sub(even_re[0], odd_re[0]);
    re[m / 2] = even_re[m / 2];
    im[m / 2] = Simd::sub(Simd::zero(), odd_re[m / 2]);
#pragma GCC unroll 8
    for (int k = 1; k < m / 2; ++k) {
      const double c = fourier_cos(k * kFourier / n), s = fourier_sin(k * kFourier / n);
      const Simd::F turned_re = fourier_plus(odd_re[k], s / c, odd_im[k]);
      const Simd::F turned_im = fourier_plus(odd_im[k], -s / c, odd_re[k]);
      re[k] = fourier_plus(even_re[k], c, turned_re);
      re[m - k] = fourier_plus(even_re[k], -c, turned_re);
      im[k] = fourier_plus(even_im[k], c, turned_im);
      im[m - k] = fourier_plus(Simd::sub(Simd::zero(), even_im[k]), c, turned_im);
    }
  }
}

// The inverse of fourier_real, times n.
template <int n>
inline __attribute__((always_inline)) void fourier_real_inverse(const Simd::F* re, const Simd::F* im, Simd::F* x, int step) {
  if constexpr (n == 2) {
    x[0] = Simd::add(re[0], re[1]);
    x[step] = Simd::sub(re[0], re[1]);
  } else {
    constexpr int m = n / 2;
    Simd::F even_re[m / 2 + 1], even_im[m / 2 + 1], odd_re[m / 2 + 1], odd_im[m / 2 + 1];
    even_re[0] = Simd::add(re[0], re[m]);
    odd_re[0] = Simd::sub(re[0], re[m]);
    even_re[m / 2] = Simd::add(re[m / 2], re[m / 2]);
    odd_re[m / 2] = Simd::mul(Simd::set(-2), im[m / 2]);
#pragma GCC unroll 8
    for (int k = 1; k < m / 2; ++k) {
      const double c = fourier_cos(k * kFourier / n), s = fourier_sin(k * kFourier / n);
      even_re[k] = Simd::add(re[k], re[m - k]);
      even_im[k] = Simd::sub(im[k], im[m - k]);
      const Simd::F odd_times_re = Simd::sub(re[k], re[m - k]), odd_times_im = Simd::add(im[k], im[m - k]);
      const Simd::F scale = Simd::set(static_cast<float>(c));
      odd_re[k] = Simd::mul(scale, fourier_plus(odd_times_re, -s / c, odd_times_im));
      odd_im[k] = Simd::mul(scale, fourier_plus(odd_times_im, s / c, odd_times_re));
    }
    fourier_real_inverse<m>(even_re, even_im, x, 2 * step);
    fourier_real_inverse<m>(odd_re, odd_im, x + step, 2 * step);
  }
}

// Of n complex values at x[0], x[step], ..., with the roots exp(kSign 2 pi i / n).
template <int n, int kSign>
inline __attribute__((always_inline)) void fourier_complex(const Complex* x, int step, Complex* to) {
  if constexpr (n == 1) {
    to[0] = x[0];
  } else {
    constexpr int m = n / 2;
    Complex even[m], odd[m];
    fourier_complex<m, kSign>(x, 2 * step, even);
    fourier_complex<m, kSign>(x + step, 2 * step, odd);
#pragma GCC unroll 8
    for (int k = 0; k < m; ++k) {
      const Complex e = even[k], o = odd[k];
      if (4 * k == n) {  // the root is kSign i
        const Complex minus{Simd::add(e.re, o.im), Simd::sub(e.im, o.re)}, plus{Simd::sub(e.re, o.im), Simd::add(e.im, o.re)};
        to[k] = kSign < 0 ? minus : plus;
        to[k + m] = kSign < 0 ? plus : minus;
      } else {
        const double c = fourier_cos(k * kFourier / n), s = kSign * fourier_sin(k * kFourier / n);
        const Simd::F turned_re = k == 0 ? o.re : fourier_plus(o.re, -s / c, o.im);
        const Simd::F turned_im = k == 0 ? o.im : fourier_plus(o.im, s / c, o.re);
        to[k] = {fourier_plus(e.re, c, turned_re), fourier_plus(e.im, c, turned_im)};
        to[k + m] = {fourier_plus(e.re, -c, turned_re), fourier_plus(e.im, -c, turned_im)};
      }
    }
  }
}

// A line of 18 values at 18 points, see conv_pixel_shuffle_gelu_fourier_kernels.h: [0] at zero, [1] at infinity, then the
// transform of the inner 16: re[0], re[8], re[1], im[1], ... re[7], im[7].
inline __attribute__((always_inline)) void fourier_line(const Simd::F* x, Simd::F* to) {
  Simd::F re[kFourier / 2 + 1], im[kFourier / 2 + 1];
  fourier_real<kFourier>(x + 1, 1, re, im);
  to[0] = Simd::sub(x[0], x[kFourier]);
  to[1] = Simd::sub(x[kFourier + 1], x[1]);
  to[2] = re[0];
  to[3] = re[kFourier / 2];
#pragma GCC unroll 8
  for (int k = 1; k < kFourier / 2; ++k) {
    to[2 + 2 * k] = re[k];
    to[3 + 2 * k] = im[k];
  }
}

// The lines of the lines of 18 x 18 values, that at (i, j) at p + i * row + j * pixel, lanes elements each, as 18 rows of vectors. The
// first four columns are real, and lines of vectors; the others have two vectors for each point: in row 0 at zero, in row 1
// at infinity, then at the roots. Before they are stored, visitor.real(column, line) or .complex(column, line) sees a column.
template <class T, class Visitor>
inline void fourier_square(const T* p, std::int64_t row, std::int64_t pixel, float* to, Visitor& visitor) {
  constexpr int kLine = kFourierLine, kStep = kLine * Simd::kLanes;
  for (int i = 0; i < kLine; ++i) {
    Simd::F x[kLine], line[kLine];
#pragma GCC unroll 18
    for (int j = 0; j < kLine; ++j) x[j] = Simd::load(p + i * row + j * pixel);
    fourier_line(x, line);
#pragma GCC unroll 18
    for (int j = 0; j < kLine; ++j) Simd::store(to + i * kStep + j * Simd::kLanes, line[j]);
  }
  for (int column = 0; column < 4; ++column, to += Simd::kLanes) {
    Simd::F x[kLine], line[kLine];
#pragma GCC unroll 18
    for (int i = 0; i < kLine; ++i) x[i] = Simd::load(to + i * kStep);
    fourier_line(x, line);
    visitor.real(column, line);
#pragma GCC unroll 18
    for (int i = 0; i < kLine; ++i) Simd::store(to + i * kStep, line[i]);
  }
  for (int column = 4; column < 4 + kFourier / 2 - 1; ++column, to += 2 * Simd::kLanes) {
    Complex x[kLine], line[kLine];
#pragma GCC unroll 18
    for (int i = 0; i < kLine; ++i) x[i] = {Simd::load(to + i * kStep), Simd::load(to + i * kStep + Simd::kLanes)};
    fourier_complex<kFourier, -1>(x + 1, 1, line + 2);
    line[0] = {Simd::sub(x[0].re, x[kFourier].re), Simd::sub(x[0].im, x[kFourier].im)};
    line[1] = {Simd::sub(x[kFourier + 1].re, x[1].re), Simd::sub(x[kFourier + 1].im, x[1].im)};
    visitor.complex(column, line);
#pragma GCC unroll 18
    for (int i = 0; i < kLine; ++i) {
      Simd::store(to + i * kStep, line[i].re);
      Simd::store(to + i * kStep + Simd::kLanes, line[i].im);
    }
  }
}

}  // namespace
}  // namespace hflfnerv
