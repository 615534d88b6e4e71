// Random valid specs survive their canonical form, and no input, however broken, gets past the
// parser as anything but a spec or an error with a place.
#include <gtest/gtest.h>
#include <rapidcheck.h>

#include "comm/base/random.h"
#include "comm/run/job_spec.h"
#include "tests/run/spec_text.h"

namespace penstock {
namespace {

int64_t between(int64_t min, int64_t max) {
  return *rc::gen::inRange<int64_t>(min, max + 1);
}
double fraction() {
  return static_cast<double>(between(1, 999'999'999)) / 1e9;
}

std::string random_path() {
  // Characters that need quoting or escaping in YAML or JSON.
  return "/" + *rc::gen::container<std::string>(
                   rc::gen::elementOf(std::string("abz09 ._-/:#{}[]&*!|>'\"%@`,?\\")));
}

std::vector<DataSource> random_sources(int64_t count_min) {
  std::vector<DataSource> sources;
  for (int64_t i = between(count_min, 4); i > 0; --i)
    sources.push_back({random_path(), fraction()});
  return sources;
}

ModelConfig random_model() {
  ModelConfig m;
  m.vocab_size = between(257, 1 << 24);
  m.hidden_size = between(1, 1 << 20);
  m.num_hidden_layers = between(16, 100);  // DualPipeV has 2 stages per rank
  m.num_attention_heads = between(1, 128);
  if (*rc::gen::arbitrary<bool>()) m.q_lora_rank = between(1, 2048);
  m.kv_lora_rank = between(1, 1024);
  m.qk_nope_head_dim = between(1, 256);
  m.qk_rope_head_dim = 2 * between(1, 64);
  m.v_head_dim = between(1, 256);
  m.intermediate_size = between(1, 1 << 20);
  m.first_k_dense_replace = between(0, m.num_hidden_layers);
  m.moe_intermediate_size = between(1, 4096);
  m.n_group = between(1, 8);
  m.topk_group = between(1, m.n_group);
  const int64_t per_group = 4 * between(1, 8);
  m.n_routed_experts = m.n_group * per_group;
  m.n_shared_experts = between(0, 4);
  m.num_experts_per_tok = between(1, m.topk_group * per_group);
  m.routed_scaling_factor = 10 * fraction();
  m.norm_topk_prob = *rc::gen::arbitrary<bool>();
  m.rms_norm_eps = fraction() * 1e-5;
  m.rope_theta = 2.0 + 1e6 * fraction();
  if (*rc::gen::arbitrary<bool>()) {
    m.rope_scaling = {1.0 + fraction(), between(1, 1 << 20), 2.0 + fraction(),
                      fraction(),       fraction(),          fraction()};
  }
  m.max_position_embeddings = between(1024, 1 << 20);
  m.initializer_range = fraction();
  m.num_nextn_predict_layers = between(0, 1);
  m.aux_loss_alpha = fraction();
  return m;
}

// Levels that begin after `step`.
std::vector<StepLevel<double>> random_levels(int64_t step) {
  std::vector<StepLevel<double>> levels;
  for (int64_t i = between(0, 3); i > 0; --i) {
    levels.push_back({step += between(1, 1000), fraction()});
  }
  return levels;
}

JobSpec random_spec() {
  JobSpec s;
  s.name = "a" + *rc::gen::container<std::string>(rc::gen::elementOf(std::string("abz09-._")));
  s.name.resize(std::min<size_t>(s.name.size(), 63));
  s.model = random_model();
  s.data = {random_sources(1), random_sources(1),
            *rc::gen::element<std::string>("bytes", "/t.model"), between(2, 1024)};
  s.parallelism = {
      .pipeline = 2 * between(1, 4),
      .expert = *rc::gen::element<int64_t>(1, 2, 4),
      .data = between(1, 8),
      .schedule = *rc::gen::elementOf(std::vector(std::begin(kSchedules), std::end(kSchedules))),
      .microbatches = 0,
      .micro_batch_size = between(1, 8)};
  const auto microbatches = [&] { return 2 * s.parallelism.pipeline + 2 * between(0, 10); };
  s.parallelism.microbatches = microbatches();
  for (int64_t i = between(0, 2), step = 0; i > 0; --i) {
    s.parallelism.microbatch_levels.push_back({step += between(1, 100), microbatches()});
  }
  s.optimizer = {.lr = fraction(),
                 .beta1 = fraction(),
                 .beta2 = fraction(),
                 .eps = fraction() * 1e-8,
                 .weight_decay = fraction(),
                 .clip_grad_norm = fraction(),
                 .warmup_steps = between(0, 100),
                 .min_lr_ratio = fraction(),
                 .bias_update_speed = fraction(),
                 .hold_steps = between(0, 100),
                 .decay_steps = between(0, 100),
                 .bias_update_levels = random_levels(0),
                 .mtp_loss_weight = fraction(),
                 .mtp_loss_levels = random_levels(0),
                 .no_decay = {*rc::gen::arbitrary<bool>(), *rc::gen::arbitrary<bool>(),
                              *rc::gen::arbitrary<bool>()},
                 .moments = *rc::gen::element(MomentType::kFp32, MomentType::kBf16),
                 .ema_decay = fraction(),
                 .ema_evaluation = *rc::gen::arbitrary<bool>()};
  s.optimizer.lr_levels = random_levels(300);
  s.training = {
      .steps = between(300, 1'000'000),
      .seed = *rc::gen::arbitrary<uint64_t>(),
      .precision = *rc::gen::elementOf(std::vector(std::begin(kPrecisions), std::end(kPrecisions))),
      .evaluation_interval = between(0, 100),
      .evaluation_batches = between(1, 10),
      .recompute = {*rc::gen::arbitrary<bool>(), *rc::gen::arbitrary<bool>()}};
  const bool automatic = *rc::gen::arbitrary<bool>();
  s.checkpoint = {.dir = *rc::gen::arbitrary<bool>() ? random_path() : "",
                  .interval = automatic ? 0 : between(0, 1000),
                  .automatic = automatic,
                  .max_overhead = fraction(),
                  .device_mtbf_hours = 1e6 * fraction(),
                  .keep_last = between(1, 10),
                  .keep_every = between(0, 10),
                  .init_from = *rc::gen::arbitrary<bool>() ? random_path() : ""};
  const bool from_memory = *rc::gen::arbitrary<bool>();
  const bool mirror_automatic = from_memory && *rc::gen::arbitrary<bool>();
  s.recovery = {.max_restarts = between(0, 100),
                .hang_timeout = between(0, 86'400),
                .from_memory = from_memory,
                .replace_slow = *rc::gen::arbitrary<bool>(),
                .mirror = from_memory && !mirror_automatic ? between(0, 1'000'000) : 0,
                .mirror_automatic = mirror_automatic,
                .mirror_rate = between(1, 1 << 20)};
  s.guards = {.not_finite = *rc::gen::element(GuardPolicy::kSkip, GuardPolicy::kStop),
              .loss_spike = {*rc::gen::element(GuardPolicy::kNone, GuardPolicy::kWarn),
                             100.0 * fraction(), between(4, kGuardWindowMax)},
              .grad_norm_spike = {},
              .rollback_steps = between(1, 1000),
              .max_skips = between(0, 100),
              .max_rollbacks = between(0, 100)};
  if (s.checkpoint.saves_on_the_way()) s.guards.grad_norm_spike.policy = GuardPolicy::kRollback;
  s.parallelism.rebalance.every_checkpoints = between(1, 100);
  if (s.checkpoint.saves_on_the_way()) {
    s.parallelism.rebalance.threshold = 1.0 + fraction();
    s.parallelism.elastic = {between(1, s.parallelism.data), s.parallelism.data + between(0, 8)};
  }
  return s;
}

TEST(JobSpecPropertyTest, EveryValidSpecParsesBackFromItsCanonicalJson) {
  EXPECT_TRUE(rc::check([] {
    const JobSpec spec = random_spec();
    const auto again = parse_job_spec(to_json(spec), "canonical");
    if (!again.ok()) RC_FAIL(again.status().message() + "\n" + to_json(spec));
    RC_ASSERT(*again == spec);
    RC_ASSERT(to_json(*again) == to_json(spec));
  }));
}

// What a mutation writes: YAML's own characters more often than others.
char random_byte(Random& random) {
  constexpr std::string_view kSyntax = ":-[]{},&*!|>'\"%@`#?\n \t0159eE.+~<=";
  return random.below(4) == 0 ? static_cast<char>(random.below(256))
                              : kSyntax[random.below(kSyntax.size())];
}

std::string mutated(std::string text, Random& random) {
  for (uint64_t edits = 1 + random.below(3); edits > 0 && !text.empty(); --edits) {
    const size_t at = random.below(text.size());
    switch (random.below(5)) {
      case 0:
        text[at] = random_byte(random);
        break;
      case 1:
        text.erase(at, 1 + random.below(20));
        break;
      case 2:
        text.insert(at, 1 + random.below(3), random_byte(random));
        break;
      case 3:
        text.insert(at, text.substr(random.below(text.size()), random.below(60)));
        break;
      case 4:
        text.resize(at);
        break;
    }
  }
  return text;
}

TEST(JobSpecPropertyTest, HundredThousandMutatedSpecsGiveASpecOrAnErrorWithAPlace) {
  const auto valid = parse_job_spec(kValidSpec, "s");
  ASSERT_TRUE(valid.ok());
  const std::string seeds[] = {std::string(kValidSpec), to_json(*valid)};
  int accepted = 0;
  for (uint64_t i = 0; i < 100'000; ++i) {
    Random random(20261121, i);
    const std::string text = mutated(seeds[i % 2], random);
    const auto spec = parse_job_spec(text, "s");
    if (spec.ok()) {
      ++accepted;
      const auto again = parse_job_spec(to_json(*spec), "s");
      ASSERT_TRUE(again.ok()) << again.status().message() << "\n" << text;
      ASSERT_EQ(*again, *spec);
    } else {
      int line = 0, column = 0;
      ASSERT_EQ(std::sscanf(spec.status().message().c_str(), "s:%d:%d: ", &line, &column), 2)
          << spec.status().message();
      ASSERT_GE(line, 1);
      ASSERT_GE(column, 1);
    }
  }
  EXPECT_GT(accepted, 500);  // mutations in comments, names and digits leave a spec valid
  EXPECT_LT(accepted, 90'000);
}

}  // namespace
}  // namespace penstock
