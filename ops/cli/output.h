// Where the command line writes: data on stdout, everything else on stderr.
//
// With -o json, stdout holds exactly one JSON document, also when something was not found or went
// wrong; a verb that follows a list prints JSON Lines instead. Colour, redrawing and prompts need a
// terminal; NO_COLOR and TERM=dumb turn colour off, CLICOLOR_FORCE turns it on.
#pragma once

#include <nlohmann/json_fwd.hpp>
#include <string>
#include <string_view>
#include <vector>

#include "comm/base/exit_codes.h"
#include "comm/base/status.h"

namespace penstock {

using Json = nlohmann::json;

enum class OutputFormat {
  kTable,
  kJson,       // one document
  kJsonLines,  // any number of them, one a line: what is followed has no end to wait for
};

// Not thread-safe.
class Output {
 public:
  Output();

  void set_format(OutputFormat format) { format_ = format; }
  void set_headers(bool with_headers) { with_headers_ = with_headers; }
  bool json() const { return format_ != OutputFormat::kTable; }
  bool json_lines() const { return format_ == OutputFormat::kJsonLines; }

  // stdout. document() prints in the JSON formats only, the others in table format only. answer()
  // is one line for scripts: on a terminal the note that follows it says the same to people.
  void document(const Json& document);
  // `widths`: as of format_table().
  void table(const std::vector<std::string>& headers,
             const std::vector<std::vector<std::string>>& rows,
             std::vector<size_t>* widths = nullptr);
  void text(std::string_view text);
  void answer(std::string_view line);

  // stderr. note() ends its line; redraw() replaces the current one, cut to the terminal's width,
  // and does nothing where redraws() is false.
  void note(std::string_view message);
  void redraw(std::string_view line);
  // Leaves the last redrawn line standing.
  void end_redraw();

  // "penstock: message" on stderr and, in the JSON formats, an Error document on stdout, unless the
  // one document was printed already.
  void error(const Status& status);
  // Not ok: something did not get to stdout (a full disk); what was printed is not whole.
  const Status& written() const { return written_; }

  bool colour() const { return colour_; }  // on stdout
  int columns() const { return width_; }   // of the terminal that stdout is; 0: none, no limit
  bool stdout_is_terminal() const { return stdout_is_terminal_; }
  // stderr is a terminal that can replace a line.
  bool redraws() const { return redraws_; }
  // A job's state in its colour, where stdout has colour.
  std::string coloured_state(const std::string& state) const;

 private:
  void write_stdout(std::string_view text);

  OutputFormat format_ = OutputFormat::kTable;
  bool with_headers_ = true;
  bool stdout_is_terminal_ = false;
  bool redraws_ = false;
  bool colour_ = false;
  bool redrawing_ = false;
  bool printed_document_ = false;
  int width_ = 0;  // of the terminal; 0: unlimited
  Status written_;
};

// A member as text for a table: "-" for null, absent or an object.
std::string field_text(const Json& object, const char* key);
// A member as a number; `otherwise` for null, absent or not a number.
double field_number(const Json& object, const char* key, double otherwise = 0.0);
// A member as a string; "" for anything else.
std::string field_string(const Json& object, const char* key);
// A member that counts, with its noun: "1 rank", "4 ranks".
std::string field_counted(const Json& object, const char* key, std::string_view noun);
// How long ago a UTC time member was ("3m12s"), or "-".
std::string field_age(const Json& object, const char* key);

}  // namespace penstock
