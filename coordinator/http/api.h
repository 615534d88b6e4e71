// The HTTP/JSON API (docs/http-api.md): routes, long polls, and who may wait for what.
#pragma once

#include <functional>
#include <list>
#include <string>
#include <vector>

#include "comm/control/http_server.h"
#include "comm/control/metrics.h"
#include "coordinator/core/coordinator.h"
#include "coordinator/http/backups.h"
#include "coordinator/store/log_files.h"
#include "coordinator/store/record_store.h"

namespace penstock {

inline constexpr int64_t kWaitMsMax = 60'000;
// Long polls kept at once, of clients that went away included; further ones are answered at once.
inline constexpr size_t kWaitingMax = 1024;

// A checkpoint as the API lists it.
struct ListedCheckpoint {
  int64_t step = 0;
  Epoch epoch;
  std::string manifest;
  uint64_t bytes = 0;
  Instant created;
  std::string damage;  // why it cannot be restored; empty: nothing known against it
  bool pinned = false;
};

// What the API needs others to do. Callbacks run on the loop, at once or later.
struct ApiActions {
  // Feeds a command to the core: `make` gets the request's id and gives the event.
  std::function<void(std::function<Event(RequestId)> make, std::function<void(const Answer&)> done)>
      command;
  std::function<void(const Job& job,
                     std::function<void(Result<std::vector<ListedCheckpoint>>)> done)>
      list_checkpoints;
  // ok: the store takes writes.
  std::function<Status()> ready;
  std::function<Instant()> now;
};

// Loop thread only. Borrows everything it is given.
class Api {
 public:
  Api(const Coordinator& core, const RecordStore& store, const LogFiles& logs,
      MetricRegistry& metrics, ApiActions actions);

  void handle(const HttpRequest& request, HttpResponder respond);
  // Something was recorded: long polls look again. Cheap when nobody waits.
  void wake();
  // Long polls whose time is over get what there is; backups that nobody fetches are given up.
  void expire();
  size_t waiting() const { return waiting_.size(); }

 private:
  // Looks once. `last_look`: answer even when there is nothing new; else nullopt means wait.
  using Look = std::function<std::optional<HttpResponse>(bool last_look)>;
  struct Waiting {
    Look look;
    HttpResponder respond;
    Instant until;
  };

  void dispatch(const HttpRequest& request, HttpResponder respond, std::string* route);
  void dispatch_worker(const HttpRequest& request, const std::vector<std::string>& path,
                       HttpResponder respond, std::string* route);
  void dispatch_job(const HttpRequest& request, const std::vector<std::string>& path,
                    HttpResponder respond, std::string* route);
  void dispatch_backup(const HttpRequest& request, const std::vector<std::string>& path,
                       const HttpResponder& respond, std::string* route);
  void submit(const HttpRequest& request, HttpResponder respond);
  void cancel(const HttpRequest& request, JobId job, HttpResponder respond);
  void resume(const HttpRequest& request, JobId job, HttpResponder respond);
  void remove(const HttpRequest& request, const Job& job, HttpResponder respond);
  HttpResponse planned_rebalance(JobId id, int status) const;
  void answer_command(const Answer& answer, int status, const HttpResponder& respond) const;
  HttpResponse list_jobs(const HttpRequest& request) const;
  void list_checkpoints(const Job& job, HttpResponder respond) const;
  void follow_events(const HttpRequest& request, std::optional<JobId> job, HttpResponder respond);
  void follow_steps(const HttpRequest& request, JobId job, HttpResponder respond);
  void follow_log(const HttpRequest& request, JobId job, HttpResponder respond);
  void look_or_wait(const HttpRequest& request, Look look, HttpResponder respond);
  bool ended(std::optional<JobId> job) const;

  const Coordinator& core_;
  const RecordStore& store_;
  const LogFiles& logs_;
  MetricRegistry& metrics_;
  const ApiActions actions_;
  std::list<Waiting> waiting_;
  Backups backups_;
};

}  // namespace penstock
