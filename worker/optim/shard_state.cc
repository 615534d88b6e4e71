#include "worker/optim/shard_state.h"

#include <algorithm>

namespace penstock {
namespace {

// Appends the boxes of [begin, end) inside the sub-tensor that fixes the first `level` dimensions
// at `prefix`. `inner` is the number of elements below one index of dimension `level`.
void append_boxes(std::span<const int64_t> shape, size_t level, std::vector<int64_t>& prefix,
                  int64_t begin, int64_t end, std::vector<Box>& boxes) {
  if (begin >= end) return;
  int64_t inner = 1;
  for (size_t d = level + 1; d < shape.size(); ++d) inner *= shape[d];
  const auto add = [&](int64_t first, int64_t count) {
    Box box;
    box.offset = prefix;
    box.size.assign(level, 1);
    box.offset.push_back(first);
    box.size.push_back(count);
    for (size_t d = level + 1; d < shape.size(); ++d) {
      box.offset.push_back(0);
      box.size.push_back(shape[d]);
    }
    boxes.push_back(std::move(box));
  };
  const auto descend = [&](int64_t row, int64_t row_begin, int64_t row_end) {
    prefix.push_back(row);
    append_boxes(shape, level + 1, prefix, row_begin, row_end, boxes);
    prefix.pop_back();
  };
  const int64_t first = begin / inner;
  const int64_t last = end / inner;
  if (begin % inner != 0 && first == last) {
    descend(first, begin % inner, end % inner);
    return;
  }
  const int64_t whole = (begin + inner - 1) / inner;
  if (begin % inner != 0) descend(first, begin % inner, inner);
  if (last > whole) add(whole, last - whole);
  if (end % inner != 0) descend(last, 0, end % inner);
}

}  // namespace

std::vector<Box> boxes_of_range(std::span<const int64_t> shape, int64_t begin, int64_t end) {
  PENSTOCK_CHECK(0 <= begin && begin <= end && end <= element_count(shape), begin, end);
  std::vector<Box> boxes;
  std::vector<int64_t> prefix;
  append_boxes(shape, 0, prefix, begin, end, boxes);
  return boxes;
}

std::vector<ShardPiece> pieces_of(const OptimizerShard& shard) {
  PENSTOCK_CHECK(
      shard.owned.begin >= 0 && shard.owned.end <= std::ssize(shard.parameters->values(shard.kind)),
      shard.owned.begin, shard.owned.end);
  std::vector<ShardPiece> pieces;
  for (const Parameter& parameter : shard.parameters->all()) {
    if (parameter.kind != shard.kind) continue;
    const int64_t begin = std::max(shard.owned.begin, parameter.offset);
    const int64_t end = std::min(shard.owned.end, parameter.offset + parameter.size);
    if (begin >= end) continue;
    pieces.push_back(
        {&parameter, begin - parameter.offset, end - parameter.offset, begin - shard.owned.begin});
  }
  return pieces;
}

void append_state(const ShardPiece& piece, const std::string& name, DType dtype, void* first,
                  std::vector<StateSlice>& slices) {
  const std::vector<int64_t>& shape = piece.parameter->shape;
  auto* next = static_cast<std::byte*>(first);
  for (const Box& box : boxes_of_range(shape, piece.begin, piece.end)) {
    const uint64_t bytes = static_cast<uint64_t>(element_count(box)) * dtype_bytes(dtype);
    slices.push_back({{name, dtype, shape, box}, {next, bytes}});
    next += bytes;
  }
}

}  // namespace penstock
