#include "ops/cli/verdict.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <nlohmann/json.hpp>
#include <optional>
#include <sstream>

#include "coordinator/core/failure.h"
#include "coordinator/core/job.h"
#include "ops/cli/cli.h"
#include "ops/cli/output.h"
#include "ops/cli/text.h"

namespace penstock {

namespace {

std::optional<Json> object_of(const Json& parent, const char* key) {
  const Json found = parent.value(key, Json());
  return found.is_object() ? std::optional(found) : std::nullopt;
}

int64_t epoch_of(const Json& event) {
  return static_cast<int64_t>(field_number(event, "epoch"));
}

std::optional<double> seconds_between(const Json& earlier, const Json& later) {
  const auto from = parse_utc(field_string(earlier, "time"));
  const auto to = parse_utc(field_string(later, "time"));
  if (!from.ok() || !to.ok()) return std::nullopt;
  return to_seconds(*to - *from);
}

// An attempt ended here, or it became known why. Moves of experts, steps that a guard takes back,
// ends that were asked for and successes are none.
bool is_failure(const Json& event) {
  const std::string state = field_string(event, "state");
  const std::string from = field_string(event, "from");
  const std::string code = field_string(event, "code");
  for (const char* planned : {kRebalancing, kRollingBack, "draining", "scaling", "pause_over",
                              "suspended", "succeeded"}) {
    if (code == planned) return false;
  }
  if (field_string(event, "actor") == "user") return false;
  if (state == "FAILED") return true;
  if (state != "RECOVERING" && state != "STOPPING") return false;
  const bool found_later = from.empty() && field_string(event, "actor").starts_with("worker ");
  return found_later || (!from.empty() && from != "STOPPING");
}

Json failure_item(const Json& event) {
  const std::string actor = field_string(event, "actor");
  const bool of_worker = actor.starts_with("worker ");
  return {{"time", event.value("time", Json())},
          {"epoch", event.value("epoch", Json())},
          {"code", event.value("code", Json())},
          {"message", event.value("message", Json())},
          {"rank", event.value("rank", Json())},
          {"worker", of_worker ? Json(actor.substr(7)) : Json()}};
}

std::vector<std::string> lines_of(const std::string& text) {
  std::vector<std::string> lines;
  std::istringstream stream(text);
  for (std::string line; std::getline(stream, line);) lines.push_back(line);
  return lines;
}

// The newest failure, or null. A job may fail for what no rank did: then only its reason says why.
Json newest_failure(const JobHistory& history, const std::vector<Json>& failures) {
  const Json& job = history.job;
  const Json reason = job.value("reason", Json::object());
  const std::string why = field_string(reason, "code");
  auto recorded = object_of(job, "last_failure");
  const bool of_rank =
      recorded && (why == "restart_budget" || why == field_string(*recorded, "code"));
  if (field_string(job, "state") == "FAILED" && !of_rank) {
    recorded = Json{{"code", why}, {"message", field_string(reason, "message")}};
  }
  if (!recorded) return {};
  const std::string message = field_string(*recorded, "message");
  const std::string worker = field_string(*recorded, "worker");
  const std::string operation = operation_in(message);
  const auto host = history.hosts.find(worker);
  const Json event = failures.empty() ? Json::object() : failures.back();
  return {{"code", recorded->value("code", Json())},
          {"message", message},
          {"rank", recorded->value("rank", Json())},
          {"worker", recorded->value("worker", Json())},
          {"host", host == history.hosts.end() ? Json() : Json(host->second)},
          {"operation", operation.empty() ? Json() : Json(operation)},
          {"step", recorded->value("step", Json())},
          {"time", event.value("time", Json())},
          {"epoch", event.value("epoch", Json())},
          {"log", lines_of(field_string(*recorded, "log_tail"))}};
}

// What the attempt after a failure began with, and when it trained; null while there is none.
Json recovery_after(const Json& failure, const std::vector<Json>& events) {
  Json recovery;
  for (const Json& event : events) {
    if (epoch_of(event) <= epoch_of(failure)) continue;
    const std::string code = field_string(event, "code");
    if (code == "starting" && recovery.is_null()) {
      recovery = {{"epoch", event.value("epoch", Json())},
                  {"source", start_source(field_string(event, "message"))},
                  {"time", Json()},
                  {"seconds", Json()}};
    }
    if (code != "running" || recovery.is_null()) continue;
    recovery["time"] = event.value("time", Json());
    if (const auto took = seconds_between(failure, event)) recovery["seconds"] = *took;
    break;
  }
  return recovery;
}

struct Advice {
  std::string next;
  std::string command;
};

Advice advice_after_end(const std::string& code, const std::string& name,
                        const std::string& checkpoint) {
  const std::string resume = "penstock resume " + name;
  if (code == "diverged") {
    if (checkpoint.empty())
      return {"a replay ends the same way: submit it with a lower optimizer.lr",
              "penstock describe " + name};
    return {fmt::format("a replay ends the same way: begin a new job with a lower optimizer.lr and "
                        "checkpoint.init_from: {}-{}",
                        name, checkpoint),
            fmt::format("penstock export {0} --step {1} -o {0}-{1}", name, checkpoint)};
  }
  if (code == "out_of_memory") {
    return {"a replay needs as much memory: resume it on more ranks",
            resume + " --spec more-ranks.yaml"};
  }
  if (code == "data_corrupt" || code == "no_usable_checkpoint") {
    return {"find what is damaged; data sets: penstock data inspect",
            "penstock checkpoint verify " + name};
  }
  if (code == "silent_corruption") {
    return {"test the processor, memory and network of the worker named above, then resume it",
            resume};
  }
  if (code == "not_reproduced") return {"without a proof it goes on all the same", resume};
  if (code == "usage" || code == "not_found" || code == "permission_denied" ||
      code == "data_changed") {
    return {"mend what the message names, then resume it", resume};
  }
  const std::string from =
      checkpoint.empty() ? "its initial weights" : "the checkpoint of step " + checkpoint;
  return {fmt::format("it has ended; a resume goes on from {} with a fresh restart budget", from),
          resume};
}

Advice advice(const Json& verdict, const Json& job, bool offline) {
  const std::string name = field_text(job, "name");
  const std::string state = field_string(job, "state");
  const auto saved = object_of(verdict, "checkpoint");
  const std::string checkpoint = saved ? field_text(*saved, "step") : "";
  const auto failure = object_of(verdict, "failure");
  const Json why = job.value("reason", Json::object());
  const std::string reason = field_string(why, "message");
  const std::string code = field_string(why, "code");
  if (state == "SUCCEEDED") return {"nothing: it succeeded", "penstock describe " + name};
  if (state == "FAILED") {
    return advice_after_end(failure ? field_string(*failure, "code") : "", name, checkpoint);
  }
  if (state == "CANCELLED") return advice_after_end("", name, checkpoint);
  if (state == "SUSPENDED") return {"it waits to be resumed", "penstock resume " + name};
  if (offline) {
    return {fmt::format("it was {} when this was written; it goes on by itself under its "
                        "coordinator",
                        state),
            "penstock describe " + name};
  }
  if (state == "RUNNING") return {"nothing: the job trains", "penstock wait " + name};
  if (code == "waiting_for_devices") {
    return {fmt::format("it goes on as soon as there is room ({}): penstock undrain or release a "
                        "worker, or start more (penstock dev up, penstock-worker)",
                        reason),
            "penstock workers"};
  }
  return {fmt::format("it goes on by itself; now: {}", reason), "penstock events " + name + " -w"};
}

std::string sentence(const Json& job, const Json& failure) {
  const std::string state = field_string(job, "state");
  const std::string reason = field_string(job.value("reason", Json::object()), "message");
  if (state == "FAILED") return reason;
  if (failure.is_object()) return field_string(failure, "message");
  return fmt::format("{} has not failed; it is {}: {}", field_text(job, "name"), state, reason);
}

Json checkpoint_of(const Json& job) {
  const auto saved = object_of(job, "checkpoint");
  if (!saved) return {};
  return {{"step", saved->value("step", Json())},
          {"manifest", saved->value("manifest", Json())},
          {"time", saved->value("time", Json())}};
}

std::string where_text(const Json& failure) {
  std::string text;
  const auto part = [&](const std::string& words) {
    if (!words.empty()) text += (text.empty() ? "" : ", ") + words;
  };
  if (field_text(failure, "rank") != "-") part("rank " + field_text(failure, "rank"));
  const std::string host = field_string(failure, "host");
  part(field_string(failure, "worker"));
  if (!host.empty()) part("host " + host);
  if (field_text(failure, "step") != "-") part("after step " + field_text(failure, "step"));
  return text;
}

}  // namespace

std::vector<Json> failures_in(const std::vector<Json>& events) {
  std::vector<Json> failures;
  // Within an attempt the last word counts: a rank that lost its peer may be heard before the peer
  // that died.
  for (const Json& event : events) {
    if (!is_failure(event)) continue;
    const bool same_attempt = !failures.empty() && epoch_of(failures.back()) == epoch_of(event);
    Json failure = event;
    if (same_attempt) {
      const Json& before = failures.back();
      failure["time"] = before.value("time", Json());  // when it was first noticed
      // The end of the job, said by the coordinator, names nobody.
      const bool of_worker = field_string(event, "actor").starts_with("worker ");
      if (!of_worker && field_text(event, "rank") == "-" &&
          field_string(before, "code") != kCausePeerLost) {
        for (const char* who : {"rank", "actor"}) failure[who] = before.value(who, Json());
      }
      failures.pop_back();
    }
    failures.push_back(std::move(failure));
  }
  return failures;
}

std::string start_source(const std::string& message) {
  constexpr std::string_view kBefore = "starting from ";
  return message.starts_with(kBefore) ? message.substr(kBefore.size()) : message;
}

std::string operation_in(const std::string& message) {
  // As the daemon says it of a rank that died, and the coordinator of one that hangs.
  for (const auto& [before, after] :
       {std::pair<std::string_view, std::string_view>{"it was ", ""}, {" s, ", ": its process"}}) {
    const size_t hung = message.find("has not moved for ");
    if (after.empty() != (hung == std::string::npos)) continue;
    const size_t begin = message.find(before, after.empty() ? 0 : hung);
    if (begin == std::string::npos) continue;
    const size_t from = begin + before.size();
    const size_t end = after.empty() ? message.find(';', from) : message.find(": ", from);
    return message.substr(from, end == std::string::npos ? end : end - from);
  }
  return {};
}

// Ranks that were slow when the newest of these events happened: a new attempt begins without.
Json slow_ranks_in(const std::vector<Json>& events) {
  std::map<std::string, Json> slow;
  for (const Json& event : events) {
    const std::string code = field_string(event, "code");
    if (!field_string(event, "from").empty()) slow.clear();
    if (code == "slow_rank_over") slow.erase(field_text(event, "rank"));
    if (code == "slow_rank") {
      slow[field_text(event, "rank")] = {{"rank", event.value("rank", Json())},
                                         {"time", event.value("time", Json())},
                                         {"message", event.value("message", Json())}};
    }
  }
  Json items = Json::array();
  for (auto& [rank, item] : slow) items.push_back(std::move(item));
  return items;
}

Json verdict_of(const JobHistory& history, bool offline) {
  const Json& job = history.job;
  const std::vector<Json> failures = failures_in(history.events);
  const Json failure = newest_failure(history, failures);
  Json items = Json::array();
  for (const Json& event : failures) items.push_back(failure_item(event));
  Json verdict = {
      {"apiVersion", "penstock/v1"},
      {"kind", "Verdict"},
      {"job", job.value("id", Json())},
      {"name", job.value("name", Json())},
      {"state", job.value("state", Json())},
      {"step", job.value("highest_step", Json())},
      {"target_steps", job.value("target_steps", Json())},
      {"epoch", job.value("epoch", Json())},
      {"failures_used", job.value("failures", Json())},
      {"max_restarts", job.value("max_restarts", Json())},
      {"verdict", sentence(job, failure)},
      {"failure", failure},
      {"checkpoint", checkpoint_of(job)},
      {"recovery", failure.is_object() ? recovery_after(failure, history.events) : Json()},
      {"slow_ranks", slow_ranks_in(history.events)},
      {"offline", offline},
      {"failures", std::move(items)}};
  const Advice what = advice(verdict, job, offline);
  verdict["next"] = what.next;
  verdict["command"] = what.command;
  return verdict;
}

std::string verdict_text(const Json& verdict, const std::string& state_in_colour) {
  std::string text;
  const auto fact = [&](const char* name, const std::string& value) {
    if (!value.empty()) text += fmt::format("{:<12}{}\n", name, value);
  };
  fact("verdict", field_string(verdict, "verdict"));
  fact("job",
       fmt::format("{} ({})  {}  step {}/{}, attempt {}, {}, {} allowed",
                   field_text(verdict, "name"), field_text(verdict, "job"), state_in_colour,
                   field_text(verdict, "step"), field_text(verdict, "target_steps"),
                   field_text(verdict, "epoch"), field_counted(verdict, "failures_used", "failure"),
                   field_text(verdict, "max_restarts")));
  const auto failure = object_of(verdict, "failure");
  if (failure) {
    fact("where", where_text(*failure));
    fact("operation", field_string(*failure, "operation"));
    if (!field_string(*failure, "time").empty()) {
      fact("when",
           fmt::format("{} ({} ago)", field_string(*failure, "time"), field_age(*failure, "time")));
    }
  }
  for (const Json& slow : verdict.value("slow_ranks", Json::array())) {
    fact("slow", field_string(slow, "message"));
  }
  if (const auto saved = object_of(verdict, "checkpoint")) {
    fact("checkpoint",
         fmt::format("step {}: {}", field_text(*saved, "step"), field_text(*saved, "manifest")));
  } else {
    fact("checkpoint", "none yet");
  }
  if (const auto recovery = object_of(verdict, "recovery")) {
    const double seconds = field_number(*recovery, "seconds", NAN);
    fact("recovery", fmt::format("attempt {} from {}{}", field_text(*recovery, "epoch"),
                                 field_string(*recovery, "source"),
                                 std::isfinite(seconds)
                                     ? fmt::format(", training again after {:.2f} s", seconds)
                                     : ""));
  }
  fact("next", field_string(verdict, "next"));
  fact("command", field_string(verdict, "command"));
  const Json log = failure ? failure->value("log", Json::array()) : Json::array();
  const char* name = "last output";
  for (const Json& line : log) {
    fact(name, line.get<std::string>());
    name = "";
  }
  return text;
}

}  // namespace penstock
