// The two things of PyTorch's that a distributed checkpoint (torch.distributed.checkpoint) is made
// of, written without PyTorch: torch.save's older container of one tensor, which torch.load reads
// with weights_only=True in every version, and the pickle called .metadata. Only writing: no pickle
// is ever read here.
#pragma once

#include <string>
#include <vector>

#include "checkpoint/slice.h"

namespace penstock {

// What stands before a tensor's bytes in a file that torch.load() reads; nothing follows them.
// 8-bit floats and unsigned integers above 8 bits need a PyTorch that has these types.
std::string torch_save_header(DType dtype, const std::vector<int64_t>& shape);

// One tensor in a .distcp file.
struct DcpEntry {
  std::string name;
  DType dtype = DType::kF32;
  std::vector<int64_t> shape;
  std::string file;
  uint64_t offset = 0;  // of its torch_save_header()
  uint64_t length = 0;  // with it
};

// The .metadata file: pickled torch.distributed.checkpoint.metadata.Metadata (version 1.0.0) of
// whole tensors.
std::string dcp_metadata(const std::vector<DcpEntry>& entries);

}  // namespace penstock
