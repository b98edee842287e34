// The loops of pixel_shuffle_gelu, compiled once for each instruction set: the including file defines Simd.
//
// r = 2 and 4 shuffle in registers: r columns interleave (contiguous), or r² channels part (channels-last); where the last
// vector would overrun, it starts earlier and computes some elements again. With r = 1 there is nothing to shuffle. Any other
// case, and some of these, go through a buffer in the first cache: vectors on its one side, and on the other squares that are
// transposed, where there are channels enough (channels-last), or permutations by tables, or single elements where the tables
// would be too large.
#include <cstring>
#include <type_traits>
#include <vector>

#include "partial.inl"
#include "permutation.inl"
#include "pixel_shuffle_gelu_kernels.h"

namespace hflfnerv {
namespace {

using F = Simd::F;
constexpr int L = Simd::kLanes;
// Passed by value, so that their coefficients stay in registers: what a store of a vector may change is read anew after it, and
// that is all whose address is known elsewhere.
using Gelu = Simd::Gelu;
using GeluGradient = Simd::GeluGradient;

// Asks for what a loop will read soon; these loops advance too slowly for the processor to look far enough ahead itself.
// Reading ahead of the end does no harm.
inline void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p) + 2048, _MM_HINT_T0); }

template <class T>
struct Kernel {
  static constexpr bool kByTable = false;
  const PixelShuffleTask& task;
  float* scratch;
  const PixelShuffleShape& s = task.shape;
  const std::int64_t r = s.r, C = s.channels, K = s.in_channels(), H = s.height, W = s.width;
  const std::int64_t piece = task.piece(), rows_at_once = task.rows_at_once();
  const T* x = static_cast<const T*>(task.x);
  const T* dy = static_cast<const T*>(task.dy);
  T* out = static_cast<T*>(task.out);

  // Of contiguous tensors: row h of channel k of x (and dx), and row h r + i of channel c of y (and dy).
  std::int64_t in_row(std::int64_t b, std::int64_t k, std::int64_t h) const { return ((b * K + k) * H + h) * W; }
  std::int64_t out_row(std::int64_t b, std::int64_t c, std::int64_t row) const {
    return ((b * C + c) * H * r + row) * W * r;
  }
  std::int64_t next_rows() const { return r * W * r; }  // of a plane of y, from one row of x to the next
  // Of channels-last tensors: the first pixel of a row.
  std::int64_t in_pixels(std::int64_t b, std::int64_t h) const { return (b * H + h) * W * K; }
  std::int64_t out_pixels(std::int64_t b, std::int64_t row) const { return (b * H * r + row) * W * r * C; }

  // Whether GELU goes over whole pieces before the channels part: where a good part of the last vector would be computed
  // again, but not in float32 with long vectors, which waits for memory rather than for arithmetic, unless there is next to
  // nothing in that vector; and in 16 bits with short vectors.
  bool in_pieces() const {
    return L == 8 ? wasteful() || sizeof(T) == 2 : wasteful() && (sizeof(T) == 2 || rest_by_element());
  }
  // Whether channels in whole vectors are more than there are by a sixth.
  bool wasteful() const { return (C + L - 1) / L * L * 6 >= C * 7; }
  // Whether the few channels behind whole vectors part one by one.
  bool rest_by_element() const { return sizeof(T) == 4 && C % L <= 2; }
  bool in_registers() const { return (r == 2 || r == 4) && (s.channels_last ? C : W) >= L; }
  bool in_squares() const { return s.channels_last && C >= L; }

  // Row h of the channels from `first` on becomes one row of y.
  template <int R>
  void fwd_plane_row_fixed(const Gelu gelu, std::int64_t b, std::int64_t first, std::int64_t h, T* y) const {
    const T* rows[R];
    F biases[R];
    for (int j = 0; j < R; ++j) {
      rows[j] = x + in_row(b, first + j, h);
      biases[j] = Simd::set(task.bias[first + j]);
    }
    for (std::int64_t w = 0; w < W; w += L) {
      if (w > W - L) w = W - L;
      F v[R];
      for (int j = 0; j < R; ++j) {
        prefetch(rows[j] + w);
        v[j] = gelu(Simd::add(Simd::load(rows[j] + w), biases[j]));
      }
      Simd::merge<R>(v);
      for (int j = 0; j < R; ++j) Simd::store(y + R * w + j * L, v[j]);
    }
  }

