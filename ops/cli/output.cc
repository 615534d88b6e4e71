#include "ops/cli/output.h"

#include <fmt/format.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <nlohmann/json.hpp>

#include "comm/base/clock.h"
#include "comm/base/counted.h"
#include "ops/cli/text.h"

namespace penstock {

namespace {

bool environment_has(const char* name) {
  const char* value = std::getenv(name);
  return value != nullptr && *value != '\0';
}

// A terminal that understands escape sequences.
bool is_capable_terminal(int fd) {
  const char* term = std::getenv("TERM");
  return ::isatty(fd) == 1 && term != nullptr && std::string_view(term) != "dumb";
}

bool wants_colour() {
  if (environment_has("NO_COLOR")) return false;
  return environment_has("CLICOLOR_FORCE") || is_capable_terminal(STDOUT_FILENO);
}

int terminal_width(int fd) {
  winsize size = {};
  return ::ioctl(fd, TIOCGWINSZ, &size) == 0 ? size.ws_col : 0;
}

bool write_all(std::FILE* stream, std::string_view text) {
  return std::fwrite(text.data(), 1, text.size(), stream) == text.size() &&
         std::fflush(stream) == 0;
}

}  // namespace

Output::Output()
    : stdout_is_terminal_(::isatty(STDOUT_FILENO) == 1),
      redraws_(is_capable_terminal(STDERR_FILENO)),
      colour_(wants_colour()),
      width_(stdout_is_terminal_ ? terminal_width(STDOUT_FILENO) : 0) {}

void Output::write_stdout(std::string_view text) {
  if (!write_all(stdout, text) && written_.ok()) {
    written_ = errno_status(errno, "write to standard output");
  }
}

void Output::document(const Json& document) {
  if (!json()) return;
  printed_document_ = format_ == OutputFormat::kJson;
  const int indent = format_ == OutputFormat::kJson ? 2 : -1;
  write_stdout(document.dump(indent, ' ', false, Json::error_handler_t::replace) + "\n");
}

void Output::table(const std::vector<std::string>& headers,
                   const std::vector<std::vector<std::string>>& rows, std::vector<size_t>* widths) {
  if (!json()) write_stdout(format_table(headers, rows, with_headers_, width_, widths));
}

void Output::text(std::string_view text) {
  if (!json()) write_stdout(text);
}

void Output::answer(std::string_view line) {
  if (!stdout_is_terminal_) text(fmt::format("{}\n", line));
}

void Output::note(std::string_view message) {
  if (redrawing_) write_all(stderr, "\r\x1b[K");
  redrawing_ = false;
  write_all(stderr, fmt::format("{}\n", message));
}

void Output::redraw(std::string_view line) {
  if (!redraws_) return;
  // A line that wraps could not be taken back. Asked anew each time: terminals are resized.
  const int width = terminal_width(STDERR_FILENO);
  const std::string fitting = width > 1 ? cut_text(line, width - 1) : std::string(line);
  write_all(stderr, fmt::format("\r{}\x1b[K", fitting));
  redrawing_ = true;
}

void Output::end_redraw() {
  if (redrawing_) write_all(stderr, "\n");
  redrawing_ = false;
}

void Output::error(const Status& status) {
  end_redraw();
  note("penstock: " + status.message());
  if (!json() || printed_document_) return;
  document({{"apiVersion", "penstock/v1"},
            {"kind", "Error"},
            {"error", {{"code", code_name(status.code())}, {"message", status.message()}}}});
}

std::string Output::coloured_state(const std::string& state) const {
  if (!colour_) return state;
  const char* colour = state == "SUCCEEDED" || state == "RUNNING" ? "32"
                       : state == "FAILED" || state == "lost"     ? "31"
                       : state == "RECOVERING" || state == "CANCELLED" || state == "SUSPENDED"
                           ? "33"
                           : "36";
  return fmt::format("\x1b[{}m{}\x1b[0m", colour, state);
}

std::string field_text(const Json& object, const char* key) {
  const auto found = object.find(key);
  if (found == object.end() || found->is_null() || found->is_structured()) return "-";
  return found->is_string() ? found->get<std::string>() : found->dump();
}

double field_number(const Json& object, const char* key, double otherwise) {
  const auto found = object.find(key);
  return found != object.end() && found->is_number() ? found->get<double>() : otherwise;
}

std::string field_string(const Json& object, const char* key) {
  const auto found = object.find(key);
  return found != object.end() && found->is_string() ? found->get<std::string>() : "";
}

std::string field_counted(const Json& object, const char* key, std::string_view noun) {
  return counted(static_cast<int64_t>(field_number(object, key)), noun);
}

std::string field_age(const Json& object, const char* key) {
  const auto at = parse_utc(field_string(object, key));
  return at.ok() ? format_seconds(to_seconds(wall_now() - *at)) : "-";
}

}  // namespace penstock
