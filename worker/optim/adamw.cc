#include "worker/optim/adamw.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "checkpoint/names.h"
#include "comm/base/minifloat.h"
#include "kernels/kernels.h"

namespace penstock {
namespace {

// Updated at a time, so that what is used twice (new weights, expanded moments) is in a cache.
constexpr int64_t kChunkElements = 4096;

bool decays(const NoDecay& exempt, const Parameter& parameter) {
  const std::string_view name = parameter.name;
  if (exempt.embedding && name == "model.embed_tokens.weight") return false;
  if (exempt.head && name == "lm_head.weight") return false;
  if (exempt.router && name.ends_with(".mlp.gate.weight")) return false;
  return parameter.decays();
}

template <typename T>
const T* at(const std::byte* generation, uint64_t offset) {
  return reinterpret_cast<const T*>(generation + offset);
}
template <typename T>
T* at(std::byte* generation, uint64_t offset) {
  return reinterpret_cast<T*>(generation + offset);
}

float* owned_weights(const StateLayout::Place& place) {
  return place.shard.parameters->values(place.shard.kind).data() + place.shard.owned.begin;
}

}  // namespace

AdamW::AdamW(const OptimizerSpec& spec, const StateLayout& layout, Kernels& kernels)
    : spec_(spec), layout_(layout), kernels_(kernels) {
  const bool bf16 = spec_.moments == MomentType::kBf16;
  if (bf16) expanded_.resize(2 * kChunkElements);
  const uint64_t moment_bytes = bf16 ? sizeof(uint16_t) : sizeof(float);
  for (const StateLayout::Place& place : layout_.places()) {
    for (const ShardPiece& piece : pieces_of(place.shard)) {
      const auto offset = static_cast<uint64_t>(piece.offset);
      pieces_.push_back({piece, place.weights + offset * sizeof(float),
                         place.exp_avg + offset * moment_bytes,
                         place.exp_avg_sq + offset * moment_bytes});
    }
  }
}

double AdamW::gradient_square_sum() const {
  double sum = 0.0;
  for (const StateLayout::Place& place : layout_.places()) {
    const OptimizerShard& shard = place.shard;
    sum += kernels_.sum_of_squares(
        shard.owned.size(), shard.parameters->gradients(shard.kind).data() + shard.owned.begin);
  }
  return sum;
}

double AdamW::clip_factor(double norm) const {
  if (spec_.clip_grad_norm <= 0.0) return 1.0;
  return std::min(1.0, spec_.clip_grad_norm / (norm + 1e-6));
}

void AdamW::step(int64_t step, double learning_rate, double gradient_factor,
                 const std::byte* previous, std::byte* next) {
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
    if (spec_.moments == MomentType::kBf16) {
      step_narrow(piece, update, previous, next);
    } else {
      step_wide(piece, update, previous, next);
    }
  }
}

void AdamW::step_wide(const Piece& own, const AdamwStep& update, const std::byte* previous,
                      std::byte* next) {
  const Parameter& parameter = *own.piece.parameter;
  const int64_t size = own.piece.end - own.piece.begin;
  for (int64_t done = 0; done < size; done += kChunkElements) {
    const int64_t count = std::min(kChunkElements, size - done);
    float* const value = parameter.value + own.piece.begin + done;
    float* const weight = at<float>(next, own.weights) + done;
    kernels_.adamw(
        count, update, parameter.gradient + own.piece.begin + done,
        {value, at<float>(previous, own.exp_avg) + done,
         at<float>(previous, own.exp_avg_sq) + done},
        {weight, at<float>(next, own.exp_avg) + done, at<float>(next, own.exp_avg_sq) + done});
    std::copy_n(weight, count, value);
  }
}

// The update itself uses the new moments before they are rounded for keeping.
void AdamW::step_narrow(const Piece& own, const AdamwStep& update, const std::byte* previous,
                        std::byte* next) {
  const Parameter& parameter = *own.piece.parameter;
  float* const first = expanded_.data();
  float* const second = first + kChunkElements;
  const int64_t size = own.piece.end - own.piece.begin;
  for (int64_t done = 0; done < size; done += kChunkElements) {
    const int64_t count = std::min(kChunkElements, size - done);
    const uint16_t* const old_first = at<uint16_t>(previous, own.exp_avg) + done;
    const uint16_t* const old_second = at<uint16_t>(previous, own.exp_avg_sq) + done;
    std::transform(old_first, old_first + count, first, decode_bf16);
    std::transform(old_second, old_second + count, second, decode_bf16);
    float* const value = parameter.value + own.piece.begin + done;
    float* const weight = at<float>(next, own.weights) + done;
    kernels_.adamw(count, update, parameter.gradient + own.piece.begin + done,
                   {value, first, second}, {weight, first, second});
    std::copy_n(weight, count, value);
    std::transform(first, first + count, at<uint16_t>(next, own.exp_avg) + done, encode_bf16);
    std::transform(second, second + count, at<uint16_t>(next, own.exp_avg_sq) + done, encode_bf16);
  }
}

void AdamW::take_weights(std::byte* generation) const {
  for (const StateLayout::Place& place : layout_.places()) {
    std::copy_n(owned_weights(place), place.shard.owned.size(),
                at<float>(generation, place.weights));
  }
}

void AdamW::put_weights(const std::byte* generation) const {
  for (const StateLayout::Place& place : layout_.places()) {
    std::copy_n(at<float>(generation, place.weights), place.shard.owned.size(),
                owned_weights(place));
  }
}

bool AdamW::has_weights(const std::byte* generation) const {
  return std::ranges::all_of(layout_.places(), [&](const StateLayout::Place& place) {
    return std::memcmp(generation + place.weights, owned_weights(place),
                       place.shard.owned.size() * sizeof(float)) == 0;
  });
}

std::vector<StateSlice> AdamW::state(std::byte* generation) const {
  const DType moments = spec_.moments == MomentType::kBf16 ? DType::kBf16 : DType::kF32;
  std::vector<StateSlice> slices;
  for (const Piece& own : pieces_) {
    const std::string& name = own.piece.parameter->name;
    append_state(own.piece, weight_name(name), DType::kF32, generation + own.weights, slices);
    append_state(own.piece, exp_avg_name(name), moments, generation + own.exp_avg, slices);
    append_state(own.piece, exp_avg_sq_name(name), moments, generation + own.exp_avg_sq, slices);
  }
  return slices;
}

}  // namespace penstock