  void fwd_plane_row(const Gelu gelu, std::int64_t b, std::int64_t first, std::int64_t h, T* y) const {
    T* buffer = reinterpret_cast<T*>(scratch);
    for (std::int64_t w0 = 0; w0 < W; w0 += piece) {
      const std::int64_t n = W - w0 < piece ? W - w0 : piece;
      for (std::int64_t j = 0; j < r; ++j) {
        const T* from = x + in_row(b, first + j, h) + w0;
        const F bias = Simd::set(task.bias[first + j]);
        for (std::int64_t w = 0; w < n; w += L) {
          Simd::store(buffer + w, gelu(Simd::add(load_some(from + w, n - w), bias)));
        }
        T* to = y + w0 * r + j;
        for (std::int64_t w = 0; w < n; ++w) to[w * r] = buffer[w];
      }
    }
  }
  // Rows from h on. Those of y are r rows apart.
  void fwd_plane_rows(const Gelu gelu, std::int64_t b, std::int64_t first, std::int64_t h, std::int64_t rows, T* y) const {
    for (std::int64_t row = 0; row < rows; ++row) fwd_plane_row(gelu, b, first, h + row, y + row * next_rows());
  }

  template <int R>
  void fwd_pixels_fixed(const Gelu gelu, const T* from, T* y) const {
    const std::int64_t row = W * R * C;
    for (std::int64_t w = 0; w < W; ++w, from += R * R * C, y += R * C) {
      for (std::int64_t c = 0; c < C; c += L) {
        if (c > C - L) c = C - L;
        F v[R * R];
        for (int m = 0; m < R * R; ++m) {
          const std::int64_t k = R * R * c + m * L;
          prefetch(from + k);
          v[m] = gelu(Simd::add(Simd::load(from + k), Simd::load(task.bias + k)));
        }
        Simd::part<R * R>(v);
        for (int m = 0; m < R * R; ++m) Simd::store(y + m / R * row + m % R * C + c, v[m]);
      }
    }
  }

  // Repeats the biases for the pixels of a piece.
  float* repeated_biases() const {
    float* biases = scratch + task.piece_floats();
    for (std::int64_t p = 0; p < piece; ++p) {
      std::memcpy(biases + p * K, task.bias, static_cast<std::size_t>(K) * sizeof(float));
    }
    return biases;
  }

  // GELU of the n elements of a piece.
  template <class To>
  __attribute__((noinline)) void gelu_of_piece(const Gelu gelu, const float* biases, const T* from, std::int64_t n, To* to) const {
    const bool biased = task.biased;
    std::int64_t k = 0;
    for (; k <= n - L; k += L) {
      prefetch(from + k);
      const F x = Simd::load(from + k);
      Simd::store(to + k, gelu(biased ? Simd::add(x, Simd::load(biases + k)) : x));
    }
    if (k == n) return;
    const F z = Simd::add(load_some(from + k, n - k), Simd::load(biases + k));
    store_some(to + k, gelu(z), n - k);
  }

  // The same with GELU first, of whole pieces; see in_pieces().
  template <int R>
  void fwd_pieces_fixed(const Gelu gelu, const float* biases, const T* from, T* y) const {
    float* buffer = scratch;
    const std::int64_t row = W * R * C, in_vectors = rest_by_element() ? C / L * L : C;
    for (std::int64_t w0 = 0; w0 < W; w0 += piece) {
      const std::int64_t pixels = W - w0 < piece ? W - w0 : piece, n = pixels * K;
      gelu_of_piece(gelu, biases, from, n, buffer);
      from += n;
      for (std::int64_t p = 0; p < pixels; ++p, y += R * C) {
        const float* const pixel = buffer + p * K;
        for (std::int64_t c = 0; c < in_vectors; c += L) {
          if (c > C - L) c = C - L;
          F v[R * R];
          for (int m = 0; m < R * R; ++m) v[m] = Simd::load(pixel + R * R * c + m * L);
          Simd::part<R * R>(v);
          for (int m = 0; m < R * R; ++m) Simd::store(y + m / R * row + m % R * C + c, v[m]);
        }
        if constexpr (std::is_same_v<T, float>) {
          for (std::int64_t c = in_vectors; c < C; ++c) {
            for (int m = 0; m < R * R; ++m) y[m / R * row + m % R * C + c] = pixel[R * R * c + m];
          }
        }
      }
    }
  }

