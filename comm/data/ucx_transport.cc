#include "comm/data/ucx_transport.h"

#include <fcntl.h>
#include <poll.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cerrno>
#include <mutex>
#include <thread>

#include "comm/data/ucx_address.h"
#include "comm/data/ucx_worker.h"

namespace penstock {
namespace {

// UCX tag: 12 bits source rank, 11 bits of the epoch, 1 bit for our own greeting, 40 bits of the
// caller's.
constexpr int kSourceShift = 52;
constexpr int kEpochShift = 41;
constexpr uint64_t kEpochMask = (1 << (kSourceShift - kEpochShift)) - 1;
constexpr uint64_t kGreetingBit = uint64_t{1} << kTagBits;
constexpr uint64_t kExactMatch = ~uint64_t{0};
static_assert(kUcxWorldSizeMax == 1 << (64 - kSourceShift));

constexpr int kPumpRoundsMax = 8;  // then the progress thread takes over from a caller that posts
constexpr int kDrainRoundsMax = 4096;  // of messages a dead peer left behind
constexpr Duration kBackOff = std::chrono::microseconds(20);
constexpr int kNoFd = -1;  // poll() ignores it
constexpr Duration kCloseTimeout = std::chrono::seconds(2);
constexpr uint64_t kWakeEvent = UINT64_MAX;     // epoll data of wake_fd_
constexpr uint64_t kUcxEvent = UINT64_MAX - 1;  // … of UCX's descriptor; others are peer numbers

enum class OperationState : uint8_t { kFree, kPending, kComplete };

struct Operation {
  OperationState state = OperationState::kFree;
  bool in_ucx = false;  // UCX still owes a callback; the slot is not reused before it comes
  bool is_send = false;
  Code code = Code::kOk;                     // when complete
  Code code_if_broken = Code::kUnavailable;  // what a cancelled or disconnected operation becomes
  Rank peer;
  uint64_t tag = 0;
  uint64_t size = 0;
  uint64_t moved = 0;  // when complete and kOk
  int64_t completed_ns = 0;
  void* request = nullptr;
  class UcxEnd* owner = nullptr;
};

struct Peer {
  class UcxEnd* owner = nullptr;
  ucp_ep_h endpoint = nullptr;
  FileDescriptor process;  // pidfd; invalid for a peer on another host
  bool broken = false;     // UCX or the pidfd said so
  bool gone = false;       // and its operations have been failed
};

Code code_of(ucs_status_t status, Code code_if_broken) {
  if (status == UCS_OK) return Code::kOk;
  if (status == UCS_ERR_MESSAGE_TRUNCATED) return Code::kDataLoss;
  if (status == UCS_ERR_NO_MEMORY || status == UCS_ERR_NO_RESOURCE) return Code::kResourceExhausted;
  return code_if_broken;
}

void signal_event(int fd) {
  const uint64_t one = 1;
  // Fails only when the counter is full, and then the reader wakes anyway.
  [[maybe_unused]] const ssize_t written = ::write(fd, &one, sizeof(one));
}

void drain_event(int fd) {
  uint64_t count = 0;
  [[maybe_unused]] const ssize_t got = ::read(fd, &count, sizeof(count));
}

class UcxEnd final : public UcxTransport {
 public:
  explicit UcxEnd(const UcxOptions& options) : options_(options) {}
  ~UcxEnd() override;
  Status open();

  const std::string& address() const override { return address_; }
  Status connect(const std::vector<std::string>& addresses) override;
  Status close() override;

  Rank rank() const override { return options_.rank; }
  int32_t world_size() const override { return options_.world_size; }
  TransferHandle send(Rank peer, Tag tag, Bytes bytes) override;
  TransferHandle receive(Rank peer, Tag tag, MutableBytes into) override;
  Result<uint64_t> wait(TransferHandle handle, int64_t* completed_ns) override;
  bool done(TransferHandle handle) override;
  void abort() override;
  uint64_t bytes_sent() const override { return bytes_sent_.load(std::memory_order_relaxed); }

 private:
  using Lock = std::unique_lock<std::mutex>;

