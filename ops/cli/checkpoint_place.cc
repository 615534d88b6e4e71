#include "ops/cli/checkpoint_place.h"

#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <charconv>
#include <nlohmann/json.hpp>

#include "checkpoint/marks.h"
#include "checkpoint/pace.h"
#include "checkpoint/verify.h"

namespace penstock {

namespace {

// A coordinator commits within a fraction of it.
constexpr Duration kLockWait = std::chrono::seconds(2);

bool is_store_file(const std::string& name) {
  return name == "STORE" || parse_manifest_file_name(name).ok() ||
         parse_set_aside_file_name(name).ok() || parse_segment_file_name(name).ok();
}

JobId job_in(const Path& directory, const std::vector<std::string>& names) {
  for (auto name = names.rbegin(); name != names.rend(); ++name) {  // the newest first
    if (!parse_manifest_file_name(*name).ok()) continue;
    if (const auto stored = read_manifest(directory / *name); stored.ok()) {
      return stored->manifest.job;
    }
  }
  return {};
}

Result<CheckpointPlace> place_at(const Path& directory, std::optional<uint64_t> commit_seq) {
  PENSTOCK_TRY_ASSIGN(const std::vector<std::string> names, file_names(directory));
  if (!std::any_of(names.begin(), names.end(), is_store_file)) {
    return not_found(directory.string() + " holds no checkpoints");
  }
  return CheckpointPlace{directory, job_in(directory, names), commit_seq};
}

}  // namespace

void add_place_options(CLI::App& verb, std::string& what, std::optional<int64_t>& step,
                       const std::string& step_help) {
  verb.add_option("checkpoint", what, "Job, checkpoint directory or manifest")->required();
  verb.add_option("--step", step, step_help)->check(CLI::Range(int64_t{0}, int64_t{1'000'000'000}));
}

Result<std::optional<CheckpointPlace>> checkpoint_place_at(const std::string& word) {
  if (word.empty()) return invalid_argument("name a job, a checkpoint directory or a manifest");
  const std::optional<CheckpointPlace> none;
  const Path path = word;
  std::error_code error;
  const bool path_like = word.find('/') != std::string::npos;
  if (std::filesystem::is_directory(path, error)) {
    const Result<CheckpointPlace> place = place_at(path, std::nullopt);
    if (place.ok()) return std::optional(*place);
    // A folder that happens to be called like a job.
    if (!path_like && place.status().code() == Code::kNotFound) return none;
    return place.status();
  }
  if (const auto number = parse_manifest_file_name(path.filename().string()); number.ok()) {
    PENSTOCK_TRY_ASSIGN(const CheckpointPlace place,
                        place_at(path.has_parent_path() ? path.parent_path() : Path("."), *number));
    return std::optional(place);
  }
  if (path_like) return not_found(word + " is neither a checkpoint directory nor a manifest");
  return none;
}

Result<CheckpointPlace> find_checkpoint_place(const Cli& cli, const std::string& word) {
  PENSTOCK_TRY_ASSIGN(const std::optional<CheckpointPlace> place, checkpoint_place_at(word));
  if (place) return *place;
  const Result<Json> job = cli.client().job(word);
  std::error_code error;
  if (!job.ok() && std::filesystem::is_directory(word, error)) {
    return job.status().with_context(fmt::format("the folder {} holds no checkpoints", word));
  }
  PENSTOCK_TRY(job.status());
  const std::string directory = field_string(*job, "checkpoint_dir");
  if (directory.empty()) return not_found(fmt::format("job {} has no checkpoint directory", word));
  return CheckpointPlace{directory, JobId{static_cast<uint64_t>(field_number(*job, "id"))},
                         std::nullopt};
}

Result<CheckpointStore> open_store(const CheckpointPlace& place) {
  if (place.job == JobId{}) {
    return failed_precondition("no manifest in " + place.directory.string() +
                               " can be read, so whose checkpoints these are is not known");
  }
  Pace pace(0);
  const int64_t deadline_ns = monotonic_ns() + kLockWait.count();
  return CheckpointStore::open_when_free(place.directory, place.job, nullptr, [&] {
    return monotonic_ns() < deadline_ns && pace.pause(std::chrono::milliseconds(10));
  });
}

Result<ChosenCheckpoint> choose_checkpoint(Cli& cli, const CheckpointPlace& place,
                                           std::optional<int64_t> step) {
  std::string file;
  if (place.commit_seq) {
    file = manifest_file_name(*place.commit_seq);
  } else {
    const StoreListing listing = list_checkpoints(place.directory, place.job);
    PENSTOCK_TRY(listing.directory);
    for (const CheckpointInfo& info : listing.checkpoints) {
      if (!step || info.step == *step) file = info.manifest_file;
    }
    for (const RefusedCheckpoint& refused : listing.refused) {
      if (refused.set_aside || (!file.empty() && refused.manifest_file < file)) continue;
      cli.out.note(fmt::format("passed over {}: {}", refused.manifest_file,
                               without_file(refused.reason.message(), refused.manifest_file)));
    }
  }
  if (file.empty()) {
    return not_found(
        step ? fmt::format("{} holds no checkpoint of step {}", place.directory.string(), *step)
             : place.directory.string() + " holds no readable checkpoint");
  }
  PENSTOCK_TRY_ASSIGN(StoredManifest stored, read_manifest(place.directory / file));
  if (step && stored.manifest.step != *step) {
    return not_found(fmt::format("{} is of step {}, not {}", file, stored.manifest.step, *step));
  }
  return ChosenCheckpoint{place.directory, std::move(stored)};
}

Result<ChosenCheckpoint> choose_checkpoint(Cli& cli, const std::string& what) {
  std::string word = what;
  std::optional<int64_t> step;
  const size_t at = what.rfind('@');
  std::error_code error;
  if (at != std::string::npos && !std::filesystem::exists(what, error)) {
    const char* end = what.data() + what.size();
    int64_t number = 0;
    const auto [stop, wrong] = std::from_chars(what.data() + at + 1, end, number);
    if (wrong != std::errc() || stop != end || number < 0) {
      return invalid_argument(fmt::format("\"{}\": a step number follows the @", what));
    }
    step = number;
    word.resize(at);
  }
  PENSTOCK_TRY_ASSIGN(const CheckpointPlace place, find_checkpoint_place(cli, word));
  return choose_checkpoint(cli, place, step);
}

std::string shown(std::string text) {
  std::replace_if(
      text.begin(), text.end(),
      [](char c) { return static_cast<unsigned char>(c) < ' ' || c == '\x7f'; }, '?');
  return text;
}

}  // namespace penstock