  void fwd_pixels(const Gelu gelu, const float* biases, const T* from, T* y) const {
    T* buffer = reinterpret_cast<T*>(scratch);
    for (std::int64_t w0 = 0; w0 < W; w0 += piece) {
      const std::int64_t pixels = W - w0 < piece ? W - w0 : piece, n = pixels * K;
      for (std::int64_t k = 0; k < n; k += L) {
        const F v = Simd::add(load_some(from + w0 * K + k, n - k), load_some(biases + k, n - k));
        Simd::store(buffer + k, gelu(v));
      }
      for (std::int64_t i = 0; i < r; ++i) {
        T* to = y + i * W * r * C + w0 * r * C;
        for (std::int64_t p = 0; p < pixels; ++p) {
          for (std::int64_t j = 0; j < r; ++j, to += C) {
            const T* part = buffer + p * K + i * r + j;
            for (std::int64_t c = 0; c < C; ++c) to[c] = part[c * r * r];
          }
        }
      }
    }
  }

  // Rows of items; `self` is this kernel, or one that has another way where the shuffle does not fit registers.
  template <class Self>
  void fwd(const Self& self, std::int64_t begin, std::int64_t end) const {
    const bool fits = std::is_same_v<Self, Kernel> && in_registers();
    const Gelu gelu(*task.table);
    const float* biases = s.channels_last ? repeated_biases() : nullptr;
    const std::int64_t step = fits ? 1 : rows_at_once;
    for (std::int64_t item = begin; item < end; ++item) {
      const std::int64_t plane = item / task.row_blocks(), first = item % task.row_blocks() * task.item_rows();
      const std::int64_t last = first + task.item_rows() < H ? first + task.item_rows() : H;
      for (std::int64_t h = first; h < last; h += step) {
        if (s.channels_last) {
          T* y = out + out_pixels(plane, h * r);
          const T* from = x + in_pixels(plane, h);
          if (!fits) {
            self.fwd_pixels(gelu, biases, from, y);
          } else if (in_pieces()) {
            r == 2 ? fwd_pieces_fixed<2>(gelu, biases, from, y) : fwd_pieces_fixed<4>(gelu, biases, from, y);
          } else {
            r == 2 ? fwd_pixels_fixed<2>(gelu, from, y) : fwd_pixels_fixed<4>(gelu, from, y);
          }
          continue;
        }
        const std::int64_t b = plane / C, c = plane % C;
        for (std::int64_t i = 0; i < r; ++i) {
          const std::int64_t k = (c * r + i) * r;
          T* y = out + out_row(b, c, h * r + i);
          if (!fits) {
            self.fwd_plane_rows(gelu, b, k, h, last - h < step ? last - h : step, y);
          } else if (r == 2) {
            fwd_plane_row_fixed<2>(gelu, b, k, h, y);
          } else {
            fwd_plane_row_fixed<4>(gelu, b, k, h, y);
          }
        }
      }
    }
  }

  // One row of dy becomes row h of the channels from `first` on; sums has one place for each of these.
  template <int R>
  void bwd_plane_row_fixed(const GeluGradient slope, std::int64_t b, std::int64_t first, std::int64_t h, const T* from,
                           double* sums) const {
    std::int64_t rows[R];
    F biases[R], row_sums[R];
    for (int j = 0; j < R; ++j) {
      rows[j] = in_row(b, first + j, h);
      biases[j] = Simd::set(task.bias[first + j]);
      row_sums[j] = Simd::zero();
    }
    for (std::int64_t w = 0; w < W; w += L) {
      int again = 0;
      if (w > W - L) {
        again = static_cast<int>(w - (W - L));
        w = W - L;
      }
      F v[R];
      for (int j = 0; j < R; ++j) {
        prefetch(from + R * w + j * L);
        v[j] = Simd::load(from + R * w + j * L);
      }
      Simd::part<R>(v);
      for (int j = 0; j < R; ++j) {
        prefetch(x + rows[j] + w);
        v[j] = Simd::mul(v[j], slope(Simd::add(Simd::load(x + rows[j] + w), biases[j])));
        Simd::store(out + rows[j] + w, v[j]);
        row_sums[j] = Simd::add(row_sums[j], again ? Simd::drop(v[j], again) : v[j]);
      }
    }
    for (int j = 0; j < R; ++j) sums[j] += Simd::sum(row_sums[j]);
  }

