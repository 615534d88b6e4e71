#include "checkpoint/disk_file.h"

#include <fcntl.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>
#include <deque>

#include "checkpoint/disk_buffers.h"
#include "tests/checkpoint/ring_fault.h"
#include "tests/checkpoint/support.h"
#include "tests/support/real_files.h"

namespace {

int file_syncs = 0;  // that have reached the kernel
int directory_syncs = 0;

}  // namespace

// In the place of the C library's.
extern "C" int fdatasync(int fd) {
  ++file_syncs;
  return static_cast<int>(::syscall(SYS_fdatasync, fd));
}
extern "C" int fsync(int fd) {
  ++directory_syncs;
  return static_cast<int>(::syscall(SYS_fsync, fd));
}

namespace penstock {
namespace {

using namespace checkpoint_test;

// Writes at once, tells so in the opposite order, and fails one as told.
class FaultyRing : public DiskRing {
 public:
  FaultyRing(Fault fault, int64_t* count, size_t* unreturned)
      : fault_(fault), count_(count), unreturned_(unreturned) {}

  Status submit_write(int fd, uint64_t offset, Bytes bytes, uint64_t tag) override {
    const bool faulty = ++*count_ == fault_.at;
    int64_t result = std::ssize(bytes);
    if (faulty && fault_.kind == Fault::Kind::kRefused) return unavailable("no room in the ring");
    if (faulty && fault_.kind == Fault::Kind::kError) result = -EIO;
    if (faulty && fault_.kind == Fault::Kind::kNotTaken) result = -EINVAL;
    if (faulty && fault_.kind == Fault::Kind::kShort) {
      constexpr auto kPage = static_cast<int64_t>(kDirectAlignment);
      result = result / 2 / kPage * kPage;
    }
    if (result > 0) {
      result = ::pwrite(fd, bytes.data(), static_cast<size_t>(result), static_cast<off_t>(offset));
      if (result < 0) result = -errno;
    }
    done_.push_back({tag, result});
    ++*unreturned_;
    return {};
  }
  Status submit_read(int, uint64_t, MutableBytes, uint64_t) override {
    return internal_error("nothing is read here");
  }
  Done wait() override {
    const Done done = done_.back();
    done_.pop_back();
    --*unreturned_;
    return done;
  }

