#include "checkpoint/slice.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <array>

namespace penstock {
namespace {

struct DTypeRow {
  DType dtype;
  std::string_view name;
  uint64_t bytes;
};

constexpr std::array<DTypeRow, 15> kDTypes = {{
    {DType::kF32, "f32", 4},
    {DType::kF64, "f64", 8},
    {DType::kF16, "f16", 2},
    {DType::kBf16, "bf16", 2},
    {DType::kF8E4m3, "f8_e4m3", 1},
    {DType::kF8E5m2, "f8_e5m2", 1},
    {DType::kI64, "i64", 8},
    {DType::kI32, "i32", 4},
    {DType::kI16, "i16", 2},
    {DType::kI8, "i8", 1},
    {DType::kU64, "u64", 8},
    {DType::kU32, "u32", 4},
    {DType::kU16, "u16", 2},
    {DType::kU8, "u8", 1},
    {DType::kBool, "bool", 1},
}};

const DTypeRow& row_of(DType dtype) {
  const auto number = static_cast<size_t>(dtype);
  PENSTOCK_CHECK(number >= 1 && number <= kDTypes.size(), number);
  return kDTypes[number - 1];
}

// A file's name for a tensor may be anything: print at most a line of it.
std::string_view printable(std::string_view name) {
  return name.substr(0, 200);
}

Status check_shape(const TensorSlice& slice) {
  uint64_t elements = 1;
  bool empty = false;
  for (const int64_t size : slice.shape) {
    if (size < 0) return invalid_argument("its shape has a negative size");
    if (size == 0) empty = true;
    // A zero elsewhere must not hide a product beyond 64 bits.
    const auto factor = static_cast<uint64_t>(std::max<int64_t>(size, 1));
    if (__builtin_mul_overflow(elements, factor, &elements)) {
      return invalid_argument("its shape overflows 64 bits");
    }
  }
  uint64_t bytes = 0;
  if (__builtin_mul_overflow(elements, dtype_bytes(slice.dtype), &bytes) ||
      bytes > kTensorBytesMax) {
    return invalid_argument(fmt::format("it is larger than {} bytes{}", kTensorBytesMax,
                                        empty ? ", its empty dimension aside" : ""));
  }
  return {};
}

Status check_box(const TensorSlice& slice) {
  const size_t dimensions = slice.shape.size();
  if (slice.box.offset.size() != dimensions || slice.box.size.size() != dimensions) {
    return invalid_argument(
        fmt::format("its box has not the {} dimensions of its shape", dimensions));
  }
  for (size_t d = 0; d < dimensions; ++d) {
    const int64_t offset = slice.box.offset[d];
    const int64_t size = slice.box.size[d];
    if (offset < 0 || size < 0 || offset > slice.shape[d] || size > slice.shape[d] - offset) {
      return invalid_argument(
          fmt::format("its box leaves the shape in dimension {}: offset {}, "
                      "size {}, but the tensor has {}",
                      d, offset, size, slice.shape[d]));
    }
  }
  return {};
}

}  // namespace

std::string_view dtype_name(DType dtype) {
  return row_of(dtype).name;
}

uint64_t dtype_bytes(DType dtype) {
  return row_of(dtype).bytes;
}

Result<DType> parse_dtype(std::string_view name) {
  for (const DTypeRow& row : kDTypes) {
    if (row.name == name) return row.dtype;
  }
  return invalid_argument(fmt::format("no element type is called \"{}\"", printable(name)));
}

Result<DType> dtype_from_number(uint8_t number) {
  if (number < 1 || number > kDTypes.size()) {
    return data_loss(fmt::format("no element type has number {}", number));
  }
  return kDTypes[number - 1].dtype;
}

TensorSlice whole_tensor(std::string name, DType dtype, std::vector<int64_t> shape) {
  TensorSlice slice{.name = std::move(name), .dtype = dtype, .shape = std::move(shape), .box = {}};
  slice.box = {std::vector<int64_t>(slice.shape.size(), 0), slice.shape};
  return slice;
}

Status check_slice(const TensorSlice& slice) {
  const bool plain = std::all_of(slice.name.begin(), slice.name.end(),
                                 [](char c) { return c >= ' ' && c <= '~'; });
  if (slice.name.empty() || slice.name.size() > kTensorNameBytesMax || !plain) {
    return invalid_argument(fmt::format("a tensor name must be 1 to {} printable ASCII characters",
                                        kTensorNameBytesMax));
  }
  const std::string context = "tensor " + slice.name;
  if (slice.shape.size() > kTensorDimensionsMax) {
    return invalid_argument(fmt::format("{}: {} dimensions, at most {} are possible", context,
                                        slice.shape.size(), kTensorDimensionsMax));
  }
  if (const Status shape = check_shape(slice); !shape.ok()) return shape.with_context(context);
  return check_box(slice).with_context(context);
}

int64_t element_count(std::span<const int64_t> size) {
  int64_t count = 1;
  for (const int64_t extent : size) count *= extent;
  return count;
}

uint64_t byte_count(const TensorSlice& slice) {
  return static_cast<uint64_t>(element_count(slice.box)) * dtype_bytes(slice.dtype);
}

std::optional<Box> intersect(const Box& a, const Box& b) {
  PENSTOCK_CHECK(a.offset.size() == b.offset.size(), a.offset.size(), b.offset.size());
  Box common;
  common.offset.reserve(a.offset.size());
  common.size.reserve(a.offset.size());
  for (size_t d = 0; d < a.offset.size(); ++d) {
    const int64_t begin = std::max(a.offset[d], b.offset[d]);
    const int64_t end = std::min(a.offset[d] + a.size[d], b.offset[d] + b.size[d]);
    if (begin >= end) return std::nullopt;
    common.offset.push_back(begin);
    common.size.push_back(end - begin);
  }
  return common;
}

bool contains(const Box& outer, const Box& inner) {
  if (outer.offset.size() != inner.offset.size()) return false;
  for (size_t d = 0; d < outer.offset.size(); ++d) {
    if (inner.offset[d] < outer.offset[d] ||
        inner.offset[d] + inner.size[d] > outer.offset[d] + outer.size[d]) {
      return false;
    }
  }
  return true;
}

std::string to_string(const Box& box) {
  std::vector<std::string> ranges;
  for (size_t d = 0; d < box.offset.size(); ++d) {
    ranges.push_back(fmt::format("{}:{}", box.offset[d], box.offset[d] + box.size[d]));
  }
  return fmt::format("[{}]", fmt::join(ranges, ", "));
}

std::vector<int64_t> dense_strides(std::span<const int64_t> size) {
  std::vector<int64_t> strides(size.size());
  int64_t stride = 1;
  for (size_t d = size.size(); d-- > 0;) {
    strides[d] = stride;
    stride *= size[d];
  }
  return strides;
}

void for_each_run(const Box& region, const Box& source_box, const Box& destination_box,
                  std::span<const int64_t> destination_strides,
                  const std::function<void(const Run&)>& visit) {
  PENSTOCK_CHECK(contains(source_box, region) && contains(destination_box, region));
  PENSTOCK_CHECK(destination_strides.size() == region.size.size());
  if (element_count(region) == 0) return;
  const std::vector<int64_t> source_strides = dense_strides(source_box.size);

  // Inner dimensions that are contiguous on both sides become one run.
  size_t outer = region.size.size();
  Run run{.count = 1};
  while (outer > 0 &&
         (region.size[outer - 1] == 1 || (source_strides[outer - 1] == run.count &&
                                          destination_strides[outer - 1] == run.count))) {
    run.count *= region.size[outer - 1];
    --outer;
  }
  for (size_t d = 0; d < region.size.size(); ++d) {
    run.source += (region.offset[d] - source_box.offset[d]) * source_strides[d];
    run.destination += (region.offset[d] - destination_box.offset[d]) * destination_strides[d];
  }
  // The outer dimensions are counted like an odometer.
  std::vector<int64_t> index(outer, 0);
  while (true) {
    visit(run);
    size_t d = outer;
    while (d > 0) {
      --d;
      run.source += source_strides[d];
      run.destination += destination_strides[d];
      if (++index[d] < region.size[d]) break;
      run.source -= region.size[d] * source_strides[d];
      run.destination -= region.size[d] * destination_strides[d];
      index[d] = 0;
      if (d == 0) return;
    }
    if (outer == 0) return;
  }
}

}  // namespace penstock