  void bwd_plane_row(const GeluGradient slope, std::int64_t b, std::int64_t first, std::int64_t h, const T* from,
                     double* sums) const {
    T* buffer = reinterpret_cast<T*>(scratch);
    for (std::int64_t j = 0; j < r; ++j) {
      F sum = Simd::zero();
      const std::int64_t row = in_row(b, first + j, h);
      const F bias = Simd::set(task.bias[first + j]);
      for (std::int64_t w0 = 0; w0 < W; w0 += piece) {
        const std::int64_t n = W - w0 < piece ? W - w0 : piece;
        for (std::int64_t w = 0; w < n; ++w) buffer[w] = from[(w0 + w) * r + j];
        for (std::int64_t w = 0; w < n; w += L) {
          const std::int64_t at = row + w0 + w;
          const F v = Simd::mul(load_some(buffer + w, n - w), slope(Simd::add(load_some(x + at, n - w), bias)));
          store_some(out + at, v, n - w);
          sum = Simd::add(sum, v);  // beyond n there are zeros
        }
      }
      sums[j] += Simd::sum(sum);
    }
  }
  void bwd_plane_rows(const GeluGradient slope, std::int64_t b, std::int64_t first, std::int64_t h, std::int64_t rows,
                      const T* from, double* sums) const {
    for (std::int64_t row = 0; row < rows; ++row) {
      bwd_plane_row(slope, b, first, h + row, from + row * next_rows(), sums);
    }
  }

  template <int R>
  void bwd_pixels_fixed(const GeluGradient slope, std::int64_t at, const T* from, float* sums) const {
    const std::int64_t row = W * R * C;
    for (std::int64_t w = 0; w < W; ++w, at += K, from += R * C) {
      for (std::int64_t c = 0; c < C; c += L) {
        std::int64_t again = 0;
        if (c > C - L) {
          again = R * R * (c - (C - L));
          c = C - L;
        }
        F v[R * R];
        for (int m = 0; m < R * R; ++m) {
          const T* part = from + m / R * row + m % R * C + c;
          prefetch(part);
          v[m] = Simd::load(part);
        }
        Simd::merge<R * R>(v);
        for (int m = 0; m < R * R; ++m) {
          const std::int64_t k = R * R * c + m * L;
          prefetch(x + at + k);
          v[m] = Simd::mul(v[m], slope(Simd::add(Simd::load(x + at + k), Simd::load(task.bias + k))));
          Simd::store(out + at + k, v[m]);
          if (again >= (m + 1) * L) continue;
          const F fresh = again > m * L ? Simd::drop(v[m], static_cast<int>(again - m * L)) : v[m];
          Simd::store(sums + k, Simd::add(Simd::load(sums + k), fresh));
        }
      }
    }
  }

  // dx of the n elements of a piece from `at` on, whose dy are in the order of x.
  template <class Dy>
  __attribute__((noinline)) void slope_of_piece(const GeluGradient slope, const float* biases, std::int64_t at, std::int64_t n,
                                                const Dy* dy_of, float* sums) const {
    const T* const from = x + at;
    T* const to = out + at;
    std::int64_t k = 0;
    for (; k <= n - L; k += L) {
      const F v = Simd::mul(Simd::load(dy_of + k), slope(Simd::add(Simd::load(from + k), Simd::load(biases + k))));
      Simd::store(to + k, v);
      Simd::store(sums + k, Simd::add(Simd::load(sums + k), v));
    }
    if (k == n) return;
    const F v = Simd::mul(load_some(dy_of + k, n - k), slope(Simd::add(load_some(from + k, n - k), Simd::load(biases + k))));
    store_some(to + k, v, n - k);
    Simd::store(sums + k, Simd::add(Simd::load(sums + k), v));
  }

  void bwd_pixels(const GeluGradient slope, const float* biases, std::int64_t at, const T* from, float* sums) const {
    T* buffer = reinterpret_cast<T*>(scratch);
    for (std::int64_t w0 = 0; w0 < W; w0 += piece) {
      const std::int64_t pixels = W - w0 < piece ? W - w0 : piece, n = pixels * K;
      for (std::int64_t i = 0; i < r; ++i) {
        const T* row = from + i * W * r * C + w0 * r * C;
        for (std::int64_t p = 0; p < pixels; ++p) {
          for (std::int64_t j = 0; j < r; ++j, row += C) {
            T* part = buffer + p * K + i * r + j;
            for (std::int64_t c = 0; c < C; ++c) part[c * r * r] = row[c];
          }
        }
      }
      slope_of_piece(slope, biases, at + w0 * K, n, buffer, sums);
    }
  }

