#include "ops/cli/dev_cluster.h"

#include <arpa/inet.h>
#include <fcntl.h>
#include <signal.h>
#include <sys/file.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <map>
#include <nlohmann/json.hpp>
#include <set>
#include <thread>

#include "comm/base/counted.h"
#include "comm/control/http_client.h"
#include "comm/control/process.h"
#include "ops/cli/output.h"

namespace penstock {

namespace {

using std::chrono::milliseconds;
using std::chrono::seconds;

// Nothing is given up while its process lives: on a disk that others keep busy, opening a store can
// take a minute, and who gives up and tries again begins from the start.
constexpr seconds kStartLimit{600};
constexpr seconds kEndLimit{600};
constexpr seconds kSayEvery{10};
constexpr seconds kStopLimit{10};
// A worker's jobs may save before it ends (penstock-worker --grace).
constexpr seconds kWorkerStopLimit{40};
constexpr milliseconds kLookEvery{20};
constexpr int kDefaultPort = 7070;
constexpr int kDefaultWorkers = 4;
constexpr uint64_t kStateBytesMax = 1 << 20;

std::string worker_name(int index) {
  return fmt::format("worker-{}", index);
}

Path state_file(const Path& state_dir) {
  return state_dir / "dev.json";
}

// Held while a cluster is started or stopped: two commands at once would start everything twice.
Result<FileDescriptor> lock(const Path& state_dir) {
  if (const Status made = create_directories_durably(state_dir); !made.ok()) {
    return Status(made.code(), made.message() +
                                   "; the cluster keeps its state there: name another folder with "
                                   "--state-dir or PENSTOCK_DEV_STATE_DIR");
  }
  PENSTOCK_TRY_ASSIGN(FileDescriptor file, open_file(state_dir / "dev.lock", O_RDWR | O_CREAT));
  if (::flock(file.get(), LOCK_EX | LOCK_NB) != 0) {
    return failed_precondition(
        fmt::format("another penstock dev command is at work in {}; try again when it is done",
                    state_dir.string()));
  }
  return file;
}

Status save(const Path& state_dir, const DevState& state) {
  Json processes = Json::array();
  for (const DevProcess& p : state.processes) {
    processes.push_back({{"name", p.name},
                         {"pid", p.process.pid},
                         {"start_ticks", p.process.start_ticks},
                         {"boot_id", p.process.boot_id},
                         {"log", p.log}});
  }
  const Json json = {{"http_port", state.http_port},
                     {"control_port", state.control_port},
                     {"worker_count", state.worker_count_wanted},
                     {"devices_per_worker", state.devices_per_worker},
                     {"processes", processes}};
  return replace_file_durably(state_file(state_dir), as_bytes(json.dump(2) + "\n"));
}

std::string last_lines(const std::string& log) {
  constexpr int kLinesShown = 5;
  const auto text = read_file(log, uint64_t{256} << 20);
  if (!text.ok()) return "(" + text.status().message() + ")";
  size_t begin = text->size();
  for (int line = 0; line <= kLinesShown && begin != std::string::npos && begin > 0; ++line) {
    begin = text->rfind('\n', begin - 1);
  }
  return begin == std::string::npos || begin == 0 ? *text : text->substr(begin + 1);
}

Status died(const DevProcess& process) {
  return internal_error(fmt::format("{} ended while it was starting; the end of {}:\n{}",
                                    process.name, process.log, last_lines(process.log)));
}

using Note = std::function<void(std::string)>;

// Looks until `done` says so. A process that has died, or the time ends it. `what` it waits for is
// said now and then when it takes long.
Status look_until(const std::vector<DevProcess>& processes,
                  const std::function<std::string()>& what, const Note& note,
                  const std::function<bool()>& done) {
  const int64_t begun_ns = monotonic_ns();
  const int64_t deadline_ns = begun_ns + std::chrono::nanoseconds(kStartLimit).count();
  int64_t say_at_ns = begun_ns + std::chrono::nanoseconds(kSayEvery).count();
  while (!done()) {
    if (monotonic_ns() > say_at_ns) {
      note(fmt::format("{} after {} s; waiting; logs are in {}", what(),
                       (monotonic_ns() - begun_ns) / 1'000'000'000,
                       Path(processes.front().log).parent_path().string()));
      say_at_ns += std::chrono::nanoseconds(kSayEvery).count();
    }
    for (const DevProcess& process : processes) {
      if (!is_alive(process.process)) return died(process);
    }
    if (monotonic_ns() > deadline_ns) {
      return deadline_exceeded(fmt::format("{} after {} seconds; logs are in {}", what(),
                                           kStartLimit.count(),
                                           Path(processes.front().log).parent_path().string()));
    }
    std::this_thread::sleep_for(kLookEvery);
  }
  return {};
}

// A process that was killed a moment ago still has its locks and its ports, and looks as if it ran.
Status wait_for_ending(const DevState& state, const Note& note) {
  const int64_t deadline_ns = monotonic_ns() + std::chrono::nanoseconds(kEndLimit).count();
  for (const DevProcess& process : state.processes) {
    const int64_t say_at_ns = monotonic_ns() + std::chrono::nanoseconds(seconds(1)).count();
    for (bool said = false; is_ending(process.process); std::this_thread::sleep_for(kLookEvery)) {
      const std::string what = fmt::format("{} (process {}) was killed and is not gone yet",
                                           process.name, process.process.pid);
      if (monotonic_ns() > deadline_ns) {
        return deadline_exceeded(
            fmt::format("{} after {} s: something in the kernel holds it, most likely a disk", what,
                        kEndLimit.count()));
      }
      if (!said && monotonic_ns() > say_at_ns) {
        note(what + "; waiting for that");
        said = true;
      }
    }
  }
  return {};
}

std::optional<Json> get_json(const std::string& url) {
  const auto reply = http_call({.url = url, .body = {}, .deadline = seconds(2)});
  if (!reply.ok() || reply->status != 200) return std::nullopt;
  Json json = Json::parse(reply->body, nullptr, false);
  if (!json.is_object()) return std::nullopt;
  return json;
}

// Tried here too, not only by the coordinator, so that the answer has a code and not just a log.
Status check_port_is_free(int port) {
  const FileDescriptor socket(::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0));
  const int reuse = 1;  // as the coordinator does: connections that have ended do not count
  ::setsockopt(socket.get(), SOL_SOCKET, SO_REUSEADDR, &reuse, sizeof(reuse));
  sockaddr_in address = {};
  address.sin_family = AF_INET;
  address.sin_port = htons(static_cast<uint16_t>(port));
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  if (::bind(socket.get(), reinterpret_cast<const sockaddr*>(&address), sizeof(address)) == 0) {
    return {};
  }
  if (errno != EADDRINUSE) return errno_status(errno, fmt::format("use port {}", port));
  const std::string server = fmt::format("http://127.0.0.1:{}", port);
  const bool is_penstock = get_json(server + "/api/v1/version").has_value();
  return already_exists(
      fmt::format("port {} is in use by {}; choose another with --port, or --port 0 for any free "
                  "one",
                  port,
                  is_penstock ? "a coordinator that is not of this state folder (penstock ps "
                                "--server " +
                                    server + ")"
                              : "another program"));
}

bool is_ready(const std::string& server) {
  const auto reply = http_call({.url = server + "/readyz", .body = {}, .deadline = seconds(2)});
  return reply.ok() && reply->status == 200;
}

// Process numbers of those that have a rank as their child.
std::set<pid_t> parents_of_ranks() {
  std::set<pid_t> parents;
  for (const pid_t pid : all_processes()) {
    const auto words = command_line_of(pid);
    if (!words.empty() && Path(words[0]).filename() == "penstock-rank") {
      parents.insert(parent_of(pid));
    }
  }
  return parents;
}

// One start of a cluster: knows what it started, to undo it.
class Starter {
 public:
  Starter(const DevOptions& options, DevState state, const std::function<void(std::string)>& note)
      : options_(options), state_(std::move(state)), note_(note) {}

