// penstock program: what each rank of a job will do in a step, as a picture, a list or JSON. Asks
// no coordinator.
#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <cmath>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>

#include "comm/base/counted.h"
#include "comm/run/layout.h"
#include "coordinator/plan/schedule.h"
#include "coordinator/plan/virtual_time.h"
#include "ops/cli/cli.h"
#include "ops/cli/program_picture.h"
#include "ops/cli/spec_file.h"

namespace penstock {

namespace {

struct ProgramFlags {
  std::string spec;
  int rank = -1;
  int64_t step = 1;
  bool evaluation = false;
  double forward = 1.0;
  double backward = 2.0;
  double weight = 1.0;
  std::optional<double> pair;
  double backward_tail = 0.0;
  double pair_tail = 0.0;
  double send = 0.0;
};

// A job's programs, and what became of them in virtual time.
struct Plan {
  JobSpec spec;
  ParallelismSpec step_layout;    // of the step that is shown: a batch-size ramp has several
  std::vector<Program> programs;  // by pipeline index; `training` is that step's
  OperationCosts costs;
  Timeline training;
  Timeline evaluation;
  const ParallelismSpec& layout(ProgramKind kind = ProgramKind::kTraining) const {
    return kind == ProgramKind::kTraining ? step_layout : spec.parallelism;
  }
  const Timeline& timeline(ProgramKind kind) const {
    return kind == ProgramKind::kTraining ? training : evaluation;
  }
};

Result<OperationCosts> costs_of(const ProgramFlags& flags) {
  const double pair = flags.pair.value_or(flags.forward + flags.backward);
  for (const double seconds : {flags.forward, flags.backward, flags.weight, pair}) {
    if (!(seconds > 0.0 && seconds <= 1e6)) {
      return invalid_argument(
          "--forward, --backward, --weight and --pair are above 0 and at most 1e6");
    }
  }
  if (flags.weight >= flags.backward) {
    return invalid_argument("--weight is a part of --backward, and must be shorter");
  }
  if (!(flags.backward_tail >= 0.0 && flags.backward_tail <= flags.weight &&
        flags.pair_tail >= 0.0 && flags.pair_tail <= flags.weight)) {
    return invalid_argument("--backward-tail and --pair-tail are 0 to --weight");
  }
  if (!(flags.send >= 0.0 && flags.send <= 1e6)) return invalid_argument("--send is 0 to 1e6");
  return OperationCosts{.forward = flags.forward,
                        .backward = flags.backward,
                        .backward_input = flags.backward - flags.weight,
                        .backward_weight = flags.weight,
                        .pair = pair,
                        .backward_tail = flags.backward_tail,
                        .pair_tail = flags.pair_tail,
                        .send = flags.send};
}

Result<Plan> make_plan(const ProgramFlags& flags) {
  Plan plan;
  PENSTOCK_TRY_ASSIGN(plan.costs, costs_of(flags));
  PENSTOCK_TRY_ASSIGN(const SpecSource source, read_spec(flags.spec));
  PENSTOCK_TRY_ASSIGN(plan.spec, parse_job_spec(source.text, source.origin));
  PENSTOCK_TRY_ASSIGN(plan.programs, make_programs(plan.spec.parallelism));
  const int64_t microbatches = plan.spec.microbatches_at(flags.step);
  plan.step_layout = plan.spec.parallelism.with_microbatches(microbatches);
  for (Program& program : plan.programs) {
    for (const ResizedTraining& resized : program.resized) {
      if (resized.microbatches == microbatches) program.training = resized.training;
    }
  }
  const auto timeline = [&](ProgramKind kind) {
    return run_in_virtual_time(plan.layout(kind), plan.programs, kind, plan.costs);
  };
  PENSTOCK_TRY_ASSIGN(plan.training, timeline(ProgramKind::kTraining));
  PENSTOCK_TRY_ASSIGN(plan.evaluation, timeline(ProgramKind::kEvaluation));
  return plan;
}

// --- JSON

Json instruction_json(const Instruction& i, const Span& span) {
  Json json = {
      {"text", to_string(i)}, {"op", op_name(i.op)}, {"begin", span.begin}, {"end", span.end}};
  if (i.microbatch >= 0) {
    json["direction"] = i.direction;
    json["microbatch"] = i.microbatch;
  }
  if (i.backward_microbatch >= 0) {
    json["backward_direction"] = i.backward_direction;
    json["backward_microbatch"] = i.backward_microbatch;
  }
  if (i.peer >= 0) json["peer"] = i.peer;
  return json;
}

Json instructions_json(const Plan& plan, size_t index, ProgramKind kind) {
  const std::vector<Instruction>& list = instructions_of(plan.programs[index], kind);
  const RankTimeline& timeline = plan.timeline(kind).ranks[index];
  Json items = Json::array();
  for (size_t i = 0; i < list.size(); ++i) {
    items.push_back(instruction_json(list[i], timeline.spans[i]));
  }
  return items;
}

Json rank_json(const Plan& plan, size_t index) {
  const auto pipeline_index = static_cast<int64_t>(index);
  const RankTimeline& timeline = plan.training.ranks[index];
  Json ranks = Json::array();
  for (int32_t r = 0; r < plan.layout().world_size(); ++r) {
    if (grid_position(plan.layout(), Rank{r}).pipeline_index == pipeline_index) ranks.push_back(r);
  }
  return {{"pipeline_index", index},
          {"ranks", ranks},
          {"stages", stages_of(plan.layout(), pipeline_index)},
          {"busy", timeline.busy},
          {"idle", timeline.idle},
          {"live_activations_max", timeline.live_max},
          {"training", instructions_json(plan, index, ProgramKind::kTraining)},
          {"evaluation", instructions_json(plan, index, ProgramKind::kEvaluation)}};
}

Json plan_json(const Plan& plan, std::optional<size_t> only) {
  Json ranks = Json::array();
  for (size_t index = 0; index < plan.programs.size(); ++index) {
    if (!only || *only == index) ranks.push_back(rank_json(plan, index));
  }
  return {{"apiVersion", "penstock/v1"},
          {"kind", "ProgramSet"},
          {"name", plan.spec.name},
          {"schedule", to_string(plan.layout().schedule)},
          {"pipeline", plan.layout().pipeline},
          {"stages", stage_count(plan.layout())},
          {"microbatches", plan.layout().microbatches},
          {"costs",
           {{"forward", plan.costs.forward},
            {"backward", plan.costs.backward},
            {"backward_input", plan.costs.backward_input},
            {"backward_weight", plan.costs.backward_weight},
            {"pair", plan.costs.pair},
            {"backward_tail", plan.costs.backward_tail},
            {"pair_tail", plan.costs.pair_tail},
            {"send", plan.costs.send}}},
          {"makespan", plan.training.makespan},
          {"bubble", plan.training.bubble()},
          {"bubble_by_formula", bubble_by_formula(plan.layout(), plan.costs)},
          {"pipeline_ranks", ranks}};
}

// --- text

std::string formula_text(const ParallelismSpec& layout, const OperationCosts& costs) {
  const std::string_view pair = costs.pair_tail > 0 ? "pair-tail" : "pair";
  const std::string_view backward = costs.backward_tail > 0 ? "B-tail" : "B";
  switch (layout.schedule) {
    case Schedule::kDualPipe:
      return layout.pipeline == 1 ? "0" : fmt::format("(P/2-1)({}+B-3W)", pair);
    case Schedule::kDualPipeV:
      return fmt::format("(P-1)({}+B-3W)", pair);
    case Schedule::kZeroBubble:
      return "(P-1)(F+B-2W)";
    case Schedule::kOneForwardOneBackward:
      return fmt::format("(P-1)(F+{})", backward);
  }
  return "";
}

std::string summary(const Plan& plan, ProgramKind kind) {
  const ParallelismSpec& layout = plan.layout(kind);
  const Timeline& timeline = plan.timeline(kind);
  std::string text = fmt::format(
      "{}, {}, {}, {}", to_string(layout.schedule), counted(layout.pipeline, "rank"),
      counted(stage_count(layout), "stage"), counted(layout.microbatches, "micro-batch"));
  const int64_t replicas = layout.expert * layout.data;
  if (replicas > 1) text += fmt::format("; {} such pipelines", replicas);
  const double bubble = timeline.bubble();
  text += fmt::format("\nF {:g}, B {:g}, W {:g}, pair {:g}, send {:g}: a step takes {:g}\n",
                      plan.costs.forward, plan.costs.backward, plan.costs.backward_weight,
                      plan.costs.pair, plan.costs.send, timeline.makespan);
  text += fmt::format("bubble {:g}, {:.1f}% of it", bubble, 100 * bubble / timeline.makespan);
  if (kind == ProgramKind::kTraining) {
    text += fmt::format("; by formula {} = {:g}", formula_text(layout, plan.costs),
                        bubble_by_formula(layout, plan.costs));
  }
  return text + "\n\n";
}

void list_rank(Output& out, const Plan& plan, size_t index, ProgramKind kind) {
  const std::vector<Instruction>& list = instructions_of(plan.programs[index], kind);
  const RankTimeline& timeline = plan.timeline(kind).ranks[index];
  std::vector<std::vector<std::string>> rows;
  for (size_t i = 0; i < list.size(); ++i) {
    const Span& span = timeline.spans[i];
    rows.push_back({std::to_string(i), fmt::format("{:.6g}", span.begin),
                    fmt::format("{:.6g}", span.end), to_string(list[i])});
  }
  out.table({"INDEX", "BEGIN", "END", "INSTRUCTION"}, rows);
}

Result<ExitCode> program(Cli& cli, const ProgramFlags& flags) {
  PENSTOCK_TRY_ASSIGN(const Plan plan, make_plan(flags));
  const int64_t world_size = plan.layout().world_size();
  std::optional<size_t> index;
  if (flags.rank >= 0) {
    if (flags.rank >= world_size) {
      return not_found(
          fmt::format("no rank {}: {} has ranks 0 to {}", flags.rank, flags.spec, world_size - 1));
    }
    index = static_cast<size_t>(grid_position(plan.layout(), Rank{flags.rank}).pipeline_index);
  }
  cli.out.document(plan_json(plan, index));
  const ProgramKind kind = flags.evaluation ? ProgramKind::kEvaluation : ProgramKind::kTraining;
  if (index) {
    list_rank(cli.out, plan, *index, kind);
    return ExitCode::kOk;
  }
  cli.out.text(summary(plan, kind));
  cli.out.text(draw_programs(plan.layout(kind), plan.programs, kind, plan.timeline(kind),
                             {.columns = cli.out.columns(), .colour = cli.out.colour()}));
  return ExitCode::kOk;
}

}  // namespace

void add_program_verb(CLI::App& app, Cli& cli) {
  auto flags = std::make_shared<ProgramFlags>();
  CLI::App* verb = add_verb(app, "program", "Show what each rank does in a step, and when",
                            "penstock program docs/examples/quickstart.yaml\n"
                            "penstock program job.yaml --pair 2.5        # what overlap gains\n"
                            "penstock program job.yaml --rank 3          # its instructions\n"
                            "penstock program job.yaml -o json | jq .bubble");
  verb->add_option("spec", flags->spec, "Job spec, YAML or JSON (docs/job-spec.md); -: read stdin")
      ->required();
  verb->add_option("--rank", flags->rank, "List this rank's instructions instead of the picture")
      ->check(rank_number());
  verb->add_option("--step", flags->step,
                   "The step to show, where parallelism has a batch-size ramp")
      ->check(CLI::Range(int64_t{1}, int64_t{1'000'000'000}))
      ->capture_default_str();
  verb->add_flag("--evaluation", flags->evaluation, "The forward-only program of an evaluation");
  verb->add_option("--forward", flags->forward, "Seconds of a forward")->capture_default_str();
  verb->add_option("--backward", flags->backward, "Seconds of a full backward")
      ->capture_default_str();
  verb->add_option("--weight", flags->weight, "Seconds of a backward's weight part")
      ->capture_default_str();
  verb->add_option("--pair", flags->pair,
                   "Seconds of an overlapped forward and backward (default: their sum)");
  verb->add_option("--backward-tail", flags->backward_tail,
                   "Seconds a full backward still takes when its gradient leaves")
      ->capture_default_str();
  verb->add_option("--pair-tail", flags->pair_tail,
                   "Seconds a pair still takes when its output and gradient leave")
      ->capture_default_str();
  verb->add_option("--send", flags->send, "Seconds from one rank to the next")
      ->capture_default_str();
  verb->callback([&cli, flags] { cli.action = [&cli, flags] { return program(cli, *flags); }; });
}

}  // namespace penstock
