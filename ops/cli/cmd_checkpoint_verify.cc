// penstock checkpoint verify: reads every byte of checkpoints, and sets damaged ones aside.
#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <memory>
#include <nlohmann/json.hpp>

#include "checkpoint/marks.h"
#include "checkpoint/pace.h"
#include "checkpoint/scrub.h"
#include "checkpoint/store.h"
#include "ops/cli/checkpoint_place.h"
#include "ops/cli/text.h"

namespace penstock {

namespace {

constexpr uint64_t kScrubBytesPerSecond = 64 << 20;

struct VerifyFlags {
  std::string what;
  std::optional<int64_t> step;
  bool repair = false;
  uint64_t bytes_per_second = 0;  // 0: no limit
};

// One checkpoint, what was found, and what --repair did.
struct Checked : CheckedCheckpoint {
  std::string repair;
  std::string state() const {
    if (set_aside) return "set aside";
    return damaged() ? "damaged" : unreadable() ? "unreadable" : "ok";
  }
};

Result<std::vector<Checked>> check_all(const CheckpointPlace& place, const VerifyFlags& flags) {
  std::vector<Checked> all;
  Pace pace(flags.bytes_per_second);
  PENSTOCK_TRY(check_checkpoints(
      place.directory, place.job, {.commit_seq = place.commit_seq, .step = flags.step},
      [&pace](uint64_t bytes) { return pace.spend(bytes); },
      [&all](CheckedCheckpoint checked) {
        all.push_back({std::move(checked), {}});
      }));
  return all;
}

// Sets aside what is damaged, as long as something whole stays. Needs the writer's lock, which a
// coordinator holds only while it commits.
Status repair(const CheckpointPlace& place, const Status& store_file, std::vector<Checked>& all,
              std::string& store_repair) {
  if (!store_file.ok()) {
    PENSTOCK_TRY(restore_store_file(place.directory));
    store_repair = "written again from the manifests";
  }
  PENSTOCK_TRY_ASSIGN(CheckpointStore store, open_store(place));
  for (Checked& checked : all) {
    if (!checked.damaged()) continue;
    const Status aside = store.set_aside(checked.commit_seq);
    checked.repair = aside.ok() ? "set aside as " + set_aside_file_name(checked.commit_seq)
                                : "not repaired: " + aside.message();
  }
  return {};
}

Json to_json(const CheckpointDamage& damage) {
  return {{"file", damage.file},       {"rank", damage.rank ? Json(damage.rank->value) : Json()},
          {"tensors", damage.tensors}, {"tensor_count", damage.tensor_count},
          {"begin", damage.begin},     {"end", damage.end},
          {"message", damage.what}};
}

Json to_json(const Checked& checked) {
  Json damages = Json::array();
  for (const CheckpointDamage& damage : checked.report.damages) damages.push_back(to_json(damage));
  return {{"step", checked.step ? Json(*checked.step) : Json()},
          {"commit_seq", checked.commit_seq},
          {"manifest", checked.manifest_file},
          {"bytes", checked.bytes},
          {"state", checked.state()},
          {"damages", damages},
          {"damage_count", checked.report.damage_count},
          {"repair", checked.repair.empty() ? Json() : Json(checked.repair)}};
}

std::string tensors_text(const CheckpointDamage& damage) {
  if (damage.tensors.empty()) return damage.rank ? "padding" : "-";
  std::string text = damage.tensors.front();
  if (damage.tensor_count > 1) text += fmt::format(" and {} more", damage.tensor_count - 1);
  return text;
}

void print_tables(Output& out, const std::vector<Checked>& all) {
  std::vector<std::vector<std::string>> rows;
  std::vector<std::vector<std::string>> damages;
  for (const Checked& checked : all) {
    rows.push_back({checked.step ? std::to_string(*checked.step) : "-",
                    std::to_string(checked.commit_seq),
                    format_bytes(static_cast<double>(checked.bytes)), checked.state(),
                    checked.manifest_file, checked.repair.empty() ? "-" : shown(checked.repair)});
    if (checked.set_aside) continue;
    for (const CheckpointDamage& damage : checked.report.damages) {
      damages.push_back({std::to_string(checked.commit_seq), damage.file,
                         damage.rank ? std::to_string(damage.rank->value) : "-",
                         damage.end > 0 ? fmt::format("{}:{}", damage.begin, damage.end) : "-",
                         tensors_text(damage), shown(damage.what)});
    }
  }
  out.table({"STEP", "COMMIT", "READ", "STATE", "MANIFEST", "REPAIR"}, rows);
  if (damages.empty()) return;
  out.text("\n");
  out.table({"COMMIT", "FILE", "RANK", "BYTES", "TENSORS", "DAMAGE"}, damages);
}

// Of everything that was looked at.
struct Verdict {
  bool damaged = false;
  Status unreadable;  // the first that kept us from reading something
  std::optional<int64_t> newest_whole;
  uint64_t bytes = 0;

