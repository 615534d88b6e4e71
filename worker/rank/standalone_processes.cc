// Standalone ranks as forked processes on UCX. The parent only passes text lines: each child sends
// its address, gets everyone's, and ends with its tensor digests or its error.
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <charconv>
#include <csignal>

#include "comm/base/file.h"
#include "comm/data/ucx_transport.h"
#include "worker/rank/standalone_rank.h"

namespace penstock {
namespace {

constexpr size_t kLineBytesMax = 1 << 20;

// A stream socket that carries lines between the parent and one child.
class LineSocket {
 public:
  explicit LineSocket(FileDescriptor fd) : fd_(std::move(fd)) {}

  Status send(std::string line) {
    line += '\n';
    for (size_t sent = 0; sent < line.size();) {
      const ssize_t count = ::send(fd_.get(), line.data() + sent, line.size() - sent, MSG_NOSIGNAL);
      if (count < 0 && errno == EINTR) continue;
      if (count < 0) return errno_status(errno, "send to a rank process");
      sent += static_cast<size_t>(count);
    }
    return {};
  }
  // kUnavailable when the other side closed.
  Result<std::string> receive() {
    for (;;) {
      if (const size_t end = buffered_.find('\n'); end != std::string::npos) {
        std::string line = buffered_.substr(0, end);
        buffered_.erase(0, end + 1);
        return line;
      }
      if (buffered_.size() > kLineBytesMax) return data_loss("a rank process sent an endless line");
      char bytes[4096];
      const ssize_t count = ::recv(fd_.get(), bytes, sizeof(bytes), 0);
      if (count < 0 && errno == EINTR) continue;
      if (count < 0) return errno_status(errno, "receive from a rank process");
      if (count == 0) return unavailable("a rank process ended");
      buffered_.append(bytes, static_cast<size_t>(count));
    }
  }

