// penstock sample: text from the newest whole checkpoint of a job.
#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>

#include "ops/cli/checkpoint_source.h"
#include "ops/cli/cli.h"
#include "worker/data/tokenizer.h"
#include "worker/model/generator.h"

namespace penstock {

namespace {

struct SampleFlags {
  std::string job;
  std::string prompt;
  std::optional<int64_t> step;
  bool average = false;
  SamplingOptions sampling = {.token_count = 200, .temperature = 0.8};
};

// Pieces between ends of documents, with an empty line for each end.
Result<std::string> text_of(const Tokenizer& tokenizer, std::span<const int32_t> tokens) {
  std::string text;
  while (!tokens.empty()) {
    const auto end = std::find(tokens.begin(), tokens.end(), tokenizer.end_of_document());
    const auto piece = tokens.first(end - tokens.begin());
    PENSTOCK_TRY_ASSIGN(const std::string decoded, tokenizer.decode(piece));
    text += decoded;
    if (end == tokens.end()) break;
    text += "\n\n";
    tokens = tokens.subspan(piece.size() + 1);
  }
  return text;
}

Result<ExitCode> sample(Cli& cli, const SampleFlags& flags) {
  PENSTOCK_TRY_ASSIGN(const CheckpointSource source, checkpoint_of_job(cli, flags.job, flags.step));
  const JobSpec& spec = source.spec;
  if (flags.average && spec.optimizer.ema_decay == 0.0) {
    return failed_precondition(
        fmt::format("job {} keeps no average of its weights; leave out --average, or train with "
                    "optimizer.ema_decay",
                    flags.job));
  }
  PENSTOCK_TRY_ASSIGN(const auto tokenizer, make_tokenizer(spec.data.tokenizer));
  Generator generator(spec.model, spec.data.seq_length);
  PENSTOCK_TRY(load_weights(source, generator, flags.average));

  // A document's beginning, as in training.
  std::vector<int32_t> prompt = {tokenizer->end_of_document()};
  PENSTOCK_TRY(tokenizer->encode(flags.prompt, prompt));
  PENSTOCK_TRY_ASSIGN(const auto tokens, generator.generate(prompt, flags.sampling));
  PENSTOCK_TRY_ASSIGN(const std::string text, text_of(*tokenizer, tokens));
  cli.out.document({{"apiVersion", "penstock/v1"},
                    {"kind", "Sample"},
                    {"job", source.manifest.job.value},
                    {"step", source.manifest.step},
                    {"prompt", flags.prompt},
                    {"text", text},
                    {"tokens", tokens}});
  cli.out.text(flags.prompt + text + "\n");
  cli.out.note(fmt::format("job {} \"{}\" after step {}", source.manifest.job, spec.name,
                           source.manifest.step));
  return ExitCode::kOk;
}

}  // namespace

void add_sample_verb(CLI::App& app, Cli& cli) {
  auto flags = std::make_shared<SampleFlags>();
  CLI::App* verb =
      add_verb(app, "sample", "Write text with a job's newest checkpoint, or that of a step",
               "penstock sample quickstart --prompt \"The \" --tokens 300 --temperature 0.7\n"
               "penstock sample quickstart --step 120        # penstock checkpoint ls lists them\n"
               "penstock sample quickstart --seed 7 -o json | jq -r .text");
  verb->add_option("job", flags->job, "Name or id")->required();
  verb->add_option("--step", flags->step, "With the checkpoint of this step (default: the newest)")
      ->check(CLI::Range(int64_t{0}, int64_t{1'000'000'000}));
  verb->add_option("--prompt", flags->prompt, "Text to go on from; none starts a document");
  verb->add_option("--tokens", flags->sampling.token_count, "How many to write")
      ->check(CLI::Range(1, 1'000'000))
      ->capture_default_str();
  verb->add_option("--temperature", flags->sampling.temperature, "0: always the likeliest token")
      ->check(CLI::Range(0.0, 100.0))
      ->capture_default_str();
  verb->add_option("--top-k", flags->sampling.top_k, "Choose among the k likeliest; 0: among all")
      ->check(CLI::Range(0, 1 << 24))
      ->capture_default_str();
  verb->add_flag("--average", flags->average,
                 "The moving average of the weights (optimizer.ema_decay)");
  verb->add_option("--seed", flags->sampling.seed, "Same seed, same text")->capture_default_str();
  verb->callback([&cli, flags] { cli.action = [&cli, flags] { return sample(cli, *flags); }; });
}

}  // namespace penstock
