#include "checkpoint/state_files.h"

#include <fcntl.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <set>
#include <tuple>

#include "checkpoint/torch_files.h"
#include "tests/checkpoint/support.h"

namespace penstock {
namespace {

// The files that this process wanted out of the page cache as a whole.
std::set<Path>& dropped() {
  static std::set<Path> files;
  return files;
}

}  // namespace
}  // namespace penstock

// In the place of the C library's.
extern "C" int posix_fadvise(int fd, off_t offset, off_t size, int advice) noexcept {
  using namespace penstock;
  if (advice == POSIX_FADV_DONTNEED && offset == 0 && size == 0) {
    dropped().insert(std::filesystem::read_symlink("/proc/self/fd/" + std::to_string(fd)));
  }
  return static_cast<int>(::syscall(SYS_fadvise64, fd, offset, size, advice));
}

namespace penstock {
namespace {

using namespace checkpoint_test;

constexpr uint64_t kEverything = uint64_t{1} << 50;

class StateFilesTest : public ModelStoreTest {
 protected:
  void SetUp() override {
    ModelStoreTest::SetUp();
    manifest_ = read_manifest(path() / commit(20).manifest_file)->manifest;
    std::filesystem::create_directory(folder());
  }
  Path folder() const { return files_.path() / "files"; }
  StateFiles write(StateFormat format, uint64_t file_bytes_max = kEverything) const {
    const auto written = write_state_files({path(), manifest_}, format, file_bytes_max, folder());
    EXPECT_TRUE(written.ok()) << written.status().to_string();
    return written.ok() ? *written : StateFiles{};
  }

