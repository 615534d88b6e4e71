// Identities. One struct per kind, so that a worker's number can never be passed where a rank's is
// meant.
#pragma once

#include <fmt/format.h>

#include <compare>
#include <cstdint>
#include <functional>

namespace penstock {

// An identity of kind Tag. 0 means "none" for every kind except Rank, whose numbers start at 0.
template <typename Tag, typename Number>
struct Id {
  Number value = 0;
  auto operator<=>(const Id&) const = default;
};

using JobId = Id<struct JobTag, uint64_t>;        // given at submission, never reused
using WorkerId = Id<struct WorkerTag, uint64_t>;  // given at a worker daemon's first registration
using Rank = Id<struct RankTag, int32_t>;  // position in a job's rank grid, 0 … world size - 1
// Attempt number of one job: 1 for its first start, one more for every recovery. Messages and
// commits of a lower epoch are refused everywhere.
using Epoch = Id<struct EpochTag, uint32_t>;

}  // namespace penstock

template <typename Tag, typename Number>
struct std::hash<penstock::Id<Tag, Number>> {
  size_t operator()(const penstock::Id<Tag, Number>& id) const noexcept {
    return std::hash<Number>()(id.value);
  }
};

template <typename Tag, typename Number>
struct fmt::formatter<penstock::Id<Tag, Number>> : fmt::formatter<Number> {
  template <typename Context>
  auto format(const penstock::Id<Tag, Number>& id, Context& context) const {
    return fmt::formatter<Number>::format(id.value, context);
  }
};
