#include "ops/cli/cli.h"

#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cstdlib>
#include <nlohmann/json.hpp>

#include "comm/control/message.h"
#include "comm/run/nearest_word.h"
#include "ops/cli/dev_cluster.h"

namespace penstock {

namespace {

constexpr const char* kDefaultServer = "http://127.0.0.1:7070";

}  // namespace

CLI::App* add_verb(CLI::App& parent, const std::string& name, const std::string& description,
                   const std::string& examples) {
  CLI::App* verb = parent.add_subcommand(name, description);
  std::string text = "Examples:\n";
  for (size_t begin = 0; begin < examples.size();) {
    const size_t end = std::min(examples.find('\n', begin), examples.size());
    text += "  " + examples.substr(begin, end - begin) + "\n";
    begin = end + 1;
  }
  verb->footer(text);
  verb->fallthrough();  // -o and --server may stand behind the verb
  return verb;
}

CLI::Validator rank_number() {
  return CLI::Range(int64_t{0}, static_cast<int64_t>(kRanksMax) - 1);
}

CLI::Validator one_of(const std::vector<std::string>& words) {
  const std::string list = fmt::format("{}", fmt::join(words, ", "));
  return CLI::Validator(
      [words, list](std::string& value) -> std::string {
        if (std::find(words.begin(), words.end(), value) != words.end()) return {};
        return fmt::format("{} is none of {}{}", value, list, did_you_mean(value, words));
      },
      "{" + list + "}");
}

Client Cli::client() const {
  if (!server.empty()) return Client(server);
  if (const char* variable = std::getenv("PENSTOCK_SERVER");
      variable != nullptr && *variable != '\0') {
    return Client(variable);
  }
  const auto state = load_dev_state(dev_state_dir(state_dir));
  return Client(state.ok() && dev_coordinator_runs(*state) ? state->server() : kDefaultServer);
}

void add_output_path_option(CLI::App& verb, std::vector<std::string>& outputs,
                            const std::string& description) {
  verb.add_option("-o,--output", outputs, description + "; json or table as ever")
      ->take_all()
      ->expected(1);
}

Result<std::optional<std::string>> take_output_path(Cli& cli,
                                                    const std::vector<std::string>& outputs) {
  std::optional<std::string> path;
  for (const std::string& output : outputs) {
    if (output == "json" || output == "table") {
      cli.out.set_format(output == "json" ? OutputFormat::kJson : OutputFormat::kTable);
    } else if (path) {
      return invalid_argument(
          fmt::format("-o names two things to write, {} and {}; give one", *path, output));
    } else {
      path = output;
    }
  }
  return path;
}

bool state_is_final(const std::string& state) {
  return state == "SUCCEEDED" || state == "FAILED" || state == "CANCELLED";
}

ExitCode exit_code_of_job(const Json& job) {
  const std::string state = field_string(job, "state");
  if (state == "SUCCEEDED") return ExitCode::kOk;
  if (state == "CANCELLED") return ExitCode::kJobCancelled;
  const Json failure = job.value("last_failure", Json::object());
  const std::string code = failure.is_object() ? field_string(failure, "code") : "";
  if (code == "out_of_memory") return ExitCode::kOutOfMemory;
  if (code == "data_corrupt") return ExitCode::kDataCorrupt;
  if (code == "diverged") return ExitCode::kDiverged;
  if (code == "not_reproduced") return ExitCode::kNotReproduced;
  return ExitCode::kJobFailed;
}

}  // namespace penstock
