// penstock: the command line.
#include <fmt/format.h>
#include <signal.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cstdlib>
#include <iterator>
#include <nlohmann/json.hpp>
#include <set>
#include <sstream>

#include "comm/base/version.h"
#include "comm/run/nearest_word.h"
#include "ops/cli/cli.h"
#include "ops/cli/help.h"

namespace penstock {

namespace {

// What other programs call a verb, where no letters lead from that to ours.
constexpr std::pair<std::string_view, std::string_view> kOtherNames[] = {
    {"delete", "\"rm\""},     {"jobs", "\"ps\""},      {"kill", "\"cancel\" or \"dev kill-rank\""},
    {"nodes", "\"workers\""}, {"queue", "\"ps\""},     {"run", "\"submit\""},
    {"show", "\"describe\""}, {"start", "\"submit\""}, {"train", "\"submit\""},
};

// The end of a refusal of a word that is none of `names`, the verbs of `app`.
std::string nearest_verb(const CLI::App& app, const std::string& word,
                         const std::vector<std::string>& names) {
  for (const auto& [other, ours] : kOtherNames) {
    if (app.get_parent() == nullptr && word == other) {
      return fmt::format("; did you mean {}?", ours);
    }
  }
  return did_you_mean(word, names);
}

// What the words of a command line that cannot be parsed name: the verb, as far as they do, and
// what is wrong with the first word that is no verb where a verb belongs; "" when there is none.
struct Named {
  std::string verb;
  std::string unknown;
  const CLI::App* app = nullptr;
};
Named named_verb(const CLI::App& app, int argc, char** argv) {
  Named named{.verb = app.get_name(), .unknown = {}, .app = &app};
  const CLI::App* at = &app;
  for (int i = 1; i < argc; ++i) {
    const std::string word = argv[i];
    if (word == "-o" || word == "--output" || word == "--server" || word == "--state-dir") {
      ++i;  // its value is no verb
      continue;
    }
    if (word.starts_with("-")) continue;
    const auto verbs = at->get_subcommands([](const CLI::App*) { return true; });
    if (verbs.empty()) break;
    const CLI::App* next = nullptr;
    std::vector<std::string> names;
    for (const CLI::App* verb : verbs) {
      names.push_back(verb->get_name());
      if (verb->check_name(word)) next = verb;
    }
    if (next == nullptr) {
      const std::string hint = nearest_verb(*at, word, names);
      named.unknown =
          fmt::format("unknown command \"{}\"{}", word,
                      hint.empty() ? fmt::format("; {} --help lists all", named.verb) : hint);
      break;
    }
    at = named.app = next;
    named.verb += " " + at->get_name();
  }
  return named;
}

// "--state=x" as refused by `verb`, with the nearest flag that it takes.
std::string unknown_flag(const CLI::App* verb, const std::string& word) {
  const std::string flag = word.substr(0, word.find('='));
  std::vector<std::string> names;
  for (; verb != nullptr; verb = verb->get_parent()) {
    for (const CLI::Option* option : verb->get_options()) {
      const auto& of_option = option->get_lnames();
      names.insert(names.end(), of_option.begin(), of_option.end());
    }
  }
  const std::string nearest = nearest_word(flag.substr(flag.find_first_not_of('-')), names);
  return fmt::format("unknown flag {}{}", flag,
                     nearest.empty() ? "" : fmt::format("; did you mean --{}?", nearest));
}

// Of the words that the parser lists as not expected, in no order, the one to blame: a flag, whose
// value is then listed too, or the first.
std::string unexpected_word(const CLI::App* verb, const std::string& message, int argc,
                            char** argv) {
  std::istringstream stream(message.substr(message.find(": ") + 1));
  const std::set<std::string> listed(std::istream_iterator<std::string>(stream), {});
  std::string first;
  for (int i = 1; i < argc; ++i) {
    const std::string word = argv[i];
    if (!listed.contains(word)) continue;
    if (word.find_first_not_of('-') == std::string::npos) continue;
    if (word.starts_with("-")) return unknown_flag(verb, word);
    if (first.empty()) first = fmt::format("unexpected \"{}\"", word);
  }
  return first.empty() ? message : first;
}

// "--tail: Value x not in range 0 to 9" where x is no number at all.
std::string out_of_range(const std::string& message) {
  constexpr std::string_view kBefore = ": Value ";
  constexpr std::string_view kBetween = " not in range ";
  const size_t begin = message.find(kBefore);
  const size_t end = message.find(kBetween, begin);
  if (begin == std::string::npos || end == std::string::npos) return message;
  const size_t from = begin + kBefore.size();
  const std::string value = message.substr(from, end - from);
  const std::string range = message.substr(end + kBetween.size());
  const bool whole = range.find('.') == std::string::npos;
  char* rest = nullptr;
  if (whole) {
    (void)std::strtoll(value.c_str(), &rest, 10);
  } else {
    (void)std::strtod(value.c_str(), &rest);
  }
  if (!value.empty() && *rest == '\0') return message;
  return fmt::format("{}: \"{}\" is no {}number; expected one from {}", message.substr(0, begin),
                     value, whole ? "whole " : "", range);
}

// Why the words could not be parsed.
std::string parse_refusal(const CLI::App& app, const CLI::ParseError& error, int argc,
                          char** argv) {
  const Named named = named_verb(app, argc, argv);
  if (!named.unknown.empty()) return named.unknown;
  const bool has_extras = error.get_exit_code() == static_cast<int>(CLI::ExitCodes::ExtrasError);
  const std::string why = has_extras ? unexpected_word(named.app, error.what(), argc, argv)
                                     : out_of_range(error.what());
  return fmt::format("{}; see {} --help", why, named.verb);
}

// Asked for before parsing is done, so that a wrong flag beside it is still answered in JSON.
bool asks_for_json(int argc, char** argv) {
  for (int i = 1; i < argc; ++i) {
    const std::string word = argv[i];
    const bool next_is_json = i + 1 < argc && std::string(argv[i + 1]) == "json";
    if ((word == "-o" || word == "--output") && next_is_json) return true;
    if (word == "-ojson" || word == "--output=json") return true;
  }
  return false;
}

void add_exit_code_topic(CLI::App& app, Cli& cli) {
  CLI::App* topic = add_verb(app, "exit-codes", "List the exit codes of every Penstock program",
                             "penstock exit-codes");
  topic->callback([&cli] {
    cli.action = [&cli]() -> Result<ExitCode> {
      const std::vector<std::pair<int, const char*>> codes = {
          {0, "done; the job succeeded"},
          {1, "something failed that has no code of its own"},
          {2, "wrong flag, or a job spec that is not valid"},
          {3, "no such job, worker or file"},
          {4, "not allowed"},
          {5, "no coordinator at that address"},
          {6, "conflict: port or name in use, wrong state"},
          {7, "wait or chaos timed out; rm --checkpoints still goes on"},
          {10, "the job failed"},
          {11, "the job was cancelled"},
          {12, "the job was preempted"},
          {13, "the job ran out of memory"},
          {14, "a data set, checkpoint or backup is damaged"},
          {15, "a rank lost a peer; the cause is elsewhere"},
          {16, "diverged: a loss or gradient norm is NaN or infinite, or a guard stops it"},
          {17, "steps trained again have other bits than were recorded"},
          {18, "a rank's processor, memory or network changes bits (ranks only)"},
          {19, "a host failed a check of its hardware (workers only)"},
          {130, "interrupted; a followed job goes on"}};
      Json items = Json::array();
      std::vector<std::vector<std::string>> rows;
      for (const auto& [code, meaning] : codes) {
        items.push_back({{"code", code}, {"meaning", meaning}});
        rows.push_back({std::to_string(code), meaning});
      }
      cli.out.document({{"apiVersion", "penstock/v1"}, {"kind", "ExitCodeList"}, {"items", items}});
      cli.out.table({"CODE", "MEANING"}, rows);
      return ExitCode::kOk;
    };
  });
}

void add_global_flags(CLI::App& app, Cli& cli, std::string& format, bool& no_headers) {
  app.add_option("-o,--output", format, "table, or json: JSON on stdout")
      ->check(one_of({"table", "json"}))
      ->capture_default_str();
  app.add_option("--server", cli.server,
                 "Coordinator (default: $PENSTOCK_SERVER, else the running dev cluster, else "
                 "http://127.0.0.1:7070)");
  app.add_flag("--no-headers", no_headers, "Tables without their first line");
}

// "penstock help submit" is "penstock submit --help"; "penstock help exit-codes" lists them.
std::vector<std::string> with_help_as_flag(int argc, char** argv) {
  std::vector<std::string> words(argv + 1, argv + argc);
  if (words.empty() || words[0] != "help") return words;
  words.erase(words.begin());
  if (words.empty() || words[0] != "exit-codes") words.push_back("--help");
  return words;
}

Result<ExitCode> run_action(Cli& cli) {
  try {  // what a member of an answer is asked for, and is not, is an exception of the JSON library
    return cli.action();
  } catch (const Json::exception& error) {
    return internal_error(fmt::format("{} does not answer like a coordinator of this version: {}",
                                      cli.client().server(), error.what()));
  }
}

int run(int argc, char** argv) {
  Cli cli;
  cli.out.set_format(asks_for_json(argc, argv) ? OutputFormat::kJson : OutputFormat::kTable);
  CLI::App app("Trains mixture-of-experts language models on a cluster, and keeps them training.",
               "penstock");
  app.formatter(help_formatter());
  app.footer(
      "Examples:\n"
      "  penstock dev up --workers 4                               a cluster on this host\n"
      "  penstock submit docs/examples/quickstart.yaml --follow    train, and watch\n"
      "  penstock ps; penstock describe quickstart                 what runs, and how it is\n"
      "  penstock sample quickstart --prompt \"The \"                text from the trained model\n"
      "  penstock dev down\n");
  std::string format = "table";
  bool no_headers = false;
  add_global_flags(app, cli, format, no_headers);
  app.set_version_flag("--version", std::string("penstock ") + kVersion);
  app.require_subcommand(1);
  app.fallthrough();
  add_submit_verb(app, cli);
  add_program_verb(app, cli);
  add_job_verbs(app, cli);
  add_record_verbs(app, cli);
  add_cluster_verbs(app, cli);
  add_checkpoint_verbs(app, cli);
  add_sample_verb(app, cli);
  add_export_verb(app, cli);
  add_import_verb(app, cli);
  add_trace_verb(app, cli);
  add_rebalance_verb(app, cli);
  add_doctor_verb(app, cli);
  add_admin_verbs(app, cli);
  add_data_verbs(app, cli);
  add_dev_verbs(app, cli);
  add_chaos_verbs(app, cli);
  add_exit_code_topic(app, cli);

  try {  // CLI11 reports by exception
    std::vector<std::string> words = with_help_as_flag(argc, argv);
    std::reverse(words.begin(), words.end());  // as CLI11 wants a list
    app.parse(std::move(words));
  } catch (const CLI::ParseError& error) {
    if (error.get_exit_code() == static_cast<int>(CLI::ExitCodes::Success)) return app.exit(error);
    cli.out.error(invalid_argument(parse_refusal(app, error, argc, argv)));
    return static_cast<int>(ExitCode::kUsage);
  }
  cli.out.set_format(format == "json" ? OutputFormat::kJson : OutputFormat::kTable);
  cli.out.set_headers(!no_headers);
  Result<ExitCode> result = run_action(cli);
  if (result.ok() && !cli.out.written().ok()) result = cli.out.written();
  if (!result.ok()) {
    cli.out.error(result.status());
    return static_cast<int>(exit_code_of(result.status()));
  }
  return static_cast<int>(*result);
}

}  // namespace

}  // namespace penstock

int main(int argc, char** argv) {
  ::signal(SIGPIPE, SIG_DFL);  // `penstock events | head` ends quietly
  return penstock::run(argc, argv);
}
