#include "ops/cli/recovery_watch.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <nlohmann/json.hpp>
#include <optional>

#include "comm/base/counted.h"
#include "ops/cli/output.h"
#include "ops/cli/text.h"
#include "ops/cli/verdict.h"

namespace penstock {

namespace {

int64_t integer(const Json& object, const char* key) {
  return static_cast<int64_t>(field_number(object, key));
}

double seconds_after(Instant at, const Json& item) {
  const auto time = parse_utc(field_string(item, "time"));
  return time.ok() ? to_seconds(*time - at) : NAN;
}

// Of what is known to come after the fault; times are told to the millisecond only.
Json shown_seconds(double seconds) {
  return std::isfinite(seconds) ? Json(std::max(seconds, 0.0)) : Json();
}

}  // namespace

RecoveryWatch::RecoveryWatch(const Fault& fault) : fault_(fault), highest_before_(fault.step) {}
RecoveryWatch::~RecoveryWatch() = default;

void RecoveryWatch::add_event(const Json& event) {
  events_.push_back(event);
}

void RecoveryWatch::add_step(const Json& step) {
  const int64_t number = integer(step, "step");
  const double after = seconds_after(fault_.at, step);
  epoch_ = integer(step, "epoch");
  if (recovered_) return;
  if (epoch_ > fault_.epoch) {
    replayed_ += number <= highest_before_;
    recovered_ = number > highest_before_;
  } else {
    highest_before_ = std::max(highest_before_, number);
    if (after > 0)
      slowest_seconds_ = std::max(slowest_seconds_, field_number(step, "step_seconds"));
    if (trained_after_ || fault_.ends_attempt || after <= to_seconds(fault_.lasts)) return;
    trained_after_ = true;
  }
  next_step_ = number;
  next_step_seconds_ = after;
}

bool RecoveryWatch::done() const {
  return recovered_ || (trained_after_ && failures_in(events_).empty());
}

Json RecoveryWatch::document() const {
  const std::vector<Json> failures = failures_in(events_);
  const bool undisturbed = !recovered_ && trained_after_ && failures.empty();
  Json detected, resumed;
  if (!failures.empty()) {
    detected = {{"code", failures.front().value("code", Json())},
                {"message", failures.front().value("message", Json())},
                {"seconds", shown_seconds(seconds_after(fault_.at, failures.front()))}};
  }
  Json refused = Json::array();
  for (const Json& event : events_) {
    const std::string code = field_string(event, "code");
    if (code == "checkpoint_refused") refused.push_back(field_string(event, "message"));
    if (code == "starting") {
      resumed = {{"epoch", event.value("epoch", Json())},
                 {"source", start_source(field_string(event, "message"))},
                 {"seconds", Json()}};
    }
    if (code == "running" && resumed.is_object()) {
      resumed["seconds"] = shown_seconds(seconds_after(fault_.at, event));
    }
  }
  const bool known = recovered_ || undisturbed;
  return {{"outcome", recovered_    ? "recovered"
                      : undisturbed ? "undisturbed"
                                    : "pending"},
          {"detected", detected},
          {"resumed", resumed},
          {"attempts", std::max<int64_t>(0, epoch_ - fault_.epoch)},
          {"refused", refused},
          {"next_step", known ? Json(next_step_) : Json()},
          {"recovery_seconds", known ? shown_seconds(next_step_seconds_) : Json()},
          {"steps_replayed", replayed_},
          {"slowest_step_seconds", slowest_seconds_}};
}

std::string recovery_text(const Json& document) {
  std::string text;
  const auto fact = [&](const std::string& name, const std::string& value) {
    text += fmt::format("{:<12}{}\n", name, value);
  };
  const auto after = [](const Json& object) {
    return fmt::format("{:.2f} s", field_number(object, "seconds"));
  };
  const Json detected = document.value("detected", Json());
  if (detected.is_object()) {
    fact("detected",
         fmt::format("after {}: {}", after(detected), field_string(detected, "message")));
  }
  for (const Json& refused : document.at("refused")) {
    fact("passed over", refused.get<std::string>());
  }
  const Json resumed = document.value("resumed", Json());
  if (resumed.is_object()) {
    fact("resumed",
         fmt::format(
             "attempt {} from {}{}", field_text(resumed, "epoch"), field_string(resumed, "source"),
             resumed.at("seconds").is_null() ? "" : ", training again after " + after(resumed)));
  }
  const std::string outcome = field_string(document, "outcome");
  const std::string next =
      fmt::format("step {} was finished {:.2f} s after the fault",
                  field_text(document, "next_step"), field_number(document, "recovery_seconds"));
  if (outcome == "recovered") {
    fact(outcome, fmt::format("{}; {} trained again", next,
                              counted(integer(document, "steps_replayed"), "step")));
  } else if (outcome == "undisturbed") {
    fact(outcome, fmt::format("no attempt ended of it: {}; the slowest meanwhile took {:.2f} s",
                              next, field_number(document, "slowest_step_seconds")));
  }
  return text;
}

}  // namespace penstock