  TempDirectory files_;
  Manifest manifest_;
};

TEST_F(StateFilesTest, EveryTensorComesBackWithItsNameTypeShapeAndBytes) {
  const StateFiles report = write(StateFormat::kSafetensors);
  EXPECT_EQ(report.tensor_count, model_tensors().size());
  EXPECT_EQ(report.file_count, 1u);
  EXPECT_EQ(report.byte_count, manifest_.payload_bytes());
  const auto state = open_state_folder(folder());
  ASSERT_TRUE(state.ok()) << state.status().to_string();
  EXPECT_EQ(state->job, kJob);
  EXPECT_EQ(state->step, 20);
  EXPECT_EQ(state->layout, manifest_.layout);
  EXPECT_EQ(state->spec_json, manifest_.spec_json);
  EXPECT_EQ(state->digest, state_digest(manifest_));
  std::set<std::string> names;
  for (const SafetensorsEntry& entry : state->files[0].header().tensors) {
    names.insert(entry.name);
    std::vector<std::byte> bytes(entry.byte_count());
    ASSERT_TRUE(state->files[0].read(entry, 0, bytes).ok());
    EXPECT_EQ(bytes, known_bytes(whole_tensor(entry.name, entry.dtype, entry.shape), 20))
        << entry.name;
  }
  for (const TensorSlice& tensor : model_tensors()) EXPECT_TRUE(names.contains(tensor.name));
}

TEST_F(StateFilesTest, SmallFilesHoldTheSameAndOneMissingOrStrangeOneIsNoticed) {
  const StateFiles report = write(StateFormat::kSafetensors, 1);
  EXPECT_EQ(report.file_count, model_tensors().size());
  auto state = open_state_folder(folder());
  ASSERT_TRUE(state.ok()) << state.status().to_string();
  EXPECT_EQ(state->files.size(), report.file_count);
  std::filesystem::remove(state->files.back().path());
  state = open_state_folder(folder());
  EXPECT_EQ(state.status().code(), Code::kDataLoss);
  EXPECT_NE(state.status().message().find("files of a"), std::string::npos);
}

TEST_F(StateFilesTest, FoldersThatAreNoExportedStateAreRefused) {
  EXPECT_EQ(open_state_folder(files_.path() / "none").status().code(), Code::kNotFound);
  EXPECT_EQ(open_state_folder(folder()).status().code(), Code::kNotFound) << "empty";
  const SafetensorsHeader header =
      lay_out_safetensors({{.name = "a", .dtype = DType::kF32, .shape = {1}}});
  replace_file(folder() / "model.safetensors", encode_safetensors_header(header) + "abcd");
  const auto state = open_state_folder(folder());
  EXPECT_EQ(state.status().code(), Code::kDataLoss);
  EXPECT_NE(state.status().message().find("no exported state"), std::string::npos);
}

TEST_F(StateFilesTest, WhatIsReadBackIsDroppedFromThePageCacheFirst) {
  for (const StateFormat format : {StateFormat::kSafetensors, StateFormat::kDcp}) {
    dropped().clear();
    const StateFiles report = write(format, 1);
    EXPECT_EQ(dropped().size(), report.file_count);
    for (const Path& path : dropped()) EXPECT_EQ(path.parent_path(), folder());
  }
}

TEST_F(StateFilesTest, EveryJobNumberComesBackAndWhatIsNoneIsRefused) {
  write(StateFormat::kSafetensors);
  const Path file = folder() / "state.safetensors";
  const auto written = SafetensorsFile::open(file);
  ASSERT_TRUE(written.ok()) << written.status().to_string();
  const std::string data = file_text(file).substr(written->data_offset());
  SafetensorsHeader header = written->header();
  const auto read = [&](const char* job) {
    header.metadata["penstock.job"] = job;
    replace_file(file, encode_safetensors_header(header) + data);
    return open_state_folder(folder());
  };
  const auto highest = read("18446744073709551615");
  ASSERT_TRUE(highest.ok()) << highest.status().to_string();
  EXPECT_EQ(highest->job, JobId{UINT64_MAX});
  for (const char* job : {"0", "-1", "18446744073709551616", "7x", ""}) {
    const Status refused = read(job).status();
    EXPECT_EQ(refused.code(), Code::kDataLoss) << job;
    EXPECT_NE(refused.message().find("penstock.job"), std::string::npos) << refused.message();
  }
}

TEST_F(StateFilesTest, ADamagedCheckpointIsNotExported) {
  flip_byte(path() / manifest_.segments[0].file, kSegmentHeaderBytes + 3);
  const auto written =
      write_state_files({path(), manifest_}, StateFormat::kSafetensors, kEverything, folder());
  EXPECT_EQ(written.status().code(), Code::kDataLoss);
}

TEST_F(StateFilesTest, ADistributedCheckpointHasEachTensorBehindItsHeader) {
  const StateFiles report = write(StateFormat::kDcp);
  EXPECT_EQ(report.file_count, 1u);
  const std::string data = file_text(folder() / "__0_0.distcp");
  size_t at = 0;
  for (const ManifestTensor& tensor : manifest_.tensors) {
    const std::string header = torch_save_header(tensor.dtype, tensor.shape);
    ASSERT_EQ(data.substr(at, header.size()), header) << tensor.name;
    const auto bytes = known_bytes(whole_tensor(tensor.name, tensor.dtype, tensor.shape), 20);
    EXPECT_EQ(data.substr(at + header.size(), bytes.size()),
              std::string(reinterpret_cast<const char*>(bytes.data()), bytes.size()));
    at += header.size() + bytes.size();
  }
  EXPECT_EQ(at, data.size());
  EXPECT_EQ(file_text(folder() / ".metadata").substr(0, 2), "\x80\x02");
}

TEST(StateDigestTest, ItNamesNamesTypesShapesAndBits) {
  Manifest manifest;
  manifest.tensors = {{"a", DType::kF32, {2}, {{0, {{0}, {2}}, {1, 2}}}}};
  const std::string digest = state_digest(manifest);
  std::set<std::string> all = {digest};
  for (int change = 0; change < 4; ++change) {
    Manifest other = manifest;
    if (change == 0) other.tensors[0].name = "b";
    if (change == 1) other.tensors[0].dtype = DType::kI32;
    if (change == 2) other.tensors[0].shape = {1, 2};
    if (change == 3) other.tensors[0].pieces[0].digest = {1, 3};
    all.insert(state_digest(other));
  }
  EXPECT_EQ(all.size(), 5u);
  manifest.tensors[0].pieces = {{0, {{0}, {1}}, {1, 0}}, {0, {{1}, {1}}, {0, 2}}};
  EXPECT_EQ(state_digest(manifest), digest) << "how the tensor is cut does not matter";
}

TEST(TorchFilesTest, TypesWithoutAStorageOfTheirOwnLieInOneOfElementsAsLarge) {
  const std::vector<std::tuple<DType, std::string, std::string>> types = {
      {DType::kF8E4m3, "ByteStorage", "float8_e4m3fn"},
      {DType::kF8E5m2, "ByteStorage", "float8_e5m2"},
      {DType::kU16, "ShortStorage", "uint16"},
      {DType::kU32, "IntStorage", "uint32"},
      {DType::kU64, "LongStorage", "uint64"}};
  for (const auto& [dtype, storage, name] : types) {
    const std::string header = torch_save_header(dtype, {2});
    for (const std::string& global :
         {std::string("torch._utils\n_rebuild_tensor_v3"), "torch\n" + storage, "torch\n" + name}) {
      EXPECT_NE(header.find("c" + global + "\n"), std::string::npos) << name << " " << global;
    }
  }
}

// The bytes that PyTorch 2.15 was seen to load (tests/bench/dcp_load.py): whoever changes them runs
// that again.
TEST(TorchFilesTest, TheBytesAreThoseThatPyTorchWasSeenToLoad) {
  const std::string header = torch_save_header(DType::kBf16, {2, 3});
  EXPECT_EQ(header.substr(0, 15), "\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19.");
  EXPECT_NE(header.find("ctorch\nBFloat16Storage\n"), std::string::npos);
  EXPECT_EQ(header.substr(header.size() - 8), std::string("\x06\0\0\0\0\0\0\0", 8));
  EXPECT_EQ(to_hex(digest_of(as_bytes(header))), "a7c4cd0569cf331ead7be2577c9eaecf");
  EXPECT_EQ(to_hex(digest_of(as_bytes(torch_save_header(DType::kF8E4m3, {2, 3})))),
            "389a8e8c1750b241f816156533fcd6de");
  const std::string metadata =
      dcp_metadata({{"state|step", DType::kI64, {}, "__0_0.distcp", 0, 100},
                    {"w|exp_avg", DType::kBf16, {2, 3}, "__0_1.distcp", 1ull << 33, 400}});
  EXPECT_EQ(to_hex(digest_of(as_bytes(metadata))), "c587e6c49391b1b2c04a5fa8c2657711");
}

}  // namespace
}  // namespace penstock
