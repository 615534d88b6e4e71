// What a rank tells its peers so that they can connect: who it is, which process it is, and where
// its UCX worker listens. Travels through the control plane as printable text and is checked when
// it is decoded.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

#include "comm/base/file.h"
#include "comm/base/ids.h"
#include "comm/base/status.h"

namespace penstock {

// Names one process for as long as its host is up: process ids are reused, start times tell them
// apart.
struct ProcessIdentity {
  uint64_t host = 0;         // digest of the boot id and the process-id namespace
  int32_t pid = 0;           // in that namespace
  uint64_t start_ticks = 0;  // since boot, from /proc/<pid>/stat
  bool operator==(const ProcessIdentity&) const = default;
};

// The calling process.
Result<ProcessIdentity> own_process_identity();

// A pidfd that becomes readable when the process ends. kUnavailable when it is gone already. An
// invalid descriptor, without an error, when it lives on another host and cannot be watched from
// here.
Result<FileDescriptor> watch_process(const ProcessIdentity& process);

struct UcxAddress {
  Rank rank;
  Epoch epoch;
  ProcessIdentity process;
  std::string worker;  // ucp_worker_get_address(), 1 … kUcxWorkerAddressBytesMax bytes
  bool operator==(const UcxAddress&) const = default;
};
inline constexpr size_t kUcxWorkerAddressBytesMax = 16 << 10;

// Hexadecimal digits. Layout of the bytes, little-endian: u32 magic "PSUX", i32 rank, u32 epoch,
// u64 host, i32 pid, u64 start_ticks, u32 length + worker, u32 CRC-32C of all before.
std::string encode_ucx_address(const UcxAddress& address);
// kInvalidArgument for text that encode_ucx_address() did not write.
Result<UcxAddress> decode_ucx_address(std::string_view text);

}  // namespace penstock
