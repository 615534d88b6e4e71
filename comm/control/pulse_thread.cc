#include "comm/control/pulse_thread.h"

#include <poll.h>
#include <sys/eventfd.h>
#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>

#include "comm/base/log.h"

namespace penstock {
namespace {

constexpr int64_t kNanosecondsPerMillisecond = 1'000'000;
// Before every thread of the ranks that share the host; where that is not permitted, beside them:
// it hardly uses a processor, which schedulers reward.
constexpr int kNiceness = -10;
constexpr Duration kProbePatienceMin = std::chrono::seconds(1);
// The coordinator's host may have another address by now.
constexpr Duration kResolveAgain = std::chrono::seconds(30);

}  // namespace

Result<std::unique_ptr<PulseThread>> PulseThread::start(std::string coordinator,
                                                        uint64_t incarnation, LeaseFile lease) {
  FileDescriptor wake(eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
  if (!wake.valid()) return errno_status(errno, "eventfd");
  std::unique_ptr<PulseThread> made(new PulseThread(coordinator, incarnation, std::move(wake)));
  made->lease_file_.emplace(std::move(lease));
  made->thread_ = std::thread([raw = made.get()] { raw->run(); });
  return made;
}

PulseThread::~PulseThread() {
  ending_.store(true);
  wake();
  thread_.join();
}

void PulseThread::wake() const {
  const uint64_t one = 1;
  // Full means that it is awake already.
  [[maybe_unused]] const ssize_t written = write(wake_.get(), &one, sizeof one);
}

void PulseThread::registered(const Registration& registration) {
  const std::lock_guard lock(mutex_);
  terms_.worker = registration.worker;
  terms_.interval = std::max<Duration>(registration.heartbeat_interval / kPulsesPerBeat,
                                       Duration(kNanosecondsPerMillisecond));
  terms_.lease = registration.lease;
  if (terms_.lease == Duration(0)) lease_file_->set(LeaseFile::kEndless);
  extend(terms_, registration.asked_ns);
  wake();
}

void PulseThread::heard(int64_t sent_ns) {
  extend(terms(), sent_ns);
}

// Of what was sent or begun then, and came through.
void PulseThread::extend(const Terms& terms, int64_t since_ns) {
  int64_t before = heard_sent_ns_.load();
  while (before < since_ns && !heard_sent_ns_.compare_exchange_weak(before, since_ns)) {
  }
  if (terms.lease > Duration(0)) lease_file_->extend_to(since_ns + terms.lease.count());
}

void PulseThread::cut_off(bool is_cut_off) {
  const std::lock_guard lock(mutex_);
  terms_.is_cut_off = is_cut_off;
  wake();
}

PulseThread::Terms PulseThread::terms() const {
  const std::lock_guard lock(mutex_);
  return terms_;
}

bool PulseThread::may_pulse(const Terms& terms, int64_t now_ns) const {
  const int64_t hung_ns = now_ns - loop_turned_ns_.load(std::memory_order_relaxed);
  return terms.worker.value != 0 && !terms.is_cut_off && hung_ns < kLoopHungMax.count();
}

void PulseThread::run() {
  if (setpriority(PRIO_PROCESS, static_cast<id_t>(gettid()), kNiceness) != 0) {
    log_debug("pulses are sent at ordinary priority: {}", errno_status(errno, "nice").message());
  }
  int64_t next_ns = 0;
  while (!ending_.load()) {
    const Terms now_terms = terms();
    int64_t now_ns = monotonic_ns();
    if (now_ns >= next_ns) {
      // Late pulses are not made up for.
      next_ns = now_ns + now_terms.interval.count();
      reach(now_ns);
      if (may_pulse(now_terms, now_ns)) {
        send_pulse(now_terms);
        probe(now_terms, now_ns);
      }
    }
    const int16_t probe_events = probe_stands_ ? POLLIN : POLLIN | POLLOUT;
    std::array<pollfd, 4> watched = {{{wake_.get(), POLLIN, 0},
                                      {socket_.get(), POLLIN, 0},
                                      {life_port_.get(), POLLIN, 0},
                                      {probe_.get(), probe_events, 0}}};
    const int64_t wait_ms = (next_ns - now_ns) / kNanosecondsPerMillisecond + 1;
    ::poll(watched.data(), watched.size(), static_cast<int>(wait_ms));
    now_ns = monotonic_ns();
    uint64_t count = 0;
    if (read(wake_.get(), &count, sizeof count) == sizeof count) next_ns = 0;
    hear(now_terms, now_ns);
    if ((watched[2].revents & POLLIN) != 0) take_calls();
    if (watched[3].revents != 0) look_at_probe(now_terms, now_ns);
  }
}

// Has a socket to where the coordinator is now.
void PulseThread::reach(int64_t now_ns) {
  if (socket_.valid() && now_ns - heard_ns_ < kResolveAgain.count()) return;
  heard_ns_ = now_ns;
  const Result<SocketAddress> address = resolve_endpoint(coordinator_);
  if (!address.ok()) return log_debug("no pulses to {}", address.status().message());
  coordinator_address_ = *address;
  Result<FileDescriptor> socket = connect_datagrams(*address);
  if (!socket.ok()) return log_debug("no pulses: {}", socket.status().message());
  socket_ = std::move(socket).value();
  if (life_port_.valid()) return;
  Result<FileDescriptor> life_port = listen_beside(socket_, &life_port_number_);
  if (!life_port.ok()) return log_warning("no life port: {}", life_port.status().message());
  life_port_ = std::move(life_port).value();
  life_socket_.store(life_port_.get());
}

// They are held so that they end with this process. In the port's queue, which is bounded, they
// would end with the last of its ranks only.
void PulseThread::take_calls() {
  const int fd = accept4(life_port_.get(), nullptr, nullptr, SOCK_CLOEXEC | SOCK_NONBLOCK);
  if (fd < 0) return;
  callers_[next_caller_] = FileDescriptor(fd);
  next_caller_ = (next_caller_ + 1) % callers_.size();
}

void PulseThread::send_pulse(const Terms& terms) {
  if (!socket_.valid()) return;
  sent_ns_[++sequence_ % sent_ns_.size()] = monotonic_ns();
  const auto bytes =
      encode_pulse({terms.worker, incarnation_, sequence_, life_port_number_, false});
  // One that cannot be sent is as good as lost: the next is due soon.
  send(socket_.get(), bytes.data(), bytes.size(), 0);
}

void PulseThread::hear(const Terms& terms, int64_t now_ns) {
  if (!socket_.valid()) return;
  while (true) {
    std::array<std::byte, kPulseBytes + 1> datagram;
    const ssize_t count = recv(socket_.get(), datagram.data(), datagram.size(), 0);
    if (count < 0 && errno == ECONNREFUSED) continue;  // nobody heard an earlier one
    if (count < 0) return;
    const auto pulse = decode_pulse({datagram.data(), static_cast<size_t>(count)});
    const bool is_ours = pulse && pulse->is_answer && pulse->worker == terms.worker &&
                         pulse->incarnation == incarnation_ && pulse->sequence <= sequence_;
    if (!is_ours || terms.is_cut_off) continue;
    heard_ns_ = now_ns;
    answers_.fetch_add(1, std::memory_order_relaxed);
    if (sequence_ - pulse->sequence >= sent_ns_.size()) continue;  // sent too long ago to matter
    extend(terms, sent_ns_[pulse->sequence % sent_ns_.size()]);
  }
}

// Asks the coordinator's host when nothing has been heard for a quarter of the lease, and again
// when the answer is as old: connections that nobody accepts fill a queue there.
void PulseThread::probe(const Terms& terms, int64_t now_ns) {
  const int64_t patience_ns =
      std::max<int64_t>(2 * kPulsesPerBeat * terms.interval.count(), kProbePatienceMin.count());
  if (probe_.valid()) {
    if (now_ns - probe_begun_ns_ < patience_ns) return;
    if (probe_stands_) extend(terms, probe_begun_ns_);  // and not a word
    probe_ = FileDescriptor();
  }
  const int64_t silence_ns = now_ns - heard_sent_ns_.load();
  if (!socket_.valid() || terms.lease == Duration(0) || silence_ns < terms.lease.count() / 4) {
    return;
  }
  const SocketAddress& address = coordinator_address_;
  probe_ = FileDescriptor(
      ::socket(address.storage.ss_family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0));
  probe_begun_ns_ = now_ns;
  probe_stands_ = false;
  if (!probe_.valid() || connect(probe_.get(), address.get(), address.size) == 0) return;
  if (errno == EINPROGRESS) return;
  if (errno == ECONNREFUSED) extend(terms, probe_begun_ns_);
  probe_ = FileDescriptor();
}

void PulseThread::look_at_probe(const Terms& terms, int64_t now_ns) {
  int error_number = 0;
  socklen_t size = sizeof error_number;
  const bool asked = getsockopt(probe_.get(), SOL_SOCKET, SO_ERROR, &error_number, &size) == 0;
  if (asked && error_number == 0 && !probe_stands_) {
    // What accepted it may be the system alone: the process is to show itself.
    probe_stands_ = true;
    probe_begun_ns_ = now_ns;
    return;
  }
  if (error_number == ECONNREFUSED && !terms.is_cut_off) extend(terms, probe_begun_ns_);
  // Else the coordinator runs, and what it has heard of this worker is for it to say; or the
  // connection broke, which says nothing.
  probe_ = FileDescriptor();
}

}  // namespace penstock
