#include "comm/run/job_spec.h"

#include <gtest/gtest.h>

#include "tests/run/spec_text.h"

namespace penstock {
namespace {

std::string error_of(const std::string& text) {
  const auto spec = parse_job_spec(text, "s.yaml");
  if (spec.ok()) return "no error";
  EXPECT_EQ(spec.status().code(), Code::kInvalidArgument);
  return spec.status().message();
}

TEST(JobSpecTest, AValidSpecGivesEveryValueItNames) {
  const auto spec = parse_job_spec(kValidSpec, "s.yaml");
  ASSERT_TRUE(spec.ok()) << spec.status().to_string();
  EXPECT_EQ(spec->name, "tiny");
  EXPECT_EQ(spec->model.vocab_size, 257);
  EXPECT_EQ(spec->model.q_lora_rank, 32);
  EXPECT_EQ(spec->data.train, (std::vector<DataSource>{{"/data/corpus_train", 1.0}}));
  EXPECT_EQ(spec->data.validation, (std::vector<DataSource>{{"/data/corpus_heldout", 1.0}}));
  EXPECT_EQ(spec->parallelism.world_size(), 4);
  EXPECT_EQ(spec->parallelism.schedule, Schedule::kDualPipe);
  EXPECT_EQ(spec->optimizer.lr, 3.0e-4);
  EXPECT_EQ(spec->optimizer.beta2, 0.95);
  EXPECT_EQ(spec->optimizer.warmup_steps, 10);
  EXPECT_EQ(spec->training.seed, 42u);
  EXPECT_EQ(spec->checkpoint.interval, 20);
  EXPECT_EQ(spec->tokens_per_step(), 4 * 2 * 128);
}

TEST(JobSpecTest, KeysLeftOutTakeTheirDefaults) {
  const auto spec = parse_job_spec(kValidSpec, "s.yaml");
  ASSERT_TRUE(spec.ok());
  EXPECT_EQ(spec->parallelism.data, 1);
  EXPECT_EQ(spec->parallelism.micro_batch_size, 1);
  EXPECT_EQ(spec->parallelism.rebalance, (RebalanceSpec{0.0, 1}));
  EXPECT_EQ(spec->optimizer.weight_decay, 0.1);
  EXPECT_EQ(spec->training.precision, Precision::kFp32);
  EXPECT_EQ(spec->optimizer.clip_grad_norm, 1.0);
  EXPECT_EQ(spec->checkpoint.keep_last, 3);
  EXPECT_EQ(spec->recovery.max_restarts, 5);
  EXPECT_EQ(spec->recovery.hang_timeout, 60);
  EXPECT_FALSE(spec->recovery.mirrors()) << "it takes memory: who wants it says so";
  EXPECT_EQ(spec->model.max_position_embeddings, 4096);
  EXPECT_TRUE(spec->checkpoint.dir.empty());
}

TEST(JobSpecTest, CanonicalJsonParsesBackToTheSameSpec) {
  const auto spec = parse_job_spec(kValidSpec, "s.yaml");
  ASSERT_TRUE(spec.ok());
  const auto again = parse_job_spec(to_json(*spec), "canonical");
  ASSERT_TRUE(again.ok()) << again.status().message();
  EXPECT_EQ(*again, *spec);
  EXPECT_EQ(spec_digest(*again), spec_digest(*spec));
}

TEST(JobSpecTest, PrecisionIsOneOfThree) {
  const auto fp8 = parse_job_spec(edited("seed: 42", "seed: 42, precision: fp8"), "s.yaml");
  ASSERT_TRUE(fp8.ok()) << fp8.status().message();
  EXPECT_EQ(fp8->training.precision, Precision::kFp8);
  const auto other = parse_job_spec(edited("seed: 42", "seed: 42, precision: bf8"), "s.yaml");
  EXPECT_NE(other.status().message().find("training.precision must be fp32, fp8 or fp8_hopper"),
            std::string::npos);
}

TEST(JobSpecTest, OneChangedValueChangesTheDigest) {
  const auto spec = parse_job_spec(kValidSpec, "s.yaml");
  const auto other = parse_job_spec(edited("seed: 42", "seed: 43"), "s.yaml");
  ASSERT_TRUE(spec.ok() && other.ok());
  EXPECT_NE(spec_digest(*spec), spec_digest(*other));
}

TEST(JobSpecTest, ANullQueryRankMeansQueriesAreNotCompressed) {
  const auto spec = parse_job_spec(edited("q_lora_rank: 32", "q_lora_rank: null"), "s.yaml");
  ASSERT_TRUE(spec.ok()) << spec.status().message();
  EXPECT_FALSE(spec->model.q_lora_rank.has_value());
}

TEST(JobSpecTest, ABarePathIsASourceOfWeightOne) {
  const auto spec = parse_job_spec(
      edited("[{path: /data/corpus_train, weight: 1.0}]", "[/a, {path: /b}]"), "s.yaml");
  ASSERT_TRUE(spec.ok()) << spec.status().message();
  EXPECT_EQ(spec->data.train, (std::vector<DataSource>{{"/a", 1.0}, {"/b", 1.0}}));
}

TEST(JobSpecTest, KeysOfAPastedConfigThatChangeNothingAreAccepted) {
  const auto spec = parse_job_spec(
      edited("  vocab_size: 257\n",
             "  architectures: [DeepseekV3ForCausalLM]\n  model_type: deepseek_v3\n"
             "  torch_dtype: bfloat16\n  use_cache: true\n  bos_token_id: 0\n  hidden_act: silu\n"
             "  attention_dropout: 0.0\n  num_key_value_heads: 4\n  rope_scaling: null\n"
             "  rope_parameters: {rope_type: default, rope_theta: 500.0}\n  vocab_size: 257\n"),
      "s.yaml");
  ASSERT_TRUE(spec.ok()) << spec.status().message();
  EXPECT_EQ(spec->model.rope_theta, 500.0);
}

TEST(JobSpecTest, AnUnknownKeyNamesTheNearestValidOne) {
  EXPECT_EQ(error_of(edited("hidden_size", "hiden_size")),
            "s.yaml:6:3: unknown key \"hiden_size\" in model; did you mean \"hidden_size\"?");
}

TEST(JobSpecTest, CheckpointsOfCertainStepsMayBeKept) {
  const auto with = [](const std::string& every) {
    return edited("checkpoint: {interval: 20}",
                  "checkpoint: {interval: 20, keep_every: " + every + "}");
  };
  const auto spec = parse_job_spec(with("1000"), "s.yaml");
  ASSERT_TRUE(spec.ok()) << spec.status().to_string();
  EXPECT_EQ(spec->checkpoint.keep_every, 1000);
  EXPECT_EQ(parse_job_spec(to_json(*spec), "again")->checkpoint.keep_every, 1000);
  EXPECT_NE(error_of(with("-1")).find("keep_every"), std::string::npos);
}

TEST(JobSpecTest, TheIntervalBetweenCheckpointsMayBeLeftToTheCoordinator) {
  const auto with = [](const std::string& checkpoint) {
    return edited("checkpoint: {interval: 20}", "checkpoint: {" + checkpoint + "}");
  };
  const auto spec =
      parse_job_spec(with("interval: auto, max_overhead: 0.02, device_mtbf_hours: 1000"), "s.yaml");
  ASSERT_TRUE(spec.ok()) << spec.status().to_string();
  EXPECT_TRUE(spec->checkpoint.automatic);
  EXPECT_EQ(spec->checkpoint.interval, 0);
  EXPECT_EQ(spec->checkpoint.max_overhead, 0.02);
  EXPECT_EQ(spec->checkpoint.device_mtbf_hours, 1000.0);
  EXPECT_EQ(*parse_job_spec(to_json(*spec), "again"), *spec);
  EXPECT_EQ(error_of(with("interval: often")),
            "s.yaml:31:24: checkpoint.interval must be an integer from 0 to 1000000000 or auto, "
            "not often");
  EXPECT_NE(error_of(with("max_overhead: 0")).find("max_overhead"), std::string::npos);
  EXPECT_NE(error_of(with("device_mtbf_hours: -1")).find("device_mtbf_hours"), std::string::npos);
}

TEST(JobSpecTest, CopiesOfStateAreMadeSoManyStepsApartOrAsOftenAsTheirRateAllows) {
  const auto with = [](const std::string& recovery) {
    return edited("checkpoint: {", "recovery: {" + recovery + "}\ncheckpoint: {");
  };
  const auto recovery = [&](const std::string& words) {
    const auto spec = parse_job_spec(with(words), "s.yaml");
    EXPECT_TRUE(spec.ok()) << spec.status().to_string();
    return spec.ok() ? spec->recovery : RecoverySpec();
  };
  EXPECT_EQ(recovery("mirror: auto"), (RecoverySpec{.mirror_automatic = true}));
  EXPECT_EQ(recovery("mirror: 20, mirror_rate: 1048576"),
            (RecoverySpec{.mirror = 20, .mirror_rate = 1 << 20}));
  EXPECT_EQ(recovery("mirror: 0, from_memory: false"), (RecoverySpec{.from_memory = false}));
  EXPECT_EQ(error_of(with("mirror: often")),
            "s.yaml:31:20: recovery.mirror must be an integer from 0 to 1000000000 or auto, "
            "not often");
  for (const std::string rate : {"0", "1048577"}) {
    EXPECT_EQ(
        error_of(with("mirror_rate: " + rate)),
        "s.yaml:31:25: recovery.mirror_rate must be an integer from 1 to 1048576, not " + rate);
  }
  for (const std::string mirror : {"auto", "20"}) {
    EXPECT_EQ(error_of(with("from_memory: false, mirror: " + mirror)),
              "s.yaml:31:40: recovery.mirror copies the state that workers hold in memory, which "
              "recovery.from_memory: false does without; leave one of them out");
  }
}

TEST(JobSpecTest, AnUnknownKeyNearNothingListsTheValidOnes) {
  EXPECT_EQ(error_of(edited("checkpoint: {interval", "checkpoint: {colour")),
            "s.yaml:31:14: unknown key \"colour\" in checkpoint; valid keys: dir, interval, "
            "max_overhead, device_mtbf_hours, keep_last, keep_every, init_from");
}

TEST(JobSpecTest, AnUnknownSectionNamesTheNearest) {
  EXPECT_EQ(error_of(edited("parallelism:", "paralelism:")),
            "s.yaml:27:1: unknown key \"paralelism\"; did you mean \"parallelism\"?");
}

TEST(JobSpecTest, TheFirstProblemInTheFileIsReported) {
  const std::string two = edited("steps: 100", "steps: many");
  std::string text = two;
  text.replace(text.find("vocab_size: 257"), 15, "vocab_size: -1 ");
  EXPECT_EQ(error_of(text),
            "s.yaml:5:15: model.vocab_size must be an integer from 2 to 16777216, not -1");
}

TEST(JobSpecTest, AMissingKeyIsNamedWithItsSection) {
  EXPECT_EQ(error_of(edited("  hidden_size: 64\n", "")),
            "s.yaml:5:3: model.hidden_size is missing; it has no default");
}

TEST(JobSpecTest, AMissingSectionIsNamed) {
  EXPECT_EQ(error_of(edited("optimizer: {name: adamw, lr: 3.0e-4, betas: [0.9, 0.95]}\n", "")),
            "s.yaml:1:1: optimizer is missing; docs/job-spec.md lists its keys");
}

TEST(JobSpecTest, TextWhereANumberBelongsIsRefused) {
  EXPECT_EQ(error_of(edited("hidden_size: 64", "hidden_size: wide")),
            "s.yaml:6:16: model.hidden_size must be an integer from 1 to 1048576, not wide");
}

TEST(JobSpecTest, ANumberInQuotesIsText) {
  EXPECT_EQ(error_of(edited("hidden_size: 64", "hidden_size: \"64\"")),
            "s.yaml:6:16: model.hidden_size must be an integer from 1 to 1048576, not \"64\"");
}

TEST(JobSpecTest, AFractionWhereAnIntegerBelongsIsRefused) {
  EXPECT_EQ(error_of(edited("seq_length: 128", "seq_length: 128.5")),
            "s.yaml:26:15: data.seq_length must be an integer from 1 to 16777216, not 128.5");
}

TEST(JobSpecTest, AListWhereAMappingBelongsIsRefused) {
  EXPECT_EQ(error_of(edited("checkpoint: {interval: 20}", "checkpoint: [20]")),
            "s.yaml:31:13: checkpoint must be a mapping (key: value), not a list");
}

TEST(JobSpecTest, ValuesThatAreNotFiniteAreRefused) {
  for (const char* value : {".inf", "-.inf", ".nan", ".NaN", "inf", "nan", "1e999"}) {
    const std::string error = error_of(edited("lr: 3.0e-4", std::string("lr: ") + value));
    EXPECT_EQ(error.substr(0, 13), "s.yaml:28:30:") << error;
    EXPECT_NE(error.find("optimizer.lr must be"), std::string::npos) << error;
  }
}

TEST(JobSpecTest, ALearningRateOfZeroIsOutOfRange) {
  EXPECT_EQ(error_of(edited("lr: 3.0e-4", "lr: 0")),
            "s.yaml:28:30: optimizer.lr must be a number above 0 and at most 100, not 0");
}

TEST(JobSpecTest, ABetaOfOneIsOutOfRange) {
  EXPECT_NE(error_of(edited("[0.9, 0.95]", "[0.9, 1.0]")).find("s.yaml:28:51: optimizer.betas[1]"),
            std::string::npos);
}

TEST(JobSpecTest, BetasMustBeTwo) {
  EXPECT_EQ(error_of(edited("[0.9, 0.95]", "[0.9]")),
            "s.yaml:28:45: optimizer.betas must be a list of two numbers, such as [0.9, 0.95]");
}

TEST(JobSpecTest, ADuplicateKeyNamesBothPlaces) {
  EXPECT_EQ(error_of(edited("  hidden_size: 64\n", "  hidden_size: 64\n  hidden_size: 65\n")),
            "s.yaml:7:3: duplicate key \"hidden_size\"; it is first given on line 6");
}

TEST(JobSpecTest, ANameMustBeUsableInUrlsAndPaths) {
  for (const char* name : {"Tiny", "7b", "a/b", "\"\"", "..", "[a]"}) {
    const std::string error = error_of(edited("name: tiny", std::string("name: ") + name));
    EXPECT_EQ(error.find("s.yaml:3:18: metadata.name must be"), 0u) << error;
  }
}

TEST(JobSpecTest, AnOddDualPipeDepthIsImpossible) {
  EXPECT_EQ(
      error_of(edited("pipeline: 2", "pipeline: 3")),
      "s.yaml:27:25: parallelism.pipeline must be even with schedule dualpipe, not 3: rank p holds "
      "stages p and P-1-p");
}

TEST(JobSpecTest, OddMicroBatchesAreImpossibleWithDualPipe) {
  EXPECT_EQ(
      error_of(edited("microbatches: 4", "microbatches: 5")),
      "s.yaml:27:73: parallelism.microbatches must be even with schedule dualpipe, not 5: half "
      "enter at each end");
}

TEST(JobSpecTest, TooFewMicroBatchesAreImpossibleWithDualPipe) {
  EXPECT_EQ(
      error_of(edited("microbatches: 4", "microbatches: 2")),
      "s.yaml:27:73: parallelism.microbatches must be at least 2 x parallelism.pipeline = 4 with "
      "schedule dualpipe, not 2");
}

TEST(JobSpecTest, TooFewMicroBatchesAreImpossibleWith1f1b) {
  EXPECT_NE(error_of(edited("dualpipe, microbatches: 4", "1f1b, microbatches: 1"))
                .find("parallelism.microbatches must be at least parallelism.pipeline = 2"),
            std::string::npos);
}

TEST(JobSpecTest, TooFewMicroBatchesAreImpossibleWithZb1p) {
  EXPECT_EQ(error_of(edited("dualpipe, microbatches: 4", "zb1p, microbatches: 1")),
            "s.yaml:27:69: parallelism.microbatches must be at least parallelism.pipeline = 2 with "
            "schedule zb1p, not 1");
}

TEST(JobSpecTest, TooFewMicroBatchesAreImpossibleWithDualPipeV) {
  EXPECT_EQ(error_of(edited("pipeline: 2, expert: 2, schedule: dualpipe, microbatches: 4",
                            "pipeline: 1, expert: 2, schedule: dualpipev, microbatches: 1")),
            "s.yaml:27:74: parallelism.microbatches must be at least 2 x parallelism.pipeline = 2 "
            "with schedule dualpipev, not 1");
}

TEST(JobSpecTest, AStepOfTooManyMicroBatchesIsRefused) {
  EXPECT_EQ(error_of(edited("pipeline: 2, expert: 2, schedule: dualpipe, microbatches: 4",
                            "pipeline: 3, expert: 2, schedule: 1f1b, microbatches: 65536")),
            "s.yaml:27:69: parallelism.pipeline x parallelism.microbatches is 196608, more than "
            "131072; use larger micro-batches");
}

TEST(JobSpecTest, EveryStageOfDualPipeVNeedsALayer) {
  EXPECT_EQ(error_of(edited("pipeline: 2, expert: 2, schedule: dualpipe, microbatches: 4",
                            "pipeline: 3, expert: 2, schedule: dualpipev, microbatches: 6")),
            "s.yaml:27:25: parallelism.pipeline 3 with schedule dualpipev has 6 stages, more than "
            "the 4 layers of model.num_hidden_layers; every stage needs a layer");
}

TEST(JobSpecTest, OddDepthAndMicroBatchesArePossibleWithDualPipeV) {
  const auto spec =
      parse_job_spec(edited("pipeline: 2, expert: 2, schedule: dualpipe, microbatches: 4",
                            "pipeline: 1, expert: 2, schedule: dualpipev, microbatches: 3"),
                     "s.yaml");
  ASSERT_TRUE(spec.ok()) << spec.status().message();
  EXPECT_EQ(spec->parallelism.schedule, Schedule::kDualPipeV);
}

TEST(JobSpecTest, AnOddDepthIsPossibleWith1f1b) {
  const auto spec = parse_job_spec(edited("pipeline: 2, expert: 2, schedule: dualpipe",
                                          "pipeline: 3, expert: 2, schedule: 1f1b"),
                                   "s.yaml");
  EXPECT_TRUE(spec.ok()) << spec.status().message();
}

TEST(JobSpecTest, OneStageNeedsNeitherEvenMicroBatchesNorTwo) {
  const auto spec = parse_job_spec(
      edited("{pipeline: 2, expert: 2, schedule: dualpipe, microbatches: 4}", "{microbatches: 1}"),
      "s.yaml");
  EXPECT_TRUE(spec.ok()) << spec.status().message();
}

TEST(JobSpecTest, AnUnknownScheduleListsTheKnownOnes) {
  EXPECT_EQ(error_of(edited("schedule: dualpipe", "schedule: gpipe")),
            "s.yaml:27:49: parallelism.schedule must be dualpipe, dualpipev, 1f1b or zb1p, not "
            "gpipe");
}

TEST(JobSpecTest, AMistypedWordIsGivenTheNearest) {
  const auto ends_with_hint = [](std::string_view from, std::string_view to, const char* nearest) {
    const std::string hint = fmt::format("; did you mean \"{}\"?", nearest);
    const std::string error = error_of(edited(from, to));
    EXPECT_TRUE(error.ends_with(hint)) << error;
  };
  ends_with_hint("schedule: dualpipe", "schedule: dualpip", "dualpipe");
  ends_with_hint("seed: 42", "seed: 42, precision: fp8-hoper", "fp8_hopper");
  ends_with_hint("seed: 42", "seed: 42, recompute: [norm]", "norms");
  ends_with_hint("lr: 3.0e-4", "lr: 3.0e-4, moments: bf61", "bf16");
  ends_with_hint("lr: 3.0e-4", "lr: 3.0e-4, no_decay: [embeding]", "embedding");
  ends_with_hint("  kv_lora_rank", "  rope_scaling: {type: yran}\n  kv_lora_rank", "yarn");
}

TEST(JobSpecTest, ExpertsMustDivideOverTheExpertRanks) {
  EXPECT_EQ(
      error_of(edited("expert: 2", "expert: 3")),
      "s.yaml:27:36: parallelism.expert 3 does not divide the 8 experts of model.n_routed_experts");
}

TEST(JobSpecTest, MoreStagesThanLayersIsImpossible) {
  EXPECT_NE(error_of(edited("pipeline: 2", "pipeline: 6")).find("6 stages, more than the 4 layers"),
            std::string::npos);
}

TEST(JobSpecTest, MoreRanksThanTheProtocolCarriesIsImpossible) {
  EXPECT_NE(
      error_of(edited("expert: 2", "expert: 2, data: 65536, pipeline_: 1")).find("unknown key"),
      std::string::npos);
  const std::string text =
      edited("{pipeline: 2, expert: 2, schedule: dualpipe, microbatches: 4}",
             "{pipeline: 4, expert: 8, data: 65536, schedule: 1f1b, microbatches: 4}");
  EXPECT_NE(error_of(text).find("pipeline x expert x data is more than 1048576 ranks"),
            std::string::npos);
}

TEST(JobSpecTest, AStepOfTooManyTokensIsRefusedWithoutOverflow) {
  const std::string text =
      edited("{pipeline: 2, expert: 2, schedule: dualpipe, microbatches: 4}",
             "{expert: 8, data: 65536, microbatches: 65536, micro_batch_size: 65536}");
  EXPECT_NE(error_of(text).find("tokens in a step"), std::string::npos) << error_of(text);
}

TEST(JobSpecTest, GroupsMustDivideTheExperts) {
  EXPECT_EQ(
      error_of(edited("n_group: 4", "n_group: 3")),
      "s.yaml:20:12: model.n_group 3 does not divide the 8 experts of model.n_routed_experts");
}

TEST(JobSpecTest, AGroupOfOneExpertCannotBeScored) {
  EXPECT_NE(error_of(edited("n_group: 4", "n_group: 8")).find("a group needs two or more"),
            std::string::npos);
}

TEST(JobSpecTest, MoreGroupsPerTokenThanGroupsIsImpossible) {
  EXPECT_EQ(error_of(edited("topk_group: 2", "topk_group: 5")),
            "s.yaml:21:15: model.topk_group 5 is more than the 4 groups of model.n_group");
}

TEST(JobSpecTest, MoreExpertsPerTokenThanTheChosenGroupsHoldIsImpossible) {
  EXPECT_EQ(
      error_of(edited("num_experts_per_tok: 2", "num_experts_per_tok: 5")),
      "s.yaml:19:24: model.num_experts_per_tok 5 is more than the 4 experts that 2 of 4 groups "
      "hold");
}

TEST(JobSpecTest, AnOddRotaryDimensionIsImpossible) {
  EXPECT_EQ(
      error_of(edited("qk_rope_head_dim: 8", "qk_rope_head_dim: 7")),
      "s.yaml:12:21: model.qk_rope_head_dim must be even, not 7: rotary embedding turns pairs");
}

TEST(JobSpecTest, ASequenceMustFitThePositions) {
  EXPECT_EQ(error_of(edited("seq_length: 128", "seq_length: 5000")),
            "s.yaml:26:15: data.seq_length 5000 is more than model.max_position_embeddings 4096");
}

TEST(JobSpecTest, MoreDenseLayersThanLayersIsImpossible) {
  EXPECT_NE(error_of(edited("first_k_dense_replace: 1", "first_k_dense_replace: 5"))
                .find("s.yaml:15:26: model.first_k_dense_replace is 5, more than the 4 layers"),
            std::string::npos);
}

TEST(JobSpecTest, TheByteTokenizerNeedsItsVocabulary) {
  EXPECT_EQ(error_of(edited("vocab_size: 257", "vocab_size: 256")),
            "s.yaml:5:15: model.vocab_size 256 is below 257, what the tokenizer \"bytes\" needs");
}

TEST(JobSpecTest, KeyValueHeadsMustBeTheHeads) {
  EXPECT_NE(error_of(edited("  kv_lora_rank", "  num_key_value_heads: 2\n  kv_lora_rank"))
                .find("s.yaml:10:24: model.num_key_value_heads 2 must equal"),
            std::string::npos);
}

TEST(JobSpecTest, AConfigurationThatWouldTrainAnotherModelIsRefused) {
  for (const char* line : {"hidden_act: gelu", "rope_interleave: false", "scoring_func: softmax",
                           "tie_word_embeddings: true", "attention_bias: true",
                           "attention_dropout: 0.1", "moe_layer_freq: 2", "model_type: llama"}) {
    const std::string error =
        error_of(edited("  kv_lora_rank", "  " + std::string(line) + "\n  kv_lora_rank"));
    EXPECT_EQ(error.find("s.yaml:10:"), 0u) << error;
    EXPECT_NE(error.find("is not supported"), std::string::npos) << error;
  }
  EXPECT_EQ(error_of(edited("  kv_lora_rank", "  rope_scaling: {type: linear}\n  kv_lora_rank")),
            "s.yaml:10:24: model.rope_scaling.type must be default or yarn, not linear");
}

TEST(JobSpecTest, WarmUpCannotOutlastTheRun) {
  EXPECT_EQ(error_of(edited("warmup_steps: 10", "warmup_steps: 101")),
            "s.yaml:29:26: schedule.warmup_steps 101 is more than training.steps 100");
}

TEST(JobSpecTest, RebalancingHasAThresholdThatCanBeMetAndCheckpointsToHappenAt) {
  const auto with = [](const std::string& keys) {
    return edited("microbatches: 4", "microbatches: 4, rebalance: {" + keys + "}");
  };
  const auto spec = parse_job_spec(with("threshold: 1.2, every_checkpoints: 5"), "s.yaml");
  ASSERT_TRUE(spec.ok()) << spec.status().message();
  EXPECT_EQ(spec->parallelism.rebalance, (RebalanceSpec{1.2, 5}));
  EXPECT_EQ(error_of(with("threshold: 0.5")),
            "s.yaml:27:99: parallelism.rebalance.threshold must be 0 (off) or at least 1, not 0.5: "
            "it is the load of the most loaded rank relative to the mean");
  EXPECT_NE(error_of(with("treshold: 1.5")).find("did you mean \"threshold\"?"), std::string::npos);
  EXPECT_NE(error_of(with("every_checkpoints: 0")).find("every_checkpoints"), std::string::npos);
  std::string text = with("threshold: 1.5");
  text.replace(text.find("{interval: 20}"), 14, "{interval: 0}");
  EXPECT_NE(error_of(text).find("needs checkpoint.interval above 0"), std::string::npos);
}

TEST(JobSpecTest, ElasticWidthsHoldTheWidthItself) {
  const auto with = [](const std::string& keys) {
    return parse_job_spec(
        edited("microbatches: 4", "microbatches: 4, data: 2, elastic: {" + keys + "}"), "s.yaml");
  };
  EXPECT_EQ(parse_job_spec(kValidSpec, "s.yaml")->parallelism.elastic, ElasticSpec());
  EXPECT_EQ(with("min_data: 1")->parallelism.elastic, (ElasticSpec{1, 2}));
  EXPECT_EQ(with("max_data: 4")->parallelism.elastic, (ElasticSpec{2, 4}));
  EXPECT_EQ(with("min_data: 1, max_data: 4")->parallelism.elastic, (ElasticSpec{1, 4}));
  for (const char* wrong : {"min_data: 3", "max_data: 1", "min_data: 4, max_data: 8"}) {
    EXPECT_NE(with(wrong).status().message().find("parallelism.elastic"), std::string::npos)
        << wrong;
  }
}

TEST(JobSpecTest, EvaluationNeedsHeldOutData) {
  EXPECT_NE(error_of(edited("  validation: [{path: /data/corpus_heldout}]\n", ""))
                .find("training.evaluation_interval needs data.validation"),
            std::string::npos);
}

TEST(JobSpecTest, TrainingNeedsASource) {
  EXPECT_NE(error_of(edited("[{path: /data/corpus_train, weight: 1.0}]", "[]"))
                .find("s.yaml:23:10: data.train must be a list of 1 to 1024 sources"),
            std::string::npos);
}

TEST(JobSpecTest, AWeightMustBeAboveZero) {
  EXPECT_NE(error_of(edited("weight: 1.0", "weight: 0"))
                .find("s.yaml:23:46: data.train[0].weight must be a number above 0"),
            std::string::npos);
}

TEST(JobSpecTest, AnotherApiVersionIsRefused) {
  EXPECT_EQ(error_of(edited("penstock/v1", "penstock/v9")),
            "s.yaml:1:13: apiVersion: penstock/v9 is not supported; only penstock/v1 is");
}

TEST(JobSpecTest, AnEmptyFileSaysSo) {
  EXPECT_NE(error_of("").find("s.yaml:1:1: nothing in it"), std::string::npos);
  EXPECT_NE(error_of("# only a comment\n").find("s.yaml:1:1: "), std::string::npos);
}

}  // namespace
}  // namespace penstock
