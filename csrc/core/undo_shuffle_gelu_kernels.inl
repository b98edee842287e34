// Included behind the Simd of one instruction set; see undo_shuffle_gelu_kernels.h.
#include "partial.inl"
#include "undo_shuffle_gelu_kernels.h"

namespace hflfnerv {
namespace {

using F = Simd::F;
constexpr int kLanes = Simd::kLanes;

// What belongs to pixels [begin, end) of a row, in the order of z: vectors are written in their order, so that what lies behind
// a run is the next one's, and do not end behind a row of dy.
template <class T>
inline void unshuffle(const UndoTask& task, std::int64_t row, std::int64_t begin, std::int64_t end, float* to) {
  const std::int64_t run = task.run, r = task.out_channels / run;
  for (std::int64_t w = begin; w < end; ++w) {
    const bool inside = w + (run + kLanes - 1) / run < task.width;
    const std::int64_t whole = (inside ? run + kLanes - 1 : run) / kLanes * kLanes;
    for (std::int64_t i = 0; i < r; ++i, to += run) {
      const T* const dy = static_cast<const T*>(task.dy) + ((row * r + i) * task.width + w) * run;
      for (std::int64_t e = 0; e < whole; e += kLanes) Simd::store(to + e, Simd::load(dy + e));
      if (whole < run) store_some(to + whole, load_some(dy + whole, run - whole), run - whole);
    }
  }
}

// A row where runs are whole vectors.
template <class T>
inline void undo_runs(const UndoTask& task, const Simd::GeluGradient& gradient, std::int64_t row, float* sums) {
  const std::int64_t run = task.run, n = task.out_channels, r = n / run;
  for (std::int64_t i = 0; i < r; ++i) {
    const T* dy = static_cast<const T*>(task.dy) + (row * r + i) * task.width * run;
    for (std::int64_t w = 0; w < task.width; ++w) {
      const std::int64_t pixel = (row * task.width + w) * n + i * run;
      for (std::int64_t e = 0; e < run; e += kLanes, dy += kLanes) {
        const F value = Simd::mul(gradient(Simd::load(static_cast<const T*>(task.z) + pixel + e)), Simd::load(dy));
        Simd::store(static_cast<T*>(task.dz) + pixel + e, value);
        Simd::store(sums + i * run + e, Simd::add(Simd::load(sums + i * run + e), value));
      }
    }
  }
}

// Pixels [begin, end) of any row; `slopes` are overwritten.
template <class T>
inline void undo_pixels(const UndoTask& task, const Simd::GeluGradient& gradient, std::int64_t row, std::int64_t begin,
                        std::int64_t end, float* sums, float* slopes) {
  const std::int64_t n = task.out_channels, count = (end - begin) * n, vectors = count / kLanes * kLanes;
  const T* const z = static_cast<const T*>(task.z) + (row * task.width + begin) * n;
  T* const dz = static_cast<T*>(task.dz) + (row * task.width + begin) * n;
  unshuffle<T>(task, row, begin, end, slopes);
  for (std::int64_t e = 0; e < vectors; e += kLanes) {
    const F value = Simd::mul(gradient(Simd::load(z + e)), Simd::load(slopes + e));
    Simd::store(dz + e, value);
    Simd::store(slopes + e, value);
  }
  if (vectors < count) {
    const std::int64_t rest = count - vectors;
    const F value = Simd::mul(gradient(load_some(z + vectors, rest)), Simd::load(slopes + vectors));
    Simd::store(slopes + vectors, value);
    store_some(dz + vectors, value, rest);
  }
  const std::int64_t whole = n / kLanes * kLanes;
  for (const float* slope = slopes; slope != slopes + count; slope += n) {
    for (std::int64_t e = 0; e < whole; e += kLanes) {
      Simd::store(sums + e, Simd::add(Simd::load(sums + e), Simd::load(slope + e)));
    }
    for (std::int64_t e = whole; e < n; ++e) sums[e] += slope[e];
  }
}

template <class T>
void undo_of(const UndoTask& task, std::int64_t begin, std::int64_t end, double* bias, float* scratch) {
  const Simd::GeluGradient gradient(*task.gradient);
  const std::int64_t n = task.out_channels, piece = task.piece();
  for (std::int64_t row = begin; row < end; ++row) {
    for (std::int64_t i = 0; i < n; ++i) scratch[i] = 0;
    if (task.run % kLanes == 0) {
      undo_runs<T>(task, gradient, row, scratch);
    } else {
      for (std::int64_t w = 0; w < task.width; w += piece) {
        undo_pixels<T>(task, gradient, row, w, w + piece < task.width ? w + piece : task.width, scratch, scratch + n);
      }
    }
    for (std::int64_t i = 0; i < n; ++i) bias[i] += static_cast<double>(scratch[i]);
  }
}

void undo(const UndoTask& task, std::int64_t begin, std::int64_t end, double* bias, float* scratch) {
  with_type(task.type, [&](auto zero) { undo_of<decltype(zero)>(task, begin, end, bias, scratch); });
}

}  // namespace
}  // namespace hflfnerv
