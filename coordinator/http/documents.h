// The API's JSON documents and the page for browsers, from the core's values. Pure:
// docs/http-api.md in code.
#pragma once

#include <string>
#include <vector>

#include "coordinator/core/coordinator.h"
#include "coordinator/http/api.h"

namespace penstock {

std::string job_document(const Coordinator& core, const Job& job);
// `jobs` in the order to list them.
std::string job_list_document(const Coordinator& core, const std::vector<const Job*>& jobs);
std::string removed_job_document(JobId job, const std::string& name, bool checkpoints);
std::string worker_list_document(const Coordinator& core);
std::string worker_document(const Coordinator& core, const Worker& worker);
std::string event_list_document(const std::vector<JobEvent>& events, uint64_t next_after,
                                bool terminal);
std::string step_list_document(const std::vector<StepRecord>& steps, uint64_t next_after,
                               bool terminal);
std::string evaluation_list_document(const Job& job);
std::string checkpoint_list_document(const Job& job, const std::vector<ListedCheckpoint>& listed);
std::string rebalance_document(const Job& job, const ExpertBalance& balance);
std::string log_document(JobId job, Rank rank, uint64_t offset, const LogText& log, bool terminal);
std::string backup_document(const BackupPiece& piece);
std::string version_document();
// Prometheus http_sd: a bare array.
std::string targets_document(const Coordinator& core);
std::string page_document(const Coordinator& core);
// coordinator/http/openapi.cc
const std::string& openapi_document();

}  // namespace penstock
