#include "comm/data/reduce.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <utility>
#include <vector>

namespace penstock {
namespace {

constexpr int64_t kBlockFloats = 1024;  // of a sum: stays in the first-level cache

}  // namespace

ShardRange shard_range(int64_t count, int64_t shard_count, int64_t index) {
  PENSTOCK_CHECK(count >= 0 && index >= 0 && index < shard_count, count, shard_count, index);
  const int64_t size = count / shard_count;
  const int64_t longer = count % shard_count;
  const int64_t begin = index * size + std::min(index, longer);
  return {begin, begin + size + (index < longer ? 1 : 0)};
}

class Reducer::Impl {
 public:
  Impl(Transport* transport, uint64_t scratch_bytes)
      : transport_(transport), scratch_(scratch_bytes / sizeof(double)) {
    PENSTOCK_CHECK(scratch_bytes >= kScratchBytesMin, scratch_bytes);
    for (Round& round : rounds_) round.handles.reserve(2 * kMembersMax);
  }

  Status reduce_scatter_sum(std::span<const Rank> ranks, Tag tag, std::span<float> values);
  Status all_gather(std::span<const Rank> ranks, Tag tag, std::span<float> values);
  Status all_reduce_sum(std::span<const Rank> ranks, Tag tag, std::span<double> values);

 private:
  // Transfers started together and waited for together.
  struct Round {
    std::vector<TransferHandle> handles;  // capacity fixed at construction
  };

  // One reduce-scatter under way.
  struct Scatter {
    std::span<const Rank> ranks;
    Tag tag;
    std::span<float> values;
    size_t self;
    int64_t chunk;  // floats of one shard moved per round

    ShardRange piece(size_t member, int64_t round) const {
      const ShardRange shard = shard_range(std::ssize(values), std::ssize(ranks), member);
      const int64_t begin = std::min(shard.end, shard.begin + round * chunk);
      return {begin, std::min(shard.end, begin + chunk)};
    }
  };

  size_t index_in(std::span<const Rank> ranks) const;
  void send(Round& round, Rank peer, Tag tag, Bytes bytes) {
    round.handles.push_back(transport_->send(peer, tag, bytes));
  }
  void receive(Round& round, Rank peer, Tag tag, MutableBytes into) {
    round.handles.push_back(transport_->receive(peer, tag, into));
  }
  Status wait(Round& round, uint64_t bytes_due);
  Status fail(Status status);
  float* landing(const Scatter& scatter, size_t member, int64_t round);
  uint64_t start_round(const Scatter& scatter, int64_t round);
  void add_in_order(const Scatter& scatter, int64_t round);

