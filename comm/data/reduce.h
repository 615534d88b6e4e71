// Deterministic collectives over an explicit list of ranks. Every sum is taken in list order,
// element by element, so equal inputs give equal bits: on every member, every run, and after every
// recovery.
//
// All members pass the same list (this rank in it exactly once), tag and sizes, and call in the
// same order per tag. Lists of one need no transport. Large buffers move in chunks through scratch
// reserved at construction. Failures are final: a failed collective aborts its transport, because a
// rank never repairs itself. Steady state allocates nothing. Single-threaded.
#pragma once

#include <cstdint>
#include <memory>
#include <span>

#include "comm/base/ids.h"
#include "comm/base/status.h"
#include "comm/data/transport.h"

namespace penstock {

struct ShardRange {
  int64_t begin = 0;
  int64_t end = 0;
  int64_t size() const { return end - begin; }
  bool operator==(const ShardRange&) const = default;
};

// Shard `index` of `count` elements cut into `shard_count` runs as even as can be, the earlier ones
// taking one more when it does not divide; empty when index >= count. REQUIRES: 0 <= index <
// shard_count.
ShardRange shard_range(int64_t count, int64_t shard_count, int64_t index);

class Reducer {
 public:
  // `scratch_bytes`, the same on every rank, bounds the receive buffers: chunks are as large as it
  // allows for the list at hand. At least kScratchBytesMin. Borrows `transport` (may be null if
  // every list has one member).
  Reducer(Transport* transport, uint64_t scratch_bytes = uint64_t{4} << 20);
  ~Reducer();
  Reducer(const Reducer&) = delete;
  Reducer& operator=(const Reducer&) = delete;
  static constexpr uint64_t kScratchBytesMin = 64 << 10;
  static constexpr int32_t kMembersMax = 1024;

  // In place: `values` is this rank's contribution; on return its own shard,
  // shard_range(values.size(), members, own index), holds the sum ((v0 + v1) + v2) + … over members
  // in list order. The rest of `values` is unchanged.
  Status reduce_scatter_sum(std::span<const Rank> ranks, Tag tag, std::span<float> values);
  // In place: every member's shard of `values` is copied to all members.
  Status all_gather(std::span<const Rank> ranks, Tag tag, std::span<float> values);
  // In place, for small vectors (loss, token counts, squared norms, expert loads): gathered and
  // added in list order by the first member, which sends the sum back. REQUIRES: members · bytes
  // fit the scratch.
  Status all_reduce_sum(std::span<const Rank> ranks, Tag tag, std::span<double> values);
  // Returns when every member has called it.
  Status barrier(std::span<const Rank> ranks, Tag tag);

 private:
  class Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace penstock