  std::string text() const {
    if (!damaged && unreadable.ok()) return "every byte is whole";
    return fmt::format("{}; {}", damaged ? "damaged" : "not all of it can be read",
                       newest_whole
                           ? fmt::format("the newest whole one is of step {}", *newest_whole)
                           : "none is whole");
  }
};
Verdict judge(const Status& store_file, const std::vector<Checked>& all) {
  Verdict verdict;
  verdict.damaged = !store_file.ok();
  for (const Checked& checked : all) {
    verdict.damaged = verdict.damaged || checked.damaged();
    verdict.bytes += checked.bytes;
    if (checked.report.damage_count == 0 && !checked.set_aside) verdict.newest_whole = checked.step;
    if (checked.unreadable() && verdict.unreadable.ok()) {
      verdict.unreadable = checked.report.damages.front().status;
    }
  }
  return verdict;
}

Result<ExitCode> verify(Cli& cli, const VerifyFlags& flags) {
  PENSTOCK_TRY_ASSIGN(const CheckpointPlace place, find_checkpoint_place(cli, flags.what));
  const Status store_file = check_store_file(place.directory);
  PENSTOCK_TRY_ASSIGN(std::vector<Checked> all, check_all(place, flags));
  if (all.empty()) {
    return not_found(flags.step ? fmt::format("{} holds no checkpoint of step {}",
                                              place.directory.string(), *flags.step)
                                : place.directory.string() + " holds no such checkpoint");
  }
  const Verdict verdict = judge(store_file, all);
  const bool damaged = verdict.damaged;
  std::string store_repair;
  if (damaged && flags.repair) PENSTOCK_TRY(repair(place, store_file, all, store_repair));
  Json items = Json::array();
  for (const Checked& checked : all) items.push_back(to_json(checked));
  cli.out.document({{"apiVersion", "penstock/v1"},
                    {"kind", "CheckpointVerification"},
                    {"directory", place.directory.string()},
                    {"job", place.job.value},
                    {"damaged", damaged},
                    {"store_damage", store_file.ok() ? Json() : Json(store_file.message())},
                    {"store_repair", store_repair.empty() ? Json() : Json(store_repair)},
                    {"items", items}});
  print_tables(cli.out, all);
  if (!store_file.ok()) cli.out.note(store_file.message());
  if (!store_repair.empty()) cli.out.note("STORE was " + store_repair);
  cli.out.note(fmt::format("read {} in {}: {}", format_bytes(static_cast<double>(verdict.bytes)),
                           place.directory.string(), verdict.text()));
  if (damaged && !flags.repair) {
    cli.out.note(fmt::format("next: penstock checkpoint verify {} --repair", flags.what));
  }
  return damaged ? ExitCode::kDataCorrupt : exit_code_of(verdict.unreadable);
}

}  // namespace

void add_checkpoint_verify_verb(CLI::App& checkpoint, Cli& cli) {
  auto flags = std::make_shared<VerifyFlags>();
  CLI::App* verb = add_verb(
      checkpoint, "verify", "Read every byte of checkpoints and name what is damaged",
      "penstock checkpoint verify quickstart\n"
      "penstock checkpoint verify checkpoints/7 --step 120 -o json    # without a coordinator\n"
      "penstock checkpoint verify checkpoints/7 --repair              # set damaged ones aside");
  add_place_options(*verb, flags->what, flags->step, "Only of this step (default: all there are)");
  verb->add_flag("--repair", flags->repair,
                 "Rename the manifests of damaged ones, so that nobody uses them, where another "
                 "checkpoint is whole; write a damaged STORE file again");
  verb->callback([&cli, flags] { cli.action = [&cli, flags] { return verify(cli, *flags); }; });

  auto slow = std::make_shared<VerifyFlags>();
  slow->bytes_per_second = kScrubBytesPerSecond;
  CLI::App* scrub = add_verb(
      checkpoint, "scrub", "Read checkpoints over at a limited rate, as verify does at full speed",
      "penstock checkpoint scrub checkpoints/7 --rate 20MiB\n"
      "penstock checkpoint scrub quickstart -o json");
  add_place_options(*scrub, slow->what, slow->step, "Only of this step (default: all there are)");
  scrub->add_option("--rate", slow->bytes_per_second, "Bytes a second to read, such as 20MiB")
      ->transform(CLI::AsSizeValue(true))
      ->check(CLI::Range(uint64_t{1}, uint64_t{1} << 50))
      ->capture_default_str();
  scrub->callback([&cli, slow] { cli.action = [&cli, slow] { return verify(cli, *slow); }; });
}

}  // namespace penstock
