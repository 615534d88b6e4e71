// The routing of one micro-batch through one layer, as one rank of an expert group sees it: which
// of its tokens went to which member, and which rows it got from whom, for which of its experts.
// Pure bookkeeping in memory given to it; it moves no bytes between ranks.
#pragma once

#include <cstdint>
#include <span>

#include "comm/base/bytes.h"
#include "comm/base/status.h"
#include "comm/data/expert_exchange.h"
#include "comm/data/reserved_memory.h"

namespace penstock {

// Sizes that follow from an ExpertExchangeConfig.
struct ExpertShape {
  explicit ExpertShape(const ExpertExchangeConfig& config)
      : group_size(static_cast<int32_t>(config.group.size())),
        group_index(config.group_index),
        experts_per_rank(config.experts_per_rank),
        top_k(config.top_k),
        hidden_size(config.hidden_size),
        tokens_max(config.tokens_max) {}

  int32_t group_size;
  int32_t group_index;
  int32_t experts_per_rank;
  int32_t top_k;
  int32_t hidden_size;
  int32_t tokens_max;

  int32_t owner_of(int32_t expert) const { return expert / experts_per_rank; }
  uint64_t rows_max() const { return uint64_t{1} * group_size * tokens_max; }
  // A token can have at most this many of its experts on one rank.
  int32_t experts_here_max() const { return top_k < experts_per_rank ? top_k : experts_per_rank; }
  // Routing of one row on the wire, in 4-byte words, little-endian:
  //   i32 token, top_k × i32 local expert (-1: not on this rank), top_k × f32 weight
  uint64_t meta_words() const { return 1 + 2 * static_cast<uint64_t>(top_k); }
};

class ExpertRoute {
 public:
  void lay_out(const ExpertShape& shape, ReservedMemory::Carver& carver);

  // ---- sending. Sorts this rank's tokens by owner of their experts: each token once per member.
  // `seat_of`: as in ExpertExchange::start_dispatch(); everything after it knows seats only.
  void set_tokens(const ExpertShape& shape, std::span<const int32_t> expert,
                  std::span<const float> weight, std::span<const int32_t> seat_of);
  int32_t token_count() const { return token_count_; }
  // Tokens that went to `member`, ascending.
  std::span<const int32_t> sent_tokens(const ExpertShape& shape, int32_t member) const {
    return {sent_token_ + uint64_t{1} * member * shape.tokens_max,
            static_cast<size_t>(sent_count_[member])};
  }
  int32_t sent_count(int32_t member) const { return sent_count_[member]; }
  int32_t sent_assignments(int32_t member) const { return sent_assignments_[member]; }
  // The routing that goes with the rows, sent_count(member) · meta_words() words.
  void write_meta(const ExpertShape& shape, int32_t member, int32_t* meta) const;
  // Puts the gradients of the weights sent to `member`, in the order they left, to their places in
  // [T, top_k].
  void place_weight_gradients(const ExpertShape& shape, int32_t member, const float* d_weight,
                              std::span<float> d_topk_weight) const;

  // ---- receiving, member by member in group order.
  void begin_rows();
  // Appends `count` rows of `member` from what its write_meta() wrote. kDataLoss for routing that
  // cannot be: everything that later indexes memory is checked here.
  Status accept_meta(const ExpertShape& shape, int32_t member, const int32_t* meta, uint64_t count);
  // The same for this rank's rows to itself.
  void accept_own(const ExpertShape& shape);
  void sort_by_expert(const ExpertShape& shape);

  int32_t row_count() const { return row_count_; }
  int32_t assignment_count() const { return assignment_count_; }
  int32_t first_row(int32_t member) const { return source_offset_[member]; }
  int32_t rows_from(int32_t member) const {
    return source_offset_[member + 1] - source_offset_[member];
  }
  int32_t first_assignment(int32_t member) const {
    return assignment_offset_[source_offset_[member]];
  }
  int32_t assignments_from(int32_t member) const {
    return first_assignment(member + 1) - first_assignment(member);
  }
  // All of DispatchedRows but the rows themselves.
  DispatchedRows view(const ExpertShape& shape) const;

 private:
  Status accept_row(const ExpertShape& shape, const int32_t* meta, int32_t previous_token);

  int32_t token_count_ = 0;
  int32_t row_count_ = 0;
  int32_t assignment_count_ = 0;
  // Arrays in memory of the owner of the Carver.
  int32_t* topk_expert_ = nullptr;        // [tokens_max, top_k]
  float* topk_weight_ = nullptr;          // [tokens_max, top_k]
  int32_t* sent_token_ = nullptr;         // [group, tokens_max]
  int32_t* sent_count_ = nullptr;         // [group]
  int32_t* sent_assignments_ = nullptr;   // [group]
  int32_t* source_offset_ = nullptr;      // [group + 1]
  int32_t* source_token_ = nullptr;       // [rows_max]
  int32_t* assignment_offset_ = nullptr;  // [rows_max + 1]
  int32_t* assignment_expert_ = nullptr;  // [rows_max · experts_here_max]
  float* assignment_weight_ = nullptr;    // as above, and the two below
  int32_t* expert_offset_ = nullptr;      // [experts_per_rank + 1]
  int32_t* expert_row_ = nullptr;
  int32_t* expert_assignment_ = nullptr;
};

}  // namespace penstock
