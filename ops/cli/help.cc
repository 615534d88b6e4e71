#include "ops/cli/help.h"

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cctype>
#include <utility>

namespace penstock {

namespace {

// What an option takes, where its own last word does not say it.
constexpr std::pair<std::string_view, std::string_view> kValues[] = {
    {"--backward", "SECONDS"},
    {"--backward-tail", "SECONDS"},
    {"--checkpoint", "DIRECTORY"},
    {"--devices-per-worker", "N"},
    {"--file-size", "BYTES"},
    {"--for", "TIME"},
    {"--forward", "SECONDS"},
    {"--grace", "TIME"},
    {"--holdout", "SHARE"},
    {"--keep-every", "N"},
    {"--keep-last", "N"},
    {"--like", "FILE"},
    {"--logits", "FILE"},
    {"--output", "PATH"},
    {"--pair", "SECONDS"},
    {"--pair-tail", "SECONDS"},
    {"--prompt", "WORDS"},
    {"--prove", "N"},
    {"--rate", "BYTES"},
    {"--seed", "N"},
    {"--send", "SECONDS"},
    {"--server", "URL"},
    {"--shard-size", "BYTES"},
    {"--spec", "FILE"},
    {"--state", "DIRECTORY"},
    {"--state-dir", "DIRECTORY"},
    {"--step", "N"},
    {"--steps", "FIRST:LAST"},
    {"--tail", "N"},
    {"--temperature", "T"},
    {"--tensor", "NAME"},
    {"--timeout", "TIME"},
    {"--tokenizer", "MODEL"},
    {"--tokens", "N"},
    {"--top-k", "K"},
    {"--weight", "SECONDS"},
    {"--workers", "N"},
};

// The words an option takes, what its verb calls its value, or what the table or its name says.
std::string value_of(const CLI::Option& option) {
  const std::string type = option.get_type_name();
  if (const size_t words = type.find('{'); words != std::string::npos) return type.substr(words);
  const std::string held_by = type.substr(0, type.find(':'));
  const bool says_nothing = held_by == "TEXT" || held_by == "INT" || held_by == "UINT" ||
                            held_by == "FLOAT" || held_by.empty();
  if (!says_nothing) return held_by;
  const std::string name = "--" + option.get_single_name();
  const auto* const known = std::find_if(std::begin(kValues), std::end(kValues),
                                         [&](const auto& value) { return value.first == name; });
  if (known != std::end(kValues)) return std::string(known->second);
  std::string last = name.substr(name.rfind('-') + 1);
  std::transform(last.begin(), last.end(), last.begin(), ::toupper);
  return last;
}

// add_verb stores examples in the footer; options of the verbs above may stand behind a verb.
class ExamplesFirst : public CLI::Formatter {
 public:
  std::string make_help(const CLI::App* app, std::string name,
                        CLI::AppFormatMode mode) const override {
    if (mode == CLI::AppFormatMode::Sub) return CLI::Formatter::make_help(app, name, mode);
    return app->get_footer() + "\n" + CLI::Formatter::make_help(app, name, mode);
  }
  std::string make_option_opts(const CLI::Option* option) const override {
    std::string text;
    if (option->get_items_expected_max() > 0) {
      if (!option->get_positional()) text += " " + value_of(*option);
      if (!option->get_default_str().empty()) text += "=" + option->get_default_str();
      if (option->get_expected_max() > 1) text += " ...";
    }
    if (option->get_required()) text += " REQUIRED";
    return text;
  }
  std::string make_footer(const CLI::App* app) const override {
    std::string text;
    for (const CLI::App* above = app->get_parent(); above; above = above->get_parent()) {
      const auto options = above->get_options([&](const CLI::Option* option) {
        const bool is_its_own =
            option == above->get_help_ptr() || option == above->get_version_ptr();
        // A verb's own -o stands for the global one.
        return !is_its_own && app->get_option_no_throw(option->get_name()) == nullptr;
      });
      const bool is_top = above->get_parent() == nullptr;
      if (!options.empty()) {
        text +=
            make_group(is_top ? "Global options" : "Options of every verb of " + above->get_name(),
                       false, options);
      }
    }
    return text;
  }
};

}  // namespace

std::shared_ptr<CLI::FormatterBase> help_formatter() {
  return std::make_shared<ExamplesFirst>();
}

}  // namespace penstock
