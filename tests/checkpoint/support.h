// What the checkpoint tests share: temporary directories, tensors whose every element is known from
// its position, checkpoints of several ranks, and a disk that fails, crashes and loses power.
#pragma once

#include <gtest/gtest.h>

#include <optional>
#include <string>
#include <vector>

#include "checkpoint/loader.h"
#include "checkpoint/segment_reader.h"
#include "checkpoint/segment_writer.h"
#include "checkpoint/store.h"
#include "comm/base/random.h"

namespace penstock::checkpoint_test {

// Where tests that save thousands of checkpoints put them: memory, when there is such a file
// system.
Path memory_directory();

// A new directory, removed with everything in it.
class TempDirectory {
 public:
  explicit TempDirectory(const Path& parent = std::filesystem::temp_directory_path());
  ~TempDirectory();
  TempDirectory(const TempDirectory&) = delete;
  TempDirectory& operator=(const TempDirectory&) = delete;
  const Path& path() const { return path_; }

 private:
  Path path_;
};

// Bytes of a slice of the test tensor of that name: every element is a function of name, `version`
// and its position in the whole tensor, so that any layout's copy can be checked.
std::vector<std::byte> known_bytes(const TensorSlice& slice, uint64_t version = 0);

// A slice together with the bytes it owns.
struct OwnedSlice {
  TensorSlice slice;
  std::vector<std::byte> bytes;
};
OwnedSlice known_slice(const std::string& name, DType dtype, std::vector<int64_t> shape, Box box,
                       uint64_t version = 0);
std::vector<SliceSource> sources_of(const std::vector<OwnedSlice>& slices);

// Writes one rank's segment; the test fails when that fails.
SegmentSummary save_segment(const Path& directory, const SegmentIdentity& identity,
                            const std::vector<OwnedSlice>& slices,
                            FileSystem& files = real_file_system());

CommitSegment commit_segment(const SegmentSummary& summary);

// The small model of these tests: two ranks, "embed" split by rows, "bias" whole on rank 0, "norm"
// whole on rank 1, "state|step" 0-d on rank 0, "empty" without elements on rank 1.
inline constexpr int kModelRanks = 2;
std::vector<OwnedSlice> model_slices(int rank, uint64_t version);
std::vector<TensorSlice> model_tensors();

// Writes the model's segments with contents `version` and describes their commit.
Result<CommitRequest> save_model(const Path& directory, JobId job, Epoch epoch, int64_t step,
                                 uint64_t version, FileSystem& files = real_file_system());
// save_model and commit; the test fails when either fails.
CheckpointInfo commit_model(CheckpointStore& store, JobId job, Epoch epoch, int64_t step,
                            uint64_t version);

// Ok when every tensor of the model loads from this checkpoint with the contents of `version`.
Status load_model(const Path& directory, const std::string& manifest_file, uint64_t version);

// Flips bits in one byte of a file.
void flip_byte(const Path& path, uint64_t offset, uint8_t bits = 0x10);
uint64_t size_of_file(const Path& path);
std::string file_text(const Path& path);
void overwrite(const Path& path, uint64_t offset, std::string_view bytes);
void replace_file(const Path& path, std::string_view text);

inline constexpr JobId kJob{7};

// A store of kJob in a directory of its own, filled with checkpoints of the model.
class ModelStoreTest : public ::testing::Test {
 protected:
  void SetUp() override {
    auto store = CheckpointStore::open(path(), kJob, nullptr);
    ASSERT_TRUE(store.ok()) << store.status().to_string();
    store_.emplace(*std::move(store));
  }
  Path path() const { return directory_.path(); }
  CheckpointInfo commit(int64_t step) {
    return commit_model(*store_, kJob, Epoch{1}, step, static_cast<uint64_t>(step));
  }
  Manifest manifest_of(const CheckpointInfo& info) const {
    return read_manifest(path() / info.manifest_file)->manifest;
  }
  Path segment_of(const CheckpointInfo& info, size_t index) const {
    return path() / manifest_of(info).segments[index].file;
  }
  // Of the checkpoints that are listed, oldest first.
  std::vector<int64_t> steps() const {
    std::vector<int64_t> steps;
    for (const auto& info : list_checkpoints(path(), kJob).checkpoints) steps.push_back(info.step);
    return steps;
  }

  TempDirectory directory_;
  std::optional<CheckpointStore> store_;
};

}  // namespace penstock::checkpoint_test
