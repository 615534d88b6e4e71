// A real cluster on loopback: penstock-coordinator and penstock-worker processes of this build, in
// a scratch folder of their own, on ports the system chose. Everything it started ends with it.
#pragma once

#include <chrono>
#include <functional>
#include <map>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <vector>

#include "comm/base/file.h"
#include "comm/control/http_client.h"
#include "comm/control/process.h"

namespace penstock {

using Json = nlohmann::json;
using std::chrono::seconds;

// How long a test waits for what must come: only a broken build, however slow its machine, takes
// this long.
#if defined(__SANITIZE_THREAD__) || defined(__SANITIZE_ADDRESS__)
inline constexpr seconds kPatience{960};
#else
inline constexpr seconds kPatience{240};
#endif

// Looks at `condition` every few milliseconds until it is true or `limit` has passed, not counting
// the time in which this process was stopped. Returns its last value.
bool wait_until(const std::function<bool()>& condition, std::chrono::milliseconds limit);

// A folder that is removed with everything in it.
class ScratchFolder {
 public:
  ScratchFolder();
  ~ScratchFolder();
  ScratchFolder(const ScratchFolder&) = delete;
  ScratchFolder& operator=(const ScratchFolder&) = delete;
  const Path& path() const { return path_; }

 private:
  Path path_;
};

// The path of a program of this build.
Path binary(const std::string& name);

struct ProgramRun {
  int exit_code = -1;
  std::string out;
  std::string err;
};
// Runs a program to its end. Output beyond 16 MiB is dropped.
ProgramRun run_program(const std::vector<std::string>& argv,
                       const std::vector<std::string>& environment = {});

struct ClusterOptions {
  int worker_count = 4;
  int devices_per_worker = 1;
  int heartbeat_interval_ms = 500;
  bool allow_chaos = false;  // workers let themselves be cut off from the coordinator
  std::vector<std::string> coordinator_arguments = {};  // more of them
  std::string rank_program =
      {};  // a shell script that workers run as penstock-rank, "$@" its words
};
inline const ClusterOptions kTwoByTwo{.worker_count = 2, .devices_per_worker = 2};

// Aborts the test process when a daemon cannot be started: nothing after that would mean anything.
class Cluster {
 public:
  explicit Cluster(const ClusterOptions& options = {});

  const Path& folder() const { return folder_.path(); }
  std::string server() const;  // "http://127.0.0.1:port"
  int control_port() const { return control_port_; }
  std::string log(const std::string& program) const;  // of "coordinator", "worker-0", …

  void start_coordinator();  // on the ports it had before, if any
  void kill_coordinator(int signal = 9);
  void signal_coordinator(int signal) const;   // that does not end it
  void start_worker(const std::string& name);  // "worker-0", …
  void kill_worker(const std::string& name, int signal = 9);

  // REQUIRES: the answer is JSON with HTTP status 200, 201 or 202.
  Json get(const std::string& path) const;
  std::optional<Json> try_get(const std::string& path) const;
  HttpReply call(const std::string& method, const std::string& path,
                 const std::string& body = "") const;

  // Submits and returns the job's id as text.
  std::string submit(const std::string& yaml) const;
  Json job(const std::string& id) const { return get("/api/v1/jobs/" + id); }
  bool wait_for_state(const std::string& id, const std::string& state,
                      seconds limit = kPatience) const;
  bool wait_for_step(const std::string& id, int64_t step, seconds limit = kPatience) const;
  // The loss of every step, by step, of the newest epoch that trained it.
  std::map<int64_t, double> losses(const std::string& id) const;
  // Steps that it trained, each as often as it did.
  size_t trained_steps(const std::string& id) const;
  // The digest of its weights, once it has succeeded; what became of it when it does not.
  std::string final_weights(const std::string& id) const;
  // The messages of its events of that code, in order.
  std::vector<std::string> event_messages(const std::string& id, const std::string& code) const;
  bool has_event(const std::string& id, const std::string& code) const;
  std::string describe(const std::string& id) const;  // job and events, for a failed expectation

  // Process number of a job's running rank on this host; 0 when there is none.
  pid_t rank_pid(const std::string& id, int rank) const;
  std::vector<pid_t> rank_pids(const std::string& id) const;

 private:
  void spawn(const std::string& name, std::vector<std::string> argv);

  ScratchFolder folder_;
  ClusterOptions options_;
  int http_port_ = 0;
  int control_port_ = 0;
  std::map<std::string, ChildProcess> daemons_;
};

// Runs `penstock ARGUMENTS` of this build against the cluster's coordinator.
ProgramRun penstock(const Cluster& cluster, std::vector<std::string> arguments);

// Writes a small data set of pseudo-random text with structure to learn, as
// <folder>/NAME.{bin,idx}; returns the prefix. Vocabulary 257 (bytes).
std::string make_dataset(const Path& folder, const std::string& name, uint64_t seed,
                         int64_t tokens);

struct TinyJob {
  std::string name = "tiny";
  int pipeline = 2;
  int expert = 2;
  int data = 1;
  int microbatches = 4;
  int steps = 30;
  int checkpoint_interval = 5;
  int hidden_size = 32;
  int seq_length = 32;
  int max_restarts = 5;
  int hang_timeout = 60;
  bool from_memory = true;
  std::string mirror = "0";
  std::string checkpoint_dir = "";  // empty: the coordinator's choice
  std::string microbatch_ramp = "[]";
};
// The job spec of a model small enough that a step takes milliseconds, on data sets made in
// `folder`.
std::string tiny_job_yaml(const Path& folder, const TinyJob& job);

// What a run comes to: equal, bit for bit, for runs of one job, whatever happens to them.
struct Outcome {
  std::map<int64_t, double> losses;
  std::string weights_digest;
  bool operator==(const Outcome&) const = default;
};
// Once it has succeeded; when it does not, what became of it stands in place of the digest.
Outcome outcome(const Cluster& cluster, const std::string& id);
// Of that job, under another name, when nothing happens to it and nothing is copied.
Outcome undisturbed(const Cluster& cluster, TinyJob job);

}  // namespace penstock
