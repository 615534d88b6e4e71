// Whole tensors of a checkpoint, one after the other, in pieces: whatever layout saved them, and
// with a fixed amount of memory.
#pragma once

#include <functional>
#include <vector>

#include "checkpoint/compare.h"
#include "checkpoint/manifest.h"
#include "checkpoint/slice.h"

namespace penstock {

// Not thread-safe. Borrows the checkpoint.
class TensorStream {
 public:
  // The next bytes of the tensor that was added as number `index`: its rows in order, dense, all
  // but the `last` of them in pieces of about 256 MiB at most (or one row). A tensor without
  // elements has one piece, which is empty. An error ends the stream.
  using Sink = std::function<Status(size_t index, Bytes bytes, bool last)>;

  TensorStream(const CheckpointFiles& files, Sink sink) : files_(files), sink_(std::move(sink)) {}

  // Tensors come out in the order in which they are added, the last ones only with flush(): what is
  // read at once shares the opening of segments. Errors as load_slices().
  Status add(const ManifestTensor& tensor);
  Status flush();

 private:
  struct Part {  // some rows of a tensor
    TensorSlice slice;
    size_t index = 0;
    bool last = false;
  };

  const CheckpointFiles files_;
  const Sink sink_;
  size_t added_ = 0;
  std::vector<Part> parts_;
  uint64_t pending_bytes_ = 0;
  std::vector<std::byte> loaded_;
};

}  // namespace penstock
