#include "checkpoint/store.h"

#include <fmt/format.h>

#include <algorithm>
#include <map>

#include "checkpoint/marks.h"
#include "checkpoint/removal.h"
#include "checkpoint/verify.h"
#include "comm/base/log.h"
#include "comm/base/version.h"

namespace penstock {
namespace {

constexpr std::string_view kStoreFile = "STORE";
constexpr std::string_view kStoreText = "penstock checkpoint store 1 ";

Result<Uuid> read_store_uuid(const Path& directory) {
  const Path path = directory / kStoreFile;
  PENSTOCK_TRY_ASSIGN(const std::string text, read_plain_file(path, 256));
  const std::string_view line = text;
  if (line.size() == kStoreText.size() + 33 && line.starts_with(kStoreText) &&
      line.back() == '\n') {
    const Result<Uuid> uuid = parse_uuid(line.substr(kStoreText.size(), 32));
    if (uuid.ok()) return *uuid;
  }
  return data_loss(path.string() +
                   " is damaged; remove it, it is written again from the manifests");
}

// Numbers of all manifest files, readable or not, ascending.
Result<std::vector<uint64_t>> manifest_numbers(const Path& directory) {
  PENSTOCK_TRY_ASSIGN(const std::vector<std::string> names, file_names(directory));
  std::vector<uint64_t> numbers;
  for (const std::string& name : names) {
    const Result<uint64_t> number = parse_manifest_file_name(name);
    if (number.ok()) numbers.push_back(*number);
  }
  std::sort(numbers.begin(), numbers.end());
  return numbers;
}

// The highest number any checkpoint here ever had, those that were set aside or removed
// without an index included; 0: none.
Result<uint64_t> highest_number(const Path& directory) {
  PENSTOCK_TRY_ASSIGN(const std::vector<std::string> names, file_names(directory));
  uint64_t highest = 0;
  for (const std::string& name : names) {
    Result<uint64_t> number = parse_manifest_file_name(name);
    if (!number.ok()) number = parse_set_aside_file_name(name);
    if (!number.ok()) number = parse_removed_file_name(name);
    if (number.ok()) highest = std::max(highest, *number);
  }
  return highest;
}

// Those that were set aside, as readers are told of them.
Result<std::vector<RefusedCheckpoint>> list_set_aside(const Path& directory) {
  PENSTOCK_TRY_ASSIGN(const std::vector<std::string> names, file_names(directory));
  std::vector<RefusedCheckpoint> listed;
  for (const std::string& name : names) {
    const Result<uint64_t> number = parse_set_aside_file_name(name);
    if (!number.ok()) continue;
    listed.push_back({*number, name,
                      data_loss(fmt::format("manifest {} was set aside because its checkpoint is "
                                            "damaged",
                                            (directory / name).string())),
                      /*set_aside=*/true});
  }
  return listed;
}

CheckpointInfo describe(const StoredManifest& stored) {
  const Manifest& manifest = stored.manifest;
  return {.job = manifest.job,
          .commit_seq = manifest.commit_seq,
          .step = manifest.step,
          .epoch = manifest.epoch,
          .manifest_file = manifest_file_name(manifest.commit_seq),
          .manifest_digest = stored.digest,
          .payload_bytes = manifest.payload_bytes(),
          .segment_count = static_cast<uint32_t>(manifest.segments.size()),
          .created_at = manifest.created_at};
}

// The first damage there is.
Status check_pieces(const Path& directory, const Manifest& manifest, bool read_data) {
  Status first;
  visit_damage(directory, manifest, read_data, [&](const CheckpointDamage& damage) {
    first = damage.status;
    return false;
  });
  return first;
}

// Reads the segments of a commit into the manifest's segment and tensor lists.
Status collect_segments(const Path& directory, const CommitRequest& request, Manifest& manifest) {
  for (const CommitSegment& segment : request.segments) {
    const auto name = parse_segment_file_name(segment.file);
    PENSTOCK_TRY(name.status());
    if (name->epoch != request.epoch || name->rank != segment.rank) {
      return invalid_argument(fmt::format("{} is not a segment of epoch {}, rank {}", segment.file,
                                          request.epoch, segment.rank));
    }
    manifest.segments.push_back(
        {segment.file, segment.rank, segment.byte_count, segment.footer_digest});
  }
  std::sort(manifest.segments.begin(), manifest.segments.end(),
            [](const auto& a, const auto& b) { return a.file < b.file; });
  std::map<std::string, ManifestTensor> tensors;
  for (size_t i = 0; i < manifest.segments.size(); ++i) {
    const ManifestSegment& segment = manifest.segments[i];
    if (i > 0 && manifest.segments[i - 1].file == segment.file) {
      return invalid_argument(segment.file + " is listed twice");
    }
    PENSTOCK_TRY_ASSIGN(const SegmentReader reader, open_listed(directory, manifest, segment));
    for (const SegmentSlice& entry : reader.slices()) {
      const TensorSlice& slice = entry.slice;
      ManifestTensor& tensor =
          tensors.try_emplace(slice.name, ManifestTensor{slice.name, slice.dtype, slice.shape, {}})
              .first->second;
      if (tensor.dtype != slice.dtype || tensor.shape != slice.shape) {
        return data_loss(
            fmt::format("tensor {}: rank {} ({}) saved another shape or element type "
                        "than the ranks before it",
                        slice.name, segment.rank, segment.file));
      }
      tensor.pieces.push_back({i, slice.box, entry.digest});
    }
  }
  for (auto& [name, tensor] : tensors) manifest.tensors.push_back(std::move(tensor));
  return {};
}

}  // namespace

Result<Uuid> store_uuid(const Path& directory, FileSystem& files) {
  Result<Uuid> existing = read_store_uuid(directory);
  if (existing.ok() || existing.status().code() != Code::kNotFound) return existing;
  // A lost STORE file is written again with the uuid its manifests carry.
  Uuid uuid = random_uuid();
  PENSTOCK_TRY_ASSIGN(const std::vector<uint64_t> numbers, manifest_numbers(directory));
  for (const uint64_t number : numbers) {
    const auto stored = read_manifest(directory / manifest_file_name(number));
    if (stored.ok()) uuid = stored->manifest.store;
  }
  const Path temporary = directory / fmt::format("{}.{}.tmp", kStoreFile, to_hex(random_uuid()));
  PENSTOCK_TRY(
      write_new_file(files, temporary, as_bytes(fmt::format("{}{}\n", kStoreText, to_hex(uuid)))));
  const Status renamed = files.rename_no_replace(temporary, directory / kStoreFile);
  if (renamed.code() == Code::kAlreadyExists) {  // another process was first: its uuid counts
    PENSTOCK_TRY(files.remove(temporary));
    return read_store_uuid(directory);
  }
  PENSTOCK_TRY(renamed);
  PENSTOCK_TRY(files.sync_directory(directory));
  return uuid;
}

Status check_store_file(const Path& directory) {
  const Status status = read_store_uuid(directory).status();
  return status.code() == Code::kNotFound ? Status() : status;  // written again when needed
}

Status restore_store_file(const Path& directory, FileSystem& files) {
  if (check_store_file(directory).code() != Code::kDataLoss) return check_store_file(directory);
  std::optional<Uuid> uuid;
  PENSTOCK_TRY_ASSIGN(const std::vector<uint64_t> numbers, manifest_numbers(directory));
  for (const uint64_t number : numbers) {
    const auto stored = read_manifest(directory / manifest_file_name(number));
    if (!stored.ok()) continue;
    if (uuid && *uuid != stored->manifest.store) {
      return failed_precondition("the manifests in " + directory.string() +
                                 " are of different stores; STORE stays as it is");
    }
    uuid = stored->manifest.store;
  }
  if (!uuid) {
    return failed_precondition("no manifest in " + directory.string() +
                               " says what STORE must hold; it stays as it is");
  }
  PENSTOCK_TRY(files.rename_no_replace(directory / kStoreFile, directory / "STORE.damaged"));
  return store_uuid(directory, files).status();
}

StoreListing list_checkpoints(const Path& directory, JobId job) {
  StoreListing listing;
  const Result<Uuid> uuid = read_store_uuid(directory);
  std::optional<StoredManifest> successor;
  const Result<std::vector<uint64_t>> numbers = manifest_numbers(directory);
  Result<std::vector<RefusedCheckpoint>> set_aside = list_set_aside(directory);
  listing.directory = numbers.ok() ? set_aside.status() : numbers.status();
  if (!listing.directory.ok()) return listing;
  listing.refused = *std::move(set_aside);
  for (auto number = numbers->rbegin(); number != numbers->rend(); ++number) {
    const std::string file = manifest_file_name(*number);
    const auto refuse = [&](Status why) {
      listing.refused.push_back({*number, file, std::move(why)});
    };
    Result<StoredManifest> stored = read_manifest(directory / file);
    if (!stored.ok()) {
      refuse(stored.status());
      continue;
    }
    const Manifest& manifest = stored->manifest;
    if (manifest.job != job) {
      refuse(data_loss(fmt::format("manifest {} is of job {}, not {}", (directory / file).string(),
                                   manifest.job, job)));
    } else if (uuid.ok() && manifest.store != *uuid) {
      refuse(data_loss(fmt::format("manifest {} belongs to store {}, this directory is store {}",
                                   (directory / file).string(), to_hex(manifest.store),
                                   to_hex(*uuid))));
    } else if (successor && successor->manifest.previous_commit_seq == *number &&
               successor->manifest.previous_digest != stored->digest) {
      refuse(data_loss(
          fmt::format("manifest {} is not the one commit {} was made after: digest {}, "
                      "{} wanted",
                      (directory / file).string(), successor->manifest.commit_seq,
                      to_hex(stored->digest), to_hex(successor->manifest.previous_digest))));
    } else {
      listing.checkpoints.push_back(describe(*stored));
      successor = *std::move(stored);
    }
  }
  std::reverse(listing.checkpoints.begin(), listing.checkpoints.end());
  return listing;
}

Status check_segments(const Path& directory, const Manifest& manifest) {
  return check_pieces(directory, manifest, /*read_data=*/false);
}

Status verify_checkpoint(const Path& directory, const Manifest& manifest) {
  return check_pieces(directory, manifest, /*read_data=*/true);
}

NewestWhole newest_whole(const Path& directory, JobId job) {
  NewestWhole newest;
  StoreListing listing = list_checkpoints(directory, job);
  newest.directory = listing.directory;
  for (auto info = listing.checkpoints.rbegin(); info != listing.checkpoints.rend(); ++info) {
    const Result<StoredManifest> stored = read_manifest(directory / info->manifest_file);
    const Status whole =
        stored.ok() ? check_segments(directory, stored->manifest) : stored.status();
    if (whole.ok()) {
      newest.checkpoint = *info;
      break;
    }
    listing.refused.push_back({info->commit_seq, info->manifest_file, whole});
  }
  for (RefusedCheckpoint& refused : listing.refused) {
    if (newest.checkpoint && refused.commit_seq < newest.checkpoint->commit_seq) continue;
    newest.refused.push_back(std::move(refused));
  }
  std::sort(newest.refused.begin(), newest.refused.end(),
            [](const auto& a, const auto& b) { return a.commit_seq > b.commit_seq; });
  return newest;
}

Result<FileDescriptor> lock_store(const Path& directory) {
  return take_lock(directory / "LOCK",
                   ": a coordinator that commits a checkpoint, or a tool that removes some; try "
                   "again in a moment");
}

Result<CheckpointStore> CheckpointStore::open(const Path& directory, JobId job,
                                              CheckpointIndex* index, FileSystem& files) {
  PENSTOCK_TRY(create_directories_durably(directory));
  CheckpointStore store;
  store.directory_ = directory;
  store.job_ = job;
  store.index_ = index;
  store.files_ = &files;
  PENSTOCK_TRY_ASSIGN(store.lock_, lock_store(directory));
  PENSTOCK_TRY_ASSIGN(store.uuid_, store_uuid(directory, files));
  // The crash that cut a removal short may have come before its index rows went. While they cannot
  // go, commits still can be made: retain() or the next open() goes on.
  PENSTOCK_TRY_ASSIGN(const std::vector<uint64_t> going, removal_in_progress(directory));
  if (const Status settled = store.settle_rows(going); settled.ok()) {
    PENSTOCK_TRY(finish_removal(directory, files));
  } else {
    log_warning("{}: a removal waits: {}", directory.string(), settled.message());
  }
  return store;
}

Result<CheckpointStore> CheckpointStore::open_when_free(const Path& directory, JobId job,
                                                        CheckpointIndex* index,
                                                        const std::function<bool()>& wait) {
  for (;;) {
    Result<CheckpointStore> store = open(directory, job, index);
    if (store.status().code() != Code::kFailedPrecondition || !wait()) return store;
  }
}

Result<Manifest> CheckpointStore::begin_manifest(const CommitRequest& request) const {
  Manifest manifest;
  manifest.store = uuid_;
  manifest.job = job_;
  manifest.epoch = request.epoch;
  manifest.step = request.step;
  manifest.created_at = request.created_at;
  manifest.spec_json = request.spec_json;
  manifest.spec_digest = digest_of(as_bytes(request.spec_json));
  manifest.layout = request.layout;
  manifest.build = kVersion;
  const StoreListing listing = list_checkpoints(directory_, job_);
  PENSTOCK_TRY(listing.directory);
  if (!listing.checkpoints.empty()) {
    const CheckpointInfo& previous = listing.checkpoints.back();
    if (previous.epoch > request.epoch) {
      return aborted(fmt::format("epoch {} was overtaken: epoch {} has committed step {} in {}",
                                 request.epoch, previous.epoch, previous.step,
                                 directory_.string()));
    }
    manifest.previous_commit_seq = previous.commit_seq;
    manifest.previous_digest = previous.manifest_digest;
  }
  // Above every number a file or the index has seen: none is given twice, even after losses.
  PENSTOCK_TRY_ASSIGN(const uint64_t highest_seen, highest_number(directory_));
  manifest.commit_seq = highest_seen + 1;
  if (index_ != nullptr) {
    const Result<uint64_t> highest = index_->highest_commit(job_);
    if (highest.ok()) manifest.commit_seq = std::max(manifest.commit_seq, *highest + 1);
  }
  return manifest;
}

Result<Manifest> CheckpointStore::assemble(const CommitRequest& request) const {
  if (request.segments.empty()) return invalid_argument("a checkpoint needs at least one segment");
  PENSTOCK_TRY_ASSIGN(Manifest manifest, begin_manifest(request));
  PENSTOCK_TRY(collect_segments(directory_, request, manifest));
  PENSTOCK_TRY(prove_whole(manifest));
  return manifest;
}

Result<CommitReport> CheckpointStore::commit(const CommitRequest& request) {
  PENSTOCK_TRY_ASSIGN(const Manifest manifest, assemble(request));  // 1, 2
  PENSTOCK_TRY_ASSIGN(const std::string text, encode_manifest(manifest));
  // What no reader will accept must not be published.
  PENSTOCK_TRY_ASSIGN(const Manifest read_back, decode_manifest(text));
  PENSTOCK_CHECK(read_back == manifest);

  const Path path = directory_ / manifest_file_name(manifest.commit_seq);
  const Path temporary = path.string() + ".tmp";
  std::error_code error;
  if (std::filesystem::exists(temporary, error)) PENSTOCK_TRY(files_->remove(temporary));
  PENSTOCK_TRY(write_new_file(*files_, temporary, as_bytes(text)));   // 3
  const Status renamed = files_->rename_no_replace(temporary, path);  // 4: the commit point
  if (!renamed.ok()) {
    if (const Status removed = files_->remove(temporary); !removed.ok()) {
      log_warning("{}", removed.message());
    }
    if (renamed.code() != Code::kAlreadyExists) return renamed;
    return aborted("another writer has made " + path.string());
  }
  PENSTOCK_TRY(files_->sync_directory(directory_));  // 5
  const std::string_view body = std::string_view(text).substr(0, text.rfind("digest "));
  CommitReport report{.info = describe({manifest, digest_of(as_bytes(body))}), .index = {}};
  if (index_ != nullptr) report.index = index_->record_commit(report.info);  // 6
  return report;
}

}  // namespace penstock
