#include "checkpoint/store.h"

#include <fcntl.h>
#include <fmt/format.h>

#include <algorithm>
#include <cerrno>
#include <map>

#include "checkpoint/removal.h"
#include "checkpoint/segment_reader.h"
#include "comm/base/log.h"

namespace penstock {
namespace {

constexpr std::string_view kStoreFile = "STORE";
constexpr std::string_view kStoreText = "penstock checkpoint store 1 ";
constexpr std::string_view kLockFile = "LOCK";

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

// Opens one segment a manifest lists and compares what can be compared without reading its data.
Result<SegmentReader> open_listed(const Path& directory, const Manifest& manifest,
                                  const ManifestSegment& listed) {
  const Path path = directory / listed.file;
  Result<SegmentReader> reader = SegmentReader::open(path);
  if (!reader.ok()) {
    // A segment that a manifest names and that is not there is lost data, not a wrong question.
    return data_loss(fmt::format("rank {}: {}", listed.rank, reader.status().message()));
  }
  const SegmentHeader& header = reader->header();
  const SegmentIdentity wanted = {manifest.job, manifest.epoch, listed.rank, manifest.step};
  if (header.store != manifest.store || header.identity != wanted) {
    return data_loss(
        fmt::format("segment {} was written by rank {} of job {}, epoch {}, step {} of store {}; "
                    "rank {} of job "
                    "{}, epoch {}, step {} of store {} is wanted",
                    path.string(), header.identity.rank, header.identity.job, header.identity.epoch,
                    header.identity.step, to_hex(header.store), wanted.rank, wanted.job,
                    wanted.epoch, wanted.step, to_hex(manifest.store)));
  }
  if (reader->byte_count() != listed.byte_count ||
      reader->footer_digest() != listed.footer_digest) {
    return data_loss(fmt::format(
        "segment {} (rank {}) is not the one that was saved: {} bytes, "
        "footer digest {}; {} bytes, {} wanted",
        path.string(), listed.rank, reader->byte_count(), to_hex(reader->footer_digest()),
        listed.byte_count, to_hex(listed.footer_digest)));
  }
  const auto name = parse_segment_file_name(listed.file);
  if (!name.ok() || name->uuid != header.segment) {
    return data_loss(fmt::format("segment {} (rank {}) was written under another name",
                                 path.string(), listed.rank));
  }
  return reader;
}

Status check_pieces(const Path& directory, const Manifest& manifest, bool read_data) {
  std::vector<std::vector<std::pair<const ManifestTensor*, const ManifestPiece*>>> by_segment(
      manifest.segments.size());
  for (const ManifestTensor& tensor : manifest.tensors) {
    for (const ManifestPiece& piece : tensor.pieces) {
      by_segment[piece.segment].emplace_back(&tensor, &piece);
    }
  }
  for (size_t i = 0; i < by_segment.size(); ++i) {
    PENSTOCK_TRY_ASSIGN(const SegmentReader reader,
                        open_listed(directory, manifest, manifest.segments[i]));
    for (const auto& [tensor, piece] : by_segment[i]) {
      PENSTOCK_TRY_ASSIGN(const size_t index, reader.find(tensor->name, piece->box));
      const SegmentSlice& entry = reader.slices()[index];
      if (entry.slice.dtype != tensor->dtype || entry.slice.shape != tensor->shape ||
          entry.digest != piece->digest) {
        return data_loss(
            fmt::format("segment {} (rank {}): tensor {} {} is not what the manifest "
                        "says",
                        reader.path().string(), manifest.segments[i].rank, tensor->name,
                        to_string(piece->box)));
      }
    }
    if (read_data) PENSTOCK_TRY(reader.verify());
  }
  return prove_whole(manifest);
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

StoreListing list_checkpoints(const Path& directory, JobId job) {
  StoreListing listing;
  const Result<Uuid> uuid = read_store_uuid(directory);
  std::optional<StoredManifest> successor;
  const Result<std::vector<uint64_t>> numbers = manifest_numbers(directory);
  listing.directory = numbers.status();
  if (!numbers.ok()) return listing;
  for (auto number = numbers->rbegin(); number != numbers->rend(); ++number) {
    const std::string file = manifest_file_name(*number);
    const auto refuse = [&](Status why) { listing.refused.push_back({*number, file, why}); };
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

Result<CheckpointStore> CheckpointStore::open(const Path& directory, JobId job,
                                              CheckpointIndex* index, FileSystem& files) {
  PENSTOCK_TRY(create_directories_durably(directory));
  CheckpointStore store;
  store.directory_ = directory;
  store.job_ = job;
  store.index_ = index;
  store.files_ = &files;
  const Path lock = directory / kLockFile;
  PENSTOCK_TRY_ASSIGN(store.lock_, open_file(lock, O_RDWR | O_CREAT));
  // An open-file-description lock: it belongs to this descriptor, goes with the process, and also
  // excludes a second store in the same process.
  struct flock range = {};
  range.l_type = F_WRLCK;
  range.l_whence = SEEK_SET;
  if (::fcntl(store.lock_.get(), F_OFD_SETLK, &range) != 0) {
    if (errno != EAGAIN && errno != EACCES) return errno_status(errno, "lock " + lock.string());
    return failed_precondition("another writer holds " + lock.string() +
                               "; stop the other coordinator first");
  }
  PENSTOCK_TRY_ASSIGN(store.uuid_, store_uuid(directory, files));
  PENSTOCK_TRY(finish_removal(directory, files));
  return store;
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
  PENSTOCK_TRY_ASSIGN(const std::vector<uint64_t> numbers, manifest_numbers(directory_));
  manifest.commit_seq = numbers.empty() ? 1 : numbers.back() + 1;
  if (index_ != nullptr) {
    const Result<uint64_t> highest = index_->highest_commit(job_);
    if (highest.ok()) manifest.commit_seq = std::max(manifest.commit_seq, *highest + 1);
  }
  return manifest;
}

Result<CommitReport> CheckpointStore::commit(const CommitRequest& request) {
  if (request.segments.empty()) return invalid_argument("a checkpoint needs at least one segment");
  PENSTOCK_TRY_ASSIGN(Manifest manifest, begin_manifest(request));
  PENSTOCK_TRY(collect_segments(directory_, request, manifest));  // 1
  PENSTOCK_TRY(prove_whole(manifest));                            // 2
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
