// penstock-timed: runs a whole job of real rank processes (engine, lanes, token exchange, UCX)
// whose compute is timed waits, on this host's loopback or on a network of given rate and delay.
// Writes what every rank measured to <output>/rank-<n>.jsonl, one JSON document per step. For
// ops/bench schedule and ops/bench overlap.
#include <CLI/CLI.hpp>

#include <cstdio>
#include <map>

#include "comm/base/log.h"
#include "coordinator/plan/schedule.h"
#include "tests/support/shaped_network.h"
#include "tests/support/timed_stage.h"
#include "worker/data/indexed_dataset.h"
#include "worker/rank/standalone.h"

namespace penstock {
namespace {

struct Flags {
  std::string schedule = "dualpipe";
  int64_t pipeline = 2;
  int64_t expert = 1;
  int64_t microbatches = 4;
  int64_t layers = 1;
  int64_t tokens = 32;
  int64_t hidden = 64;
  int64_t top_k = 1;
  int64_t steps = 2;
  bool no_tokens = false;
  std::map<std::string, double> costs_ms;
  double bytes_per_second = 0.0;
  double delay_us = 0.0;
  std::string output;
};

Result<JobSpec> make_spec(const Flags& flags, const std::string& corpus) {
  const int64_t stages = flags.pipeline * (flags.schedule == "dualpipev" ? 2 : 1);
  const std::string yaml = fmt::format(
      R"(apiVersion: penstock/v1
kind: TrainingRun
metadata: {{name: timed}}
model: {{vocab_size: 257, hidden_size: {hidden}, num_hidden_layers: {layers},
  num_attention_heads: 1, kv_lora_rank: 8, qk_nope_head_dim: 8, qk_rope_head_dim: 8,
  v_head_dim: 8, intermediate_size: 8, first_k_dense_replace: 0,
  moe_intermediate_size: 8, n_routed_experts: {experts}, n_shared_experts: 1,
  num_experts_per_tok: {top_k}, max_position_embeddings: {tokens}}}
data: {{train: [{{path: {corpus}}}], tokenizer: bytes, seq_length: {tokens}}}
parallelism: {{pipeline: {pipeline}, expert: {expert}, schedule: {schedule},
  microbatches: {microbatches}, micro_batch_size: 1}}
optimizer: {{lr: 1.0e-3}}
training: {{steps: {steps}, seed: 1}}
)",
      fmt::arg("hidden", flags.hidden), fmt::arg("layers", stages * flags.layers),
      fmt::arg("experts", flags.expert), fmt::arg("top_k", flags.top_k),
      fmt::arg("tokens", flags.tokens), fmt::arg("corpus", corpus),
      fmt::arg("pipeline", flags.pipeline), fmt::arg("expert", flags.expert),
      fmt::arg("schedule", flags.schedule), fmt::arg("microbatches", flags.microbatches),
      fmt::arg("steps", flags.steps));
  return parse_job_spec(yaml, "penstock-timed");
}

// The engine reads its micro-batches as always; which tokens they hold does not matter.
Status write_corpus(const std::string& prefix, int64_t token_count) {
  PENSTOCK_TRY_ASSIGN(IndexedDatasetWriter writer,
                      IndexedDatasetWriter::create(prefix, TokenType::kU16));
  PENSTOCK_TRY(writer.add_document(std::vector<int32_t>(static_cast<size_t>(token_count), 1)));
  return writer.finish();
}

Result<SubOpCosts> make_costs(const std::map<std::string, double>& costs_ms) {
  SubOpCosts costs;
  for (const auto& [name, milliseconds] : costs_ms) {
    bool known = false;
    for (size_t i = 0; i < costs.ns.size() && !known; ++i) {
      const auto op = static_cast<SubOp>(i);
      known = sub_op_name(op) == name && !is_exchange(op);
      if (known) costs[op] = static_cast<int64_t>(milliseconds * 1e6);
    }
    if (!known) return invalid_argument(fmt::format("no compute is called {}", name));
  }
  return costs;
}

class TimedRank final : public RankProbe {
 public:
  TimedRank(const TimedStageOptions& options, const std::string& path)
      : options_(options), file_(std::fopen(path.c_str(), "w")) {}
  ~TimedRank() override {
    if (file_ != nullptr) std::fclose(file_);
  }
  bool open() const { return file_ != nullptr; }

