#include "comm/control/message.h"

#include <array>

namespace penstock {
namespace {

// In the order of ControlMessage.
constexpr std::array<std::string_view, std::variant_size_v<ControlMessage>> kMessageNames = {
    "register",           "registered",        "heartbeat",          "start_rank",
    "rank_ready",         "begin_training",    "stop_ranks",         "rank_exited",
    "step_report",        "evaluation_report", "segment_saved",      "save_failed",
    "checkpoint_outcome", "rank_finished",     "log_chunk",          "rank_hello",
    "rank_progress",      "ranks_stopped",     "expert_load_report", "save_interval",
    "inspect_ranks",      "ranks_inspected",   "pause_ranks",        "worker_leaving",
    "worker_released",    "check_host",        "host_checked",       "mirror_ranks",
    "ranks_mirrored"};

}  // namespace

std::string_view message_name(const ControlMessage& message) {
  return kMessageNames[message.index()];
}

}  // namespace penstock