  Transport* const transport_;
  std::vector<double> scratch_;  // as raw storage; double for its alignment
  std::array<Round, 2> rounds_;  // a round is under way while the one before it is added up
};

// ---- helpers

size_t Reducer::Impl::index_in(std::span<const Rank> ranks) const {
  PENSTOCK_CHECK(!ranks.empty() && std::ssize(ranks) <= kMembersMax, ranks.size());
  if (transport_ == nullptr) {
    PENSTOCK_CHECK(ranks.size() == 1, ranks.size());
    return 0;
  }
  const auto self = std::find(ranks.begin(), ranks.end(), transport_->rank());
  PENSTOCK_CHECK(self != ranks.end() && std::count(self + 1, ranks.end(), *self) == 0,
                 transport_->rank());
  return static_cast<size_t>(self - ranks.begin());
}

// Waits for a round's transfers, which must have moved `bytes_due` together.
Status Reducer::Impl::wait(Round& round, uint64_t bytes_due) {
  uint64_t bytes = 0;
  for (TransferHandle& handle : round.handles) {
    const Result<uint64_t> moved = transport_->wait(std::exchange(handle, {}));
    if (!moved.ok()) return fail(moved.status());
    bytes += *moved;
  }
  round.handles.clear();
  if (bytes == bytes_due) return {};
  return fail(data_loss(
      fmt::format("a collective moved {} bytes where {} were due: its members disagree about sizes",
                  bytes, bytes_due)));
}

// A failed collective is final: nothing may be left that writes into the caller's buffers.
Status Reducer::Impl::fail(Status status) {
  transport_->abort();
  for (Round& round : rounds_) {
    for (const TransferHandle handle : round.handles) {
      if (handle.valid()) (void)transport_->wait(handle);
    }
    round.handles.clear();
  }
  return status;
}

// ---- reduce-scatter

// Where a member's piece lands: scratch holds two rounds of one chunk per other member.
float* Reducer::Impl::landing(const Scatter& scatter, size_t member, int64_t round) {
  const auto others = static_cast<int64_t>(scatter.ranks.size()) - 1;
  const auto place = static_cast<int64_t>(member < scatter.self ? member : member - 1);
  return reinterpret_cast<float*>(scratch_.data()) + ((round % 2) * others + place) * scatter.chunk;
}

// Returns the bytes the round will move, both ways.
uint64_t Reducer::Impl::start_round(const Scatter& scatter, int64_t round) {
  Round& under_way = rounds_[static_cast<size_t>(round % 2)];
  const ShardRange mine = scatter.piece(scatter.self, round);
  uint64_t bytes = 0;
  for (size_t member = 0; member < scatter.ranks.size(); ++member) {
    if (member == scatter.self) continue;
    if (mine.size() > 0) {
      const std::span<float> into(landing(scatter, member, round), mine.size());
      receive(under_way, scatter.ranks[member], scatter.tag, std::as_writable_bytes(into));
      bytes += into.size_bytes();
    }
    const ShardRange theirs = scatter.piece(member, round);
    if (theirs.size() > 0) {
      const std::span<const float> from = scatter.values.subspan(theirs.begin, theirs.size());
      send(under_way, scatter.ranks[member], scatter.tag, std::as_bytes(from));
      bytes += from.size_bytes();
    }
  }
  return bytes;
}

void Reducer::Impl::add_in_order(const Scatter& scatter, int64_t round) {
  const ShardRange mine = scatter.piece(scatter.self, round);
  float* const own = scatter.values.data() + mine.begin;
  std::array<float, kBlockFloats> sum;
  for (int64_t at = 0; at < mine.size(); at += kBlockFloats) {
    const int64_t count = std::min(kBlockFloats, mine.size() - at);
    for (size_t member = 0; member < scatter.ranks.size(); ++member) {
      const float* const addend =
          (member == scatter.self ? own : landing(scatter, member, round)) + at;
      if (member == 0) {
        std::memcpy(sum.data(), addend, static_cast<size_t>(count) * sizeof(float));
      } else {
        for (int64_t i = 0; i < count; ++i) sum[static_cast<size_t>(i)] += addend[i];
      }
    }
    std::memcpy(own + at, sum.data(), static_cast<size_t>(count) * sizeof(float));
  }
}

Status Reducer::Impl::reduce_scatter_sum(std::span<const Rank> ranks, Tag tag,
                                         std::span<float> values) {
  const size_t self = index_in(ranks);
  const auto members = std::ssize(ranks);
  if (members == 1 || values.empty()) return {};
  const int64_t scratch_floats = std::ssize(scratch_) * 2;
  const int64_t chunk = scratch_floats / (2 * (members - 1));
  PENSTOCK_CHECK(chunk > 0, members, scratch_floats);
  const Scatter scatter{ranks, tag, values, self, chunk};
  const int64_t longest_shard = shard_range(std::ssize(values), members, 0).size();
  const int64_t round_count = (longest_shard + chunk - 1) / chunk;
  uint64_t bytes_due = start_round(scatter, 0);
  for (int64_t round = 0; round < round_count; ++round) {
    const uint64_t bytes_due_next = round + 1 < round_count ? start_round(scatter, round + 1) : 0;
    PENSTOCK_TRY(wait(rounds_[static_cast<size_t>(round % 2)], bytes_due));
    add_in_order(scatter, round);
    bytes_due = bytes_due_next;
  }
  return {};
}

// ---- the others

Status Reducer::Impl::all_gather(std::span<const Rank> ranks, Tag tag, std::span<float> values) {
  const size_t self = index_in(ranks);
  const auto shard_of = [&](size_t member) {
    const ShardRange shard = shard_range(std::ssize(values), std::ssize(ranks), member);
    return values.subspan(shard.begin, shard.size());
  };
  uint64_t bytes_due = 0;
  for (size_t member = 0; member < ranks.size(); ++member) {
    if (member == self) continue;
    if (!shard_of(member).empty()) {
      receive(rounds_[0], ranks[member], tag, std::as_writable_bytes(shard_of(member)));
    }
    if (!shard_of(self).empty()) {
      send(rounds_[0], ranks[member], tag, std::as_bytes(shard_of(self)));
    }
    bytes_due += shard_of(member).size_bytes() + shard_of(self).size_bytes();
  }
  return wait(rounds_[0], bytes_due);
}

Status Reducer::Impl::all_reduce_sum(std::span<const Rank> ranks, Tag tag,
                                     std::span<double> values) {
  const size_t self = index_in(ranks);
  const size_t others = ranks.size() - 1;
  PENSTOCK_CHECK(others * values.size() <= scratch_.size(), others, values.size());
  Round& round = rounds_[0];
  if (self != 0) {
    send(round, ranks[0], tag, std::as_bytes(values));
    PENSTOCK_TRY(wait(round, values.size_bytes()));
    receive(round, ranks[0], tag, std::as_writable_bytes(values));
    return wait(round, values.size_bytes());
  }
  for (size_t member = 1; member <= others; ++member) {
    const std::span<double> into(scratch_.data() + (member - 1) * values.size(), values.size());
    receive(round, ranks[member], tag, std::as_writable_bytes(into));
  }
  PENSTOCK_TRY(wait(round, others * values.size_bytes()));
  for (size_t member = 1; member <= others; ++member) {
    const double* const addend = scratch_.data() + (member - 1) * values.size();
    for (size_t i = 0; i < values.size(); ++i) values[i] += addend[i];
  }
  for (size_t member = 1; member <= others; ++member) {
    send(round, ranks[member], tag, std::as_bytes(values));
  }
  return wait(round, others * values.size_bytes());
}

// ---- the public face

Reducer::Reducer(Transport* transport, uint64_t scratch_bytes)
    : impl_(std::make_unique<Impl>(transport, scratch_bytes)) {}
Reducer::~Reducer() = default;

Status Reducer::reduce_scatter_sum(std::span<const Rank> ranks, Tag tag, std::span<float> values) {
  return impl_->reduce_scatter_sum(ranks, tag, values);
}
Status Reducer::all_gather(std::span<const Rank> ranks, Tag tag, std::span<float> values) {
  return impl_->all_gather(ranks, tag, values);
}
Status Reducer::all_reduce_sum(std::span<const Rank> ranks, Tag tag, std::span<double> values) {
  return impl_->all_reduce_sum(ranks, tag, values);
}
Status Reducer::barrier(std::span<const Rank> ranks, Tag tag) {
  return impl_->all_reduce_sum(ranks, tag, {});
}

}  // namespace penstock
