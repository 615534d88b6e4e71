#include "worker/optim/adamw.h"

#include <algorithm>
#include <cmath>

#include "checkpoint/names.h"
#include "comm/base/minifloat.h"
#include "kernels/kernels.h"

namespace penstock {
namespace {

constexpr int64_t kChunkElements = 4096;  // of bf16 moments that are fp32 at a time: fits a cache

bool decays(const NoDecay& exempt, const Parameter& parameter) {
  const std::string_view name = parameter.name;
  if (exempt.embedding && name == "model.embed_tokens.weight") return false;
  if (exempt.head && name == "lm_head.weight") return false;
  if (exempt.router && name.ends_with(".mlp.gate.weight")) return false;
  return parameter.decays();
}

}  // namespace

AdamW::AdamW(const OptimizerSpec& spec, std::vector<OptimizerShard> shards, Kernels& kernels)
    : spec_(spec), kernels_(kernels), shards_(std::move(shards)) {
  const bool bf16 = spec_.moments == MomentType::kBf16;
  if (bf16) expanded_.resize(2 * kChunkElements);
  for (const OptimizerShard& shard : shards_) {
    const auto size = static_cast<size_t>(shard.owned.size());
    float* const wide = bf16 ? nullptr : moments_.emplace_back(2 * size, 0.0F).data();
    uint16_t* const narrow = bf16 ? narrow_moments_.emplace_back(2 * size, 0).data() : nullptr;
    for (const ShardPiece& piece : pieces_of(shard)) {
      Piece own{piece, {}, {}};
      if (bf16) {
        own.narrow = {narrow + piece.offset, narrow + size + piece.offset};
      } else {
        own.wide = {wide + piece.offset, wide + size + piece.offset};
      }
      pieces_.push_back(own);
    }
  }
}

double AdamW::gradient_square_sum() const {
  double sum = 0.0;
  for (const OptimizerShard& shard : shards_) {
    sum += kernels_.sum_of_squares(
        shard.owned.size(), shard.parameters->gradients(shard.kind).data() + shard.owned.begin);
  }
  return sum;
}

double AdamW::clip_factor(double norm) const {
  if (spec_.clip_grad_norm <= 0.0) return 1.0;
  return std::min(1.0, spec_.clip_grad_norm / (norm + 1e-6));
}

void AdamW::step(int64_t step, double learning_rate, double gradient_factor) {
  PENSTOCK_CHECK(step >= 1, step);
  AdamwStep update;
  update.lr = static_cast<float>(learning_rate);
  update.beta1 = static_cast<float>(spec_.beta1);
  update.beta2 = static_cast<float>(spec_.beta2);
  update.eps = static_cast<float>(spec_.eps);
  update.bias_correction1 =
      static_cast<float>(1.0 - std::pow(spec_.beta1, static_cast<double>(step)));
  update.bias_correction2 =
      static_cast<float>(1.0 - std::pow(spec_.beta2, static_cast<double>(step)));
  update.gradient_scale = static_cast<float>(gradient_factor);
  for (const Piece& piece : pieces_) {
    const Parameter& parameter = *piece.piece.parameter;
    update.weight_decay =
        decays(spec_.no_decay, parameter) ? static_cast<float>(spec_.weight_decay) : 0.0F;
    if (piece.narrow.exp_avg != nullptr) {
      step_narrow(piece, update);
      continue;
    }
    float* const value = parameter.value + piece.piece.begin;
    kernels_.adamw(piece.piece.end - piece.piece.begin, update,
                   parameter.gradient + piece.piece.begin,
                   {value, piece.wide.exp_avg, piece.wide.exp_avg_sq},
                   {value, piece.wide.exp_avg, piece.wide.exp_avg_sq});
  }
}

// The update itself uses the new moments before they are rounded for keeping.
void AdamW::step_narrow(const Piece& piece, const AdamwStep& update) {
  const Parameter& parameter = *piece.piece.parameter;
  float* const first = expanded_.data();
  float* const second = first + kChunkElements;
  for (int64_t done = 0; piece.piece.begin + done < piece.piece.end; done += kChunkElements) {
    const int64_t begin = piece.piece.begin + done;
    const int64_t count = std::min(kChunkElements, piece.piece.end - begin);
    uint16_t* const exp_avg = piece.narrow.exp_avg + done;
    uint16_t* const exp_avg_sq = piece.narrow.exp_avg_sq + done;
    std::transform(exp_avg, exp_avg + count, first, decode_bf16);
    std::transform(exp_avg_sq, exp_avg_sq + count, second, decode_bf16);
    float* const value = parameter.value + begin;
    kernels_.adamw(count, update, parameter.gradient + begin, {value, first, second},
                   {value, first, second});
    std::transform(first, first + count, exp_avg, encode_bf16);
    std::transform(second, second + count, exp_avg_sq, encode_bf16);
  }
}

std::vector<StateSlice> AdamW::state() {
  std::vector<StateSlice> slices;
  for (const Piece& own : pieces_) {
    const ShardPiece& piece = own.piece;
    const std::string& name = piece.parameter->name;
    append_state(piece, weight_name(name), DType::kF32, piece.parameter->value + piece.begin,
                 slices);
    const auto add_moments = [&](DType dtype, const auto& moments) {
      append_state(piece, exp_avg_name(name), dtype, moments.exp_avg, slices);
      append_state(piece, exp_avg_sq_name(name), dtype, moments.exp_avg_sq, slices);
    };
    if (own.narrow.exp_avg != nullptr) {
      add_moments(DType::kBf16, own.narrow);
    } else {
      add_moments(DType::kF32, own.wide);
    }
  }
  return slices;
}

}  // namespace penstock
