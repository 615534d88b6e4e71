#include "checkpoint/compare.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <map>

#include "checkpoint/float_formats.h"
#include "checkpoint/slice_digest.h"
#include "checkpoint/tiling.h"
#include "checkpoint/verify.h"

namespace penstock {
namespace {

using Kind = TensorDifference::Kind;

constexpr uint64_t kChunkBytes = 16 << 20;

// Visits boxes that tile the tensor, of at most kChunkBytes where rows are no larger.
Status for_each_chunk(const ManifestTensor& tensor,
                      const std::function<Status(const Box&)>& visit) {
  const auto element_bytes = static_cast<int64_t>(dtype_bytes(tensor.dtype));
  Box box{std::vector<int64_t>(tensor.shape.size(), 0), tensor.shape};
  if (element_count(box) == 0) return {};
  // The first dimension of which several rows fit into a chunk; those before are taken one by one.
  size_t rows = 0;
  const auto row_bytes = [&] {
    return element_count(std::span(tensor.shape).subspan(rows + 1)) * element_bytes;
  };
  while (rows + 1 < tensor.shape.size() && row_bytes() > static_cast<int64_t>(kChunkBytes)) {
    box.size[rows++] = 1;
  }
  if (tensor.shape.empty()) return visit(box);
  const int64_t step = std::max<int64_t>(1, static_cast<int64_t>(kChunkBytes) / row_bytes());
  for (;;) {
    box.size[rows] = std::min(step, tensor.shape[rows] - box.offset[rows]);
    PENSTOCK_TRY(visit(box));
    size_t d = rows;
    while ((box.offset[d] += box.size[d]) == tensor.shape[d]) {
      box.offset[d] = 0;
      if (d == 0) return {};
      --d;
    }
  }
}

// Boxes of one checkpoint's tensors, one after the other: a segment is opened, and its footer
// checked, once for all of them.
class BoxReader {
 public:
  explicit BoxReader(const CheckpointFiles& files) : files_(files) {}

  const Manifest& manifest() const { return files_.manifest; }

  Result<std::vector<std::byte>> read(const ManifestTensor& tensor, const Box& box) {
    std::vector<std::byte> bytes(byte_count({tensor.name, tensor.dtype, tensor.shape, box}));
    std::vector<Box> regions;
    for (const ManifestPiece& piece : tensor.pieces) {
      const std::optional<Box> region = intersect(box, piece.box);
      if (!region) continue;
      regions.push_back(*region);
      PENSTOCK_TRY_ASSIGN(const SegmentReader* segment, open(piece.segment));
      PENSTOCK_TRY_ASSIGN(const size_t index, segment->find(tensor.name, piece.box));
      const SegmentSlice& saved = segment->slices()[index];
      if (saved.slice.dtype != tensor.dtype || saved.slice.shape != tensor.shape ||
          saved.digest != piece.digest) {
        return data_loss(fmt::format("segment {}: tensor {} {} is not what the manifest says",
                                     segment->path().string(), tensor.name, to_string(piece.box)));
      }
      PENSTOCK_TRY(segment->read_box(index, *region, box, bytes));
    }
    PENSTOCK_TRY(prove_tiling(box, regions).with_context("tensor " + tensor.name));
    return bytes;
  }

 private:
  Result<const SegmentReader*> open(size_t index) {
    if (const auto at = open_.find(index); at != open_.end()) return &at->second;
    if (open_.size() == kOpenMax) open_.clear();
    PENSTOCK_TRY_ASSIGN(SegmentReader reader, open_listed(files_.directory, files_.manifest,
                                                          files_.manifest.segments[index]));
    return &open_.emplace(index, std::move(reader)).first->second;
  }

