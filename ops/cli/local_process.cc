#include "ops/cli/local_process.h"

#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <spawn.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <charconv>
#include <cstdlib>
#include <sstream>

namespace penstock {

namespace {

constexpr uint64_t kProcFileBytesMax = 1 << 20;

std::string boot_id() {
  auto text = read_file("/proc/sys/kernel/random/boot_id", 4096);
  if (!text.ok()) return {};
  text->erase(text->find_last_not_of("\n ") + 1);
  return *text;
}

struct ProcessStat {
  char state = '?';  // of its first thread
  pid_t parent = 0;
  int64_t threads = 0;
  uint64_t start_ticks = 0;
  bool has_exited() const { return state == 'Z' || state == 'X'; }
};

std::optional<ProcessStat> read_stat(pid_t pid) {
  const auto text = read_file(fmt::format("/proc/{}/stat", pid), kProcFileBytesMax);
  // The name, field 2, may hold anything, parentheses included; fields are counted from its end.
  const size_t name_end = text.ok() ? text->rfind(')') : std::string::npos;
  if (name_end == std::string::npos) return std::nullopt;
  std::istringstream fields(text->substr(name_end + 1));
  ProcessStat stat;
  fields >> stat.state >> stat.parent;
  constexpr int kFirstSkipped = 5, kThreads = 20, kStartTime = 22;
  std::string skipped;
  for (int field = kFirstSkipped; field < kThreads; ++field) fields >> skipped;
  fields >> stat.threads >> skipped >> stat.start_ticks;
  static_assert(kThreads + 2 == kStartTime);
  return fields ? std::optional(stat) : std::nullopt;
}

// The kernel keeps a SIGKILL pending on threads that cannot act on it yet.
bool sigkill_is_pending(pid_t pid) {
  const auto text = read_file(fmt::format("/proc/{}/status", pid), kProcFileBytesMax);
  if (!text.ok()) return false;
  for (const std::string_view line : {"\nSigPnd:", "\nShdPnd:"}) {
    const size_t at = text->find(line);
    if (at == std::string::npos) continue;
    const uint64_t pending = std::strtoull(text->c_str() + at + line.size(), nullptr, 16);
    if ((pending >> (SIGKILL - 1) & 1) != 0) return true;
  }
  return false;
}

// A descriptor that is this process and no other: opened first, then checked.
Result<FileDescriptor> open_process(const LocalProcess& process) {
  const int fd = static_cast<int>(::syscall(SYS_pidfd_open, process.pid, 0));
  if (fd < 0) return not_found(fmt::format("process {} has ended", process.pid));
  FileDescriptor descriptor(fd);
  if (!is_alive(process)) return not_found(fmt::format("process {} has ended", process.pid));
  return descriptor;
}

}  // namespace

std::optional<LocalProcess> find_process(pid_t pid) {
  const auto stat = read_stat(pid);
  if (!stat || stat->has_exited()) return std::nullopt;
  return LocalProcess{pid, stat->start_ticks, boot_id()};
}

bool is_alive(const LocalProcess& process) {
  if (process.pid <= 0) return false;
  ::waitpid(process.pid, nullptr, WNOHANG);  // reaps it when it was this process's child
  return find_process(process.pid) == process;
}

bool is_ending(const LocalProcess& process) {
  const auto stat = read_stat(process.pid);
  if (!stat || stat->start_ticks != process.start_ticks || boot_id() != process.boot_id) {
    return false;
  }
  return stat->has_exited() ? stat->threads > 1 : sigkill_is_pending(process.pid);
}

Result<LocalProcess> start_detached(const std::vector<std::string>& argv, const Path& log) {
  PENSTOCK_TRY_ASSIGN(const FileDescriptor output, open_file(log, O_WRONLY | O_CREAT | O_APPEND));
  posix_spawn_file_actions_t actions;
  posix_spawnattr_t attributes;
  ::posix_spawn_file_actions_init(&actions);
  ::posix_spawnattr_init(&attributes);
  ::posix_spawn_file_actions_addopen(&actions, STDIN_FILENO, "/dev/null", O_RDONLY, 0);
  ::posix_spawn_file_actions_adddup2(&actions, output.get(), STDOUT_FILENO);
  ::posix_spawn_file_actions_adddup2(&actions, output.get(), STDERR_FILENO);
  ::posix_spawn_file_actions_addclosefrom_np(&actions, 3);
  ::posix_spawnattr_setflags(&attributes, POSIX_SPAWN_SETSID);
  std::vector<std::string> words = argv;
  std::vector<char*> pointers;
  for (std::string& word : words) pointers.push_back(word.data());
  pointers.push_back(nullptr);
  pid_t pid = 0;
  const int error =
      ::posix_spawn(&pid, argv[0].c_str(), &actions, &attributes, pointers.data(), environ);
  ::posix_spawn_file_actions_destroy(&actions);
  ::posix_spawnattr_destroy(&attributes);
  if (error != 0) return errno_status(error, "start " + argv[0]);
  const auto started = find_process(pid);
  if (!started)
    return internal_error(fmt::format("{} ended at once; see {}", argv[0], log.string()));
  return *started;
}

Status send_signal(const LocalProcess& process, int signal) {
  PENSTOCK_TRY_ASSIGN(const FileDescriptor descriptor, open_process(process));
  if (::syscall(SYS_pidfd_send_signal, descriptor.get(), signal, nullptr, 0) == 0) return {};
  if (errno == ESRCH) return not_found(fmt::format("process {} has ended", process.pid));
  return errno_status(errno, fmt::format("signal process {}", process.pid));
}

bool wait_for_end(const LocalProcess& process, Duration limit) {
  const auto descriptor = open_process(process);
  if (!descriptor.ok()) return true;
  pollfd watched = {descriptor->get(), POLLIN, 0};
  const int64_t deadline_ns = monotonic_ns() + limit.count();
  while (true) {
    const int64_t left_ns = std::max<int64_t>(0, deadline_ns - monotonic_ns());
    const int count = ::poll(&watched, 1, static_cast<int>(left_ns / 1'000'000));
    if (count < 0 && errno == EINTR) continue;
    return count > 0 || !is_alive(process);
  }
}

std::vector<std::string> command_line_of(pid_t pid) {
  const auto text = read_file(fmt::format("/proc/{}/cmdline", pid), kProcFileBytesMax);
  std::vector<std::string> words;
  if (!text.ok()) return words;
  for (size_t begin = 0; begin < text->size();) {
    const size_t end = std::min(text->find('\0', begin), text->size());
    words.push_back(text->substr(begin, end - begin));
    begin = end + 1;
  }
  return words;
}

pid_t parent_of(pid_t pid) {
  const auto stat = read_stat(pid);
  return stat && !stat->has_exited() ? stat->parent : 0;
}

std::vector<pid_t> all_processes() {
  std::vector<pid_t> pids;
  std::error_code error;
  for (const auto& entry : std::filesystem::directory_iterator("/proc", error)) {
    const std::string name = entry.path().filename();
    pid_t pid = 0;
    const auto [end, failed] = std::from_chars(name.data(), name.data() + name.size(), pid);
    if (failed == std::errc() && end == name.data() + name.size()) pids.push_back(pid);
  }
  return pids;
}

}  // namespace penstock
