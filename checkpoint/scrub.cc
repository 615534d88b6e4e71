#include "checkpoint/scrub.h"

#include <fmt/format.h>

#include <algorithm>
#include <vector>

#include "checkpoint/store.h"
#include "comm/base/counted.h"

namespace penstock {
namespace {

CheckedCheckpoint check_one(const Path& directory, uint64_t commit_seq, const std::string& file,
                            const RefusedCheckpoint* refused, const ReadPace& pace) {
  CheckedCheckpoint checked{
      .commit_seq = commit_seq, .manifest_file = file, .step = {}, .report = {}};
  const Result<StoredManifest> stored = read_manifest(directory / file);
  if (stored.ok()) {
    checked.step = stored->manifest.step;
    for (const ManifestSegment& segment : stored->manifest.segments) {
      checked.bytes += segment.byte_count;
    }
  }
  checked.set_aside = refused != nullptr && refused->set_aside;
  const Status status = refused != nullptr ? refused->reason : stored.status();
  if (status.ok()) {
    checked.report = find_damage(directory, stored->manifest, pace);
  } else {  // whose segments are whole or not does not matter
    checked.report.damages = {{.file = file,
                               .rank = {},
                               .tensors = {},
                               .what = without_file(status.message(), file),
                               .status = status}};
    checked.report.damage_count = 1;
  }
  return checked;
}

struct Candidate {
  uint64_t commit_seq = 0;
  std::string file;
  std::optional<int64_t> step;
  const RefusedCheckpoint* refused = nullptr;
};

}  // namespace

bool CheckedCheckpoint::damaged() const {
  const auto is_lost = [](const CheckpointDamage& damage) {
    return damage.status.code() == Code::kDataLoss;
  };
  return !set_aside && std::any_of(report.damages.begin(), report.damages.end(), is_lost);
}

bool CheckedCheckpoint::unreadable() const {
  return !set_aside && report.damage_count > 0 && !damaged();
}

Status check_checkpoints(const Path& directory, JobId job, const CheckpointSelection& selection,
                         const ReadPace& pace,
                         const std::function<void(CheckedCheckpoint)>& visit) {
  const StoreListing listing = list_checkpoints(directory, job);
  PENSTOCK_TRY(listing.directory);
  std::vector<Candidate> candidates;
  for (const CheckpointInfo& info : listing.checkpoints) {
    candidates.push_back({info.commit_seq, info.manifest_file, info.step, nullptr});
  }
  for (const RefusedCheckpoint& refused : listing.refused) {
    candidates.push_back({refused.commit_seq, refused.manifest_file, {}, &refused});
  }
  std::sort(candidates.begin(), candidates.end(),
            [](const auto& a, const auto& b) { return a.commit_seq < b.commit_seq; });
  bool stopped = false;
  const ReadPace watched = [&](uint64_t bytes) {
    stopped = stopped || (pace && !pace(bytes));
    return !stopped;
  };
  for (const Candidate& at : candidates) {
    if (selection.commit_seq && *selection.commit_seq != at.commit_seq) continue;
    if (selection.step && at.step && *at.step != *selection.step) continue;
    CheckedCheckpoint checked = check_one(directory, at.commit_seq, at.file, at.refused, watched);
    if (stopped) return {};
    // A manifest that cannot be read may be of any step, the one asked for included.
    const bool other_step = checked.step && selection.step && *checked.step != *selection.step;
    if (other_step || (selection.step && checked.set_aside)) continue;
    std::error_code error;
    const bool gone = !std::filesystem::exists(directory / at.file, error);
    if (gone && !error) continue;
    visit(std::move(checked));
  }
  return {};
}

std::string words_of(const CheckpointDamage& damage) {
  std::string text = damage.file;
  if (damage.rank) text += fmt::format(" (rank {})", *damage.rank);
  if (damage.end > 0) text += fmt::format(", bytes {}:{}", damage.begin, damage.end);
  if (!damage.tensors.empty()) {
    text += ", " + damage.tensors.front();
    const auto others = static_cast<int64_t>(damage.tensor_count) - 1;
    if (others > 0) text += fmt::format(" and {} more", counted(others, "tensor"));
  }
  return text + ": " + damage.what;
}

}  // namespace penstock