  static constexpr size_t kOpenMax = 256;  // of the files that a process may have open
  const CheckpointFiles files_;
  std::map<size_t, SegmentReader> open_;  // by position in the manifest
};

Result<Digest> tensor_digest(BoxReader& reader, const ManifestTensor& tensor) {
  if (reader.manifest().has_tensor_digests()) return tensor.digest();
  Digest sum;
  PENSTOCK_TRY(for_each_chunk(tensor, [&](const Box& box) -> Status {
    PENSTOCK_TRY_ASSIGN(const std::vector<std::byte> bytes, reader.read(tensor, box));
    sum = add_digests(sum, slice_digest({tensor.name, tensor.dtype, tensor.shape, box}, bytes));
    return {};
  }));
  return sum;
}

template <typename T>
void widen(Bytes bytes, std::vector<double>& values) {
  for (size_t i = 0; i < values.size(); ++i) {
    T value;
    std::memcpy(&value, bytes.data() + i * sizeof(T), sizeof(T));
    values[i] = static_cast<double>(value);
  }
}

// Empty: the type has no numbers that we know.
std::vector<double> numbers_of(DType dtype, Bytes bytes) {
  std::vector<double> values(bytes.size() / dtype_bytes(dtype));
  if (converts_to_float(dtype)) {
    std::vector<float> floats(values.size());
    to_floats(dtype, bytes, floats);
    std::copy(floats.begin(), floats.end(), values.begin());
    return values;
  }
  switch (dtype) {
    case DType::kF64:
      widen<double>(bytes, values);
      return values;
    case DType::kI64:
      widen<int64_t>(bytes, values);
      return values;
    case DType::kI32:
      widen<int32_t>(bytes, values);
      return values;
    case DType::kI16:
      widen<int16_t>(bytes, values);
      return values;
    case DType::kI8:
      widen<int8_t>(bytes, values);
      return values;
    case DType::kU64:
      widen<uint64_t>(bytes, values);
      return values;
    case DType::kU32:
      widen<uint32_t>(bytes, values);
      return values;
    case DType::kU16:
      widen<uint16_t>(bytes, values);
      return values;
    case DType::kU8:
    case DType::kBool:
      widen<uint8_t>(bytes, values);
      return values;
    default:
      return {};
  }
}

void compare_values(DType dtype, Bytes a, Bytes b, TensorDifference& difference) {
  const uint64_t element_bytes = dtype_bytes(dtype);
  const std::vector<double> numbers_a = numbers_of(dtype, a);
  const std::vector<double> numbers_b = numbers_of(dtype, b);
  for (size_t i = 0; i * element_bytes < a.size(); ++i) {
    const uint64_t at = i * element_bytes;
    if (std::memcmp(a.data() + at, b.data() + at, element_bytes) == 0) continue;
    ++difference.element_count;
    if (numbers_a.empty()) continue;
    double distance = std::abs(numbers_a[i] - numbers_b[i]);
    if (std::isnan(distance)) distance = std::numeric_limits<double>::infinity();
    difference.max_abs = std::max(difference.max_abs.value_or(0.0), distance);
  }
}

// Adds how one tensor of both checkpoints differs, if it does.
Status compare_tensor(BoxReader& a, const ManifestTensor& tensor_a, BoxReader& b,
                      const ManifestTensor& tensor_b, bool read_values, Comparison& comparison) {
  if (tensor_a.dtype != tensor_b.dtype || tensor_a.shape != tensor_b.shape) {
    comparison.differences.push_back({.name = tensor_a.name, .kind = Kind::kShape});
    return {};
  }
  PENSTOCK_TRY_ASSIGN(const Digest digest_a, tensor_digest(a, tensor_a));
  PENSTOCK_TRY_ASSIGN(const Digest digest_b, tensor_digest(b, tensor_b));
  if (digest_a == digest_b) {
    ++comparison.equal_count;
    return {};
  }
  TensorDifference difference{.name = tensor_a.name, .kind = Kind::kValues};
  const auto compare_box = [&](const Box& box) -> Status {
    PENSTOCK_TRY_ASSIGN(const std::vector<std::byte> bytes_a, a.read(tensor_a, box));
    PENSTOCK_TRY_ASSIGN(const std::vector<std::byte> bytes_b, b.read(tensor_b, box));
    compare_values(tensor_a.dtype, bytes_a, bytes_b, difference);
    return {};
  };
  if (read_values) PENSTOCK_TRY(for_each_chunk(tensor_a, compare_box));
  comparison.differences.push_back(std::move(difference));
  return {};
}

}  // namespace

Result<Comparison> compare_checkpoints(const CheckpointFiles& a, const CheckpointFiles& b,
                                       bool read_values) {
  Comparison comparison;
  BoxReader reader_a(a);
  BoxReader reader_b(b);
  auto at_a = a.manifest.tensors.begin();  // both ascend by name
  auto at_b = b.manifest.tensors.begin();
  while (at_a != a.manifest.tensors.end() || at_b != b.manifest.tensors.end()) {
    if (at_b == b.manifest.tensors.end() ||
        (at_a != a.manifest.tensors.end() && at_a->name < at_b->name)) {
      comparison.differences.push_back({.name = at_a->name, .kind = Kind::kOnlyInA});
      ++at_a;
    } else if (at_a == a.manifest.tensors.end() || at_b->name < at_a->name) {
      comparison.differences.push_back({.name = at_b->name, .kind = Kind::kOnlyInB});
      ++at_b;
    } else {
      PENSTOCK_TRY(compare_tensor(reader_a, *at_a, reader_b, *at_b, read_values, comparison));
      ++at_a;
      ++at_b;
    }
  }
  return comparison;
}

}  // namespace penstock
