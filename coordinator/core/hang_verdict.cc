#include "coordinator/core/hang_verdict.h"

#include <fmt/format.h>

#include <algorithm>

#include "comm/base/counted.h"

namespace penstock {
namespace {

constexpr size_t kWaitersNamedMax = 8;

// Loaded, or done with its last save: what comes next is the coordinator's to say.
bool awaits_coordinator(const RankActivity& rank) {
  return rank.recorded &&
         (rank.state.phase == FlightPhase::kReady || rank.state.phase == FlightPhase::kCommitting);
}

bool is_stopped(const RankActivity& rank) {
  return rank.process == ProcessState::kStopped;
}

std::string_view process_words(ProcessState state) {
  switch (state) {
    case ProcessState::kRunning:
      return "its process computes";
    case ProcessState::kSleeping:
      return "its process sleeps";
    case ProcessState::kDiskSleep:
      return "its process is held up in the kernel, by storage or a network file system";
    case ProcessState::kStopped:
      return "its process is stopped, by SIGSTOP or a debugger";
    case ProcessState::kEnded:
      return "its process has ended";
    case ProcessState::kUnknown:
      break;
  }
  return "the state of its process is not known";
}

class Inquiry {
 public:
  Inquiry(const std::vector<const RankActivity*>& ranks, const std::vector<std::string>& hosts,
          const HangLimits& limits)
      : ranks_(ranks), hosts_(hosts), limits_(limits) {}

  std::optional<HangVerdict> verdict() const {
    // A process that is stopped is evidence by itself: who still moves will come to wait for it.
    for (size_t rank = 0; rank < ranks_.size(); ++rank) {
      if (ranks_[rank] && is_stopped(*ranks_[rank]) && is_quiet(rank)) return accuse(rank);
    }
    for (size_t rank = 0; rank < ranks_.size(); ++rank) {
      if (ranks_[rank] && !awaits_coordinator(*ranks_[rank]) && !is_quiet(rank)) return {};
    }
    const std::optional<size_t> root = most_waited_for();
    if (root) return accuse(*root);
    return circle();
  }

  std::optional<HangVerdict> unreachable(const std::vector<bool>& unheard,
                                         Duration patience) const {
    std::vector<size_t> waiting(ranks_.size(), 0);
    for (size_t rank = 0; rank < ranks_.size(); ++rank) {
      if (!ranks_[rank] && unheard[rank]) continue;
      if (!ranks_[rank]) return {};  // it may move
      if (!awaits_coordinator(*ranks_[rank]) && quiet(rank) < patience) return {};
      const size_t end = end_of(rank);
      if (!ranks_[end] && unheard[end]) ++waiting[end];
    }
    const auto most = std::max_element(waiting.begin(), waiting.end());
    if (most == waiting.end() || *most == 0) return {};
    const auto rank = static_cast<size_t>(most - waiting.begin());
    return HangVerdict{Rank{static_cast<int32_t>(rank)},
                       fmt::format("{} cannot be heard{}", name(rank), waiters(rank)),
                       {}};
  }

 private:
  Duration quiet(size_t rank) const { return std::chrono::milliseconds(ranks_[rank]->quiet_ms); }
  bool is_quiet(size_t rank) const {
    const RankActivity& activity = *ranks_[rank];
    const bool in_step = activity.recorded && activity.state.phase == FlightPhase::kTraining;
    const Duration limit = is_stopped(activity) ? limits_.stopped
                           : in_step            ? limits_.training
                                                : limits_.slow;
    return quiet(rank) >= limit;
  }
  // The rank that `rank` waits for, where both are known to be part of the job.
  std::optional<size_t> waits_for(size_t rank) const {
    const RankActivity* activity = ranks_[rank];
    if (!activity || !activity->recorded || activity->state.peer < 0) return {};
    const auto peer = static_cast<size_t>(activity->state.peer);
    return peer < ranks_.size() ? std::optional(peer) : std::nullopt;
  }
  // Stuck by itself.
  bool is_root(size_t rank) const {
    const RankActivity* activity = ranks_[rank];
    return activity && !waits_for(rank) && !awaits_coordinator(*activity) &&
           activity->process != ProcessState::kEnded;
  }
  // Where the edges from `rank` lead: the end, or the first rank of a circle.
  size_t end_of(size_t rank) const {
    for (size_t i = 0; i < ranks_.size(); ++i) {
      const std::optional<size_t> next = waits_for(rank);
      if (!next) break;
      rank = *next;
    }
    return rank;
  }
  // Of the ranks that are stuck by themselves the one that most others wait for, then the one that
  // has been for longest.
  std::optional<size_t> most_waited_for() const {
    std::vector<size_t> waiting(ranks_.size(), 0);
    for (size_t rank = 0; rank < ranks_.size(); ++rank) ++waiting[end_of(rank)];
    std::optional<size_t> most;
    for (size_t rank = 0; rank < ranks_.size(); ++rank) {
      if (!is_root(rank)) continue;
      const bool better = !most || waiting[rank] > waiting[*most] ||
                          (waiting[rank] == waiting[*most] && quiet(rank) > quiet(*most));
      if (better) most = rank;
    }
    return most;
  }

