// What is saved is enough: a run that goes on from a checkpoint cannot be told from one that never
// stopped.
#include <gtest/gtest.h>

#include <cmath>
#include <fstream>
#include <limits>
#include <mutex>

#include "checkpoint/compare.h"
#include "checkpoint/segment_writer.h"
#include "checkpoint/store.h"
#include "tests/worker/engine_test_support.h"

namespace penstock {
namespace {

constexpr int64_t kSteps = 6;

class EngineResumeTest : public ::testing::Test {
 protected:
  void SetUp() override { write_tiny_corpus(directory_.path()); }

  // Trains to the end, saving every second step into `checkpoints`.
  StandaloneReport train_and_save(const TinyLayout& layout, const Path& checkpoints) {
    StandaloneOptions options = options_of(layout);
    options.checkpoint_dir = checkpoints;
    return train_tiny(options);
  }
  StandaloneOptions options_of(const TinyLayout& layout) {
    JobSpec spec = tiny_spec(directory_.path(), layout, kSteps);
    spec.checkpoint.interval = 2;
    return tiny_run(spec);
  }
  StandaloneOptions resumed(const TinyLayout& layout, const Path& checkpoints, int64_t step) {
    StandaloneOptions options = options_of(layout);
    options.restore_manifest = manifest_of_step(checkpoints, step);
    options.restore_step = step;
    return options;
  }
  // Goes on from a checkpoint in another layout, and saves what was loaded, untouched, as a
  // checkpoint of that layout in `directory`.
  StandaloneReport resume_and_save(const TinyLayout& layout, const Path& checkpoints, int64_t step,
                                   const Path& directory) {
    Result<CheckpointStore> store = CheckpointStore::open(directory, JobId{1}, nullptr);
    EXPECT_TRUE(store.ok()) << store.status().to_string();
    std::mutex mutex;
    CommitRequest request{.epoch = Epoch{1},
                          .step = step,
                          .created_at = {},
                          .spec_json = "{}",
                          .layout = to_string(layout),
                          .segments = {}};
    StandaloneOptions options = resumed(layout, checkpoints, step);
    options.on_loaded = [&](const Engine& engine) {  // on every rank's thread
      const std::lock_guard lock(mutex);
      const Rank rank{static_cast<int32_t>(request.segments.size())};
      const auto saved =
          write_segment(directory, {JobId{1}, Epoch{1}, rank, step}, engine.state().to_save());
      ASSERT_TRUE(saved.ok()) << saved.status().to_string();
      request.segments.push_back({saved->file, rank, saved->byte_count, saved->footer_digest});
    };
    StandaloneReport report = train_tiny(options);
    EXPECT_EQ(std::ssize(request.segments), options.spec.parallelism.world_size());
    const auto committed = store->commit(request);
    EXPECT_TRUE(committed.ok()) << committed.status().to_string();
    return report;
  }
  Path checkpoints() const { return directory_.path() / "checkpoints"; }

