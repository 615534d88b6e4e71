// Copies of ranks' state in a daemon's memory: of its own ranks, taken while they train, and of
// those of other hosts, which it keeps for them. A copy is one generation of the memory of a rank
// (comm/run/held_state.h), whole, and never changes.
#pragma once

#include <atomic>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <vector>

#include "comm/base/bytes.h"
#include "comm/base/file.h"
#include "comm/control/message.h"
#include "comm/run/held_state.h"

namespace penstock {

// One, or what is to become one. Its memory counts against the bound of StateCopies until it is
// gone, whoever still uses it.
class StateCopy {
 public:
  // For StateCopies.
  StateCopy(const HeldStateIdentity& identity, Epoch epoch, int64_t step, uint64_t byte_count,
            std::shared_ptr<std::atomic<uint64_t>> total);
  ~StateCopy() { *total_ -= byte_count_; }
  StateCopy(const StateCopy&) = delete;
  StateCopy& operator=(const StateCopy&) = delete;

  const HeldStateIdentity& identity() const { return identity_; }
  Epoch epoch() const { return epoch_; }  // of the ranks that trained it
  int64_t step() const { return step_; }
  bool has_memory() const { return bytes_ != nullptr; }
  MutableBytes bytes() { return {bytes_.get(), byte_count_}; }
  Bytes bytes() const { return {bytes_.get(), byte_count_}; }

 private:
  const HeldStateIdentity identity_;
  const Epoch epoch_;
  const int64_t step_;
  const uint64_t byte_count_;
  const std::shared_ptr<std::atomic<uint64_t>> total_;
  const std::unique_ptr<std::byte[]> bytes_;
};

// Thread-safe.
class StateCopies {
 public:
  explicit StateCopies(uint64_t bytes_max) : bytes_max_(bytes_max) {}

  // Memory for a copy; nobody else sees it before put(). kResourceExhausted: it would be too much.
  Result<std::shared_ptr<StateCopy>> make(const HeldStateIdentity& identity, Epoch epoch,
                                          int64_t step, uint64_t byte_count);
  // It is whole. kAborted: its attempt was fenced meanwhile, and what is kept of that is settled.
  Status put(std::shared_ptr<const StateCopy> copy);
  // nullptr: there is none.
  std::shared_ptr<const StateCopy> find(JobId job, Epoch epoch, Rank rank, int64_t step) const;
  // Every rank of which there is a copy of that attempt, and the steps.
  std::vector<HeldRank> list(JobId job, Epoch epoch) const;

  // Of that job and of these steps only.
  void keep_only(JobId job, const std::set<int64_t>& steps);
  void forget(JobId job, Rank rank);
  // Nothing of attempts up to this one is put any more.
  void fence(JobId job, Epoch epoch);
  // Those of attempts before it go.
  void drop_before(JobId job, Epoch epoch);

  uint64_t byte_count() const { return *total_; }

 private:
  struct Key {
    JobId job;
    Epoch epoch;
    Rank rank;
    int64_t step = 0;
    auto operator<=>(const Key&) const = default;
  };

  const uint64_t bytes_max_;
  const std::shared_ptr<std::atomic<uint64_t>> total_ = std::make_shared<std::atomic<uint64_t>>(0);
  mutable std::mutex mutex_;
  std::map<Key, std::shared_ptr<const StateCopy>> copies_;  // guarded by mutex_, as is
  std::map<JobId, Epoch> fences_;                           //   this
};

// Copies the generation of `step` out of the memory of a rank that may be training, which it does
// not wait for. kUnavailable: the step is not finished yet; kAborted: the rank has overwritten it,
// or begun to meanwhile; kDataLoss: there is no state of that rank.
Result<std::shared_ptr<StateCopy>> copy_held_state(const FileDescriptor& memory, JobId job,
                                                   Epoch epoch, Rank rank, int64_t step,
                                                   StateCopies& copies);

}  // namespace penstock
