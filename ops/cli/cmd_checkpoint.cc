// penstock checkpoint and its verb ls.
#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <memory>
#include <nlohmann/json.hpp>
#include <set>

#include "checkpoint/marks.h"
#include "checkpoint/store.h"
#include "ops/cli/checkpoint_place.h"
#include "ops/cli/text.h"

namespace penstock {

namespace {

// As the coordinator lists a job's, of a directory that is here.
Result<Json> list_directory(const CheckpointPlace& place) {
  const StoreListing listing = list_checkpoints(place.directory, place.job);
  PENSTOCK_TRY(listing.directory);
  PENSTOCK_TRY_ASSIGN(const std::set<uint64_t> pinned, pinned_checkpoints(place.directory));
  Json items = Json::array();
  for (const CheckpointInfo& info : listing.checkpoints) {
    const Path manifest = place.directory / info.manifest_file;
    const Result<StoredManifest> stored = read_manifest(manifest);
    const Status whole =
        stored.ok() ? check_segments(place.directory, stored->manifest) : stored.status();
    items.push_back({{"step", info.step},
                     {"epoch", info.epoch.value},
                     {"manifest", manifest.string()},
                     {"bytes", info.payload_bytes},
                     {"time", format_utc(info.created_at)},
                     {"weights_digest", nullptr},
                     {"pinned", pinned.contains(info.commit_seq)},
                     {"damaged", !whole.ok()},
                     {"damage", whole.ok() ? Json() : Json(whole.message())}});
  }
  for (const RefusedCheckpoint& refused : listing.refused) {
    items.push_back({{"step", 0},
                     {"epoch", 0},
                     {"manifest", (place.directory / refused.manifest_file).string()},
                     {"bytes", 0},
                     {"time", nullptr},
                     {"weights_digest", nullptr},
                     {"pinned", false},
                     {"damaged", true},
                     {"damage", refused.reason.message()}});
  }
  return Json{{"apiVersion", "penstock/v1"}, {"kind", "CheckpointList"}, {"items", items}};
}

Result<Json> list_of(const Cli& cli, const std::string& what) {
  PENSTOCK_TRY_ASSIGN(const std::optional<CheckpointPlace> place, checkpoint_place_at(what));
  if (place) return list_directory(*place);
  const Client client = cli.client();
  PENSTOCK_TRY_ASSIGN(const Json job, client.job(what));
  return client.get(job_path(field_text(job, "id"), "/checkpoints"));
}

Result<ExitCode> ls(Cli& cli, const std::string& what) {
  PENSTOCK_TRY_ASSIGN(const Json list, list_of(cli, what));
  cli.out.document(list);
  std::vector<std::vector<std::string>> rows;
  std::vector<std::string> damages;
  for (const Json& item : list.value("items", Json::array())) {
    const bool is_damaged = item.value("damaged", Json()) == true;
    if (is_damaged) damages.push_back("damaged: " + field_text(item, "damage"));
    // Of one whose manifest cannot be used nothing is known but the file.
    const bool is_known = field_number(item, "epoch") > 0;
    rows.push_back(
        {is_known ? field_text(item, "step") : "-", is_known ? field_text(item, "epoch") : "-",
         is_known ? format_bytes(field_number(item, "bytes")) : "-", field_age(item, "time"),
         is_damaged ? "damaged" : "complete", item.value("pinned", Json()) == true ? "yes" : "",
         field_text(item, "manifest")});
  }
  cli.out.table({"STEP", "ATTEMPT", "SIZE", "AGE", "FILES", "PINNED", "MANIFEST"}, rows);
  for (const std::string& damage : damages) cli.out.note(shown(damage));
  return ExitCode::kOk;
}

}  // namespace

void add_checkpoint_verbs(CLI::App& app, Cli& cli) {
  CLI::App* checkpoint = add_verb(app, "checkpoint", "Look at checkpoints, keep, remove, move them",
                                  "penstock checkpoint ls quickstart");
  checkpoint->alias("ckpt");
  checkpoint->require_subcommand(1);
  auto what = std::make_shared<std::string>();
  CLI::App* ls_verb =
      add_verb(*checkpoint, "ls", "List the committed checkpoints of a job, oldest first",
               "penstock checkpoint ls quickstart    # FILES is complete: all there, and as long "
               "as written\n"
               "penstock checkpoint ls quickstart -o json\n"
               "penstock checkpoint ls checkpoints/7    # without a coordinator");
  ls_verb->add_option("checkpoint", *what, "Job or checkpoint directory")->required();
  ls_verb->callback([&cli, what] { cli.action = [&cli, what] { return ls(cli, *what); }; });
  add_checkpoint_show_verbs(*checkpoint, cli);
  add_checkpoint_verify_verb(*checkpoint, cli);
  add_checkpoint_keep_verbs(*checkpoint, cli);
  add_checkpoint_files_verbs(*checkpoint, cli);
}

}  // namespace penstock
