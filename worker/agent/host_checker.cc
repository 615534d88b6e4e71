#include "worker/agent/host_checker.h"

#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <array>

#include "comm/base/check.h"

namespace penstock {
namespace {

// All that is in the pipe: it never holds more, as the check says little.
std::string read_all(int fd) {
  std::string text;
  std::array<char, 4096> buffer;
  for (ssize_t count = 0; (count = ::read(fd, buffer.data(), buffer.size())) > 0;) {
    text.append(buffer.data(), static_cast<size_t>(count));
  }
  while (!text.empty() && text.back() == '\n') text.pop_back();
  for (size_t at = 0; (at = text.find('\n', at)) != std::string::npos;) text.replace(at, 1, "; ");
  return text;
}

}  // namespace

HostChecker::HostChecker(EventLoop& loop, HostCheckerOptions options, Done done)
    : loop_(loop), options_(std::move(options)), done_(std::move(done)) {}

HostChecker::~HostChecker() {
  if (child_) stop_watching();
}

Status HostChecker::begin() {
  PENSTOCK_CHECK(!child_);
  SpawnOptions spawn;
  spawn.argv = {options_.rank_binary.string(), "check-host", "--directory",
                options_.directory.string(), "--report"};
  PENSTOCK_TRY_ASSIGN(ChildProcess child, ChildProcess::spawn(spawn));
  // Before it has threads, which inherit it.
  (void)::setpriority(PRIO_PROCESS, static_cast<id_t>(child.pid()), options_.niceness);
  output_ = child.take_stdout();
  child_ = std::move(child);
  watch_ = loop_.watch_readable(child_->pidfd(), [this] { look(false); });
  timer_ = loop_.call_after(options_.limit, [this] { look(true); });
  return {};
}

void HostChecker::stop_watching() {
  loop_.unwatch(watch_);
  loop_.cancel(timer_);
}

void HostChecker::look(bool overdue) {
  std::optional<ExitStatus> ended = child_->try_wait();
  if (!ended && !overdue) return;
  stop_watching();
  std::string report = read_all(output_.get());
  bool passed = false;
  if (!ended) {
    report = fmt::format("the check of this host did not end within {:.0f} s",
                         to_seconds(options_.limit));
  } else if (*ended == ExitStatus{0, 0}) {
    passed = true;
  } else if (report.empty()) {
    report = "the check of this host " + std::string(ended->signal != 0 ? "was " : "") +
             to_string(*ended);
  }
  child_.reset();  // which kills one that still runs
  output_ = {};
  done_(passed, std::move(report));
}

}  // namespace penstock
