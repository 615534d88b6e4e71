// Owns one UCX context and worker with tag matching and wake-up, configured for host memory.
#pragma once

#include <ucp/api/ucp.h>

#include <memory>
#include <string>

#include "comm/base/status.h"

namespace penstock {

class UcxWorker {
 public:
  // `tls` and `net_devices` as UCX_TLS and UCX_NET_DEVICES; those and every other UCX_* variable of
  // the environment win. kUnavailable when no transport of `tls` works here.
  static Result<std::unique_ptr<UcxWorker>> create(const std::string& tls,
                                                   const std::string& net_devices);
  UcxWorker() = default;
  ~UcxWorker();  // REQUIRES: no request of the worker is under way, or UCX aborts the process
  UcxWorker(const UcxWorker&) = delete;
  UcxWorker& operator=(const UcxWorker&) = delete;

  // Leaves everything to the end of the process. REQUIRES: nobody uses it any more.
  void abandon();

  ucp_worker_h get() const { return worker_; }
  // Readable when an armed worker has something to do. Owned by UCX.
  int event_fd() const { return event_fd_; }
  const std::string& address() const { return address_; }

 private:
  Status open(const std::string& tls, const std::string& net_devices);

  ucp_context_h context_ = nullptr;
  ucp_worker_h worker_ = nullptr;
  int event_fd_ = -1;
  std::string address_;
};

// The Status of a failed UCX call.
Status ucx_status(ucs_status_t status, const std::string& what);

}  // namespace penstock
