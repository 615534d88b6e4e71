#include "coordinator/core/slow_ranks.h"

#include <algorithm>
#include <cmath>
#include <map>

#include "comm/base/check.h"
#include "comm/run/layout.h"

namespace penstock {
namespace {

// So many times the spread of what is usual is not noise any more.
constexpr double kSigmas = 5.0;
constexpr double kSigmaPerMad = 1.4826;  // of a normal distribution
// In a group of more a rank is compared with all of it: it hardly moves the median, and finding one
// for each rank would take the square of their number.
constexpr size_t kOwnMedianRanksMax = 16;

double median(std::vector<double> values) {
  if (values.empty()) return 0.0;
  const auto middle = values.begin() + static_cast<std::ptrdiff_t>(values.size() / 2);
  std::nth_element(values.begin(), middle, values.end());
  if (values.size() % 2 == 1) return *middle;
  return (*middle + *std::max_element(values.begin(), middle)) / 2.0;
}

double spread(const std::vector<double>& values) {
  const double centre = median(values);
  std::vector<double> distances;
  for (const double value : values) distances.push_back(std::abs(value - centre));
  return kSigmaPerMad * median(std::move(distances));
}

double share_of_waiting(const RankRate& rate) {
  const double all = rate.busy_seconds + rate.wait_seconds;
  return all > 0.0 ? rate.wait_seconds / all : 0.0;
}

// Ranks with one key do the same; without `expert`, but for the load of their experts.
int64_t key_of(const ParallelismSpec& grid, Rank rank, bool expert) {
  const GridPosition at = grid_position(grid, rank);
  int64_t stages = at.pipeline_index;
  // The twin has the same two stages.
  if (grid.schedule == Schedule::kDualPipe) stages = std::min(stages, grid.pipeline - 1 - stages);
  return expert ? stages * grid.expert + at.expert_index : stages;
}

class Judge {
 public:
  Judge(const ParallelismSpec& grid, const std::deque<PaceWindow>& windows,
        const SlowLimits& limits)
      : grid_(grid), windows_(windows), limits_(limits), ranks_(grid.world_size()) {
    for (const bool expert : {false, true}) {
      for (int32_t rank = 0; rank < ranks_; ++rank) {
        alike_[expert][key_of(grid, Rank{rank}, expert)].push_back(rank);
      }
    }
    for (size_t i = 0; i < kSlowWindows; ++i) {
      std::vector<double> shares;
      for (const RankRate& rate : newest(i).ranks) shares.push_back(share_of_waiting(rate));
      usual_waits_.push_back(median(std::move(shares)));
    }
  }

  RankPaceVerdict judge(int32_t rank) {
    const std::vector<int32_t> same = peers_of(rank, true);
    if (same.size() >= 2) return against_peers(rank, same, true, limits_.ratio);
    const std::vector<int32_t> similar = peers_of(rank, false);
    if (!similar.empty()) {
      return against_peers(rank, similar, false, limits_.ratio * std::max(1.0, limits_.imbalance));
    }
    return against_past(rank);
  }

 private:
  // 0 is the oldest of those that are judged.
  const PaceWindow& newest(size_t i) const { return windows_[windows_.size() - kSlowWindows + i]; }
  double busy(const PaceWindow& window, int32_t rank) const {
    return window.ranks[static_cast<size_t>(rank)].busy_seconds;
  }
  std::vector<int32_t> peers_of(int32_t rank, bool expert) const {
    std::vector<int32_t> peers = alike_[expert].at(key_of(grid_, Rank{rank}, expert));
    std::erase(peers, rank);
    return peers;
  }

  // What ranks that do the same compute, by window, and how far they differ in it.
  struct Usual {
    std::vector<double> seconds;
    double spread = 0.0;
  };
  Usual usual_of(const std::vector<int32_t>& ranks) const {
    Usual usual;
    std::vector<double> samples;
    for (size_t i = 0; i < kSlowWindows; ++i) {
      std::vector<double> values;
      for (const int32_t rank : ranks) values.push_back(busy(newest(i), rank));
      usual.seconds.push_back(median(values));
      for (const double value : values) {
        samples.push_back(usual.seconds.back() > 0.0 ? value / usual.seconds.back() : 0.0);
      }
    }
    usual.spread = spread(samples);
    return usual;
  }

