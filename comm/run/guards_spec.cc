#include "comm/run/guards_spec.h"

#include <fmt/format.h>

namespace penstock {
namespace {

constexpr int64_t kStepsMax = 1'000'000'000;
constexpr int64_t kActionsMax = 1'000'000;
constexpr int64_t kRollbacksMax = 1000;  // each is sent with every start
constexpr double kSigmasMax = 1e6;

void read_policy(MappingReader& reader, const std::string& key,
                 const std::vector<GuardPolicy>& allowed, GuardPolicy& policy) {
  std::vector<std::string> words;
  for (const GuardPolicy one : allowed) words.emplace_back(to_string(one));
  if (const auto index = reader.word(key, words)) policy = allowed[*index];
}

void read_spike(MappingReader reader, SpikeSpec& spike) {
  read_policy(reader, "policy",
              {GuardPolicy::kNone, GuardPolicy::kWarn, GuardPolicy::kSkip, GuardPolicy::kRollback,
               GuardPolicy::kStop},
              spike.policy);
  reader.real("sigmas", 0.0, kSigmasMax, true, spike.sigmas);
  reader.integer("window", 4, kGuardWindowMax, spike.window);
  reader.finish();
}

bool rolls_back(const GuardsSpec& guards) {
  return guards.not_finite == GuardPolicy::kRollback ||
         guards.loss_spike.policy == GuardPolicy::kRollback ||
         guards.grad_norm_spike.policy == GuardPolicy::kRollback;
}

}  // namespace

void read_guards(MappingReader reader, GuardsSpec& guards) {
  read_policy(reader, "not_finite",
              {GuardPolicy::kStop, GuardPolicy::kSkip, GuardPolicy::kRollback}, guards.not_finite);
  read_spike(reader.section("loss_spike"), guards.loss_spike);
  read_spike(reader.section("grad_norm_spike"), guards.grad_norm_spike);
  reader.integer("rollback_steps", 1, kStepsMax, guards.rollback_steps);
  reader.integer("max_skips", 0, kActionsMax, guards.max_skips);
  reader.integer("max_rollbacks", 0, kRollbacksMax, guards.max_rollbacks);
  reader.integer("compare_replicas_every", 0, kStepsMax, guards.compare_replicas_every);
  reader.integer("duplicate_every", 0, kStepsMax, guards.duplicate_every);
  reader.finish();
}

void check_guards(const JobSpec& spec, SpecProblems& problems) {
  problems.rule("guards", !rolls_back(spec.guards) || spec.checkpoint.saves_on_the_way(),
                "guards: policy rollback needs checkpoint.interval above 0 or auto: there is "
                "nothing to go back to without checkpoints");
}

}  // namespace penstock
