#include "ops/cli/follow.h"

#include <fmt/format.h>
#include <signal.h>
#include <unistd.h>

#include <cmath>
#include <nlohmann/json.hpp>
#include <thread>
#include <utility>

#include "comm/base/clock.h"
#include "ops/cli/rank_log.h"
#include "ops/cli/text.h"

namespace penstock {

namespace {

using std::chrono::milliseconds;

constexpr milliseconds kHoldBack{1000};      // how long the coordinator may hold an answer back
constexpr milliseconds kStepLookEvery{100};  // steps are no events, so a wait for one looks often
constexpr milliseconds kRetryEvery{500};     // while there is no coordinator
constexpr milliseconds kPlainLineEvery{1000};
constexpr milliseconds kLookEvery{
    150};  // at most so often: fast steps must not turn into a flood of calls

// Made before the handler is installed; a handler may only write and exit.
char detach_message[512];
size_t detach_message_bytes = 0;

void on_interrupt(int) {
  [[maybe_unused]] const ssize_t written =
      ::write(STDERR_FILENO, detach_message, detach_message_bytes);
  ::_exit(static_cast<int>(ExitCode::kInterrupted));
}

std::string evaluation_line(const Json& evaluation) {
  return fmt::format("held-out loss {:.4f} nats/token after step {:.0f}",
                     field_number(evaluation, "loss", NAN), field_number(evaluation, "step"));
}

std::string event_line(const Json& event) {
  return fmt::format("{}  {}", field_string(event, "state"), field_string(event, "message"));
}

int64_t epoch_of(const Json& item) {
  return static_cast<int64_t>(field_number(item, "epoch"));
}

// Whether an event tells of something after a step or evaluation of the run. Times come from
// different hosts, so they count only between what happened in one run of the ranks.
bool follows(const Json& event, const Json& item) {
  if (epoch_of(event) != epoch_of(item)) return epoch_of(event) > epoch_of(item);
  const std::string state = field_string(event, "state");
  if (state == "RUNNING") {
    const bool begins_run = !field_string(event, "from").empty();
    return !begins_run && field_string(event, "time") > field_string(item, "time");
  }
  return state == "RECOVERING" || state == "STOPPING" || state_is_final(state);
}

// What is new since the last look, shown once each, in the order in which it happened.
class Progress {
 public:
  Progress(Output& out, std::string id) : out_(out), id_(std::move(id)) {}

  // `wait`: how long the coordinator may hold the first answer back until there is a new step.
  Status look(PatientClient& client, milliseconds wait) {
    // Read again until no event came in between: nothing that is shown then is older than an event
    // that is not, and of a job that has ended nothing is missing.
    std::vector<Json> events;
    for (bool news = true; news; wait = milliseconds(0)) {
      PENSTOCK_TRY(read_steps(client, wait));
      PENSTOCK_TRY_ASSIGN(job_, client.get(job_path(id_)));
      PENSTOCK_TRY_ASSIGN(news, read_events(client, events));
    }
    show(events);
    return {};
  }

  const Json& job() const { return job_; }

 private:
  Status read_steps(PatientClient& client, milliseconds wait) {
    const auto path = job_path(
        id_, fmt::format("/steps?after={}&limit=10000&wait_ms={}", steps_after_, wait.count()));
    PENSTOCK_TRY_ASSIGN(const Json page, client.get(path, wait));
    steps_after_ = static_cast<int64_t>(field_number(page, "next_after", steps_after_));
    const Json steps = page.value("items", Json::array());
    if (!steps.empty()) newest_step_ = steps.back();
    return {};
  }

  // Returns whether there was one.
  Result<bool> read_events(PatientClient& client, std::vector<Json>& events) {
    const auto path = job_path(id_, fmt::format("/events?after={}&limit=1000", events_after_));
    PENSTOCK_TRY_ASSIGN(const Json page, client.get(path));
    events_after_ = static_cast<int64_t>(field_number(page, "next_after", events_after_));
    const Json items = page.value("items", Json::array());
    for (const Json& event : items) events.push_back(event);
    return !items.empty();
  }

  void show(const std::vector<Json>& events) {
    const bool ended = state_is_final(field_string(job_, "state"));
    const std::vector<Json> evaluations = new_evaluations();
    const bool other_lines = !events.empty() || !evaluations.empty();
    // The newest step, and where between the others it belongs.
    bool step_due = newest_step_.is_object() && (out_.redraws() ? ended : is_due(other_lines));
    const auto show_step = [&] {
      if (std::exchange(step_due, false)) show_newest_step();
    };
    auto evaluation = evaluations.begin();
    const auto show_evaluations = [&](const Json* before) {
      for (; evaluation != evaluations.end(); ++evaluation) {
        if (before != nullptr && !follows(*before, *evaluation)) return;
        if (is_after_newest_step(*evaluation)) show_step();
        out_.note(evaluation_line(*evaluation));
      }
    };
    for (const Json& event : events) {
      show_evaluations(&event);
      if (step_due && follows(event, newest_step_)) show_step();
      show_event(event);
    }
    show_evaluations(nullptr);
    show_step();
    if (!ended) show_live_line();
  }

