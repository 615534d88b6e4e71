// A small network of given rate and delay on one machine: every member has a network namespace of
// its own, whose only way out is a link to one switch.
//
// The links are TUN devices and the switch is a process of ours, because not every kernel has the
// traffic shapers that could do this (netem): it takes IP packets from each member and hands them
// on when a real link would have delivered them. A member's link carries `bytes_per_second` each
// way, both at once; a packet leaves when the ones before it on the sender's link have left,
// travels for `delay`, and arrives when the ones before it on the receiver's link have arrived.
// Order is kept, and nothing is lost but the share of packets that is asked for, and what is for or
// from a member that is cut off.
//
// Namespaces and devices are anonymous and vanish with the last process that uses them.
#pragma once

#include <sys/types.h>

#include <atomic>
#include <cstdint>
#include <memory>
#include <vector>

#include "comm/base/clock.h"
#include "comm/base/file.h"
#include "comm/base/status.h"

namespace penstock {

struct ShapedNetworkOptions {
  int32_t member_count = 2;  // at most 250
  double bytes_per_second = 0.0;
  Duration delay = Duration(0);  // one way
  double loss = 0.0;             // share of packets that never arrive, each by itself
  uint64_t seed = 1;             // which ones
};

class ShapedNetwork {
 public:
  // Needs root, or at least the right to make network namespaces and TUN devices:
  // kFailedPrecondition says which is missing. Called while the process has one thread: it forks
  // the switch, which ends with this object or with this process.
  static Result<std::unique_ptr<ShapedNetwork>> create(const ShapedNetworkOptions& options);
  ~ShapedNetwork();
  ShapedNetwork(const ShapedNetwork&) = delete;
  ShapedNetwork& operator=(const ShapedNetwork&) = delete;

  // Moves the calling process, which has one thread, into a member's namespace, with a /sys of its
  // own to match.
  Status enter(int32_t member) const;
  // From now on nothing arrives there or comes from there, and nobody is told; or everything again.
  void set_cut_off(int32_t member, bool cut_off);
  // The name of the link in every namespace, for UCX_NET_DEVICES.
  static constexpr const char* kDevice = "link0";

 private:
  // Shared with the switch: whether each member is cut off.
  using CutOff = std::atomic<bool>;

  ShapedNetwork() = default;
  std::vector<FileDescriptor> namespaces_;
  CutOff* cut_off_ = nullptr;
  pid_t switch_ = -1;
};

}  // namespace penstock
