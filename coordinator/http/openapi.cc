// The OpenAPI description of docs/http-api.md.
#include <nlohmann/json.hpp>

#include "comm/base/version.h"
#include "coordinator/http/documents.h"

namespace penstock {
namespace {

using nlohmann::json;

json query(const char* name, const char* type, const char* what) {
  return {{"name", name}, {"in", "query"}, {"description", what}, {"schema", {{"type", type}}}};
}

json job_parameter() {
  return {{"name", "job"},
          {"in", "path"},
          {"required", true},
          {"description", "id, or name (the newest job of that name)"},
          {"schema", {{"type", "string"}}}};
}

json call(const char* summary, const char* status, const char* media, json parameters) {
  return {{"summary", summary},
          {"parameters", std::move(parameters)},
          {"responses",
           {{status, {{"description", "ok"}, {"content", {{media, json::object()}}}}},
            {"default", {{"$ref", "#/components/responses/Error"}}}}}};
}

json get_json(const char* summary, json parameters) {
  return {{"get", call(summary, "200", "application/json", std::move(parameters))}};
}

json follow_parameters() {
  return json::array({query("after", "integer", "next_after of the previous answer; 0: the start"),
                      query("wait_ms", "integer", "hold the answer back until there is news"),
                      query("limit", "integer", "at most so many items")});
}

json of_job(json parameters) {
  parameters.insert(parameters.begin(), job_parameter());
  return parameters;
}

void add_jobs(json& paths) {
  const auto spec_body = [](bool required) -> json {
    return {
        {"required", required},
        {"content", {{"application/yaml", json::object()}, {"application/json", json::object()}}}};
  };
  json submit = call("Submit a job", "201", "application/json",
                     json::array({query("name", "string", "replaces the spec's name")}));
  submit["requestBody"] = spec_body(true);
  json jobs = get_json("List jobs, newest first",
                       json::array({query("state", "string", "only jobs in this state"),
                                    query("limit", "integer", "at most so many")}));
  jobs["post"] = std::move(submit);
  paths["/api/v1/jobs"] = std::move(jobs);
  const json none = json::array();
  json job = get_json("One job", of_job(none));
  job["delete"] =
      call("Forget it, once it has ended", "200", "application/json",
           of_job(json::array({query("checkpoints", "boolean", "remove its checkpoints too")})));
  paths["/api/v1/jobs/{job}"] = std::move(job);
  paths["/api/v1/jobs/{job}/spec"] = get_json("Its canonical spec", of_job(none));
  paths["/api/v1/jobs/{job}/events"] = get_json("Its events", of_job(follow_parameters()));
  paths["/api/v1/jobs/{job}/steps"] =
      get_json("Its steps, in the order trained", of_job(follow_parameters()));
  paths["/api/v1/jobs/{job}/evaluations"] = get_json("Its held-out evaluations", of_job(none));
  paths["/api/v1/jobs/{job}/checkpoints"] = get_json("Its checkpoints", of_job(none));
  paths["/api/v1/jobs/{job}/logs"] = get_json(
      "Output of one rank",
      of_job(json::array({query("rank", "integer", "default 0"),
                          query("offset", "integer", "next_offset of the previous answer"),
                          query("wait_ms", "integer", "hold the answer back until there is news"),
                          query("limit", "integer", "at most so many bytes")})));
  paths["/api/v1/jobs/{job}/cancel"] = {
      {"post",
       call("Cancel it", "202", "application/json",
            of_job(json::array({query("grace_ms", "integer", "from SIGTERM to SIGKILL")})))}};
  paths["/api/v1/jobs/{job}/suspend"] = {
      {"post", call("Save its state and release its devices, until it is resumed", "202",
                    "application/json", of_job(none))}};
  paths["/api/v1/jobs/{job}/scale"] = {
      {"post", call("Go on with another data-parallel width", "202", "application/json",
                    of_job(json::array({query("data", "integer", "the width")})))}};
  json rebalance = get_json("What moving experts between its ranks would gain", of_job(none));
  rebalance["post"] = call("Move experts when the next checkpoint is committed", "202",
                           "application/json", of_job(none));
  paths["/api/v1/jobs/{job}/rebalance"] = std::move(rebalance);
  json resume = call("Resume it from its newest checkpoint, by another spec when one is sent",
                     "202", "application/json",
                     of_job(json::array({query("prove", "integer",
                                               "train so many recorded steps again first, and "
                                               "compare them bit for bit")})));
  resume["requestBody"] = spec_body(false);
  paths["/api/v1/jobs/{job}/resume"] = {{"post", std::move(resume)}};
}

json build() {
  const json none = json::array();
  json paths = json::object();
  add_jobs(paths);
  paths["/api/v1/workers"] = get_json("List worker daemons", none);
  const json worker = {{"name", "worker"},
                       {"in", "path"},
                       {"required", true},
                       {"description", "name"},
                       {"schema", {{"type", "string"}}}};
  paths["/api/v1/workers/{worker}/drain"] = {
      {"post", call("Give it no ranks, and move those it has", "202", "application/json",
                    json::array({worker, query("reason", "string", "why, for people")}))}};
  paths["/api/v1/workers/{worker}/undrain"] = {
      {"post", call("Let it take ranks again", "202", "application/json", json::array({worker}))}};
  paths["/api/v1/workers/{worker}/quarantine"] = {
      {"post", call("Trust it with no ranks, and move those it has", "202", "application/json",
                    json::array({worker, query("reason", "string", "why, for people")}))}};
  paths["/api/v1/workers/{worker}/release"] = {
      {"post", call("Take it out of quarantine, as soon as its host has passed a check", "202",
                    "application/json", json::array({worker}))}};
  paths["/api/v1/backups"] = {
      {"post", call("Begin a backup of the records", "201", "application/json", none)}};
  const json backup = {{"name", "backup"},
                       {"in", "path"},
                       {"required", true},
                       {"description", "id"},
                       {"schema", {{"type", "integer"}}}};
  paths["/api/v1/backups/{backup}"] = get_json(
      "Its next piece",
      json::array({backup, query("offset", "integer", "next_offset of the piece before")}));
  paths["/api/v1/events"] = get_json("Events of every job and of the cluster", follow_parameters());
  paths["/api/v1/version"] = get_json("Version of the coordinator", none);
  paths["/api/v1/prometheus/targets"] = get_json("Prometheus HTTP service discovery", none);
  paths["/openapi.json"] = get_json("This document", none);
  const std::pair<const char*, const char*> plain[] = {
      {"/metrics", "Prometheus metrics"},
      {"/livez", "The process runs"},
      {"/readyz", "The coordinator takes commands"}};
  for (const auto& [path, summary] : plain) {
    paths[path] = {{"get", call(summary, "200", "text/plain", none)}};
  }
  paths["/"] = {{"get", call("Page for browsers", "200", "text/html", none)}};
  const json error_schema = {
      {"type", "object"},
      {"required", {"error"}},
      {"properties",
       {{"error",
         {{"type", "object"},
          {"required", {"code", "message"}},
          {"properties", {{"code", {{"type", "string"}}}, {"message", {{"type", "string"}}}}}}}}}};
  return {{"openapi", "3.1.0"},
          {"info", {{"title", "Penstock coordinator"}, {"version", kVersion}}},
          {"paths", std::move(paths)},
          {"components",
           {{"responses",
             {{"Error",
               {{"description", "what went wrong, and how to fix it"},
                {"content", {{"application/json", {{"schema", error_schema}}}}}}}}}}}};
}

}  // namespace

const std::string& openapi_document() {
  static const std::string text = build().dump(1) + "\n";
  return text;
}

}  // namespace penstock
