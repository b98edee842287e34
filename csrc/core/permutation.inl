// Any permutation of a few vectors of floats, by tables. Included behind the Simd of one instruction set.
#pragma once

#include <cstdint>

namespace hflfnerv {
namespace {

// Vectors whose lanes each come from some lane of some vector in memory. A vector takes one step for each vector that lanes of
// it come from; what comes from nowhere is 0.
class Permutation {
 public:
  static constexpr int kMaxVectors = 32, kMaxSteps = 160, kMaxStepsEach = 8;  // beyond which single elements are as fast

  // source(e) is where element e of the result comes from, counted from the same place in memory, or less than 0. What is
  // read are whole vectors. Each begins where some element comes from, or where that place is `aligned`, as a load takes less
  // time that reads one cache line, at multiples of the lanes.
  template <class Source>
  bool make(std::int64_t elements, bool aligned, const Source& source) {
    vectors_ = 0;
    int steps = 0;
    first_[0] = 0;
    for (std::int64_t begin = 0; begin < elements; begin += Simd::kLanes) {
      if (vectors_ == kMaxVectors) return false;
      std::int64_t from[Simd::kLanes];
      for (int lane = 0; lane < Simd::kLanes; ++lane) {
        from[lane] = begin + lane < elements ? source(begin + lane) : -1;
        index_[vectors_][lane] = 0;
      }
      // The vector from the first element on that is still to be found, until none is.
      while (true) {
        std::int64_t first = -1;
        for (const std::int64_t one : from) {
          if (one >= 0 && (first < 0 || one < first)) first = one;
        }
        if (first < 0) break;
        if (aligned) first -= first % Simd::kLanes;
        if (steps == kMaxSteps) return false;
        offsets_[steps] = first;
        bool taken[Simd::kLanes] = {};
        for (int lane = 0; lane < Simd::kLanes; ++lane) {
          taken[lane] = from[lane] >= 0 && from[lane] < first + Simd::kLanes;
          if (!taken[lane]) continue;
          index_[vectors_][lane] = static_cast<std::int32_t>(from[lane] - first);
          from[lane] = -1;
        }
        masks_[steps++] = Simd::mask(taken);
      }
      first_[++vectors_] = steps;
      if (steps > kMaxStepsEach * vectors_) return false;
    }
    return true;
  }

  // Places in memory, `distance` floats apart.
  struct Places {
    std::int64_t count, distance;
  };

  // sink(o, i, v) with one of the vectors, for each of the inner places of each of the outer ones. A sink that the compiler
  // does not inline of itself should say so: it is called for each vector.
  template <class Sink>
  void each(int vector, const float* from, Places outer, Places inner, const Sink& sink) const {
    switch (first_[vector + 1] - first_[vector]) {
      case 1: return steps<1>(vector, from, outer, inner, sink);
      case 2: return steps<2>(vector, from, outer, inner, sink);
      case 3: return steps<3>(vector, from, outer, inner, sink);
      case 4: return steps<4>(vector, from, outer, inner, sink);
      case 5: return steps<5>(vector, from, outer, inner, sink);
      case 6: return steps<6>(vector, from, outer, inner, sink);
      case 7: return steps<7>(vector, from, outer, inner, sink);
      case 8: return steps<8>(vector, from, outer, inner, sink);
    }
    const Simd::I index = Simd::load_ints(index_[vector]);
    for (std::int64_t o = 0; o < outer.count; ++o) {
      for (std::int64_t i = 0; i < inner.count; ++i) {
        const float* const source = from + o * outer.distance + i * inner.distance;
        Simd::F value = Simd::zero();
        for (int step = first_[vector]; step < first_[vector + 1]; ++step) {
          value = Simd::permute(value, masks_[step], index, source + offsets_[step]);
        }
        sink(o, i, value);
      }
    }
  }

  int vectors() const { return vectors_; }

 private:
  template <int kSteps, class Sink>
  void steps(int vector, const float* from, Places outer, Places inner, const Sink& sink) const {
    Simd::Mask masks[kSteps];
    const float* sources[kSteps];
    const Simd::I index = Simd::load_ints(index_[vector]);
    for (int step = 0; step < kSteps; ++step) {
      masks[step] = masks_[first_[vector] + step];
      sources[step] = from + offsets_[first_[vector] + step];
    }
    for (std::int64_t o = 0; o < outer.count; ++o) {
      for (std::int64_t i = 0; i < inner.count; ++i) {
        Simd::F value = Simd::zero();
        for (int step = 0; step < kSteps; ++step) {
          value = Simd::permute(value, masks[step], index, sources[step] + o * outer.distance + i * inner.distance);
        }
        sink(o, i, value);
      }
    }
  }

  int vectors_ = 0;
  int first_[kMaxVectors + 1];
  alignas(64) std::int32_t index_[kMaxVectors][Simd::kLanes];
  Simd::Mask masks_[kMaxSteps];
  std::int64_t offsets_[kMaxSteps];
};

}  // namespace
}  // namespace hflfnerv
