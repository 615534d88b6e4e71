#include "worker/agent/host_checker.h"

#include <signal.h>
#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <array>

#include "comm/base/check.h"

namespace penstock {
namespace {

// More than that of what a check writes is of no use to anybody.
constexpr size_t kReadBytesMax = 64 << 10;
constexpr size_t kErrorBytesMax = 2048;
// For a check that is killed because this object ends.
constexpr Duration kEndPatience = std::chrono::milliseconds(100);

// What is in the pipe, as one line.
std::string read_all(int fd) {
  std::string text;
  std::array<char, 4096> buffer;
  for (ssize_t count = 0;
       text.size() < kReadBytesMax && (count = ::read(fd, buffer.data(), buffer.size())) > 0;) {
    text.append(buffer.data(), static_cast<size_t>(count));
  }
  while (!text.empty() && text.back() == '\n') text.pop_back();
  for (size_t at = 0; (at = text.find('\n', at)) != std::string::npos;) text.replace(at, 1, "; ");
  return text;
}

// The end of it, where a check that crashed says why.
std::string last_errors(int fd) {
  const std::string text = read_all(fd);
  return text.size() <= kErrorBytesMax ? text : "…" + text.substr(text.size() - kErrorBytesMax);
}

}  // namespace

HostChecker::HostChecker(EventLoop& loop, HostCheckerOptions options, Done done)
    : loop_(loop), options_(std::move(options)), done_(std::move(done)) {}

HostChecker::~HostChecker() {
  if (!child_) return;
  child_->give_up(kEndPatience);
  forget();
}

Status HostChecker::begin() {
  if (child_) {
    PENSTOCK_CHECK(told_);
    look();
  }
  if (child_) {
    return unavailable(fmt::format(
        "the check before it, process {}, is still stuck and cannot be killed", child_->pid()));
  }
  SpawnOptions spawn;
  spawn.argv = {options_.rank_binary.string(), "check-host", "--directory",
                options_.directory.string(), "--report"};
  PENSTOCK_TRY_ASSIGN(ChildProcess child, ChildProcess::spawn(spawn));
  // Before it has threads, which inherit it.
  (void)::setpriority(PRIO_PROCESS, static_cast<id_t>(child.pid()), options_.niceness);
  output_ = child.take_stdout();
  errors_ = child.take_stderr();
  child_ = std::move(child);
  watch_ = loop_.watch_readable(child_->pidfd(), [this] { look(); });
  timer_ = loop_.call_after(options_.limit, [this] { expire(); });
  return {};
}

void HostChecker::forget() {
  loop_.unwatch(watch_);
  loop_.cancel(timer_);
  child_.reset();
  told_ = false;
  output_ = {};
  errors_ = {};
}

void HostChecker::look() {
  const std::optional<ExitStatus> ended = child_->try_wait();
  if (!ended) return;
  told_ ? forget() : tell(*ended);
}

// It is told of at once: a child that a disk holds in the kernel dies when the disk lets it.
void HostChecker::expire() {
  if (const auto ended = child_->try_wait()) return tell(*ended);
  (void)child_->send_signal(SIGKILL);
  told_ = true;
  done_(false, fmt::format("the check of this host did not end within {:.0f} s",
                           to_seconds(options_.limit)));
}

void HostChecker::tell(const ExitStatus& ended) {
  std::string report = read_all(output_.get());
  const bool passed = ended == ExitStatus{0, 0};
  if (!passed && report.empty()) {
    report =
        "the check of this host " + std::string(ended.signal != 0 ? "was " : "") + to_string(ended);
    const std::string errors = last_errors(errors_.get());
    if (!errors.empty()) report += ": " + errors;
  }
  forget();
  done_(passed, std::move(report));
}

}  // namespace penstock
