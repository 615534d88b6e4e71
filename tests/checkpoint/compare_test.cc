#include "checkpoint/compare.h"

#include <sys/inotify.h>
#include <unistd.h>

#include <cmath>
#include <map>

#include "checkpoint/census.h"
#include "tests/checkpoint/support.h"

namespace penstock {
namespace {

using namespace checkpoint_test;

// Commits what each rank is given as one checkpoint in a directory of its own.
class CompareTest : public ::testing::Test {
 protected:
  struct Saved {
    Path directory;
    Manifest manifest;
  };
  Saved save(const std::string& name, const std::vector<std::vector<OwnedSlice>>& by_rank) {
    const Path directory = directory_.path() / name;
    auto store = CheckpointStore::open(directory, kJob, nullptr);
    EXPECT_TRUE(store.ok()) << store.status().to_string();
    CommitRequest request;
    request.epoch = Epoch{1};
    request.step = 10;
    request.spec_json = "{}";
    for (size_t rank = 0; rank < by_rank.size(); ++rank) {
      request.segments.push_back(commit_segment(save_segment(
          directory, {kJob, Epoch{1}, Rank{static_cast<int32_t>(rank)}, 10}, by_rank[rank])));
    }
    const auto report = store->commit(request);
    EXPECT_TRUE(report.ok()) << report.status().to_string();
    return {directory, read_manifest(directory / report->info.manifest_file)->manifest};
  }
  static Comparison compare(const Saved& a, const Saved& b, bool values = false) {
    const auto comparison =
        compare_checkpoints({a.directory, a.manifest}, {b.directory, b.manifest}, values);
    EXPECT_TRUE(comparison.ok()) << comparison.status().to_string();
    return *comparison;
  }
  static OwnedSlice part(int64_t from, int64_t rows, uint64_t version = 0) {
    return known_slice("w", DType::kF32, {60, 40}, {{from, 0}, {rows, 40}}, version);
  }

  TempDirectory directory_;
};

TEST_F(CompareTest, LayoutsDoNotCountAndManifestsAreEnough) {
  const Saved a = save("a", {{part(0, 60)}});
  const Saved b = save("b", {{part(0, 7), part(30, 30)}, {part(7, 23)}});
  std::filesystem::remove(b.directory / b.manifest.segments[0].file);
  const Comparison comparison = compare(a, b);
  EXPECT_TRUE(comparison.equal());
  EXPECT_EQ(comparison.equal_count, 1u);
}

TEST_F(CompareTest, TensorsOfOneSideOtherShapesAndOtherValuesAreToldApart) {
  const auto whole = [](const std::string& name, DType dtype, std::vector<int64_t> shape,
                        uint64_t version = 0) {
    const TensorSlice slice = whole_tensor(name, dtype, shape);
    return known_slice(name, dtype, shape, slice.box, version);
  };
  const Saved a = save("a", {{whole("left", DType::kF32, {3}), whole("same", DType::kF32, {3}),
                              whole("shape", DType::kF32, {3}), whole("value", DType::kI32, {9})}});
  const Saved b =
      save("b", {{whole("right", DType::kF32, {3}), whole("same", DType::kF32, {3}),
                  whole("shape", DType::kF32, {4}), whole("value", DType::kI32, {9}, 1)}});
  const Comparison comparison = compare(a, b);
  ASSERT_EQ(comparison.differences.size(), 4u);
  using Kind = TensorDifference::Kind;
  const std::vector<std::pair<std::string, Kind>> wanted = {{"left", Kind::kOnlyInA},
                                                            {"right", Kind::kOnlyInB},
                                                            {"shape", Kind::kShape},
                                                            {"value", Kind::kValues}};
  for (size_t i = 0; i < wanted.size(); ++i) {
    EXPECT_EQ(comparison.differences[i].name, wanted[i].first);
    EXPECT_EQ(comparison.differences[i].kind, wanted[i].second);
  }
  EXPECT_EQ(comparison.equal_count, 1u);
  EXPECT_FALSE(comparison.differences[3].max_abs) << "values were not asked for";
}

OwnedSlice floats(std::vector<float> values) {
  const auto bytes = std::as_bytes(std::span(values));
  return {whole_tensor("w", DType::kF32, {static_cast<int64_t>(values.size())}),
          {bytes.begin(), bytes.end()}};
}

TEST_F(CompareTest, ValuesGiveTheLargestDifferenceAndHowManyDiffer) {
  const Saved a = save("a", {{floats({1.0f, 2.0f, 3.0f, 0.0f})}});
  const Saved b = save("b", {{floats({1.0f, 2.5f, 1.0f, -0.0f})}});
  const Comparison comparison = compare(a, b, true);
  ASSERT_EQ(comparison.differences.size(), 1u);
  EXPECT_EQ(comparison.differences[0].element_count, 3u) << "-0 has other bits than 0";
  EXPECT_EQ(comparison.differences[0].max_abs, 2.0);
  const Saved c = save("c", {{floats({NAN, 2.0f, 3.0f, 0.0f})}});
  EXPECT_EQ(compare(a, c, true).differences[0].max_abs, INFINITY);
}

TEST_F(CompareTest, TensorsLargerThanAChunkAreComparedInPieces) {
  const std::vector<int64_t> shape = {2, 3'000'000};  // rows of 12 MB: one a chunk
  const auto with = [&](uint8_t last) {
    OwnedSlice owned{whole_tensor("w", DType::kU32, shape), {}};
    owned.bytes.resize(byte_count(owned.slice));
    owned.bytes[owned.bytes.size() - 4] = std::byte{last};
    return owned;
  };
  const Saved a = save("a", {{with(1)}});
  const Saved b = save("b", {{with(9)}});
  const Comparison comparison = compare(a, b, true);
  ASSERT_EQ(comparison.differences.size(), 1u);
  EXPECT_EQ(comparison.differences[0].element_count, 1u);
  EXPECT_EQ(comparison.differences[0].max_abs, 8.0);
}

// How often each file of a directory was opened since this was made.
class Openings {
 public:
  explicit Openings(const Path& directory) : fd_(inotify_init1(IN_NONBLOCK | IN_CLOEXEC)) {
    EXPECT_GE(inotify_add_watch(fd_, directory.c_str(), IN_OPEN), 0) << directory;
  }
  ~Openings() { ::close(fd_); }
  Openings(const Openings&) = delete;
  Openings& operator=(const Openings&) = delete;

