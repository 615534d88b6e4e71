#include "worker/agent/state_holders.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

#include "comm/run/held_state.h"

namespace penstock {
namespace {

// The head is in a mapping that the rank's process shared: atomics of another process, which is
// gone.
Result<HeldState> read_head(const FileDescriptor& memory) {
  struct stat info = {};
  if (::fstat(memory.get(), &info) != 0) return errno_status(errno, "state of a rank");
  const auto byte_count = static_cast<uint64_t>(info.st_size);
  if (byte_count < kHeldStateHeadBytes) return data_loss("no state of a rank");
  void* const mapping =
      ::mmap(nullptr, kHeldStateHeadBytes, PROT_READ, MAP_SHARED, memory.get(), 0);
  if (mapping == MAP_FAILED) return errno_status(errno, "state of a rank");
  Result<HeldState> held = read_held_state(*static_cast<const HeldStateHead*>(mapping), byte_count);
  ::munmap(mapping, kHeldStateHeadBytes);
  return held;
}

}  // namespace

Result<Path> StateHolders::hold(JobId job, Epoch epoch, Rank rank, bool from_memory) {
  Holder& holder = holders_[{job, rank}];
  if (!from_memory || !holder.memory.valid()) {
    const std::string name = fmt::format("penstock-state job {} rank {}", job, rank);
    holder.memory = FileDescriptor(::memfd_create(name.c_str(), MFD_CLOEXEC));
    if (!holder.memory.valid()) {
      const Status status = errno_status(errno, name);
      holders_.erase({job, rank});
      return status;
    }
  }
  holder.epoch = epoch;
  return Path(fmt::format("/proc/{}/fd/{}", ::getpid(), holder.memory.get()));
}

FileDescriptor StateHolders::share(JobId job, Epoch epoch, Rank rank) const {
  const auto found = holders_.find({job, rank});
  if (found == holders_.end() || found->second.epoch != epoch) return {};
  return FileDescriptor(::fcntl(found->second.memory.get(), F_DUPFD_CLOEXEC, 0));
}

std::map<Rank, FileDescriptor> StateHolders::share(const MirrorRanks& order) const {
  std::map<Rank, FileDescriptor> memory;
  for (const MirrorTarget& target : order.send) {
    FileDescriptor held = share(order.job, order.epoch, target.rank);
    if (held.valid()) memory.emplace(target.rank, std::move(held));
  }
  return memory;
}

std::vector<HeldRank> StateHolders::held(JobId job) const {
  std::vector<HeldRank> ranks;
  for (const auto& [key, holder] : holders_) {
    if (key.first != job) continue;
    const Result<HeldState> state = read_head(holder.memory);
    if (!state.ok() || state->steps.empty()) continue;
    if (state->identity.job != job || state->identity.rank != key.second) continue;
    ranks.push_back({key.second, state->steps});
  }
  return ranks;
}

void StateHolders::drop_before(JobId job, Epoch epoch) {
  std::erase_if(holders_, [&](const auto& entry) {
    return entry.first.first == job && entry.second.epoch < epoch;
  });
}

}  // namespace penstock
