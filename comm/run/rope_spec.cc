#include "comm/run/rope_spec.h"

#include <fmt/format.h>

namespace penstock {

namespace {

using Need = MappingReader::Need;

constexpr double kThetaMax = 1e12;
constexpr double kFactorMax = 1e6;

// "type" in older configurations, "rope_type" in newer ones; some files have both.
bool reads_yarn(MappingReader& reader, bool required) {
  const std::vector<std::string> words = {"default", "yarn"};
  const auto old_word = reader.word("type", words);
  const auto new_word =
      reader.word("rope_type", words, required && !old_word ? Need::kRequired : Need::kOptional);
  return old_word == 1 || new_word == 1;
}

void read_yarn(MappingReader& reader, ModelConfig& model) {
  YarnScaling yarn;
  reader.real("factor", 1.0, kFactorMax, false, yarn.factor, Need::kRequired);
  reader.integer("original_max_position_embeddings", 1, 1 << 24,
                 yarn.original_max_position_embeddings, Need::kRequired);
  reader.real("beta_fast", 0.0, kFactorMax, true, yarn.beta_fast);
  reader.real("beta_slow", 0.0, kFactorMax, true, yarn.beta_slow);
  reader.real("mscale", 0.0, kFactorMax, false, yarn.mscale);
  reader.real("mscale_all_dim", 0.0, kFactorMax, false, yarn.mscale_all_dim);
  model.rope_scaling = yarn;
}

void read_section(MappingReader reader, bool is_scaling, ModelConfig& model) {
  if (!reader.present()) return;
  if (!is_scaling) reader.real("rope_theta", 0.0, kThetaMax, true, model.rope_theta);
  if (reads_yarn(reader, is_scaling)) read_yarn(reader, model);
  reader.finish();
}

}  // namespace

void read_rope(MappingReader& model_reader, SpecProblems& problems, ModelConfig& model) {
  model_reader.real("rope_theta", 0.0, kThetaMax, true, model.rope_theta);
  MappingReader scaling = model_reader.section("rope_scaling");
  MappingReader parameters = model_reader.section("rope_parameters");
  problems.rule("model.rope_parameters", !scaling.present() || !parameters.present(),
                "model.rope_parameters and model.rope_scaling say the same thing; keep one");
  read_section(scaling, true, model);
  read_section(parameters, false, model);
  if (!model.rope_scaling) return;
  const YarnScaling& yarn = *model.rope_scaling;
  const std::string path = scaling.present() ? "model.rope_scaling" : "model.rope_parameters";
  problems.rule(path + ".beta_fast", yarn.beta_fast > yarn.beta_slow,
                fmt::format("{}.beta_fast {} must be above beta_slow {}", path, yarn.beta_fast,
                            yarn.beta_slow));
  problems.rule(path, model.rope_theta > 1.0,
                fmt::format("{} needs model.rope_theta above 1, not {}", path, model.rope_theta));
}

}  // namespace penstock
