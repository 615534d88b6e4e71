#include "tests/support/cluster.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <poll.h>
#include <signal.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <thread>

#include "comm/base/clock.h"
#include "comm/base/random.h"
#include "ops/cli/local_process.h"
#include "worker/data/indexed_dataset.h"

namespace penstock {

namespace {

constexpr std::chrono::milliseconds kLookEvery{5};
// Longer between two looks, and this process was stopped, and with it what it waits for.
constexpr std::chrono::nanoseconds kLookMost{1'000'000'000};
constexpr size_t kOutputBytesMax = 16 << 20;

std::string flag_value(const std::vector<std::string>& words, const std::string& flag) {
  for (size_t i = 0; i + 1 < words.size(); ++i) {
    if (words[i] == flag) return words[i + 1];
  }
  return "";
}

}  // namespace

bool wait_until(const std::function<bool()>& condition, std::chrono::milliseconds limit) {
  std::chrono::nanoseconds waited{0};
  for (int64_t last_ns = monotonic_ns(); !condition();) {
    if (waited > limit) return condition();
    std::this_thread::sleep_for(kLookEvery);
    const int64_t now_ns = monotonic_ns();
    waited += std::min(std::chrono::nanoseconds(now_ns - last_ns), kLookMost);
    last_ns = now_ns;
  }
  return true;
}

ScratchFolder::ScratchFolder() {
  std::string pattern = (std::filesystem::temp_directory_path() / "penstock-test-XXXXXX").string();
  PENSTOCK_CHECK(mkdtemp(pattern.data()) != nullptr, pattern);
  path_ = pattern;
}

ScratchFolder::~ScratchFolder() {
  std::error_code ignored;
  std::filesystem::remove_all(path_, ignored);
}

Path binary(const std::string& name) {
  return Path(PENSTOCK_BINARY_DIR) / name;
}

ProgramRun run_program(const std::vector<std::string>& argv,
                       const std::vector<std::string>& environment) {
  SpawnOptions options;
  options.argv = argv;
  options.environment = environment;
  auto child = ChildProcess::spawn(options);
  PENSTOCK_CHECK(child.ok(), child.status().message());
  FileDescriptor streams[2] = {child->take_stdout(), child->take_stderr()};
  std::string texts[2];
  pollfd watched[2] = {{streams[0].get(), POLLIN, 0}, {streams[1].get(), POLLIN, 0}};
  while (watched[0].fd >= 0 || watched[1].fd >= 0) {
    ::poll(watched, 2, -1);
    for (int i = 0; i < 2; ++i) {
      if (watched[i].fd < 0 || watched[i].revents == 0) continue;
      char buffer[65536];
      const ssize_t count = ::read(watched[i].fd, buffer, sizeof(buffer));
      if (count > 0 && texts[i].size() < kOutputBytesMax) texts[i].append(buffer, count);
      if (count == 0 || (count < 0 && errno != EAGAIN && errno != EINTR)) watched[i].fd = -1;
    }
  }
  ProgramRun run;
  run.exit_code = child->wait().exit_code;
  run.out = std::move(texts[0]);
  run.err = std::move(texts[1]);
  return run;
}

Cluster::Cluster(const ClusterOptions& options) : options_(options) {
  start_coordinator();
  for (int i = 0; i < options.worker_count; ++i) start_worker(fmt::format("worker-{}", i));
  const bool all_up = wait_until(
      [&] {
        const auto workers = try_get("/api/v1/workers");
        return workers && static_cast<int>((*workers)["items"].size()) >= options.worker_count;
      },
      kPatience);
  PENSTOCK_CHECK(all_up, log("coordinator"), log("worker-0"));
}

std::string Cluster::server() const {
  return fmt::format("http://127.0.0.1:{}", http_port_);
}

std::string Cluster::log(const std::string& program) const {
  return read_file(folder_.path() / (program + ".log"), 64 << 20).ok()
             ? *read_file(folder_.path() / (program + ".log"), 64 << 20)
             : "";
}

void Cluster::spawn(const std::string& name, std::vector<std::string> argv) {
  // A shell only to append both streams to the log; exec leaves no process in between.
  std::string command = "exec";
  for (const std::string& word : argv) command += " '" + word + "'";
  command += " >>'" + (folder_.path() / (name + ".log")).string() + "' 2>&1";
  SpawnOptions options;
  options.argv = {"/bin/sh", "-c", command};
  options.capture_output = false;
  auto child = ChildProcess::spawn(options);
  PENSTOCK_CHECK(child.ok(), child.status().message());
  daemons_.erase(name);
  daemons_.emplace(name, *std::move(child));
}

void Cluster::start_coordinator() {
  const Path state = folder_.path() / "coordinator";
  const Path endpoints = state / "endpoints.json";
  std::error_code ignored;
  std::filesystem::remove(endpoints, ignored);
  std::vector<std::string> argv = {binary("penstock-coordinator"),
                                   "--state-dir",
                                   state.string(),
                                   "--http-port",
                                   std::to_string(http_port_),
                                   "--control-port",
                                   std::to_string(control_port_),
                                   "--heartbeat-interval-ms",
                                   std::to_string(options_.heartbeat_interval_ms)};
  for (const std::string& more : options_.coordinator_arguments) argv.push_back(more);
  spawn("coordinator", std::move(argv));
  const bool started = wait_until(
      [&] {
        const auto text = read_file(endpoints, 4096);
        if (!text.ok()) return false;
        const Json json = Json::parse(*text, nullptr, false);
        if (json.is_discarded()) return false;
        http_port_ = json.at("http_port");
        control_port_ = json.at("control_port");
        return try_get("/readyz").has_value() || call("GET", "/readyz").status == 200;
      },
      kPatience);
  PENSTOCK_CHECK(started, log("coordinator"));
}

void Cluster::kill_coordinator(int signal) {
  PENSTOCK_CHECK(daemons_.at("coordinator").send_signal(signal).ok());
  daemons_.at("coordinator").wait();
}

void Cluster::signal_coordinator(int signal) const {
  PENSTOCK_CHECK(::kill(daemons_.at("coordinator").pid(), signal) == 0, errno);
}

void Cluster::start_worker(const std::string& name) {
  std::vector<std::string> argv = {binary("penstock-worker"),
                                   "--coordinator",
                                   fmt::format("tcp://127.0.0.1:{}", control_port_),
                                   "--name",
                                   name,
                                   "--devices",
                                   std::to_string(options_.devices_per_worker),
                                   "--http-port",
                                   "0",
                                   "--state-dir",
                                   (folder_.path() / name).string()};
  if (options_.allow_chaos) argv.push_back("--allow-chaos");
  if (!options_.rank_program.empty()) {
    const Path program = folder_.path() / name / "penstock-rank.sh";  // its own: others run theirs
    std::filesystem::create_directories(program.parent_path());
    PENSTOCK_CHECK(
        replace_file_durably(program, as_bytes("#!/bin/sh\n" + options_.rank_program)).ok());
    std::filesystem::permissions(program, std::filesystem::perms::owner_all);
    argv.insert(argv.end(), {"--rank-binary", program.string()});
  }
  spawn(name, std::move(argv));
}

void Cluster::kill_worker(const std::string& name, int signal) {
  ChildProcess& daemon = daemons_.at(name);
  PENSTOCK_CHECK(daemon.send_signal(signal).ok());
  daemon.wait();
}

HttpReply Cluster::call(const std::string& method, const std::string& path,
                        const std::string& body) const {
  HttpCall call;
  call.method = method;
  call.url = server() + path;
  call.body = body;
  auto reply = http_call(call);
  if (!reply.ok()) return {.status = 0, .content_type = "", .body = reply.status().to_string()};
  return *std::move(reply);
}

std::optional<Json> Cluster::try_get(const std::string& path) const {
  const HttpReply reply = call("GET", path);
  if (reply.status < 200 || reply.status > 299) return std::nullopt;
  Json json = Json::parse(reply.body, nullptr, false);
  if (json.is_discarded()) return std::nullopt;
  return json;
}

Json Cluster::get(const std::string& path) const {
  const auto json = try_get(path);
  PENSTOCK_CHECK(json.has_value(), path, call("GET", path).body, log("coordinator"));
  return *json;
}

std::string Cluster::submit(const std::string& yaml) const {
  const HttpReply reply = call("POST", "/api/v1/jobs", yaml);
  PENSTOCK_CHECK(reply.status == 201, reply.status, reply.body);
  return std::to_string(Json::parse(reply.body).at("id").get<uint64_t>());
}

bool Cluster::wait_for_state(const std::string& id, const std::string& state, seconds limit) const {
  return wait_until(
      [&] {
        const auto now = try_get("/api/v1/jobs/" + id);
        return now && now->at("state") == state;
      },
      limit);
}

bool Cluster::wait_for_step(const std::string& id, int64_t step, seconds limit) const {
  return wait_until(
      [&] {
        const auto now = try_get("/api/v1/jobs/" + id);
        return now && now->at("step").is_number() && now->at("step") >= step;
      },
      limit);
}

std::map<int64_t, double> Cluster::losses(const std::string& id) const {
  std::map<int64_t, double> by_step;
  const Json steps = get("/api/v1/jobs/" + id + "/steps?limit=10000");
  for (const Json& item : steps.at("items")) {
    by_step[item.at("step")] = item.at("loss");  // later epochs come later
  }
  return by_step;
}

size_t Cluster::trained_steps(const std::string& id) const {
  return get("/api/v1/jobs/" + id + "/steps?limit=10000").at("items").size();
}

std::string Cluster::final_weights(const std::string& id) const {
  if (!wait_for_state(id, "SUCCEEDED")) return describe(id);
  return job(id).at("checkpoint").at("weights_digest");
}

std::vector<std::string> Cluster::event_messages(const std::string& id,
                                                 const std::string& code) const {
  std::vector<std::string> messages;
  const Json events = get("/api/v1/jobs/" + id + "/events?limit=1000");
  for (const Json& item : events.at("items")) {
    if (item.at("code") == code) messages.push_back(item.at("message"));
  }
  return messages;
}

bool Cluster::has_event(const std::string& id, const std::string& code) const {
  return !event_messages(id, code).empty();
}

std::string Cluster::describe(const std::string& id) const {
  const auto job = try_get("/api/v1/jobs/" + id);
  const auto events = try_get("/api/v1/jobs/" + id + "/events?limit=1000");
  return (job ? job->dump(1) : "no job") + "\n" + (events ? events->dump(1) : "no events") +
         "\ncoordinator: " + log("coordinator") + "\nworker-0: " + log("worker-0");
}

pid_t Cluster::rank_pid(const std::string& id, int rank) const {
  for (const pid_t pid : all_processes()) {
    const auto words = command_line_of(pid);
    if (words.empty() || Path(words[0]).filename() != "penstock-rank") continue;
    if (flag_value(words, "--job") != id || flag_value(words, "--rank") != std::to_string(rank)) {
      continue;
    }
    const pid_t parent = parent_of(pid);
    for (const auto& [daemon, child] : daemons_) {
      if (child.pid() == parent) return pid;
    }
  }
  return 0;
}

std::vector<pid_t> Cluster::rank_pids(const std::string& id) const {
  std::vector<pid_t> pids;
  for (int rank = 0; rank < options_.worker_count * options_.devices_per_worker; ++rank) {
    pids.push_back(rank_pid(id, rank));
  }
  return pids;
}

std::string make_dataset(const Path& folder, const std::string& name, uint64_t seed,
                         int64_t tokens) {
  constexpr int64_t kDocumentTokens = 500;
  const std::string prefix = (folder / name).string();
  auto writer = IndexedDatasetWriter::create(prefix, token_type_for(257));
  PENSTOCK_CHECK(writer.ok(), writer.status().message());
  Random random(seed, 0);
  for (int64_t written = 0; written < tokens; written += kDocumentTokens) {
    std::vector<int32_t> document;
    int32_t token = 'a';
    while (static_cast<int64_t>(document.size()) < kDocumentTokens - 1) {
      // Usually the next letter: something a model learns within a few steps.
      token = random.below(4) != 0 ? 'a' + (token - 'a' + 1) % 26
                                   : 'a' + static_cast<int32_t>(random.below(26));
      document.push_back(token);
    }
    document.push_back(256);
    const Status added = writer->add_document(document);
    PENSTOCK_CHECK(added.ok(), added.message());
  }
  const Status finished = writer->finish();
  PENSTOCK_CHECK(finished.ok(), finished.message());
  return prefix;
}

std::string tiny_job_yaml(const Path& folder, const TinyJob& job) {
  const std::string train = make_dataset(folder, job.name + "-train", 1, 50'000);
  const std::string heldout = make_dataset(folder, job.name + "-heldout", 2, 10'000);
  const std::string dir = job.checkpoint_dir.empty() ? "" : "dir: " + job.checkpoint_dir + ", ";
  return fmt::format(
      "apiVersion: penstock/v1\n"
      "kind: TrainingRun\n"
      "metadata: {{name: {}}}\n"
      "model:\n"
      "  vocab_size: 257\n"
      "  hidden_size: {}\n"
      "  num_hidden_layers: 4\n"
      "  num_attention_heads: 2\n"
      "  q_lora_rank: 16\n"
      "  kv_lora_rank: 16\n"
      "  qk_nope_head_dim: 8\n"
      "  qk_rope_head_dim: 8\n"
      "  v_head_dim: 8\n"
      "  intermediate_size: 64\n"
      "  first_k_dense_replace: 1\n"
      "  moe_intermediate_size: 32\n"
      "  n_routed_experts: 8\n"
      "  n_shared_experts: 1\n"
      "  num_experts_per_tok: 2\n"
      "  n_group: 2\n"
      "  topk_group: 1\n"
      "  max_position_embeddings: {}\n"
      "data: {{train: [{{path: {}}}], validation: [{{path: {}}}], tokenizer: bytes, seq_length: "
      "{}}}\n"
      "parallelism: {{pipeline: {}, expert: {}, data: {}, microbatches: {}, micro_batch_size: 1, "
      "microbatch_ramp: {}}}\n"
      "optimizer: {{lr: 3.0e-3}}\n"
      "schedule: {{warmup_steps: 2}}\n"
      "training: {{steps: {}, seed: 7, evaluation_batches: 1}}\n"
      "checkpoint: {{{}interval: {}}}\n"
      "recovery: {{max_restarts: {}, hang_timeout: {}, from_memory: {}, mirror: {}}}\n",
      job.name, job.hidden_size, job.seq_length, train, heldout, job.seq_length, job.pipeline,
      job.expert, job.data, job.microbatches, job.microbatch_ramp, job.steps, dir,
      job.checkpoint_interval, job.max_restarts, job.hang_timeout, job.from_memory, job.mirror);
}

ProgramRun penstock(const Cluster& cluster, std::vector<std::string> arguments) {
  arguments.insert(arguments.begin(), {binary("penstock").string(), "--server", cluster.server()});
  return run_program(arguments);
}

Outcome outcome(const Cluster& cluster, const std::string& id) {
  std::string weights_digest = cluster.final_weights(id);  // which waits for its end
  return {cluster.losses(id), std::move(weights_digest)};
}

Outcome undisturbed(const Cluster& cluster, TinyJob job) {
  job.name += "-undisturbed";
  job.mirror = "0";
  return outcome(cluster, cluster.submit(tiny_job_yaml(cluster.folder(), job)));
}

}  // namespace penstock
