// Disks that change what is written, stop answering in the middle of a commit or turn read-only,
// and readers and writers that meet there.
#include <fcntl.h>
#include <signal.h>
#include <sys/resource.h>
#include <sys/wait.h>

#include <map>

#include "checkpoint/removal.h"
#include "checkpoint/store.h"
#include "tests/checkpoint/support.h"
#include "tests/support/real_files.h"
#include "tests/support/small_disk.h"

namespace penstock {
namespace {

using namespace checkpoint_test;

class HostileDiskTest : public ::testing::Test {
 protected:
  Path path() const { return directory_.path() / "job"; }
  CheckpointStore open_store() {
    auto store = CheckpointStore::open(path(), kJob, nullptr);
    EXPECT_TRUE(store.ok()) << store.status().to_string();
    return *std::move(store);
  }

  TempDirectory directory_;
};

// One bit of the largest write, which is the data, differs from what was handed over.
class FlippingFile : public WritableFile {
 public:
  explicit FlippingFile(std::unique_ptr<WritableFile> file) : file_(std::move(file)) {}
  Status reserve(uint64_t bytes) override { return file_->reserve(bytes); }
  Status write_at(uint64_t offset, Bytes bytes) override {
    std::vector<std::byte> copy(bytes.begin(), bytes.end());
    if (bytes.size() > 2 * kBlockBytes) copy[20'000] ^= std::byte{4};
    return file_->write_at(offset, copy);
  }
  Status sync() override { return file_->sync(); }
  Status close() override { return file_->close(); }

 private:
  std::unique_ptr<WritableFile> file_;
};

class FlippingFiles : public RealFiles {
 public:
  Result<std::unique_ptr<WritableFile>> create(const Path& path) override {
    PENSTOCK_TRY_ASSIGN(std::unique_ptr<WritableFile> file, real_file_system().create(path));
    return std::unique_ptr<WritableFile>(std::make_unique<FlippingFile>(std::move(file)));
  }
};

TEST_F(HostileDiskTest, K19ABitThatFlipsBetweenStagingAndDiskIsFound) {
  CheckpointStore store = open_store();
  FlippingFiles files;
  const auto request = save_model(path(), kJob, Epoch{1}, 10, 1, files);
  ASSERT_TRUE(request.ok()) << request.status().to_string();
  const auto report = store.commit(*request);
  ASSERT_TRUE(report.ok()) << "footers are whole: " << report.status().to_string();
  const auto stored = read_manifest(path() / report->info.manifest_file);
  EXPECT_EQ(verify_checkpoint(path(), stored->manifest).code(), Code::kDataLoss);
  EXPECT_EQ(load_model(path(), report->info.manifest_file, 1).code(), Code::kDataLoss);
}

TEST_F(HostileDiskTest, AReaderOfACheckpointThatIsBeingRemovedGetsItsBytesOrAnError) {
  CheckpointStore store = open_store();
  const CheckpointInfo victim = commit_model(store, kJob, Epoch{1}, 10, 1);
  const auto stored = read_manifest(path() / victim.manifest_file);
  ASSERT_TRUE(stored.ok());
  const auto reader = SegmentReader::open(path() / stored->manifest.segments[0].file);
  ASSERT_TRUE(reader.ok());
  commit_model(store, kJob, Epoch{1}, 20, 2);
  ASSERT_EQ(store.retain({.keep_last = 1})->commit_seqs, std::vector<uint64_t>{1});
  const Box box{{0, 0}, {200, 64}};
  std::vector<std::byte> bytes(200 * 64 * 4);
  ASSERT_TRUE(reader->read_box(*reader->find("embed", box), box, box, bytes).ok());
  EXPECT_EQ(bytes, model_slices(0, 1)[0].bytes) << "what is open stays whole";
  const TensorSlice embed = model_tensors()[0];
  std::vector<std::byte> whole(byte_count(embed));
  const LoadTarget target{embed, whole, {}};
  EXPECT_FALSE(load_slices(path(), stored->manifest, {&target, 1}).ok()) << "the rest is gone";
}

TEST_F(HostileDiskTest, C27AReaderKilledInTheMiddleOfALoadChangesNothing) {
  CheckpointStore store = open_store();
  const CheckpointInfo info = commit_model(store, kJob, Epoch{1}, 10, 1);
  const auto contents = [&] {
    std::map<std::string, std::string> texts;
    const std::vector<std::string> names = *file_names(path());
    for (const std::string& name : names) texts[name] = file_text(path() / name);
    return texts;
  };
  const std::map<std::string, std::string> before = contents();
  for (int round = 0; round < 20; ++round) {
    int first_load[2];
    ASSERT_EQ(::pipe(first_load), 0);
    const pid_t reader = ::fork();
    ASSERT_GE(reader, 0);
    if (reader == 0) {  // loads until it is killed
      while (load_model(path(), info.manifest_file, 1).ok() && ::write(first_load[1], "", 1) == 1) {
      }
      ::_exit(1);
    }
    for (int loads = 0; loads <= round; ++loads) {
      char byte = 0;
      ASSERT_EQ(::read(first_load[0], &byte, 1), 1);
    }
    ::kill(reader, SIGKILL);
    int status = 0;
    ASSERT_EQ(::waitpid(reader, &status, 0), reader);
    EXPECT_TRUE(WIFSIGNALED(status)) << "every load before was right";
    ::close(first_load[0]);
    ::close(first_load[1]);
    EXPECT_TRUE(load_model(path(), info.manifest_file, 1).ok());
  }
  EXPECT_EQ(contents(), before);
}

TEST_F(HostileDiskTest, AProcessWithoutFreeDescriptorsIsToldSoAndLosesNothing) {
  CheckpointStore store = open_store();
  const CheckpointInfo info = commit_model(store, kJob, Epoch{1}, 10, 1);
  const auto request = save_model(path(), kJob, Epoch{1}, 20, 2);
  ASSERT_TRUE(request.ok());
  struct rlimit limit = {};
  ASSERT_EQ(::getrlimit(RLIMIT_NOFILE, &limit), 0);
  const FileDescriptor highest(::open("/", O_RDONLY));
  // So many are open already; each round leaves the store one more.
  bool committed = false;
  for (rlim_t more = 1; !committed && more < 20; ++more) {
    struct rlimit few = limit;
    few.rlim_cur = static_cast<rlim_t>(highest.get()) + more;
    ASSERT_EQ(::setrlimit(RLIMIT_NOFILE, &few), 0);
    const NewestWhole newest = newest_whole(path(), kJob);
    const auto report = store.commit(*request);
    committed = report.ok();
    ASSERT_EQ(::setrlimit(RLIMIT_NOFILE, &limit), 0);
    EXPECT_TRUE(newest.checkpoint || !newest.directory.ok() || !newest.refused.empty())
        << "a store that cannot be read is not an empty one";
    if (!committed) {
      EXPECT_NE(report.status().message().find("Too many open files"), std::string::npos)
          << report.status().to_string();
    }
    EXPECT_TRUE(load_model(path(), info.manifest_file, 1).ok());
  }
  EXPECT_TRUE(committed);
  EXPECT_EQ(newest_whole(path(), kJob).checkpoint->step, 20);
}

// Stops its own process, as SIGSTOP from outside would, after the rename that is the commit and
// before it is durable.
class StoppingFiles : public RealFiles {
 public:
  Status rename_no_replace(const Path& from, const Path& to) override {
    renamed_ = renamed_ || to.extension() == ".manifest";
    return RealFiles::rename_no_replace(from, to);
  }
  Status sync_directory(const Path& directory) override {
    if (renamed_) ::raise(SIGSTOP);
    return RealFiles::sync_directory(directory);
  }