  RankPaceVerdict against_peers(int32_t rank, const std::vector<int32_t>& peers, bool expert,
                                double limit) {
    RankPaceVerdict verdict;
    if (peers.size() < kOwnMedianRanksMax) {
      verdict = conclude(rank, usual_of(peers), limit);
    } else {
      const int64_t key = key_of(grid_, Rank{rank}, expert);
      const auto known = usual_[expert].find(key);
      const Usual& usual = known != usual_[expert].end()
                               ? known->second
                               : usual_[expert][key] = usual_of(alike_[expert].at(key));
      verdict = conclude(rank, usual, limit);
    }
    verdict.peers = std::ssize(peers);
    return verdict;
  }

  RankPaceVerdict against_past(int32_t rank) const {
    const size_t past = windows_.size() - kSlowWindows;
    if (past < kSlowWindows || ranks_ < 2) return {};
    const auto median_before = [&](int32_t of) {
      std::vector<double> values;
      for (size_t i = 0; i < past; ++i) values.push_back(busy(windows_[i], of));
      return median(std::move(values));
    };
    const double own = median_before(rank);
    std::vector<double> samples;
    for (size_t i = 0; i < past; ++i) {
      samples.push_back(own > 0.0 ? busy(windows_[i], rank) / own : 0.0);
    }
    Usual usual;
    usual.spread = spread(samples);
    for (size_t i = 0; i < kSlowWindows; ++i) {
      std::vector<double> changes;  // of all others: larger batches, a machine that is shared
      for (int32_t other = 0; other < ranks_; ++other) {
        const double before = median_before(other);
        if (other != rank && before > 0.0) changes.push_back(busy(newest(i), other) / before);
      }
      usual.seconds.push_back(own * median(std::move(changes)));
    }
    return conclude(rank, usual, limits_.ratio);
  }

  RankPaceVerdict conclude(int32_t rank, const Usual& usual, double limit) const {
    RankPaceVerdict verdict;
    std::vector<double> ratios;
    std::vector<double> seconds;
    std::vector<double> waits;
    bool all_slow = true;
    bool all_usual = true;
    for (size_t i = 0; i < kSlowWindows; ++i) {
      if (usual.seconds[i] <= 0.0) return {};
      seconds.push_back(busy(newest(i), rank));
      ratios.push_back(seconds.back() / usual.seconds[i]);
      waits.push_back(share_of_waiting(newest(i).ranks[static_cast<size_t>(rank)]));
      const bool beyond = ratios.back() > limit;
      all_slow = all_slow && beyond && waits.back() <= usual_waits_[i];
      all_usual = all_usual && !beyond;
    }
    verdict.ratio = median(ratios);
    verdict.busy_seconds = median(seconds);
    verdict.usual_seconds = median(usual.seconds);
    verdict.wait_share = median(waits);
    verdict.peers_wait_share = median(usual_waits_);
    verdict.since_step = newest(0).first_step;
    verdict.slow = all_slow && verdict.ratio > 1.0 + kSigmas * usual.spread;
    verdict.usual = all_usual;
    return verdict;
  }

  const ParallelismSpec& grid_;
  const std::deque<PaceWindow>& windows_;
  const SlowLimits& limits_;
  const int64_t ranks_;
  std::map<int64_t, std::vector<int32_t>> alike_[2];  // by whether the expert index counts
  std::map<int64_t, Usual> usual_[2];                 // of large groups
  std::vector<double> usual_waits_;
};

}  // namespace

std::vector<RankPaceVerdict> judge_pace(const ParallelismSpec& parallelism,
                                        const std::deque<PaceWindow>& windows,
                                        const SlowLimits& limits) {
  if (windows.size() < kSlowWindows) return {};
  for (const PaceWindow& window : windows) {
    PENSTOCK_CHECK(std::ssize(window.ranks) == parallelism.world_size());
  }
  Judge judge(parallelism, windows, limits);
  std::vector<RankPaceVerdict> verdicts;
  for (int32_t rank = 0; rank < parallelism.world_size(); ++rank) {
    verdicts.push_back(judge.judge(rank));
  }
  return verdicts;
}

}  // namespace penstock
