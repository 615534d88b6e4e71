#include "checkpoint/marks.h"

#include <fmt/format.h>

#include <algorithm>

#include "checkpoint/store.h"

namespace penstock {
namespace {

constexpr std::string_view kPin = ".pin";
constexpr std::string_view kManifest = ".manifest";
constexpr std::string_view kSetAside = ".manifest.damaged";
constexpr std::string_view kRemoved = ".removed";

std::string stem(uint64_t commit_seq) {
  const std::string manifest = manifest_file_name(commit_seq);
  return manifest.substr(0, manifest.size() - kManifest.size());
}

Result<uint64_t> parse(std::string_view name, std::string_view ending, std::string_view what) {
  if (name.ends_with(ending)) {
    const std::string manifest =
        fmt::format("{}{}", name.substr(0, name.size() - ending.size()), kManifest);
    const Result<uint64_t> number = parse_manifest_file_name(manifest);
    if (number.ok()) return number;
  }
  return invalid_argument(fmt::format("\"{}\" is not the name of {}", name.substr(0, 200), what));
}

}  // namespace

std::string pin_file_name(uint64_t commit_seq) {
  return stem(commit_seq) + std::string(kPin);
}

std::string set_aside_file_name(uint64_t commit_seq) {
  return stem(commit_seq) + std::string(kSetAside);
}

std::string removed_file_name(uint64_t commit_seq) {
  return stem(commit_seq) + std::string(kRemoved);
}

Result<uint64_t> parse_pin_file_name(std::string_view name) {
  return parse(name, kPin, "a pin");
}

Result<uint64_t> parse_set_aside_file_name(std::string_view name) {
  return parse(name, kSetAside, "a manifest that was set aside");
}

Result<uint64_t> parse_removed_file_name(std::string_view name) {
  return parse(name, kRemoved, "a mark of a removal");
}

Result<std::set<uint64_t>> pinned_checkpoints(const Path& directory) {
  PENSTOCK_TRY_ASSIGN(const std::vector<std::string> names, file_names(directory));
  std::set<uint64_t> pinned;
  for (const std::string& name : names) {
    if (const Result<uint64_t> number = parse_pin_file_name(name); number.ok()) {
      pinned.insert(*number);
    }
  }
  return pinned;
}

Result<std::vector<uint64_t>> removed_checkpoints(const Path& directory) {
  PENSTOCK_TRY_ASSIGN(const std::vector<std::string> names, file_names(directory));
  const std::set<std::string> there(names.begin(), names.end());
  std::vector<uint64_t> removed;
  for (const std::string& name : names) {
    const Result<uint64_t> number = parse_removed_file_name(name);
    if (number.ok() && !there.contains(manifest_file_name(*number))) removed.push_back(*number);
  }
  return removed;
}

Status mark_removed(const Path& directory, const std::vector<uint64_t>& commit_seqs,
                    FileSystem& files) {
  if (commit_seqs.empty()) return {};
  for (const uint64_t commit_seq : commit_seqs) {
    const Status made = write_new_file(files, directory / removed_file_name(commit_seq), {});
    if (made.code() != Code::kAlreadyExists) PENSTOCK_TRY(made);
  }
  return files.sync_directory(directory);
}

Status unmark_removed(const Path& directory, FileSystem& files) {
  PENSTOCK_TRY_ASSIGN(const std::vector<std::string> names, file_names(directory));
  for (const std::string& name : names) {
    // One that a power loss brings back only has its row, which is gone, forgotten once more.
    if (parse_removed_file_name(name).ok()) PENSTOCK_TRY(files.remove(directory / name));
  }
  return {};
}

Status CheckpointStore::pin(uint64_t commit_seq) {
  PENSTOCK_TRY(read_manifest(directory_ / manifest_file_name(commit_seq)).status());
  const Status made = write_new_file(*files_, directory_ / pin_file_name(commit_seq), {});
  // One that is there may be of a process that died before it was durable.
  if (made.code() != Code::kAlreadyExists) PENSTOCK_TRY(made);
  return files_->sync_directory(directory_);
}

Status CheckpointStore::unpin(uint64_t commit_seq) {
  const Status removed = files_->remove(directory_ / pin_file_name(commit_seq));
  if (removed.code() != Code::kNotFound) PENSTOCK_TRY(removed);
  return files_->sync_directory(directory_);
}

Status CheckpointStore::set_aside(uint64_t commit_seq) {
  const std::string file = manifest_file_name(commit_seq);
  const StoreListing listing = list_checkpoints(directory_, job_);
  PENSTOCK_TRY(listing.directory);
  const auto stored = read_manifest(directory_ / file);
  if (stored.ok() && (stored->manifest.job != job_ || stored->manifest.store != uuid_)) {
    return failed_precondition(file + " is of another job or store; it is left alone");
  }
  const bool refused =
      std::any_of(listing.refused.begin(), listing.refused.end(), [&](const auto& entry) {
        return entry.manifest_file == file && entry.reason.code() == Code::kDataLoss;
      });
  const Status status =
      stored.ok() ? verify_checkpoint(directory_, stored->manifest) : stored.status();
  if (!refused && status.code() != Code::kDataLoss) {
    return failed_precondition(fmt::format("{} is not known to be damaged: {}", file,
                                           status.ok() ? "it verifies" : status.message()));
  }
  for (auto other = listing.checkpoints.rbegin(); other != listing.checkpoints.rend(); ++other) {
    if (other->commit_seq == commit_seq) continue;
    const auto whole = read_manifest(directory_ / other->manifest_file);
    if (!whole.ok() || !verify_checkpoint(directory_, whole->manifest).ok()) continue;
    PENSTOCK_TRY(
        files_->rename_no_replace(directory_ / file, directory_ / set_aside_file_name(commit_seq)));
    return files_->sync_directory(directory_);
  }
  return failed_precondition(fmt::format("{} stays as it is: no other checkpoint in {} is whole",
                                         file, directory_.string()));
}

}  // namespace penstock