  Result<DevState> run() {
    const Status status = start_all();
    if (status.ok()) return state_;
    stop_started();
    std::erase_if(state_.processes, [](const DevProcess& p) { return !is_alive(p.process); });
    PENSTOCK_TRY(save(options_.state_dir, state_));
    return status;
  }

 private:
  Status start_all() {
    if (!dev_coordinator_runs(state_)) PENSTOCK_TRY(start_coordinator());
    for (const auto& [name, worker] : known_workers()) before_[name] = worker.incarnation;
    for (int i = 0; i < state_.worker_count_wanted; ++i) PENSTOCK_TRY(start_worker(i));
    return look_until(
        state_.processes, [&] { return missing_words(); }, note_,
        [&] { return missing_workers().empty(); });
  }

  // Not a worker whose ranks train, nor then the coordinator, whom ranks of any worker may need.
  void stop_started() {
    const std::set<pid_t> parents = parents_of_ranks();
    const auto has_ranks = [&](const DevProcess& p) { return parents.contains(p.process.pid); };
    const bool any_ranks = std::any_of(state_.processes.begin(), state_.processes.end(), has_ranks);
    for (auto process = started_.rbegin(); process != started_.rend(); ++process) {
      const bool is_needed = process->name == "coordinator" ? any_ranks : has_ranks(*process);
      if (!is_needed) {
        (void)send_signal(process->process, SIGKILL);
      } else if (is_alive(process->process)) {
        note_(fmt::format("{} stays, since ranks of jobs run", process->name));
      }
    }
  }

