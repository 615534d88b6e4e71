#include "tests/worker/engine_test_support.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include "checkpoint/store.h"
#include "comm/base/random.h"
#include "coordinator/plan/schedule.h"
#include "worker/data/indexed_dataset.h"

namespace penstock {

ScratchDirectory::ScratchDirectory() {
  std::string name = (std::filesystem::temp_directory_path() / "penstock-engine-XXXXXX").string();
  PENSTOCK_CHECK(::mkdtemp(name.data()) != nullptr);
  path_ = name;
}
ScratchDirectory::~ScratchDirectory() {
  std::error_code ignored;
  std::filesystem::remove_all(path_, ignored);
}

std::string to_string(const TinyLayout& layout) {
  return fmt::format("{} pipeline {} expert {} data {}", to_string(layout.schedule),
                     layout.pipeline, layout.expert, layout.data);
}

void write_tiny_corpus(const Path& directory) {
  constexpr uint64_t kTokens = 40;
  const auto write = [&](const char* name, uint64_t stream, int64_t count) {
    Result<IndexedDatasetWriter> writer =
        IndexedDatasetWriter::create((directory / name).string(), TokenType::kU16);
    ASSERT_TRUE(writer.ok()) << writer.status().to_string();
    Random random(7, stream);
    std::vector<int32_t> tokens;
    uint64_t token = 0;
    for (int64_t i = 0; i < count; ++i) {
      token = random.below(4) == 0 ? random.below(kTokens) : (3 * token + 1) % kTokens;
      tokens.push_back(static_cast<int32_t>(token));
    }
    ASSERT_TRUE(writer->add_document(tokens).ok());
    ASSERT_TRUE(writer->finish().ok());
  };
  write("train", 1, 20000);
  write("valid", 2, 4000);
}

JobSpec tiny_spec(const Path& directory, const TinyLayout& layout, int64_t steps) {
  JobSpec spec;
  spec.name = "tiny";
  spec.model = {.vocab_size = 272,
                .hidden_size = 32,
                .num_hidden_layers = 5,
                .num_attention_heads = 2,
                .q_lora_rank = 16,
                .kv_lora_rank = 16,
                .qk_nope_head_dim = 8,
                .qk_rope_head_dim = 8,
                .v_head_dim = 8,
                .intermediate_size = 64,
                .first_k_dense_replace = 1,
                .moe_intermediate_size = 16,
                .n_routed_experts = 8,
                .n_shared_experts = 1,
                .num_experts_per_tok = 2,
                .n_group = 2,
                .topk_group = 1,
                .routed_scaling_factor = 1.5,
                .max_position_embeddings = 64};
  spec.data = {.train = {{(directory / "train").string(), 1.0}},
               .validation = {{(directory / "valid").string(), 1.0}},
               .tokenizer = "bytes",
               .seq_length = 16};
  spec.parallelism = {.pipeline = layout.pipeline,
                      .expert = layout.expert,
                      .data = layout.data,
                      .schedule = layout.schedule,
                      .microbatches = layout.sequences_per_step / (layout.expert * layout.data),
                      .micro_batch_size = 1};
  spec.optimizer.lr = 3e-3;
  spec.optimizer.warmup_steps = 2;
  spec.training = {.steps = steps, .seed = 11, .evaluation_interval = 0, .evaluation_batches = 2};
  return spec;
}

StandaloneOptions tiny_run(const JobSpec& spec) {
  Result<std::vector<Program>> programs = make_programs(spec.parallelism);
  EXPECT_TRUE(programs.ok()) << programs.status().to_string();
  StandaloneOptions options;
  options.spec = spec;
  if (programs.ok()) options.programs = *std::move(programs);
  return options;
}

StandaloneReport train_tiny(const StandaloneOptions& options) {
  Result<StandaloneReport> report = run_standalone_threads(options);
  EXPECT_TRUE(report.ok()) << report.status().to_string();
  return report.ok() ? *std::move(report) : StandaloneReport{};
}

Path manifest_of_step(const Path& checkpoints, int64_t step) {
  for (const CheckpointInfo& info : list_checkpoints(checkpoints, JobId{1}).checkpoints) {
    if (info.step == step) return checkpoints / info.manifest_file;
  }
  ADD_FAILURE() << "no checkpoint of step " << step;
  return {};
}

}  // namespace penstock
