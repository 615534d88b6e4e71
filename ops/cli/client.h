// The coordinator's HTTP API as the command line uses it. docs/http-api.md documents the calls.
#pragma once

#include <chrono>
#include <nlohmann/json_fwd.hpp>
#include <string>
#include <vector>

#include "comm/base/status.h"

namespace penstock {

using Json = nlohmann::json;

// Stateless but for the address. Errors carry the coordinator's own code and message; kUnavailable
// says that there is no coordinator at the address and how to start one.
class Client {
 public:
  explicit Client(std::string server);  // "http://host:port"

  const std::string& server() const { return server_; }

  // `wait` is how long the call may be held back by the coordinator.
  Result<Json> get(const std::string& path,
                   std::chrono::milliseconds wait = std::chrono::milliseconds(0)) const;
  Result<Json> post(const std::string& path, const std::string& body = "",
                    const std::string& content_type = "application/json") const;

  // DELETE. kDeadlineExceeded: the coordinator goes on with it after its answer.
  Result<Json> remove(const std::string& path) const;

  // A job by name or id. An unknown one is kNotFound with the nearest name there is.
  Result<Json> job(const std::string& name_or_id) const;
  // Every item of a growing list, paged through from the start.
  Result<std::vector<Json>> all_items(const std::string& path) const;

 private:
  Result<Json> call(const std::string& method, const std::string& path, const std::string& body,
                    const std::string& content_type, std::chrono::milliseconds deadline) const;

  std::string server_;
};

// "/api/v1/jobs/<id or name>" + tail.
std::string job_path(const std::string& name_or_id, const std::string& tail = "");

}  // namespace penstock