  // Records the process before anything else can fail, so that nothing is ever started and
  // forgotten.
  Status start(const std::string& name, std::vector<std::string> argv) {
    PENSTOCK_TRY_ASSIGN(const Path program, sibling_binary(argv[0]));
    argv[0] = program.string();
    const std::string log = (options_.state_dir / (name + ".log")).string();
    PENSTOCK_TRY_ASSIGN(const LocalProcess process, start_detached(argv, log));
    const DevProcess entry = {name, process, log};
    started_.push_back(entry);
    std::erase_if(state_.processes, [&](const DevProcess& p) { return p.name == name; });
    // The coordinator stays first.
    state_.processes.insert(
        name == "coordinator" ? state_.processes.begin() : state_.processes.end(), entry);
    PENSTOCK_TRY(save(options_.state_dir, state_));
    note_(fmt::format("started {} (process {})", name, process.pid));
    return {};
  }

  Status start_coordinator() {
    const Path folder = options_.state_dir / "coordinator";
    const Path endpoints = folder / "endpoints.json";
    ::unlink(endpoints.c_str());  // a new one says that it listens
    const int port = options_.port      ? *options_.port
                     : state_.http_port ? state_.http_port
                                        : kDefaultPort;
    PENSTOCK_TRY(check_port_is_free(port));
    PENSTOCK_TRY(start("coordinator", {"penstock-coordinator", "--state-dir", folder.string(),
                                       "--http-port", std::to_string(port), "--control-port",
                                       std::to_string(state_.control_port)}));
    PENSTOCK_TRY(look_until(
        {started_.back()}, [] { return "the coordinator does not answer"; }, note_,
        [&] { return read_endpoints(endpoints) && is_ready(state_.server()); }));
    return save(options_.state_dir, state_);
  }

  bool read_endpoints(const Path& path) {
    const auto text = read_file(path, kStateBytesMax);
    const Json json = text.ok() ? Json::parse(*text, nullptr, false) : Json();
    if (!json.is_object()) return false;
    state_.http_port = static_cast<int>(field_number(json, "http_port"));
    state_.control_port = static_cast<int>(field_number(json, "control_port"));
    return state_.http_port > 0 && state_.control_port > 0;
  }

  Status start_worker(int index) {
    const std::string name = worker_name(index);
    const DevProcess* known = state_.find(name);
    if (known != nullptr && is_alive(known->process)) return {};
    return start(name, {"penstock-worker", "--coordinator",
                        fmt::format("tcp://127.0.0.1:{}", state_.control_port), "--name", name,
                        "--devices", std::to_string(state_.devices_per_worker), "--http-port", "0",
                        "--state-dir", (options_.state_dir / name).string(), "--allow-chaos"});
  }

  struct KnownWorker {
    std::string state;
    std::string incarnation;
  };

  // What the coordinator knows, by name.
  std::map<std::string, KnownWorker> known_workers() const {
    std::map<std::string, KnownWorker> workers;
    const auto list = get_json(state_.server() + "/api/v1/workers");
    if (!list) return workers;
    for (const Json& worker : list->value("items", Json::array())) {
      workers[field_string(worker, "name")] = {field_string(worker, "state"),
                                               field_string(worker, "incarnation")};
    }
    return workers;
  }

