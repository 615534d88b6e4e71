#include "ops/cli/rank_log.h"

#include <fmt/format.h>

#include <nlohmann/json.hpp>

namespace penstock {

Result<bool> read_more(PatientClient& client, const std::string& job_id, RankLog& log,
                       std::chrono::milliseconds wait) {
  const std::string path =
      job_path(job_id, fmt::format("/logs?rank={}&offset={}&limit=1048576&wait_ms={}", log.rank,
                                   log.offset, wait.count()));
  PENSTOCK_TRY_ASSIGN(const Json chunk, client.get(path, wait));
  const auto next = static_cast<int64_t>(field_number(chunk, "next_offset", log.offset));
  log.terminal = chunk.value("terminal", false);
  const bool news = next > log.offset;
  log.offset = next;
  log.partial += field_string(chunk, "text");
  for (size_t end = log.partial.find('\n'); end != std::string::npos;
       end = log.partial.find('\n')) {
    log.lines.push_back(log.partial.substr(0, end));
    log.partial.erase(0, end + 1);
  }
  if (log.terminal && !news && !log.partial.empty()) {
    log.lines.push_back(std::exchange(log.partial, ""));
  }
  return news;
}

}  // namespace penstock
