#include "worker/data/sampler.h"

#include <gtest/gtest.h>
#include <rapidcheck.h>

#include <map>
#include <set>

#include "tests/worker/data_files.h"

namespace penstock {
namespace {

class SamplerTest : public testing::Test {
 protected:
  Sampler sampler(std::vector<SamplerSource> sources, int64_t seq_length, int64_t per_step,
                  uint64_t seed = 1) {
    auto made = Sampler::create({.sources = std::move(sources),
                                 .seq_length = seq_length,
                                 .sequences_per_step = per_step,
                                 .vocab_size = 60000,
                                 .seed = seed});
    EXPECT_TRUE(made.ok()) << made.status().message();
    return std::move(*made);
  }
  DataDirectory directory_;
};

TEST(PermuteTest, IsABijectionForEverySmallCountAndSeed) {
  for (uint64_t count = 1; count <= 130; ++count) {
    for (uint64_t seed = 0; seed < 3; ++seed) {
      std::set<uint64_t> images;
      for (uint64_t i = 0; i < count; ++i) images.insert(permute(seed, 5, i, count));
      EXPECT_EQ(images.size(), count);
      EXPECT_LT(*images.rbegin(), count);
    }
  }
}

TEST(PermuteTest, StaysInsideAnyCount) {
  EXPECT_TRUE(rc::check([](uint64_t seed, uint64_t stream) {
    const uint64_t count = *rc::gen::inRange<uint64_t>(1, uint64_t{1} << 62);
    const uint64_t index = *rc::gen::inRange<uint64_t>(0, count);
    RC_ASSERT(permute(seed, stream, index, count) < count);
  }));
}

TEST(PermuteTest, SeedAndStreamChangeTheOrder) {
  std::vector<uint64_t> a, b, c;
  for (uint64_t i = 0; i < 100; ++i) {
    a.push_back(permute(1, 1, i, 100));
    b.push_back(permute(2, 1, i, 100));
    c.push_back(permute(1, 2, i, 100));
  }
  EXPECT_NE(a, b);
  EXPECT_NE(a, c);
}

TEST_F(SamplerTest, ARampReadsTheSameSequencesInTheSameOrderInStepsOfOtherSizes) {
  const auto data = directory_.counting("d", 1000);
  const Sampler even = sampler({{data, 1.0}}, 8, 1);
  auto ramp = Sampler::create({.sources = {{data, 1.0}},
                               .seq_length = 8,
                               .sequences_per_step = 2,
                               .sequence_levels = {{3, 5}, {4, 3}},
                               .vocab_size = 60000,
                               .seed = 1});
  ASSERT_TRUE(ramp.ok());
  int64_t n = 0;
  for (const auto& [step, count] : {std::pair{1, 2}, {2, 2}, {3, 5}, {4, 3}, {5, 3}}) {
    for (int64_t i = 0; i < count; ++i) {
      EXPECT_EQ(ramp->window(step, i), even.window(++n, 0)) << "step " << step;
    }
  }
}

TEST_F(SamplerTest, IsAPureFunctionOfSeedStepAndIndex) {
  const auto data = directory_.counting("d", 1000);
  const Sampler one = sampler({{data, 1.0}}, 10, 4);
  const Sampler two = sampler({{data, 1.0}}, 10, 4);
  // Asked in opposite orders, so that any state would show.
  std::vector<Sampler::Window> forward, backward;
  for (int64_t step = 1; step <= 60; ++step) {
    for (int64_t i = 0; i < 4; ++i) forward.push_back(one.window(step, i));
  }
  for (int64_t step = 60; step >= 1; --step) {
    for (int64_t i = 3; i >= 0; --i) backward.push_back(two.window(step, i));
  }
  std::reverse(backward.begin(), backward.end());
  EXPECT_EQ(forward, backward);
}

TEST_F(SamplerTest, TheSplitOfASequenceOverStepsDoesNotMatter) {
  const auto data = directory_.counting("d", 1000);
  const Sampler wide = sampler({{data, 1.0}}, 10, 8);
  const Sampler narrow = sampler({{data, 1.0}}, 10, 2);
  for (int64_t n = 0; n < 200; ++n) {
    EXPECT_EQ(wide.window(n / 8 + 1, n % 8), narrow.window(n / 2 + 1, n % 2));
  }
}

TEST_F(SamplerTest, AnotherSeedReadsInAnotherOrder) {
  const auto data = directory_.counting("d", 1000);
  const Sampler one = sampler({{data, 1.0}}, 10, 50, 1);
  const Sampler two = sampler({{data, 1.0}}, 10, 50, 2);
  int64_t same = 0;
  for (int64_t i = 0; i < 50; ++i) same += one.window(1, i) == two.window(1, i);
  EXPECT_LT(same, 10);
}

TEST_F(SamplerTest, AnEpochVisitsEveryWindowOnceAndCoversTheStream) {
  const auto data = directory_.counting("d", 1000);  // 99 windows of 10, tail 9
  const Sampler s = sampler({{data, 1.0}}, 10, 99);
  for (int64_t step = 1; step <= 5; ++step) {
    std::set<int64_t> starts;
    for (int64_t i = 0; i < 99; ++i) {
      const Sampler::Window w = s.window(step, i);
      EXPECT_EQ(w.epoch, step - 1);
      EXPECT_GE(w.first_token, 0);
      EXPECT_LE(w.first_token + 11, 1000);
      starts.insert(w.first_token);
    }
    ASSERT_EQ(starts.size(), 99u);
    EXPECT_EQ(*starts.rbegin() - *starts.begin(), 980);  // neighbours are one seq_length apart
    EXPECT_LE(*starts.begin(), 9);
  }
}

TEST_F(SamplerTest, EpochsDifferInOrderAndInOffset) {
  const auto data = directory_.counting("d", 1000);
  const Sampler s = sampler({{data, 1.0}}, 10, 99);
  std::set<int64_t> offsets;
  for (int64_t step = 1; step <= 20; ++step) {
    int64_t offset = 1000;
    for (int64_t i = 0; i < 99; ++i) offset = std::min(offset, s.window(step, i).first_token);
    offsets.insert(offset);
  }
  EXPECT_GT(offsets.size(), 3u);
  int64_t same = 0;
  for (int64_t i = 0; i < 99; ++i) {
    same += s.window(1, i).first_token / 10 == s.window(2, i).first_token / 10;
  }
  EXPECT_LT(same, 20);
}

TEST_F(SamplerTest, ASequenceIsItsWindowsTokens) {
  const auto data = directory_.counting("d", 1000);
  const Sampler s = sampler({{data, 1.0}}, 10, 4);
  std::vector<int32_t> tokens(11);
  for (int64_t i = 0; i < 4; ++i) {
    ASSERT_TRUE(s.sequence(3, i, tokens).ok());
    const int64_t first = s.window(3, i).first_token;
    for (int64_t t = 0; t < 11; ++t) EXPECT_EQ(tokens[t], first + t);
  }
}

TEST_F(SamplerTest, SourcesAreReadByWeightInEveryStretch) {
  const auto a = directory_.counting("a", 500);
  const auto b = directory_.counting("b", 700);
  const auto c = directory_.counting("c", 900);
  const Sampler s = sampler({{a, 6.0}, {b, 3.0}, {c, 1.0}}, 10, 100);
  for (int64_t step = 1; step <= 900; step += 50) {
    std::map<int64_t, int64_t> counts;
    for (int64_t i = 0; i < 100; ++i) ++counts[s.window(step, i).source];
    EXPECT_NEAR(counts[0], 60, 2);
    EXPECT_NEAR(counts[1], 30, 2);
    EXPECT_NEAR(counts[2], 10, 2);
  }
}

TEST_F(SamplerTest, EachOfSeveralSourcesIsCoveredByItsOwnEpochs) {
  const auto a = directory_.counting("a", 501);  // 50 windows
  const auto b = directory_.counting("b", 301);  // 30 windows
  const Sampler s = sampler({{a, 1.0}, {b, 2.0}}, 10, 1000);
  std::map<std::pair<int64_t, int64_t>, std::set<int64_t>> starts;  // (source, epoch)
  std::map<std::pair<int64_t, int64_t>, int64_t> draws;
  for (int64_t step = 1; step <= 200; ++step) {  // crosses the end of the 65,536-place pattern
    for (int64_t i = 0; i < 1000; ++i) {
      const Sampler::Window w = s.window(step, i);
      starts[{w.source, w.epoch}].insert(w.first_token);
      ++draws[{w.source, w.epoch}];
    }
  }
  const int64_t last_a = starts.rbegin()->first.second;
  EXPECT_GT(last_a, 100);
  for (const auto& [key, seen] : starts) {
    const int64_t windows = key.first == 0 ? 50 : 30;
    const bool is_last = !starts.contains({key.first, key.second + 1});
    if (is_last) continue;  // not finished
    EXPECT_EQ(static_cast<int64_t>(seen.size()), windows);
    EXPECT_EQ(draws[key], windows);
  }
}

TEST_F(SamplerTest, AWindowOfExactlyTheCorpusWorks) {
  const auto data = directory_.counting("d", 11);
  const Sampler s = sampler({{data, 1.0}}, 10, 2);
  for (int64_t step = 1; step < 10; ++step) EXPECT_EQ(s.window(step, 1).first_token, 0);
}

TEST_F(SamplerTest, ACorpusShorterThanOneSequenceIsRefused) {
  const auto made = Sampler::create({.sources = {{directory_.counting("d", 10), 1.0}},
                                     .seq_length = 10,
                                     .sequences_per_step = 1,
                                     .vocab_size = 257});
  EXPECT_EQ(made.status().code(), Code::kInvalidArgument);
  EXPECT_NE(made.status().message().find("10 tokens, fewer than the 11"), std::string::npos);
}

TEST_F(SamplerTest, AWeightTooSmallForAPlaceIsRefused) {
  const auto data = directory_.counting("d", 100);
  const auto made = Sampler::create({.sources = {{data, 1.0}, {data, 1e-9}},
                                     .seq_length = 10,
                                     .sequences_per_step = 1,
                                     .vocab_size = 257});
  EXPECT_EQ(made.status().code(), Code::kInvalidArgument);
  EXPECT_NE(made.status().message().find("less than 1/65536"), std::string::npos);
}

TEST_F(SamplerTest, ATokenTheModelDoesNotKnowIsDataLoss) {
  const auto made = Sampler::create({.sources = {{directory_.counting("d", 1000), 1.0}},
                                     .seq_length = 999,
                                     .sequences_per_step = 1,
                                     .vocab_size = 257});
  ASSERT_TRUE(made.ok());
  std::vector<int32_t> tokens(1000);
  EXPECT_EQ(made->sequence(1, 0, tokens).code(), Code::kDataLoss);
}

TEST_F(SamplerTest, EvaluationsReadTheSameWindowsWhateverTheSeed) {
  directory_.counting("v", 500);
  JobSpec spec;
  spec.model.vocab_size = 60000;
  spec.data.validation = {{directory_.path("v"), 1.0}};
  spec.data.seq_length = 10;
  spec.parallelism.microbatches = 4;
  const auto one = open_validation_sampler(spec);
  spec.training.seed = 99;
  const auto two = open_validation_sampler(spec);
  ASSERT_TRUE(one.ok() && two.ok());
  for (int64_t i = 0; i < 4; ++i) EXPECT_EQ(one->window(2, i), two->window(2, i));
  spec.data.validation.clear();
  EXPECT_EQ(open_validation_sampler(spec).status().code(), Code::kFailedPrecondition);
}

TEST_F(SamplerTest, AMissingTrainingSourceIsNamed) {
  JobSpec spec;
  spec.data.train = {{directory_.path("none"), 1.0}};
  const auto made = open_training_sampler(spec);
  EXPECT_EQ(made.status().code(), Code::kNotFound);
  EXPECT_NE(made.status().message().find("none.idx"), std::string::npos);
}

TEST(SequenceIndexTest, EveryReplicaMicroBatchAndPositionHasItsOwnSequence) {
  const ParallelismSpec p = {
      .pipeline = 2, .expert = 2, .data = 3, .microbatches = 4, .micro_batch_size = 5};
  std::set<int64_t> seen;
  for (int64_t r = 0; r < 6; ++r) {
    for (int64_t m = 0; m < 4; ++m) {
      for (int64_t i = 0; i < 5; ++i) seen.insert(sequence_index(p, r, m, i));
    }
  }
  EXPECT_EQ(seen.size(), 120u);
  EXPECT_EQ(*seen.begin(), 0);
  EXPECT_EQ(*seen.rbegin(), 119);
}

}  // namespace
}  // namespace penstock