  template <class Self>
  void bwd(const Self& self, std::int64_t begin, std::int64_t end) const {
    const bool fits = std::is_same_v<Self, Kernel> && in_registers();
    const GeluGradient slope(*task.table);
    const float* biases = s.channels_last ? repeated_biases() : nullptr;
    const std::int64_t row_sums = !s.channels_last ? 0 : fits || Self::kByTable ? K : piece * K;
    float* pixel_sums = scratch + 2 * task.piece_floats();
    const std::int64_t step = fits ? 1 : rows_at_once;
    for (std::int64_t item = begin; item < end; ++item) {
      const std::int64_t plane = item / task.row_blocks(), first = item % task.row_blocks() * task.item_rows();
      const std::int64_t last = first + task.item_rows() < H ? first + task.item_rows() : H;
      double* sums = task.sums + item * task.item_sums();
      if (s.channels_last) std::memset(pixel_sums, 0, static_cast<std::size_t>(row_sums + 64) * sizeof(float));
      for (std::int64_t h = first; h < last; h += step) {
        if (s.channels_last) {
          const T* from = dy + out_pixels(plane, h * r);
          if (!fits) {
            self.bwd_pixels(slope, biases, in_pixels(plane, h), from, pixel_sums);
          } else if (r == 2) {
            bwd_pixels_fixed<2>(slope, in_pixels(plane, h), from, pixel_sums);
          } else {
            bwd_pixels_fixed<4>(slope, in_pixels(plane, h), from, pixel_sums);
          }
          continue;
        }
        const std::int64_t b = plane / C, c = plane % C;
        for (std::int64_t i = 0; i < r; ++i) {
          const std::int64_t k = (c * r + i) * r;
          const T* from = dy + out_row(b, c, h * r + i);
          if (!fits) {
            self.bwd_plane_rows(slope, b, k, h, last - h < step ? last - h : step, from, sums + i * r);
          } else if (r == 2) {
            bwd_plane_row_fixed<2>(slope, b, k, h, from, sums + i * r);
          } else {
            bwd_plane_row_fixed<4>(slope, b, k, h, from, sums + i * r);
          }
        }
      }
      for (std::int64_t at = 0; at < row_sums; at += K) {  // none of contiguous tensors
        for (std::int64_t k = 0; k < K; ++k) sums[k] += pixel_sums[at + k];
      }
    }
  }
};

// Shuffles by tables.
template <class T>
struct TableKernel : Kernel<T> {
  static constexpr bool kByTable = true;
  using Kernel<T>::task, Kernel<T>::scratch, Kernel<T>::s, Kernel<T>::r, Kernel<T>::C, Kernel<T>::K, Kernel<T>::W, Kernel<T>::x;
  using Kernel<T>::out, Kernel<T>::piece, Kernel<T>::rows_at_once;

  // Of a vector of columns of r rows of x, or of a pixel of x: where in the buffer the elements of y come from, or those of dx.
  Permutation order{};
  const std::int64_t run = r * C;                                            // of a pixel in a row of y
  const std::int64_t buffer_row = rows_at_once * ((piece + L - 1) / L * L);  // of columns of x
  const std::int64_t buffer_run = piece * run + L;                           // of pixels of a row of y

  bool forward_order() {
    if (!s.channels_last) {
      return order.make(r * L, true, [&](std::int64_t e) { return e % r * buffer_row + e / r; });
    }
    const std::int64_t vectors = (run + L - 1) / L;
    return order.make(r * vectors * L, false, [&](std::int64_t e) {
      const std::int64_t i = e / (vectors * L), q = e % (vectors * L);
      return q < run ? (q % C * r + i) * r + q / C : -1;
    });
  }
  bool backward_order() {
    if (!s.channels_last) return order.make(r * L, true, [&](std::int64_t e) { return e % L * r + e / L; });
    return order.make(K, false, [&](std::int64_t k) {
      const std::int64_t c = k / (r * r), i = k / r % r, j = k % r;
      return i * buffer_run + j * C + c;
    });
  }

  void fwd_plane_rows(const Gelu gelu, std::int64_t b, std::int64_t first, std::int64_t h, std::int64_t rows, T* y) const {
    float* const buffer = scratch;
    for (std::int64_t w0 = 0; w0 < W; w0 += piece) {
      const std::int64_t n = W - w0 < piece ? W - w0 : piece;
      const std::int64_t columns = rows * n;  // several rows are whole ones, which follow each other
      for (std::int64_t j = 0; j < r; ++j) {
        const T* from = x + this->in_row(b, first + j, h) + w0;
        const F bias = Simd::set(task.bias[first + j]);
        for (std::int64_t w = 0; w < columns; w += L) {
          Simd::store(buffer + j * buffer_row + w, gelu(Simd::add(load_some(from + w, columns - w), bias)));
        }
      }
      for (int v = 0; v < order.vectors(); ++v) {
        // Copies, since a store of a vector may be one to any member, as far as the compiler knows.
        T* const to = y + w0 * r + v * L;
        const std::int64_t left = n * r - v * L, next_rows = this->next_rows(), next = r * L;
        const auto put = [=](std::int64_t row, std::int64_t i, F value) __attribute__((always_inline)) {
          store_some(to + row * next_rows + i * next, value, left - i * next);
        };
        order.each(v, buffer, {rows, n}, {(left + r * L - 1) / (r * L), L}, put);
      }
    }
  }

