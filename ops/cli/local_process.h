// Processes of this host that outlive the command that started them. A process number alone may
// belong to a stranger by now, so a process is known by its number, its start time and the boot it
// belongs to.
#pragma once

#include <sys/types.h>

#include <optional>
#include <string>
#include <vector>

#include "comm/base/clock.h"
#include "comm/base/file.h"
#include "comm/base/status.h"

namespace penstock {

struct LocalProcess {
  pid_t pid = 0;
  uint64_t start_ticks = 0;  // since boot, field 22 of /proc/PID/stat
  std::string boot_id;
  bool operator==(const LocalProcess&) const = default;
};

// The process that has this number now; nothing when there is none, or when it has ended and was
// not reaped.
std::optional<LocalProcess> find_process(pid_t pid);
bool is_alive(const LocalProcess& process);

// It has exited or was killed, and is not gone: a thread of it is still in the kernel, which a disk
// may hold up for minutes. Until then it has its locks and its ports. False when it has been gone,
// or when only its parent has not taken note.
bool is_ending(const LocalProcess& process);

// Starts argv[0] in a session of its own, with stdin from /dev/null and both output streams
// appended to `log`. It goes on when this process ends.
Result<LocalProcess> start_detached(const std::vector<std::string>& argv, const Path& log);

// Sends a signal to exactly this process, never to another that took its number. kNotFound when it
// has ended.
Status send_signal(const LocalProcess& process, int signal);
// Waits until it has ended, at most `limit`. Returns whether it has.
bool wait_for_end(const LocalProcess& process, Duration limit);

// Words of its command line; empty when it is gone.
std::vector<std::string> command_line_of(pid_t pid);
// 0 when it is gone.
pid_t parent_of(pid_t pid);
std::vector<pid_t> all_processes();

}  // namespace penstock
