#include "comm/control/process.h"

#include <fcntl.h>
#include <linux/close_range.h>
#include <poll.h>
#include <signal.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>

#include "comm/base/check.h"

namespace penstock {
namespace {

// Debian 12's <sys/pidfd.h> declares these without C linkage, so C++ cannot link them.
int pidfd_open(pid_t pid) {
  return static_cast<int>(syscall(SYS_pidfd_open, pid, 0));
}
int pidfd_send_signal(int pidfd, int signal) {
  return static_cast<int>(syscall(SYS_pidfd_send_signal, pidfd, signal, nullptr, 0));
}

struct Pipe {
  FileDescriptor read;
  FileDescriptor write;
};

Result<Pipe> make_pipe() {
  std::array<int, 2> fds{};
  if (pipe2(fds.data(), O_CLOEXEC) != 0) return errno_status(errno, "pipe2");
  return Pipe{FileDescriptor(fds[0]), FileDescriptor(fds[1])};
}

// This process's environment with `additions` over it.
std::vector<std::string> merged_environment(const std::vector<std::string>& additions) {
  std::vector<std::string> merged = additions;
  const auto name_of = [](std::string_view entry) { return entry.substr(0, entry.find('=')); };
  for (char** entry = environ; *entry != nullptr; ++entry) {
    const bool replaced = std::any_of(additions.begin(), additions.end(), [&](const auto& added) {
      return name_of(added) == name_of(*entry);
    });
    if (!replaced) merged.emplace_back(*entry);
  }
  return merged;
}

std::vector<char*> pointers(std::vector<std::string>& strings) {
  std::vector<char*> out;
  out.reserve(strings.size() + 1);
  for (std::string& text : strings) out.push_back(text.data());
  out.push_back(nullptr);
  return out;
}

// Everything the child needs between fork and exec, made before the fork: other threads may hold
// the heap's lock at that moment, so the child must not allocate.
struct ChildPlan {
  char* const* argv;
  char* const* envp;
  const char* working_directory;  // nullptr: stay
  int stdin_fd;
  int stdout_fd;  // -1: inherit
  int stderr_fd;
  int error_fd;  // receives errno when exec fails; closed by exec
  int kept_fd;   // -1: none
  bool new_process_group;
  bool die_with_parent;
  pid_t parent;
};

[[noreturn]] void fail_child(const ChildPlan& plan) {
  const int error_number = errno;
  // The parent reads it or is gone; there is nobody else to tell.
  [[maybe_unused]] const ssize_t written = write(plan.error_fd, &error_number, sizeof error_number);
  _exit(127);
}

// Runs in the forked child: async-signal-safe calls only.
[[noreturn]] void become_child(const ChildPlan& plan) {
  if (plan.die_with_parent) {
    if (prctl(PR_SET_PDEATHSIG, SIGKILL) != 0) fail_child(plan);
    // The parent may have died before prctl: then nobody would ever send that signal.
    if (getppid() != plan.parent) _exit(127);
  }
  if (plan.new_process_group && setpgid(0, 0) != 0) fail_child(plan);
  struct sigaction default_action = {};
  default_action.sa_handler = SIG_DFL;
  for (int signal = 1; signal < NSIG; ++signal) sigaction(signal, &default_action, nullptr);
  sigset_t none;
  sigemptyset(&none);
  if (sigprocmask(SIG_SETMASK, &none, nullptr) != 0) fail_child(plan);
  if (dup2(plan.stdin_fd, STDIN_FILENO) < 0) fail_child(plan);
  if (plan.stdout_fd >= 0 && dup2(plan.stdout_fd, STDOUT_FILENO) < 0) fail_child(plan);
  if (plan.stderr_fd >= 0 && dup2(plan.stderr_fd, STDERR_FILENO) < 0) fail_child(plan);
  // Not only ours are O_CLOEXEC: libraries open descriptors too.
  if (close_range(3, ~0U, CLOSE_RANGE_CLOEXEC) != 0) fail_child(plan);
  if (plan.kept_fd >= 0 && fcntl(plan.kept_fd, F_SETFD, 0) != 0) fail_child(plan);
  if (plan.working_directory != nullptr && chdir(plan.working_directory) != 0) fail_child(plan);
  execve(plan.argv[0], plan.argv, plan.envp);
  fail_child(plan);
}

// What the child wrote before exec: nothing (0) when exec worked, else errno.
int read_exec_error(int fd) {
  int error_number = 0;
  ssize_t count = 0;
  do {
    count = read(fd, &error_number, sizeof error_number);
  } while (count < 0 && errno == EINTR);
  return count == sizeof error_number ? error_number : 0;
}

Status set_non_blocking(int fd) {
  const int flags = fcntl(fd, F_GETFL);
  if (flags < 0 || fcntl(fd, F_SETFL, flags | O_NONBLOCK) != 0) return errno_status(errno, "fcntl");
  return {};
}

ExitStatus decode_wait(const siginfo_t& info) {
  if (info.si_code == CLD_EXITED) return {.exit_code = info.si_status, .signal = 0};
  return {.exit_code = -1, .signal = info.si_status};
}

}  // namespace

std::string to_string(const ExitStatus& status) {
  if (status.signal == 0) return fmt::format("exited with code {}", status.exit_code);
  const char* name = sigabbrev_np(status.signal);
  if (name == nullptr) return fmt::format("killed by signal {}", status.signal);
  return fmt::format("killed by signal {} (SIG{})", status.signal, name);
}

Result<ChildProcess> ChildProcess::spawn(const SpawnOptions& options) {
  PENSTOCK_CHECK(!options.argv.empty());
  std::vector<std::string> arguments = options.argv;
  std::vector<std::string> environment = merged_environment(options.environment);
  const std::vector<char*> argv = pointers(arguments);
  const std::vector<char*> envp = pointers(environment);
  PENSTOCK_TRY_ASSIGN(FileDescriptor null_input, open_file("/dev/null", O_RDONLY));
  PENSTOCK_TRY_ASSIGN(Pipe error_pipe, make_pipe());
  Pipe stdout_pipe;
  Pipe stderr_pipe;
  if (options.capture_output) {
    PENSTOCK_TRY_ASSIGN(stdout_pipe, make_pipe());
    PENSTOCK_TRY_ASSIGN(stderr_pipe, make_pipe());
    PENSTOCK_TRY(set_non_blocking(stdout_pipe.read.get()));
    PENSTOCK_TRY(set_non_blocking(stderr_pipe.read.get()));
  }
  const ChildPlan plan = {
      .argv = argv.data(),
      .envp = envp.data(),
      .working_directory =
          options.working_directory.empty() ? nullptr : options.working_directory.c_str(),
      .stdin_fd = null_input.get(),
      .stdout_fd = stdout_pipe.write.get(),
      .stderr_fd = stderr_pipe.write.get(),
      .error_fd = error_pipe.write.get(),
      .kept_fd = options.kept_descriptor,
      .new_process_group = options.new_process_group,
      .die_with_parent = options.die_with_parent,
      .parent = getpid(),
  };
  const pid_t pid = fork();
  if (pid < 0) return errno_status(errno, fmt::format("fork for {}", options.argv[0]));
  if (pid == 0) become_child(plan);

  // From here a child exists: the object owns it on every path.
  const int pidfd = pidfd_open(pid);
  const int pidfd_error = errno;
  ChildProcess child(pid, FileDescriptor(pidfd));
  if (pidfd < 0) return errno_status(pidfd_error, "pidfd_open");
  child.stdout_ = std::move(stdout_pipe.read);
  child.stderr_ = std::move(stderr_pipe.read);
  error_pipe.write = FileDescriptor();
  if (const int error_number = read_exec_error(error_pipe.read.get()); error_number != 0) {
    return errno_status(error_number, fmt::format("start {}", options.argv[0]));
  }
  return child;
}

ChildProcess::ChildProcess(ChildProcess&& other) noexcept
    : pid_(std::exchange(other.pid_, 0)),
      pidfd_(std::move(other.pidfd_)),
      stdout_(std::move(other.stdout_)),
      stderr_(std::move(other.stderr_)),
      exit_status_(other.exit_status_) {}

ChildProcess& ChildProcess::operator=(ChildProcess&& other) noexcept {
  std::swap(pid_, other.pid_);
  std::swap(pidfd_, other.pidfd_);
  std::swap(stdout_, other.stdout_);
  std::swap(stderr_, other.stderr_);
  std::swap(exit_status_, other.exit_status_);
  return *this;
}

ChildProcess::~ChildProcess() {
  if (pid_ == 0 || exit_status_.has_value()) return;
  // Unreaped, so the number still is this child's.
  ::kill(pid_, SIGKILL);
  wait();
}

Status ChildProcess::send_signal(int signal) {
  PENSTOCK_CHECK(pid_ != 0);
  if (exit_status_.has_value()) return not_found(fmt::format("process {} has ended", pid_));
  if (pidfd_send_signal(pidfd_.get(), signal) == 0) return {};
  if (errno == ESRCH) return not_found(fmt::format("process {} has ended", pid_));
  return errno_status(errno, fmt::format("signal {} to process {}", signal, pid_));
}

std::optional<ExitStatus> ChildProcess::try_wait() {
  PENSTOCK_CHECK(pid_ != 0);
  if (exit_status_.has_value()) return exit_status_;
  siginfo_t info = {};
  const int rc = waitid(P_PID, static_cast<id_t>(pid_), &info, WEXITED | WNOHANG);
  PENSTOCK_CHECK(rc == 0, pid_, errno);
  if (info.si_pid == 0) return std::nullopt;
  exit_status_ = decode_wait(info);
  return exit_status_;
}

ExitStatus ChildProcess::wait() {
  PENSTOCK_CHECK(pid_ != 0);
  if (exit_status_.has_value()) return *exit_status_;
  siginfo_t info = {};
  int rc = 0;
  do {
    rc = waitid(P_PID, static_cast<id_t>(pid_), &info, WEXITED);
  } while (rc != 0 && errno == EINTR);
  PENSTOCK_CHECK(rc == 0, pid_, errno);
  exit_status_ = decode_wait(info);
  return *exit_status_;
}

void ChildProcess::give_up(Duration patience) {
  PENSTOCK_CHECK(pid_ != 0);
  if (!exit_status_.has_value()) {
    ::kill(pid_, SIGKILL);  // unreaped, so the number still is this child's
    pollfd end = {pidfd_.get(), POLLIN, 0};
    const auto patience_ms = std::chrono::ceil<std::chrono::milliseconds>(patience);
    (void)::poll(&end, 1, static_cast<int>(patience_ms.count()));
    (void)try_wait();
  }
  pid_ = 0;
}

ProcessState process_state(pid_t pid) {
  const Path path = fmt::format("/proc/{}/stat", pid);
  const Result<FileDescriptor> file = open_file(path, O_RDONLY);
  if (!file.ok()) return ProcessState::kUnknown;
  std::array<char, 256> buffer;
  const ssize_t count = read(file->get(), buffer.data(), buffer.size());
  const std::string_view text(buffer.data(), static_cast<size_t>(std::max<ssize_t>(count, 0)));
  const size_t end_of_name = text.rfind(')');  // a name may hold anything
  if (end_of_name == std::string_view::npos || end_of_name + 2 >= text.size()) {
    return ProcessState::kUnknown;
  }
  switch (text[end_of_name + 2]) {
    case 'R':
      return ProcessState::kRunning;
    case 'S':
    case 'I':
      return ProcessState::kSleeping;
    case 'D':
      return ProcessState::kDiskSleep;
    case 'T':
    case 't':
      return ProcessState::kStopped;
    case 'Z':
    case 'X':
      return ProcessState::kEnded;
    default:
      return ProcessState::kUnknown;
  }
}

Result<Path> sibling_binary(const std::string& name) {
  std::error_code error;
  const Path self = std::filesystem::read_symlink("/proc/self/exe", error);
  if (error) return internal_error(fmt::format("read /proc/self/exe: {}", error.message()));
  const Path path = self.parent_path() / name;
  if (access(path.c_str(), X_OK) == 0) return path;
  return not_found(fmt::format("no program {} in {}: install Penstock's programs in one folder",
                               name, self.parent_path().string()));
}

}  // namespace penstock
