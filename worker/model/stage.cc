#include "worker/model/stage.h"

#include <algorithm>

#include "worker/model/stage_impl.h"

namespace penstock {
namespace {

int64_t moe_layer_count(const StageOptions& options) {
  const Range layers =
      stage_layers(options.model.num_hidden_layers, options.stage_count, options.stage_index);
  const bool ahead = options.stage_index == options.stage_count - 1 &&
                     options.gradient_slot_count > 0 && options.model.num_nextn_predict_layers > 0;
  return std::max<int64_t>(
             0, layers.end - std::max(layers.begin, options.model.first_k_dense_replace)) +
         (ahead ? 1 : 0);
}

}  // namespace

ExpertExchangeConfig expert_exchange_config(const StageOptions& options, std::vector<Rank> group) {
  PENSTOCK_CHECK(std::ssize(group) == options.expert_count, group.size());
  ExpertExchangeConfig config;
  config.group = std::move(group);
  config.group_index = static_cast<int32_t>(options.expert_index);
  config.experts_per_rank =
      static_cast<int32_t>(options.model.n_routed_experts / options.expert_count);
  config.top_k = static_cast<int32_t>(options.model.num_experts_per_tok);
  config.hidden_size = static_cast<int32_t>(options.model.hidden_size);
  config.tokens_max = static_cast<int32_t>(options.sequences_max * options.sequence_length_max);
  const bool trains = options.gradient_slot_count > 0;
  config.slot_count =
      options.slot_count * (trains ? static_cast<int32_t>(moe_layer_count(options)) : 1);
  return config;
}

uint64_t expert_tag_count(const StageOptions& options) {
  return static_cast<uint64_t>(options.slot_count * moe_layer_count(options)) *
         ExpertExchange::kTagBaseStep;
}

bool has_moe_layer(const StageOptions& options) {
  return moe_layer_count(options) > 0;
}

Stage::Stage(const StageOptions& options, Kernels& kernels, ExpertExchange* exchange)
    : impl_(std::make_unique<Impl>(options, kernels, exchange)) {}
Stage::~Stage() = default;

const StageOptions& Stage::options() const {
  return impl_->options;
}
Range Stage::layers() const {
  return impl_->layer_range;
}
bool Stage::is_first() const {
  return impl_->is_first();
}
bool Stage::is_last() const {
  return impl_->is_last();
}
ParameterSet& Stage::parameters() {
  return *impl_->parameters;
}
const ParameterSet& Stage::parameters() const {
  return *impl_->parameters;
}

Status Stage::run_sub_op(SubOp op, int32_t layer, int32_t slot, int32_t gradient_slot) {
  return gradient_slot < 0 ? impl_->run_forward(op, layer, slot)
                           : impl_->run_backward(op, layer, slot, gradient_slot);
}

void Stage::initialize(uint64_t seed) {
  impl_->parameters->initialize(seed, impl_->options.model.initializer_range);
  std::fill(impl_->biases.begin(), impl_->biases.end(), 0.0F);
}

StageSlot& Stage::Impl::slot_at(int32_t slot) {
  PENSTOCK_CHECK(slot >= 0 && slot < options.slot_count, slot);
  return slots[static_cast<size_t>(slot)];
}

namespace {

std::span<float> buffer(const StageOptions& options, float* data) {
  PENSTOCK_CHECK(data != nullptr, "this stage has no such buffer");
  return {data, static_cast<size_t>(options.sequences_max * options.sequence_length_max *
                                    options.model.hidden_size)};
}

}  // namespace

std::span<float> Stage::input(int32_t slot) {
  return buffer(options(), is_first() ? nullptr : impl_->slot_at(slot).x.front());
}
std::span<float> Stage::output(int32_t slot) {
  return buffer(options(), is_last() ? nullptr : impl_->slot_at(slot).x.back());
}
std::span<float> Stage::output_gradient(int32_t slot) {
  return buffer(options(), impl_->slot_at(slot).output_gradient);
}
std::span<float> Stage::input_gradient(int32_t slot) {
  return buffer(options(), impl_->slot_at(slot).input_gradient);
}

void Stage::join(Stage& before) {
  PENSTOCK_CHECK(options().stage_index == before.options().stage_index + 1);
  PENSTOCK_CHECK(impl_->slots.size() == before.impl_->slots.size(), impl_->slots.size());
  for (size_t s = 0; s < impl_->slots.size(); ++s) {
    impl_->slots[s].x.front() = before.impl_->slots[s].x.back();
    impl_->slots[s].input_gradient = before.impl_->slots[s].output_gradient;
  }
}

Pass Stage::start_forward(int32_t slot_index, const MicroBatch& micro_batch, bool training) {
  StageSlot& slot = impl_->slot_at(slot_index);
  const StageOptions& limits = impl_->options;
  PENSTOCK_CHECK(!impl_->forward_under_way, "a forward pass is under way");
  PENSTOCK_CHECK(
      micro_batch.sequence_count > 0 && micro_batch.sequence_count <= limits.sequences_max,
      micro_batch.sequence_count);
  PENSTOCK_CHECK(
      micro_batch.sequence_length > 0 && micro_batch.sequence_length <= limits.sequence_length_max,
      micro_batch.sequence_length);
  slot.micro_batch = micro_batch;
  slot.shape = {micro_batch.sequence_count, micro_batch.sequence_length};
  slot.training = training;
  slot.loss_sum = 0.0;
  slot.balance_sum = 0.0;
  slot.prediction_loss_sum = 0.0;
  const int64_t tokens = slot.shape.tokens();
  PENSTOCK_CHECK(!is_first() || std::ssize(micro_batch.tokens) == tokens);
  PENSTOCK_CHECK(!is_last() || std::ssize(micro_batch.targets) == tokens ||
                 (!training && micro_batch.targets.empty()));
  impl_->forward_under_way = true;
  return Pass(this, PassKind::kForward, slot_index, -1);
}

Pass Stage::forward(int32_t slot, const MicroBatch& micro_batch) {
  PENSTOCK_CHECK(impl_->trains(), "this stage was made for forward_only()");
  return start_forward(slot, micro_batch, true);
}

Pass Stage::forward_only(int32_t slot, const MicroBatch& micro_batch) {
  return start_forward(slot, micro_batch, false);
}

Pass Stage::start_backward(int32_t slot_index, bool weights_too) {
  PENSTOCK_CHECK(impl_->slot_at(slot_index).training, "backward without forward; slot", slot_index);
  PENSTOCK_CHECK(!impl_->backward_under_way, "a backward pass is under way");
  const auto free = std::find_if(impl_->gradient_slots.begin(), impl_->gradient_slots.end(),
                                 [](const GradientSlot& gradient) { return !gradient.taken; });
  PENSTOCK_CHECK(free != impl_->gradient_slots.end(), "more gradient slots needed than",
                 impl_->gradient_slots.size());
  free->taken = true;
  impl_->backward_under_way = true;
  const auto gradient_slot = static_cast<int32_t>(free - impl_->gradient_slots.begin());
  if (!weights_too) impl_->weight_queue.push_back({slot_index, gradient_slot});
  return Pass(this, weights_too ? PassKind::kBackward : PassKind::kBackwardInput, slot_index,
              gradient_slot);
}

Pass Stage::backward(int32_t slot) {
  return start_backward(slot, true);
}
Pass Stage::backward_input(int32_t slot) {
  return start_backward(slot, false);
}

Pass Stage::weight() {
  PENSTOCK_CHECK(!impl_->weight_queue.empty(), "the weight queue is empty");
  const Impl::QueuedWeight oldest = impl_->weight_queue.front();
  impl_->weight_queue.erase(impl_->weight_queue.begin());
  return Pass(this, PassKind::kWeight, oldest.slot, oldest.gradient_slot);
}

int32_t Stage::weight_queue_depth() const {
  return static_cast<int32_t>(impl_->weight_queue.size());
}

double Stage::loss_sum(int32_t slot) const {
  PENSTOCK_CHECK(is_last(), "only the last stage has a loss");
  return impl_->slot_at(slot).loss_sum;
}

double Stage::prediction_loss_sum(int32_t slot) const {
  return impl_->slot_at(slot).prediction_loss_sum;
}

void Stage::use_embedding_of(Stage& first) {
  PENSTOCK_CHECK(options().embedding_elsewhere && impl_->predicts_ahead());
  impl_->embedding = first.impl_->embedding;
}

double Stage::balance_loss_sum(int32_t slot) const {
  return impl_->slot_at(slot).balance_sum;
}

std::span<const float> Stage::logits(int32_t slot_index) const {
  const StageSlot& slot = impl_->slot_at(slot_index);
  PENSTOCK_CHECK(is_last() && !slot.training, "logits are kept by the last stage's forward_only");
  return {slot.head.logits,
          static_cast<size_t>(slot.shape.tokens() * impl_->options.model.vocab_size)};
}

std::span<Router> Stage::routers() {
  return impl_->routers;
}
std::span<int64_t> Stage::expert_loads() {
  return impl_->loads;
}
void Stage::clear_expert_loads() {
  std::fill(impl_->loads.begin(), impl_->loads.end(), 0);
}

void Stage::update_router_bias(std::span<const int64_t> loads, double gamma) {
  PENSTOCK_CHECK(loads.size() == impl_->biases.size(), loads.size());
  const auto experts = static_cast<size_t>(impl_->options.model.n_routed_experts);
  for (size_t begin = 0; begin < loads.size(); begin += experts) {
    int64_t total = 0;
    for (size_t e = 0; e < experts; ++e) total += loads[begin + e];
    for (size_t e = 0; e < experts; ++e) {
      // sign(mean - load), in whole numbers, so that a load equal to the mean moves nothing.
      const int64_t difference = total - loads[begin + e] * static_cast<int64_t>(experts);
      const int sign = (difference > 0) - (difference < 0);
      impl_->biases[begin + e] += static_cast<float>(gamma * sign);
    }
  }
}

double Stage::load_imbalance(std::span<const int64_t> loads, int64_t expert_count) {
  double worst = 0.0;
  for (size_t begin = 0; begin < loads.size(); begin += static_cast<size_t>(expert_count)) {
    const auto layer = loads.subspan(begin, static_cast<size_t>(expert_count));
    int64_t total = 0;
    for (const int64_t load : layer) total += load;
    if (total == 0) continue;
    const int64_t most = *std::max_element(layer.begin(), layer.end());
    worst = std::max(worst, static_cast<double>(most * expert_count) / static_cast<double>(total));
  }
  return worst;
}

uint64_t Stage::memory_bytes() const {
  uint64_t floats = 0;
  for (const ParameterKind kind : kParameterKinds) {
    floats += impl_->parameters->values(kind).size() + impl_->parameters->gradients(kind).size();
  }
  return floats * sizeof(float) + impl_->buffer_bytes;
}

}  // namespace penstock
