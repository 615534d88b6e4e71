#include "checkpoint/slice_digest.h"

#include <algorithm>
#include <array>

#include "comm/base/check.h"
#include "comm/base/random.h"

namespace penstock {
namespace {

// Part of the file format, as are the streams below.
constexpr uint64_t kKeySeed = 0x6b636f74736e6570;  // "penstock"
constexpr uint64_t kUnitKeys = 0;
constexpr uint64_t kBlockKeys = 1;
constexpr uint64_t kBlockUnits = 1024;

struct UnitKeys {
  std::array<uint32_t, kBlockUnits> low;
  std::array<uint32_t, kBlockUnits> high;
};

const UnitKeys& unit_keys() {
  static const UnitKeys keys = [] {
    UnitKeys made;
    for (uint64_t i = 0; i < kBlockUnits; ++i) {
      const auto words = philox(kKeySeed, kUnitKeys, i);
      made.low[i] = words[0];
      made.high[i] = words[1];
    }
    return made;
  }();
  return keys;
}

// Sums of key times value; one multiplication of 32 by 32 bits a word and unit, so that compilers
// vectorize it.
template <typename Unit>
Digest weighted_sum(const uint32_t* low_keys, const uint32_t* high_keys, const std::byte* values,
                    uint64_t count) {
  Digest sum;
  for (uint64_t i = 0; i < count; ++i) {
    Unit unit;
    std::memcpy(&unit, values + i * sizeof(Unit), sizeof(Unit));
    sum.low += uint64_t{low_keys[i]} * uint32_t{unit};
    sum.high += uint64_t{high_keys[i]} * uint32_t{unit};
  }
  return sum;
}

}  // namespace

Digest add_digests(const Digest& a, const Digest& b) {
  return {.low = a.low + b.low, .high = a.high + b.high};
}

SliceDigestStream::SliceDigestStream(const TensorSlice& slice) {
  const uint64_t element_bytes = dtype_bytes(slice.dtype);
  unit_bytes_ = std::min<uint64_t>(element_bytes, 4);
  const auto units_per_element = static_cast<int64_t>(element_bytes / unit_bytes_);
  if (element_count(slice.box) == 0) return;
  const std::vector<int64_t> strides = dense_strides(slice.shape);
  // A run spans the last dimensions that the box covers whole, and the one before them.
  size_t outer = slice.shape.size();
  int64_t run_elements = 1;
  while (outer > 0) {
    --outer;
    run_elements *= slice.box.size[outer];
    if (slice.box.size[outer] != slice.shape[outer]) break;
  }
  run_units_ = static_cast<uint64_t>(run_elements * units_per_element);
  for (size_t d = 0; d < slice.shape.size(); ++d) {
    first_position_ += static_cast<uint64_t>(slice.box.offset[d] * strides[d] * units_per_element);
    if (d >= outer) continue;
    strides_.push_back(strides[d] * units_per_element);
    size_.push_back(slice.box.size[d]);
  }
  index_.resize(size_.size(), 0);
  position_ = first_position_;
  run_left_ = run_units_;
}

void SliceDigestStream::begin_run() {
  for (size_t d = index_.size(); d-- > 0;) {
    if (++index_[d] < size_[d]) break;
    index_[d] = 0;
  }
  position_ = first_position_;
  for (size_t d = 0; d < index_.size(); ++d) {
    position_ += static_cast<uint64_t>(index_[d] * strides_[d]);
  }
  run_left_ = run_units_;
}

void SliceDigestStream::update(Bytes bytes) {
  PENSTOCK_CHECK(bytes.size() % unit_bytes_ == 0, bytes.size(), unit_bytes_);
  const std::byte* values = bytes.data();
  for (uint64_t units = bytes.size() / unit_bytes_; units > 0;) {
    if (run_left_ == 0) begin_run();
    const uint64_t count = std::min({units, run_left_, kBlockUnits - position_ % kBlockUnits});
    add(position_, values, count);
    values += count * unit_bytes_;
    position_ += count;
    run_left_ -= count;
    units -= count;
  }
}

// Units of one block.
void SliceDigestStream::add(uint64_t position, const std::byte* values, uint64_t count) {
  const uint64_t block = position / kBlockUnits;
  if (block != factors_block_) {
    const auto words = philox(kKeySeed, kBlockKeys, block);
    factors_[0] = (uint64_t{words[1]} << 32 | words[0]) | 1;
    factors_[1] = (uint64_t{words[3]} << 32 | words[2]) | 1;
    factors_block_ = block;
  }
  const uint32_t* low_keys = unit_keys().low.data() + position % kBlockUnits;
  const uint32_t* high_keys = unit_keys().high.data() + position % kBlockUnits;
  Digest sum;
  if (unit_bytes_ == 4) {
    sum = weighted_sum<uint32_t>(low_keys, high_keys, values, count);
  } else if (unit_bytes_ == 2) {
    sum = weighted_sum<uint16_t>(low_keys, high_keys, values, count);
  } else {
    sum = weighted_sum<uint8_t>(low_keys, high_keys, values, count);
  }
  digest_.low += factors_[0] * sum.low;
  digest_.high += factors_[1] * sum.high;
}

Digest slice_digest(const TensorSlice& slice, Bytes bytes) {
  SliceDigestStream stream(slice);
  stream.update(bytes);
  return stream.finish();
}

}  // namespace penstock
