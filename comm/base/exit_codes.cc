#include "comm/base/exit_codes.h"

#include <csignal>
#include <cstdlib>

namespace penstock {

ExitCode exit_code_of(const Status& status) {
  switch (status.code()) {
    case Code::kOk:
      return ExitCode::kOk;
    case Code::kInvalidArgument:
      return ExitCode::kUsage;
    case Code::kNotFound:
      return ExitCode::kNotFound;
    case Code::kPermissionDenied:
      return ExitCode::kPermission;
    case Code::kUnavailable:
      return ExitCode::kUnreachable;
    case Code::kAlreadyExists:
    case Code::kFailedPrecondition:
    case Code::kAborted:
      return ExitCode::kConflict;
    case Code::kDeadlineExceeded:
      return ExitCode::kTimeout;
    case Code::kDataLoss:
      return ExitCode::kDataCorrupt;
    case Code::kResourceExhausted:
    case Code::kInternal:
      return ExitCode::kFailure;
  }
  std::abort();
}

bool leaves_sound_state(int exit_code, int signal) {
  if (signal != 0) return signal == SIGKILL || signal == SIGTERM;
  const auto code = static_cast<ExitCode>(exit_code);
  return code == ExitCode::kOk || code == ExitCode::kPeerLost || code == ExitCode::kUnreachable ||
         code == ExitCode::kPreempted;
}

}  // namespace penstock
