#include "coordinator/core/failure.h"

#include <fmt/format.h>

#include "comm/base/exit_codes.h"

namespace penstock {
namespace {

constexpr int kSigKill = 9;
constexpr int kSigTerm = 15;

std::string code_of(const RankExited& exited) {
  if (exited.signal != 0) return "rank_killed";
  switch (static_cast<ExitCode>(exited.exit_code)) {
    case ExitCode::kPeerLost:
      return kCausePeerLost;
    case ExitCode::kDataCorrupt:
      return kCauseDataCorrupt;
    case ExitCode::kOutOfMemory:
      return "out_of_memory";
    case ExitCode::kUsage:
      return "usage";
    case ExitCode::kNotFound:
      return "not_found";
    case ExitCode::kPermission:
      return "permission_denied";
    default:
      return "rank_exited";
  }
}

bool is_fatal(const std::string& code, RankPhase phase) {
  if (code == "usage") return true;
  if (code == kCauseDataCorrupt) return phase != RankPhase::kRestoring;
  return (code == "not_found" || code == "permission_denied") && phase == RankPhase::kLoading;
}

}  // namespace

Failure failure_of(const RankExited& exited, const std::string& worker_name, RankPhase phase) {
  std::string how = exited.signal != 0 ? fmt::format("was killed by signal {}", exited.signal)
                                       : fmt::format("exited with code {}", exited.exit_code);
  if (!exited.reason.empty()) how += ": " + exited.reason;
  // The daemon begins with the same words.
  if (exited.signal != 0 && exited.reason.starts_with("killed by")) how = "was " + exited.reason;
  if (exited.signal == 0 && exited.reason.starts_with("exited with")) how = exited.reason;
  Failure failure;
  failure.reason.code = code_of(exited);
  failure.reason.message = fmt::format("rank {} on {} {}", exited.rank, worker_name, how);
  failure.rank = exited.rank;
  failure.worker = worker_name;
  failure.fatal = is_fatal(failure.reason.code, phase);
  return failure;
}

bool looks_ordered(const RankExited& exited) {
  return exited.signal == kSigKill || exited.signal == kSigTerm ||
         exited.exit_code == static_cast<int>(ExitCode::kPreempted);
}

}  // namespace penstock
