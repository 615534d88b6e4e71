// Moves tokens to the ranks that own their experts and the experts' results back (expert
// parallelism), after DeepEP's semantics: https://github.com/deepseek-ai/DeepEP
//
//   forward    start_dispatch(x, expert, weight)  ->  finish_dispatch(): rows, and who they are for
//              caller: y[r] = Σ over row r's local experts of weight · expert(rows[r])
//              start_combine(y)          ->  finish_combine(out): out[t] += Σ y of t, in rank order
//   backward   start_combine_backward(dy)  ->  finish_combine_backward(): d_rows[r] = dy[r's token]
//              caller: dx_rows[r], d_weight of every (row, local expert)
//              start_dispatch_backward(…)  ->  finish_dispatch_backward(dx, d_weight)
//
// A token is sent once to each rank that owns at least one of its experts, however many it owns.
// Nothing is dropped: buffers hold every token of every peer, at computed addresses, reserved at
// construction and touched only as far as routing needs. Rows of this rank never pass through the
// transport.
//
// A slot keeps the routing of one micro-batch through one layer, from its start_dispatch until the
// next start_dispatch on the same slot; so do all views of it. One message per peer and step of the
// exchange. Buffers passed to a start are borrowed until its finish. Starts and finishes of
// different slots interleave freely, at most `in_flight_max` started and not finished at once. Each
// finish follows its start.
//
// The same on every rank of the group, in the same order: nothing beyond one start of each kind per
// tag base. Failures are final: the failed exchange aborts its transport, because a rank never
// repairs itself. Steady state allocates nothing. Single-threaded.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "comm/base/ids.h"
#include "comm/base/status.h"
#include "comm/data/transport.h"

namespace penstock {

struct ExpertExchangeConfig {
  std::vector<Rank> group;  // seat s of the experts is on group[s / experts_per_rank]
  int32_t group_index = 0;  // this rank's place in `group`
  int32_t experts_per_rank = 0;
  int32_t top_k = 0;
  int32_t hidden_size = 0;    // H, fp32 values per row
  int32_t tokens_max = 0;     // T of any start_dispatch, on any rank of the group
  int32_t slot_count = 1;     // micro-batches in flight × layers, as the caller numbers them
  int32_t in_flight_max = 4;  // exchanges started and not finished
};

// What dispatch delivered. R rows, ordered by (source index, source token); A (row, local expert)
// pairs, "assignments", ordered by (row, place in the token's top-k).
struct DispatchedRows {
  int32_t row_count = 0;         // R
  int32_t assignment_count = 0;  // A
  std::span<const float> rows;   // [R, H]
  std::span<const int32_t>
      source_offset;  // [group + 1]: rows of source i are [offset[i], offset[i+1])
  std::span<const int32_t> source_token;  // [R] the token's number on its source rank
  std::span<const int32_t>
      assignment_offset;  // [R + 1]: assignments of row r are [offset[r], offset[r+1])
  std::span<const int32_t> assignment_expert;  // [A] local: 0 … experts_per_rank - 1
  std::span<const float> assignment_weight;    // [A] gate weight
  // The same assignments sorted by (expert, row), for grouped matrix products: those of local
  // expert e are entries [expert_offset[e], expert_offset[e+1]) of the two lists below.
  std::span<const int32_t> expert_offset;      // [experts_per_rank + 1]
  std::span<const int32_t> expert_row;         // [A] row of the entry
  std::span<const int32_t> expert_assignment;  // [A] index into the assignment_* arrays
};

class ExpertExchange {
 public:
  // Borrows `transport`, which must outlive this object (none is needed for a group of one).
  // kInvalidArgument for a config that makes no sense; kResourceExhausted when the address space
  // cannot be reserved.
  static Result<std::unique_ptr<ExpertExchange>> create(Transport* transport,
                                                        const ExpertExchangeConfig& config);
  ~ExpertExchange();
  ExpertExchange(const ExpertExchange&) = delete;
  ExpertExchange& operator=(const ExpertExchange&) = delete;

  // The low bits of a tag base tell the four messages of one round trip apart; the caller leaves
  // them 0.
  static constexpr uint64_t kTagBaseStep = 4;

  // `x` is [T, H]; `expert` [T, top_k] global ids, -1 for none, no id twice for one token; `weight`
  // [T, top_k]. Only x stays borrowed until the finish. `tag_base` is a multiple of kTagBaseStep,
  // equal on all ranks of the group, different for every (direction, micro-batch, layer) that can
  // be under way at once; it serves the other three exchanges of the slot, too. Steps may repeat
  // it. `seat_of` is the seat of each expert, a permutation, equal on all ranks of the group;
  // empty: expert e has seat e.
  void start_dispatch(int32_t slot, Tag tag_base, std::span<const float> x,
                      std::span<const int32_t> expert, std::span<const float> weight,
                      std::span<const int32_t> seat_of = {});
  Result<DispatchedRows> finish_dispatch(int32_t slot);

  // `y` is [R, H].
  void start_combine(int32_t slot, std::span<const float> y);
  // Adds to `out` [T, H]: first the partial row of group[0], then of group[1], …
  Status finish_combine(int32_t slot, std::span<float> out);

  // Sends the gradient of combine's output, [T, H], the way the tokens went.
  void start_combine_backward(int32_t slot, std::span<const float> dy);
  // d_rows [R, H]: the gradient of every row of y. Not yet multiplied by gate weights.
  Result<std::span<const float>> finish_combine_backward(int32_t slot);

  // `dx_rows` is [R, H]; `d_weight` [A], in assignment order.
  void start_dispatch_backward(int32_t slot, std::span<const float> dx_rows,
                               std::span<const float> d_weight);
  // Adds to `dx` [T, H] in the order of finish_combine. Sets d_topk_weight [T, top_k], 0 where
  // expert is -1.
  Status finish_dispatch_backward(int32_t slot, std::span<float> dx,
                                  std::span<float> d_topk_weight);

  // The view of the slot's last finish_dispatch.
  DispatchedRows dispatched(int32_t slot) const;

 private:
  class Impl;

 public:
  explicit ExpertExchange(std::unique_ptr<Impl> impl);  // for create()

 private:
  std::unique_ptr<Impl> impl_;
};

}  // namespace penstock
