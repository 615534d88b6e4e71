// Child processes: spawning, signalling and reaping, without races on process numbers.
#pragma once

#include <sys/types.h>

#include <optional>
#include <string>
#include <vector>

#include "comm/base/clock.h"
#include "comm/base/file.h"
#include "comm/base/status.h"
#include "comm/run/flight_record.h"

namespace penstock {

struct SpawnOptions {
  std::vector<std::string> argv;  // argv[0] is the program's path; PATH is not searched
  std::vector<std::string>
      environment;                // "NAME=value": added to this process's, replacing equal names
  Path working_directory;         // empty: this process's
  bool capture_output = true;     // false: the child writes to this process's stdout and stderr
  bool new_process_group = true;  // a Ctrl-C at the terminal then reaches the parent only
  // SIGKILL for the child as soon as the THREAD that spawned it ends (prctl PR_SET_PDEATHSIG):
  // spawn from a thread that lives as long as the process.
  bool die_with_parent = true;
  int kept_descriptor = -1;  // the child has it too, under the same number; -1: none
};

// How a process ended. Exactly one of the two says something.
struct ExitStatus {
  int exit_code = -1;  // -1 when a signal ended it
  int signal = 0;      // 0 when it exited by itself
  bool operator==(const ExitStatus&) const = default;
};

// "exited with code 14", "killed by signal 9 (SIGKILL)".
std::string to_string(const ExitStatus& status);

// What the kernel says of the process's main thread now.
ProcessState process_state(pid_t pid);

// One child. Move-only; owns the process: destroying one that still runs kills it with SIGKILL and
// reaps it. Not thread-safe.
class ChildProcess {
 public:
  // The child has only stdin (/dev/null), stdout, stderr and kept_descriptor open, default signal
  // actions and no blocked signals. Returns after exec: a program that does not exist or is not
  // executable is an error here, with its path.
  static Result<ChildProcess> spawn(const SpawnOptions& options);

  ChildProcess(ChildProcess&& other) noexcept;
  ChildProcess& operator=(ChildProcess&& other) noexcept;
  ~ChildProcess();

  pid_t pid() const { return pid_; }
  // Readable once the process ended: watch it, then try_wait(). Owned by this object.
  int pidfd() const { return pidfd_.get(); }
  // Non-blocking read ends of the child's output; invalid unless captured. Hands over ownership.
  FileDescriptor take_stdout() { return std::move(stdout_); }
  FileDescriptor take_stderr() { return std::move(stderr_); }

  // Sends a signal; never to another process that got the same number. Ended already: kNotFound.
  Status send_signal(int signal);
  // How it ended, as soon as it did; reaps it once and remembers.
  std::optional<ExitStatus> try_wait();
  // Blocks until it ends.
  ExitStatus wait();
  // Kills it and lets go of it, reaped if it ends within `patience`. One that the kernel holds, as
  // for a disk that does not answer, ends when that lets it, and is then this process's zombie.
  // Only destroying and assigning come after.
  void give_up(Duration patience);

 private:
  ChildProcess(pid_t pid, FileDescriptor pidfd) : pid_(pid), pidfd_(std::move(pidfd)) {}

  pid_t pid_ = 0;  // 0 after being moved from
  FileDescriptor pidfd_;
  FileDescriptor stdout_;
  FileDescriptor stderr_;
  std::optional<ExitStatus> exit_status_;
};

// The path of a program of the same installation: `name` in the folder of this process's own
// executable. kNotFound when there is no such executable file.
Result<Path> sibling_binary(const std::string& name);

}  // namespace penstock
