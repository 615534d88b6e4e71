// penstock chaos kill, pause, slow, partition, corrupt: one fault, and what came of it.
#include <fmt/format.h>
#include <signal.h>

#include <CLI/CLI.hpp>
#include <memory>
#include <nlohmann/json.hpp>

#include "comm/control/http_client.h"
#include "ops/cli/checkpoint_damage.h"
#include "ops/cli/cli.h"
#include "ops/cli/dev_cluster.h"
#include "ops/cli/follow.h"
#include "ops/cli/recovery_watch.h"
#include "ops/cli/stop_cycle.h"
#include "ops/cli/text.h"

namespace penstock {

namespace {

using std::chrono::milliseconds;

constexpr milliseconds kSlowPeriod{100};

struct ChaosFlags {
  std::string job, lasts, timeout = "10m";
  int64_t rank = 0;
  double factor = 4.0;
  bool no_kill = false;
};

// The job and the rank that is to suffer, as they are before.
struct Target {
  Client client;
  Json job;
  std::string id;
  int64_t rank = 0;
  LocalProcess process;
  std::string worker;
  Fault fault;
  int64_t events_after = 0;
  int64_t steps_after = 0;
  std::unique_ptr<StopCycle> stops = {};

  std::string rank_words() const {
    return fmt::format("rank {}, process {} on {}", rank, process.pid, worker);
  }
  Json pid_fact() const { return {{"pid", process.pid}}; }
};

// What was done: its name, in words, and what the document says of it.
struct Harm {
  std::string fault;
  std::string what;
  Json facts;
};

Result<DevState> own_cluster(const Cli& cli, const Client& client) {
  const Path folder = dev_state_dir(cli.state_dir);
  PENSTOCK_TRY_ASSIGN(DevState state, load_dev_state(folder));
  if (dev_coordinator_runs(state) && state.server() == client.server()) return state;
  return permission_denied(fmt::format(
      "penstock chaos breaks what runs, so it works on clusters of penstock dev up alone, and the "
      "coordinator at {} is not the one that runs from {}. For a cluster that you may break: "
      "penstock dev up; of another folder: --state-dir",
      client.server(), folder.string()));
}

// What to do about a job that does not train now.
Status not_training(const Json& job) {
  const std::string state = field_string(job, "state");
  const std::string name = field_text(job, "name");
  const std::string next =
      state_is_final(state)  ? "nothing of it runs any more; submit it again: penstock submit SPEC"
      : state == "SUSPENDED" ? "nothing of it runs; penstock resume " + name
                             : fmt::format(
                                   "there is nothing to disturb before it trains; penstock "
                                   "wait {} --for state=RUNNING",
                                   name);
  return failed_precondition(fmt::format("job {} is {}: {}", name, state, next));
}

Result<Target> find_target(const Cli& cli, const ChaosFlags& flags) {
  Target target{
      .client = cli.client(), .job = {}, .id = {}, .process = {}, .worker = {}, .fault = {}};
  PENSTOCK_TRY_ASSIGN(target.job, target.client.job(flags.job));
  PENSTOCK_TRY_ASSIGN(const DevState cluster, own_cluster(cli, target.client));
  const Json& job = target.job;
  target.id = field_text(job, "id");
  target.rank = flags.rank;
  if (field_string(job, "state") != "RUNNING") return not_training(job);
  const Json ranks = job.value("ranks", Json::array());
  if (flags.rank >= std::ssize(ranks)) {
    return not_found(fmt::format("job {} has ranks 0 to {}, no rank {}", field_text(job, "name"),
                                 std::ssize(ranks) - 1, flags.rank));
  }
  target.worker = field_string(ranks[static_cast<size_t>(flags.rank)], "worker");
  PENSTOCK_TRY_ASSIGN(target.process, find_dev_rank(cluster, target.id, flags.rank));
  const auto number = [&](const char* key) { return static_cast<int64_t>(field_number(job, key)); };
  target.fault.epoch = number("epoch");
  target.fault.step = number("highest_step");
  target.steps_after = target.fault.epoch << 32 | number("step");
  PENSTOCK_TRY_ASSIGN(const auto events, target.client.all_items(job_path(target.id, "/events")));
  if (!events.empty()) {
    target.events_after = static_cast<int64_t>(field_number(events.back(), "sequence"));
  }
  return target;
}

Status cut_off(const Target& target, milliseconds span) {
  PENSTOCK_TRY_ASSIGN(const Json workers, target.client.get("/api/v1/workers"));
  std::string address;
  for (const Json& worker : workers.value("items", Json::array())) {
    if (field_string(worker, "name") == target.worker) {
      address = field_string(worker, "http_address");
    }
  }
  PENSTOCK_TRY_ASSIGN(
      const HttpReply reply,
      http_call({.method = "POST",
                 .url = fmt::format("http://{}/chaos/partition?for_ms={}", address, span.count()),
                 .body = {}}));
  if (reply.status == 200) return {};
  return permission_denied(
      fmt::format("{} refuses to be cut off (HTTP status {}); workers that penstock dev up of this "
                  "version started do not: penstock dev down; penstock dev up",
                  target.worker, reply.status));
}

// Follows the job until it is known what came of the fault, or `limit` is over.
Result<Json> watch(Cli& cli, Target& target, RecoveryWatch& recovery, Duration limit) {
  constexpr milliseconds kHeldBack{100};
  PatientClient patient(target.client, cli.out);
  const int64_t deadline_ns = monotonic_ns() + limit.count();
  while (true) {
    PENSTOCK_TRY_ASSIGN(
        const Json steps,
        patient.get(job_path(target.id, fmt::format("/steps?after={}&limit=10000&wait_ms={}",
                                                    target.steps_after, kHeldBack.count())),
                    kHeldBack));
    PENSTOCK_TRY_ASSIGN(const Json events,
                        patient.get(job_path(target.id, fmt::format("/events?after={}&limit=10000",
                                                                    target.events_after))));
    const auto position = [](const Json& page, int64_t before) {
      return static_cast<int64_t>(field_number(page, "next_after", static_cast<double>(before)));
    };
    target.steps_after = position(steps, target.steps_after);
    target.events_after = position(events, target.events_after);
    for (const Json& event : events.value("items", Json::array())) recovery.add_event(event);
    for (const Json& step : steps.value("items", Json::array())) recovery.add_step(step);
    PENSTOCK_TRY_ASSIGN(Json job, patient.get(job_path(target.id)));
    if (recovery.done() || state_is_final(field_string(job, "state"))) return job;
    if (monotonic_ns() > deadline_ns) {
      return deadline_exceeded(
          fmt::format("job {} is {} and has not finished a new step {} after the fault; penstock "
                      "doctor {}",
                      field_text(job, "name"), field_string(job, "state"),
                      format_seconds(to_seconds(limit)), field_text(job, "name")));
    }
  }
}

Json document_of(const Target& target, const Harm& harm) {
  Json document = {{"apiVersion", "penstock/v1"},
                   {"kind", "ChaosReport"},
                   {"fault", harm.fault},
                   {"job", target.job.value("id", Json())},
                   {"name", field_text(target.job, "name")},
                   {"rank", target.rank},
                   {"worker", target.worker},
                   {"step", target.fault.step}};
  if (harm.facts.is_object()) document.update(harm.facts);
  return document;
}

std::string fault_text(const Target& target, const Harm& harm) {
  return fmt::format("{:<12}{} after step {}: {}\n", "fault", harm.fault, target.fault.step,
                     harm.what);
}

// Waits for what comes of the fault, and says it.
Result<ExitCode> report(Cli& cli, Target& target, const Harm& harm, Duration limit) {
  cli.out.note(fmt::format("{} of job {} \"{}\" is done; waiting for what comes of it", harm.fault,
                           target.id, field_text(target.job, "name")));
  RecoveryWatch recovery(target.fault);
  PENSTOCK_TRY_ASSIGN(const Json job, watch(cli, target, recovery, limit));
  Json document = document_of(target, harm);
  document.update({{"time", format_utc(target.fault.at)},
                   {"seconds", to_seconds(target.fault.lasts)},
                   {"state", job.value("state", Json())}});
  document.update(recovery.document());
  cli.out.document(document);
  cli.out.text(fault_text(target, harm) + recovery_text(document));
  if (recovery.done()) return ExitCode::kOk;
  cli.out.text(fmt::format("{:<12}{}: {}\n", "ended", field_string(job, "state"),
                           field_string(job.value("reason", Json::object()), "message")));
  return exit_code_of_job(job);
}

Result<Duration> duration_of(const char* flag, const std::string& text) {
  const auto span = parse_duration(text);
  if (!span.ok()) return span.status().with_context(flag);
  if (*span > milliseconds(0)) return Duration(*span);
  return invalid_argument(fmt::format("{} {}: more than no time", flag, text));
}

Result<Harm> kill_rank(Target& target, const ChaosFlags&) {
  target.fault.ends_attempt = true;
  PENSTOCK_TRY(send_signal(target.process, SIGKILL));
  return Harm{"kill", fmt::format("SIGKILL of {}", target.rank_words()), target.pid_fact()};
}

Harm stop_again_and_again(Target& target, const char* fault, StopRhythm rhythm,
                          const std::string& how) {
  target.stops = std::make_unique<StopCycle>(target.process, rhythm, target.fault.lasts);
  return {fault,
          fmt::format("{} of {}, for {:.1f} s", how, target.rank_words(),
                      to_seconds(target.fault.lasts)),
          target.pid_fact()};
}

Result<Harm> pause_rank(Target& target, const ChaosFlags&) {
  return stop_again_and_again(target, "pause", {.stopped = target.fault.lasts}, "SIGSTOP");
}

Result<Harm> slow_rank(Target& target, const ChaosFlags& flags) {
  const Duration running(static_cast<int64_t>(Duration(kSlowPeriod).count() / flags.factor));
  const StopRhythm rhythm{.stopped = kSlowPeriod - running, .running = running};
  return stop_again_and_again(
      target, "slow", rhythm,
      fmt::format("stop for {:.0f}% of the time", 100.0 * (1.0 - 1.0 / flags.factor)));
}

Result<Harm> partition(Target& target, const ChaosFlags&) {
  PENSTOCK_TRY(cut_off(target, std::chrono::ceil<milliseconds>(target.fault.lasts)));
  return Harm{"partition",
              fmt::format("{}, which runs rank {}, cut off from the coordinator for {:.1f} s",
                          target.worker, target.rank, to_seconds(target.fault.lasts)),
              {}};
}

Result<Harm> damage(const Target& target) {
  PENSTOCK_TRY_ASSIGN(const FlippedByte flipped,
                      flip_byte(field_string(target.job, "checkpoint_dir"),
                                JobId{static_cast<uint64_t>(field_number(target.job, "id"))},
                                Rank{static_cast<int32_t>(target.rank)}));
  return Harm{"corrupt",
              fmt::format("byte {} of {} inverted, in {} of the checkpoint of step {}",
                          flipped.offset, flipped.file, flipped.tensor, flipped.step),
              {{"file", flipped.file},
               {"offset", flipped.offset},
               {"tensor", flipped.tensor},
               {"checkpoint_step", flipped.step}}};
}

// Not by SIGKILL, after which the job would go on from what the daemons hold in memory: after any
// other signal its daemon takes that for damaged, and the checkpoint is loaded.
Result<Harm> corrupt(Target& target, const ChaosFlags&) {
  PENSTOCK_TRY_ASSIGN(Harm harm, damage(target));
  target.fault.ends_attempt = true;
  target.fault.at = wall_now();
  PENSTOCK_TRY(send_signal(target.process, SIGUSR1));
  harm.what += fmt::format("; then SIGUSR1 to {}, so that it is loaded", target.rank_words());
  harm.facts.update(target.pid_fact());
  return harm;
}

using Inflict = Result<Harm> (*)(Target&, const ChaosFlags&);

Result<ExitCode> disturb(Cli& cli, const ChaosFlags& flags, Inflict inflict) {
  PENSTOCK_TRY_ASSIGN(const Duration limit, duration_of("--timeout", flags.timeout));
  Duration lasts{};
  if (!flags.lasts.empty()) {
    PENSTOCK_TRY_ASSIGN(lasts, duration_of("--for", flags.lasts));
  }
  PENSTOCK_TRY_ASSIGN(Target target, find_target(cli, flags));
  target.fault.lasts = lasts;
  target.fault.at = wall_now();
  PENSTOCK_TRY_ASSIGN(const Harm harm, inflict(target, flags));
  // Where the rank is to run again first, that sees to interrupts.
  if (!target.stops) detach_on_interrupt(field_text(target.job, "name"));
  return report(cli, target, harm, limit);
}

Result<ExitCode> only_damage(Cli& cli, const ChaosFlags& flags) {
  PENSTOCK_TRY_ASSIGN(const Target target, find_target(cli, flags));
  PENSTOCK_TRY_ASSIGN(const Harm harm, damage(target));
  Json document = document_of(target, harm);
  document["outcome"] = "pending";
  cli.out.document(document);
  cli.out.text(fault_text(target, harm));
  cli.out.note("whoever loads that checkpoint next must notice it: penstock checkpoint verify " +
               field_text(target.job, "name"));
  return ExitCode::kOk;
}

CLI::App* add_fault(CLI::App& chaos, Cli& cli, const std::string& name,
                    const std::string& description, const std::string& examples, Inflict inflict,
                    const std::shared_ptr<ChaosFlags>& flags) {
  CLI::App* verb = add_verb(chaos, name, description, examples);
  verb->add_option("job", flags->job, "Name or id")->required();
  verb->add_option("--rank", flags->rank, "Which")->required()->check(rank_number());
  verb->add_option("--timeout", flags->timeout, "Give up with exit code 7 after this long")
      ->capture_default_str();
  verb->callback([&cli, flags, inflict] {
    cli.action = [&cli, flags, inflict] {
      return flags->no_kill ? only_damage(cli, *flags) : disturb(cli, *flags, inflict);
    };
  });
  return verb;
}

void add_lasts(CLI::App& verb, const std::shared_ptr<ChaosFlags>& flags,
               const std::string& otherwise) {
  flags->lasts = otherwise;
  verb.add_option("--for", flags->lasts, "For how long")->capture_default_str();
}

}  // namespace

void add_chaos_verbs(CLI::App& app, Cli& cli) {
  CLI::App* chaos =
      add_verb(app, "chaos", "Break something on a dev cluster, and say how the job recovered",
               "penstock chaos kill quickstart --rank 2\n"
               "penstock chaos corrupt quickstart --rank 0 -o json");
  chaos->require_subcommand(1);
  chaos->add_option("--state-dir", cli.state_dir,
                    "Folder of the dev cluster (default: as for penstock dev)");
  const auto flags = [] { return std::make_shared<ChaosFlags>(); };

  add_fault(*chaos, cli, "kill", "SIGKILL of one rank", "penstock chaos kill quickstart --rank 2",
            kill_rank, flags());

  const auto pause = flags();
  add_lasts(*add_fault(*chaos, cli, "pause", "Stop one rank for a time, by SIGSTOP and SIGCONT",
                       "penstock chaos pause quickstart --rank 2 --for 5s", pause_rank, pause),
            pause, "5s");

  const auto slow = flags();
  CLI::App* slow_verb = add_fault(
      *chaos, cli, "slow", "Make one rank slower for a time, by stopping it ten times a second",
      "penstock chaos slow quickstart --rank 2 --factor 4 --for 30s", slow_rank, slow);
  add_lasts(*slow_verb, slow, "10s");
  slow_verb->add_option("--factor", slow->factor, "It computes for one part in so many of the time")
      ->capture_default_str()
      ->check(CLI::Range(1.1, 100.0));

  const auto cut = flags();
  add_lasts(*add_fault(*chaos, cli, "partition",
                       "Cut the worker of one rank off from the coordinator for a time",
                       "penstock chaos partition quickstart --rank 2 --for 10s", partition, cut),
            cut, "10s");

  const auto damaged = flags();
  add_fault(*chaos, cli, "corrupt",
            "Invert a byte of what one rank saved last, and end it, so that it is loaded",
            "penstock chaos corrupt quickstart --rank 2\n"
            "penstock chaos corrupt quickstart --rank 2 --no-kill",
            corrupt, damaged)
      ->add_flag("--no-kill", damaged->no_kill, "Only damage it; do not wait for anything");
}

}  // namespace penstock