  void fwd_pixels(const Gelu gelu, const float* biases, const T* from, T* y) const {
    float* const buffer = scratch;
    const int vectors = order.vectors() / static_cast<int>(r);
    for (std::int64_t w0 = 0; w0 < W; w0 += piece) {
      const std::int64_t pixels = W - w0 < piece ? W - w0 : piece, n = pixels * K;
      this->gelu_of_piece(gelu, biases, from + w0 * K, n, buffer);
      for (std::int64_t i = 0; i < r; ++i) {
        // What the last vector of a pixel writes behind it is the next one's, or its first vector's, which comes after it.
        for (int v = vectors - 1; v >= 0; --v) {
          T* const to = y + (i * W + w0) * run + v * L;
          const std::int64_t left = pixels * run - v * L, next = run;
          const auto put = [=](std::int64_t, std::int64_t p, F value) __attribute__((always_inline)) {
            store_some(to + p * next, value, left - p * next);
          };
          order.each(static_cast<int>(i) * vectors + v, buffer, {1, 0}, {pixels, K}, put);
        }
      }
    }
  }

  void bwd_plane_rows(const GeluGradient slope, std::int64_t b, std::int64_t first, std::int64_t h, std::int64_t rows,
                      const T* from, double* sums) const {
    float* const buffer = scratch;
    float* const row_sums = scratch + task.piece_floats();  // lane by lane
    for (std::int64_t e = 0; e < r * L; e += L) Simd::store(row_sums + e, Simd::zero());
    for (std::int64_t w0 = 0; w0 < W; w0 += piece) {
      const std::int64_t n = W - w0 < piece ? W - w0 : piece, elements = n * r;
      // With zeros behind each row, as far as the permutation reads.
      const std::int64_t padded = (n + L - 1) / L * L * r;
      for (std::int64_t row = 0; row < rows; ++row) {
        const T* dy_row = from + row * this->next_rows() + w0 * r;
        for (std::int64_t e = 0; e < padded; e += L) {
          const std::int64_t left = elements - e;
          Simd::store(buffer + row * padded + e, left > 0 ? load_some(dy_row + e, left) : Simd::zero());
        }
      }
      for (int j = 0; j < order.vectors(); ++j) {
        const std::int64_t at = this->in_row(b, first + j, h) + w0, next = W;
        const T* const x_row = x + at;
        T* const dx_row = out + at;
        const F bias = Simd::set(task.bias[first + j]);
        F sum = Simd::load(row_sums + j * L);
        const auto put = [=, &slope, &sum](std::int64_t row, std::int64_t i, F dy) __attribute__((always_inline)) {
          const std::int64_t here = row * next + i * L, left = n - i * L;
          const F v = Simd::mul(dy, slope(Simd::add(load_some(x_row + here, left), bias)));
          store_some(dx_row + here, v, left);
          sum = Simd::add(sum, v);  // beyond the end dy is zero
        };
        order.each(j, buffer, {rows, padded}, {(n + L - 1) / L, r * L}, put);
        Simd::store(row_sums + j * L, sum);
      }
    }
    for (std::int64_t j = 0; j < r; ++j) sums[j] += Simd::sum(Simd::load(row_sums + j * L));
  }