 private:
  const Fault fault_;
  int64_t* const count_;
  size_t* const unreturned_;
  std::vector<Done> done_;
};

// A disk whose rings do that.
struct FaultyDisk {
  explicit FaultyDisk(Fault fault = {})
      : files(make_disk({.direct = true, .make_ring = [this, fault](unsigned) {
                           return Result<std::unique_ptr<DiskRing>>(
                               std::make_unique<FaultyRing>(fault, &write_count, &unreturned));
                         }})) {}
  int64_t write_count = 0;
  size_t unreturned = 0;  // writes whose end nobody has asked for
  std::unique_ptr<FileSystem> files;
};

Result<std::unique_ptr<DiskRing>> no_ring(unsigned) {
  return unavailable("no io_uring here");
}

// Whether writes there may go past the page cache, and so through a ring: a tmpfs before Linux 6.6
// does not let them.
bool takes_direct_writes(const Path& directory) {
  const Path probe = directory / "probe";
  const bool taken = open_file(probe, O_WRONLY | O_CREAT | O_DIRECT).ok();
  std::filesystem::remove(probe);
  return taken;
}

std::vector<OwnedSlice> slices_of(int64_t bytes) {
  return {known_slice("w", DType::kU8, {bytes}, {{0}, {bytes}})};
}

// Sizes around every boundary: block, page, piece, buffer, all buffers.
constexpr int64_t kSizes[] = {0,       1,         4095,      4096,      4097,
                              262'143, 4'194'303, 4'194'304, 4'194'305, 20'971'523};

TEST(DiskFileTest, EveryWayToTheDiskLeavesTheSameBytes) {
  for (const Path& parent : {std::filesystem::temp_directory_path(), memory_directory()}) {
    TempDirectory directory(parent);
    const auto buffers = DiskBuffers::make(2 * kDiskBufferBytes);
    ASSERT_TRUE(buffers.ok());
    FaultyDisk reordering;
    const auto synchronous = make_disk({.direct = true, .make_ring = no_ring});
    const auto buffered = make_disk({.direct = false});
    for (const int64_t size : kSizes) {
      const std::vector<std::byte> bytes = slices_of(size)[0].bytes;
      std::vector<std::string> texts;
      for (FileSystem* files :
           {&real_file_system(), reordering.files.get(), synchronous.get(), buffered.get()}) {
        const Path path = directory.path() / "file";
        auto file = files->create(path);
        ASSERT_TRUE(file.ok());
        ASSERT_TRUE((*file)->reserve(bytes.size() + 7).ok());
        size_t under_way = 0;
        uint64_t begin = 0;
        // Whole pages through the buffers, the rest as it is.
        for (size_t i = 0; begin + 4096 <= bytes.size(); ++i) {
          if (under_way == buffers->count()) {
            ASSERT_TRUE((*file)->finish_write().ok());
            --under_way;
          }
          const uint64_t count =
              std::min<uint64_t>(kDiskBufferBytes, (bytes.size() - begin) / 4096 * 4096);
          const MutableBytes buffer = (*buffers)[i % buffers->count()].first(count);
          std::memcpy(buffer.data(), bytes.data() + begin, count);
          ASSERT_TRUE((*file)->start_write(begin, buffer).ok());
          ++under_way;
          begin += count;
        }
        for (; under_way > 0; --under_way) ASSERT_TRUE((*file)->finish_write().ok());
        ASSERT_TRUE((*file)->write_at(begin, Bytes(bytes).subspan(begin)).ok());
        ASSERT_TRUE((*file)->write_at(bytes.size(), as_bytes("the end")).ok());
        ASSERT_TRUE((*file)->sync().ok());
        ASSERT_TRUE((*file)->close().ok());
        texts.push_back(file_text(path));
        std::filesystem::remove(path);
      }
      const std::string wanted = std::string(as_text(bytes)) + "the end";
      for (const std::string& text : texts) EXPECT_TRUE(text == wanted) << size;
    }
    EXPECT_EQ(reordering.write_count > 0, takes_direct_writes(directory.path()));
  }
}

TEST(DiskFileTest, SegmentsOfEverySizeAreWholeByEveryWay) {
  TempDirectory directory;
  FaultyDisk reordering;
  const auto synchronous = make_disk({.direct = true, .make_ring = no_ring});
  const auto buffered = make_disk({.direct = false});
  for (const int64_t size : kSizes) {
    const std::vector<OwnedSlice> slices = slices_of(size);
    std::vector<Digest> digests;
    for (FileSystem* files :
         {&real_file_system(), reordering.files.get(), synchronous.get(), buffered.get()}) {
      const SegmentSummary summary = save_segment(directory.path(), kIdentity, slices, *files);
      const auto reader = SegmentReader::open(directory.path() / summary.file);
      ASSERT_TRUE(reader.ok()) << reader.status().to_string();
      EXPECT_TRUE(reader->verify().ok()) << size;
      EXPECT_EQ(size_of_file(directory.path() / summary.file), summary.byte_count);
      digests.push_back(summary.slices[0].digest);
      EXPECT_EQ(digests.back(), digests.front());
      std::filesystem::remove(directory.path() / summary.file);
    }
  }
}

TEST(DiskFileTest, AWriteThatIsCutShortNotTakenOrRefusedIsCompleted) {
  TempDirectory directory;
  const bool direct = takes_direct_writes(directory.path());  // without, no ring is asked
  const std::vector<OwnedSlice> slices = slices_of(20'971'523);
  for (const Fault::Kind kind :
       {Fault::Kind::kShort, Fault::Kind::kNotTaken, Fault::Kind::kRefused}) {
    for (int64_t at = 1; at <= 6; ++at) {
      FaultyDisk disk({kind, at});
      const SegmentSummary summary = save_segment(directory.path(), kIdentity, slices, *disk.files);
      EXPECT_EQ(disk.write_count >= at, direct);
      const auto reader = SegmentReader::open(directory.path() / summary.file);
      ASSERT_TRUE(reader.ok()) << reader.status().to_string();
      EXPECT_TRUE(reader->verify().ok()) << at;
      std::filesystem::remove(directory.path() / summary.file);
    }
  }
}

TEST(DiskFileTest, AnErrorOfAnyWriteFailsTheSaveAndLeavesNoFile) {
  TempDirectory directory;
  const bool direct = takes_direct_writes(directory.path());  // without, no ring is asked
  ASSERT_TRUE(store_uuid(directory.path()).ok());
  const std::vector<OwnedSlice> slices = slices_of(20'971'523);
  int64_t at = 1;
  for (;; ++at) {
    FaultyDisk disk({Fault::Kind::kError, at});
    const auto summary =
        write_segment(directory.path(), kIdentity, sources_of(slices), *disk.files);
    EXPECT_EQ(disk.unreturned, 0u) << "memory of a write under way was given back";
    if (disk.write_count < at) {
      EXPECT_TRUE(summary.ok());
      break;
    }
    ASSERT_FALSE(summary.ok());
    EXPECT_NE(summary.status().message().find("Input/output error"), std::string::npos);
    EXPECT_EQ(*file_names(directory.path()), std::vector<std::string>{"STORE"});
  }
  EXPECT_EQ(at > 5, direct);
}

TEST(DiskFileTest, AFileMayOutliveTheDiskThatMadeIt) {
  TempDirectory directory;
  const bool direct = takes_direct_writes(directory.path());
  FaultyDisk disk;
  auto file = disk.files->create(directory.path() / "file");
  ASSERT_TRUE(file.ok());
  disk.files.reset();
  alignas(kDirectAlignment) static const std::byte page[kDirectAlignment] = {};
  ASSERT_TRUE((*file)->start_write(0, page).ok());
  ASSERT_TRUE((*file)->finish_write().ok());
  EXPECT_EQ(disk.write_count, direct ? 1 : 0);
}

TEST(DiskFileTest, SyncsOfFilesAndDirectoriesReachTheKernel) {
  TempDirectory directory;
  auto file = real_file_system().create(directory.path() / "file");
  ASSERT_TRUE(file.ok());
  ASSERT_TRUE((*file)->write_at(0, as_bytes("text")).ok());
  file_syncs = directory_syncs = 0;
  EXPECT_TRUE((*file)->sync().ok());
  EXPECT_EQ(file_syncs, 1);
  EXPECT_TRUE(real_file_system().sync_directory(directory.path()).ok());
  EXPECT_EQ(directory_syncs, 1);
}

TEST(DiskFileTest, ANameThatIsTakenIsNeverWrittenTo) {
  TempDirectory directory;
  const Path path = directory.path() / "file";
  replace_file(path, "what is there");
  EXPECT_EQ(real_file_system().create(path).status().code(), Code::kAlreadyExists);
  EXPECT_EQ(file_text(path), "what is there");
}

TEST(DiskFileTest, AFileThatIsGivenUpWaitsForItsWrites) {
  TempDirectory directory;
  FaultyDisk disk;
  const auto buffers = DiskBuffers::make();
  ASSERT_TRUE(buffers.ok());
  {
    auto file = disk.files->create(directory.path() / "file");
    ASSERT_TRUE(file.ok());
    ASSERT_TRUE((*file)->start_write(0, (*buffers)[0]).ok());
    ASSERT_TRUE((*file)->start_write(kDiskBufferBytes, (*buffers)[1]).ok());
  }
  EXPECT_EQ(disk.unreturned, 0u);
}

// Ends a file's writes only when asked to, and notices bytes that changed before.
class SlowFile : public WritableFile {
 public:
  explicit SlowFile(std::unique_ptr<WritableFile> file, size_t* most)
      : file_(std::move(file)), most_(most) {}
  Status reserve(uint64_t bytes) override { return file_->reserve(bytes); }
  Status write_at(uint64_t offset, Bytes bytes) override {
    EXPECT_TRUE(started_.empty());
    return file_->write_at(offset, bytes);
  }
  Status start_write(uint64_t offset, Bytes bytes) override {
    started_.push_back({offset, bytes, {bytes.begin(), bytes.end()}});
    *most_ = std::max(*most_, started_.size());
    return {};
  }
  Status finish_write() override {
    const Started write = std::move(started_.front());
    started_.pop_front();
    EXPECT_TRUE(std::equal(write.bytes.begin(), write.bytes.end(), write.copy.begin()))
        << "a buffer was filled again before it was written";
    return file_->write_at(write.offset, write.bytes);
  }
  Status sync() override {
    EXPECT_TRUE(started_.empty());
    return file_->sync();
  }
  Status close() override { return file_->close(); }

 private:
  struct Started {
    uint64_t offset;
    Bytes bytes;
    std::vector<std::byte> copy;
  };
  std::unique_ptr<WritableFile> file_;
  size_t* const most_;
  std::deque<Started> started_;
};

class SlowDisk : public RealFiles {
 public:
  Result<std::unique_ptr<WritableFile>> create(const Path& path) override {
    PENSTOCK_TRY_ASSIGN(auto file, real_file_system().create(path));
    return std::unique_ptr<WritableFile>(std::make_unique<SlowFile>(std::move(file), &most));
  }
  size_t most = 0;  // writes under way at a time
};

TEST(DiskBuffersTest, ASlowDiskHoldsTheSaveUpInsteadOfTakingMoreMemory) {
  TempDirectory directory;
  const std::vector<OwnedSlice> slices = slices_of(20'971'523);
  for (const size_t count : {2, 3}) {
    SlowDisk disk;
    const auto buffers = DiskBuffers::make(count * kDiskBufferBytes + 5);
    ASSERT_TRUE(buffers.ok());
    EXPECT_EQ(buffers->byte_count(), count * kDiskBufferBytes);
    const auto summary =
        write_segment(directory.path(), kIdentity, sources_of(slices), *buffers, disk);
    ASSERT_TRUE(summary.ok()) << summary.status().to_string();
    EXPECT_EQ(disk.most, count);
    const auto reader = SegmentReader::open(directory.path() / summary->file);
    ASSERT_TRUE(reader.ok());
    EXPECT_TRUE(reader->verify().ok());
  }
}

TEST(DiskBuffersTest, ABudgetBelowTwoBuffersIsRefused) {
  const auto refused = DiskBuffers::make(2 * kDiskBufferBytes - 1);
  ASSERT_FALSE(refused.ok());
  EXPECT_EQ(refused.status().code(), Code::kInvalidArgument);
  EXPECT_EQ(DiskBuffers::make(100 * kDiskBufferBytes)->count(), kStartedWritesMax);
}

// Lets no io_uring be made in this process from now on, as container runtimes do.
void forbid_io_uring() {
  sock_filter code[] = {BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(seccomp_data, nr)),
                        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, __NR_io_uring_setup, 0, 1),
                        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | EPERM),
                        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW)};
  const sock_fprog program = {std::size(code), code};
  PENSTOCK_CHECK(::prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0, errno);
  PENSTOCK_CHECK(::prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program) == 0, errno);
}

TEST(DiskRingTest, WhereIoUringIsForbiddenSavesGoOnWithoutIt) {
  TempDirectory directory;
  const auto save_without = [&] {
    forbid_io_uring();
    const bool refused = make_disk_ring(4).status().code() == Code::kUnavailable;
    const auto summary =
        write_segment(directory.path(), kIdentity, sources_of(slices_of(9'000'000)));
    if (!refused || !summary.ok()) ::_exit(1);
    const auto reader = SegmentReader::open(directory.path() / summary->file);
    ::_exit(reader.ok() && reader->verify().ok() ? 0 : 2);
  };
  EXPECT_EXIT(save_without(), ::testing::ExitedWithCode(0), "");
}

}  // namespace
}  // namespace penstock
