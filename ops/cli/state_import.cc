#include "ops/cli/state_import.h"

#include <fmt/format.h>

#include <algorithm>

#include "checkpoint/segment_writer.h"
#include "checkpoint/state_files.h"
#include "worker/data/mapped_file.h"

namespace penstock {

namespace {

// One file as one segment.
Result<SegmentSummary> import_file(const SafetensorsFile& file, const Path& directory,
                                   const SegmentIdentity& identity) {
  PENSTOCK_TRY_ASSIGN(const MappedFile mapped, MappedFile::open(file.path()));
  const Bytes data = mapped.bytes().subspan(file.data_offset());
  std::vector<SliceSource> sources;
  for (const SafetensorsEntry& entry : file.header().tensors) {
    sources.push_back({whole_tensor(entry.name, entry.dtype, entry.shape),
                       data.subspan(entry.begin, entry.byte_count())});
  }
  return write_segment(directory, identity, sources);
}

// As the manifest of these segments will have it.
std::string digest_of(const std::vector<SegmentSummary>& segments) {
  Manifest manifest;
  for (const SegmentSummary& segment : segments) {
    for (const SegmentSlice& entry : segment.slices) {
      const TensorSlice& slice = entry.slice;
      manifest.tensors.push_back(
          {slice.name, slice.dtype, slice.shape, {{0, slice.box, entry.digest}}});
    }
  }
  std::sort(manifest.tensors.begin(), manifest.tensors.end(),
            [](const auto& a, const auto& b) { return a.name < b.name; });
  return state_digest(manifest);
}

Result<CheckpointInfo> write_store(const StateFolder& state, const Path& directory, JobId job) {
  PENSTOCK_TRY_ASSIGN(CheckpointStore store, CheckpointStore::open(directory, job, nullptr));
  CommitRequest commit{.epoch = Epoch{1},
                       .step = state.step,
                       .created_at = wall_now(),
                       .spec_json = state.spec_json,
                       .layout = state.layout,
                       .segments = {}};
  std::vector<SegmentSummary> segments;
  for (const SafetensorsFile& file : state.files) {
    const Rank rank{static_cast<int32_t>(segments.size())};
    PENSTOCK_TRY_ASSIGN(SegmentSummary segment,
                        import_file(file, directory, {job, commit.epoch, rank, state.step}));
    commit.segments.push_back({segment.file, rank, segment.byte_count, segment.footer_digest});
    segments.push_back(std::move(segment));
  }
  const std::string digest = digest_of(segments);
  if (!state.digest.empty() && digest != state.digest) {
    return data_loss(
        fmt::format("the tensors in {} are not those that were exported: their digest "
                    "is {}, not {}",
                    state.files.front().path().parent_path().string(), digest, state.digest));
  }
  PENSTOCK_TRY_ASSIGN(const CommitReport report, store.commit(commit));
  return report.info;
}

}  // namespace

Result<CheckpointInfo> import_state(const Path& folder, const Path& directory,
                                    std::optional<JobId> job) {
  PENSTOCK_TRY_ASSIGN(const StateFolder state, open_state_folder(folder));
  std::error_code error;
  // Not even a store whose STORE file was lost: what fails below is removed, with all beside it.
  const bool there = std::filesystem::exists(std::filesystem::symlink_status(directory, error));
  if (there && !std::filesystem::is_directory(directory, error)) {
    return already_exists(directory.string() + " is no directory; name another");
  }
  if (there && !std::filesystem::is_empty(directory, error)) {
    if (error) return errno_status(error.value(), "read " + directory.string());
    return already_exists(directory.string() + " is not empty; name a directory of its own");
  }
  const JobId owner = job.value_or(state.job);
  Result<CheckpointInfo> info = write_store(state, directory, owner);
  if (info.ok()) return info;
  // Nothing stays of an import that failed.
  const Status removed = remove_store(directory, owner);
  if (removed.ok()) return info.status();
  return info.status().with_context("what it wrote stays, because " + removed.message());
}

}  // namespace penstock
