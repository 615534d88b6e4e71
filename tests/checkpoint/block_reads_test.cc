#include "checkpoint/block_reads.h"

#include <unistd.h>

#include <cerrno>

#include "checkpoint/disk_buffers.h"
#include "tests/checkpoint/ring_fault.h"
#include "tests/checkpoint/support.h"

namespace penstock {
namespace {

using namespace checkpoint_test;

// Reads when it is waited for, newest first, and fails one as told. Memory of reads under way must
// not overlap.
class FaultyRing : public DiskRing {
 public:
  explicit FaultyRing(Fault fault = {}, int64_t* total = nullptr) : fault_(fault), total_(total) {}
  ~FaultyRing() override { EXPECT_TRUE(under_way_.empty()) << "memory is still read into"; }

  Status submit_write(int, uint64_t, Bytes, uint64_t) override {
    return internal_error("nothing is written here");
  }
  Status submit_read(int fd, uint64_t offset, MutableBytes into, uint64_t tag) override {
    const bool faulty = ++count == fault_.at;
    if (total_ != nullptr) ++*total_;
    if (faulty && fault_.kind == Fault::Kind::kRefused) return unavailable("no room in the ring");
    for (const Read& other : under_way_) {
      EXPECT_TRUE(into.data() + into.size() <= other.into.data() ||
                  other.into.data() + other.into.size() <= into.data());
    }
    under_way_.push_back({fd, offset, into, tag, faulty});
    most = std::max(most, under_way_.size());
    return {};
  }
  Done wait() override {
    const Read read = under_way_.back();
    under_way_.pop_back();
    if (read.faulty && fault_.kind == Fault::Kind::kError) return {read.tag, -EIO};
    if (read.faulty && fault_.kind == Fault::Kind::kNotTaken) return {read.tag, -EINVAL};
    int64_t result =
        ::pread(read.fd, read.into.data(), read.into.size(), static_cast<off_t>(read.offset));
    if (read.faulty && fault_.kind == Fault::Kind::kShort) {
      result /= 2;
      std::memset(read.into.data() + result, 0xee, read.into.size() - result);
    }
    return {read.tag, result};
  }

  int64_t count = 0;
  size_t most = 0;  // under way at a time

 private:
  struct Read {
    int fd;
    uint64_t offset;
    MutableBytes into;
    uint64_t tag;
    bool faulty;
  };
  const Fault fault_;
  int64_t* const total_;  // reads of all rings
  std::vector<Read> under_way_;
};

// A segment of one tensor of bytes, in `directory`.
class BlockReadsTest : public ::testing::Test {
 protected:
  static constexpr int64_t kBytes = 5'000'003;

  void SetUp() override {
    slices_ = {known_slice("w", DType::kU8, {kBytes}, {{0}, {kBytes}})};
    path_ = directory_.path() / save_segment(directory_.path(), kIdentity, slices_).file;
  }
  SegmentReader open() {
    auto reader = SegmentReader::open(path_);
    PENSTOCK_CHECK(reader.ok(), reader.status().to_string());
    return *std::move(reader);
  }
  // Reads the whole segment, `blocks` at a time; every third read through the page cache.
  Status read_all(const SegmentReader& reader, uint64_t blocks, DiskRing* ring) {
    const auto buffers = DiskBuffers::make(2 * kDiskBufferBytes);
    PENSTOCK_TRY(buffers.status());
    BlockReads reads(reader, buffers->memory().first(kMemory), ring);
    std::vector<std::byte> data;
    std::deque<std::pair<uint64_t, uint64_t>> wanted;
    for (uint64_t first = 0; first < reader.block_count(); first += blocks) {
      wanted.emplace_back(first, std::min(first + blocks, reader.block_count()));
    }
    size_t started = 0;
    for (size_t i = 0; i < wanted.size(); ++i) {
      while (started < wanted.size() &&
             reads.start(wanted[started].first, wanted[started].second, started % 3 == 2)) {
        ++started;
      }
      PENSTOCK_TRY_ASSIGN(const Bytes bytes, reads.finish());
      data.insert(data.end(), bytes.begin(), bytes.end());
    }
    const auto& saved = slices_[0].bytes;
    const size_t at = reader.slices()[0].file_offset - kSegmentHeaderBytes;
    EXPECT_EQ(data.size(), reader.data_end() - kSegmentHeaderBytes);
    EXPECT_TRUE(std::equal(saved.begin(), saved.end(), data.begin() + at));
    return {};
  }

