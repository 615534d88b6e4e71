#include "ops/cli/client.h"

#include <fmt/format.h>

#include <nlohmann/json.hpp>

#include "comm/control/http_client.h"
#include "comm/run/nearest_word.h"
#include "ops/cli/output.h"

namespace penstock {

namespace {

constexpr std::chrono::milliseconds kCallDeadline{10'000};
// Longer than a coordinator holds a call: then it says that it goes on.
constexpr std::chrono::milliseconds kRemovalDeadline{90'000};

Code code_of(const std::string& name, int http_status) {
  for (int c = static_cast<int>(Code::kInvalidArgument); c <= static_cast<int>(Code::kInternal);
       ++c) {
    if (code_name(static_cast<Code>(c)) == name) return static_cast<Code>(c);
  }
  switch (http_status) {
    case 400:
      return Code::kInvalidArgument;
    case 401:
    case 403:
      return Code::kPermissionDenied;
    case 404:
      return Code::kNotFound;
    case 409:
      return Code::kFailedPrecondition;
    case 503:
      return Code::kUnavailable;
    default:
      return Code::kInternal;
  }
}

Status error_of(const HttpReply& reply, const std::string& what) {
  const Json body = Json::parse(reply.body, nullptr, false);
  const Json error = body.is_object() ? body.value("error", Json::object()) : Json::object();
  std::string message = error.is_object() ? field_string(error, "message") : "";
  if (message.empty()) message = fmt::format("{}: HTTP status {}", what, reply.status);
  return {code_of(error.is_object() ? field_string(error, "code") : "", reply.status), message};
}

}  // namespace

Client::Client(std::string server) : server_(std::move(server)) {
  if (server_.find("://") == std::string::npos) server_ = "http://" + server_;
  while (server_.ends_with('/')) server_.pop_back();
}

Result<Json> Client::call(const std::string& method, const std::string& path,
                          const std::string& body, const std::string& content_type,
                          std::chrono::milliseconds deadline) const {
  const auto reply = http_call({.method = method,
                                .url = server_ + path,
                                .body = body,
                                .content_type = content_type,
                                .deadline = deadline});
  if (!reply.ok()) {
    const Code code = reply.status().code();
    if (code != Code::kUnavailable && code != Code::kDeadlineExceeded) return reply.status();
    return unavailable(
        fmt::format("no coordinator answers: {}; start one with: penstock dev up, or name it with "
                    "--server or PENSTOCK_SERVER",
                    reply.status().message()));
  }
  if (reply->status >= 400) return error_of(*reply, method + " " + path);
  Json document = Json::parse(reply->body, nullptr, false);
  if (!document.is_object() || field_string(document, "apiVersion") != "penstock/v1") {
    return internal_error(
        fmt::format("{} does not answer like a coordinator: {} gave no document of penstock/v1",
                    server_, path));
  }
  return document;
}

Result<Json> Client::get(const std::string& path, std::chrono::milliseconds wait) const {
  return call("GET", path, "", "application/json", kCallDeadline + wait);
}

Result<Json> Client::post(const std::string& path, const std::string& body,
                          const std::string& content_type) const {
  return call("POST", path, body, content_type, kCallDeadline);
}

Result<Json> Client::remove(const std::string& path) const {
  return call("DELETE", path, "", "application/json", kRemovalDeadline);
}

Result<Json> Client::job(const std::string& name_or_id) const {
  auto found = get(job_path(name_or_id));
  // "" and "x/steps" are names of other documents, and of no job.
  const bool is_job = found.ok() && field_string(*found, "kind") == "Job";
  if (is_job || (!found.ok() && found.status().code() != Code::kNotFound)) return found;
  std::vector<std::string> names;
  if (const auto jobs = get("/api/v1/jobs"); jobs.ok()) {
    for (const Json& job : jobs->value("items", Json::array())) {
      names.push_back(field_string(job, "name"));
    }
  }
  const std::string hint = did_you_mean(name_or_id, names);
  return not_found(fmt::format("no job \"{}\"{}", name_or_id,
                               hint.empty() ? "; penstock ps -a lists all" : hint));
}

Result<std::vector<Json>> Client::all_items(const std::string& path) const {
  constexpr int kPageItems = 10000;
  std::vector<Json> items;
  int64_t after = 0;
  while (true) {
    PENSTOCK_TRY_ASSIGN(const Json page,
                        get(fmt::format("{}?after={}&limit={}", path, after, kPageItems)));
    const Json page_items = page.value("items", Json::array());
    for (const Json& item : page_items) items.push_back(item);
    const auto next = static_cast<int64_t>(field_number(page, "next_after", after));
    if (page_items.empty() || next <= after) return items;
    after = next;
  }
}

std::string job_path(const std::string& name_or_id, const std::string& tail) {
  return "/api/v1/jobs/" + percent_encode(name_or_id) + tail;
}

}  // namespace penstock