  // Those that have not registered. One that takes no ranks (drained, in quarantine) has. The
  // coordinator takes a worker that died for up until its heartbeats are missed, so one that was
  // started here counts only as a new process.
  std::vector<std::string> missing_workers() const {
    const auto known = known_workers();
    std::vector<std::string> missing;
    for (int i = 0; i < state_.worker_count_wanted; ++i) {
      const std::string name = worker_name(i);
      const bool started = std::any_of(started_.begin(), started_.end(),
                                       [&](const DevProcess& p) { return p.name == name; });
      const auto worker = known.find(name);
      const auto old = before_.find(name);
      const bool gone =
          worker == known.end() || worker->second.state == "lost" || worker->second.state == "left";
      const bool stale =
          started && !gone && old != before_.end() && old->second == worker->second.incarnation;
      if (gone || stale) missing.push_back(name);
    }
    return missing;
  }

  std::string missing_words() const {
    const std::vector<std::string> missing = missing_workers();
    if (missing.empty()) return "not every worker has registered";
    return fmt::format("{} {} not registered", fmt::join(missing, ", "),
                       missing.size() == 1 ? "has" : "have");
  }

  const DevOptions& options_;
  DevState state_;
  const std::function<void(std::string)>& note_;
  std::vector<DevProcess> started_;
  std::map<std::string, std::string> before_;  // incarnations, before any worker was started
};

std::string flag_value(const std::vector<std::string>& words, const std::string& flag) {
  const auto at = std::find(words.begin(), words.end(), flag);
  return at == words.end() || at + 1 == words.end() ? "" : *(at + 1);
}

// Waits for a process that was asked to end, and kills it then.
void await_end(const LocalProcess& process, seconds limit) {
  if (wait_for_end(process, limit)) return;
  (void)send_signal(process, SIGKILL);
  wait_for_end(process, kStopLimit);
}

}  // namespace

std::string DevState::server() const {
  return fmt::format("http://127.0.0.1:{}", http_port);
}

const DevProcess* DevState::find(const std::string& name) const {
  const auto found = std::find_if(processes.begin(), processes.end(),
                                  [&](const DevProcess& p) { return p.name == name; });
  return found == processes.end() ? nullptr : &*found;
}

int DevState::worker_count() const {
  return static_cast<int>(
      std::count_if(processes.begin(), processes.end(),
                    [](const DevProcess& p) { return p.name.starts_with("worker-"); }));
}

Path dev_state_dir(const std::string& flag) {
  const auto variable = [](const char* name) {
    const char* value = std::getenv(name);
    return std::string(value == nullptr ? "" : value);
  };
  Path path = default_state_dir("dev");
  if (!variable("PENSTOCK_DEV_STATE_DIR").empty()) path = variable("PENSTOCK_DEV_STATE_DIR");
  if (!flag.empty()) path = flag;
  std::error_code error;
  const Path absolute = std::filesystem::absolute(path, error);
  return error ? path : absolute.lexically_normal();
}

Result<DevState> load_dev_state(const Path& state_dir) {
  const auto text = read_file(state_file(state_dir), kStateBytesMax);
  if (!text.ok()) {
    if (text.status().code() == Code::kNotFound) return DevState{};
    return text.status();
  }
  const Json json = Json::parse(*text, nullptr, false);
  if (!json.is_object() || !json.value("processes", Json()).is_array()) {
    return data_loss(fmt::format("{} is damaged; end the processes it named by hand and remove it",
                                 state_file(state_dir).string()));
  }
  DevState state;
  state.http_port = static_cast<int>(field_number(json, "http_port"));
  state.control_port = static_cast<int>(field_number(json, "control_port"));
  state.worker_count_wanted = static_cast<int>(field_number(json, "worker_count"));
  state.devices_per_worker = static_cast<int>(field_number(json, "devices_per_worker"));
  for (const Json& entry : json["processes"]) {
    if (!entry.is_object()) continue;
    state.processes.push_back(
        {field_string(entry, "name"),
         {.pid = static_cast<pid_t>(field_number(entry, "pid")),
          .start_ticks = static_cast<uint64_t>(field_number(entry, "start_ticks")),
          .boot_id = field_string(entry, "boot_id")},
         field_string(entry, "log")});
  }
  return state;
}