  Transport& transport(Transport& real) override {
    watched_ = clock_.watch(real);
    return *watched_;
  }
  StageFactory stage_factory() override {
    return [this](const StageOptions& options, Kernels& kernels, ExpertExchange* exchange) {
      return std::make_unique<TimedStage>(options, options_, clock_, kernels, exchange);
    };
  }
  void on_step(const StepResult& step) override {
    const ComputeClock::Use& use = clock_.use();
    const StepTimes& times = step.times;
    fmt::print(file_,
               R"({{"step": {}, "begin_ns": {}, "end_ns": {}, "busy_ns": {}, )"
               R"("passes_seconds": {:.9f}, "expert_wait_seconds": {:.9f}}})"
               "\n",
               step.step, use.begin_ns, use.end_ns, use.busy_ns,
               times.total_seconds - times.reduce_seconds - times.optimizer_seconds,
               times.expert_wait_seconds);
    clock_.reset();
  }

 private:
  const TimedStageOptions options_;
  std::FILE* const file_;
  ComputeClock clock_;
  std::unique_ptr<Transport> watched_;
};

Status run(const Flags& flags) {
  const std::string corpus = flags.output + "/tokens";
  StandaloneOptions options;
  PENSTOCK_TRY_ASSIGN(options.spec, make_spec(flags, corpus));
  PENSTOCK_TRY(write_corpus(corpus, 4 * flags.tokens));
  PENSTOCK_TRY_ASSIGN(options.programs, make_programs(options.spec.parallelism));
  TimedStageOptions timed;
  timed.exchange_tokens = !flags.no_tokens;
  PENSTOCK_TRY_ASSIGN(timed.costs, make_costs(flags.costs_ms));
  std::unique_ptr<ShapedNetwork> network;
  if (flags.bytes_per_second > 0) {
    const ShapedNetworkOptions shape{
        .member_count = static_cast<int32_t>(options.spec.parallelism.world_size()),
        .bytes_per_second = flags.bytes_per_second,
        .delay = Duration(static_cast<int64_t>(flags.delay_us * 1e3))};
    PENSTOCK_TRY_ASSIGN(network, ShapedNetwork::create(shape));
    // Ranks of one host would talk through shared memory, however far apart their namespaces.
    ::setenv("UCX_TLS", "tcp", 1);
    ::setenv("UCX_NET_DEVICES", ShapedNetwork::kDevice, 1);
  }
  options.make_probe = [&](Rank rank) -> Result<std::unique_ptr<RankProbe>> {
    if (network) PENSTOCK_TRY(network->enter(rank.value));
    const std::string path = fmt::format("{}/rank-{}.jsonl", flags.output, rank);
    auto probe = std::make_unique<TimedRank>(timed, path);
    if (!probe->open()) return errno_status(errno, "create " + path);
    return std::unique_ptr<RankProbe>(std::move(probe));
  };
  return run_standalone_processes(options).status();
}

}  // namespace
}  // namespace penstock

int main(int argc, char** argv) {
  CLI::App app("Runs a job of real rank processes whose compute is timed waits.");
  penstock::Flags flags;
  app.add_option("--schedule", flags.schedule, "dualpipe, dualpipev, 1f1b or zb1p");
  app.add_option("--pipeline", flags.pipeline, "pipeline ranks");
  app.add_option("--expert", flags.expert, "ranks of an expert group");
  app.add_option("--microbatches", flags.microbatches, "per step");
  app.add_option("--layers", flags.layers, "per stage");
  app.add_option("--tokens", flags.tokens, "per micro-batch")->check(CLI::Range(1, 1 << 20));
  app.add_option("--hidden", flags.hidden, "fp32 values a token has");
  app.add_option("--top-k", flags.top_k, "expert ranks a token goes to");
  app.add_option("--steps", flags.steps, "training steps");
  app.add_flag("--no-tokens", flags.no_tokens, "run every exchange with nothing in it");
  app.add_option("--cost", flags.costs_ms, "SUBOP MS: what a sub-operation of a layer takes");
  app.add_option("--rate", flags.bytes_per_second,
                 "bytes/s of every rank's link, each way; 0: no network of our own");
  app.add_option("--delay-us", flags.delay_us, "one way");
  app.add_option("--output", flags.output, "existing folder for what is measured")
      ->required()
      ->check(CLI::ExistingDirectory);
  CLI11_PARSE(app, argc, argv);
  penstock::start_logging("timed");
  const penstock::Status status = penstock::run(flags);
  if (status.ok()) return 0;
  std::fprintf(stderr, "penstock-timed: %s\n", status.to_string().c_str());
  return 1;
}