 private:
  bool renamed_ = false;
};

class StoppedWriterTest : public HostileDiskTest {
 protected:
  // A process that stands still there.
  void SetUp() override {
    {
      CheckpointStore store = open_store();
      commit_model(store, kJob, Epoch{1}, 10, 1);
    }
    writer_ = ::fork();
    ASSERT_GE(writer_, 0);
    if (writer_ == 0) {
      StoppingFiles files;
      auto store = CheckpointStore::open(path(), kJob, nullptr, files);
      const auto request = save_model(path(), kJob, Epoch{1}, 20, 2);
      ::_exit(store.ok() && request.ok() && store->commit(*request).ok() ? 0 : 1);
    }
    int status = 0;
    ASSERT_EQ(::waitpid(writer_, &status, WUNTRACED), writer_);
    ASSERT_TRUE(WIFSTOPPED(status));
  }
  void TearDown() override {
    ::kill(writer_, SIGKILL);
    ::waitpid(writer_, nullptr, 0);
  }

  pid_t writer_ = 0;
};

TEST_F(StoppedWriterTest, C30KeepsItsLockAndFinishesWhenItGoesOn) {
  const auto other = CheckpointStore::open(path(), kJob, nullptr);
  EXPECT_EQ(other.status().code(), Code::kFailedPrecondition) << other.status().to_string();
  const NewestWhole newest = newest_whole(path(), kJob);
  ASSERT_TRUE(newest.checkpoint);
  EXPECT_EQ(newest.checkpoint->step, 20);
  EXPECT_TRUE(load_model(path(), newest.checkpoint->manifest_file, 2).ok());
  ASSERT_EQ(::kill(writer_, SIGCONT), 0);
  int status = 0;
  ASSERT_EQ(::waitpid(writer_, &status, 0), writer_);
  EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 0) << status;
  CheckpointStore store = open_store();
  EXPECT_EQ(commit_model(store, kJob, Epoch{2}, 30, 3).commit_seq, 3u);
}

TEST_F(StoppedWriterTest, C30ItsLockGoesWithItWhenItIsKilled) {
  ASSERT_EQ(::kill(writer_, SIGKILL), 0);
  ASSERT_EQ(::waitpid(writer_, nullptr, 0), writer_);
  CheckpointStore store = open_store();
  EXPECT_EQ(newest_whole(path(), kJob).checkpoint->step, 20);
  EXPECT_EQ(commit_model(store, kJob, Epoch{2}, 30, 3).commit_seq, 3u);
}

TEST_F(HostileDiskTest, ADiskThatTurnsReadOnlyIsReadFromAndRefusedForWriting) {
  const SmallDisk disk(directory_.path(), 16 << 20);
  {
    CheckpointStore store = open_store();
    commit_model(store, kJob, Epoch{1}, 10, 1);
  }
  const std::vector<std::string> before = *file_names(path());
  const auto remount = [&](unsigned long flags) {
    return ::mount(nullptr, directory_.path().c_str(), nullptr, MS_REMOUNT | flags, nullptr);
  };
  ASSERT_EQ(remount(MS_RDONLY), 0) << errno;
  EXPECT_FALSE(CheckpointStore::open(path(), kJob, nullptr).ok());
  EXPECT_FALSE(save_model(path(), kJob, Epoch{1}, 20, 2).ok());
  const NewestWhole newest = newest_whole(path(), kJob);
  ASSERT_TRUE(newest.checkpoint);
  EXPECT_TRUE(load_model(path(), newest.checkpoint->manifest_file, 1).ok());
  ASSERT_EQ(remount(0), 0) << errno;
  EXPECT_EQ(*file_names(path()), before);
  CheckpointStore store = open_store();
  EXPECT_EQ(commit_model(store, kJob, Epoch{1}, 20, 2).commit_seq, 2u);
}

}  // namespace
}  // namespace penstock
