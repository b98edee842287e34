// The Python module hflfnerv._C, and the only file that knows pybind11: it checks arguments, takes pointers, releases
// the GIL and calls the core. The public functions, their validation and their documentation are in hflfnerv/*.py.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <memory>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "core/conv2d_head.h"
#include "core/conv_pixel_shuffle_gelu.h"
#include "core/conv_pixel_shuffle_gelu_winograd.h"
#include "core/cpu.h"
#include "core/depthwise_conv2d.h"
#include "core/frame_decoder.h"
#include "core/huffman.h"
#include "core/inverted_bottleneck.h"
#include "core/orthogonalise.h"
#include "core/output_stage.h"
#include "core/pixel_shuffle_gelu.h"
#include "core/stream_loss.h"
#include "core/undo_shuffle_gelu.h"
#include "core/winograd_output.h"
#ifdef HFLFNERV_CUDA_ARCHITECTURES
#include "cuda/conv2d.h"
#include "cuda/conv_pixel_shuffle_gelu.h"
#include "cuda/lists.h"
#include "cuda/orthogonalise.h"
#include "cuda/output_stage.h"
#include "cuda/pixel_shuffle_gelu.h"
#endif

namespace py = pybind11;

namespace {

using hflfnerv::ChecksumUse;
using hflfnerv::SimdLevel;
using hflfnerv::StatusCode;

void raise_unless_ok(const hflfnerv::Status& status) {
  const char* name = nullptr;
  switch (status.code) {
    case StatusCode::ok:
      return;
    case StatusCode::bad_magic:
      name = "BadMagic";
      break;
    case StatusCode::unsupported_version:
      name = "UnsupportedVersion";
      break;
    case StatusCode::truncated:
      name = "TruncatedBitstream";
      break;
    case StatusCode::checksum_mismatch:
      name = "ChecksumMismatch";
      break;
    case StatusCode::invalid_code:
      name = "InvalidCode";
      break;
    case StatusCode::invalid_bitstream:
      name = "InvalidBitstream";
      break;
  }
  const py::object error = py::module_::import("hflfnerv.errors").attr(name);
  PyErr_SetString(error.ptr(), status.message);
  throw py::error_already_set();
}

const char* const kLevelNames[] = {"scalar", "avx2", "avx512"};

std::vector<std::string> simd_levels() {
  return {kLevelNames, kLevelNames + static_cast<int>(hflfnerv::best_simd_level()) + 1};
}

SimdLevel level_of(const std::string& name) {
  const int best = static_cast<int>(hflfnerv::best_simd_level());
  if (name == "auto") return static_cast<SimdLevel>(best);
  for (int level = 0; level <= best; ++level) {
    if (name == kLevelNames[level]) return static_cast<SimdLevel>(level);
  }
  throw py::value_error("simd must be 'auto' or one of simd_levels(), got '" + name + "'");
}

// A view of contiguous bytes that keeps its owner's memory in place.
struct Bytes {
  explicit Bytes(const py::buffer& owner) {
    if (PyObject_GetBuffer(owner.ptr(), &view, PyBUF_SIMPLE) != 0) throw py::error_already_set();
  }
  ~Bytes() { PyBuffer_Release(&view); }
  Bytes(const Bytes&) = delete;
  Bytes& operator=(const Bytes&) = delete;
  const std::uint8_t* data() const { return static_cast<const std::uint8_t*>(view.buf); }
  std::size_t size() const { return static_cast<std::size_t>(view.len); }
  Py_buffer view{};
};

py::bytes huffman_encode(const std::vector<py::array>& arrays, const std::vector<std::uint32_t>& groups, bool list,
                         std::uint64_t chunk_symbols, const std::string& simd) {
  if (groups.size() != arrays.size()) throw py::value_error("groups must name one group for each array");
  if (!list && arrays.size() != 1) throw py::value_error("arrays must hold one array unless list is true");
  if (chunk_symbols < 1 || chunk_symbols > hflfnerv::kHuffmanMaxChunkSymbols) {
    throw py::value_error("chunk_symbols must be in [1, 2**28]");
  }
  hflfnerv::HuffmanEncoder encoder(level_of(simd));
  std::vector<hflfnerv::SymbolType> types;
  for (std::size_t i = 0; i < arrays.size(); ++i) {
    const py::array& array = arrays[i];
    const bool u8 = py::isinstance<py::array_t<std::uint8_t>>(array);
    if (!u8 && !py::isinstance<py::array_t<std::int16_t>>(array)) throw py::type_error("arrays must be uint8 or int16");
    if (!(array.flags() & py::array::c_style)) throw py::value_error("arrays must be contiguous");
    const auto type = u8 ? hflfnerv::SymbolType::u8 : hflfnerv::SymbolType::i16;
    if (groups[i] == types.size()) types.push_back(type);
    if (groups[i] >= types.size() || types[groups[i]] != type) {
      throw py::value_error("groups must be numbered as they first occur, with one symbol type each");
    }
    encoder.add(type, std::vector<std::uint64_t>(array.shape(), array.shape() + array.ndim()), array.data(), groups[i]);
  }
  {
    const py::gil_scoped_release release;
    encoder.plan(list, chunk_symbols);
  }
  auto whole = py::reinterpret_steal<py::object>(
      PyBytes_FromStringAndSize(nullptr, static_cast<Py_ssize_t>(encoder.bound())));
  if (!whole) throw py::error_already_set();
  std::size_t size = 0;
  {
    const py::gil_scoped_release release;
    size = encoder.write(reinterpret_cast<std::uint8_t*>(PyBytes_AS_STRING(whole.ptr())));
  }
  PyObject* bytes = whole.release().ptr();
  if (_PyBytes_Resize(&bytes, static_cast<Py_ssize_t>(size)) != 0) throw py::error_already_set();
  return py::reinterpret_steal<py::bytes>(bytes);
}

py::array new_array(hflfnerv::SymbolType type, const std::vector<std::uint64_t>& dims) {
  const std::vector<py::ssize_t> shape(dims.begin(), dims.end());
  if (type == hflfnerv::SymbolType::u8) return py::array_t<std::uint8_t>(shape);
  return py::array_t<std::int16_t>(shape);
}

// A read-only array of symbols that lie in `data`, which stays in place as long as the array does.
py::array shared_array(const py::buffer& data, hflfnerv::SymbolType type, const std::vector<std::uint64_t>& dims,
                       const void* symbols) {
  const auto view = py::reinterpret_steal<py::object>(PyMemoryView_FromObject(data.ptr()));
  if (!view) throw py::error_already_set();
  const std::vector<py::ssize_t> shape(dims.begin(), dims.end());
  const bool u8 = type == hflfnerv::SymbolType::u8;
  py::array array(u8 ? py::dtype::of<std::uint8_t>() : py::dtype::of<std::int16_t>(), shape, symbols, view);
  array.attr("setflags")(py::arg("write") = false);
  return array;
}

py::list huffman_decode(const py::buffer& data, bool list, std::uint64_t max_symbols, bool verify, bool copy,
                        const std::string& simd) {
  const Bytes bytes(data);
  hflfnerv::HuffmanDecoder decoder(level_of(simd));
  hflfnerv::Status status;
  {
    const py::gil_scoped_release release;
    const ChecksumUse use = copy ? ChecksumUse::while_decoding : ChecksumUse::first;
    status = decoder.open(bytes.data(), bytes.size(), max_symbols, verify ? use : ChecksumUse::never);
  }
  raise_unless_ok(status);
  if (decoder.list() && !list) {
    raise_unless_ok({StatusCode::invalid_bitstream, "the data holds a list of arrays; use decode_many"});
  }
  py::list arrays;
  std::vector<void*> pointers;
  for (std::size_t i = 0; i < decoder.arrays().size(); ++i) {
    const hflfnerv::ArrayShape& shape = decoder.arrays()[i];
    const void* const stored = copy ? nullptr : decoder.stored(i);
    py::array array = stored ? shared_array(data, shape.type, shape.dims, stored) : new_array(shape.type, shape.dims);
    pointers.push_back(stored ? nullptr : array.mutable_data());
    arrays.append(std::move(array));
  }
  {
    const py::gil_scoped_release release;
    status = decoder.decode_all(pointers.data());
  }
  raise_unless_ok(status);
  return arrays;
}

py::array huffman_decode_rows(const py::buffer& data, std::uint64_t start, std::uint64_t stop,
                              std::uint64_t max_symbols, bool verify, bool copy, const std::string& simd) {
  const Bytes bytes(data);
  hflfnerv::HuffmanDecoder decoder(level_of(simd));
  hflfnerv::Status status;
  {
    const py::gil_scoped_release release;
    status = decoder.open(bytes.data(), bytes.size(), max_symbols, verify ? ChecksumUse::first : ChecksumUse::never);
  }
  raise_unless_ok(status);
  if (decoder.list())
    raise_unless_ok({StatusCode::invalid_bitstream, "the data holds a list of arrays; use decode_many"});
  const hflfnerv::ArrayShape& shape = decoder.arrays().front();
  if (shape.dims.empty()) throw py::value_error("data must hold an array with at least one dimension, got a 0-d array");
  const std::uint64_t rows = shape.dims.front();
  if (start > stop || stop > rows) {
    throw py::value_error("start and stop must satisfy 0 <= start <= stop <= " + std::to_string(rows) + ", got " +
                          std::to_string(start) + " and " + std::to_string(stop));
  }
  const std::uint64_t row_symbols = rows == 0 ? 0 : shape.count / rows;
  std::vector<std::uint64_t> dims = shape.dims;
  dims.front() = stop - start;
  if (const void* const stored = copy || start == stop ? nullptr : decoder.stored(0)) {
    const std::size_t skipped = start * row_symbols * hflfnerv::symbol_bytes(shape.type);
    return shared_array(data, shape.type, dims, static_cast<const std::uint8_t*>(stored) + skipped);
  }
  py::array array = new_array(shape.type, dims);
  void* const out = array.mutable_data();
  {
    const py::gil_scoped_release release;
    status = decoder.decode(0, start * row_symbols, stop * row_symbols, out);
  }
  raise_unless_ok(status);
  return array;
}

py::array huffman_code_lengths(const py::array_t<std::uint64_t, py::array::c_style>& counts, unsigned max_bits) {
  py::array_t<std::uint8_t> lengths(counts.size());
  hflfnerv::huffman_code_lengths(counts.data(), static_cast<std::size_t>(counts.size()), max_bits,
                                 lengths.mutable_data());
  return lengths;
}

// Tensors arrive as addresses of contiguous memory; the operations in hflfnerv/ops have checked them.
template <class T>
T* pointer(std::uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

hflfnerv::FloatType float_type_of(const std::string& name) {
  if (name == "float32") return hflfnerv::FloatType::f32;
  if (name == "float16") return hflfnerv::FloatType::f16;
  if (name == "bfloat16") return hflfnerv::FloatType::bf16;
  throw py::value_error("dtype must be 'float32', 'float16' or 'bfloat16', got '" + name + "'");
}

SimdLevel pixel_shuffle_gelu_level(const std::string& simd) {
  const SimdLevel most = hflfnerv::pixel_shuffle_gelu_level();  // which also asks for FMA and F16C
  const SimdLevel level = simd == "auto" || most == SimdLevel::scalar ? most : level_of(simd);
  if (level == SimdLevel::scalar) throw py::value_error("simd must be 'avx2' or 'avx512' here, got '" + simd + "'");
  return level;
}

// batch, channels of y, r, height and width of x.
using Shape5 = std::array<std::int64_t, 5>;

hflfnerv::PixelShuffleShape pixel_shuffle_shape(const Shape5& shape, bool channels_last) {
  for (const std::int64_t size : shape) {
    if (size < 1) throw py::value_error("shape must have positive sizes, got " + std::to_string(size));
  }
  return {shape[0], shape[1], shape[2], shape[3], shape[4], channels_last};
}

void pixel_shuffle_gelu_fwd(const Shape5& shape, bool channels_last, const std::string& dtype, bool tanh_form,
                            std::uintptr_t x, std::uintptr_t bias, std::uintptr_t y, int threads, const std::string& simd) {
  const auto sizes = pixel_shuffle_shape(shape, channels_last);
  const hflfnerv::GeluForm form{float_type_of(dtype), tanh_form};
  const SimdLevel level = pixel_shuffle_gelu_level(simd);
  const py::gil_scoped_release release;
  hflfnerv::pixel_shuffle_gelu_fwd(sizes, form, pointer<void>(x), pointer<float>(bias), pointer<void>(y), threads, level);
}

void pixel_shuffle_gelu_bwd(const Shape5& shape, bool channels_last, const std::string& dtype, bool tanh_form,
                            std::uintptr_t dy, std::uintptr_t x, std::uintptr_t bias, std::uintptr_t dx,
                            std::uintptr_t dbias, int threads, const std::string& simd) {
  const auto sizes = pixel_shuffle_shape(shape, channels_last);
  const hflfnerv::GeluForm form{float_type_of(dtype), tanh_form};
  const SimdLevel level = pixel_shuffle_gelu_level(simd);
  const py::gil_scoped_release release;
  hflfnerv::pixel_shuffle_gelu_bwd(sizes, form, pointer<void>(dy), pointer<void>(x), pointer<float>(bias),
                                   pointer<void>(dx), pointer<float>(dbias), threads, level);
}

hflfnerv::ConvActivation conv_activation(const std::string& name) {
  if (name == "identity") return hflfnerv::ConvActivation::identity;
  if (name == "gelu") return hflfnerv::ConvActivation::gelu;
  if (name == "gelu_tanh") return hflfnerv::ConvActivation::gelu_tanh;
  throw py::value_error("activation must be 'identity', 'gelu' or 'gelu_tanh', got '" + name + "'");
}

// batch, input channels, height, width, channels of y, r, kernel height and width, padding of rows and columns.
using Shape10 = std::array<std::int64_t, 10>;

hflfnerv::ConvPixelShuffleShape conv_pixel_shuffle_shape(const Shape10& n) {
  if (const char* reason = hflfnerv::amx_unavailable()) throw py::value_error(reason);
  const hflfnerv::ConvPixelShuffleShape shape{n[0], n[1], n[2], n[3], n[4], n[5], n[6], n[7], n[8], n[9]};
  const bool positive = *std::min_element(n.begin(), n.begin() + 8) > 0 && shape.out_height() > 0 && shape.out_width() > 0;
  if (!positive || n[8] < 0 || n[9] < 0) throw py::value_error("sizes must be positive, paddings at least 0");
  return shape;
}

void conv_pixel_shuffle_gelu_fwd(const Shape10& sizes, const std::string& activation, std::uintptr_t x,
                                 std::uintptr_t weight, std::uintptr_t bias, std::uintptr_t y, std::uintptr_t z, int threads) {
  const auto shape = conv_pixel_shuffle_shape(sizes);
  const auto kind = conv_activation(activation);
  const py::gil_scoped_release release;
  hflfnerv::conv_pixel_shuffle_gelu_fwd(shape, kind, pointer<hflfnerv::BFloat16>(x),
                                        pointer<hflfnerv::BFloat16>(weight), pointer<float>(bias),
                                        pointer<hflfnerv::BFloat16>(y), pointer<hflfnerv::BFloat16>(z), threads);
}

void conv_pixel_shuffle_gelu_dgrad(const Shape10& sizes, std::uintptr_t dz, std::uintptr_t weight, std::uintptr_t dx,
                                   int threads) {
  const auto shape = conv_pixel_shuffle_shape(sizes);
  if (shape.padding_h >= shape.kernel_h || shape.padding_w >= shape.kernel_w) {
    throw py::value_error("paddings must be less than the kernel for the gradient of x");
  }
  const py::gil_scoped_release release;
  hflfnerv::conv_pixel_shuffle_gelu_dgrad(shape, pointer<hflfnerv::BFloat16>(dz), pointer<hflfnerv::BFloat16>(weight),
                                          pointer<hflfnerv::BFloat16>(dx), threads);
}

void conv_pixel_shuffle_gelu_wgrad(const Shape10& sizes, std::uintptr_t x, std::uintptr_t dz, std::uintptr_t dweight,
                                   int threads) {
  const auto shape = conv_pixel_shuffle_shape(sizes);
  const py::gil_scoped_release release;
  hflfnerv::conv_pixel_shuffle_gelu_wgrad(shape, pointer<hflfnerv::BFloat16>(x), pointer<hflfnerv::BFloat16>(dz),
                                          pointer<hflfnerv::BFloat16>(dweight), threads);
}

// batch, input channels, height, width, channels of y, r, kernel, points on each axis.
using Shape8 = std::array<std::int64_t, 8>;

constexpr std::int64_t kMostIntegerChannels = 4096;

hflfnerv::WinogradShape winograd_shape(const Shape8& n, const std::string& dtype = "float32") {
  if (*std::min_element(n.begin(), n.end()) < 1) throw py::value_error("sizes must be positive");
  if (n[6] != 3 && n[6] != 5) throw py::value_error("kernel must be 3 or 5, got " + std::to_string(n[6]));
  if (n[7] != 8 && n[7] != 18 && (n[7] != 10 || n[6] != 5)) {
    throw py::value_error("points must be 8, 18, or 10 with a kernel of 5, got " + std::to_string(n[7]));
  }
  // What is summed over channels has to leave integers room.
  if (n[7] == 18 && std::max(n[1], n[4] * n[5] * n[5]) > kMostIntegerChannels) {
    throw py::value_error("with 18 points there may be " + std::to_string(kMostIntegerChannels) + " channels");
  }
  return {n[0], n[1], n[2], n[3], n[4], n[5], n[6], n[7], float_type_of(dtype)};
}

std::int64_t winograd_weight_floats(const Shape8& sizes, bool data_gradient, const std::string& simd) {
  return hflfnerv::winograd_weight_floats(winograd_shape(sizes), data_gradient, pixel_shuffle_gelu_level(simd));
}

void winograd_weight(const Shape8& sizes, bool data_gradient, std::uintptr_t weight, std::uintptr_t points, int threads,
                     const std::string& simd) {
  const auto shape = winograd_shape(sizes);
  const SimdLevel level = pixel_shuffle_gelu_level(simd);
  const py::gil_scoped_release release;
  hflfnerv::winograd_weight(shape, data_gradient, pointer<float>(weight), pointer<float>(points), threads, level);
}

void winograd_fwd(const Shape8& sizes, const std::string& dtype, const std::string& activation, std::uintptr_t x,
                  std::uintptr_t points, std::uintptr_t bias, std::uintptr_t y, std::uintptr_t z, int threads,
                  const std::string& simd) {
  const auto shape = winograd_shape(sizes, dtype);
  const auto kind = conv_activation(activation);
  const SimdLevel level = pixel_shuffle_gelu_level(simd);
  const py::gil_scoped_release release;
  hflfnerv::winograd_fwd(shape, kind, pointer<void>(x), pointer<float>(points), pointer<float>(bias), pointer<void>(y),
                         pointer<void>(z), threads, level);
}

void undo_shuffle_gelu(const Shape5& shape, const std::string& dtype, bool tanh_form, std::uintptr_t dy, std::uintptr_t z,
                       std::uintptr_t dz, std::uintptr_t dbias, int threads, const std::string& simd) {
  const auto n = pixel_shuffle_shape(shape, true);
  const hflfnerv::UndoShape sizes{n.batch, n.channels, n.r, n.height, n.width, float_type_of(dtype)};
  const SimdLevel level = pixel_shuffle_gelu_level(simd);
  const py::gil_scoped_release release;
  hflfnerv::undo_shuffle_gelu(sizes, tanh_form, pointer<void>(dy), pointer<void>(z), pointer<void>(dz),
                              pointer<float>(dbias), threads, level);
}

void winograd_dgrad(const Shape8& sizes, const std::string& dtype, std::uintptr_t dz, std::uintptr_t points,
                    std::uintptr_t dx, int threads, const std::string& simd) {
  const auto shape = winograd_shape(sizes, dtype);
  const SimdLevel level = pixel_shuffle_gelu_level(simd);
  const py::gil_scoped_release release;
  hflfnerv::winograd_dgrad(shape, pointer<void>(dz), pointer<float>(points), pointer<void>(dx), threads, level);
}

void winograd_wgrad(const Shape8& sizes, const std::string& dtype, std::uintptr_t x, std::uintptr_t dz,
                    std::uintptr_t dweight, int threads, const std::string& simd) {
  if (sizes[7] == 18) throw py::value_error("the gradient of the weight is not made at 18 points");
  const auto shape = winograd_shape(sizes, dtype);
  const SimdLevel level = pixel_shuffle_gelu_level(simd);
  const py::gil_scoped_release release;
  hflfnerv::winograd_wgrad(shape, pointer<void>(x), pointer<void>(dz), pointer<float>(dweight), threads, level);
}

// batch, channels, height, width.
using Shape4 = std::array<std::int64_t, 4>;

hflfnerv::HeadShape head_shape(const Shape4& n, const std::string& dtype) {
  if (*std::min_element(n.begin(), n.end()) < 1) throw py::value_error("sizes must be positive");
  return {n[0], n[1], n[2], n[3], float_type_of(dtype)};
}

void conv2d_head_fwd(const Shape4& sizes, const std::string& dtype, std::uintptr_t x, std::uintptr_t weight,
                     std::uintptr_t bias, std::uintptr_t y, int threads, const std::string& simd) {
  const auto shape = head_shape(sizes, dtype);
  const SimdLevel level = pixel_shuffle_gelu_level(simd);
  const py::gil_scoped_release release;
  hflfnerv::conv2d_head_fwd(shape, pointer<void>(x), pointer<float>(weight), pointer<float>(bias), pointer<void>(y), threads,
                            level);
}

void conv2d_head_bwd(const Shape4& sizes, const std::string& dtype, std::uintptr_t dy, std::uintptr_t x,
                     std::uintptr_t weight, std::uintptr_t dx, std::uintptr_t dweight, std::uintptr_t dbias, int threads,
                     const std::string& simd) {
  const auto shape = head_shape(sizes, dtype);
  const SimdLevel level = pixel_shuffle_gelu_level(simd);
  const py::gil_scoped_release release;
  hflfnerv::conv2d_head_bwd(shape, pointer<void>(dy), pointer<void>(x), pointer<float>(weight), pointer<void>(dx),
                            pointer<float>(dweight), pointer<float>(dbias), threads, level);
}

// batch, channels, height, width, kernel's rows and columns.
using Shape6 = std::array<std::int64_t, 6>;

hflfnerv::DepthwiseShape depthwise_shape(const Shape6& n) {
  if (*std::min_element(n.begin(), n.end()) < 1 || n[4] % 2 == 0 || n[5] % 2 == 0) {
    throw py::value_error("sizes must be positive, and those of the kernel odd");
  }
  return {n[0], n[1], n[2], n[3], n[4], n[5]};
}

void depthwise_conv2d_fwd(const Shape6& sizes, std::uintptr_t x, std::uintptr_t weight, std::uintptr_t bias, std::uintptr_t y,
                          int threads, const std::string& simd) {
  const auto shape = depthwise_shape(sizes);
  const SimdLevel level = pixel_shuffle_gelu_level(simd);
  const py::gil_scoped_release release;
  hflfnerv::depthwise_conv2d_fwd(shape, pointer<float>(x), pointer<float>(weight), pointer<float>(bias), pointer<float>(y),
                                 threads, level);
}

void depthwise_conv2d_bwd(const Shape6& sizes, std::uintptr_t dy, std::uintptr_t x, std::uintptr_t weight, std::uintptr_t dx,
                          std::uintptr_t dweight, std::uintptr_t dbias, int threads, const std::string& simd) {
  const auto shape = depthwise_shape(sizes);
  const SimdLevel level = pixel_shuffle_gelu_level(simd);
  const py::gil_scoped_release release;
  hflfnerv::depthwise_conv2d_bwd(shape, pointer<float>(dy), pointer<float>(x), pointer<float>(weight), pointer<float>(dx),
                                 pointer<float>(dweight), pointer<float>(dbias), threads, level);
}

// Rows, columns, addresses of x and y.
using Matrix = std::tuple<std::int64_t, std::int64_t, std::uintptr_t, std::uintptr_t>;

template <class Of, class Element>
std::vector<Of> matrices_of(const std::vector<Matrix>& matrices) {
  std::vector<Of> all;
  for (const auto& [rows, columns, x, y] : matrices) {
    if (rows < 1 || columns < 1) throw py::value_error("sizes must be positive");
    all.push_back({rows, columns, pointer<Element>(x), pointer<Element>(y)});
  }
  return all;
}

void orthogonalise(const std::vector<Matrix>& matrices, const std::array<float, 3>& quintic, int steps, int threads,
                   const std::string& simd) {
  const auto all = matrices_of<hflfnerv::OrthogonaliseMatrix, float>(matrices);
  const SimdLevel level = pixel_shuffle_gelu_level(simd);
  const py::gil_scoped_release release;
  hflfnerv::orthogonalise(all.data(), static_cast<std::int64_t>(all.size()), {quintic[0], quintic[1], quintic[2], steps},
                          threads, level);
}

void orthogonalise_bfloat16(const std::vector<Matrix>& matrices, const std::array<float, 3>& quintic, int steps, int threads) {
  if (const char* reason = hflfnerv::amx_unavailable()) throw py::value_error(reason);
  const auto all = matrices_of<hflfnerv::OrthogonaliseBFloat16, hflfnerv::BFloat16>(matrices);
  const py::gil_scoped_release release;
  hflfnerv::orthogonalise_bfloat16(all.data(), static_cast<std::int64_t>(all.size()),
                                   {quintic[0], quintic[1], quintic[2], steps}, threads);
}

// pixels, channels, hidden channels; addresses of gain, shift, both weights each followed by its bias, and gamma.
using BottleneckSizes = std::array<std::int64_t, 3>;
using BottleneckAddresses = std::array<std::uintptr_t, 7>;

hflfnerv::BottleneckShape bottleneck_shape(const BottleneckSizes& sizes) {
  if (const char* reason = hflfnerv::amx_unavailable()) throw py::value_error(reason);
  if (*std::min_element(sizes.begin(), sizes.end()) < 1) throw py::value_error("sizes must be positive");
  return {sizes[0], sizes[1], sizes[2]};
}

hflfnerv::BottleneckWeights bottleneck_weights(const BottleneckAddresses& a, float epsilon) {
  return {pointer<float>(a[0]), pointer<float>(a[1]), pointer<hflfnerv::BFloat16>(a[2]), pointer<float>(a[3]),
          pointer<hflfnerv::BFloat16>(a[4]), pointer<float>(a[5]), pointer<float>(a[6]), epsilon};
}

void inverted_bottleneck_fwd(const BottleneckSizes& sizes, const std::string& dtype, const BottleneckAddresses& parameters,
                             float epsilon, std::uintptr_t u, std::uintptr_t x, std::uintptr_t out, int threads) {
  auto shape = bottleneck_shape(sizes);
  shape.type = float_type_of(dtype);
  if (shape.type == hflfnerv::FloatType::f16) throw py::value_error("dtype must be 'float32' or 'bfloat16', got 'float16'");
  const py::gil_scoped_release release;
  hflfnerv::inverted_bottleneck_fwd(shape, bottleneck_weights(parameters, epsilon), pointer<hflfnerv::BFloat16>(u),
                                    pointer<void>(x), pointer<float>(out), threads);
}

void inverted_bottleneck_bwd(const BottleneckSizes& sizes, const BottleneckAddresses& parameters, float epsilon,
                             std::uintptr_t u, std::uintptr_t dout, std::uintptr_t du, const BottleneckAddresses& gradients,
                             int threads) {
  const auto shape = bottleneck_shape(sizes);
  const auto& g = gradients;
  const py::gil_scoped_release release;
  hflfnerv::inverted_bottleneck_bwd(shape, bottleneck_weights(parameters, epsilon), pointer<hflfnerv::BFloat16>(u),
                                    pointer<float>(dout), pointer<hflfnerv::BFloat16>(du),
                                    {pointer<float>(g[0]), pointer<float>(g[1]), pointer<float>(g[2]), pointer<float>(g[3]),
                                     pointer<float>(g[4]), pointer<float>(g[5]), pointer<float>(g[6])},
                                    threads);
}

// Address, height and width of an image, and the address of its gradient.
using Image = std::tuple<std::uintptr_t, std::int64_t, std::int64_t, std::uintptr_t>;

hflfnerv::StreamLoss stream_loss(const std::array<std::int64_t, 3>& sizes, const std::string& dtype, const Image& low,
                                 const Image& high, std::uintptr_t target) {
  const auto image_of = [](const Image& image) -> hflfnerv::StreamImage {
    const auto& [x, height, width, dx] = image;
    return {pointer<void>(x), height, width, pointer<void>(dx)};
  };
  const hflfnerv::StreamLoss task{sizes[0], sizes[1], sizes[2], float_type_of(dtype), image_of(low), image_of(high),
                                  pointer<std::uint8_t>(target)};
  if (*std::min_element(sizes.begin(), sizes.end()) < 1) throw py::value_error("sizes must be positive");
  for (const hflfnerv::StreamImage* image : {&task.low, &task.high}) {
    if (image->x != nullptr && (image->height < task.height || image->width < task.width)) {
      throw py::value_error("images must be at least as large as the frame");
    }
  }
  return task;
}

void stream_loss_fwd(const std::array<std::int64_t, 3>& sizes, const std::string& dtype, const Image& low, const Image& high,
                     std::uintptr_t target, std::uintptr_t loss, int threads, const std::string& simd) {
  const auto task = stream_loss(sizes, dtype, low, high, target);
  const SimdLevel level = pixel_shuffle_gelu_level(simd);
  const py::gil_scoped_release release;
  hflfnerv::stream_loss_fwd(task, pointer<float>(loss), threads, level);
}

void stream_loss_bwd(const std::array<std::int64_t, 3>& sizes, const std::string& dtype, const Image& low, const Image& high,
                     std::uintptr_t target, std::uintptr_t dloss, int threads, const std::string& simd) {
  const auto task = stream_loss(sizes, dtype, low, high, target);
  const SimdLevel level = pixel_shuffle_gelu_level(simd);
  const py::gil_scoped_release release;
  hflfnerv::stream_loss_bwd(task, pointer<float>(dloss), threads, level);
}

#ifdef HFLFNERV_CUDA_ARCHITECTURES

void raise_unless_done(const char* error) {
  if (error != nullptr) throw std::runtime_error(error);
}

// The same ten numbers, then the strides of x between images, rows and pixels, and between pixels of y, in elements; and 0,
// or the upscale factor of the block of whose x this is the gradient.
using CudaShape = std::array<std::int64_t, 15>;

hflfnerv::conv_layout::Plan conv_pixel_shuffle_gelu_cuda_plan(const CudaShape& sizes, int device) {
  const auto n = [&](int i) {
    const std::int64_t size = sizes[static_cast<std::size_t>(i)];
    if (size < 0 || size > INT32_MAX) {
      throw py::value_error("sizes must be at least 0 and below 2^31, got " + std::to_string(size));
    }
    return static_cast<int>(size);
  };
  hflfnerv::conv_layout::Plan plan;
  raise_unless_done(hflfnerv::conv_pixel_shuffle_gelu_cuda_plan(
      {n(0), n(1), n(2), n(3), n(4), n(5), n(6), n(7), n(8), n(9), sizes[12], sizes[11], sizes[10], n(13), n(14)}, device, plan));
  return plan;
}

void conv_pixel_shuffle_gelu_cuda_pack(const CudaShape& sizes, int device, std::uintptr_t weight,
                                       const std::array<std::int64_t, 3>& strides, std::uintptr_t packed,
                                       std::uintptr_t stream) {
  const auto plan = conv_pixel_shuffle_gelu_cuda_plan(sizes, device);
  const py::gil_scoped_release release;
  raise_unless_done(hflfnerv::conv_pixel_shuffle_gelu_cuda_pack(plan, pointer<void>(weight), {strides[0], strides[1], strides[2]},
                                                                pointer<void>(packed), pointer<void>(stream)));
}

hflfnerv::Activation cuda_activation(const std::string& name) {
  if (name == "none") return hflfnerv::Activation::none;
  if (name == "gelu") return hflfnerv::Activation::gelu;
  if (name == "gelu_tanh") return hflfnerv::Activation::gelu_tanh;
  throw py::value_error("activation must be 'none', 'gelu' or 'gelu_tanh', got '" + name + "'");
}

void conv_pixel_shuffle_gelu_cuda_fwd(const CudaShape& sizes, int device, const std::string& dtype,
                                      const std::string& activation, std::uintptr_t x, std::uintptr_t packed,
                                      std::uintptr_t bias, std::uintptr_t y, std::uintptr_t z, std::uintptr_t stream) {
  const hflfnerv::FloatType type = float_type_of(dtype);
  if (type == hflfnerv::FloatType::f32) throw py::value_error("dtype must be 'float16' or 'bfloat16', got 'float32'");
  const hflfnerv::ConvPixelShuffleGeluCuda call{conv_pixel_shuffle_gelu_cuda_plan(sizes, device),
                                                type == hflfnerv::FloatType::bf16,
                                                cuda_activation(activation),
                                                pointer<void>(x),
                                                pointer<void>(packed),
                                                pointer<void>(bias),
                                                pointer<void>(y),
                                                pointer<void>(z)};
  const py::gil_scoped_release release;
  raise_unless_done(hflfnerv::conv_pixel_shuffle_gelu_cuda_fwd(call, pointer<void>(stream)));
}

// Address and packed weight of a feature map, its channels, height, width and elements from pixel to pixel; its group.
using CudaFeature = std::tuple<std::uintptr_t, std::uintptr_t, int, int, int, int, int>;

void output_stage_cuda_fwd(const std::array<int, 3>& size, int device, const std::string& dtype,
                           const std::vector<CudaFeature>& features, const std::vector<float>& scales, float offset,
                           std::uintptr_t biases, std::uintptr_t y, bool as_bytes, std::uintptr_t stream) {
  const hflfnerv::FloatType type = float_type_of(dtype);
  if (type == hflfnerv::FloatType::f32) throw py::value_error("dtype must be 'float16' or 'bfloat16', got 'float32'");
  constexpr std::size_t kMost = hflfnerv::kMostFeatures;
  if (features.empty() || features.size() > kMost || scales.empty() || scales.size() > kMost) {
    throw py::value_error("features and scales must be one to three");
  }
  hflfnerv::OutputStageCuda call{};
  call.bfloat16 = type == hflfnerv::FloatType::bf16;
  call.as_bytes = as_bytes;
  std::tie(call.batch, call.height, call.width) = std::tuple_cat(size);
  call.features = static_cast<int>(features.size());
  call.groups = static_cast<int>(scales.size());
  for (std::size_t i = 0; i < features.size(); ++i) {
    const auto& [x, weight, channels, rows, columns, pixel, group] = features[i];
    call.feature[i] = {pointer<void>(x), pointer<void>(weight), channels, rows, columns, pixel, group};
  }
  std::copy(scales.begin(), scales.end(), call.scales);
  call.offset = offset;
  call.biases = pointer<float>(biases);
  call.y = pointer<void>(y);
  const py::gil_scoped_release release;
  raise_unless_done(hflfnerv::output_stage_cuda_fwd(call, device, pointer<void>(stream)));
}

// Rows and columns of a contiguous matrix, and the addresses of it and of its result.
using CudaMatrix = std::tuple<int, int, std::uintptr_t, std::uintptr_t>;

hflfnerv::OrthogonaliseCuda orthogonalise_cuda_call(const std::vector<CudaMatrix>& matrices) {
  if (matrices.empty() || matrices.size() > hflfnerv::kMostMatrices) throw py::value_error("matrices must be 1 to 64");
  hflfnerv::OrthogonaliseCuda call{};
  for (const auto& [rows, columns, x, y] : matrices) {
    const bool tall = rows > columns;
    const auto [smaller, larger] = std::minmax(rows, columns);
    if (smaller < 1 || smaller > hflfnerv::kMostMatrixRows || std::int64_t{smaller} * larger > 1 << 22) {
      throw py::value_error("matrices must have a side from 1 to 128, and at most 2^22 elements");
    }
    call.matrix[call.count++] = {pointer<float>(x), pointer<float>(y), smaller, larger, tall ? 1 : columns, tall ? columns : 1};
  }
  return call;
}

void orthogonalise_cuda(const std::vector<CudaMatrix>& matrices, const std::array<float, 3>& quintic, int steps,
                        std::uintptr_t scratch, int device, std::uintptr_t stream) {
  if (steps < 1) throw py::value_error("steps must be at least 1");
  hflfnerv::OrthogonaliseCuda call = orthogonalise_cuda_call(matrices);
  call.steps = steps;
  call.a = quintic[0];
  call.b = quintic[1];
  call.c = quintic[2];
  call.scratch = pointer<float>(scratch);
  const py::gil_scoped_release release;
  raise_unless_done(hflfnerv::orthogonalise_cuda(call, device, pointer<void>(stream)));
}

// Batch, channels of y, r, height and width of x; addresses of x and of the bias, and of y where it is known.
hflfnerv::PixelShuffleGeluCuda pixel_shuffle_gelu_cuda(const std::array<std::int64_t, 5>& sizes, const std::string& dtype,
                                                       bool tanh_form, std::uintptr_t x, std::uintptr_t bias,
                                                       std::uintptr_t y) {
  const hflfnerv::FloatType type = float_type_of(dtype);
  if (type == hflfnerv::FloatType::f32) throw py::value_error("dtype must be 'float16' or 'bfloat16', got 'float32'");
  const auto fits = [](std::int64_t size, std::int64_t times) { return size > 0 && size <= INT32_MAX / times; };
  const auto [batch, channels, r, height, width] = sizes;
  if (r < 1 || r > 32 || !fits(channels, r * r) || !fits(height, channels * r * r) ||
      !fits(width, height * channels * r * r) || !fits(batch, height)) {
    throw py::value_error("sizes must be positive, r at most 32, the elements of an image and the rows of all below 2^31");
  }
  const auto n = [&](std::size_t i) { return static_cast<int>(sizes[i]); };
  return {type == hflfnerv::FloatType::bf16, tanh_form, n(0), n(1), n(2), n(3), n(4), pointer<void>(x), pointer<void>(bias),
          pointer<void>(y)};
}

void pixel_shuffle_gelu_cuda_fwd(const std::array<std::int64_t, 5>& sizes, int device, const std::string& dtype,
                                 bool tanh_form, std::uintptr_t x, std::uintptr_t bias, std::uintptr_t y,
                                 std::uintptr_t stream) {
  const auto call = pixel_shuffle_gelu_cuda(sizes, dtype, tanh_form, x, bias, y);
  const py::gil_scoped_release release;
  raise_unless_done(hflfnerv::pixel_shuffle_gelu_cuda_fwd(call, device, pointer<void>(stream)));
}

std::int64_t pixel_shuffle_gelu_cuda_sums(const std::array<std::int64_t, 5>& sizes, int device, const std::string& dtype,
                                          std::uintptr_t dy, std::uintptr_t x, std::uintptr_t dx) {
  const auto call = pixel_shuffle_gelu_cuda(sizes, dtype, false, x, 0, 0);
  std::int64_t count = 0;
  raise_unless_done(
      hflfnerv::pixel_shuffle_gelu_cuda_sums({call, pointer<void>(dy), pointer<void>(dx), nullptr, nullptr}, device, count));
  return count;
}

void pixel_shuffle_gelu_cuda_bwd(const std::array<std::int64_t, 5>& sizes, int device, const std::string& dtype,
                                 bool tanh_form, std::uintptr_t dy, std::uintptr_t x, std::uintptr_t bias, std::uintptr_t dx,
                                 std::uintptr_t sums, std::uintptr_t dbias, std::uintptr_t stream) {
  const auto call = pixel_shuffle_gelu_cuda(sizes, dtype, tanh_form, x, bias, 0);
  const py::gil_scoped_release release;
  raise_unless_done(hflfnerv::pixel_shuffle_gelu_cuda_bwd(
      {call, pointer<void>(dy), pointer<void>(dx), pointer<float>(sums), pointer<void>(dbias)}, device, pointer<void>(stream)));
}

// Batch, channels, height, width, output channels; elements from pixel to pixel of x.
using Conv2dSizes = std::array<int, 6>;
using Strides4 = std::array<std::int64_t, 4>;

hflfnerv::Conv2dCuda conv2d_cuda(const Conv2dSizes& sizes, const std::string& dtype, std::uintptr_t x, std::uintptr_t weight,
                                 const Strides4& weight_strides) {
  const hflfnerv::FloatType type = float_type_of(dtype);
  if (type == hflfnerv::FloatType::f32) throw py::value_error("dtype must be 'float16' or 'bfloat16', got 'float32'");
  const auto [batch, channels, height, width, outputs, pixel] = sizes;
  const bool fits = channels <= hflfnerv::kConv2dChannels && outputs <= hflfnerv::kConv2dOutputs && pixel >= channels;
  if (*std::min_element(sizes.begin(), sizes.end()) < 1 || !fits) {
    throw py::value_error("sizes must be positive, with at most 64 channels and three outputs");
  }
  hflfnerv::Conv2dCuda call{type == hflfnerv::FloatType::bf16, batch, channels, height, width, outputs, pointer<void>(x), pixel,
                            pointer<void>(weight), {}};
  std::copy(weight_strides.begin(), weight_strides.end(), call.weight_strides);
  return call;
}

void conv2d_cuda_fwd(const Conv2dSizes& sizes, int device, const std::string& dtype, std::uintptr_t x, std::uintptr_t weight,
                     const Strides4& weight_strides, std::uintptr_t bias, std::uintptr_t y, std::uintptr_t stream) {
  const auto call = conv2d_cuda(sizes, dtype, x, weight, weight_strides);
  const py::gil_scoped_release release;
  raise_unless_done(hflfnerv::conv2d_cuda_fwd(call, {pointer<void>(bias), pointer<void>(y)}, device, pointer<void>(stream)));
}

std::int64_t conv2d_cuda_partial_floats(const Conv2dSizes& sizes, int device) {
  std::int64_t floats = 0;
  raise_unless_done(hflfnerv::conv2d_cuda_partial_floats(conv2d_cuda(sizes, "float16", 0, 0, {}), device, floats));
  return floats;
}

void conv2d_cuda_bwd(const Conv2dSizes& sizes, int device, const std::string& dtype, std::uintptr_t x, std::uintptr_t weight,
                     const Strides4& weight_strides, std::uintptr_t dy, const Strides4& dy_strides, std::uintptr_t dx,
                     int dx_pixel, std::uintptr_t dweight, const Strides4& dweight_strides, std::uintptr_t dbias,
                     std::uintptr_t partial, std::uintptr_t stream) {
  const auto call = conv2d_cuda(sizes, dtype, x, weight, weight_strides);
  hflfnerv::Conv2dCudaBackward gradients{};
  gradients.dy = pointer<void>(dy);
  std::copy(dy_strides.begin(), dy_strides.end(), gradients.dy_strides);
  gradients.dx = pointer<void>(dx);
  gradients.dx_pixel = dx_pixel;
  gradients.dweight = pointer<void>(dweight);
  std::copy(dweight_strides.begin(), dweight_strides.end(), gradients.dweight_strides);
  gradients.dbias = pointer<void>(dbias);
  gradients.partial = pointer<float>(partial);
  const py::gil_scoped_release release;
  raise_unless_done(hflfnerv::conv2d_cuda_bwd(call, gradients, device, pointer<void>(stream)));
}

// Addresses of a tensor's a, b and c, its factor, and how many elements each has; see csrc/cuda/lists.h.
using ListTensor = std::tuple<std::uintptr_t, std::uintptr_t, std::uintptr_t, float, std::int64_t>;

template <class Call>
void for_lists(const std::vector<ListTensor>& tensors, Call call) {
  hflfnerv::TensorList list{};
  for (const auto& [a, b, c, factor, elements] : tensors) {
    if (elements < 1 || elements > INT32_MAX - 4096) throw py::value_error("tensors must have from 1 to 2^31 - 4097 elements");
    list.entry[list.count++] = {pointer<void>(a), pointer<void>(b), pointer<void>(c), factor, elements};
    if (list.count == hflfnerv::kMostTensors) {
      raise_unless_done(call(list));
      list.count = 0;
    }
  }
  if (list.count > 0) raise_unless_done(call(list));
}

hflfnerv::ListType list_type(const std::string& dtype) {
  switch (float_type_of(dtype)) {
    case hflfnerv::FloatType::f16:
      return hflfnerv::ListType::float16;
    case hflfnerv::FloatType::bf16:
      return hflfnerv::ListType::bfloat16;
    default:
      return hflfnerv::ListType::float32;
  }
}

void list_cast(const std::vector<ListTensor>& tensors, const std::string& from, const std::string& to, int device,
               std::uintptr_t stream) {
  const hflfnerv::ListType source = list_type(from), target = list_type(to);
  const py::gil_scoped_release release;
  for_lists(tensors, [&](const auto& list) { return hflfnerv::list_cast(list, source, target, device, pointer<void>(stream)); });
}

void list_momentum(const std::vector<ListTensor>& tensors, float mu, int device, std::uintptr_t stream) {
  const py::gil_scoped_release release;
  for_lists(tensors, [&](const auto& list) { return hflfnerv::list_momentum(list, mu, device, pointer<void>(stream)); });
}

void list_subtract(const std::vector<ListTensor>& tensors, std::uintptr_t rate, float decay, int device,
                   std::uintptr_t stream) {
  const py::gil_scoped_release release;
  for_lists(tensors, [&](const auto& list) {
    return hflfnerv::list_subtract(list, pointer<float>(rate), decay, device, pointer<void>(stream));
  });
}

#endif

// Address, channels, height and width of a feature map; address of its head's weight; its group.
using Feature = std::tuple<std::uintptr_t, std::int64_t, std::int64_t, std::int64_t, std::uintptr_t, int>;
// Of the output stage: scales and biases (three each) of the groups, and the offset.
using Link = std::tuple<std::vector<float>, std::vector<float>, float>;

hflfnerv::OutputShape output_shape(std::int64_t batch, std::int64_t height, std::int64_t width, const Link& link) {
  const auto& [scales, biases, offset] = link;
  const bool positive = batch > 0 && height > 0 && width > 0 && !scales.empty();
  if (!positive || biases.size() != 3 * scales.size()) {
    throw py::value_error("sizes must be positive, with a scale and three biases for each group");
  }
  return {batch, height, width, static_cast<int>(scales.size()), scales.data(), biases.data(), offset};
}

void check_group(int group, int before, const hflfnerv::OutputShape& shape) {
  if (group < before || group >= shape.groups) throw py::value_error("groups must ascend, got " + std::to_string(group));
}

void output_stage_fwd(const std::array<std::int64_t, 3>& sizes, const Link& link, const std::vector<Feature>& features,
                      const std::string& dtype, std::uintptr_t out, bool bytes, int threads, const std::string& simd) {
  const auto shape = output_shape(sizes[0], sizes[1], sizes[2], link);
  std::vector<hflfnerv::OutputFeature> all;
  for (const auto& [x, channels, height, width, weight, group] : features) {
    if (channels < 1 || height < shape.height || width < shape.width) {
      throw py::value_error("features must be at least as large as the frame");
    }
    check_group(group, all.empty() ? 0 : all.back().group, shape);
    all.push_back({pointer<void>(x), channels, height, width, pointer<float>(weight), group});
  }
  // "amx", or the level of the vectors that are used instead of it.
  const bool amx = simd == "amx" || (simd == "auto" && hflfnerv::amx_unavailable() == nullptr);
  if (const char* reason = hflfnerv::amx_unavailable(); simd == "amx" && reason != nullptr) throw py::value_error(reason);
  const SimdLevel level = pixel_shuffle_gelu_level(simd == "amx" ? "auto" : simd);
  const auto type = float_type_of(dtype);
  const py::gil_scoped_release release;
  hflfnerv::output_stage_fwd(shape, all.data(), static_cast<int>(all.size()), type, pointer<void>(out), bytes, threads,
                             level, amx);
}

// The sizes of the last block, its activation, addresses of x, points, bias and the head's weight, group.
using LastBlock = std::tuple<Shape8, std::string, std::uintptr_t, std::uintptr_t, std::uintptr_t, std::uintptr_t, int>;

void winograd_output_fwd(const std::array<std::int64_t, 2>& size, const Link& link, const std::vector<LastBlock>& streams,
                         std::uintptr_t out, bool bytes, int threads, const std::string& simd) {
  const auto shape = output_shape(1, size[0], size[1], link);
  std::vector<hflfnerv::WinogradStream> all;
  for (const auto& [sizes, activation, x, points, bias, head, group] : streams) {
    const auto block = winograd_shape(sizes);
    if (block.batch != 1) throw py::value_error("the batch must be 1");
    if (block.height * block.r < shape.height || block.width * block.r < shape.width) {
      throw py::value_error("features must be at least as large as the frame");
    }
    check_group(group, all.empty() ? 0 : all.back().group, shape);
    all.push_back({block, conv_activation(activation), pointer<float>(x), pointer<float>(points), pointer<float>(bias),
                   pointer<float>(head), group});
  }
  const SimdLevel level = pixel_shuffle_gelu_level(simd);
  const int count = static_cast<int>(all.size());
  if (count == 0 || !hflfnerv::winograd_output_fits(all.data(), count, level)) {
    throw py::value_error("there must be streams, and their bands of one height");
  }
  const py::gil_scoped_release release;
  hflfnerv::winograd_output_fwd(shape, all.data(), count, pointer<void>(out), bytes, threads, level);
}

#if defined(HFLFNERV_HAVE_AMX)
// Input and output channels, r, kernel; whether GELU is in its tanh form; addresses of weight and bias.
using Block = std::tuple<std::int64_t, std::int64_t, std::int64_t, std::int64_t, bool, std::uintptr_t, std::uintptr_t>;
// Height and width of the first input, blocks, address of the head's weight, group.
using Stream = std::tuple<std::int64_t, std::int64_t, std::vector<Block>, std::uintptr_t, int>;

std::unique_ptr<hflfnerv::FrameDecoder> frame_decoder(const std::array<std::int64_t, 2>& size, const Link& link,
                                                      const std::vector<Stream>& streams, int threads) {
  if (const char* reason = hflfnerv::amx_unavailable()) throw py::value_error(reason);
  const auto shape = output_shape(1, size[0], size[1], link);
  std::vector<hflfnerv::DecoderStream> all;
  for (const auto& [height, width, blocks, head, group] : streams) {
    check_group(group, all.empty() ? 0 : all.back().group, shape);
    hflfnerv::DecoderStream stream{height, width, {}, pointer<float>(head), group};
    std::int64_t rows = height, columns = width;
    for (const auto& [in_channels, channels, r, kernel, tanh_form, weight, bias] : blocks) {
      const bool chained = stream.blocks.empty() || stream.blocks.back().channels == in_channels;
      if (!chained || in_channels < 1 || channels < 1 || r < 1 || kernel < 1 || kernel % 2 == 0) {
        throw py::value_error("blocks must follow each other, with positive sizes and odd kernels");
      }
      stream.blocks.push_back({in_channels, channels, r, kernel, tanh_form, pointer<hflfnerv::BFloat16>(weight),
                               pointer<float>(bias)});
      rows *= r;
      columns *= r;
    }
    if (stream.blocks.empty() || height < 1 || width < 1 || rows < shape.height || columns < shape.width) {
      throw py::value_error("streams must have blocks, and images at least as large as the frame");
    }
    all.push_back(std::move(stream));
  }
  const py::gil_scoped_release release;
  return std::make_unique<hflfnerv::FrameDecoder>(shape, all, threads);
}

void decode_frame(hflfnerv::FrameDecoder& decoder, const std::vector<std::uintptr_t>& inputs, std::uintptr_t out, bool bytes,
                  int threads) {
  std::vector<const float*> all;
  for (const std::uintptr_t input : inputs) all.push_back(pointer<float>(input));
  if (all.size() != decoder.streams()) throw py::value_error("inputs must have one address for each stream");
  const py::gil_scoped_release release;
  decoder.decode(all.data(), pointer<void>(out), bytes, threads);
}
#endif

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "Compiled parts of hflfnerv; use them through the Python modules that wrap them.";
  module.def("simd_levels", &simd_levels);
  module.def("huffman_encode", &huffman_encode, py::arg("arrays"), py::arg("groups"), py::arg("list"),
             py::arg("chunk_symbols"), py::arg("simd") = "auto");
  module.def("huffman_decode", &huffman_decode, py::arg("data"), py::arg("list"), py::arg("max_symbols"),
             py::arg("verify") = true, py::arg("copy") = true, py::arg("simd") = "auto");
  module.def("huffman_decode_rows", &huffman_decode_rows, py::arg("data"), py::arg("start"), py::arg("stop"),
             py::arg("max_symbols"), py::arg("verify") = true, py::arg("copy") = true, py::arg("simd") = "auto");
  module.def("huffman_code_lengths", &huffman_code_lengths, py::arg("counts"), py::arg("max_bits"));
  module.def("pixel_shuffle_gelu_simd", [] { return kLevelNames[static_cast<int>(hflfnerv::pixel_shuffle_gelu_level())]; });
  module.def("pixel_shuffle_gelu_fwd", &pixel_shuffle_gelu_fwd, py::arg("shape"), py::arg("channels_last"),
             py::arg("dtype"), py::arg("activation"), py::arg("x"), py::arg("bias"), py::arg("y"), py::arg("threads"),
             py::arg("simd") = "auto");
  module.def("pixel_shuffle_gelu_bwd", &pixel_shuffle_gelu_bwd, py::arg("shape"), py::arg("channels_last"),
             py::arg("dtype"), py::arg("tanh_form"), py::arg("dy"), py::arg("x"), py::arg("bias"), py::arg("dx"),
             py::arg("dbias"), py::arg("threads"), py::arg("simd") = "auto");
  module.def("amx_unavailable", &hflfnerv::amx_unavailable);
  module.def("conv_pixel_shuffle_gelu_fwd", &conv_pixel_shuffle_gelu_fwd, py::arg("sizes"), py::arg("activation"),
             py::arg("x"), py::arg("weight"), py::arg("bias"), py::arg("y"), py::arg("z"), py::arg("threads"));
  module.def("conv_pixel_shuffle_gelu_dgrad", &conv_pixel_shuffle_gelu_dgrad, py::arg("sizes"), py::arg("dz"),
             py::arg("weight"), py::arg("dx"), py::arg("threads"));
  module.def("conv_pixel_shuffle_gelu_wgrad", &conv_pixel_shuffle_gelu_wgrad, py::arg("sizes"), py::arg("x"), py::arg("dz"),
             py::arg("dweight"), py::arg("threads"));
  module.def("winograd_weight_floats", &winograd_weight_floats, py::arg("sizes"), py::arg("data_gradient"),
             py::arg("simd") = "auto");
  module.def("winograd_weight", &winograd_weight, py::arg("sizes"), py::arg("data_gradient"), py::arg("weight"),
             py::arg("points"), py::arg("threads"), py::arg("simd") = "auto");
  module.def("winograd_fwd", &winograd_fwd, py::arg("sizes"), py::arg("dtype"), py::arg("activation"), py::arg("x"),
             py::arg("points"), py::arg("bias"), py::arg("y"), py::arg("z"), py::arg("threads"), py::arg("simd") = "auto");
  module.def("undo_shuffle_gelu", &undo_shuffle_gelu, py::arg("shape"), py::arg("dtype"), py::arg("tanh_form"),
             py::arg("dy"), py::arg("z"), py::arg("dz"), py::arg("dbias"), py::arg("threads"), py::arg("simd") = "auto");
  module.def("winograd_dgrad", &winograd_dgrad, py::arg("sizes"), py::arg("dtype"), py::arg("dz"), py::arg("points"),
             py::arg("dx"), py::arg("threads"), py::arg("simd") = "auto");
  module.def("winograd_wgrad", &winograd_wgrad, py::arg("sizes"), py::arg("dtype"), py::arg("x"), py::arg("dz"),
             py::arg("dweight"), py::arg("threads"), py::arg("simd") = "auto");
  module.def("conv2d_head_fwd", &conv2d_head_fwd, py::arg("sizes"), py::arg("dtype"), py::arg("x"), py::arg("weight"),
             py::arg("bias"), py::arg("y"), py::arg("threads"), py::arg("simd") = "auto");
  module.def("conv2d_head_bwd", &conv2d_head_bwd, py::arg("sizes"), py::arg("dtype"), py::arg("dy"), py::arg("x"),
             py::arg("weight"), py::arg("dx"), py::arg("dweight"), py::arg("dbias"), py::arg("threads"),
             py::arg("simd") = "auto");
  module.def("depthwise_conv2d_fwd", &depthwise_conv2d_fwd, py::arg("sizes"), py::arg("x"), py::arg("weight"), py::arg("bias"),
             py::arg("y"), py::arg("threads"), py::arg("simd") = "auto");
  module.def("depthwise_conv2d_bwd", &depthwise_conv2d_bwd, py::arg("sizes"), py::arg("dy"), py::arg("x"), py::arg("weight"),
             py::arg("dx"), py::arg("dweight"), py::arg("dbias"), py::arg("threads"), py::arg("simd") = "auto");
  module.def("orthogonalise", &orthogonalise, py::arg("matrices"), py::arg("quintic"), py::arg("steps"), py::arg("threads"),
             py::arg("simd") = "auto");
  module.def("inverted_bottleneck_fwd", &inverted_bottleneck_fwd, py::arg("sizes"), py::arg("dtype"),
             py::arg("parameters"), py::arg("epsilon"), py::arg("u"), py::arg("x"), py::arg("out"), py::arg("threads"));
  module.def("inverted_bottleneck_bwd", &inverted_bottleneck_bwd, py::arg("sizes"), py::arg("parameters"),
             py::arg("epsilon"), py::arg("u"), py::arg("dout"), py::arg("du"), py::arg("gradients"), py::arg("threads"));
  module.def("orthogonalise_bfloat16", &orthogonalise_bfloat16, py::arg("matrices"), py::arg("quintic"), py::arg("steps"),
             py::arg("threads"));
  module.def("stream_loss_fwd", &stream_loss_fwd, py::arg("sizes"), py::arg("dtype"), py::arg("low"), py::arg("high"),
             py::arg("target"), py::arg("loss"), py::arg("threads"), py::arg("simd") = "auto");
  module.def("stream_loss_bwd", &stream_loss_bwd, py::arg("sizes"), py::arg("dtype"), py::arg("low"), py::arg("high"),
             py::arg("target"), py::arg("dloss"), py::arg("threads"), py::arg("simd") = "auto");
#ifdef HFLFNERV_CUDA_ARCHITECTURES
  module.attr("cuda_architectures") = HFLFNERV_CUDA_ARCHITECTURES;
  module.def("cuda_device_unavailable", &hflfnerv::cuda_device_unavailable, py::arg("device"));
  module.def(
      "conv_pixel_shuffle_gelu_cuda_packed_elements",
      [](const CudaShape& sizes, int device) { return conv_pixel_shuffle_gelu_cuda_plan(sizes, device).packed_elements(); },
      py::arg("sizes"), py::arg("device"));
  module.def(
      "conv_pixel_shuffle_gelu_cuda_columns",
      [](const CudaShape& sizes, int device) { return conv_pixel_shuffle_gelu_cuda_plan(sizes, device).columns; },
      py::arg("sizes"), py::arg("device"));
  module.def("conv_pixel_shuffle_gelu_cuda_pack", &conv_pixel_shuffle_gelu_cuda_pack, py::arg("sizes"),
             py::arg("device"), py::arg("weight"), py::arg("strides"), py::arg("packed"), py::arg("stream"));
  module.def("conv_pixel_shuffle_gelu_cuda_fwd", &conv_pixel_shuffle_gelu_cuda_fwd, py::arg("sizes"), py::arg("device"),
             py::arg("dtype"), py::arg("activation"), py::arg("x"), py::arg("packed"), py::arg("bias"), py::arg("y"),
             py::arg("z"), py::arg("stream"));
  module.def("output_stage_cuda_fwd", &output_stage_cuda_fwd, py::arg("size"), py::arg("device"), py::arg("dtype"),
             py::arg("features"), py::arg("scales"), py::arg("offset"), py::arg("biases"), py::arg("y"),
             py::arg("as_bytes"), py::arg("stream"));
  module.def("list_cast", &list_cast, py::arg("tensors"), py::arg("from"), py::arg("to"), py::arg("device"), py::arg("stream"));
  module.def("list_momentum", &list_momentum, py::arg("tensors"), py::arg("mu"), py::arg("device"), py::arg("stream"));
  module.def("list_subtract", &list_subtract, py::arg("tensors"), py::arg("rate"), py::arg("decay"), py::arg("device"),
             py::arg("stream"));
  module.attr("orthogonalise_cuda_matrices") = hflfnerv::kMostMatrices;
  module.def(
      "orthogonalise_cuda_scratch",
      [](const std::vector<CudaMatrix>& matrices) {
        return hflfnerv::orthogonalise_cuda_scratch(orthogonalise_cuda_call(matrices));
      },
      py::arg("matrices"));
  module.def("orthogonalise_cuda", &orthogonalise_cuda, py::arg("matrices"), py::arg("quintic"), py::arg("steps"),
             py::arg("scratch"), py::arg("device"), py::arg("stream"));
  module.def("pixel_shuffle_gelu_cuda_fwd", &pixel_shuffle_gelu_cuda_fwd, py::arg("sizes"), py::arg("device"),
             py::arg("dtype"), py::arg("tanh_form"), py::arg("x"), py::arg("bias"), py::arg("y"), py::arg("stream"));
  module.def("pixel_shuffle_gelu_cuda_sums", &pixel_shuffle_gelu_cuda_sums, py::arg("sizes"), py::arg("device"),
             py::arg("dtype"), py::arg("dy"), py::arg("x"), py::arg("dx"));
  module.def("pixel_shuffle_gelu_cuda_bwd", &pixel_shuffle_gelu_cuda_bwd, py::arg("sizes"), py::arg("device"),
             py::arg("dtype"), py::arg("tanh_form"), py::arg("dy"), py::arg("x"), py::arg("bias"), py::arg("dx"),
             py::arg("sums"), py::arg("dbias"), py::arg("stream"));
  module.def("conv2d_cuda_fwd", &conv2d_cuda_fwd, py::arg("sizes"), py::arg("device"), py::arg("dtype"), py::arg("x"),
             py::arg("weight"), py::arg("weight_strides"), py::arg("bias"), py::arg("y"), py::arg("stream"));
  module.def("conv2d_cuda_partial_floats", &conv2d_cuda_partial_floats, py::arg("sizes"), py::arg("device"));
  module.def("conv2d_cuda_bwd", &conv2d_cuda_bwd, py::arg("sizes"), py::arg("device"), py::arg("dtype"), py::arg("x"),
             py::arg("weight"), py::arg("weight_strides"), py::arg("dy"), py::arg("dy_strides"), py::arg("dx"),
             py::arg("dx_pixel"), py::arg("dweight"), py::arg("dweight_strides"), py::arg("dbias"), py::arg("partial"),
             py::arg("stream"));
#endif
  module.def("output_stage_fwd", &output_stage_fwd, py::arg("sizes"), py::arg("link"), py::arg("features"),
             py::arg("dtype"), py::arg("out"), py::arg("bytes"), py::arg("threads"), py::arg("simd") = "auto");
  module.def("winograd_output_fwd", &winograd_output_fwd, py::arg("size"), py::arg("link"), py::arg("streams"),
             py::arg("out"), py::arg("bytes"), py::arg("threads"), py::arg("simd") = "auto");
#if defined(HFLFNERV_HAVE_AMX)
  py::class_<hflfnerv::FrameDecoder>(module, "FrameDecoder")
      .def(py::init(&frame_decoder), py::arg("size"), py::arg("link"), py::arg("streams"), py::arg("threads"))
      .def("decode", &decode_frame, py::arg("inputs"), py::arg("out"), py::arg("bytes"), py::arg("threads"));
#endif
}