  Lock lock_as_caller();
  Status connect_peer(Rank rank, const std::string& text);
  Status greet_everyone();
  uint64_t full_tag(Rank source, uint64_t tag) const;
  Operation& begin_operation(Rank peer, uint64_t tag, uint64_t size, bool is_send);
  TransferHandle post_send(Rank peer, uint64_t tag, Bytes bytes);
  TransferHandle post_receive(Rank peer, uint64_t tag, MutableBytes into);
  TransferHandle posted(Operation& operation, ucs_status_ptr_t request, uint64_t moved_at_once);
  Operation& checked(TransferHandle handle);
  Result<uint64_t> take(Operation& operation);
  void wait_until_complete(Operation& operation, Duration timeout, Lock& lock);
  void back_off(int wake_fd, Lock& lock);
  void sleep_until_event(int64_t deadline_ns, Lock& lock);
  void watch_ucx_from_progress_thread(bool on);
  void pump();
  void drain();
  void fail(Operation& operation, Code code);
  void fail_broken_peers();
  void fail_everything();
  void force_close(Peer& peer);
  void progress_loop();
  void stop_progress_thread();
  bool owes_nothing(Lock& lock);

  static void on_sent(void* request, ucs_status_t status, void* operation);
  static void on_received(void* request, ucs_status_t status, const ucp_tag_recv_info_t* info,
                          void* operation);
  static void on_closed(void* request, ucs_status_t status, void* unused);
  static void on_endpoint_error(void* peer, ucp_ep_h endpoint, ucs_status_t status);
  static void on_complete(Operation& operation, Code code, uint64_t moved);

  // Constant after open().
  const UcxOptions options_;
  std::string address_;
  FileDescriptor wake_fd_;    // eventfd: the progress thread has something to do
  FileDescriptor caller_fd_;  // eventfd: the sleeping caller should look again
  FileDescriptor epoll_fd_;   // the progress thread's: UCX, wake_fd_, the peers' processes
  std::thread progress_thread_;

  // Any thread.
  std::atomic<bool> abort_requested_{false};
  std::atomic<int> callers_waiting_{0};  // for mutex_: the progress thread gives way to them
  std::atomic<uint64_t> bytes_sent_{0};

