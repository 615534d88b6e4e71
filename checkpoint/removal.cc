#include "checkpoint/removal.h"

#include <fmt/format.h>

#include <algorithm>
#include <set>

#include "checkpoint/marks.h"
#include "checkpoint/store.h"
#include "checkpoint/uuid.h"
#include "comm/base/log.h"

namespace penstock {
namespace {

constexpr std::string_view kRemovalFile = "GC";
constexpr uint64_t kRemovalBytesMax = 256 << 20;

// Removing what is already gone is how a repeated removal looks.
Status remove_if_there(FileSystem& files, const Path& path) {
  const Status removed = files.remove(path);
  return removed.code() == Code::kNotFound ? Status() : removed;
}

// Segments that the manifests in `directory` name, but for those in `except`.
Result<std::set<std::string>> referenced_segments(const Path& directory,
                                                  const std::vector<std::string>& except) {
  std::set<std::string> referenced;
  PENSTOCK_TRY_ASSIGN(const std::vector<std::string> names, file_names(directory));
  for (const std::string& name : names) {
    if (!parse_manifest_file_name(name).ok()) continue;
    if (std::find(except.begin(), except.end(), name) != except.end()) continue;
    PENSTOCK_TRY_ASSIGN(const StoredManifest stored, read_manifest(directory / name));
    for (const ManifestSegment& segment : stored.manifest.segments) {
      referenced.insert(segment.file);
    }
  }
  return referenced;
}

// The newest checkpoint that verifies completely, and whole ones (by their footers) below it,
// newest first, at most count_max.
Result<std::vector<CheckpointInfo>> whole_checkpoints(const Path& directory, JobId job,
                                                      int64_t count_max,
                                                      std::vector<RefusedCheckpoint>& passed_over) {
  std::vector<CheckpointInfo> whole;
  const StoreListing listing = list_checkpoints(directory, job);
  PENSTOCK_TRY(listing.directory);
  for (auto info = listing.checkpoints.rbegin(); info != listing.checkpoints.rend(); ++info) {
    if (std::ssize(whole) == count_max) break;
    const auto stored = read_manifest(directory / info->manifest_file);
    Status status = stored.status();
    if (stored.ok()) {
      status = whole.empty() ? verify_checkpoint(directory, stored->manifest)
                             : check_segments(directory, stored->manifest);
    }
    if (status.ok()) {
      whole.push_back(*info);
    } else {
      passed_over.push_back({info->commit_seq, info->manifest_file, status});
    }
  }
  return whole;
}

}  // namespace

std::string encode_removal(const Removal& removal) {
  std::string text;
  for (const std::string& name : removal.manifests) text += name + "\n";
  for (const std::string& name : removal.segments) text += name + "\n";
  return text + fmt::format("digest {}\n", to_hex(digest_of(as_bytes(text))));
}

Result<Removal> decode_removal(std::string_view text) {
  const size_t last = text.rfind("digest ");
  if (last == std::string_view::npos) return data_loss("truncated");
  const std::string_view body = text.substr(0, last);
  if (text.substr(last) != fmt::format("digest {}\n", to_hex(digest_of(as_bytes(body))))) {
    return data_loss("damaged: the digest in its last line does not match");
  }
  Removal removal;
  for (size_t begin = 0; begin < body.size();) {
    const size_t end = std::min(body.find('\n', begin), body.size());
    const std::string name(body.substr(begin, end - begin));
    if (parse_manifest_file_name(name).ok() || parse_set_aside_file_name(name).ok()) {
      removal.manifests.push_back(name);
    } else if (parse_segment_file_name(name).ok()) {
      removal.segments.push_back(name);
    } else {
      return data_loss(fmt::format("\"{}\" is neither manifest nor segment", name.substr(0, 200)));
    }
    begin = end + 1;
  }
  return removal;
}

bool is_temporary_file_name(std::string_view name) {
  constexpr std::string_view kEnding = ".tmp";
  constexpr std::string_view kStoreFile = "STORE.";
  if (!name.ends_with(kEnding)) return false;
  name.remove_suffix(kEnding.size());
  if (name == kRemovalFile || parse_manifest_file_name(name).ok()) return true;
  return name.starts_with(kStoreFile) && parse_uuid(name.substr(kStoreFile.size())).ok();
}

Result<std::vector<uint64_t>> removal_in_progress(const Path& directory) {
  const auto text = read_plain_file(directory / kRemovalFile, kRemovalBytesMax);
  std::vector<uint64_t> numbers;
  if (text.status().code() == Code::kNotFound) return numbers;
  PENSTOCK_TRY(text.status());
  const Result<Removal> removal = decode_removal(*text);
  if (!removal.ok()) return numbers;
  for (const std::string& name : removal->manifests) {
    const Result<uint64_t> aside = parse_set_aside_file_name(name);
    const Result<uint64_t> number = aside.ok() ? aside : parse_manifest_file_name(name);
    if (number.ok()) numbers.push_back(*number);
  }
  return numbers;
}

Status begin_removal(const Path& directory, const Removal& removal, FileSystem& files) {
  const Path path = directory / kRemovalFile;
  const Path temporary = path.string() + ".tmp";
  PENSTOCK_TRY(remove_if_there(files, temporary));
  PENSTOCK_TRY(write_new_file(files, temporary, as_bytes(encode_removal(removal))));
  PENSTOCK_TRY(files.rename_no_replace(temporary, path));
  PENSTOCK_TRY(files.sync_directory(directory));
  for (const std::string& name : removal.manifests) {
    PENSTOCK_TRY(remove_if_there(files, directory / name));
  }
  return files.sync_directory(directory);
}

Status finish_removal(const Path& directory, FileSystem& files) {
  const Path path = directory / kRemovalFile;
  const Result<std::string> text = read_plain_file(path, kRemovalBytesMax);
  if (text.status().code() == Code::kNotFound) return {};
  PENSTOCK_TRY(text.status());
  const Result<Removal> removal = decode_removal(*text);
  if (!removal.ok()) {
    log_warning("{} is dropped: {}", path.string(), removal.status().message());
    PENSTOCK_TRY(files.remove(path));
    return files.sync_directory(directory);
  }
  for (const std::string& name : removal->manifests) {
    PENSTOCK_TRY(remove_if_there(files, directory / name));
  }
  PENSTOCK_TRY(files.sync_directory(directory));
  for (const std::string& name : removal->segments) {
    PENSTOCK_TRY(remove_if_there(files, directory / name));
  }
  PENSTOCK_TRY(files.sync_directory(directory));
  PENSTOCK_TRY(files.remove(path));
  return files.sync_directory(directory);
}

// What goes below commit `oldest_kept`: manifests, and the segments only they name.
Result<Removal> CheckpointStore::plan_removal(uint64_t oldest_kept, int64_t keep_every,
                                              RemovalReport& report) const {
  Removal removal;
  std::set<std::string> candidates;
  PENSTOCK_TRY_ASSIGN(const std::set<uint64_t> pinned, pinned_checkpoints(directory_));
  PENSTOCK_TRY_ASSIGN(const std::vector<std::string> names, file_names(directory_));
  for (const std::string& name : names) {
    const Result<uint64_t> aside = parse_set_aside_file_name(name);
    const Result<uint64_t> number = aside.ok() ? aside : parse_manifest_file_name(name);
    if (!number.ok() || *number >= oldest_kept || pinned.contains(*number)) continue;
    const auto stored = read_manifest(directory_ / name);
    // Somebody else's checkpoint that strayed in here is refused by readers, but not ours to
    // remove.
    if (stored.ok() && (stored->manifest.store != uuid_ || stored->manifest.job != job_)) continue;
    if (stored.ok() && keep_every > 0 && stored->manifest.step % keep_every == 0) continue;
    removal.manifests.push_back(name);
    report.commit_seqs.push_back(*number);
    if (!stored.ok()) continue;  // what it named is found by sweep_orphans() once it is gone
    for (const ManifestSegment& segment : stored->manifest.segments) {
      candidates.insert(segment.file);
    }
  }
  // A newer manifest that cannot be read may name anything: then segments wait for sweep_orphans().
  const auto referenced = referenced_segments(directory_, removal.manifests);
  if (referenced.ok()) {
    std::set_difference(candidates.begin(), candidates.end(), referenced->begin(),
                        referenced->end(), std::back_inserter(removal.segments));
  }
  report.segments = referenced.status();
  report.files = removal.segments;
  return removal;
}

// Step 4: not before the rows of what it names are gone may the GC file go, or they would be taken
// for lost checkpoints. Who has no index leaves marks instead for the next who has.
Status CheckpointStore::settle_rows(std::vector<uint64_t> going) {
  if (index_ == nullptr) return mark_removed(directory_, going, *files_);
  PENSTOCK_TRY_ASSIGN(const std::vector<uint64_t> marked, removed_checkpoints(directory_));
  going.insert(going.end(), marked.begin(), marked.end());
  if (!going.empty()) PENSTOCK_TRY(index_->forget(job_, going));
  return unmark_removed(directory_, *files_);
}

Result<RemovalReport> CheckpointStore::retain(const RetentionPolicy& policy) {
  PENSTOCK_CHECK(policy.keep_last >= 1 && policy.keep_every >= 0, policy.keep_last,
                 policy.keep_every);
  const auto go_on = [&]() -> Status {
    PENSTOCK_TRY_ASSIGN(const std::vector<uint64_t> going, removal_in_progress(directory_));
    PENSTOCK_TRY(
        settle_rows(going).with_context("the removal goes on at the next one, or the next open"));
    return finish_removal(directory_, *files_);
  };
  if (!policy.dry_run) PENSTOCK_TRY(go_on());  // with one that has waited for the index
  RemovalReport report;
  PENSTOCK_TRY_ASSIGN(const std::vector<CheckpointInfo> whole,
                      whole_checkpoints(directory_, job_, policy.keep_last, report.passed_over));
  if (std::ssize(whole) < policy.keep_last) return report;
  PENSTOCK_TRY_ASSIGN(const Removal removal,
                      plan_removal(whole.back().commit_seq, policy.keep_every, report));
  if (removal.manifests.empty() || policy.dry_run) return report;
  PENSTOCK_TRY(begin_removal(directory_, removal, *files_));
  PENSTOCK_TRY(go_on());
  return report;
}

Result<bool> holds_store(const Path& directory) {
  PENSTOCK_TRY_ASSIGN(const std::vector<std::string> names, file_names(directory));
  return std::any_of(names.begin(), names.end(), [](const std::string& name) {
    return name == "STORE" || name == kRemovalFile || parse_manifest_file_name(name).ok() ||
           parse_set_aside_file_name(name).ok() || parse_segment_file_name(name).ok();
  });
}

Status remove_store(const Path& directory, JobId job, FileSystem& files) {
  std::error_code error;
  PENSTOCK_TRY_ASSIGN(const bool is_store, holds_store(directory));
  if (!is_store) {
    std::filesystem::remove(directory, error);  // not when somebody else's files are in it
    return {};
  }
  // Its lock comes first, so that nobody commits between the list and the removal.
  PENSTOCK_TRY_ASSIGN(FileDescriptor lock, lock_store(directory));
  PENSTOCK_TRY(finish_removal(directory, files));
  PENSTOCK_TRY_ASSIGN(const std::vector<std::string> names, file_names(directory));
  Removal removal;
  std::vector<std::string> others;
  for (const std::string& name : names) {
    const bool is_manifest =
        parse_manifest_file_name(name).ok() || parse_set_aside_file_name(name).ok();
    // Our lock is empty; another file of that name may be a user's.
    const bool is_lock = name == "LOCK" && std::filesystem::file_size(directory / name, error) == 0;
    const bool is_other = parse_pin_file_name(name).ok() || parse_removed_file_name(name).ok() ||
                          name == "STORE.damaged" || is_lock || is_temporary_file_name(name);
    if (is_manifest) {
      const auto stored = read_manifest(directory / name);
      if (stored.ok() && stored->manifest.job != job) {
        return failed_precondition(fmt::format("{} is a checkpoint of job {}; nothing is removed",
                                               (directory / name).string(), stored->manifest.job));
      }
      removal.manifests.push_back(name);
    } else if (parse_segment_file_name(name).ok()) {
      removal.segments.push_back(name);
    } else if (is_other) {
      others.push_back(name);
    }
  }
  PENSTOCK_TRY(begin_removal(directory, removal, files));
  PENSTOCK_TRY(finish_removal(directory, files));
  others.push_back("STORE");  // last: as long as it is there, a removal that was cut short goes on
  for (const std::string& name : others) PENSTOCK_TRY(remove_if_there(files, directory / name));
  PENSTOCK_TRY(files.sync_directory(directory));
  // Network file systems keep a removed file's name while it is open.
  PENSTOCK_TRY(lock.close(directory));
  std::filesystem::remove(directory, error);  // not when somebody else's files are in it
  return {};
}

Result<RemovalReport> CheckpointStore::sweep_orphans(Epoch current) {
  PENSTOCK_TRY_ASSIGN(const std::set<std::string> referenced, referenced_segments(directory_, {}));
  PENSTOCK_TRY_ASSIGN(const std::vector<std::string> names, file_names(directory_));
  RemovalReport report;
  for (const std::string& name : names) {
    const auto segment = parse_segment_file_name(name);
    const bool orphan = segment.ok() && segment->epoch < current && !referenced.contains(name);
    if (!orphan && !is_temporary_file_name(name)) continue;
    PENSTOCK_TRY(remove_if_there(*files_, directory_ / name));
    report.files.push_back(name);
  }
  if (!report.files.empty()) PENSTOCK_TRY(files_->sync_directory(directory_));
  return report;
}

}  // namespace penstock
