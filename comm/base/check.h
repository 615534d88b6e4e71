// Contract checks that hold in every build. A failed check is a bug in Penstock: the process prints
// where and what, and aborts; its supervisor sees SIGABRT and starts recovery. Never use it for
// input from a user, a socket or a file: those return Status.
#pragma once

#include <fmt/format.h>

#include <string>

namespace penstock {

[[noreturn]] void check_failed(const char* file, int line, const char* condition,
                               const std::string& values);

namespace check_detail {
inline std::string values() {
  return {};
}
template <typename... Args>
std::string values(const Args&... args) {
  std::string text;
  ((text += fmt::format(" {}", args)), ...);
  return text;
}
}  // namespace check_detail

}  // namespace penstock

// PENSTOCK_CHECK(condition, values to print...)
#define PENSTOCK_CHECK(condition, ...)                                         \
  do {                                                                         \
    if (!(condition)) [[unlikely]] {                                           \
      ::penstock::check_failed(__FILE__, __LINE__, #condition,                 \
                               ::penstock::check_detail::values(__VA_ARGS__)); \
    }                                                                          \
  } while (false)