  void bwd_pixels(const GeluGradient slope, const float* biases, std::int64_t at, const T* from, float* sums) const {
    float* const buffer = scratch;
    for (std::int64_t w0 = 0; w0 < W; w0 += piece) {
      const std::int64_t pixels = W - w0 < piece ? W - w0 : piece, elements = pixels * run;
      for (std::int64_t i = 0; i < r; ++i) {
        const T* row = from + (i * W + w0) * run;
        float* const to = buffer + i * buffer_run;
        for (std::int64_t e = 0; e < elements; e += L) Simd::store(to + e, load_some(row + e, elements - e));
      }
      for (int v = order.vectors() - 1; v >= 0; --v) {  // see fwd_pixels
        const std::int64_t first = at + w0 * K + v * L, left = pixels * K - v * L, next = K;
        const T* const x_pixels = x + first;
        T* const dx_pixels = out + first;
        const F bias = Simd::load(biases + v * L);
        F sum = Simd::load(sums + v * L);
        const auto put = [=, &slope, &sum](std::int64_t, std::int64_t p, F dy) __attribute__((always_inline)) {
          const F z = Simd::add(load_some(x_pixels + p * next, left - p * next), bias);
          const F value = Simd::mul(dy, slope(z));
          store_some(dx_pixels + p * next, value, left - p * next);
          sum = Simd::add(sum, value);  // of lanes beyond the last channel nobody asks
        };
        order.each(v, buffer, {1, 0}, {pixels, run}, put);
        Simd::store(sums + v * L, sum);
      }
    }
  }
};

// Shuffles nothing: r = 1.
template <class T>
struct PlainKernel : Kernel<T> {
  using Kernel<T>::task, Kernel<T>::C, Kernel<T>::W, Kernel<T>::x, Kernel<T>::out, Kernel<T>::piece;

  void fwd_plane_rows(const Gelu gelu, std::int64_t b, std::int64_t first, std::int64_t h, std::int64_t rows, T* y) const {
    const T* const from = x + this->in_row(b, first, h);
    const F bias = Simd::set(task.bias[first]);
    for (std::int64_t w = 0; w < rows * W; w += L) {
      prefetch(from + w);
      store_some(y + w, gelu(Simd::add(load_some(from + w, rows * W - w), bias)), rows * W - w);
    }
  }

  void fwd_pixels(const Gelu gelu, const float* biases, const T* from, T* y) const {
    for (std::int64_t w0 = 0; w0 < W; w0 += piece) {
      const std::int64_t n = (W - w0 < piece ? W - w0 : piece) * C;
      this->gelu_of_piece(gelu, biases, from + w0 * C, n, y + w0 * C);
    }
  }

  void bwd_plane_rows(const GeluGradient slope, std::int64_t b, std::int64_t first, std::int64_t h, std::int64_t rows,
                      const T* from, double* sums) const {
    const std::int64_t at = this->in_row(b, first, h);
    const F bias = Simd::set(task.bias[first]);
    F sum = Simd::zero();
    for (std::int64_t w = 0; w < rows * W; w += L) {
      const std::int64_t left = rows * W - w;
      const F v = Simd::mul(load_some(from + w, left), slope(Simd::add(load_some(x + at + w, left), bias)));
      store_some(out + at + w, v, left);
      sum = Simd::add(sum, v);  // beyond the end dy is zero
    }
    sums[0] += Simd::sum(sum);
  }

  void bwd_pixels(const GeluGradient slope, const float* biases, std::int64_t at, const T* from, float* sums) const {
    for (std::int64_t w0 = 0; w0 < W; w0 += piece) {
      const std::int64_t n = (W - w0 < piece ? W - w0 : piece) * C;
      this->slope_of_piece(slope, biases, at + w0 * C, n, from + w0 * C, sums);
    }
  }
};

// Shuffles by transposing as many channels of y as a vector has lanes, and of the r² places of a pixel 8 or 4 (forward) or as
// many (backward): channels-last tensors with at least so many channels. The last channels and places begin earlier where they
// would overrun, and are done again; where there are fewer places than lanes, what is written behind them is the next channel's.
template <class T>
struct SquareKernel : Kernel<T> {
  using Kernel<T>::scratch, Kernel<T>::r, Kernel<T>::C, Kernel<T>::K, Kernel<T>::W, Kernel<T>::piece;

  const std::int64_t square = r * r;

  // f(c, m, n) for each square: channels from c on, n places from m on.
  template <class Function>
  void for_squares(const Function& f) const {
    const std::int64_t n = square < L ? square : L;
    for (std::int64_t c = 0; c < C; c += L) {
      if (c > C - L) c = C - L;
      for (std::int64_t m = 0; m < square; m += n) {
        if (m > square - n) m = square - n;
        f(c, m, n);
      }
    }
  }
  // Of the places of y (and dy) that a pixel becomes, behind the first one.
  const std::vector<std::int64_t> places = [this] {
    std::vector<std::int64_t> all;
    for (std::int64_t m = 0; m < square; ++m) all.push_back(m / r * W * r * C + m % r * C);
    return all;
  }();

