// The CUDA operations on lists without a GPU: their kernel, compiled by the C++ compiler, on an emulation of what it uses of a
// GPU (emulation/), against the definitions.
#include "cuda/lists.cu"

#include <cmath>
#include <cstdio>
#include <random>
#include <vector>

#include "tests/check.h"

namespace {

using namespace hflfnerv;
using BFloat16 = __nv_bfloat16;

std::mt19937 generator(1);

std::vector<float> random(std::size_t count) {
  std::normal_distribution<float> normal(0, 1);
  std::vector<float> values(count);
  for (float& value : values) value = normal(generator);
  return values;
}

// More tensors than a search halves evenly, of less than a block, exactly one, and several.
const std::vector<std::size_t> kSizes{1, 2048, 5000, 7, 4096, 2049, 300};

struct Lists {
  std::vector<std::vector<float>> a, b, c;
  TensorList list{};

  Lists() {
    for (const std::size_t size : kSizes) {
      a.push_back(random(size));
      b.push_back(random(size + 1));  // one more, which must stay
      c.emplace_back(size + 1, -7.0f);
      b.back().back() = -7.0f;
    }
    for (std::size_t i = 0; i < kSizes.size(); ++i) {
      list.entry[list.count++] = {a[i].data(), b[i].data(), c[i].data(), 0.5f + 0.25f * static_cast<float>(i),
                                  static_cast<std::int64_t>(kSizes[i])};
    }
  }
};

void check_momentum(float mu) {
  Lists lists;
  const auto before = lists.b;
  CHECK(list_momentum(lists.list, mu, 0, nullptr) == nullptr);
  for (std::size_t i = 0; i < kSizes.size(); ++i) {
    for (std::size_t k = 0; k < kSizes[i]; ++k) {
      const double gradient = lists.a[i][k], average = mu * double(before[i][k]) + (1 - mu) * gradient;
      const double scale = std::fabs(gradient) + std::fabs(before[i][k]);
      CHECK(std::fabs(lists.b[i][k] - average) <= 4 * std::ldexp(scale, -24));
      CHECK(std::fabs(lists.c[i][k] - ((1 - mu) * gradient + mu * average)) <= 8 * std::ldexp(scale, -24));
    }
    CHECK(lists.b[i].back() == -7.0f && lists.c[i].back() == -7.0f);
  }
}

void check_subtract(float decay) {
  Lists lists;
  const auto before = lists.b;
  const float rate = 0.02f;
  CHECK(list_subtract(lists.list, &rate, decay, 0, nullptr) == nullptr);
  for (std::size_t i = 0; i < kSizes.size(); ++i) {
    for (std::size_t k = 0; k < kSizes[i]; ++k) {
      const double update = double(lists.list.entry[i].factor) * lists.a[i][k], shrinking = double(decay) * before[i][k];
      const double exact = before[i][k] - rate * (update + shrinking), step = rate * (std::fabs(update) + std::fabs(shrinking));
      CHECK(std::fabs(lists.b[i][k] - exact) <= std::ldexp(std::fabs(before[i][k]) + 4 * step, -24));
    }
    CHECK(lists.b[i].back() == -7.0f);
  }
}

void check_casts() {
  for (const ListType type : {ListType::bfloat16, ListType::float16}) {  // one like the other here
    Lists lists;
    std::vector<std::vector<BFloat16>> halves;
    for (std::size_t i = 0; i < kSizes.size(); ++i) halves.emplace_back(kSizes[i]);
    TensorList down = lists.list, up = lists.list;
    for (std::size_t i = 0; i < kSizes.size(); ++i) {
      down.entry[i].b = halves[i].data();
      up.entry[i].a = halves[i].data();
      up.entry[i].b = lists.c[i].data();
    }
    CHECK(list_cast(down, ListType::float32, type, 0, nullptr) == nullptr);
    CHECK(list_cast(up, type, ListType::float32, 0, nullptr) == nullptr);
    for (std::size_t i = 0; i < kSizes.size(); ++i) {
      for (std::size_t k = 0; k < kSizes[i]; ++k) CHECK(lists.c[i][k] == float(BFloat16::round(lists.a[i][k])));
      CHECK(lists.c[i].back() == -7.0f);
    }
  }
}

}  // namespace

int main() {
  for (const float mu : {0.95f, 0.25f, 0.0f}) check_momentum(mu);
  for (const float decay : {0.0f, 0.3f}) check_subtract(decay);
  check_casts();
  std::printf("lists_cuda: ok\n");
  return 0;
}
