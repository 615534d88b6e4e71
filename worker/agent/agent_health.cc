// Checks of this host that the coordinator asks for: something there failed, or it is to be trusted
// again.
#include "comm/base/log.h"
#include "worker/agent/agent.h"

namespace penstock {

void Agent::handle(int64_t, const CheckHost& message) {
  if (message.request == checked_.request) {  // the answer was lost
    const Status sent = send(checked_);
    if (!sent.ok()) log_debug("HostChecked not sent: {}", sent.to_string());
    return;
  }
  check_asked_ = message.request;
  if (check_running_ == 0) begin_check();
}

void Agent::begin_check() {
  check_running_ = check_asked_;
  if (!actions_.check_host) return on_host_checked(true, "this worker checks nothing");
  const Status begun = actions_.check_host();
  if (!begun.ok()) on_host_checked(false, "the check could not be started: " + begun.message());
}

void Agent::on_host_checked(bool passed, std::string report) {
  if (report.size() > kCheckReportBytesMax) report.resize(kCheckReportBytesMax);
  checked_ = {check_running_, passed, std::move(report)};
  log_line(
      passed ? LogLevel::kInfo : LogLevel::kError,
      fmt::format("this host {} its check: {}", passed ? "passed" : "failed", checked_.report));
  const Status sent = send(checked_);
  if (!sent.ok()) log_debug("HostChecked not sent: {}", sent.to_string());
  // Asked once more meanwhile: for something that happened after this one began.
  const bool again = check_asked_ != check_running_;
  check_running_ = 0;
  if (again) begin_check();
}

}  // namespace penstock
