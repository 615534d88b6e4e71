// Logging of daemons and ranks: one line each on stderr, "UTC-time level process message".
// Thread-safe. The CLI does not log; it prints.
#pragma once

#include <fmt/format.h>

#include <string>
#include <string_view>

namespace penstock {

enum class LogLevel { kDebug, kInfo, kWarning, kError };

// Names this process in every later line, such as "coordinator" or "rank 3". The threshold comes
// from the environment variable PENSTOCK_LOG (debug, info, warning, error), default info.
void start_logging(std::string process_name);
void log_line(LogLevel level, std::string_view message);

template <typename... Args>
void log_debug(fmt::format_string<Args...> format, Args&&... args) {
  log_line(LogLevel::kDebug, fmt::format(format, std::forward<Args>(args)...));
}
template <typename... Args>
void log_info(fmt::format_string<Args...> format, Args&&... args) {
  log_line(LogLevel::kInfo, fmt::format(format, std::forward<Args>(args)...));
}
template <typename... Args>
void log_warning(fmt::format_string<Args...> format, Args&&... args) {
  log_line(LogLevel::kWarning, fmt::format(format, std::forward<Args>(args)...));
}
template <typename... Args>
void log_error(fmt::format_string<Args...> format, Args&&... args) {
  log_line(LogLevel::kError, fmt::format(format, std::forward<Args>(args)...));
}

}  // namespace penstock
