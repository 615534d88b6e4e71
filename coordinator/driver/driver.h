// Acts on what the core decides: one loop, one store, one control socket, one HTTP server. The only
// place where the coordinator reads a clock.
#pragma once

#include <memory>
#include <string>

#include "comm/base/clock.h"
#include "comm/base/exit_codes.h"
#include "comm/base/file.h"

namespace penstock {

inline constexpr int64_t kLeaseMsMin = 3000;

struct DriverOptions {
  Path state_dir;
  std::string bind = "127.0.0.1";  // IPv4 or IPv6 address
  uint16_t http_port = 7070;       // 0: any free one
  uint16_t control_port = 7071;    // 0: any free one
  int64_t heartbeat_interval_ms = 1000;
  // As in Registered, at least kLeaseMsMin; 0: 15 heartbeats.
  int64_t lease_ms = 0;
  int64_t quarantine_failures = 3;  // as in CoreConfig
  int64_t quarantine_seconds = 3600;
  double slow_ratio = 1.5;
  uint64_t scrub_bytes_per_second = 8 << 20;  // as in ScrubOptions; 0: not at all
  int64_t scrub_pause_seconds = 3600;         // from the end of one pass to the next
};

// Files in the state directory:
//   LOCK               held by the one coordinator of this directory
//   endpoints.json     http_port, control_port, bind, http, control, pid; written when it listens
//   state/             records (RocksDB)
//   checkpoint-index/  index of checkpoints (RocksDB)
//   logs/              output of ranks
//   checkpoints/       of jobs whose spec names no directory
class Driver {
 public:
  // kAlreadyExists: the directory or a port is in use. kDataLoss: the records are damaged.
  static Result<std::unique_ptr<Driver>> start(DriverOptions options);
  ~Driver();
  Driver(const Driver&) = delete;
  Driver& operator=(const Driver&) = delete;

  // Until SIGTERM or SIGINT (kOk), or until the store refuses a write (kFailure).
  ExitCode run();
  // After run(): waits for what is under way in checkpoint directories, at most `limit`. False when
  // one of them still hangs: then the destructor would wait for it, and whoever wants to end leaves
  // without it (_Exit), which costs nothing that was acknowledged.
  bool finish(Duration limit);
  // Any thread.
  void stop();
  std::string http_address() const;      // "127.0.0.1:7070"
  std::string control_endpoint() const;  // "tcp://127.0.0.1:7071"

 private:
  struct Impl;

 public:
  explicit Driver(std::unique_ptr<Impl> impl);  // for start(): nobody else can name an Impl

 private:
  std::unique_ptr<Impl> impl_;
};

}  // namespace penstock