  // Under mutex_, UCX itself included.
  std::mutex mutex_;
  std::unique_ptr<UcxWorker> worker_;
  std::vector<Peer> peers_;            // by rank; sized once, because UCX holds pointers into it
  std::vector<Operation> operations_;  // by handle index; never resized
  std::vector<uint32_t> free_;
  bool any_broken_ = false;
  bool caller_sleeps_ = false;
  bool caller_drives_ = false;  // the progress thread keeps off UCX
  bool aborted_ = false;
  bool stopping_ = false;
};

// ---- opening and connecting

Status UcxEnd::open() {
  PENSTOCK_CHECK(options_.world_size > 0 && options_.world_size <= kUcxWorldSizeMax);
  PENSTOCK_CHECK(options_.rank.value >= 0 && options_.rank.value < options_.world_size);
  PENSTOCK_CHECK(options_.operations_max > 0);
  operations_.resize(options_.operations_max);
  for (uint32_t i = options_.operations_max; i > 0; --i) {
    operations_[i - 1].owner = this;
    free_.push_back(i - 1);
  }
  peers_.resize(static_cast<size_t>(options_.world_size));
  for (Peer& peer : peers_) peer.owner = this;

  PENSTOCK_TRY_ASSIGN(worker_, UcxWorker::create(options_.tls, options_.net_devices));
  PENSTOCK_TRY_ASSIGN(const ProcessIdentity process, own_process_identity());
  address_ = encode_ucx_address({options_.rank, options_.epoch, process, worker_->address()});

  wake_fd_ = FileDescriptor(eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
  caller_fd_ = FileDescriptor(eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
  epoll_fd_ = FileDescriptor(epoll_create1(EPOLL_CLOEXEC));
  if (!wake_fd_.valid() || !caller_fd_.valid() || !epoll_fd_.valid()) {
    return errno_status(errno, "eventfd or epoll for the data plane");
  }
  for (const auto& [fd, data] :
       {std::pair(wake_fd_.get(), kWakeEvent), std::pair(worker_->event_fd(), kUcxEvent)}) {
    epoll_event event = {.events = EPOLLIN, .data = {.u64 = data}};
    if (epoll_ctl(epoll_fd_.get(), EPOLL_CTL_ADD, fd, &event) != 0) {
      return errno_status(errno, "epoll_ctl for the data plane");
    }
  }
  signal_event(wake_fd_.get());  // the first thing the thread does is to arm UCX
  progress_thread_ = std::thread([this] { progress_loop(); });
  return {};
}

Status UcxEnd::connect(const std::vector<std::string>& addresses) {
  if (std::ssize(addresses) != options_.world_size) {
    return invalid_argument(fmt::format("{} data-plane addresses for a world of {} ranks",
                                        addresses.size(), options_.world_size));
  }
  {
    const Lock lock = lock_as_caller();
    for (int32_t i = 0; i < options_.world_size; ++i) {
      if (Rank{i} == options_.rank) continue;
      PENSTOCK_TRY(connect_peer(Rank{i}, addresses[static_cast<size_t>(i)]));
    }
  }
  return greet_everyone();
}

Status UcxEnd::connect_peer(Rank rank, const std::string& text) {
  PENSTOCK_TRY_ASSIGN(const UcxAddress address, decode_ucx_address(text));
  if (address.rank != rank || address.epoch != options_.epoch) {
    return invalid_argument(fmt::format(
        "the data-plane address given for rank {} of epoch {} is that of rank {} of epoch {}", rank,
        options_.epoch, address.rank, address.epoch));
  }
  Peer& peer = peers_[static_cast<size_t>(rank.value)];
  PENSTOCK_CHECK(peer.endpoint == nullptr, rank);
  Result<FileDescriptor> process = watch_process(address.process);
  if (!process.ok()) return process.status().with_context(fmt::format("rank {}", rank));
  peer.process = std::move(process).value();

  ucp_ep_params_t params = {};
  params.field_mask = UCP_EP_PARAM_FIELD_REMOTE_ADDRESS | UCP_EP_PARAM_FIELD_ERR_HANDLING_MODE |
                      UCP_EP_PARAM_FIELD_ERR_HANDLER;
  params.address = reinterpret_cast<const ucp_address_t*>(address.worker.data());
  params.err_mode = UCP_ERR_HANDLING_MODE_PEER;
  params.err_handler = {.cb = on_endpoint_error, .arg = &peer};
  const ucs_status_t status = ucp_ep_create(worker_->get(), &params, &peer.endpoint);
  if (status != UCS_OK) return ucx_status(status, fmt::format("connect to rank {}", rank));
  if (peer.process.valid()) {
    epoll_event event = {.events = EPOLLIN, .data = {.u64 = static_cast<uint64_t>(rank.value)}};
    if (epoll_ctl(epoll_fd_.get(), EPOLL_CTL_ADD, peer.process.get(), &event) != 0) {
      return errno_status(errno, fmt::format("watch the process of rank {}", rank));
    }
  }
  return {};
}

// An empty message each way: connections are set up here, not inside the first step, and connect()
// returns only when every peer can be reached.
Status UcxEnd::greet_everyone() {
  std::vector<TransferHandle> handles;
  Lock lock = lock_as_caller();
  for (int32_t i = 0; i < options_.world_size; ++i) {
    if (Rank{i} == options_.rank) continue;
    handles.push_back(post_receive(Rank{i}, kGreetingBit, {}));
    handles.push_back(post_send(Rank{i}, kGreetingBit, {}));
  }
  Status first_failure;
  for (const TransferHandle handle : handles) {
    Operation& operation = checked(handle);
    wait_until_complete(operation, options_.connect_timeout, lock);
    const Result<uint64_t> greeted = take(operation);
    if (!greeted.ok() && first_failure.ok()) {
      first_failure = greeted.status().with_context("connecting");
      fail_everything();  // the remaining waits return at once
    }
  }
  return first_failure;
}

// ---- posting

TransferHandle UcxEnd::send(Rank peer, Tag tag, Bytes bytes) {
  PENSTOCK_CHECK(tag.value >> kTagBits == 0, tag.value);
  bytes_sent_.fetch_add(bytes.size(), std::memory_order_relaxed);
  const Lock lock = lock_as_caller();
  return post_send(peer, tag.value, bytes);
}

TransferHandle UcxEnd::receive(Rank peer, Tag tag, MutableBytes into) {
  PENSTOCK_CHECK(tag.value >> kTagBits == 0, tag.value);
  const Lock lock = lock_as_caller();
  return post_receive(peer, tag.value, into);
}

UcxEnd::Lock UcxEnd::lock_as_caller() {
  callers_waiting_.fetch_add(1, std::memory_order_relaxed);
  Lock lock(mutex_);
  callers_waiting_.fetch_sub(1, std::memory_order_relaxed);
  return lock;
}

uint64_t UcxEnd::full_tag(Rank source, uint64_t tag) const {
  return static_cast<uint64_t>(source.value) << kSourceShift |
         (options_.epoch.value & kEpochMask) << kEpochShift | tag;
}

Operation& UcxEnd::begin_operation(Rank peer, uint64_t tag, uint64_t size, bool is_send) {
  PENSTOCK_CHECK(peer != options_.rank && peer.value >= 0 && peer.value < options_.world_size,
                 peer);
  PENSTOCK_CHECK(!free_.empty(), options_.operations_max);
  if (abort_requested_.load()) fail_everything();
  Operation& operation = operations_[free_.back()];
  free_.pop_back();
  operation = Operation{.state = OperationState::kPending,
                        .is_send = is_send,
                        .peer = peer,
                        .tag = tag,
                        .size = size,
                        .owner = this};
  return operation;
}

TransferHandle UcxEnd::post_send(Rank peer_rank, uint64_t tag, Bytes bytes) {
  Operation& operation = begin_operation(peer_rank, tag, bytes.size(), true);
  const Peer& peer = peers_[static_cast<size_t>(peer_rank.value)];
  if (aborted_ || peer.gone) return posted(operation, UCS_STATUS_PTR(UCS_ERR_CANCELED), 0);
  PENSTOCK_CHECK(peer.endpoint != nullptr, peer_rank);
  ucp_request_param_t param = {};
  param.op_attr_mask =
      UCP_OP_ATTR_FIELD_CALLBACK | UCP_OP_ATTR_FIELD_USER_DATA | UCP_OP_ATTR_FIELD_MEMORY_TYPE;
  param.cb.send = on_sent;
  param.user_data = &operation;
  param.memory_type = UCS_MEMORY_TYPE_HOST;
  operation.in_ucx = true;
  return posted(operation,
                ucp_tag_send_nbx(peer.endpoint, bytes.data(), bytes.size(),
                                 full_tag(options_.rank, tag), &param),
                bytes.size());
}

TransferHandle UcxEnd::post_receive(Rank peer_rank, uint64_t tag, MutableBytes into) {
  Operation& operation = begin_operation(peer_rank, tag, into.size(), false);
  if (aborted_) return posted(operation, UCS_STATUS_PTR(UCS_ERR_CANCELED), 0);
  // Always through the callback: UCX 1.13 does not tell the length of a message that was there
  // already.
  ucp_request_param_t param = {};
  param.op_attr_mask = UCP_OP_ATTR_FIELD_CALLBACK | UCP_OP_ATTR_FIELD_USER_DATA |
                       UCP_OP_ATTR_FIELD_MEMORY_TYPE | UCP_OP_ATTR_FLAG_NO_IMM_CMPL;
  param.cb.recv = on_received;
  param.user_data = &operation;
  param.memory_type = UCS_MEMORY_TYPE_HOST;
  operation.in_ucx = true;
  const ucs_status_ptr_t request = ucp_tag_recv_nbx(worker_->get(), into.data(), into.size(),
                                                    full_tag(peer_rank, tag), kExactMatch, &param);
  const TransferHandle handle = posted(operation, request, 0);
  // What the dead sent is in memory already or never comes.
  if (operation.state == OperationState::kPending &&
      peers_[static_cast<size_t>(peer_rank.value)].gone) {
    fail(operation, Code::kUnavailable);
  }
  return handle;
}

// Records what UCX answered to a post: finished at once (null), refused (an error), finished in its
// callback already, or under way.
TransferHandle UcxEnd::posted(Operation& operation, ucs_status_ptr_t request,
                              uint64_t moved_at_once) {
  if (aborted_) operation.code_if_broken = Code::kAborted;
  if (request == nullptr || UCS_PTR_IS_ERR(request)) {
    const ucs_status_t status = UCS_PTR_STATUS(request);
    on_complete(operation, code_of(status, operation.code_if_broken), moved_at_once);
  } else if (operation.in_ucx) {
    operation.request = request;
    pump();
  }
  return {static_cast<uint32_t>(&operation - operations_.data())};
}

// ---- completion, called by UCX inside ucp_worker_progress() or ucp_request_cancel()

void UcxEnd::on_complete(Operation& operation, Code code, uint64_t moved) {
  operation.in_ucx = false;
  operation.request = nullptr;
  if (operation.state == OperationState::kPending) {
    operation.state = OperationState::kComplete;
    operation.code = code;
    operation.moved = moved;
    operation.completed_ns = monotonic_ns();
  } else if (operation.state == OperationState::kFree) {  // failed and taken while UCX still had it
    UcxEnd& owner = *operation.owner;
    owner.free_.push_back(static_cast<uint32_t>(&operation - owner.operations_.data()));
  }
}

void UcxEnd::on_sent(void* request, ucs_status_t status, void* user_data) {
  Operation& operation = *static_cast<Operation*>(user_data);
  on_complete(operation, code_of(status, operation.code_if_broken), operation.size);
  ucp_request_free(request);
}

void UcxEnd::on_received(void* request, ucs_status_t status, const ucp_tag_recv_info_t* info,
                         void* user_data) {
  Operation& operation = *static_cast<Operation*>(user_data);
  on_complete(operation, code_of(status, operation.code_if_broken),
              status == UCS_OK ? info->length : 0);
  ucp_request_free(request);
}

void UcxEnd::on_closed(void* request, ucs_status_t, void*) {
  ucp_request_free(request);
}

void UcxEnd::on_endpoint_error(void* peer_raw, ucp_ep_h, ucs_status_t) {
  Peer& peer = *static_cast<Peer*>(peer_raw);
  peer.broken = true;
  peer.owner->any_broken_ = true;  // acted on outside of UCX
}

// ---- waiting

Operation& UcxEnd::checked(TransferHandle handle) {
  PENSTOCK_CHECK(handle.index < operations_.size(), handle.index);
  Operation& operation = operations_[handle.index];
  PENSTOCK_CHECK(operation.state != OperationState::kFree, handle.index);
  return operation;
}

bool UcxEnd::done(TransferHandle handle) {
  const Lock lock = lock_as_caller();
  const Operation& operation = checked(handle);
  if (operation.state == OperationState::kPending) pump();
  return operation.state == OperationState::kComplete;
}

Result<uint64_t> UcxEnd::wait(TransferHandle handle, int64_t* completed_ns) {
  Lock lock = lock_as_caller();
  Operation& operation = checked(handle);
  if (operation.state == OperationState::kPending) {
    wait_until_complete(operation, options_.timeout, lock);
  }
  if (completed_ns != nullptr) *completed_ns = operation.completed_ns;
  return take(operation);
}

Result<uint64_t> UcxEnd::take(Operation& operation) {
  PENSTOCK_CHECK(operation.state == OperationState::kComplete);
  operation.state = OperationState::kFree;
  if (!operation.in_ucx) free_.push_back(static_cast<uint32_t>(&operation - operations_.data()));
  if (operation.code == Code::kOk) return operation.moved;
  const char* reason = operation.code == Code::kUnavailable        ? "the peer is gone"
                       : operation.code == Code::kAborted          ? "this rank was aborted"
                       : operation.code == Code::kDataLoss         ? "the message is longer"
                       : operation.code == Code::kDeadlineExceeded ? "nothing within the timeout"
                                                                   : "out of memory";
  return Status(operation.code, fmt::format("{} {} bytes {} rank {}, tag {:#x}: {}",
                                            operation.is_send ? "send" : "receive", operation.size,
                                            operation.is_send ? "to" : "from", operation.peer,
                                            operation.tag, reason));
}

// The caller drives UCX itself: first polling, then asleep on UCX's descriptor, with one wake-up
// per event instead of the two it would take through the progress thread.
void UcxEnd::wait_until_complete(Operation& operation, Duration timeout, Lock& lock) {
  if (operation.state == OperationState::kComplete) return;
  const int64_t start_ns = monotonic_ns();
  caller_drives_ = true;
  watch_ucx_from_progress_thread(false);
  while (operation.state == OperationState::kPending) {
    const bool moved = ucp_worker_progress(worker_->get()) != 0;
    if (any_broken_) fail_broken_peers();
    if (moved || operation.state != OperationState::kPending) continue;
    const int64_t waited_ns = monotonic_ns() - start_ns;
    if (waited_ns >= timeout.count()) {
      fail(operation, Code::kDeadlineExceeded);
    } else if (waited_ns >= options_.spin.count()) {
      sleep_until_event(start_ns + timeout.count(), lock);
    }
  }
  caller_drives_ = false;
  pump();
  watch_ucx_from_progress_thread(true);
}

// Shared memory that is full cannot wake us when its reader has made room: UCX then refuses to be
// armed although there is nothing to do. Polling on would take the core from the reader; so sleep a
// little.
void UcxEnd::back_off(int wake_fd, Lock& lock) {
  lock.unlock();
  pollfd fd = {wake_fd, POLLIN, 0};
  const timespec span = {.tv_sec = 0, .tv_nsec = kBackOff.count()};
  ppoll(&fd, 1, &span, nullptr);
  lock.lock();
}

void UcxEnd::sleep_until_event(int64_t deadline_ns, Lock& lock) {
  if (ucp_worker_arm(worker_->get()) != UCS_OK) {
    if (ucp_worker_progress(worker_->get()) == 0) back_off(caller_fd_.get(), lock);
    return;
  }
  caller_sleeps_ = true;
  lock.unlock();
  std::array<pollfd, 2> fds = {{{worker_->event_fd(), POLLIN, 0}, {caller_fd_.get(), POLLIN, 0}}};
  const int64_t left_ms = (deadline_ns - monotonic_ns()) / 1'000'000 + 1;
  const int ready =
      poll(fds.data(), fds.size(), static_cast<int>(std::clamp<int64_t>(left_ms, 0, INT32_MAX)));
  if (ready > 0 && fds[1].revents != 0) drain_event(caller_fd_.get());
  lock.lock();
  caller_sleeps_ = false;
}

void UcxEnd::watch_ucx_from_progress_thread(bool on) {
  epoll_event event = {.events = on ? uint32_t{EPOLLIN} : 0, .data = {.u64 = kUcxEvent}};
  PENSTOCK_CHECK(epoll_ctl(epoll_fd_.get(), EPOLL_CTL_MOD, worker_->event_fd(), &event) == 0);
}

// Makes progress and leaves UCX armed, so that the progress thread is woken by whatever comes next;
// when there is more to do than a caller should be held up for, hands it to that thread.
void UcxEnd::pump() {
  for (int round = 0; round < kPumpRoundsMax; ++round) {
    while (ucp_worker_progress(worker_->get()) != 0) {
    }
    if (any_broken_) fail_broken_peers();
    if (caller_drives_ || ucp_worker_arm(worker_->get()) == UCS_OK) return;
  }
  signal_event(wake_fd_.get());
}

void UcxEnd::drain() {
  for (int round = 0; round < kDrainRoundsMax; ++round) {
    if (ucp_worker_progress(worker_->get()) == 0) return;
  }
}

// ---- failing

void UcxEnd::fail(Operation& operation, Code code) {
  operation.code_if_broken = code;
  if (operation.request != nullptr && !operation.is_send) {
    ucp_request_cancel(worker_->get(), operation.request);
  }
  if (operation.state == OperationState::kPending) {  // UCX keeps it until its connection is closed
    operation.state = OperationState::kComplete;
    operation.code = code;
    operation.completed_ns = monotonic_ns();
  }
}

void UcxEnd::force_close(Peer& peer) {
  if (peer.endpoint == nullptr) return;
  ucp_request_param_t param = {};
  param.op_attr_mask = UCP_OP_ATTR_FIELD_CALLBACK | UCP_OP_ATTR_FIELD_FLAGS;
  param.cb.send = on_closed;
  param.flags = UCP_EP_CLOSE_FLAG_FORCE;
  ucp_ep_close_nbx(peer.endpoint, &param);
  peer.endpoint = nullptr;
}

void UcxEnd::fail_broken_peers() {
  any_broken_ = false;
  drain();  // what the peer sent before it went is still good
  for (Peer& peer : peers_) {
    if (!peer.broken || peer.gone) continue;
    peer.gone = true;
    force_close(peer);
    for (Operation& operation : operations_) {
      if (operation.state == OperationState::kPending &&
          &peers_[static_cast<size_t>(operation.peer.value)] == &peer) {
        fail(operation, Code::kUnavailable);
      }
    }
  }
  drain();
}

void UcxEnd::fail_everything() {
  if (aborted_) return;
  aborted_ = true;
  for (Operation& operation : operations_) {
    if (operation.state == OperationState::kPending) fail(operation, Code::kAborted);
  }
  for (Peer& peer : peers_) force_close(peer);
  drain();
}

void UcxEnd::abort() {
  abort_requested_.store(true);
  signal_event(wake_fd_.get());
}

// ---- the progress thread

void UcxEnd::progress_loop() {
  std::array<epoll_event, 16> events;
  while (true) {
    const int ready = epoll_wait(epoll_fd_.get(), events.data(), events.size(), -1);
    PENSTOCK_CHECK(ready >= 0 || errno == EINTR, errno);
    Lock lock(mutex_);
    if (stopping_) return;
    for (int i = 0; i < ready; ++i) {
      const uint64_t source = events[static_cast<size_t>(i)].data.u64;
      if (source == kWakeEvent) drain_event(wake_fd_.get());
      if (source >= peers_.size()) continue;
      Peer& peer = peers_[source];
      epoll_ctl(epoll_fd_.get(), EPOLL_CTL_DEL, peer.process.get(), nullptr);
      peer.broken = any_broken_ = true;
    }
    if (abort_requested_.load()) fail_everything();
    if (any_broken_) fail_broken_peers();
    bool armed = caller_drives_;  // then arming is the caller's business
    while (!armed && callers_waiting_.load(std::memory_order_relaxed) == 0) {
      if (ucp_worker_progress(worker_->get()) != 0) continue;
      if (any_broken_) fail_broken_peers();
      armed = ucp_worker_arm(worker_->get()) == UCS_OK;
      if (armed || ucp_worker_progress(worker_->get()) != 0) continue;
      back_off(kNoFd, lock);
      break;  // to look at wake_fd_ and the peers
    }
    if (!armed && !caller_drives_) signal_event(wake_fd_.get());  // there is more to do
    if (caller_sleeps_) signal_event(caller_fd_.get());
  }
}

void UcxEnd::stop_progress_thread() {
  if (!progress_thread_.joinable()) return;
  {
    const Lock lock = lock_as_caller();
    stopping_ = true;
  }
  signal_event(wake_fd_.get());
  progress_thread_.join();
}

// ---- closing

Status UcxEnd::close() {
  Status first_failure;
  {
    Lock lock = lock_as_caller();
    for (int32_t i = 0; i < options_.world_size && !aborted_; ++i) {
      Peer& peer = peers_[static_cast<size_t>(i)];
      if (peer.endpoint == nullptr) continue;
      ucp_request_param_t param = {};
      Operation& operation = begin_operation(Rank{i}, 0, 0, true);
      param.op_attr_mask = UCP_OP_ATTR_FIELD_CALLBACK | UCP_OP_ATTR_FIELD_USER_DATA;
      param.cb.send = on_sent;
      param.user_data = &operation;
      operation.in_ucx = true;
      const ucp_ep_h endpoint = std::exchange(peer.endpoint, nullptr);
      posted(operation, ucp_ep_close_nbx(endpoint, &param), 0);
      wait_until_complete(operation, kCloseTimeout, lock);
      const Result<uint64_t> closed = take(operation);
      const bool peer_left_first = closed.status().code() == Code::kUnavailable;
      if (!closed.ok() && !peer_left_first && first_failure.ok()) {
        first_failure = closed.status().with_context(fmt::format("closing to rank {}", i));
      }
    }
    fail_everything();
  }
  stop_progress_thread();
  return first_failure;
}

// UCX aborts the process when a worker goes that still owes a callback: a peer that dies or hangs
// while a connection to it is being closed leaves such a request, which ends only once UCX itself
// has noticed.
bool UcxEnd::owes_nothing(Lock& lock) {
  const int64_t deadline_ns = monotonic_ns() + kCloseTimeout.count();
  const auto in_ucx = [](const Operation& operation) { return operation.in_ucx; };
  while (std::any_of(operations_.begin(), operations_.end(), in_ucx)) {
    if (monotonic_ns() >= deadline_ns) return false;
    if (ucp_worker_progress(worker_->get()) == 0) back_off(kNoFd, lock);
  }
  return true;
}

UcxEnd::~UcxEnd() {
  if (!worker_) return;
  {
    const Lock lock = lock_as_caller();
    fail_everything();
  }
  stop_progress_thread();
  Lock lock(mutex_);
  if (!owes_nothing(lock)) worker_->abandon();
}

}  // namespace

Result<std::unique_ptr<UcxTransport>> UcxTransport::create(const UcxOptions& options) {
  auto end = std::make_unique<UcxEnd>(options);
  PENSTOCK_TRY(end->open());
  return std::unique_ptr<UcxTransport>(std::move(end));
}

}  // namespace penstock
