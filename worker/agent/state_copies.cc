#include "worker/agent/state_copies.h"

#include <sys/stat.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <new>

namespace penstock {
namespace {

// Jobs are numbered upwards, and the fence of one that is over is of no use any more.
constexpr size_t kFencesMax = 10'000;

// The head of memory whose owner may be writing to it. Read by a system call, since a mapping would
// be no more if the owner changed the file's size.
struct HeadReader {
  alignas(HeldStateHead) std::array<std::byte, kHeldStateHeadBytes> bytes = {};
  uint64_t byte_count = 0;  // of the whole memory

  Result<const HeldStateHead*> read(const FileDescriptor& memory) {
    struct stat info = {};
    if (::fstat(memory.get(), &info) != 0) return errno_status(errno, "state of a rank");
    byte_count = static_cast<uint64_t>(info.st_size);
    PENSTOCK_TRY(read_at(memory.get(), "state of a rank", 0, bytes));
    return reinterpret_cast<const HeldStateHead*>(bytes.data());
  }
};

constexpr size_t kNone = kStateGenerations;

size_t generation_of(const HeldStateHead& head, int64_t step) {
  for (size_t g = 0; g < kStateGenerations; ++g) {
    if (head.steps[g].load(std::memory_order_relaxed) == step) return g;
  }
  return kNone;
}

}  // namespace

StateCopy::StateCopy(const HeldStateIdentity& identity, Epoch epoch, int64_t step,
                     uint64_t byte_count, std::shared_ptr<std::atomic<uint64_t>> total)
    : identity_(identity),
      epoch_(epoch),
      step_(step),
      byte_count_(byte_count),
      total_(std::move(total)),
      bytes_(new (std::nothrow) std::byte[byte_count]) {}

Result<std::shared_ptr<StateCopy>> StateCopies::make(const HeldStateIdentity& identity, Epoch epoch,
                                                     int64_t step, uint64_t byte_count) {
  uint64_t total = *total_;
  do {
    if (byte_count > bytes_max_ || total > bytes_max_ - byte_count) {
      return resource_exhausted(fmt::format(
          "{} bytes of copies of ranks' state are kept here, and {} more would be over the bound "
          "of {} (penstock-worker --copies-mib)",
          total, byte_count, bytes_max_));
    }
  } while (!total_->compare_exchange_weak(total, total + byte_count));
  auto copy = std::make_shared<StateCopy>(identity, epoch, step, byte_count, total_);
  if (!copy->has_memory()) {
    return resource_exhausted(fmt::format("no memory for {} bytes of a rank's state", byte_count));
  }
  return copy;
}

Status StateCopies::put(std::shared_ptr<const StateCopy> copy) {
  const std::lock_guard lock(mutex_);
  const HeldStateIdentity& of = copy->identity();
  const auto fence = fences_.find(of.job);
  if (fence != fences_.end() && copy->epoch() <= fence->second) {
    return aborted("the attempt that trained this state is over");
  }
  copies_[{of.job, copy->epoch(), of.rank, copy->step()}] = std::move(copy);
  return {};
}

std::shared_ptr<const StateCopy> StateCopies::find(JobId job, Epoch epoch, Rank rank,
                                                   int64_t step) const {
  const std::lock_guard lock(mutex_);
  const auto found = copies_.find({job, epoch, rank, step});
  return found == copies_.end() ? nullptr : found->second;
}

std::vector<HeldRank> StateCopies::list(JobId job, Epoch epoch) const {
  const std::lock_guard lock(mutex_);
  std::vector<HeldRank> ranks;
  for (const auto& [key, copy] : copies_) {
    if (key.job != job || key.epoch != epoch) continue;
    if (ranks.empty() || ranks.back().rank != key.rank) ranks.push_back({key.rank, {}});
    ranks.back().steps.push_back(key.step);
  }
  return ranks;
}

void StateCopies::keep_only(JobId job, const std::set<int64_t>& steps) {
  const std::lock_guard lock(mutex_);
  std::erase_if(copies_, [&](const auto& entry) {
    return entry.first.job == job && !steps.contains(entry.first.step);
  });
}

void StateCopies::forget(JobId job, Rank rank) {
  const std::lock_guard lock(mutex_);
  std::erase_if(copies_, [&](const auto& entry) {
    return entry.first.job == job && entry.first.rank == rank;
  });
}

void StateCopies::fence(JobId job, Epoch epoch) {
  const std::lock_guard lock(mutex_);
  Epoch& fence = fences_[job];
  fence = std::max(fence, epoch);
  while (fences_.size() > kFencesMax) fences_.erase(fences_.begin());
}

void StateCopies::drop_before(JobId job, Epoch epoch) {
  const std::lock_guard lock(mutex_);
  std::erase_if(copies_, [&](const auto& entry) {
    return entry.first.job == job && entry.first.epoch < epoch;
  });
}

Result<std::shared_ptr<StateCopy>> copy_held_state(const FileDescriptor& memory, JobId job,
                                                   Epoch epoch, Rank rank, int64_t step,
                                                   StateCopies& copies) {
  HeadReader reader;
  PENSTOCK_TRY_ASSIGN(const HeldStateHead* const head, reader.read(memory));
  PENSTOCK_TRY_ASSIGN(const HeldState held, read_held_state(*head, reader.byte_count));
  if (held.identity.job != job || held.identity.rank != rank) {
    return data_loss("the memory is of another rank");
  }
  const size_t generation = generation_of(*head, step);
  if (generation == kNone) {
    if (!held.steps.empty() && held.steps.back() > step) return aborted("the step is overwritten");
    return unavailable("the step is not finished");
  }
  PENSTOCK_TRY_ASSIGN(std::shared_ptr<StateCopy> copy,
                      copies.make(held.identity, epoch, step, held.generation_bytes));
  const uint64_t offset = held_state_bytes(0) + generation * held.generation_bytes;
  PENSTOCK_TRY(read_at(memory.get(), "state of a rank", offset, copy->bytes()));
  // As a reader of a sequence lock: a rank that began to write to it has said so before.
  std::atomic_thread_fence(std::memory_order_seq_cst);
  PENSTOCK_TRY_ASSIGN(const HeldStateHead* const after, reader.read(memory));
  if (generation_of(*after, step) != generation) {
    return aborted("the step was overwritten while it was copied");
  }
  return copy;
}

}  // namespace penstock
