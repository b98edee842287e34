#include "stream_loss.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "memory.h"
#include "parallel.h"
#include "stream_loss_kernels.h"

namespace hflfnerv {

#if defined(HFLFNERV_HAVE_AVX2)
namespace {

constexpr std::int64_t kColours = 3;
constexpr std::int64_t kBand = 16;  // rows that a thread takes at once

const StreamLossKernels& kernels_of([[maybe_unused]] SimdLevel level) {
#if defined(HFLFNERV_HAVE_AVX512)
  if (level == SimdLevel::avx512) return stream_loss_kernels_avx512();
#endif
  return stream_loss_kernels_avx2();
}

// Byte offset of a row of an image.
std::int64_t offset(const StreamLoss& task, const StreamImage& image, std::int64_t frame, std::int64_t row) {
  return (frame * image.height + row) * image.width * kColours * size_bytes(task.type);
}

const void* read(const StreamLoss& task, const StreamImage& image, std::int64_t frame, std::int64_t row) {
  return image.x == nullptr ? nullptr : static_cast<const char*>(image.x) + offset(task, image, frame, row);
}

char* written(const StreamLoss& task, const StreamImage& image, std::int64_t frame, std::int64_t row) {
  return image.x == nullptr ? nullptr : static_cast<char*>(image.dx) + offset(task, image, frame, row);
}

StreamLossRow row_of(const StreamLoss& task, std::int64_t frame, std::int64_t row) {
  const std::int64_t count = task.width * kColours;
  return {task.type, read(task, task.low, frame, row), read(task, task.high, frame, row),
          task.target + (frame * task.height + row) * count, count, nullptr, nullptr, 0};
}

// Runs run(frame, first row, end) on bands of rows of each frame.
template <class Run>
void for_bands(const StreamLoss& task, std::int64_t rows, int threads, const Run& run) {
  const std::int64_t bands = (rows + kBand - 1) / kBand;
  parallel_items(task.batch * bands, threads, [&](int, std::int64_t item) {
    const std::int64_t first = item % bands * kBand;
    run(item / bands, first, std::min(first + kBand, rows));
  });
}

}  // namespace

void stream_loss_fwd(const StreamLoss& task, float* loss, int threads, SimdLevel level) {
  std::vector<double> sums(static_cast<std::size_t>(task.batch * task.height));
  const auto kernel = kernels_of(level).fwd;
  for_bands(task, task.height, threads, [&](std::int64_t frame, std::int64_t begin, std::int64_t end) {
    for (std::int64_t row = begin; row < end; ++row) {
      sums[static_cast<std::size_t>(frame * task.height + row)] = kernel(row_of(task, frame, row));
    }
  });
  for (std::int64_t frame = 0; frame < task.batch; ++frame) {
    double sum = 0;
    for (std::int64_t row = 0; row < task.height; ++row) sum += sums[static_cast<std::size_t>(frame * task.height + row)];
    loss[frame] = static_cast<float>(sum / static_cast<double>(task.height * task.width * kColours));
  }
}

void stream_loss_bwd(const StreamLoss& task, const float* dloss, int threads, SimdLevel level) {
  const auto kernel = kernels_of(level).bwd;
  const StreamImage* const images[] = {&task.low, &task.high};
  std::int64_t rows = 0;
  for (const StreamImage* image : images) {
    if (image->x == nullptr) continue;
    rows = std::max(rows, image->height);
    advise_large_pages(image->dx, static_cast<std::size_t>(offset(task, *image, task.batch, 0)));
  }
  for_bands(task, rows, threads, [&](std::int64_t frame, std::int64_t begin, std::int64_t end) {
    for (std::int64_t row = begin; row < end; ++row) {
      if (row < task.height) {
        StreamLossRow values = row_of(task, frame, row);
        values.dlow = written(task, task.low, frame, row);
        values.dhigh = written(task, task.high, frame, row);
        values.scale = dloss[frame] * (2 / static_cast<float>(values.count * task.height));
        kernel(values);
      }
      // What lies right of the frame and below it.
      for (const StreamImage* image : images) {
        if (image->x == nullptr || row >= image->height) continue;
        const std::int64_t inside = row < task.height ? task.width : 0, pixel = kColours * size_bytes(task.type);
        std::memset(written(task, *image, frame, row) + inside * pixel, 0,
                    static_cast<std::size_t>((image->width - inside) * pixel));
      }
    }
  });
}

#else

void stream_loss_fwd(const StreamLoss&, float*, int, SimdLevel) {}
void stream_loss_bwd(const StreamLoss&, const float*, int, SimdLevel) {}

#endif

}  // namespace hflfnerv
