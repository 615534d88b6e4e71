// A job and what happened to it: from a coordinator, or from the store that one keeps or left
// behind.
#pragma once

#include <map>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "comm/base/file.h"
#include "comm/base/status.h"
#include "ops/cli/client.h"

namespace penstock {

struct JobHistory {
  Json job;                                    // the API's Job
  std::vector<Json> events;                    // items of its EventList, oldest first
  std::map<std::string, std::string> hosts{};  // by worker; empty where only the store was read
};

Result<JobHistory> read_history(const Client& client, const std::string& name_or_id);

// `state_dir`: a coordinator's, or that of a dev cluster. Takes no lock and changes nothing, so the
// coordinator may run. kNotFound: no store is there, or no such job in it.
Result<JobHistory> read_history(const Path& state_dir, const std::string& name_or_id);

}  // namespace penstock
