#include "checkpoint/loader.h"

#include <rapidcheck.h>

#include "tests/checkpoint/support.h"

namespace penstock {
namespace {

using namespace checkpoint_test;

// Saves slices, each on the rank given beside it, and commits them.
StoredManifest commit_slices(const Path& directory,
                             const std::vector<std::vector<OwnedSlice>>& by_rank) {
  auto store = CheckpointStore::open(directory, kJob, nullptr);
  PENSTOCK_CHECK(store.ok(), store.status().message());
  CommitRequest request;
  request.epoch = Epoch{1};
  request.step = 10;
  request.spec_json = "{}";
  for (size_t rank = 0; rank < by_rank.size(); ++rank) {
    const SegmentIdentity identity = {kJob, Epoch{1}, Rank{static_cast<int32_t>(rank)}, 10};
    const auto summary = write_segment(directory, identity, sources_of(by_rank[rank]));
    PENSTOCK_CHECK(summary.ok(), summary.status().message());
    request.segments.push_back(commit_segment(*summary));
  }
  const auto report = store->commit(request);
  PENSTOCK_CHECK(report.ok(), report.status().message());
  return *read_manifest(directory / report->info.manifest_file);
}

// Rows of a [rows, columns] tensor in `parts` parts as even as can be, one per rank.
std::vector<std::vector<OwnedSlice>> by_rows(const std::string& name, int64_t rows, int64_t columns,
                                             int64_t parts) {
  std::vector<std::vector<OwnedSlice>> by_rank;
  for (int64_t i = 0; i < parts; ++i) {
    const int64_t begin = rows * i / parts;
    const int64_t end = rows * (i + 1) / parts;
    by_rank.push_back(
        {known_slice(name, DType::kF32, {rows, columns}, {{begin, 0}, {end - begin, columns}})});
  }
  return by_rank;
}

TEST(LoaderTest, AnyLayoutLoadsIntoAnyOtherByteForByte) {
  EXPECT_TRUE(rc::check("random grids saved by random ranks, loaded as other random grids", [] {
    TempDirectory directory(memory_directory());
    const int rank_count = *rc::gen::inRange(1, 5);
    std::vector<std::vector<OwnedSlice>> by_rank(rank_count);
    std::vector<TensorSlice> tensors;
    const auto cuts_of = [](int64_t size) {
      std::set<int64_t> cuts = {0, size};
      const int count = *rc::gen::inRange(0, 4);
      for (int i = 0; i < count; ++i) cuts.insert(*rc::gen::inRange<int64_t>(0, size + 1));
      return std::vector<int64_t>(cuts.begin(), cuts.end());
    };
    // Every box of a random grid over the tensor.
    const auto grid_of = [&](const TensorSlice& tensor) {
      std::vector<Box> boxes = {{{}, {}}};
      for (const int64_t size : tensor.shape) {
        const std::vector<int64_t> cuts = cuts_of(size);
        std::vector<Box> wider;
        for (const Box& box : boxes) {
          if (size == 0) {
            wider.push_back(box);
            wider.back().offset.push_back(0);
            wider.back().size.push_back(0);
          }
          for (size_t i = 0; i + 1 < cuts.size(); ++i) {
            wider.push_back(box);
            wider.back().offset.push_back(cuts[i]);
            wider.back().size.push_back(cuts[i + 1] - cuts[i]);
          }
        }
        boxes = std::move(wider);
      }
      return boxes;
    };
    const int tensor_count = *rc::gen::inRange(1, 4);
    for (int t = 0; t < tensor_count; ++t) {
      std::vector<int64_t> shape(*rc::gen::inRange(0, 4));
      for (int64_t& size : shape) size = *rc::gen::inRange<int64_t>(0, 40);
      const DType dtype = *rc::gen::element(DType::kF32, DType::kBf16, DType::kI64, DType::kU8);
      tensors.push_back(whole_tensor("t" + std::to_string(t), dtype, shape));
      for (const Box& box : grid_of(tensors.back())) {
        by_rank[*rc::gen::inRange(0, rank_count)].push_back(
            known_slice(tensors.back().name, dtype, shape, box));
      }
    }
    const StoredManifest stored = commit_slices(directory.path(), by_rank);

    std::vector<OwnedSlice> wanted;
    for (const TensorSlice& tensor : tensors) {
      for (const Box& box : grid_of(tensor)) {
        wanted.push_back(known_slice(tensor.name, tensor.dtype, tensor.shape, box));
      }
    }
    std::vector<std::vector<std::byte>> loaded;
    std::vector<LoadTarget> targets;
    for (const OwnedSlice& owned : wanted) {
      loaded.emplace_back(owned.bytes.size(), std::byte{0xee});
    }
    for (size_t i = 0; i < wanted.size(); ++i) targets.push_back({wanted[i].slice, loaded[i], {}});
    const auto report = load_slices(directory.path(), stored.manifest, targets);
    RC_ASSERT(report.ok());
    for (size_t i = 0; i < wanted.size(); ++i) RC_ASSERT(loaded[i] == wanted[i].bytes);
    RC_ASSERT(report->bytes_loaded == stored.manifest.payload_bytes());
  }));
}

TEST(LoaderTest, ReshardingReadsLittleMoreThanItNeeds) {
  for (const auto& [from, to] :
       std::vector<std::pair<int64_t, int64_t>>{{4, 3}, {3, 4}, {2, 4}, {8, 64}, {1, 64}}) {
    TempDirectory directory;
    const int64_t rows = 16 << 10;
    const StoredManifest stored = commit_slices(directory.path(), by_rows("w", rows, 256, from));
    uint64_t read = 0;
    uint64_t loaded = 0;
    for (const auto& slices : by_rows("w", rows, 256, to)) {
      std::vector<std::byte> bytes(slices[0].bytes.size());
      const LoadTarget target{slices[0].slice, bytes, {}};
      const auto report = load_slices(directory.path(), stored.manifest, {&target, 1});
      ASSERT_TRUE(report.ok()) << report.status().to_string();
      EXPECT_EQ(bytes, slices[0].bytes);
      read += report->bytes_read;
      loaded += report->bytes_loaded;
    }
    EXPECT_EQ(loaded, uint64_t(rows) * 256 * 4);
    EXPECT_LE(double(read), 1.05 * double(loaded)) << from << " -> " << to;
  }
}

TEST(LoaderTest, AColumnOfAWideTensorLoadsIntoStrides) {
  TempDirectory directory;
  const StoredManifest stored = commit_slices(directory.path(), by_rows("w", 5000, 300, 3));
  const Box column = {{0, 7}, {5000, 1}};
  std::vector<std::byte> buffer(5000 * 3 * 4, std::byte{0});
  const LoadTarget target{{"w", DType::kF32, {5000, 300}, column}, buffer, {3, 1}};
  const auto report = load_slices(directory.path(), stored.manifest, {&target, 1});
  ASSERT_TRUE(report.ok()) << report.status().to_string();
  const auto wanted = known_bytes({"w", DType::kF32, {5000, 300}, column});
  for (int64_t row = 0; row < 5000; ++row) {
    ASSERT_EQ(0, std::memcmp(buffer.data() + row * 12, wanted.data() + row * 4, 4)) << row;
  }
}

TEST(LoaderTest, MoreRunsThanArePlannedAtOnceStillLoadExactly) {
  TempDirectory directory;
  std::vector<OwnedSlice> slices;
  for (int i = 0; i < 3; ++i) {
    slices.push_back(
        known_slice("w" + std::to_string(i), DType::kU8, {300'000, 16}, {{0, 0}, {300'000, 16}}));
  }
  const StoredManifest stored = commit_slices(directory.path(), {slices});
  std::vector<std::vector<std::byte>> loaded(3, std::vector<std::byte>(300'000 * 3));
  std::vector<LoadTarget> targets;
  uint64_t file_bytes = stored.manifest.segments[0].byte_count;
  for (int i = 0; i < 3; ++i) {
    targets.push_back(
        {{slices[i].slice.name, DType::kU8, {300'000, 16}, {{0, 2}, {300'000, 3}}}, loaded[i], {}});
  }
  const auto report = load_slices(directory.path(), stored.manifest, targets);
  ASSERT_TRUE(report.ok()) << report.status().to_string();
  for (int i = 0; i < 3; ++i) EXPECT_EQ(loaded[i], known_bytes(targets[i].slice));
  EXPECT_LE(report->bytes_read, file_bytes) << "no block is read twice";
}

TEST(LoaderTest, OneBlockServesManySmallTensors) {
  TempDirectory directory;
  std::vector<OwnedSlice> slices;
  for (int i = 0; i < 100; ++i) {
    slices.push_back(known_slice("s" + std::to_string(i), DType::kF32, {16}, {{0}, {16}}));
  }
  const StoredManifest stored = commit_slices(directory.path(), {slices});
  std::vector<std::vector<std::byte>> loaded(100, std::vector<std::byte>(64));
  std::vector<LoadTarget> targets;
  for (int i = 0; i < 100; ++i) targets.push_back({slices[i].slice, loaded[i], {}});
  const auto report = load_slices(directory.path(), stored.manifest, targets);
  ASSERT_TRUE(report.ok());
  for (int i = 0; i < 100; ++i) EXPECT_EQ(loaded[i], slices[i].bytes);
  EXPECT_EQ(report->read_count, 1u);
}

TEST(LoaderTest, WhatDoesNotFitTheCheckpointIsRefusedBeforeReading) {
  TempDirectory directory;
  const StoredManifest stored = commit_slices(directory.path(), by_rows("w", 8, 4, 2));
  std::vector<std::byte> bytes(8 * 4 * 4);
  const auto code = [&](const TensorSlice& slice, MutableBytes into) {
    const LoadTarget target{slice, into, {}};
    const auto report = load_slices(directory.path(), stored.manifest, {&target, 1});
    EXPECT_NE(report.status().message().find("tensor " + slice.name), std::string::npos);
    return report.status().code();
  };
  EXPECT_EQ(code(whole_tensor("v", DType::kF32, {8, 4}), bytes), Code::kNotFound);
  EXPECT_EQ(code(whole_tensor("w", DType::kI32, {8, 4}), bytes), Code::kInvalidArgument);
  EXPECT_EQ(code(whole_tensor("w", DType::kF32, {4, 8}), bytes), Code::kInvalidArgument);
  EXPECT_EQ(code(whole_tensor("w", DType::kF32, {8, 4}), MutableBytes(bytes).first(127)),
            Code::kInvalidArgument);
}

TEST(LoaderTest, ASliceThatIsNotTheManifestsIsRefused) {
  TempDirectory directory;
  StoredManifest stored = commit_slices(directory.path(), by_rows("w", 8, 4, 2));
  stored.manifest.tensors[0].pieces[1].digest.low ^= 1;
  std::vector<std::byte> bytes(8 * 4 * 4);
  const LoadTarget target{whole_tensor("w", DType::kF32, {8, 4}), bytes, {}};
  const Status status = load_slices(directory.path(), stored.manifest, {&target, 1}).status();
  EXPECT_EQ(status.code(), Code::kDataLoss);
  EXPECT_NE(status.message().find("w [4:8, 0:4] is not what the manifest says"), std::string::npos)
      << status.message();
}

TEST(LoaderTest, AGapInTheManifestIsFoundBeforeTheFirstRead) {
  TempDirectory directory;
  StoredManifest stored = commit_slices(directory.path(), by_rows("w", 8, 4, 2));
  stored.manifest.tensors[0].pieces.pop_back();
  std::filesystem::remove(directory.path() / stored.manifest.segments[0].file);
  std::vector<std::byte> bytes(8 * 4 * 4);
  const LoadTarget target{whole_tensor("w", DType::kF32, {8, 4}), bytes, {}};
  const Status status = load_slices(directory.path(), stored.manifest, {&target, 1}).status();
  EXPECT_EQ(status.code(), Code::kDataLoss);
  EXPECT_NE(status.message().find("tensor w: no slice holds [4:8, 0:4]"), std::string::npos)
      << status.message();
}

}  // namespace
}  // namespace penstock
