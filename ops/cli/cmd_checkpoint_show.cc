// penstock checkpoint show and diff: what a checkpoint holds, and how two of them differ.
#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <cmath>
#include <cstdlib>
#include <memory>
#include <nlohmann/json.hpp>

#include "checkpoint/census.h"
#include "checkpoint/compare.h"
#include "checkpoint/marks.h"
#include "checkpoint/store.h"
#include "comm/run/job_spec.h"
#include "ops/cli/checkpoint_place.h"
#include "ops/cli/text.h"

namespace penstock {

namespace {

struct ShowFlags {
  std::string what;
  std::optional<int64_t> step;
  std::string tensor;
};

std::string bytes_text(uint64_t bytes) {
  return format_bytes(static_cast<double>(bytes));
}

std::string shape_text(const std::vector<int64_t>& shape) {
  return fmt::format("[{}]", fmt::join(shape, ", "));
}

Json census_json(const Census& census) {
  Json kinds = Json::object();
  for (const auto& [kind, sum] : census.kinds) {
    kinds[std::string(kind_name(kind))] = {{"tensors", sum.tensor_count}, {"bytes", sum.bytes}};
  }
  return {{"text", census.sentence()},
          {"layers", census.layer_count},
          {"expert_layers", census.expert_layer_count},
          {"experts", census.experts_max},
          {"parameters", census.parameter_count},
          {"optimizer_complete", census.optimizer_complete()},
          {"missing", census.missing},
          {"missing_count", census.missing_count},
          {"kinds", kinds}};
}

Json segments_json(const Manifest& manifest) {
  Json segments = Json::array();
  for (const ManifestSegment& segment : manifest.segments) {
    segments.push_back({{"file", segment.file},
                        {"rank", segment.rank.value},
                        {"bytes", segment.byte_count},
                        {"footer_digest", to_hex(segment.footer_digest)}});
  }
  return segments;
}

Result<ExitCode> show_tensor(Cli& cli, const Manifest& manifest, const std::string& name) {
  const ManifestTensor* tensor = manifest.find(name);
  if (tensor == nullptr) {
    return not_found(
        fmt::format("the checkpoint of step {} has no tensor {}", manifest.step, name));
  }
  const bool digests = manifest.has_tensor_digests();
  Json pieces = Json::array();
  std::vector<std::vector<std::string>> rows;
  for (const ManifestPiece& piece : tensor->pieces) {
    const ManifestSegment& segment = manifest.segments[piece.segment];
    pieces.push_back({{"file", segment.file},
                      {"rank", segment.rank.value},
                      {"offset", piece.box.offset},
                      {"size", piece.box.size},
                      {"digest", to_hex(piece.digest)}});
    rows.push_back({to_string(piece.box), std::to_string(segment.rank.value), to_hex(piece.digest),
                    segment.file});
  }
  const TensorSlice whole = whole_tensor(tensor->name, tensor->dtype, tensor->shape);
  cli.out.document({{"apiVersion", "penstock/v1"},
                    {"kind", "CheckpointTensor"},
                    {"step", manifest.step},
                    {"name", tensor->name},
                    {"dtype", dtype_name(tensor->dtype)},
                    {"shape", tensor->shape},
                    {"bytes", byte_count(whole)},
                    {"digest", digests ? Json(to_hex(tensor->digest())) : Json()},
                    {"pieces", pieces}});
  cli.out.text(fmt::format("tensor  {}\ntype    {} {}, {}\ndigest  {}\n\n", tensor->name,
                           dtype_name(tensor->dtype), shape_text(tensor->shape),
                           bytes_text(byte_count(whole)),
                           digests ? to_hex(tensor->digest()) : "- (format 1)"));
  cli.out.table({"BOX", "RANK", "DIGEST", "SEGMENT"}, rows);
  return ExitCode::kOk;
}

// Facts of a spec that may be another version's, which this program does not read.
struct SpecFacts {
  std::string name = "-";
  Json seed;
};
SpecFacts spec_facts(Output& out, const Manifest& manifest) {
  const Result<JobSpec> spec = parse_job_spec(manifest.spec_json, "the checkpoint's spec");
  if (spec.ok()) return {spec->name, spec->training.seed};
  out.note(shown(spec.status().message()));
  return {};
}

Result<ExitCode> show(Cli& cli, const ShowFlags& flags) {
  PENSTOCK_TRY_ASSIGN(const CheckpointPlace place, find_checkpoint_place(cli, flags.what));
  PENSTOCK_TRY_ASSIGN(const ChosenCheckpoint chosen, choose_checkpoint(cli, place, flags.step));
  const Manifest& manifest = chosen.stored.manifest;
  if (!flags.tensor.empty()) return show_tensor(cli, manifest, flags.tensor);
  PENSTOCK_TRY_ASSIGN(const std::set<uint64_t> pinned, pinned_checkpoints(chosen.directory));
  const bool is_pinned = pinned.contains(manifest.commit_seq);
  const Status whole = check_segments(chosen.directory, manifest);
  const Census census = take_census(manifest);
  const SpecFacts spec = spec_facts(cli.out, manifest);
  const std::string build = manifest.build.empty() ? "-" : manifest.build;
  cli.out.document({{"apiVersion", "penstock/v1"},
                    {"kind", "Checkpoint"},
                    {"step", manifest.step},
                    {"commit_seq", manifest.commit_seq},
                    {"job", manifest.job.value},
                    {"name", spec.name},
                    {"epoch", manifest.epoch.value},
                    {"created_at", format_utc(manifest.created_at)},
                    {"manifest", manifest_file_name(manifest.commit_seq)},
                    {"manifest_digest", to_hex(chosen.stored.digest)},
                    {"previous_commit_seq", manifest.previous_commit_seq},
                    {"store", to_hex(manifest.store)},
                    {"format", manifest.version},
                    {"build", build},
                    {"layout", manifest.layout},
                    {"seed", spec.seed},
                    {"spec_digest", to_hex(manifest.spec_digest)},
                    {"pinned", is_pinned},
                    {"bytes", manifest.payload_bytes()},
                    {"tensors", manifest.tensors.size()},
                    {"census", census_json(census)},
                    {"segments", segments_json(manifest)},
                    {"damage", whole.ok() ? Json() : Json(whole.message())}});
  cli.out.text(fmt::format(
      "checkpoint  step {}, commit {}{}\njob         {} \"{}\", epoch {}\nwritten     {} by "
      "penstock {}\nholds       {}\nlayout      {}\nseed        {}\nspec        {}\nsegments    {} "
      "in {}\n\n",
      manifest.step, manifest.commit_seq, is_pinned ? ", pinned" : "", manifest.job.value,
      shown(spec.name), manifest.epoch.value, format_utc(manifest.created_at), shown(build),
      census.sentence(), shown(manifest.layout), spec.seed.dump(), to_hex(manifest.spec_digest),
      manifest.segments.size(), whole.ok() ? "place, sizes and footers right" : "DAMAGE"));
  std::vector<std::vector<std::string>> rows;
  for (const auto& [kind, sum] : census.kinds) {
    rows.push_back(
        {std::string(kind_name(kind)), std::to_string(sum.tensor_count), bytes_text(sum.bytes)});
  }
  cli.out.table({"KIND", "TENSORS", "SIZE"}, rows);
  if (!whole.ok()) cli.out.note(whole.message());
  for (const std::string& name : census.missing) cli.out.note("missing: " + name);
  return whole.ok() ? ExitCode::kOk : ExitCode::kDataCorrupt;
}

struct DiffFlags {
  std::string a;
  std::string b;
  bool values = false;
};

std::string_view kind_text(TensorDifference::Kind kind) {
  switch (kind) {
    case TensorDifference::Kind::kOnlyInA:
      return "only in A";
    case TensorDifference::Kind::kOnlyInB:
      return "only in B";
    case TensorDifference::Kind::kShape:
      return "shape or type";
    case TensorDifference::Kind::kValues:
      return "values";
  }
  std::abort();
}

Result<ExitCode> diff(Cli& cli, const DiffFlags& flags) {
  PENSTOCK_TRY_ASSIGN(const ChosenCheckpoint a, choose_checkpoint(cli, flags.a));
  PENSTOCK_TRY_ASSIGN(const ChosenCheckpoint b, choose_checkpoint(cli, flags.b));
  PENSTOCK_TRY_ASSIGN(const Comparison comparison,
                      compare_checkpoints({a.directory, a.stored.manifest},
                                          {b.directory, b.stored.manifest}, flags.values));
  Json items = Json::array();
  std::vector<std::vector<std::string>> rows;
  for (const TensorDifference& difference : comparison.differences) {
    // JSON has no infinity: a NaN on one side is a difference without a size.
    const bool finite = difference.max_abs && std::isfinite(*difference.max_abs);
    items.push_back({{"tensor", difference.name},
                     {"difference", kind_text(difference.kind)},
                     {"elements", flags.values ? Json(difference.element_count) : Json()},
                     {"max_abs", finite ? Json(*difference.max_abs) : Json()}});
    rows.push_back({difference.name, std::string(kind_text(difference.kind))});
    if (!flags.values) continue;
    rows.back().push_back(std::to_string(difference.element_count));
    rows.back().push_back(difference.max_abs ? fmt::format("{:.6g}", *difference.max_abs) : "-");
  }
  const auto side = [](const ChosenCheckpoint& chosen) {
    const Manifest& manifest = chosen.stored.manifest;
    return Json{{"directory", chosen.directory.string()},
                {"step", manifest.step},
                {"commit_seq", manifest.commit_seq},
                {"layout", manifest.layout}};
  };
  cli.out.document({{"apiVersion", "penstock/v1"},
                    {"kind", "CheckpointDifference"},
                    {"a", side(a)},
                    {"b", side(b)},
                    {"equal", comparison.equal()},
                    {"equal_tensors", comparison.equal_count},
                    {"items", items}});
  std::vector<std::string> headers = {"TENSOR", "DIFFERENCE"};
  if (flags.values) headers.insert(headers.end(), {"ELEMENTS", "MAX ABS"});
  if (!comparison.equal()) cli.out.table(headers, rows);
  cli.out.note(fmt::format("{} tensors are equal, {} differ", comparison.equal_count,
                           comparison.differences.size()));
  return comparison.equal() ? ExitCode::kOk : ExitCode::kFailure;
}

}  // namespace

void add_checkpoint_show_verbs(CLI::App& checkpoint, Cli& cli) {
  auto flags = std::make_shared<ShowFlags>();
  CLI::App* show_verb =
      add_verb(checkpoint, "show", "Show what a checkpoint holds",
               "penstock checkpoint show quickstart\n"
               "penstock checkpoint show checkpoints/7 --step 120 --tensor lm_head.weight -o json");
  add_place_options(*show_verb, flags->what, flags->step);
  show_verb->add_option("--tensor", flags->tensor,
                        "One tensor: its digest, and who holds its parts");
  show_verb->callback([&cli, flags] { cli.action = [&cli, flags] { return show(cli, *flags); }; });

  auto sides = std::make_shared<DiffFlags>();
  CLI::App* diff_verb = add_verb(checkpoint, "diff",
                                 "Compare two checkpoints tensor by tensor, whatever their layouts",
                                 "penstock checkpoint diff quickstart@60 quickstart@120 --values\n"
                                 "penstock checkpoint diff checkpoints/7 other/checkpoints/9@120   "
                                 " # exit code 1: they differ");
  diff_verb->add_option("a", sides->a, "Job, directory or manifest; @STEP: not the newest")
      ->required();
  diff_verb->add_option("b", sides->b, "The same")->required();
  diff_verb->add_flag("--values", sides->values, "Read tensors that differ, and say by how much");
  diff_verb->callback([&cli, sides] { cli.action = [&cli, sides] { return diff(cli, *sides); }; });
}

}  // namespace penstock
