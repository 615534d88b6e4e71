#include "ops/cli/follow.h"

#include <fmt/format.h>
#include <signal.h>
#include <unistd.h>

#include <cmath>
#include <nlohmann/json.hpp>
#include <thread>

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

// What is new since the last look, shown once each.
class Progress {
 public:
  Progress(Output& out, std::string id) : out_(out), id_(std::move(id)) {}

  Status look(PatientClient& client) {
    PENSTOCK_TRY_ASSIGN(
        const Json events,
        client.get(job_path(id_, fmt::format("/events?after={}&limit=1000", events_after_))));
    events_after_ = static_cast<int64_t>(field_number(events, "next_after", events_after_));
    PENSTOCK_TRY_ASSIGN(job_, client.get(job_path(id_)));
    const bool ended = state_is_final(field_string(job_, "state"));
    if (ended) show_step(ended);
    for (const Json& evaluation : job_.value("evaluations", Json::array())) {
      show_evaluation(evaluation);
    }
    // After the last step and the held-out losses, so that the last line says how the job ended.
    for (const Json& event : events.value("items", Json::array())) show_event(event);
    if (!ended) show_step(ended);
    return {};
  }

  // Waits for the next event or step, whichever the hold-back allows.
  Status wait(PatientClient& client) {
    const auto path = job_path(id_, fmt::format("/steps?after={}&limit=10000&wait_ms={}",
                                                steps_after_, kHoldBack.count()));
    PENSTOCK_TRY_ASSIGN(const Json steps, client.get(path, kHoldBack));
    steps_after_ = static_cast<int64_t>(field_number(steps, "next_after", steps_after_));
    return {};
  }

  const Json& job() const { return job_; }

 private:
  void show_event(const Json& event) {
    const std::string code = field_string(event, "code");
    if (code.empty() || (out_.redraws() && shown_by_live_line(code))) return;
    out_.note(event_line(event));
  }
  void show_evaluation(const Json& evaluation) {
    const auto step = static_cast<int64_t>(field_number(evaluation, "step", -1));
    const auto epoch = static_cast<int64_t>(field_number(evaluation, "epoch", -1));
    if (std::pair(epoch, step) <= last_evaluation_) return;
    last_evaluation_ = {epoch, step};
    out_.note(evaluation_line(evaluation));
  }
  void show_step(bool ended) {
    if (out_.redraws()) {
      out_.redraw(live_line(job_));
      if (ended) out_.end_redraw();
      return;
    }
    const auto step = static_cast<int64_t>(field_number(job_, "step"));
    const int64_t now = monotonic_ns();
    const bool due = now - last_line_ns_ >= std::chrono::nanoseconds(kPlainLineEvery).count();
    if (step == last_step_ || (!due && !ended)) return;
    last_step_ = step;
    last_line_ns_ = now;
    out_.note(progress_line(job_));
  }

  Output& out_;
  const std::string id_;
  Json job_;
  int64_t events_after_ = 0;
  int64_t steps_after_ = 0;
  int64_t last_step_ = 0;
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
  while (true) {
    PENSTOCK_TRY(progress.look(patient));
    if (state_is_final(field_string(progress.job(), "state"))) break;
    const int64_t looked_ns = monotonic_ns();
    PENSTOCK_TRY(progress.wait(patient));
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
  out.note(
      fmt::format("next: penstock describe {0}; penstock logs {0}; penstock resume {0}", name));
}

}  // namespace penstock