 private:
  FileDescriptor fd_;
  std::string buffered_;
};

struct Child {
  pid_t pid = 0;
  LineSocket socket;
};

constexpr std::string_view kFailed = "failed ";
constexpr std::string_view kEnd = "end";

Status run_child(const StandaloneOptions& options, Rank rank, LineSocket& parent,
                 std::vector<TrainingState::TensorDigest>* digests) {
  const auto world_size = static_cast<int32_t>(options.spec.parallelism.world_size());
  PENSTOCK_TRY_ASSIGN(const std::unique_ptr<RankProbe> probe, make_probe(options, rank));
  UcxOptions ucx{.rank = rank, .world_size = world_size, .epoch = Epoch{1}};
  if (!options.ucx_tls.empty()) ucx.tls = options.ucx_tls;
  PENSTOCK_TRY_ASSIGN(const std::unique_ptr<UcxTransport> transport, UcxTransport::create(ucx));
  StandaloneRank self{
      .job = JobId{1}, .rank = rank, .transport = transport.get(), .probe = probe.get()};
  self.connect = [&]() -> Status {
    PENSTOCK_TRY(parent.send(transport->address()));
    std::vector<std::string> addresses;
    for (int32_t r = 0; r < world_size; ++r) {
      PENSTOCK_TRY_ASSIGN(std::string address, parent.receive());
      addresses.push_back(std::move(address));
    }
    return transport->connect(addresses);
  };
  StandaloneReport report;
  PENSTOCK_TRY(run_standalone_rank(options, self, rank.value == 0 ? &report : nullptr, digests));
  return transport->close();
}

[[noreturn]] void child_main(const StandaloneOptions& options, Rank rank, LineSocket parent) {
  ::prctl(PR_SET_PDEATHSIG, SIGKILL);
  std::vector<TrainingState::TensorDigest> digests;
  const Status status = run_child(options, rank, parent, &digests);
  Status sent;
  if (status.ok()) {
    for (const TrainingState::TensorDigest& tensor : digests) {
      if (sent.ok()) sent = parent.send(to_hex(tensor.digest) + " " + tensor.name);
    }
    if (sent.ok()) sent = parent.send(std::string(kEnd));
  } else {
    sent = parent.send(std::string(kFailed) + status.to_string());
  }
  std::fflush(nullptr);
  ::_exit(status.ok() && sent.ok() ? 0 : 1);
}

Result<std::vector<Child>> fork_ranks(const StandaloneOptions& options) {
  std::vector<Child> children;
  std::fflush(nullptr);  // or every child would print what is buffered
  for (int32_t r = 0; r < options.spec.parallelism.world_size(); ++r) {
    int ends[2];
    if (::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends) != 0) {
      return errno_status(errno, "socketpair");
    }
    FileDescriptor mine(ends[0]);
    FileDescriptor theirs(ends[1]);
    const pid_t pid = ::fork();
    if (pid < 0) return errno_status(errno, "fork");
    if (pid == 0) {
      children.clear();  // the siblings' sockets
      mine = FileDescriptor();
      child_main(options, Rank{r}, LineSocket(std::move(theirs)));
    }
    children.push_back({pid, LineSocket(std::move(mine))});
  }
  return children;
}

// One line of a child; its error when that is what the line says.
Result<std::string> line_of(Child& child, int32_t rank) {
  PENSTOCK_TRY_ASSIGN(std::string line, child.socket.receive());
  if (!line.starts_with(kFailed)) return line;
  return internal_error(fmt::format("rank {}: {}", rank, line.substr(kFailed.size())));
}

// "<32 hexadecimal digits> <tensor name>"
Result<TrainingState::TensorDigest> parse_digest(const std::string& line) {
  constexpr size_t kWordDigits = 16;
  TrainingState::TensorDigest tensor;
  const auto word = [&](size_t begin, uint64_t* value) {
    const char* first = line.data() + begin;
    return std::from_chars(first, first + kWordDigits, *value, 16).ptr == first + kWordDigits;
  };
  if (line.size() <= 2 * kWordDigits + 1 || line[2 * kWordDigits] != ' ' ||
      !word(0, &tensor.digest.high) || !word(kWordDigits, &tensor.digest.low)) {
    return data_loss("a rank process sent a malformed digest");
  }
  tensor.name = line.substr(2 * kWordDigits + 1);
  return tensor;
}

Status exchange(std::vector<Child>& children, std::vector<TrainingState::TensorDigest>* digests) {
  std::vector<std::string> addresses;
  for (size_t r = 0; r < children.size(); ++r) {
    PENSTOCK_TRY_ASSIGN(std::string address, line_of(children[r], static_cast<int32_t>(r)));
    addresses.push_back(std::move(address));
  }
  for (Child& child : children) {
    for (const std::string& address : addresses) PENSTOCK_TRY(child.socket.send(address));
  }
  for (size_t r = 0; r < children.size(); ++r) {
    for (;;) {
      PENSTOCK_TRY_ASSIGN(const std::string line, line_of(children[r], static_cast<int32_t>(r)));
      if (line == kEnd) break;
      PENSTOCK_TRY_ASSIGN(TrainingState::TensorDigest tensor, parse_digest(line));
      digests->push_back(std::move(tensor));
    }
  }
  return {};
}

}  // namespace

Result<StandaloneReport> run_standalone_processes(const StandaloneOptions& options) {
  PENSTOCK_TRY(check_standalone(options));
  if (!options.checkpoint_dir.empty()) {
    return invalid_argument("standalone processes save no checkpoints; use threads");
  }
  PENSTOCK_TRY_ASSIGN(std::vector<Child> children, fork_ranks(options));
  StandaloneReport report;
  std::vector<TrainingState::TensorDigest> digests;
  const Status status = exchange(children, &digests);
  for (const Child& child : children) {
    if (!status.ok()) ::kill(child.pid, SIGKILL);
    int wait_status = 0;
    while (::waitpid(child.pid, &wait_status, 0) < 0 && errno == EINTR) {
    }
  }
  PENSTOCK_TRY(status);
  report.weights_digest = combined_digest(std::move(digests));
  return report;
}

}  // namespace penstock