  std::string name(size_t rank) const { return fmt::format("rank {} on {}", rank, hosts_[rank]); }
  std::string doing(size_t rank) const {
    const RankActivity& activity = *ranks_[rank];
    return activity.recorded ? to_sentence(activity.state)
                             : "without a flight record, so before it loaded";
  }
  // "; rank 0 on w0 waits for it in receive(B), micro-batch 2, step 41".
  std::string waiters(size_t hung) const {
    std::string text;
    size_t direct = 0;
    size_t others = 0;
    for (size_t rank = 0; rank < ranks_.size(); ++rank) {
      if (rank == hung || !waits_for(rank)) continue;
      if (waits_for(rank) != hung) {
        others += end_of(rank) == hung ? 1 : 0;
        continue;
      }
      if (++direct > kWaitersNamedMax) continue;
      FlightState operation = ranks_[rank]->state;
      operation.peer = -1;
      text += fmt::format("; {} waits for it {}", name(rank), to_sentence(operation));
    }
    if (direct > kWaitersNamedMax)
      text += fmt::format("; so do {} more", direct - kWaitersNamedMax);
    if (others > 0) {
      text += fmt::format("; {} {} for those", counted(static_cast<int64_t>(others), "rank"),
                          others == 1 ? "waits" : "wait");
    }
    return text;
  }
  HangVerdict accuse(size_t rank) const {
    return {
        Rank{static_cast<int32_t>(rank)},
        fmt::format("{} has not moved for {:.1f} s, {}: {}{}", name(rank), to_seconds(quiet(rank)),
                    doing(rank), process_words(ranks_[rank]->process), waiters(rank)),
        ranks_[rank]->log_tail};
  }

  // Ranks that wait for each other: some message was never sent, or lost.
  std::optional<HangVerdict> circle() const {
    for (size_t start = 0; start < ranks_.size(); ++start) {
      const size_t first = end_of(start);
      if (!waits_for(first)) continue;
      std::string members;
      size_t rank = first;
      for (size_t i = 0; i < kWaitersNamedMax; ++i) {
        members += fmt::format("{}{} is {}", i == 0 ? "" : "; ", name(rank), doing(rank));
        rank = *waits_for(rank);
        if (rank == first) break;
      }
      return HangVerdict{Rank{static_cast<int32_t>(first)},
                         fmt::format("ranks have waited for each other for {:.1f} s: {}",
                                     to_seconds(quiet(first)), members),
                         ranks_[first]->log_tail};
    }
    return {};
  }

  const std::vector<const RankActivity*>& ranks_;
  const std::vector<std::string>& hosts_;
  const HangLimits& limits_;
};

}  // namespace

std::optional<HangVerdict> find_hung(const std::vector<const RankActivity*>& ranks,
                                     const std::vector<std::string>& hosts,
                                     const HangLimits& limits) {
  return Inquiry(ranks, hosts, limits).verdict();
}

std::optional<HangVerdict> find_unreachable(const std::vector<const RankActivity*>& ranks,
                                            const std::vector<std::string>& hosts,
                                            const std::vector<bool>& unheard, Duration patience) {
  return Inquiry(ranks, hosts, {}).unreachable(unheard, patience);
}

}  // namespace penstock
