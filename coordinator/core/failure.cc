#include "coordinator/core/failure.h"

#include <fmt/format.h>

#include <algorithm>

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
    case ExitCode::kDiverged:
      return kCauseDiverged;
    case ExitCode::kMiscomputed:
      return kCauseSilentCorruption;
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

// EIO, in the words of errno_status.
constexpr std::string_view kDeviceError = "Input/output error";

// A crash, a disk that failed, or a start that the host refused. SIGKILL is somebody's doing, and
// all other ends have a cause in the data, the numbers or a peer.
bool points_to_host(const RankExited& exited) {
  constexpr int kCrashes[] = {4, 6, 7, 11};  // SIGILL, SIGABRT, SIGBUS, SIGSEGV
  if (std::find(std::begin(kCrashes), std::end(kCrashes), exited.signal) != std::end(kCrashes)) {
    return true;
  }
  if (exited.signal != 0) return false;
  const bool failed_disk = exited.exit_code == static_cast<int>(ExitCode::kFailure) &&
                           exited.reason.find(kDeviceError) != std::string::npos;
  return failed_disk || exited.reason.starts_with(kCouldNotStart);
}

bool is_fatal(const std::string& code, RankPhase phase) {
  if (code == "usage" || code == kCauseDiverged) return true;
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
  failure.reason.log_tail = exited.log_tail;
  failure.rank = exited.rank;
  failure.worker = worker_name;
  failure.fatal = is_fatal(failure.reason.code, phase);
  failure.host_suspect = points_to_host(exited);
  return failure;
}

std::optional<Failure> data_changed(const std::vector<DataIdentity>& expected,
                                    const RankReady& ready, const std::string& worker_name) {
  const std::vector<DataIdentity>& found = ready.data;
  if (expected.empty() || found.empty() || found == expected) return std::nullopt;
  Failure failure;
  failure.rank = ready.rank;
  failure.worker = worker_name;
  failure.fatal = true;
  const auto [was, is] =
      std::mismatch(expected.begin(), expected.end(), found.begin(), found.end());
  if (was == expected.end() || is == found.end()) {
    failure.reason = {"data_changed",
                      fmt::format("rank {} on {} found {} data sets, but the job "
                                  "began with {}; submit it as a new job",
                                  ready.rank, worker_name, found.size(), expected.size())};
    return failure;
  }
  const auto described = [](const DataIdentity& data) {
    return fmt::format("{} tokens with digest {}", data.tokens, to_hex(data.digest));
  };
  failure.reason = {
      "data_changed",
      fmt::format("{}.bin and .idx are no longer the data that the job began with: rank {} on {} "
                  "found {}, not {}; put the old files back and resume the job, or submit a new "
                  "one, with checkpoint.init_from when it is to start from exported weights",
                  is->path, ready.rank, worker_name, described(*is), described(*was))};
  return failure;
}

bool was_ordered(const RankExited& exited) {
  const bool as_ordered = exited.signal == kSigKill || exited.signal == kSigTerm ||
                          exited.exit_code == static_cast<int>(ExitCode::kPreempted);
  return as_ordered && exited.reason.starts_with(kStoppedByDaemon);
}

}  // namespace penstock
