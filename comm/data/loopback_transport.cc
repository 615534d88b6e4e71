#include "comm/data/loopback_transport.h"

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstring>
#include <mutex>

namespace penstock {
namespace {

enum class OperationState { kFree, kPending, kComplete };

struct Operation {
  OperationState state = OperationState::kFree;
  bool is_send = false;
  Rank peer;
  Tag tag;
  const std::byte* source = nullptr;  // of a send
  std::byte* target = nullptr;        // of a receive
  uint64_t size = 0;
  uint64_t moved = 0;  // when complete and kOk
  int64_t completed_ns = 0;
  Code code = Code::kOk;  // when complete
};

struct End {
  std::vector<Operation> operations;  // by handle index; never resized
  std::vector<uint32_t> free;         // indices in state kFree
  std::vector<uint32_t> pending;  // in posting order, which is what keeps a tag's messages in order
  std::condition_variable changed;
  bool aborted = false;
  bool dead = false;
  std::atomic<uint64_t> bytes_sent{0};
};

// Everything is guarded by `mutex`, the copies included: simple, and data races are impossible.
struct World {
  explicit World(int32_t world_size, const LoopbackOptions& options)
      : options(options), ends(static_cast<size_t>(world_size)) {
    for (End& end : ends) {
      end.operations.resize(options.operations_max);
      end.pending.reserve(options.operations_max);
      for (uint32_t i = options.operations_max; i > 0; --i) end.free.push_back(i - 1);
    }
  }
  End& end_of(Rank rank) { return ends[static_cast<size_t>(rank.value)]; }

  const LoopbackOptions options;
  std::mutex mutex;
  std::vector<End> ends;
};

void complete(End& end, uint32_t index, Code code, uint64_t moved) {
  Operation& operation = end.operations[index];
  operation.state = OperationState::kComplete;
  operation.code = code;
  operation.moved = moved;
  operation.completed_ns = monotonic_ns();
  end.pending.erase(std::find(end.pending.begin(), end.pending.end(), index));
  end.changed.notify_all();
}

template <typename Predicate>
void fail_pending(End& end, Code code, Predicate applies) {
  for (size_t i = end.pending.size(); i > 0; --i) {
    const uint32_t index = end.pending[i - 1];
    if (applies(end.operations[index])) complete(end, index, code, 0);
  }
}

class LoopbackEnd final : public LoopbackTransport {
 public:
  LoopbackEnd(std::shared_ptr<World> world, Rank rank)
      : world_(std::move(world)), rank_(rank), end_(world_->end_of(rank)) {}
  ~LoopbackEnd() override { kill(); }

  Rank rank() const override { return rank_; }
  int32_t world_size() const override { return static_cast<int32_t>(world_->ends.size()); }

  TransferHandle send(Rank peer, Tag tag, Bytes bytes) override {
    end_.bytes_sent.fetch_add(bytes.size(), std::memory_order_relaxed);
    Operation operation;
    operation.is_send = true;
    operation.source = bytes.data();
    operation.size = bytes.size();
    return post(peer, tag, operation);
  }

  TransferHandle receive(Rank peer, Tag tag, MutableBytes into) override {
    Operation operation;
    operation.target = into.data();
    operation.size = into.size();
    return post(peer, tag, operation);
  }

  Result<uint64_t> wait(TransferHandle handle, int64_t* completed_ns) override {
    std::unique_lock lock(world_->mutex);
    Operation& operation = checked(handle);
    const bool in_time = end_.changed.wait_for(lock, world_->options.timeout, [&] {
      return operation.state == OperationState::kComplete;
    });
    if (!in_time) complete(end_, handle.index, Code::kDeadlineExceeded, 0);
    const Operation outcome = operation;
    operation.state = OperationState::kFree;
    end_.free.push_back(handle.index);
    if (completed_ns != nullptr) *completed_ns = outcome.completed_ns;
    if (outcome.code == Code::kOk) return outcome.moved;
    return Status(outcome.code,
                  fmt::format("{} {} rank {}, tag {:#x}: {}", outcome.is_send ? "send" : "receive",
                              outcome.is_send ? "to" : "from", outcome.peer, outcome.tag.value,
                              reason(outcome)));
  }