  void fwd_pixels(const Gelu gelu, const float* biases, const T* from, T* y) const {
    float* const buffer = scratch;
    for (std::int64_t w0 = 0; w0 < W; w0 += piece) {
      const std::int64_t pixels = W - w0 < piece ? W - w0 : piece;
      this->gelu_of_piece(gelu, biases, from + w0 * K, pixels * K, buffer);
      for (std::int64_t p = 0; p < pixels; ++p) {
        const float* const pixel = buffer + p * K;
        T* const to = y + (w0 + p) * r * C;
        std::int64_t m = 0;
        for (; m + 8 <= square; m += 8) store_places<8>(pixel, m, to);
        // The squares of numbers have 0, 1 or 4 more.
        if (m < square) store_places<4>(pixel, square - 4, to);
      }
    }
  }
  // Writes n places from m on, of all channels.
  template <int n>
  inline __attribute__((always_inline)) void store_places(const float* pixel, std::int64_t m, T* to) const {
    T* to_place[n];
    for (int u = 0; u < n; ++u) to_place[u] = to + places[m + u];
    for (std::int64_t c = 0; c < C; c += L) {
      if (c > C - L) c = C - L;
      F v[n];
      Simd::load_columns<n>(pixel + square * c + m, square, v);
      for (int u = 0; u < n; ++u) Simd::store(to_place[u] + c, v[u]);
    }
  }

  void bwd_pixels(const GeluGradient slope, const float* biases, std::int64_t at, const T* from, float* sums) const {
    float* const buffer = scratch;
    for (std::int64_t w0 = 0; w0 < W; w0 += piece) {
      const std::int64_t pixels = W - w0 < piece ? W - w0 : piece;
      for (std::int64_t p = 0; p < pixels; ++p) {
        const T* const dy_of = from + (w0 + p) * r * C;
        for_squares([&](std::int64_t c, std::int64_t m, std::int64_t n) {
          F v[L];
          for (int u = 0; u < L; ++u) v[u] = u < n ? Simd::load(dy_of + places[m + u] + c) : Simd::zero();
          Simd::transpose(v);
          for (int t = 0; t < L; ++t) Simd::store(buffer + p * K + square * (c + t) + m, v[t]);
        });
      }
      this->slope_of_piece(slope, biases, at + w0 * K, pixels * K, buffer, sums);
    }
  }
};

// Functions of their own, so that the compiler inlines as much in those below as it would without.
template <class Self>
__attribute__((noinline)) void fwd_apart(const Self self, std::int64_t begin, std::int64_t end) {
  self.fwd(self, begin, end);
}
template <class Self>
__attribute__((noinline)) void bwd_apart(const Self self, std::int64_t begin, std::int64_t end) {
  self.bwd(self, begin, end);
}

void fwd_items(const PixelShuffleTask& task, std::int64_t begin, std::int64_t end, float* scratch) {
  with_type(task.type, [&](auto zero) {
    using T = decltype(zero);
    const Kernel<T> kernel{task, scratch};
    // Of long vectors squares take less time than registers with r = 4, and with r = 2 in 16 bits where few are done again.
    const bool few_again = sizeof(T) == 2 && kernel.C > L && !kernel.wasteful();
    const bool by_squares = L == 16 && kernel.in_squares() && (kernel.r == 4 || (kernel.r == 2 && few_again));
    if (!by_squares && kernel.in_registers()) return kernel.fwd(kernel, begin, end);
    if (kernel.r == 1) return fwd_apart(PlainKernel<T>{{task, scratch}}, begin, end);
    if (kernel.in_squares()) return fwd_apart(SquareKernel<T>{{task, scratch}}, begin, end);
    TableKernel<T> by_table{{task, scratch}};
    by_table.forward_order() ? by_table.fwd(by_table, begin, end) : kernel.fwd(kernel, begin, end);
  });
}

void bwd_items(const PixelShuffleTask& task, std::int64_t begin, std::int64_t end, float* scratch) {
  with_type(task.type, [&](auto zero) {
    using T = decltype(zero);
    const Kernel<T> kernel{task, scratch};
    if (kernel.in_registers()) return kernel.bwd(kernel, begin, end);
    if (kernel.r == 1) return bwd_apart(PlainKernel<T>{{task, scratch}}, begin, end);
    if (kernel.in_squares()) return bwd_apart(SquareKernel<T>{{task, scratch}}, begin, end);
    TableKernel<T> by_table{{task, scratch}};
    by_table.backward_order() ? by_table.bwd(by_table, begin, end) : kernel.bwd(kernel, begin, end);
  });
}

}  // namespace
}  // namespace hflfnerv