  std::map<std::string, int> counts() const {
    std::map<std::string, int> counts;
    alignas(inotify_event) char buffer[1 << 16];
    for (ssize_t size = 0; (size = ::read(fd_, buffer, sizeof(buffer))) > 0;) {
      for (ssize_t at = 0; at < size;) {
        const auto* event = reinterpret_cast<const inotify_event*>(buffer + at);
        if (event->len > 0) ++counts[event->name];
        at += static_cast<ssize_t>(sizeof(inotify_event) + event->len);
      }
    }
    return counts;
  }

 private:
  const int fd_;
};

TEST_F(CompareTest, EachSegmentIsOpenedOnceHoweverManyTensorsDiffer) {
  const auto rank = [](int64_t from, int64_t rows, uint64_t version) {
    std::vector<OwnedSlice> slices;
    for (int i = 0; i < 20; ++i) {
      const std::string name = "w" + std::to_string(100 + i);
      slices.push_back(known_slice(name, DType::kF32, {9, 4}, {{from, 0}, {rows, 4}}, version));
    }
    return slices;
  };
  const Saved a = save("a", {rank(0, 5, 0), rank(5, 4, 0)});
  const Saved b = save("b", {rank(0, 2, 1), rank(2, 7, 1)});
  const Openings opened_a(a.directory);
  const Openings opened_b(b.directory);
  const Comparison comparison = compare(a, b, true);
  ASSERT_EQ(comparison.differences.size(), 20u);
  for (const TensorDifference& difference : comparison.differences) {
    EXPECT_EQ(difference.element_count, 36u) << difference.name;
  }
  std::map<std::string, int> once;
  for (const ManifestSegment& segment : a.manifest.segments) once[segment.file] = 1;
  EXPECT_EQ(opened_a.counts(), once);
  once.clear();
  for (const ManifestSegment& segment : b.manifest.segments) once[segment.file] = 1;
  EXPECT_EQ(opened_b.counts(), once);
}

TEST_F(CompareTest, ADamagedOrForeignSegmentIsNamedInsteadOfCompared) {
  const Saved a = save("a", {{part(0, 60)}});
  const Saved b = save("b", {{part(0, 30, 1)}, {part(30, 30, 1)}});
  const auto error = [&] {
    const auto comparison =
        compare_checkpoints({a.directory, a.manifest}, {b.directory, b.manifest}, true);
    EXPECT_EQ(comparison.status().code(), Code::kDataLoss);
    return comparison.status().message();
  };
  const Path second = b.directory / b.manifest.segments[1].file;
  flip_byte(second, kSegmentHeaderBytes + 3);
  const std::string flipped = error();
  for (const std::string& part : {second.filename().string(), std::string("w [30:60, 0:40]")}) {
    EXPECT_NE(flipped.find(part), std::string::npos) << part << " in " << flipped;
  }
  std::filesystem::copy_file(b.directory / b.manifest.segments[0].file, second,
                             std::filesystem::copy_options::overwrite_existing);
  EXPECT_NE(error().find(second.filename().string()), std::string::npos);
  std::filesystem::remove(second);
  EXPECT_NE(error().find(second.filename().string()), std::string::npos);
}

// A store that a program with format 1 wrote, kept as it was: it must stay readable, and comparable
// though its manifest has no digest of whole tensors.
TEST_F(CompareTest, CheckpointsOfFormatOneAreStillReadVerifiedAndCompared) {
  const Path old = Path(PENSTOCK_FIXTURES) / "checkpoint_format_1";
  const auto stored = read_manifest(old / manifest_file_name(1));
  ASSERT_TRUE(stored.ok()) << stored.status().to_string();
  EXPECT_EQ(stored->manifest.version, 1u);
  EXPECT_FALSE(stored->manifest.has_tensor_digests());
  const Status verified = verify_checkpoint(old, stored->manifest);
  EXPECT_TRUE(verified.ok()) << verified.to_string();
  std::vector<float> values(6);
  const LoadTarget target{
      whole_tensor("w", DType::kF32, {2, 3}), std::as_writable_bytes(std::span(values)), {}};
  ASSERT_TRUE(load_slices(old, stored->manifest, {&target, 1}).ok());
  EXPECT_EQ(values, (std::vector<float>{1, 2, 3, 4, 5, 6}));

  OwnedSlice w = floats({1, 2, 3, 4, 5, 6});
  w.slice = target.slice;
  OwnedSlice step{whole_tensor("state|step", DType::kI64, {}), std::vector<std::byte>(8)};
  step.bytes[0] = std::byte{60};
  const Saved now = save("now", {{w, step}});
  EXPECT_EQ(now.manifest.version, 2u);
  const auto comparison =
      compare_checkpoints({old, stored->manifest}, {now.directory, now.manifest}, false);
  ASSERT_TRUE(comparison.ok()) << comparison.status().to_string();
  EXPECT_TRUE(comparison->equal());
  EXPECT_EQ(comparison->equal_count, 2u);
}

TEST_F(CompareTest, AStoreOfFormatOneGoesOnWithTheNewOne) {
  const Path directory = directory_.path() / "upgraded";
  std::filesystem::copy(Path(PENSTOCK_FIXTURES) / "checkpoint_format_1", directory);
  auto store = CheckpointStore::open(directory, kJob, nullptr);
  ASSERT_TRUE(store.ok()) << store.status().to_string();
  const CheckpointInfo info = commit_model(*store, kJob, Epoch{4}, 70, 1);
  EXPECT_EQ(info.commit_seq, 2u);
  EXPECT_EQ(list_checkpoints(directory, kJob).checkpoints.size(), 2u);
  EXPECT_TRUE(load_model(directory, info.manifest_file, 1).ok());
}

ManifestTensor weight(const std::string& name, std::vector<int64_t> shape = {2, 2}) {
  return {name, DType::kF32, shape, {{0, {std::vector<int64_t>(shape.size(), 0), shape}, {}}}};
}

Manifest model_manifest() {
  Manifest manifest;
  const auto add_trained = [&](const std::string& name) {
    manifest.tensors.push_back(weight(name));
    manifest.tensors.push_back(weight(exp_avg_name(name)));
    manifest.tensors.push_back(weight(exp_avg_sq_name(name)));
  };
  add_trained("model.embed_tokens.weight");
  for (const char* layer : {"0", "1", "2"}) {
    const std::string prefix = std::string("model.layers.") + layer + ".mlp.";
    if (*layer == '0') {
      add_trained(prefix + "up_proj.weight");
      continue;
    }
    for (const char* expert : {"0", "1", "2", "3"}) {
      add_trained(prefix + "experts." + expert + ".up_proj.weight");
    }
    manifest.tensors.push_back(weight(prefix + "gate.e_score_correction_bias", {4}));
  }
  manifest.tensors.push_back(weight("state|step", {}));
  std::sort(manifest.tensors.begin(), manifest.tensors.end(),
            [](const auto& a, const auto& b) { return a.name < b.name; });
  return manifest;
}

TEST(CensusTest, LayersExpertsAndACompleteOptimizerAreCounted) {
  const Census census = take_census(model_manifest());
  EXPECT_EQ(census.sentence(), "3 layers, 2 of them × 4 experts, optimizer complete");
  EXPECT_EQ(census.parameter_count, 10u * 4);
  EXPECT_EQ(census.kinds.at(TensorKind::kExpAvg).tensor_count, 10u);
  EXPECT_EQ(census.kinds.at(TensorKind::kWeight).bytes, 10u * 16 + 2 * 16);
}

TEST(CensusTest, AMissingMomentIsNamed) {
  Manifest manifest = model_manifest();
  const std::string gone = "model.layers.1.mlp.experts.3.up_proj.weight|exp_avg_sq";
  std::erase_if(manifest.tensors, [&](const auto& tensor) { return tensor.name == gone; });
  const Census census = take_census(manifest);
  EXPECT_FALSE(census.optimizer_complete());
  EXPECT_EQ(census.missing, std::vector<std::string>{gone});
  EXPECT_NE(census.sentence().find("not complete: 1 tensors missing"), std::string::npos);
}

TEST(CensusTest, WeightsAloneAreSaidToBeSo) {
  Manifest manifest = model_manifest();
  std::erase_if(manifest.tensors, [](const auto& tensor) {
    return parse_logical_name(tensor.name).kind != TensorKind::kWeight;
  });
  EXPECT_NE(take_census(manifest).sentence().find("no optimizer state"), std::string::npos);
}

}  // namespace
}  // namespace penstock
