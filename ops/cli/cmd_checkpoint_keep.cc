// penstock checkpoint pin, unpin, prune, reindex: which checkpoints stay, and the index of them.
#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <charconv>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>

#include "checkpoint/marks.h"
#include "checkpoint/store.h"
#include "checkpoint/verify.h"
#include "comm/base/counted.h"
#include "ops/cli/checkpoint_place.h"
#include "ops/cli/text.h"

namespace penstock {

namespace {

struct PinFlags {
  std::string what;
  std::optional<int64_t> step;
};

Result<ExitCode> set_pin(Cli& cli, const PinFlags& flags, bool pinned) {
  PENSTOCK_TRY_ASSIGN(const CheckpointPlace place, find_checkpoint_place(cli, flags.what));
  PENSTOCK_TRY_ASSIGN(const ChosenCheckpoint chosen, choose_checkpoint(cli, place, flags.step));
  const Manifest& manifest = chosen.stored.manifest;
  PENSTOCK_TRY_ASSIGN(CheckpointStore store, open_store(place));
  PENSTOCK_TRY(pinned ? store.pin(manifest.commit_seq) : store.unpin(manifest.commit_seq));
  cli.out.document({{"apiVersion", "penstock/v1"},
                    {"kind", "CheckpointPin"},
                    {"directory", place.directory.string()},
                    {"step", manifest.step},
                    {"commit_seq", manifest.commit_seq},
                    {"pinned", pinned}});
  cli.out.answer(std::to_string(manifest.step));
  cli.out.note(fmt::format("the checkpoint of step {} {}", manifest.step,
                           pinned ? "stays until it is unpinned" : "is no longer pinned"));
  const Status whole = check_segments(chosen.directory, manifest);
  if (pinned && !whole.ok()) cli.out.note("it is pinned, but it is not whole: " + whole.message());
  return ExitCode::kOk;
}

struct PruneFlags {
  std::string what;
  RetentionPolicy policy;
};

Result<ExitCode> prune(Cli& cli, const PruneFlags& flags) {
  PENSTOCK_TRY_ASSIGN(const CheckpointPlace place, find_checkpoint_place(cli, flags.what));
  if (place.commit_seq) return invalid_argument("prune takes a job or a directory, no manifest");
  PENSTOCK_TRY_ASSIGN(CheckpointStore store, open_store(place));
  std::map<uint64_t, CheckpointInfo> before;
  for (const CheckpointInfo& info : list_checkpoints(place.directory, place.job).checkpoints) {
    before.emplace(info.commit_seq, info);
  }
  PENSTOCK_TRY_ASSIGN(const RemovalReport report, store.retain(flags.policy));
  Json items = Json::array();
  std::vector<std::vector<std::string>> rows;
  for (const uint64_t commit_seq : report.commit_seqs) {
    const auto info = before.find(commit_seq);
    const bool readable = info != before.end();
    items.push_back({{"commit_seq", commit_seq},
                     {"step", readable ? Json(info->second.step) : Json()},
                     {"bytes", readable ? Json(info->second.payload_bytes) : Json()}});
    rows.push_back(
        {readable ? std::to_string(info->second.step) : "-", std::to_string(commit_seq),
         readable ? format_bytes(static_cast<double>(info->second.payload_bytes)) : "-"});
  }
  cli.out.document({{"apiVersion", "penstock/v1"},
                    {"kind", "CheckpointPruning"},
                    {"directory", place.directory.string()},
                    {"dry_run", flags.policy.dry_run},
                    {"items", items},
                    {"files", report.files}});
  cli.out.table({"STEP", "COMMIT", "SIZE"}, rows);
  for (const RefusedCheckpoint& refused : report.passed_over) {
    cli.out.note(fmt::format("{} does not count: {}", refused.manifest_file,
                             without_file(refused.reason.message(), refused.manifest_file)));
  }
  cli.out.note(fmt::format("{} {} and {}", flags.policy.dry_run ? "would remove" : "removed",
                           counted(std::ssize(report.commit_seqs), "checkpoint"),
                           counted(std::ssize(report.files), "segment")));
  if (!report.segments.ok()) {
    cli.out.note(
        fmt::format("their segments stay, since {}; penstock checkpoint verify {} --repair",
                    report.segments.message(), flags.what));
  }
  return ExitCode::kOk;
}

struct ReindexFlags {
  std::string state_dir;
  std::vector<std::string> directories;
};

// Every job directory under the coordinator's own, and those named besides.
Result<std::vector<Path>> job_directories(const ReindexFlags& flags) {
  std::vector<Path> directories;
  const Path own = Path(flags.state_dir) / "checkpoints";
  PENSTOCK_TRY_ASSIGN(const std::vector<std::string> names, file_names(own));
  std::error_code error;
  for (const std::string& name : names) {
    if (std::filesystem::is_directory(own / name, error)) directories.push_back(own / name);
  }
  directories.insert(directories.end(), flags.directories.begin(), flags.directories.end());
  return directories;
}

// The coordinator's own directories are called by their jobs' numbers.
JobId job_named(const std::string& name) {
  uint64_t number = 0;
  const auto [end, error] = std::from_chars(name.data(), name.data() + name.size(), number);
  return {error == std::errc() && end == name.data() + name.size() ? number : 0};
}

Result<ExitCode> reindex(Cli& cli, const ReindexFlags& flags) {
  const Path state = flags.state_dir;
  std::error_code error;
  const bool is_state = std::filesystem::is_directory(state / "checkpoints", error) ||
                        std::filesystem::is_directory(state / "checkpoint-index", error);
  if (!is_state) {
    return not_found(state.string() +
                     " is not the state directory of a coordinator: it has neither checkpoints "
                     "nor checkpoint-index");
  }
  PENSTOCK_TRY_ASSIGN(const std::vector<Path> directories, job_directories(flags));
  PENSTOCK_TRY_ASSIGN(const std::unique_ptr<CheckpointIndex> index,
                      CheckpointIndex::open(state / "checkpoint-index"));
  if (!index->opening_report().empty()) cli.out.note(index->opening_report());
  Json items = Json::array();
  std::vector<std::vector<std::string>> rows;
  for (const Path& directory : directories) {
    // With a '/' it is never taken for a job's name.
    auto place = find_checkpoint_place(cli, std::filesystem::absolute(directory).string());
    const bool own = directory.parent_path() == state / "checkpoints";
    // A job that has saved nothing yet; a directory that was named is a mistake.
    if (own && place.status().code() == Code::kNotFound) continue;
    PENSTOCK_TRY(place.status());
    if (own && place->job == JobId{}) place->job = job_named(directory.filename().string());
    if (place->job == JobId{}) {
      cli.out.note(directory.string() + ": no manifest can be read; left out");
      continue;
    }
    PENSTOCK_TRY_ASSIGN(const IndexReport report, index->reconcile(place->job, directory));
    Json lost = Json::array();
    for (const CheckpointInfo& info : report.lost) {
      lost.push_back(info.step);
      cli.out.note(fmt::format("job {}: the checkpoint of step {} was committed, but {} is gone",
                               place->job, info.step, info.manifest_file));
    }
    items.push_back({{"job", place->job.value},
                     {"directory", directory.string()},
                     {"checkpoints", report.row_count},
                     {"rebuilt", report.rebuilt},
                     {"reason", report.reason},
                     {"lost_steps", lost}});
    rows.push_back({std::to_string(place->job.value), std::to_string(report.row_count),
                    report.rebuilt ? "rebuilt" : "was right", directory.string()});
  }
  cli.out.document({{"apiVersion", "penstock/v1"},
                    {"kind", "CheckpointIndex"},
                    {"index", (state / "checkpoint-index").string()},
                    {"items", items}});
  cli.out.table({"JOB", "CHECKPOINTS", "INDEX", "DIRECTORY"}, rows);
  return ExitCode::kOk;
}

void add_pin_verb(CLI::App& checkpoint, Cli& cli, bool pinned) {
  auto flags = std::make_shared<PinFlags>();
  CLI::App* verb = pinned ? add_verb(checkpoint, "pin", "Keep a checkpoint whatever retention says",
                                     "penstock checkpoint pin quickstart --step 120\n"
                                     "penstock checkpoint pin checkpoints/7    # the newest")
                          : add_verb(checkpoint, "unpin", "Let retention have a pinned checkpoint",
                                     "penstock checkpoint unpin quickstart --step 120");
  add_place_options(*verb, flags->what, flags->step);
  verb->callback([&cli, flags, pinned] {
    cli.action = [&cli, flags, pinned] { return set_pin(cli, *flags, pinned); };
  });
}

}  // namespace

void add_checkpoint_keep_verbs(CLI::App& checkpoint, Cli& cli) {
  add_pin_verb(checkpoint, cli, true);
  add_pin_verb(checkpoint, cli, false);

  auto prune_flags = std::make_shared<PruneFlags>();
  CLI::App* prune_verb =
      add_verb(checkpoint, "prune", "Remove old checkpoints, after reading the newest completely",
               "penstock checkpoint prune quickstart --keep-last 3 --keep-every 1000 --dry-run\n"
               "penstock checkpoint prune checkpoints/7 --keep-last 1");
  prune_verb->add_option("checkpoint", prune_flags->what, "Job or checkpoint directory")
      ->required();
  prune_verb->add_option("--keep-last", prune_flags->policy.keep_last, "So many whole ones stay")
      ->check(CLI::Range(int64_t{1}, int64_t{1'000'000}))
      ->required();
  prune_verb
      ->add_option("--keep-every", prune_flags->policy.keep_every,
                   "Those of steps divisible by this stay too; 0: none")
      ->check(CLI::Range(int64_t{0}, int64_t{1'000'000'000}));
  prune_verb->add_flag("--dry-run", prune_flags->policy.dry_run, "Only say what would go");
  prune_verb->callback([&cli, prune_flags] {
    cli.action = [&cli, prune_flags] { return prune(cli, *prune_flags); };
  });

  auto reindex_flags = std::make_shared<ReindexFlags>();
  CLI::App* reindex_verb =
      add_verb(checkpoint, "reindex",
               "Make a stopped coordinator's index of checkpoints anew from the files",
               "penstock checkpoint reindex ~/.local/state/penstock/coordinator\n"
               "penstock checkpoint reindex /var/lib/penstock /data/run7/checkpoints");
  reindex_verb->add_option("state-dir", reindex_flags->state_dir, "The coordinator's --state-dir")
      ->required();
  reindex_verb->add_option("directory", reindex_flags->directories,
                           "Checkpoint directories of jobs whose spec names one");
  reindex_verb->callback([&cli, reindex_flags] {
    cli.action = [&cli, reindex_flags] { return reindex(cli, *reindex_flags); };
  });
}

}  // namespace penstock
