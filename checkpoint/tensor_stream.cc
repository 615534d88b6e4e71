#include "checkpoint/tensor_stream.h"

#include <algorithm>

#include "checkpoint/loader.h"

namespace penstock {
namespace {

// Held at a time: enough that segments are opened rarely.
constexpr uint64_t kBatchBytes = 256 << 20;

}  // namespace

Status TensorStream::add(const ManifestTensor& tensor) {
  const TensorSlice whole = whole_tensor(tensor.name, tensor.dtype, tensor.shape);
  const int64_t rows = tensor.shape.empty() ? 1 : tensor.shape[0];
  const uint64_t row_bytes = std::max<uint64_t>(1, rows > 0 ? byte_count(whole) / rows : 0);
  const auto step = static_cast<int64_t>(std::max<uint64_t>(1, kBatchBytes / row_bytes));
  const size_t index = added_++;
  for (int64_t row = 0; row < rows || row == 0; row += step) {
    Part part{whole, index, row + step >= rows};
    if (!tensor.shape.empty()) {
      part.slice.box.offset[0] = row;
      part.slice.box.size[0] = std::min(step, rows - row);
    }
    const uint64_t bytes = byte_count(part.slice);
    if (pending_bytes_ + bytes > kBatchBytes) PENSTOCK_TRY(flush());
    pending_bytes_ += bytes;
    parts_.push_back(std::move(part));
  }
  return {};
}

Status TensorStream::flush() {
  loaded_.resize(pending_bytes_);
  std::vector<LoadTarget> targets;
  size_t at = 0;
  for (const Part& part : parts_) {
    const size_t bytes = byte_count(part.slice);
    targets.push_back({part.slice, MutableBytes(loaded_).subspan(at, bytes), {}});
    at += bytes;
  }
  PENSTOCK_TRY(load_slices(files_.directory, files_.manifest, targets).status());
  for (size_t i = 0; i < parts_.size(); ++i) {
    PENSTOCK_TRY(sink_(parts_[i].index, targets[i].bytes, parts_[i].last));
  }
  parts_.clear();
  pending_bytes_ = 0;
  return {};
}

}  // namespace penstock
