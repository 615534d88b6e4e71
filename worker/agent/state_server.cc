#include "worker/agent/state_server.h"

#include <netdb.h>
#include <netinet/in.h>
#include <poll.h>
#include <sys/random.h>
#include <sys/socket.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <system_error>
#include <utility>

#include "comm/base/check.h"
#include "comm/base/ip_address.h"
#include "comm/base/log.h"
#include "comm/control/pulse.h"

namespace penstock {
namespace {

// For a request, or an answer, to come or be taken.
constexpr Duration kWordPatience = std::chrono::seconds(5);
// For a block, which its sender may hold back to keep to its rate.
constexpr Duration kBlockPatience = std::chrono::seconds(20);
// When there is no room for a caller, before another is looked for.
constexpr int kPauseMs = 100;

Digest random_key() {
  Digest key;
  const ssize_t count = ::getrandom(&key, sizeof key, 0);
  PENSTOCK_CHECK(count == sizeof key, errno);
  return key;
}

Result<std::string> name_of(const FileDescriptor& port, uint16_t number) {
  SocketAddress local;
  local.size = sizeof local.storage;
  if (::getsockname(port.get(), reinterpret_cast<sockaddr*>(&local.storage), &local.size) != 0) {
    return errno_status(errno, "getsockname");
  }
  std::array<char, NI_MAXHOST> host = {};
  const int error =
      ::getnameinfo(local.get(), local.size, host.data(), host.size(), nullptr, 0, NI_NUMERICHOST);
  if (error != 0) return internal_error(fmt::format("getnameinfo: {}", ::gai_strerror(error)));
  return host_and_port(host.data(), number);
}

}  // namespace

StateServer::StateServer(std::string address, FileDescriptor port, StateCopies& copies)
    : address_(std::move(address)), key_(random_key()), port_(std::move(port)), copies_(copies) {}

Result<std::unique_ptr<StateServer>> StateServer::start(const std::string& coordinator,
                                                        StateCopies& copies) {
  PENSTOCK_TRY_ASSIGN(const SocketAddress reached, resolve_endpoint(coordinator));
  PENSTOCK_TRY_ASSIGN(const FileDescriptor socket, connect_datagrams(reached));
  uint16_t number = 0;
  PENSTOCK_TRY_ASSIGN(FileDescriptor port, listen_beside(socket, &number));
  PENSTOCK_TRY_ASSIGN(std::string address, name_of(port, number));
  std::unique_ptr<StateServer> server(new StateServer(std::move(address), std::move(port), copies));
  server->thread_ = std::thread([raw = server.get()] { raw->run(); });
  return server;
}

StateServer::~StateServer() {
  ending_ = true;
  ::shutdown(port_.get(), SHUT_RDWR);  // which wakes the thread
  thread_.join();
  for (Caller& caller : callers_) caller.connection.shut_down();
  for (Caller& caller : callers_) caller.thread.join();
}

void StateServer::expect(JobId job, Epoch epoch, int64_t step, const std::vector<Rank>& ranks) {
  const std::lock_guard lock(mutex_);
  expected_[job] = {epoch, step, {ranks.begin(), ranks.end()}};
}

void StateServer::fence(JobId job, Epoch epoch) {
  const std::lock_guard lock(mutex_);
  const auto found = expected_.find(job);
  if (found != expected_.end() && found->second.epoch <= epoch) expected_.erase(found);
}

bool StateServer::is_expected(const StreamRequest& request) const {
  const std::lock_guard lock(mutex_);
  const auto found = expected_.find(request.job);
  return found != expected_.end() && found->second.epoch == request.epoch &&
         found->second.step == request.step && found->second.ranks.contains(request.rank);
}

void StateServer::run() {
  bool refuses = false;  // and has said so
  while (!ending_) {
    pollfd waiting = {port_.get(), POLLIN, 0};
    if (::poll(&waiting, 1, -1) < 0 || ending_) continue;
    drop_served();
    const Status taken = take_caller();
    if (!std::exchange(refuses, !taken.ok()) && refuses && !ending_) {
      log_warning("copies of ranks' state are neither taken in nor handed out for now: {}",
                  taken.message());
    }
    if (taken.ok()) continue;
    waiting.events = 0;  // a caller waits already: only the end of this object ends the pause
    (void)::poll(&waiting, 1, kPauseMs);
  }
}

void StateServer::drop_served() {
  callers_.remove_if([](Caller& caller) {
    if (caller.served) caller.thread.join();
    return caller.served.load();
  });
}

// An error: this process or host has no room for another caller.
Status StateServer::take_caller() {
  FileDescriptor socket(::accept4(port_.get(), nullptr, nullptr, SOCK_NONBLOCK | SOCK_CLOEXEC));
  if (!socket.valid()) {
    const bool gone_again = errno == EAGAIN || errno == EINTR || errno == ECONNABORTED;
    return gone_again ? Status() : errno_status(errno, "accept");
  }
  if (callers_.size() >= kCallersMax) return {};
  Caller& caller = callers_.emplace_back(std::move(socket));
  try {
    caller.thread = std::thread([this, &caller] {
      serve(caller.connection);
      caller.connection.shut_down();
      caller.served = true;
    });
  } catch (const std::system_error& error) {
    callers_.pop_back();
    return errno_status(error.code().value(), "start a thread");
  }
  return {};
}

void StateServer::serve(StateConnection& caller) {
  const Result<StreamRequest> request = caller.hear_request(kWordPatience);
  if (!request.ok()) return;
  if (request->key != key_) {
    log_warning("somebody without the key asks for the state of rank {} of job {}", request->rank,
                request->job);
    (void)caller.answer({Code::kPermissionDenied, {}, 0}, kWordPatience);
    return;
  }
  return request->kind == StreamKind::kStore ? take(caller, *request) : give(caller, *request);
}

void StateServer::take(StateConnection& caller, const StreamRequest& request) {
  const auto answer = [&](Code code) { return caller.answer({code, {}, 0}, kWordPatience).ok(); };
  if (!is_expected(request)) return (void)answer(Code::kFailedPrecondition);
  const auto known = copies_.find(request.job, request.epoch, request.rank, request.step);
  if (known != nullptr) return (void)answer(Code::kAlreadyExists);
  Result<std::shared_ptr<StateCopy>> copy =
      copies_.make({request.job, request.rank, request.contents}, request.epoch, request.step,
                   request.byte_count);
  if (!copy.ok()) {
    log_warning("a copy of rank {} of job {} is not kept: {}", request.rank, request.job,
                copy.status().message());
    return (void)answer(copy.status().code());
  }
  if (!answer(Code::kOk)) return;
  Status received = caller.receive_state((*copy)->bytes(), kBlockPatience);
  // The order may have been another one, or the last one, since.
  if (received.ok() && !is_expected(request)) received = aborted("not wanted any more");
  if (received.ok()) received = copies_.put(std::move(copy).value());
  (void)answer(received.code());
}

void StateServer::give(StateConnection& caller, const StreamRequest& request) {
  const std::shared_ptr<const StateCopy> copy =
      copies_.find(request.job, request.epoch, request.rank, request.step);
  if (copy == nullptr) return (void)caller.answer({Code::kNotFound, {}, 0}, kWordPatience);
  const Bytes bytes = copy->bytes();
  const StreamAnswer answer{Code::kOk, copy->identity().contents, bytes.size()};
  if (!caller.answer(answer, kWordPatience).ok()) return;
  const Status sent = caller.send_state(bytes, kBlockPatience);
  log_info("gave the state of rank {} of job {} after step {}, {} bytes: {}", request.rank,
           request.job, request.step, bytes.size(), sent.ok() ? "all of it" : sent.message());
}

}  // namespace penstock