  void show_live_line() {
    Json now = job_;
    // The numbers of a run that is over say nothing about the one that starts.
    if (epoch_of(newest_step_) != epoch_of(job_)) {
      for (const char* key : {"loss", "tokens_per_second", "eta_seconds"}) now.erase(key);
    }
    out_.redraw(live_line(now));
  }

  void show_event(const Json& event) {
    const std::string code = field_string(event, "code");
    if (code.empty() || (out_.redraws() && shown_by_live_line(code))) return;
    out_.note(event_line(event));
  }

  std::vector<Json> new_evaluations() {
    std::vector<Json> fresh;
    const Json all = job_.value("evaluations", Json::array());
    for (const Json& evaluation : all) {
      const std::pair place(epoch_of(evaluation),
                            static_cast<int64_t>(field_number(evaluation, "step", -1)));
      if (place <= last_evaluation_) continue;
      last_evaluation_ = place;
      fresh.push_back(evaluation);
    }
    return fresh;
  }

  bool is_after_newest_step(const Json& evaluation) const {
    return newest_step_.is_object() &&
           std::pair(epoch_of(evaluation), field_number(evaluation, "step")) >=
               std::pair(epoch_of(newest_step_), field_number(newest_step_, "step"));
  }

  // Where lines stay: a step now and then, and the last one before anything else that is told.
  bool is_due(bool other_lines) const {
    const bool shown = shown_step_ == steps_after_;
    const int64_t since_ns = monotonic_ns() - last_line_ns_;
    return !shown && (other_lines || since_ns >= std::chrono::nanoseconds(kPlainLineEvery).count());
  }

  // As it was when the step was trained, so never "step 0" of a run that starts again.
  void show_newest_step() {
    shown_step_ = steps_after_;
    last_line_ns_ = monotonic_ns();
    Json then = job_;
    if (field_string(job_, "state") != "RUNNING") then["eta_seconds"] = nullptr;
    then["state"] = "RUNNING";
    for (const char* key : {"step", "loss"}) then[key] = newest_step_.value(key, Json());
    if (!out_.redraws()) return out_.note(progress_line(then));
    out_.redraw(progress_line(then));  // the last one, which stays
    out_.end_redraw();
  }

