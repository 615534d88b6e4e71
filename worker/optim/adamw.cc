#include "worker/optim/adamw.h"

#include <algorithm>
#include <cmath>

#include "checkpoint/names.h"
#include "kernels/kernels.h"

namespace penstock {
namespace {

// Appends the boxes of [begin, end) inside the sub-tensor that fixes the first `level` dimensions
// at `prefix`. `inner` is the number of elements below one index of dimension `level`.
void append_boxes(std::span<const int64_t> shape, size_t level, std::vector<int64_t>& prefix,
                  int64_t begin, int64_t end, std::vector<Box>& boxes) {
  if (begin >= end) return;
  int64_t inner = 1;
  for (size_t d = level + 1; d < shape.size(); ++d) inner *= shape[d];
  const auto add = [&](int64_t first, int64_t count) {
    Box box;
    box.offset = prefix;
    box.size.assign(level, 1);
    box.offset.push_back(first);
    box.size.push_back(count);
    for (size_t d = level + 1; d < shape.size(); ++d) {
      box.offset.push_back(0);
      box.size.push_back(shape[d]);
    }
    boxes.push_back(std::move(box));
  };
  const auto descend = [&](int64_t row, int64_t row_begin, int64_t row_end) {
    prefix.push_back(row);
    append_boxes(shape, level + 1, prefix, row_begin, row_end, boxes);
    prefix.pop_back();
  };
  const int64_t first = begin / inner;
  const int64_t last = end / inner;
  if (begin % inner != 0 && first == last) {
    descend(first, begin % inner, end % inner);
    return;
  }
  const int64_t whole = (begin + inner - 1) / inner;
  if (begin % inner != 0) descend(first, begin % inner, inner);
  if (last > whole) add(whole, last - whole);
  if (end % inner != 0) descend(last, 0, end % inner);
}

}  // namespace

std::vector<Box> boxes_of_range(std::span<const int64_t> shape, int64_t begin, int64_t end) {
  PENSTOCK_CHECK(0 <= begin && begin <= end && end <= element_count(shape), begin, end);
  std::vector<Box> boxes;
  std::vector<int64_t> prefix;
  append_boxes(shape, 0, prefix, begin, end, boxes);
  return boxes;
}

AdamW::AdamW(const OptimizerSpec& spec, std::vector<OptimizerShard> shards, Kernels& kernels)
    : spec_(spec), kernels_(kernels), shards_(std::move(shards)) {
  for (const OptimizerShard& shard : shards_) {
    const auto size = static_cast<size_t>(shard.owned.size());
    PENSTOCK_CHECK(shard.owned.begin >= 0 &&
                       shard.owned.end <= std::ssize(shard.parameters->values(shard.kind)),
                   shard.owned.begin, shard.owned.end);
    float* const moments = moments_.emplace_back(2 * size, 0.0F).data();
    for (const Parameter& parameter : shard.parameters->all()) {
      if (parameter.kind != shard.kind) continue;
      const int64_t begin = std::max(shard.owned.begin, parameter.offset);
      const int64_t end = std::min(shard.owned.end, parameter.offset + parameter.size);
      if (begin >= end) continue;
      float* const exp_avg = moments + (begin - shard.owned.begin);
      pieces_.push_back(
          {&parameter, begin - parameter.offset, end - parameter.offset, exp_avg, exp_avg + size});
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
    float* const value = piece.parameter->value + piece.begin;
    update.weight_decay = piece.parameter->decays() ? static_cast<float>(spec_.weight_decay) : 0.0F;
    kernels_.adamw(piece.end - piece.begin, update, piece.parameter->gradient + piece.begin,
                   {value, piece.exp_avg, piece.exp_avg_sq},
                   {value, piece.exp_avg, piece.exp_avg_sq});
  }
}

std::vector<StateSlice> AdamW::state() {
  std::vector<StateSlice> slices;
  for (const Piece& piece : pieces_) {
    const Parameter& parameter = *piece.parameter;
    int64_t done = 0;  // elements of the piece
    for (const Box& box : boxes_of_range(parameter.shape, piece.begin, piece.end)) {
      const auto count = static_cast<size_t>(element_count(box));
      const auto add = [&](std::string name, float* values) {
        slices.push_back(
            {{std::move(name), DType::kF32, parameter.shape, box}, {values + done, count}});
      };
      add(weight_name(parameter.name), parameter.value + piece.begin);
      add(exp_avg_name(parameter.name), piece.exp_avg);
      add(exp_avg_sq_name(parameter.name), piece.exp_avg_sq);
      done += static_cast<int64_t>(count);
    }
  }
  return slices;
}

}  // namespace penstock
