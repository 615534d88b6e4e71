#include "worker/engine/segment_saver.h"

#include <gtest/gtest.h>

#include <atomic>
#include <future>
#include <semaphore>

#include "checkpoint/segment_reader.h"
#include "checkpoint/store.h"
#include "tests/support/real_files.h"
#include "tests/worker/engine_test_support.h"

namespace penstock {
namespace {

constexpr int64_t kElements = 5000;

// A disk whose files cannot be created before the test says so, or at all.
class GatedFileSystem : public RealFiles {
 public:
  Result<std::unique_ptr<WritableFile>> create(const Path& path) override {
    gate_.acquire();
    if (full_) return resource_exhausted("create " + path.string() + ": No space left on device");
    return real_file_system().create(path);
  }
  void open_gate() { gate_.release(); }  // for one file
  void fill_up() { full_ = true; }

 private:
  std::counting_semaphore<> gate_{0};
  std::atomic<bool> full_{false};
};

class SegmentSaverTest : public ::testing::Test {
 protected:
  struct Saved {
    int64_t step;
    Result<SegmentSummary> result;
  };
  SegmentSaverTest() : values_(kElements, 1.0F) {
    EXPECT_TRUE(store_uuid(directory_.path()).ok());  // so that a save creates one file
    state_.push_back(
        {whole_tensor("w", DType::kF32, {kElements}), std::as_bytes(std::span(values_))});
    state_.push_back({whole_tensor("empty", DType::kF32, {0}), {}});
  }
  std::unique_ptr<SegmentSaver> make(FileSystem& files = real_file_system()) {
    return std::make_unique<SegmentSaver>(
        directory_.path(), SegmentIdentity{JobId{1}, Epoch{2}, Rank{3}, 0},
        [this](int64_t step, const Result<SegmentSummary>& result) {
          saved_.push_back({step, result});
        },
        files);
  }
  // The value all elements of "w" have in a saved segment.
  float value_in(const Saved& saved) {
    const Result<SegmentReader> reader =
        SegmentReader::open(directory_.path() / saved.result->file);
    EXPECT_TRUE(reader.ok()) << reader.status().to_string();
    EXPECT_EQ(reader->header().identity,
              (SegmentIdentity{JobId{1}, Epoch{2}, Rank{3}, saved.step}));
    std::vector<float> values(kElements);
    const Box box{{0}, {kElements}};
    const Result<size_t> slice = reader->find("w", box);
    EXPECT_TRUE(slice.ok());
    EXPECT_TRUE(reader->read_box(*slice, box, box, std::as_writable_bytes(std::span(values))).ok());
    for (const float value : values) EXPECT_EQ(value, values[0]);
    return values[0];
  }

  ScratchDirectory directory_;
  std::vector<float> values_;
  std::vector<SliceSource> state_;
  std::vector<Saved> saved_;  // read after the saver is gone
};

TEST_F(SegmentSaverTest, SavesOneAfterTheOtherEachWhole) {
  std::unique_ptr<SegmentSaver> saver = make();
  for (int64_t step = 1; step <= 5; ++step) {
    std::fill(values_.begin(), values_.end(), static_cast<float>(step));
    saver->save(step, state_);
    saver->wait();
  }
  saver.reset();
  ASSERT_EQ(saved_.size(), 5u);
  for (const Saved& saved : saved_) {
    ASSERT_TRUE(saved.result.ok());
    EXPECT_EQ(value_in(saved), static_cast<float>(saved.step));
  }
}

TEST_F(SegmentSaverTest, SaveReturnsBeforeAnythingIsWrittenAndWaitOnlyAfterwards) {
  GatedFileSystem files;
  std::unique_ptr<SegmentSaver> saver = make(files);
  saver->save(1, state_);
  std::future<void> waiting = std::async(std::launch::async, [&] { saver->wait(); });
  EXPECT_EQ(waiting.wait_for(std::chrono::milliseconds(50)), std::future_status::timeout);
  EXPECT_TRUE(saved_.empty());
  files.open_gate();
  waiting.get();
  ASSERT_EQ(saved_.size(), 1u);
  EXPECT_EQ(value_in(saved_[0]), 1.0F);
}

TEST_F(SegmentSaverTest, ASaveUnderWayEndsBeforeTheSaver) {
  make()->save(4, state_);
  ASSERT_EQ(saved_.size(), 1u);
  EXPECT_EQ(value_in(saved_[0]), 1.0F);
}

TEST_F(SegmentSaverTest, OneSaveAtATime) {
  GatedFileSystem files;
  std::unique_ptr<SegmentSaver> saver = make(files);
  saver->save(1, state_);
  EXPECT_DEATH(saver->save(2, state_), "pending_");
  files.open_gate();
}

TEST_F(SegmentSaverTest, AFullDiskIsReportedAndTheNextSaveIsTried) {
  GatedFileSystem files;
  files.fill_up();
  std::unique_ptr<SegmentSaver> saver = make(files);
  for (int64_t step = 1; step <= 2; ++step) {
    saver->save(step, state_);
    files.open_gate();
    saver->wait();
  }
  saver.reset();
  ASSERT_EQ(saved_.size(), 2u);
  EXPECT_EQ(saved_[0].result.status().code(), Code::kResourceExhausted);
  EXPECT_EQ(saved_[1].result.status().code(), Code::kResourceExhausted);
  // Nothing but the store's own file is left.
  EXPECT_EQ(std::distance(std::filesystem::directory_iterator(directory_.path()), {}), 1);
}

TEST_F(SegmentSaverTest, UsesNoMemoryBesideTheBuffersOnTheWayToTheDisk) {
  EXPECT_EQ(make()->memory_bytes(), kWriteBudgetBytes);
}

}  // namespace
}  // namespace penstock