  bool done(TransferHandle handle) override {
    const std::lock_guard lock(world_->mutex);
    return checked(handle).state == OperationState::kComplete;
  }

  void abort() override {
    const std::lock_guard lock(world_->mutex);
    end_.aborted = true;
    fail_pending(end_, Code::kAborted, [](const Operation&) { return true; });
  }

  uint64_t bytes_sent() const override { return end_.bytes_sent.load(std::memory_order_relaxed); }

  void kill() override {
    abort();
    const std::lock_guard lock(world_->mutex);
    end_.dead = true;
    for (End& other : world_->ends) {
      fail_pending(other, Code::kUnavailable,
                   [&](const Operation& operation) { return operation.peer == rank_; });
    }
  }

 private:
  Operation& checked(TransferHandle handle) {
    PENSTOCK_CHECK(handle.index < end_.operations.size(), handle.index);
    Operation& operation = end_.operations[handle.index];
    PENSTOCK_CHECK(operation.state != OperationState::kFree, handle.index);
    return operation;
  }

  TransferHandle post(Rank peer, Tag tag, Operation operation) {
    const std::lock_guard lock(world_->mutex);
    PENSTOCK_CHECK(peer != rank_ && peer.value >= 0 && peer.value < world_size(), peer);
    PENSTOCK_CHECK(tag.value >> kTagBits == 0, tag.value);
    PENSTOCK_CHECK(!end_.free.empty(), world_->options.operations_max);
    const uint32_t index = end_.free.back();
    end_.free.pop_back();
    operation.state = OperationState::kPending;
    operation.peer = peer;
    operation.tag = tag;
    end_.operations[index] = operation;
    end_.pending.push_back(index);
    if (end_.aborted) {
      complete(end_, index, Code::kAborted, 0);
    } else if (world_->end_of(peer).dead) {
      complete(end_, index, Code::kUnavailable, 0);
    } else {
      match(index);
    }
    return {index};
  }

  // Completes operation `index` together with the peer's oldest one that answers it, if there is
  // one.
  void match(uint32_t index) {
    const Operation& mine = end_.operations[index];
    End& other_end = world_->end_of(mine.peer);
    for (const uint32_t other_index : other_end.pending) {
      const Operation& other = other_end.operations[other_index];
      if (other.is_send == mine.is_send || other.peer != rank_ ||
          other.tag.value != mine.tag.value) {
        continue;
      }
      const Operation& send = mine.is_send ? mine : other;
      const Operation& receive = mine.is_send ? other : mine;
      const bool fits = send.size <= receive.size;
      if (fits && send.size > 0) std::memcpy(receive.target, send.source, send.size);
      const uint64_t moved = send.size;
      const Code receive_code = fits ? Code::kOk : Code::kDataLoss;
      const bool mine_is_send = mine.is_send;
      complete(end_, index, mine_is_send ? Code::kOk : receive_code, moved);
      complete(other_end, other_index, mine_is_send ? receive_code : Code::kOk, moved);
      return;
    }
  }

  std::string reason(const Operation& operation) const {
    switch (operation.code) {
      case Code::kUnavailable:
        return "the peer is gone";
      case Code::kAborted:
        return "this rank was aborted";
      case Code::kDataLoss:
        return fmt::format("a message of {} bytes for a buffer of {}", operation.moved,
                           operation.size);
      default:
        return fmt::format("nothing within {} s", to_seconds(world_->options.timeout));
    }
  }

  const std::shared_ptr<World> world_;
  const Rank rank_;
  End& end_;
};

}  // namespace

std::vector<std::unique_ptr<LoopbackTransport>> make_loopback(int32_t world_size,
                                                              const LoopbackOptions& options) {
  PENSTOCK_CHECK(world_size > 0 && options.operations_max > 0, world_size);
  const auto world = std::make_shared<World>(world_size, options);
  std::vector<std::unique_ptr<LoopbackTransport>> ends;
  for (int32_t rank = 0; rank < world_size; ++rank) {
    ends.push_back(std::make_unique<LoopbackEnd>(world, Rank{rank}));
  }
  return ends;
}

}  // namespace penstock
