// Typed, checked reading of the mappings of a YAML document. Problems are collected instead of
// returned, so that a schema reads as a list of keys, and the one that comes first in the file is
// the one reported.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "comm/base/status.h"
#include "comm/run/yaml_document.h"

namespace penstock {

// Everything wrong with one document. Not thread-safe.
class SpecProblems {
 public:
  explicit SpecProblems(std::string_view origin) : origin_(origin) {}

  // Something that is there and wrong.
  void wrong(const YamlNode& at, std::string message);
  // Something that is not there. Reported only when nothing is wrong: a mistyped key explains a
  // missing one.
  void missing(const YamlNode& at, std::string message);

  // Makes `path` ("model.hidden_size") a place that rules can point at.
  void remember(const std::string& path, const YamlNode& at);
  // A condition between several keys. Its problem points at `path`, or at the section when the key
  // was left out.
  void rule(const std::string& path, bool holds, std::string message);

  bool none() const { return wrong_.empty() && missing_.empty(); }
  // The first problem in file order, or ok.
  Status first() const;

 private:
  struct Position {
    int line = 1;
    int column = 1;
    auto operator<=>(const Position&) const = default;
  };
  std::string_view origin_;  // borrowed; outlives this
  std::map<Position, std::string> wrong_;
  std::map<Position, std::string> missing_;
  std::map<std::string, Position> places_;
};

// The keys of one mapping. Each call names one valid key and reads it when it is there; finish()
// then reports the keys that no call named. A section that is absent or empty has no keys. Borrows
// its arguments.
class MappingReader {
 public:
  enum class Need { kOptional, kRequired };

  // `node` may be null; `parent` is where a missing section is reported.
  MappingReader(SpecProblems& problems, const YamlNode* node, const YamlNode& parent,
                std::string path, Need need);

  void integer(const std::string& key, int64_t min, int64_t max, int64_t& out,
               Need need = Need::kOptional);
  // The same, or one word: then true, and `out` stays.
  bool integer_or_word(const std::string& key, int64_t min, int64_t max, std::string_view word,
                       int64_t& out);
  // null, like an absent key, means "none".
  void integer_or_null(const std::string& key, int64_t min, int64_t max,
                       std::optional<int64_t>& out);
  void unsigned_integer(const std::string& key, uint64_t& out);
  // min <= value <= max, or min < value when `above_min`.
  void real(const std::string& key, double min, double max, bool above_min, double& out,
            Need need = Need::kOptional);
  void boolean(const std::string& key, bool& out);
  // Text of 1 … 4096 bytes, quoted or not.
  void text(const std::string& key, std::string& out, Need need = Need::kOptional);
  // A key with one supported value. `why` continues "… is not supported; ".
  void only(const std::string& key, const std::vector<std::string>& supported,
            const std::string& why, Need need = Need::kOptional);
  // One of `words`: its index, or none when the key is absent or refused, with the nearest word.
  std::optional<size_t> word(const std::string& key, const std::vector<std::string>& words,
                             Need need = Need::kOptional);
  // One of `values`, named by to_string().
  template <typename Enum, size_t N>
  void one_of(const std::string& key, const Enum (&values)[N], Enum& out) {
    std::vector<std::string> words;
    for (const Enum value : values) words.emplace_back(to_string(value));
    if (const auto index = word(key, words)) out = values[*index];
  }
  // A list of such words: whether each of `words` is in it.
  std::vector<bool> word_list(const std::string& key, const std::vector<std::string>& words);
  // The value of a key with a shape of its own; null when absent. The caller checks it.
  const YamlNode* value(const std::string& key, Need need = Need::kOptional);
  MappingReader section(const std::string& key, Need need = Need::kOptional);
  // A key that is accepted and has no effect.
  void ignore(const std::string& key) { ignored_.push_back(key); }

  void finish();

  // Whether the mapping is there.
  bool present() const { return node_ != nullptr; }
  const std::string& path() const { return path_; }

 private:
  std::string full(const std::string& key) const;
  const YamlNode* scalar(const std::string& key, std::string_view expected, Need need);
  void read_integer(const std::string& key, const YamlNode& node, int64_t min, int64_t max,
                    const std::string& expected, int64_t& out);
  void wrong_type(const std::string& key, const YamlNode& node, std::string_view expected,
                  const std::string& hint = {});

  SpecProblems& problems_;
  const YamlNode* node_;  // null or a mapping
  const YamlNode& parent_;
  std::string path_;  // "" for the document
  std::vector<std::string> known_;
  std::vector<std::string> ignored_;
};

}  // namespace penstock