  ScratchDirectory directory_;
};

TEST_F(EngineResumeTest, ResumedRunsAreBitIdenticalFromEveryCheckpointInEveryLayout) {
  const TinyLayout layouts[] = {{1, 1, 1, Schedule::kOneForwardOneBackward},
                                {2, 2, 2, Schedule::kOneForwardOneBackward},
                                {2, 1, 2, Schedule::kZeroBubble},
                                {2, 2, 1, Schedule::kDualPipeV},
                                {2, 1, 1, Schedule::kDualPipe},
                                {4, 2, 1, Schedule::kDualPipe}};
  int number = 0;
  for (const TinyLayout& layout : layouts) {
    const Path directory = directory_.path() / std::to_string(number++);
    const StandaloneReport whole = train_and_save(layout, directory);
    for (const int64_t step : {2, 4}) {
      const StandaloneReport rest = train_tiny(resumed(layout, directory, step));
      ASSERT_EQ(rest.steps.size(), static_cast<size_t>(kSteps - step)) << to_string(layout);
      for (size_t i = 0; i < rest.steps.size(); ++i) {
        const StepResult& undisturbed = whole.steps[i + static_cast<size_t>(step)];
        EXPECT_EQ(rest.steps[i].step, undisturbed.step);
        EXPECT_EQ(rest.steps[i].loss, undisturbed.loss) << to_string(layout);
        EXPECT_EQ(rest.steps[i].grad_norm, undisturbed.grad_norm) << to_string(layout);
      }
      EXPECT_EQ(rest.weights_digest, whole.weights_digest) << to_string(layout);
    }
  }
}

TEST_F(EngineResumeTest, AResumedFp8RunIsBitIdentical) {
  const TinyLayout layout{2, 2, 1, Schedule::kDualPipe};
  StandaloneOptions options = options_of(layout);
  options.spec.training.precision = Precision::kFp8;
  options.checkpoint_dir = checkpoints();
  const StandaloneReport whole = train_tiny(options);
  StandaloneOptions rest = resumed(layout, checkpoints(), 4);
  rest.spec.training.precision = Precision::kFp8;
  const StandaloneReport resumed_report = train_tiny(rest);
  ASSERT_EQ(resumed_report.steps.size(), 2u);
  EXPECT_EQ(resumed_report.steps.back().loss, whole.steps.back().loss);
  EXPECT_EQ(resumed_report.weights_digest, whole.weights_digest);
}

TEST_F(EngineResumeTest, SavingChangesNothing) {
  const TinyLayout layout{2, 2, 1, Schedule::kDualPipe};
  EXPECT_EQ(train_and_save(layout, checkpoints()).weights_digest,
            train_tiny(options_of(layout)).weights_digest);
}

TEST_F(EngineResumeTest, EveryLayoutLoadsWhatAnyOtherSaved) {
  const TinyLayout saver{4, 2, 1, Schedule::kDualPipe};
  const StandaloneReport whole = train_and_save(saver, checkpoints());
  const TinyLayout loaders[] = {{1, 1, 1, Schedule::kOneForwardOneBackward},
                                {2, 4, 1, Schedule::kOneForwardOneBackward},
                                {2, 1, 2, Schedule::kDualPipe},
                                {5, 1, 2, Schedule::kOneForwardOneBackward}};
  for (const TinyLayout& loader : loaders) {
    // After the last step nothing is left to train: the weights are those that were saved.
    EXPECT_EQ(train_tiny(resumed(loader, checkpoints(), kSteps)).weights_digest,
              whole.weights_digest)
        << to_string(loader);
    // From the middle, moments and biases count as well; sums of another order differ in the last
    // bits.
    const StandaloneReport rest = train_tiny(resumed(loader, checkpoints(), 2));
    ASSERT_EQ(rest.steps.size(), 4u);
    EXPECT_NEAR(rest.steps.back().loss, whole.steps.back().loss, 1e-4) << to_string(loader);
    EXPECT_NEAR(rest.steps.back().grad_norm, whole.steps.back().grad_norm, 1e-3)
        << to_string(loader);
  }
}

// Weights, both moments, router biases and the step: one digest per tensor, compared by manifests.
TEST_F(EngineResumeTest, TheStateHasTheSameDigestsInEveryLayoutAndTrainingGoesOn) {
  const TinyLayout saver{4, 2, 1, Schedule::kDualPipe};
  const StandaloneReport whole = train_and_save(saver, checkpoints());
  const Result<StoredManifest> saved = read_manifest(manifest_of_step(checkpoints(), 4));
  ASSERT_TRUE(saved.ok());
  ASSERT_GT(saved->manifest.segments.size(), 1u);
  for (const TinyLayout& layout : {TinyLayout{2, 4, 1, Schedule::kOneForwardOneBackward},
                                   TinyLayout{1, 1, 1, Schedule::kOneForwardOneBackward}}) {
    const Path gathered = directory_.path() / ("gathered " + to_string(layout));
    const StandaloneReport rest = resume_and_save(layout, checkpoints(), 4, gathered);
    const Result<StoredManifest> again = read_manifest(manifest_of_step(gathered, 4));
    ASSERT_TRUE(again.ok()) << again.status().to_string();
    const auto comparison =
        compare_checkpoints({checkpoints(), saved->manifest}, {gathered, again->manifest}, false);
    ASSERT_TRUE(comparison.ok()) << comparison.status().to_string();
    for (const TensorDifference& difference : comparison->differences) {
      ADD_FAILURE() << to_string(layout) << ": " << difference.name << " differs";
    }
    EXPECT_EQ(comparison->equal_count, saved->manifest.tensors.size());
    ASSERT_EQ(rest.steps.size(), 2u);
    for (size_t i = 0; i < 2; ++i) {
      EXPECT_NEAR(rest.steps[i].loss, whole.steps[i + 4].loss, 1e-5) << to_string(layout);
    }
  }
  const auto other_step = read_manifest(manifest_of_step(checkpoints(), 2));
  ASSERT_TRUE(other_step.ok());
  const auto comparison = compare_checkpoints({checkpoints(), saved->manifest},
                                              {checkpoints(), other_step->manifest}, false);
  EXPECT_FALSE(comparison->equal()) << "digests tell one step from another";
}

TEST_F(EngineResumeTest, EachByteIsReadByOneRankAndItsReplicasGetItFromThere) {
  train_and_save({1, 1, 1, Schedule::kOneForwardOneBackward}, checkpoints());
  const Path path = manifest_of_step(checkpoints(), 4);
  const Result<StoredManifest> saved = read_manifest(path);
  ASSERT_TRUE(saved.ok());
  uint64_t biases = 0;  // which every rank reads, as it does the step
  for (const ManifestTensor& tensor : saved->manifest.tensors) {
    if (!tensor.name.ends_with("e_score_correction_bias")) continue;
    biases += static_cast<uint64_t>(tensor.shape.front()) * sizeof(float);
  }
  ASSERT_GT(biases, 0u);
  const TinyLayout layout{1, 2, 2, Schedule::kOneForwardOneBackward};
  std::mutex mutex;
  uint64_t loaded = 0;
  StandaloneOptions options = resumed(layout, checkpoints(), 4);
  options.on_loaded = [&](Engine& engine) {  // on every rank's thread: once more, for the report
    const Result<LoadReport> report = engine.restore(path, JobId{1}, 4);
    ASSERT_TRUE(report.ok()) << report.status().to_string();
    const std::lock_guard lock(mutex);
    loaded += report->bytes_loaded;
  };
  train_tiny(options);
  EXPECT_EQ(loaded, saved->manifest.payload_bytes() + 3 * (biases + sizeof(int64_t)));
}

TEST_F(EngineResumeTest, ACheckpointKnowsNothingOfTheSeatsOfExperts) {
  const TinyLayout layout{2, 2, 1, Schedule::kDualPipe};
  const auto seated = [](StandaloneOptions options, const std::vector<int32_t>& experts) {
    for (int64_t layer = 1; layer < 5; ++layer) options.seats.layers[layer] = experts;
    return options;
  };
  const std::vector<int32_t> some = {6, 1, 4, 3, 0, 7, 2, 5};
  const std::vector<int32_t> others = {2, 7, 6, 0, 1, 5, 3, 4};
  StandaloneOptions saving = seated(options_of(layout), some);
  saving.checkpoint_dir = checkpoints();
  const StandaloneReport whole = train_tiny(saving);
  EXPECT_EQ(train_tiny(resumed(layout, checkpoints(), kSteps)).weights_digest,
            whole.weights_digest);
  EXPECT_EQ(train_tiny(seated(resumed(layout, checkpoints(), kSteps), others)).weights_digest,
            whole.weights_digest);
  // The same seats: the same bits. Others: sums of another order.
  EXPECT_EQ(train_tiny(seated(resumed(layout, checkpoints(), 2), some)).weights_digest,
            whole.weights_digest);
  const StandaloneReport rest = train_tiny(seated(resumed(layout, checkpoints(), 2), others));
  ASSERT_EQ(rest.steps.size(), 4u);
  EXPECT_NEAR(rest.steps.back().loss, whole.steps.back().loss, 1e-4);
  EXPECT_NEAR(rest.steps.back().grad_norm, whole.steps.back().grad_norm, 1e-3);
}

TEST_F(EngineResumeTest, Bf16MomentsAndTheAverageOfTheWeightsResumeBitForBit) {
  for (const TinyLayout& layout :
       {TinyLayout{}, TinyLayout{2, 2, 2, Schedule::kOneForwardOneBackward},
        TinyLayout{4, 2, 1, Schedule::kDualPipe}}) {
    const Path directory = directory_.path() / to_string(layout);
    const auto recipe = [](StandaloneOptions options) {
      options.spec.optimizer.moments = MomentType::kBf16;
      options.spec.optimizer.ema_decay = 0.7;
      options.spec.optimizer.ema_evaluation = true;
      options.evaluate = true;
      return options;
    };
    StandaloneOptions options = recipe(options_of(layout));
    options.checkpoint_dir = directory;
    const StandaloneReport whole = train_tiny(options);
    const StandaloneReport rest = train_tiny(recipe(resumed(layout, directory, 4)));
    EXPECT_EQ(rest.weights_digest, whole.weights_digest) << to_string(layout);
    ASSERT_FALSE(whole.evaluations.empty());
    ASSERT_FALSE(rest.evaluations.empty());
    EXPECT_EQ(rest.evaluations.back().loss, whole.evaluations.back().loss) << to_string(layout);
  }
}

TEST_F(EngineResumeTest, EveryCheckpointIsWholeAndVerifies) {
  train_and_save({4, 2, 1, Schedule::kDualPipe}, checkpoints());
  const StoreListing listing = list_checkpoints(checkpoints(), JobId{1});
  EXPECT_EQ(listing.checkpoints.size(), 3u);  // after steps 2, 4 and 6
  EXPECT_TRUE(listing.refused.empty());
  for (const CheckpointInfo& info : listing.checkpoints) {
    const Result<StoredManifest> stored = read_manifest(checkpoints() / info.manifest_file);
    ASSERT_TRUE(stored.ok());
    EXPECT_TRUE(verify_checkpoint(checkpoints(), stored->manifest).ok());
    EXPECT_TRUE(prove_whole(stored->manifest).ok());
    EXPECT_EQ(stored->manifest.segments.size(), 8u);
  }
}

TEST_F(EngineResumeTest, RanksWriteEvenSharesAndNoByteTwice) {
  train_and_save({2, 2, 1, Schedule::kDualPipe}, checkpoints());
  const Result<StoredManifest> stored = read_manifest(manifest_of_step(checkpoints(), 2));
  ASSERT_TRUE(stored.ok());
  uint64_t largest = 0, smallest = UINT64_MAX, sum = 0;
  for (const ManifestSegment& segment : stored->manifest.segments) {
    largest = std::max(largest, segment.byte_count);
    smallest = std::min(smallest, segment.byte_count);
    sum += segment.byte_count;
  }
  EXPECT_LT(largest, smallest * 13 / 10);
  // Alignment, tables and checksums come on top.
  EXPECT_LT(sum, stored->manifest.payload_bytes() * 13 / 10 + 4 * 64 * 1024);
}

TEST_F(EngineResumeTest, AnotherStepThanTheManifestsIsRefused) {
  const TinyLayout layout;
  train_and_save(layout, checkpoints());
  StandaloneOptions options = resumed(layout, checkpoints(), 2);
  options.restore_step = 4;
  const Result<StandaloneReport> report = run_standalone_threads(options);
  EXPECT_EQ(report.status().code(), Code::kFailedPrecondition) << report.status().to_string();
}

TEST_F(EngineResumeTest, AnotherModelThanTheCheckpointsIsRefused) {
  const TinyLayout layout;
  train_and_save(layout, checkpoints());
  StandaloneOptions options = resumed(layout, checkpoints(), 2);
  options.spec.model.moe_intermediate_size = 24;
  EXPECT_EQ(run_standalone_threads(options).status().code(), Code::kInvalidArgument);
  options.spec.model.moe_intermediate_size = 16;
  options.spec.model.num_hidden_layers = 6;
  EXPECT_EQ(run_standalone_threads(options).status().code(), Code::kNotFound);
}

TEST_F(EngineResumeTest, ADamagedSegmentIsRefusedAndNamed) {
  const TinyLayout layout{2, 1, 1, Schedule::kDualPipe};
  train_and_save(layout, checkpoints());
  const StandaloneOptions options = resumed(layout, checkpoints(), 2);
  const Result<StoredManifest> stored = read_manifest(options.restore_manifest);
  ASSERT_TRUE(stored.ok());
  const std::string file = stored->manifest.segments[0].file;
  std::fstream segment(checkpoints() / file, std::ios::in | std::ios::out | std::ios::binary);
  segment.seekp(5000);
  segment.put('\x5a');
  segment.close();
  const Result<StandaloneReport> report = run_standalone_threads(options);
  EXPECT_EQ(report.status().code(), Code::kDataLoss);
  EXPECT_NE(report.status().message().find(file), std::string::npos) << report.status().to_string();
}

TEST_F(EngineResumeTest, AStepThatIsNoNumberEndsTheRunBeforeAnythingOfItIsSaved) {
  JobSpec spec = tiny_spec(directory_.path(), {2, 2, 1, Schedule::kDualPipe}, kSteps);
  spec.checkpoint.interval = 1;
  StandaloneOptions options = tiny_run(spec);
  options.checkpoint_dir = checkpoints();
  Engine* rank_0 = nullptr;
  options.on_loaded = [&](Engine& engine) {
    if (engine.layout().rank == Rank{0}) rank_0 = &engine;
  };
  options.on_step = [&](const StepResult& result) {
    EXPECT_TRUE(std::isfinite(result.loss)) << "of step " << result.step;
    if (result.step != 2) return;
    for (const ParameterKind kind : kParameterKinds) {
      const std::span<float> values = rank_0->stages()[0]->parameters().values(kind);
      std::fill(values.begin(), values.end(), std::numeric_limits<float>::quiet_NaN());
    }
  };
  const Result<StandaloneReport> report = run_standalone_threads(options);
  ASSERT_FALSE(report.ok());
  // A NaN's sign is the compiler's business.
  for (const char* word : {"step 3: loss ", "nan, gradient norm ", "lower the learning rate"}) {
    EXPECT_NE(report.status().message().find(word), std::string::npos) << report.status().message();
  }
  for (const CheckpointInfo& info : list_checkpoints(checkpoints(), JobId{1}).checkpoints) {
    EXPECT_LE(info.step, 2);
  }
}

}  // namespace
}  // namespace penstock
