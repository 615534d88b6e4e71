// Transport between processes on UCX (tag matching over shared memory, TCP, RDMA), host memory.
//
// Life: create() -> address() to everyone -> connect(all addresses) -> send/receive/wait ->
// close(). The last exchange before close() should be a barrier (comm/data/reduce.h), so that no
// rank leaves while another still fetches from it.
//
// Threads: the caller's, and one progress thread that sleeps in epoll_wait until UCX, a dying peer
// or abort() wakes it, so transfers move while the caller computes and an idle rank uses no CPU.
// Steady state allocates nothing here: operations live in a table sized at construction.
//
// Death of a peer: on the same host a pidfd of its process tells at once; across hosts UCX reports
// the broken connection, or its keepalive the silent one. What the dead peer had fully sent can
// still be received; every other operation on it fails with kUnavailable.
#pragma once

#include <chrono>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "comm/base/clock.h"
#include "comm/base/ids.h"
#include "comm/base/status.h"
#include "comm/data/transport.h"

namespace penstock {

struct UcxOptions {
  Rank rank;
  int32_t world_size = 1;                       // at most kUcxWorldSizeMax
  Epoch epoch;                                  // peers of another epoch are refused by connect()
  Duration timeout = std::chrono::minutes(10);  // of one wait(); then kDeadlineExceeded
  // wait() polls this long before it sleeps. Worth more than 0 only where every rank has a core to
  // itself: with 2 to 8 ranks on 2 cores, 20 us made every exchange slower
  // (tests/data/transport_bench.cc).
  Duration spin = std::chrono::microseconds(0);
  Duration connect_timeout = std::chrono::seconds(20);
  uint32_t operations_max = 8192;  // under way at once; more is a failed check
  // As UCX_TLS and UCX_NET_DEVICES, which win when they are set. The default leaves out only
  // cross-memory attach, which containers often forbid.
  std::string tls = "^cma";
  std::string net_devices = "all";
};
inline constexpr int32_t kUcxWorldSizeMax = 4096;

class UcxTransport : public Transport {
 public:
  // Starts UCX and the progress thread; this rank can be connected to from now on. Needs no peer.
  static Result<std::unique_ptr<UcxTransport>> create(const UcxOptions& options);

  // Where this rank listens, for connect() of its peers: printable, opaque, at most a few KiB.
  virtual const std::string& address() const = 0;
  // Connects to every rank of the world. `addresses` is by rank, this rank's own included. Called
  // once, before any send or receive. kInvalidArgument for a malformed address or one of another
  // rank or epoch.
  virtual Status connect(const std::vector<std::string>& addresses) = 0;
  // Lets sends under way leave, then closes every connection. Later operations fail with kAborted.
  // The destructor does the same, without the wait for sends; what a silent peer keeps from ending
  // within two seconds is left to the end of the process.
  virtual Status close() = 0;
};

}  // namespace penstock