  static constexpr uint64_t kMemory = 1 << 20;
  TempDirectory directory_;
  std::vector<OwnedSlice> slices_;
  Path path_;
};

TEST_F(BlockReadsTest, EveryWayFromTheDiskReadsTheSameBytesInOrder) {
  const SegmentReader reader = open();
  const auto kernel = make_disk_ring(kStartedReadsMax);
  for (const uint64_t blocks : {1, 2, 7, 33, 64}) {
    FaultyRing reordering;
    EXPECT_TRUE(read_all(reader, blocks, &reordering).ok());
    EXPECT_TRUE(read_all(reader, blocks, nullptr).ok());
    if (kernel.ok()) {
      EXPECT_TRUE(read_all(reader, blocks, kernel->get()).ok());
    }
    const int64_t reads = (reader.block_count() + blocks - 1) / blocks;
    const int64_t past_the_cache = reader.open_direct().valid() ? reads - reads / 3 : 0;
    EXPECT_EQ(reordering.count, past_the_cache) << "the others go through the page cache";
    EXPECT_LE(reordering.most, std::min(kStartedReadsMax, kMemory / (blocks * kBlockBytes)));
  }
}

TEST_F(BlockReadsTest, AReadThatFailsIsCutShortOrNotTakenIsDoneThePlainWay) {
  const SegmentReader reader = open();
  const bool direct = reader.open_direct().valid();  // without, no ring is asked
  for (const Fault::Kind kind :
       {Fault::Kind::kError, Fault::Kind::kNotTaken, Fault::Kind::kShort, Fault::Kind::kRefused}) {
    for (int64_t at = 1; at <= 8; ++at) {
      FaultyRing ring({kind, at});
      EXPECT_TRUE(read_all(reader, 16, &ring).ok());
      EXPECT_EQ(ring.count >= at, direct);
    }
  }
}

TEST_F(BlockReadsTest, AFlippedBitIsNoticedByEveryWayAndWhatIsUnderWayIsWaitedFor) {
  const SegmentReader reader = open();
  const uint64_t at = reader.slices()[0].file_offset;
  for (const uint64_t offset : {at, at + kBytes / 2, at + kBytes - 1}) {
    flip_byte(path_, offset);
    FaultyRing reordering;  // checks in its destructor
    for (DiskRing* ring : {static_cast<DiskRing*>(&reordering), static_cast<DiskRing*>(nullptr)}) {
      const Status status = read_all(reader, 5, ring);
      EXPECT_EQ(status.code(), Code::kDataLoss);
      EXPECT_NE(status.message().find("tensor w"), std::string::npos) << status.message();
      EXPECT_NE(status.message().find(path_.string()), std::string::npos) << status.message();
    }
    flip_byte(path_, offset);
  }
}

TEST_F(BlockReadsTest, AFileThatEndsEarlierThanItDidIsDamage) {
  const SegmentReader reader = open();
  std::filesystem::resize_file(path_, reader.data_end() / 2 / 4096 * 4096);
  FaultyRing reordering;
  EXPECT_EQ(read_all(reader, 16, &reordering).code(), Code::kDataLoss);
  EXPECT_EQ(read_all(reader, 16, nullptr).code(), Code::kDataLoss);
}

TEST_F(BlockReadsTest, SharedTargetsAreLoadedThroughThePageCacheAndAloneOnesPastIt) {
  auto store = CheckpointStore::open(directory_.path(), kJob, nullptr);
  ASSERT_TRUE(store.ok()) << store.status().to_string();
  const CheckpointInfo info = commit_model(*store, kJob, Epoch{1}, 10, 1);
  const auto stored = read_manifest(directory_.path() / info.manifest_file);
  ASSERT_TRUE(stored.ok()) << stored.status().to_string();
  const bool taken = open().open_direct().valid();  // O_DIRECT, by this file system
  for (const bool shared : {false, true}) {
    for (const bool direct : {false, true}) {
      int64_t count = 0;
      const DiskOptions disk{
          .direct = direct, .make_ring = [&](unsigned) {
            return Result<std::unique_ptr<DiskRing>>(std::make_unique<FaultyRing>(Fault{}, &count));
          }};
      for (const TensorSlice& tensor : model_tensors()) {
        std::vector<std::byte> bytes(byte_count(tensor));
        const LoadTarget target{tensor, bytes, {}, shared};
        const auto report = load_slices(directory_.path(), stored->manifest, {&target, 1}, disk);
        ASSERT_TRUE(report.ok()) << report.status().to_string();
        EXPECT_EQ(bytes, known_bytes(tensor, 1));
        EXPECT_EQ(count > 0, taken && direct && !shared && report->read_count > 0) << tensor.name;
        count = 0;
      }
    }
  }
}

}  // namespace
}  // namespace penstock