  Output& out_;
  const std::string id_;
  Json job_;
  Json newest_step_;  // null: none yet
  int64_t events_after_ = 0;
  int64_t steps_after_ = 0;  // where newest_step_ is
  int64_t shown_step_ = 0;   // the same of the newest that has a line
  int64_t last_line_ns_ = 0;
  std::pair<int64_t, int64_t> last_evaluation_ = {-1, -1};
};

}  // namespace

Result<Json> PatientClient::get(const std::string& path, milliseconds wait) {
  const int64_t give_up_ns = monotonic_ns() + std::chrono::nanoseconds(kPatience).count();
  for (bool away = false;; away = true) {
    auto answer = client_.get(path, wait);
    const bool unreachable = !answer.ok() && answer.status().code() == Code::kUnavailable;
    if (away && !unreachable) out_.note("the coordinator is back");
    if (!unreachable || monotonic_ns() > give_up_ns) return answer;
    if (!away) {
      out_.note(
          fmt::format("no answer from the coordinator at {}; running jobs go on without it; trying "
                      "again for {}",
                      client_.server(), format_seconds(to_seconds(kPatience))));
    }
    std::this_thread::sleep_for(kRetryEvery);
  }
}

void detach_on_interrupt(const std::string& job_name) {
  const std::string message = fmt::format(
      "\ndetached; job {0} goes on. Come back: penstock wait {0}; end it: penstock cancel {0}\n",
      job_name.substr(0, 64));
  detach_message_bytes = std::min(message.size(), sizeof(detach_message));
  std::copy_n(message.data(), detach_message_bytes, detach_message);
  struct sigaction action = {};
  ::sigaction(SIGINT, nullptr, &action);
  if (action.sa_handler == SIG_IGN) return;  // started in the background: Ctrl-C means another
  action = {};
  action.sa_handler = on_interrupt;
  ::sigaction(SIGINT, &action, nullptr);
}

std::string progress_line(const Json& job) {
  std::string line = fmt::format("step {:.0f}/{:.0f}", field_number(job, "step"),
                                 field_number(job, "target_steps"));
  const double loss = field_number(job, "loss", NAN);
  if (std::isfinite(loss)) line += fmt::format("  loss {:.4f}", loss);
  const double rate = field_number(job, "tokens_per_second", NAN);
  if (std::isfinite(rate)) line += fmt::format("  {} tokens/s", format_quantity(rate));
  const std::string state = field_string(job, "state");
  const double eta = field_number(job, "eta_seconds", NAN);
  if (std::isfinite(eta) && !state_is_final(state)) line += "  eta " + format_seconds(eta);
  return line + "  " + state;
}

std::string live_line(const Json& job) {
  const Json checkpoint = job.value("checkpoint", Json());
  if (!checkpoint.is_object()) return progress_line(job);
  return progress_line(job) + fmt::format("  checkpoint {:.0f}", field_number(checkpoint, "step"));
}

bool shown_by_live_line(const std::string& event_code) {
  return event_code == "placed" || event_code == "loading" || event_code == "running" ||
         event_code == "checkpoint_committed";
}

Result<Json> follow_job(const Client& client, Output& out, const std::string& id) {
  PatientClient patient(client, out);
  Progress progress(out, id);
  PENSTOCK_TRY(progress.look(patient, milliseconds(0)));
  while (!state_is_final(field_string(progress.job(), "state"))) {
    const int64_t looked_ns = monotonic_ns();
    PENSTOCK_TRY(progress.look(patient, kHoldBack));
    std::this_thread::sleep_for(kLookEvery - Duration(monotonic_ns() - looked_ns));
  }
  return progress.job();
}

bool holds(const WaitCondition& condition, const Json& job) {
  if (condition.step) return field_number(job, "step") >= static_cast<double>(*condition.step);
  const std::string state = field_string(job, "state");
  return condition.state.empty() ? state_is_final(state) : state == condition.state;
}

Result<Json> wait_for_job(const Client& client, Output& out, const std::string& id,
                          const WaitCondition& condition) {
  PatientClient patient(client, out);
  const int64_t start_ns = monotonic_ns();
  int64_t events_after = 0;
  while (true) {
    PENSTOCK_TRY_ASSIGN(Json job, patient.get(job_path(id)));
    const std::string state = field_string(job, "state");
    if (holds(condition, job) || state_is_final(state)) return job;

    milliseconds hold_back = condition.step ? kStepLookEvery : kHoldBack;
    if (condition.timeout) {
      const auto left = *condition.timeout - Duration(monotonic_ns() - start_ns);
      if (left <= Duration(0)) {
        return deadline_exceeded(fmt::format("job {} is {} at step {:.0f} after {}; it goes on", id,
                                             state, field_number(job, "step"),
                                             format_seconds(to_seconds(*condition.timeout))));
      }
      hold_back = std::min(hold_back, std::chrono::ceil<milliseconds>(left));
    }
    const auto path = job_path(
        id, fmt::format("/events?after={}&limit=1000&wait_ms={}", events_after, hold_back.count()));
    PENSTOCK_TRY_ASSIGN(const Json events, patient.get(path, hold_back));
    events_after = static_cast<int64_t>(field_number(events, "next_after", events_after));
  }
}

bool is_worth_resuming(const Json& job) {
  const Json failure = job.value("last_failure", Json());
  const bool diverged = failure.is_object() && field_string(failure, "code") == "diverged";
  return field_string(job, "state") == "FAILED" && !diverged;
}

void explain_failure(const Client& client, Output& out, const Json& job) {
  if (field_string(job, "state") != "FAILED") return;
  const Json failure = job.value("last_failure", Json());
  const std::string name = field_string(job, "name");
  if (failure.is_object()) {
    out.note(fmt::format("job {} failed: {}", name, field_string(failure, "message")));
    constexpr size_t kLinesShown = 20;
    RankLog log{
        .rank = static_cast<int64_t>(field_number(failure, "rank", 0)), .partial = {}, .lines = {}};
    PatientClient patient(client, out);
    while (true) {
      const auto more = read_more(patient, field_text(job, "id"), log, milliseconds(0));
      if (!more.ok() || !*more) break;
    }
    const size_t skipped = log.lines.size() - std::min(log.lines.size(), kLinesShown);
    for (size_t i = skipped; i < log.lines.size(); ++i) {
      out.note(fmt::format("  [{}] {}", log.rank, log.lines[i]));
    }
  }
  out.note(fmt::format("next: penstock doctor {0}; penstock logs {0}{1}", name,
                       is_worth_resuming(job) ? "; penstock resume " + name : ""));
}

}  // namespace penstock