bool dev_coordinator_runs(const DevState& state) {
  const DevProcess* coordinator = state.find("coordinator");
  return coordinator != nullptr && is_alive(coordinator->process);
}

Result<DevState> dev_up(const DevOptions& options, const std::function<void(std::string)>& note) {
  PENSTOCK_TRY_ASSIGN(const FileDescriptor held, lock(options.state_dir));
  PENSTOCK_TRY_ASSIGN(DevState state, load_dev_state(options.state_dir));
  PENSTOCK_TRY(wait_for_ending(state, note));
  if (dev_coordinator_runs(state) && options.port.value_or(0) != 0 &&
      *options.port != state.http_port) {
    return failed_precondition(
        fmt::format("a cluster runs at {} already; penstock dev down ends it", state.server()));
  }
  std::erase_if(state.processes, [](const DevProcess& p) { return !is_alive(p.process); });
  if (options.devices_per_worker && state.worker_count() > 0 &&
      *options.devices_per_worker != state.devices_per_worker) {
    return failed_precondition(fmt::format(
        "the workers that run have {} each; to change that: penstock dev down; penstock dev up "
        "--devices-per-worker {}",
        counted(state.devices_per_worker, "device"), *options.devices_per_worker));
  }
  const auto choose = [](std::optional<int> given, int& kept, int otherwise) {
    if (given || kept <= 0) kept = given.value_or(otherwise);
  };
  choose(options.worker_count, state.worker_count_wanted, kDefaultWorkers);
  choose(options.devices_per_worker, state.devices_per_worker, 1);
  if (state.worker_count() > state.worker_count_wanted) {
    return failed_precondition(
        fmt::format("{} run already, more than the {} asked for; penstock dev down ends them",
                    counted(state.worker_count(), "worker"), state.worker_count_wanted));
  }
  return Starter(options, std::move(state), note).run();
}

Result<std::vector<std::string>> dev_down(const Path& state_dir) {
  std::vector<std::string> stopped;
  std::error_code error;
  if (!std::filesystem::exists(state_file(state_dir), error)) return stopped;
  PENSTOCK_TRY_ASSIGN(const FileDescriptor held, lock(state_dir));
  PENSTOCK_TRY_ASSIGN(DevState state, load_dev_state(state_dir));
  // Workers first, all at once: what their ranks save the coordinator has yet to commit.
  for (const bool workers : {true, false}) {
    std::vector<DevProcess> alive;
    for (const DevProcess& process : state.processes) {
      const bool is_worker = process.name != "coordinator";
      if (is_worker != workers || !is_alive(process.process)) continue;
      if (send_signal(process.process, SIGTERM).ok()) alive.push_back(process);
    }
    for (const DevProcess& process : alive) {
      await_end(process.process, workers ? kWorkerStopLimit : kStopLimit);
      if (is_alive(process.process)) {
        return internal_error(
            fmt::format("{} (process {}) does not end", process.name, process.process.pid));
      }
      stopped.push_back(process.name);
    }
  }
  // The rest is kept, so that the next start has the same addresses and workers.
  state.processes.clear();
  PENSTOCK_TRY(save(state_dir, state));
  return stopped;
}

Result<LocalProcess> find_dev_rank(const DevState& state, const std::string& job_id, int64_t rank) {
  for (const pid_t pid : all_processes()) {
    const auto words = command_line_of(pid);
    if (words.empty() || Path(words[0]).filename() != "penstock-rank") continue;
    if (flag_value(words, "--job") != job_id ||
        flag_value(words, "--rank") != std::to_string(rank)) {
      continue;
    }
    const auto process = find_process(pid);
    const pid_t parent = parent_of(pid);
    const bool ours = std::any_of(
        state.processes.begin(), state.processes.end(),
        [&](const DevProcess& p) { return p.process.pid == parent && is_alive(p.process); });
    if (process && ours) return *process;
  }
  return not_found(
      fmt::format("no worker of this cluster runs rank {} of job {} now; penstock describe {} "
                  "shows where its ranks are",
                  rank, job_id, job_id));
}

}  // namespace penstock
