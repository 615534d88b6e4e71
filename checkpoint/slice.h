// Slices: a box of one logical tensor. The unit of saving and loading; ranks never appear in names,
// so any layout can be loaded into any other.
//
//   tensor "w", shape [6, 4]          box {offset [2, 0], size [2, 4]}: rows 2 and 3, all columns
//
// A slice's bytes are dense, row-major, little-endian elements of its box. 0-d tensors (one
// element) and tensors with a zero dimension (none) are legal.
#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "comm/base/bytes.h"
#include "comm/base/status.h"

namespace penstock {

// Numbers are part of the file format: never renumber.
enum class DType : uint8_t {
  kF32 = 1,
  kF64 = 2,
  kF16 = 3,
  kBf16 = 4,
  kF8E4m3 = 5,
  kF8E5m2 = 6,
  kI64 = 7,
  kI32 = 8,
  kI16 = 9,
  kI8 = 10,
  kU64 = 11,
  kU32 = 12,
  kU16 = 13,
  kU8 = 14,
  kBool = 15,
};

// "f32", "bf16", "f8_e4m3", …: the names in manifests and messages.
std::string_view dtype_name(DType dtype);
Result<DType> parse_dtype(std::string_view name);
// From a file's byte; kDataLoss when no such number exists.
Result<DType> dtype_from_number(uint8_t number);
uint64_t dtype_bytes(DType dtype);

inline constexpr size_t kTensorDimensionsMax = 8;
inline constexpr size_t kTensorNameBytesMax = 1024;
// No tensor is larger; keeps every product below in 64 bits.
inline constexpr uint64_t kTensorBytesMax = uint64_t{1} << 60;

// [offset, offset + size) per dimension.
struct Box {
  std::vector<int64_t> offset;
  std::vector<int64_t> size;
  bool operator==(const Box&) const = default;
};

struct TensorSlice {
  std::string name;  // logical, see names.h
  DType dtype = DType::kF32;
  std::vector<int64_t> shape;  // of the whole tensor
  Box box;                     // the part that is meant
  bool operator==(const TensorSlice&) const = default;
};

// The whole tensor as one slice.
TensorSlice whole_tensor(std::string name, DType dtype, std::vector<int64_t> shape);

// kInvalidArgument naming the tensor unless the name is 1…1024 bytes of printable ASCII, dimensions
// agree and are at most 8, sizes are not negative, the box lies in the shape, and the tensor is at
// most kTensorBytesMax. Everything below REQUIRES slices and boxes that passed it.
Status check_slice(const TensorSlice& slice);

int64_t element_count(std::span<const int64_t> size);
inline int64_t element_count(const Box& box) {
  return element_count(box.size);
}
uint64_t byte_count(const TensorSlice& slice);

// The common box, or nothing when they share no element.
std::optional<Box> intersect(const Box& a, const Box& b);
bool contains(const Box& outer, const Box& inner);

// "[2:4, 0:4]"; "[]" for a 0-d tensor.
std::string to_string(const Box& box);

// Row-major strides, in elements, of a dense buffer of `size`.
std::vector<int64_t> dense_strides(std::span<const int64_t> size);

// One contiguous copy: `count` elements from element `source` to element `destination`.
struct Run {
  int64_t source = 0;
  int64_t destination = 0;
  int64_t count = 0;
};

// Calls visit for each longest contiguous run that copies `region` from a dense buffer of
// source_box into a buffer whose element 0 is destination_box.offset and whose strides are given,
// in ascending source order. REQUIRES: both boxes contain region; destination_strides has one entry
// per dimension.
void for_each_run(const Box& region, const Box& source_box, const Box& destination_box,
                  std::span<const int64_t> destination_strides,
                  const std::function<void(const Run&)>& visit);

}  // namespace penstock
