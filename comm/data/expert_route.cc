#include "comm/data/expert_route.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstring>

namespace penstock {

void ExpertRoute::lay_out(const ExpertShape& shape, ReservedMemory::Carver& carver) {
  const auto group = static_cast<uint64_t>(shape.group_size);
  const uint64_t topk_entries = uint64_t{1} * shape.tokens_max * shape.top_k;
  const uint64_t assignments_max = shape.rows_max() * shape.experts_here_max();
  carver.take(topk_expert_, topk_entries);
  carver.take(topk_weight_, topk_entries);
  carver.take(sent_token_, shape.rows_max());
  carver.take(sent_count_, group);
  carver.take(sent_assignments_, group);
  carver.take(source_offset_, group + 1);
  carver.take(source_token_, shape.rows_max());
  carver.take(assignment_offset_, shape.rows_max() + 1);
  carver.take(assignment_expert_, assignments_max);
  carver.take(assignment_weight_, assignments_max);
  carver.take(expert_offset_, static_cast<uint64_t>(shape.experts_per_rank) + 1);
  carver.take(expert_row_, assignments_max);
  carver.take(expert_assignment_, assignments_max);
}

// ---- sending

void ExpertRoute::set_tokens(const ExpertShape& shape, std::span<const int32_t> expert,
                             std::span<const float> weight, std::span<const int32_t> seat_of) {
  const int32_t expert_count = shape.group_size * shape.experts_per_rank;
  token_count_ = static_cast<int32_t>(expert.size() / static_cast<size_t>(shape.top_k));
  if (seat_of.empty()) {
    std::copy(expert.begin(), expert.end(), topk_expert_);
  } else {
    PENSTOCK_CHECK(std::ssize(seat_of) == expert_count, seat_of.size(), expert_count);
    for (size_t i = 0; i < expert.size(); ++i) {
      PENSTOCK_CHECK(expert[i] >= -1 && expert[i] < expert_count, expert[i]);
      topk_expert_[i] = expert[i] < 0 ? -1 : seat_of[static_cast<size_t>(expert[i])];
    }
  }
  std::copy(weight.begin(), weight.end(), topk_weight_);
  std::fill_n(sent_count_, shape.group_size, 0);
  std::fill_n(sent_assignments_, shape.group_size, 0);
  const int32_t* entry = topk_expert_;
  for (int32_t token = 0; token < token_count_; ++token) {
    for (int32_t k = 0; k < shape.top_k; ++k, ++entry) {
      PENSTOCK_CHECK(*entry >= -1 && *entry < expert_count, *entry, token);
      if (*entry < 0) continue;
      const int32_t member = shape.owner_of(*entry);
      int32_t* const tokens = sent_token_ + uint64_t{1} * member * shape.tokens_max;
      int32_t& count = sent_count_[member];
      if (count == 0 || tokens[count - 1] != token) tokens[count++] = token;
      ++sent_assignments_[member];
    }
  }
}

void ExpertRoute::write_meta(const ExpertShape& shape, int32_t member, int32_t* meta) const {
  const int32_t expert_base = member * shape.experts_per_rank;
  for (const int32_t token : sent_tokens(shape, member)) {
    const uint64_t first = uint64_t{1} * token * shape.top_k;
    *meta++ = token;
    for (int32_t k = 0; k < shape.top_k; ++k) {
      const int32_t expert = topk_expert_[first + k];
      const bool there = expert >= 0 && shape.owner_of(expert) == member;
      meta[k] = there ? expert - expert_base : -1;
      std::memcpy(&meta[shape.top_k + k], &topk_weight_[first + k], sizeof(float));
    }
    meta += 2 * shape.top_k;
  }
}

void ExpertRoute::place_weight_gradients(const ExpertShape& shape, int32_t member,
                                         const float* d_weight,
                                         std::span<float> d_topk_weight) const {
  for (const int32_t token : sent_tokens(shape, member)) {
    for (int32_t k = 0; k < shape.top_k; ++k) {
      const uint64_t at = uint64_t{1} * token * shape.top_k + k;
      const int32_t expert = topk_expert_[at];
      if (expert >= 0 && shape.owner_of(expert) == member) d_topk_weight[at] = *d_weight++;
    }
  }
}

// ---- receiving

void ExpertRoute::begin_rows() {
  row_count_ = 0;
  assignment_count_ = 0;
  source_offset_[0] = 0;
  assignment_offset_[0] = 0;
}

Status ExpertRoute::accept_meta(const ExpertShape& shape, int32_t member, const int32_t* meta,
                                uint64_t count) {
  if (count > static_cast<uint64_t>(shape.tokens_max)) {
    return data_loss(fmt::format("{} rows from one rank; at most {}", count, shape.tokens_max));
  }
  int32_t previous_token = -1;
  for (uint64_t i = 0; i < count; ++i, meta += shape.meta_words()) {
    PENSTOCK_TRY(accept_row(shape, meta, previous_token));
    previous_token = meta[0];
  }
  source_offset_[member + 1] = row_count_;
  return {};
}

Status ExpertRoute::accept_row(const ExpertShape& shape, const int32_t* meta,
                               int32_t previous_token) {
  const int32_t token = meta[0];
  const int32_t first = assignment_count_;
  bool possible = token > previous_token && token < shape.tokens_max;
  for (int32_t k = 0; k < shape.top_k && possible; ++k) {
    const int32_t expert = meta[1 + k];
    if (expert == -1) continue;
    possible = expert >= 0 && expert < shape.experts_per_rank &&
               assignment_count_ - first < shape.experts_here_max();
    if (!possible) break;
    assignment_expert_[assignment_count_] = expert;
    std::memcpy(&assignment_weight_[assignment_count_], &meta[1 + shape.top_k + k], sizeof(float));
    ++assignment_count_;
  }
  if (!possible || assignment_count_ == first) {
    return data_loss(
        fmt::format("impossible routing of token {} after token {}: damaged, or its "
                    "sender runs another configuration",
                    token, previous_token));
  }
  source_token_[row_count_] = token;
  assignment_offset_[++row_count_] = assignment_count_;
  return {};
}

void ExpertRoute::accept_own(const ExpertShape& shape) {
  const int32_t member = shape.group_index;
  for (const int32_t token : sent_tokens(shape, member)) {
    const uint64_t first = uint64_t{1} * token * shape.top_k;
    for (int32_t k = 0; k < shape.top_k; ++k) {
      const int32_t expert = topk_expert_[first + k];
      if (expert < 0 || shape.owner_of(expert) != member) continue;
      assignment_expert_[assignment_count_] = expert - member * shape.experts_per_rank;
      assignment_weight_[assignment_count_] = topk_weight_[first + k];
      ++assignment_count_;
    }
    source_token_[row_count_] = token;
    assignment_offset_[++row_count_] = assignment_count_;
  }
  source_offset_[member + 1] = row_count_;
}

// Counting sort; stable, so that the rows of an expert ascend.
void ExpertRoute::sort_by_expert(const ExpertShape& shape) {
  const int32_t experts = shape.experts_per_rank;
  std::fill_n(expert_offset_, experts + 1, 0);
  for (int32_t a = 0; a < assignment_count_; ++a) ++expert_offset_[assignment_expert_[a] + 1];
  for (int32_t e = 0; e < experts; ++e) expert_offset_[e + 1] += expert_offset_[e];
  for (int32_t row = 0; row < row_count_; ++row) {
    for (int32_t a = assignment_offset_[row]; a < assignment_offset_[row + 1]; ++a) {
      const int32_t at = expert_offset_[assignment_expert_[a]]++;
      expert_row_[at] = row;
      expert_assignment_[at] = a;
    }
  }
  // Filling moved every offset to its expert's end, which is the next one's begin.
  for (int32_t e = experts; e > 0; --e) expert_offset_[e] = expert_offset_[e - 1];
  expert_offset_[0] = 0;
}

DispatchedRows ExpertRoute::view(const ExpertShape& shape) const {
  const auto rows = static_cast<size_t>(row_count_);
  const auto assignments = static_cast<size_t>(assignment_count_);
  DispatchedRows view;
  view.row_count = row_count_;
  view.assignment_count = assignment_count_;
  view.source_offset = {source_offset_, static_cast<size_t>(shape.group_size) + 1};
  view.source_token = {source_token_, rows};
  view.assignment_offset = {assignment_offset_, rows + 1};
  view.assignment_expert = {assignment_expert_, assignments};
  view.assignment_weight = {assignment_weight_, assignments};
  view.expert_offset = {expert_offset_, static_cast<size_t>(shape.experts_per_rank) + 1};
  view.expert_row = {expert_row_, assignments};
  view.expert_assignment = {expert_assignment_, assignments};
  return view;
}

}  // namespace penstock
