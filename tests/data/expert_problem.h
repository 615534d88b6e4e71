// One micro-batch through one mixture-of-experts layer, computed twice: by the ranks of an expert
// group through an ExpertExchange, and plainly, in one process, with the same sums in the same
// order. Both must give the same bits.
#pragma once

#include <cstdint>
#include <vector>

#include "comm/data/expert_exchange.h"

namespace penstock {

enum class Skew { kUniform, kOneRank, kOneExpert, kSomeNone };

struct ExpertProblem {
  int32_t group_size = 1;
  int32_t experts_per_rank = 2;
  int32_t top_k = 2;
  int32_t hidden_size = 8;
  int32_t tokens_max = 16;
  Skew skew = Skew::kUniform;
  uint64_t seed = 1;
  // The exchange is told other numbers of experts, and which seats they have. No result changes.
  bool renumbered = false;

  int32_t expert_count() const { return group_size * experts_per_rank; }
  ExpertExchangeConfig config(int32_t rank, int32_t slot_count = 1) const;
};

// What one rank puts in: activations, routing, gradient of the layer's output.
struct RankInput {
  int32_t token_count = 0;      // differs from rank to rank; may be 0
  std::vector<float> x;         // [T, H]
  std::vector<int32_t> expert;  // [T, top_k]
  std::vector<float> weight;    // [T, top_k]
  std::vector<float> residual;  // [T, H], what combine adds to
  std::vector<float> dy;        // [T, H]
};
RankInput input_of(const ExpertProblem& problem, int32_t rank);

struct RankOutput {
  std::vector<float> out;            // [T, H]
  std::vector<float> dx;             // [T, H]
  std::vector<float> d_topk_weight;  // [T, top_k]
  bool operator==(const RankOutput&) const = default;
};

// The layer, of one rank, one process.
RankOutput expected_output(const ExpertProblem& problem, int32_t rank);

// The layer, through `exchange`, on the rank that calls. The steps are separate so that tests can
// interleave those of several slots; run() does all.
class ExchangedLayer {
 public:
  ExchangedLayer(const ExpertProblem& problem, int32_t rank, ExpertExchange& exchange, int32_t slot,
                 Tag tag_base);
  void start_dispatch();
  Status experts_forward();  // finishes dispatch, starts combine
  Status finish_forward();
  void start_backward();
  Status experts_backward();  // finishes combine backward, starts dispatch backward
  Status finish_backward();
  Status run();
  const RankOutput& output() const { return output_; }

 private:
  const ExpertProblem problem_;
  const RankInput input_;
  ExpertExchange& exchange_;
  const int32_t rank_;
  const int32_t slot_;
  const Tag tag_base_;
  DispatchedRows rows_;
  std::vector<float> y_;
  std::vector<float> dx_rows_;
  std::vector<float> d_weight_;
  RankOutput output_;
};

}  // namespace penstock
