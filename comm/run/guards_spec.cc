#include "comm/run/guards_spec.h"

#include <fmt/format.h>

namespace penstock {
namespace {

constexpr int64_t kActionsMax = 1'000'000;
constexpr double kSigmasMax = 1e6;

void read_policy(MappingReader& reader, const std::string& key,
                 const std::vector<GuardPolicy>& allowed, GuardPolicy& policy) {
  std::vector<std::string> words;
  for (const GuardPolicy one : allowed) words.emplace_back(to_string(one));
  if (const auto index = reader.word(key, words)) policy = allowed[*index];
}

void read_spike(MappingReader reader, SpikeSpec& spike) {
  read_policy(reader, "policy",
              {GuardPolicy::kNone, GuardPolicy::kWarn, GuardPolicy::kSkip, GuardPolicy::kStop},
              spike.policy);
  reader.real("sigmas", 0.0, kSigmasMax, true, spike.sigmas);
  reader.integer("window", 4, kGuardWindowMax, spike.window);
  reader.finish();
}

}  // namespace

void read_guards(MappingReader reader, GuardsSpec& guards) {
  read_policy(reader, "not_finite", {GuardPolicy::kStop, GuardPolicy::kSkip}, guards.not_finite);
  read_spike(reader.section("loss_spike"), guards.loss_spike);
  read_spike(reader.section("grad_norm_spike"), guards.grad_norm_spike);
  reader.integer("max_skips", 0, kActionsMax, guards.max_skips);
  reader.finish();
}

}  // namespace penstock
