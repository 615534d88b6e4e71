#include "tests/checkpoint/support.h"

#include <fcntl.h>
#include <stdlib.h>
#include <unistd.h>

#include <fstream>

namespace penstock::checkpoint_test {

Path memory_directory() {
  const char* memory = "/dev/shm";
  return ::access(memory, W_OK) == 0 ? Path(memory) : std::filesystem::temp_directory_path();
}

TempDirectory::TempDirectory(const Path& parent) {
  std::string name = (parent / "penstock-test-XXXXXX").string();
  PENSTOCK_CHECK(::mkdtemp(name.data()) != nullptr, name);
  path_ = name;
}

TempDirectory::~TempDirectory() {
  std::error_code error;
  std::filesystem::remove_all(path_, error);
}

std::vector<std::byte> known_bytes(const TensorSlice& slice, uint64_t version) {
  const uint64_t element_bytes = dtype_bytes(slice.dtype);
  const uint64_t stream = digest_of(as_bytes(slice.name)).low ^ version;
  const auto strides = dense_strides(slice.shape);
  std::vector<std::byte> bytes(byte_count(slice));
  std::vector<int64_t> index(slice.shape.size(), 0);
  for (uint64_t offset = 0; offset < bytes.size(); offset += element_bytes) {
    int64_t position = 0;
    for (size_t d = 0; d < index.size(); ++d) {
      position += (slice.box.offset[d] + index[d]) * strides[d];
    }
    const uint64_t value = (stream + position) * 0x9e3779b97f4a7c15u ^ (stream >> 7);
    std::memcpy(bytes.data() + offset, &value, element_bytes);
    for (size_t d = index.size(); d-- > 0;) {
      if (++index[d] < slice.box.size[d]) break;
      index[d] = 0;
    }
  }
  return bytes;
}

OwnedSlice known_slice(const std::string& name, DType dtype, std::vector<int64_t> shape, Box box,
                       uint64_t version) {
  OwnedSlice owned{{name, dtype, std::move(shape), std::move(box)}, {}};
  owned.bytes = known_bytes(owned.slice, version);
  return owned;
}

std::vector<SliceSource> sources_of(const std::vector<OwnedSlice>& slices) {
  std::vector<SliceSource> sources;
  for (const OwnedSlice& owned : slices) sources.push_back({owned.slice, owned.bytes});
  return sources;
}

SegmentSummary save_segment(const Path& directory, const SegmentIdentity& identity,
                            const std::vector<OwnedSlice>& slices, FileSystem& files) {
  Result<SegmentSummary> summary = write_segment(directory, identity, sources_of(slices), files);
  EXPECT_TRUE(summary.ok()) << summary.status().to_string();
  return *summary;
}

CommitSegment commit_segment(const SegmentSummary& summary) {
  return {summary.file, summary.rank, summary.byte_count, summary.footer_digest};
}

std::vector<TensorSlice> model_tensors() {
  return {whole_tensor("embed", DType::kF32, {300, 64}), whole_tensor("bias", DType::kBf16, {77}),
          whole_tensor("norm", DType::kF32, {64}), whole_tensor("state|step", DType::kI64, {}),
          whole_tensor("empty", DType::kF32, {0, 8})};
}

std::vector<OwnedSlice> model_slices(int rank, uint64_t version) {
  const auto whole = [&](const TensorSlice& t) {
    return known_slice(t.name, t.dtype, t.shape, t.box, version);
  };
  const std::vector<TensorSlice> tensors = model_tensors();
  if (rank == 0) {
    return {known_slice("embed", DType::kF32, {300, 64}, {{0, 0}, {200, 64}}, version),
            whole(tensors[1]), whole(tensors[3])};
  }
  return {known_slice("embed", DType::kF32, {300, 64}, {{200, 0}, {100, 64}}, version),
          whole(tensors[2]), whole(tensors[4])};
}

Result<CommitRequest> save_model(const Path& directory, JobId job, Epoch epoch, int64_t step,
                                 uint64_t version, FileSystem& files) {
  CommitRequest request;
  request.epoch = epoch;
  request.step = step;
  request.created_at = {1'790'000'000'000'000'000 + step};
  request.spec_json = R"({"name":"test"})";
  request.layout = "pipeline 2";
  for (int rank = 0; rank < kModelRanks; ++rank) {
    const std::vector<OwnedSlice> slices = model_slices(rank, version);
    PENSTOCK_TRY_ASSIGN(
        const SegmentSummary summary,
        write_segment(directory, {job, epoch, Rank{rank}, step}, sources_of(slices), files));
    request.segments.push_back(commit_segment(summary));
  }
  return request;
}

CheckpointInfo commit_model(CheckpointStore& store, JobId job, Epoch epoch, int64_t step,
                            uint64_t version) {
  const auto request = save_model(store.directory(), job, epoch, step, version);
  EXPECT_TRUE(request.ok()) << request.status().to_string();
  const auto report = store.commit(*request);
  EXPECT_TRUE(report.ok()) << report.status().to_string();
  EXPECT_TRUE(report->index.ok()) << report->index.to_string();
  return report->info;
}

Status load_model(const Path& directory, const std::string& manifest_file, uint64_t version) {
  PENSTOCK_TRY_ASSIGN(const StoredManifest stored, read_manifest(directory / manifest_file));
  for (const TensorSlice& tensor : model_tensors()) {
    std::vector<std::byte> bytes(byte_count(tensor));
    const LoadTarget target{tensor, bytes, {}};
    PENSTOCK_TRY(load_slices(directory, stored.manifest, {&target, 1}).status());
    if (bytes != known_bytes(tensor, version)) {
      return internal_error("tensor " + tensor.name + " was loaded with wrong bytes");
    }
  }
  return {};
}

void flip_byte(const Path& path, uint64_t offset, uint8_t bits) {
  const auto file = open_file(path, O_RDWR);
  ASSERT_TRUE(file.ok()) << file.status().to_string();
  std::byte byte{};
  ASSERT_TRUE(read_at(file->get(), path, offset, {&byte, 1}).ok());
  byte ^= std::byte{bits};
  ASSERT_TRUE(write_at(file->get(), path, offset, {&byte, 1}).ok());
}

uint64_t size_of_file(const Path& path) {
  return std::filesystem::file_size(path);
}

std::string file_text(const Path& path) {
  const auto text = read_file(path, 1 << 30);
  EXPECT_TRUE(text.ok()) << text.status().to_string();
  return *text;
}

void overwrite(const Path& path, uint64_t offset, std::string_view bytes) {
  const auto file = open_file(path, O_RDWR);
  ASSERT_TRUE(file.ok()) << file.status().to_string();
  ASSERT_TRUE(write_at(file->get(), path, offset, as_bytes(bytes)).ok());
}

void replace_file(const Path& path, std::string_view text) {
  std::ofstream(path, std::ios::binary | std::ios::trunc) << text;
}

}  // namespace penstock::checkpoint_test
