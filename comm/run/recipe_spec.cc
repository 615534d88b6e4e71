#include "comm/run/recipe_spec.h"

#include <fmt/format.h>

#include <limits>

namespace penstock {

namespace {

using Need = MappingReader::Need;

constexpr int64_t kStepsMax = 1'000'000'000;
constexpr size_t kLevelsMax = 64;

void read_betas(MappingReader& reader, SpecProblems& problems, OptimizerSpec& optimizer) {
  const YamlNode* list = reader.value("betas");
  if (list == nullptr) return;
  if (list->kind != YamlNode::Kind::kSequence || list->items.size() != 2) {
    problems.wrong(*list, "optimizer.betas must be a list of two numbers, such as [0.9, 0.95]");
    return;
  }
  YamlNode wrapper;  // names the two, so that the number check can point at either
  wrapper.kind = YamlNode::Kind::kMapping;
  wrapper.items = list->items;
  for (const char* name : {"betas[0]", "betas[1]"}) {
    YamlNode key;
    key.text = name;
    wrapper.keys.push_back(std::move(key));
  }
  MappingReader betas(problems, &wrapper, *list, "optimizer", Need::kOptional);
  const double below_one = 1.0 - std::numeric_limits<double>::epsilon() / 2;
  betas.real("betas[0]", 0.0, below_one, false, optimizer.beta1);
  betas.real("betas[1]", 0.0, below_one, false, optimizer.beta2);
}

void read_value(MappingReader& level, double max, double& value) {
  level.real("value", 0.0, max, false, value, Need::kRequired);
}
void read_value(MappingReader& level, int64_t max, int64_t& value) {
  level.integer("value", 1, max, value, Need::kRequired);
}

// A list of {from_step, value}, the steps ascending.
template <typename T>
void read_list(MappingReader& reader, const std::string& key, SpecProblems& problems, T max,
               std::vector<StepLevel<T>>& levels) {
  const YamlNode* list = reader.value(key);
  if (list == nullptr) return;
  const std::string path = reader.path() + "." + key;
  if (list->kind != YamlNode::Kind::kSequence || list->items.size() > kLevelsMax) {
    problems.wrong(*list, fmt::format("{} must be a list of at most {} levels {{from_step: …, "
                                      "value: …}}",
                                      path, kLevelsMax));
    return;
  }
  for (size_t i = 0; i < list->items.size(); ++i) {
    const YamlNode& item = list->items[i];
    StepLevel<T> level;
    MappingReader entry(problems, &item, item, fmt::format("{}[{}]", path, i), Need::kRequired);
    entry.integer("from_step", 1, kStepsMax, level.from_step, Need::kRequired);
    read_value(entry, max, level.value);
    entry.finish();
    if (!levels.empty() && level.from_step <= levels.back().from_step) {
      problems.wrong(item, fmt::format("{}[{}].from_step {} must be above the {} before it", path,
                                       i, level.from_step, levels.back().from_step));
    }
    levels.push_back(level);
  }
}

void read_levels(MappingReader& reader, const std::string& key, SpecProblems& problems, double max,
                 std::vector<StepLevel<double>>& levels) {
  read_list(reader, key, problems, max, levels);
}

}  // namespace

void read_levels(MappingReader& reader, const std::string& key, SpecProblems& problems, int64_t max,
                 std::vector<StepLevel<int64_t>>& levels) {
  read_list(reader, key, problems, max, levels);
}

void read_optimizer(MappingReader reader, SpecProblems& problems, OptimizerSpec& optimizer) {
  constexpr double kNormMax = 1e9;
  reader.only("name", {"adamw"}, "only adamw is");
  reader.real("lr", 0.0, 100.0, true, optimizer.lr, Need::kRequired);
  read_betas(reader, problems, optimizer);
  reader.real("eps", 0.0, 1.0, true, optimizer.eps);
  reader.real("weight_decay", 0.0, 100.0, false, optimizer.weight_decay);
  // What weight decay leaves alone, besides norms and biases, on which it never falls.
  const std::vector<bool> no_decay = reader.word_list("no_decay", {"embedding", "head", "router"});
  optimizer.no_decay = {.embedding = no_decay[0], .head = no_decay[1], .router = no_decay[2]};
  reader.real("clip_grad_norm", 0.0, kNormMax, false, optimizer.clip_grad_norm);
  reader.real("bias_update_speed", 0.0, 1.0, false, optimizer.bias_update_speed);
  reader.real("mtp_loss_weight", 0.0, 100.0, false, optimizer.mtp_loss_weight);
  if (const auto moments = reader.word("moments", {"fp32", "bf16"})) {
    optimizer.moments = *moments == 0 ? MomentType::kFp32 : MomentType::kBf16;
  }
  reader.real("ema_decay", 0.0, 1.0, false, optimizer.ema_decay);
  reader.boolean("ema_evaluation", optimizer.ema_evaluation);
  reader.finish();
}

void read_schedule(MappingReader reader, SpecProblems& problems, OptimizerSpec& optimizer) {
  reader.integer("warmup_steps", 0, kStepsMax, optimizer.warmup_steps);
  reader.integer("hold_steps", 0, kStepsMax, optimizer.hold_steps);
  reader.only("decay", {"cosine"}, "only cosine is");
  reader.integer("decay_steps", 0, kStepsMax, optimizer.decay_steps);
  reader.real("min_lr_ratio", 0.0, 1.0, false, optimizer.min_lr_ratio);
  read_levels(reader, "lr_ratio", problems, 1.0, optimizer.lr_levels);
  read_levels(reader, "bias_update_speed", problems, 1.0, optimizer.bias_update_levels);
  read_levels(reader, "mtp_loss_weight", problems, 100.0, optimizer.mtp_loss_levels);
  reader.finish();
}

void check_recipe(const JobSpec& spec, SpecProblems& problems) {
  const OptimizerSpec& o = spec.optimizer;
  const int64_t steps = spec.training.steps;
  problems.rule("schedule.warmup_steps", o.warmup_steps <= steps,
                fmt::format("schedule.warmup_steps {} is more than training.steps {}",
                            o.warmup_steps, steps));
  const int64_t decayed = o.warmup_steps + o.hold_steps + o.decay_steps;
  problems.rule("schedule.hold_steps", o.hold_steps == 0 || decayed <= steps,
                fmt::format("schedule: {} steps of warm-up, {} held and {} of decay are more than "
                            "training.steps {}",
                            o.warmup_steps, o.hold_steps, o.decay_steps, steps));
  problems.rule("schedule.decay_steps", o.decay_steps == 0 || decayed <= steps,
                fmt::format("schedule.decay_steps {} ends at step {}, after training.steps {}",
                            o.decay_steps, decayed, steps));
  problems.rule(
      "schedule.lr_ratio", o.lr_levels.empty() || o.lr_levels[0].from_step > decayed,
      fmt::format("schedule.lr_ratio begins at step {}, before warm-up, hold and decay end "
                  "at step {}",
                  o.lr_levels.empty() ? 0 : o.lr_levels[0].from_step, decayed));
  problems.rule("model.num_nextn_predict_layers",
                spec.model.num_nextn_predict_layers == 0 || spec.data.seq_length > 1,
                "model.num_nextn_predict_layers predicts the token after the next: data.seq_length "
                "must be above 1");
  problems.rule("optimizer.ema_decay", o.ema_decay < 1.0,
                "optimizer.ema_decay must be below 1: an average that keeps all of itself never "
                "learns");
  problems.rule(
      "optimizer.ema_evaluation", !o.ema_evaluation || o.ema_decay > 0.0,
      "optimizer.ema_evaluation needs optimizer.ema_decay above 0; set it, for example to "
      "0.999, or remove the key");
}

}  // namespace penstock
