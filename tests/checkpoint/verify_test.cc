#include "checkpoint/verify.h"

#include "checkpoint/marks.h"
#include "tests/checkpoint/simulated_disk.h"
#include "tests/checkpoint/support.h"

namespace penstock {
namespace {

using namespace checkpoint_test;

using VerifyTest = ModelStoreTest;

TEST_F(VerifyTest, AWholeCheckpointHasNoDamage) {
  const DamageReport report = find_damage(path(), manifest_of(commit(10)));
  EXPECT_EQ(report.damage_count, 0u);
  EXPECT_TRUE(report.damages.empty());
}

TEST_F(VerifyTest, EveryDamageIsListedWithFileRankTensorAndBytes) {
  const CheckpointInfo info = commit(10);
  const Path first = segment_of(info, 0);  // rank 0: embed in 51,200 bytes, bias, state|step
  flip_byte(first, 4096 + 5);
  flip_byte(first, 4096 + 16384 + 5);  // the next block: one range with the one before
  flip_byte(first, 4096 + 51200 + 3);  // bias
  std::filesystem::remove(segment_of(info, 1));
  const DamageReport report = find_damage(path(), manifest_of(info));
  ASSERT_EQ(report.damages.size(), 3u);
  EXPECT_EQ(report.damages[0].file, first.filename().string());
  EXPECT_EQ(report.damages[0].rank, Rank{0});
  EXPECT_EQ(report.damages[0].begin, 4096u);
  EXPECT_EQ(report.damages[0].end, 4096u + 2 * 16384);
  EXPECT_EQ(report.damages[0].tensors, std::vector<std::string>{"embed [0:200, 0:64]"});
  EXPECT_EQ(report.damages[1].begin, 4096u + 3 * 16384);
  EXPECT_EQ(report.damages[1].tensor_count, 3u) << "embed's end, bias and the step share a block";
  EXPECT_EQ(report.damages[2].rank, Rank{1});
  EXPECT_EQ(report.damages[2].tensor_count, 3u) << "all of rank 1";
  EXPECT_EQ(report.damages[2].end, manifest_of(info).segments[1].byte_count);
}

TEST_F(VerifyTest, ManyTensorsOfOneDamageAreCountedOnceEach) {
  std::vector<OwnedSlice> slices = {known_slice("big", DType::kU8, {20'000}, {{0}, {20'000}})};
  for (int i = 0; i < 400; ++i) {
    slices.push_back(known_slice(fmt::format("small{}", i), DType::kU8, {130}, {{0}, {130}}));
  }
  const SegmentSummary summary = save_segment(path(), {kJob, Epoch{1}, Rank{0}, 10}, slices);
  const auto report = store_->commit({.epoch = Epoch{1},
                                      .step = 10,
                                      .created_at = {},
                                      .spec_json = "{}",
                                      .layout = "one rank",
                                      .segments = {commit_segment(summary)}});
  ASSERT_TRUE(report.ok()) << report.status().to_string();
  for (const uint64_t block : {0, 1, 2}) flip_byte(path() / summary.file, 4096 + 16384 * block);
  const uint64_t end = 4096 + 3 * 16384;
  const auto wanted = std::count_if(summary.slices.begin(), summary.slices.end(),
                                    [&](const auto& entry) { return entry.file_offset < end; });
  const DamageReport found = find_damage(path(), manifest_of(report->info));
  ASSERT_EQ(found.damages.size(), 1u);
  EXPECT_EQ(found.damages[0].end, end);
  EXPECT_EQ(static_cast<int64_t>(found.damages[0].tensor_count), wanted);
}

TEST_F(VerifyTest, AWrongDigestUnderRightChecksumsIsFound) {
  const CheckpointInfo info = commit(10);
  Manifest manifest = manifest_of(info);
  for (ManifestTensor& tensor : manifest.tensors) {
    if (tensor.name == "norm") tensor.pieces[0].digest.low ^= 1;
  }
  const DamageReport report = find_damage(path(), manifest);
  ASSERT_EQ(report.damages.size(), 1u);
  EXPECT_EQ(report.damages[0].tensors, std::vector<std::string>{"norm [0:64]"});
  EXPECT_NE(report.damages[0].what.find("not what the manifest says"), std::string::npos);
}

TEST_F(VerifyTest, ADamagedCheckpointIsSetAsideWhenAnotherIsWhole) {
  const CheckpointInfo good = commit(10);
  const CheckpointInfo bad = commit(20);
  flip_byte(segment_of(bad, 0), 5000);
  ASSERT_EQ(newest_whole(path(), kJob).checkpoint, bad) << "footers do not show it";
  const Status aside = store_->set_aside(bad.commit_seq);
  ASSERT_TRUE(aside.ok()) << aside.to_string();
  const NewestWhole newest = newest_whole(path(), kJob);
  EXPECT_EQ(newest.checkpoint, good);
  ASSERT_EQ(newest.refused.size(), 1u);
  EXPECT_TRUE(newest.refused[0].set_aside);
  EXPECT_EQ(newest.refused[0].manifest_file, "000000000002.manifest.damaged");
  EXPECT_EQ(commit(30).commit_seq, 3u) << "its number is not used again";
  EXPECT_EQ(store_->retain({.keep_last = 1})->commit_seqs, (std::vector<uint64_t>{1, 2}));
  EXPECT_TRUE(store_->sweep_orphans(Epoch{2}).ok());
  EXPECT_FALSE(std::filesystem::exists(path() / "000000000002.manifest.damaged"));
  EXPECT_EQ(steps(), (std::vector<int64_t>{30}));
}

TEST_F(VerifyTest, AnUnreadableManifestIsSetAsideToo) {
  commit(10);
  const CheckpointInfo bad = commit(20);
  flip_byte(path() / bad.manifest_file, 40);
  ASSERT_TRUE(store_->set_aside(bad.commit_seq).ok());
  EXPECT_EQ(steps(), (std::vector<int64_t>{10}));
}

TEST_F(VerifyTest, TheBestThereIsIsNeverSetAside) {
  const CheckpointInfo older = commit(10);
  const CheckpointInfo newer = commit(20);
  flip_byte(segment_of(older, 1), 5000);
  flip_byte(segment_of(newer, 0), 5000);
  for (const CheckpointInfo& info : {older, newer}) {
    const Status aside = store_->set_aside(info.commit_seq);
    EXPECT_EQ(aside.code(), Code::kFailedPrecondition);
    EXPECT_NE(aside.message().find("no other checkpoint"), std::string::npos) << aside.message();
  }
  EXPECT_EQ(steps(), (std::vector<int64_t>{10, 20}));
}

TEST_F(VerifyTest, AWholeCheckpointAndAStrangersAreNeverSetAside) {
  commit(10);
  const CheckpointInfo whole = commit(20);
  EXPECT_EQ(store_->set_aside(whole.commit_seq).code(), Code::kFailedPrecondition);
  EXPECT_EQ(store_->set_aside(99).code(), Code::kFailedPrecondition);
  Manifest foreign = manifest_of(whole);
  foreign.commit_seq = 3;
  foreign.previous_commit_seq = 2;
  foreign.job = JobId{8};
  replace_file(path() / manifest_file_name(3), *encode_manifest(foreign));
  EXPECT_EQ(store_->set_aside(3).code(), Code::kFailedPrecondition);
  EXPECT_TRUE(std::filesystem::exists(path() / manifest_file_name(3)));
}

TEST_F(VerifyTest, ADamagedStoreFileIsWrittenAgainFromTheManifests) {
  const CheckpointInfo info = commit(10);
  const std::string before = file_text(path() / "STORE");
  EXPECT_TRUE(check_store_file(path()).ok());
  replace_file(path() / "STORE", "garbage");
  store_.reset();
  EXPECT_EQ(check_store_file(path()).code(), Code::kDataLoss);
  ASSERT_TRUE(restore_store_file(path()).ok());
  EXPECT_EQ(file_text(path() / "STORE"), before);
  SetUp();
  EXPECT_EQ(newest_whole(path(), kJob).checkpoint, info);
}

TEST_F(VerifyTest, ADamagedStoreFileBesideManifestsOfTwoStoresIsLeft) {
  Manifest foreign = manifest_of(commit(10));
  foreign.commit_seq = 2;
  foreign.previous_commit_seq = 1;
  foreign.store = random_uuid();
  replace_file(path() / manifest_file_name(2), *encode_manifest(foreign));
  replace_file(path() / "STORE", "garbage");
  EXPECT_EQ(restore_store_file(path()).code(), Code::kFailedPrecondition);
  EXPECT_EQ(file_text(path() / "STORE"), "garbage");
}

TEST_F(VerifyTest, ADamagedStoreFileWithoutManifestsToSpeakForItIsLeft) {
  replace_file(path() / "STORE", "garbage");
  EXPECT_EQ(restore_store_file(path()).code(), Code::kFailedPrecondition);
  EXPECT_EQ(file_text(path() / "STORE"), "garbage");
}

TEST_F(VerifyTest, RetentionKeepsPinnedOnesAndThoseOfCertainSteps) {
  for (int64_t step = 10; step <= 60; step += 10) commit(step);
  ASSERT_TRUE(store_->pin(1).ok());
  ASSERT_TRUE(store_->pin(1).ok()) << "a second time is no error";
  EXPECT_EQ(store_->pin(99).code(), Code::kNotFound);
  const RetentionPolicy policy{.keep_last = 2, .keep_every = 20, .dry_run = true};
  EXPECT_EQ(store_->retain(policy)->commit_seqs, std::vector<uint64_t>{3});
  EXPECT_EQ(steps().size(), 6u) << "a dry run removes nothing";
  ASSERT_TRUE(store_->retain({.keep_last = 2, .keep_every = 20}).ok());
  EXPECT_EQ(steps(), (std::vector<int64_t>{10, 20, 40, 50, 60}));
  ASSERT_TRUE(store_->retain({.keep_last = 2}).ok());
  EXPECT_EQ(steps(), (std::vector<int64_t>{10, 50, 60}));
  EXPECT_TRUE(load_model(path(), manifest_file_name(1), 10).ok());
  ASSERT_TRUE(store_->unpin(1).ok());
  ASSERT_TRUE(store_->unpin(1).ok());
  ASSERT_TRUE(store_->retain({.keep_last = 2}).ok());
  EXPECT_EQ(steps(), (std::vector<int64_t>{50, 60}));
  size_t segments = 0;
  const std::vector<std::string> names = file_names(path()).value();
  for (const std::string& name : names) segments += name.ends_with(".segment");
  EXPECT_EQ(segments, 4u) << "space returns";
}

TEST_F(VerifyTest, APinIsDurableEvenWhenAnEarlierTryMadeItsName) {
  commit(10);
  store_.reset();
  for (uint64_t seed = 0; seed < 8; ++seed) {
    TempDirectory graves;
    SimulatedDisk disk(graves.path());
    {
      auto store = CheckpointStore::open(path(), kJob, nullptr, disk);
      ASSERT_TRUE(store.ok());
      const int64_t before = disk.call_count();
      ASSERT_TRUE(store->pin(1).ok());
      const int64_t calls = disk.call_count() - before;
      ASSERT_TRUE(store->unpin(1).ok());
      disk.fail_call(disk.call_count() + calls, Code::kInternal);  // the directory's sync
      EXPECT_FALSE(store->pin(1).ok());
      EXPECT_TRUE(store->pin(1).ok());
    }
    disk.lose_power(seed);
    EXPECT_EQ(pinned_checkpoints(path()).value(), std::set<uint64_t>{1}) << seed;
    std::filesystem::remove(path() / pin_file_name(1));
  }
}

TEST(MarksTest, NamesRoundTripAndNothingElseParses) {
  EXPECT_EQ(*parse_pin_file_name(pin_file_name(12)), 12u);
  EXPECT_EQ(*parse_set_aside_file_name(set_aside_file_name(12)), 12u);
  for (const char* name : {"12.pin", "000000000012.manifest", "../000000000012.pin",
                           "000000000000.pin", "000000000012.pin.damaged", ".pin", ""}) {
    EXPECT_FALSE(parse_pin_file_name(name).ok()) << name;
    EXPECT_FALSE(parse_set_aside_file_name(name).ok()) << name;
  }
}

}  // namespace
}  // namespace penstock
