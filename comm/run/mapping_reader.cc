#include "comm/run/mapping_reader.h"

#include <algorithm>
#include <charconv>
#include <cmath>

#include "comm/run/nearest_word.h"

namespace penstock {

namespace {

constexpr size_t kTextBytesMaxInSpec = 4096;
constexpr size_t kShownBytesMax = 40;

// Short and on one line, as an error needs it.
std::string clipped(const std::string& whole) {
  std::string text = whole.substr(0, kShownBytesMax);
  // Not in the middle of a character.
  while (text.size() < whole.size() && !text.empty() && (text.back() & 0x80) != 0) text.pop_back();
  std::replace(text.begin(), text.end(), '\n', ' ');
  return text.size() < whole.size() ? text + "…" : text;
}

std::string shown(const YamlNode& node) {
  if (node.kind != YamlNode::Kind::kScalar) return std::string(kind_name(node));
  return node.quoted ? "\"" + clipped(node.text) + "\"" : clipped(node.text);
}

template <typename Number>
bool parse_number(const YamlNode& node, Number& out) {
  if (node.quoted) return false;
  std::string_view text = node.text;
  if (text.size() > 1 && text.front() == '+' && text[1] != '-') text.remove_prefix(1);
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), out);
  return error == std::errc() && end == text.data() + text.size();
}

// from_chars does not know YAML's spelling of them.
bool is_not_finite_word(std::string text) {
  std::transform(text.begin(), text.end(), text.begin(), [](char c) { return c | 0x20; });
  if (!text.empty() && (text.front() == '-' || text.front() == ('+' | 0x20))) text.erase(0, 1);
  return text == ".inf" || text == ".nan" || text == "inf" || text == "nan" || text == "infinity";
}

std::string joined(const std::vector<std::string>& words) {
  std::string text;
  for (const std::string& word : words) text += (text.empty() ? "" : ", ") + word;
  return text;
}

// "fp32, fp8 or fp8_hopper".
std::string alternatives(const std::vector<std::string>& words) {
  const std::vector<std::string> all_but_last(words.begin(), words.end() - 1);
  return joined(all_but_last) + " or " + words.back();
}

std::optional<size_t> index_of(const YamlNode& node, const std::vector<std::string>& words) {
  const auto found = std::find(words.begin(), words.end(), node.text);
  if (node.kind != YamlNode::Kind::kScalar || found == words.end()) return std::nullopt;
  return found - words.begin();
}

}  // namespace

void SpecProblems::wrong(const YamlNode& at, std::string message) {
  wrong_.emplace(Position{at.line, at.column}, std::move(message));
}

void SpecProblems::missing(const YamlNode& at, std::string message) {
  missing_.emplace(Position{at.line, at.column}, std::move(message));
}

void SpecProblems::remember(const std::string& path, const YamlNode& at) {
  places_.emplace(path, Position{at.line, at.column});
}

void SpecProblems::rule(const std::string& path, bool holds, std::string message) {
  if (holds) return;
  std::string place = path;
  while (!places_.contains(place) && place.find('.') != std::string::npos) {
    place.resize(place.rfind('.'));
  }
  const auto found = places_.find(place);
  wrong_.emplace(found == places_.end() ? Position{} : found->second, std::move(message));
}

Status SpecProblems::first() const {
  const auto& problems = wrong_.empty() ? missing_ : wrong_;
  if (problems.empty()) return {};
  const auto& [position, message] = *problems.begin();
  return yaml_error(origin_, position.line, position.column, message);
}

MappingReader::MappingReader(SpecProblems& problems, const YamlNode* node, const YamlNode& parent,
                             std::string path, Need need)
    : problems_(problems), node_(node), parent_(parent), path_(std::move(path)) {
  if (node_ != nullptr && !path_.empty()) problems_.remember(path_, *node_);
  const std::string name = path_.empty() ? "the document" : path_;
  if (node_ != nullptr && node_->kind != YamlNode::Kind::kMapping) {
    if (node_->kind != YamlNode::Kind::kNull) {
      problems_.wrong(
          *node_, fmt::format("{} must be a mapping (key: value), not {}", name, shown(*node_)));
    }
    node_ = nullptr;
  }
  if (node_ == nullptr && need == Need::kRequired) {
    problems_.missing(parent_, fmt::format("{} is missing; docs/job-spec.md lists its keys", name));
  }
}

std::string MappingReader::full(const std::string& key) const {
  return path_.empty() ? key : path_ + "." + key;
}

const YamlNode* MappingReader::value(const std::string& key, Need need) {
  known_.push_back(key);
  if (node_ == nullptr) return nullptr;  // a missing section was reported once
  const YamlNode* found = node_->find(key);
  if (found != nullptr) {
    problems_.remember(full(key), *found);
  } else if (need == Need::kRequired) {
    problems_.missing(*node_, fmt::format("{} is missing; it has no default", full(key)));
  }
  return found;
}

MappingReader MappingReader::section(const std::string& key, Need need) {
  return MappingReader(problems_, value(key), node_ == nullptr ? parent_ : *node_, full(key), need);
}

void MappingReader::wrong_type(const std::string& key, const YamlNode& node,
                               std::string_view expected, const std::string& hint) {
  problems_.wrong(node,
                  fmt::format("{} must be {}, not {}{}", full(key), expected, shown(node), hint));
}

const YamlNode* MappingReader::scalar(const std::string& key, std::string_view expected,
                                      Need need) {
  const YamlNode* node = value(key, need);
  if (node == nullptr) return nullptr;
  if (node->kind == YamlNode::Kind::kScalar) return node;
  wrong_type(key, *node, expected);
  return nullptr;
}

void MappingReader::integer(const std::string& key, int64_t min, int64_t max, int64_t& out,
                            Need need) {
  const std::string expected = fmt::format("an integer from {} to {}", min, max);
  const YamlNode* node = scalar(key, expected, need);
  if (node != nullptr) read_integer(key, *node, min, max, expected, out);
}

bool MappingReader::integer_or_word(const std::string& key, int64_t min, int64_t max,
                                    std::string_view word, int64_t& out) {
  const std::string expected = fmt::format("an integer from {} to {} or {}", min, max, word);
  const YamlNode* node = scalar(key, expected, Need::kOptional);
  if (node == nullptr) return false;
  if (node->text == word) return true;
  read_integer(key, *node, min, max, expected, out);
  return false;
}

void MappingReader::read_integer(const std::string& key, const YamlNode& node, int64_t min,
                                 int64_t max, const std::string& expected, int64_t& out) {
  int64_t number = 0;
  if (!parse_number(node, number) || number < min || number > max) {
    return wrong_type(key, node, expected);
  }
  out = number;
}

void MappingReader::integer_or_null(const std::string& key, int64_t min, int64_t max,
                                    std::optional<int64_t>& out) {
  const YamlNode* node = node_ == nullptr ? nullptr : node_->find(key);
  if (node != nullptr && node->kind == YamlNode::Kind::kNull) {
    known_.push_back(key);
    return;
  }
  int64_t number = min - 1;
  integer(key, min, max, number);
  if (number >= min) out = number;
}

void MappingReader::unsigned_integer(const std::string& key, uint64_t& out) {
  constexpr std::string_view kExpected = "an integer from 0 to 18446744073709551615";
  const YamlNode* node = scalar(key, kExpected, Need::kOptional);
  if (node == nullptr) return;
  uint64_t number = 0;
  if (!parse_number(*node, number)) return wrong_type(key, *node, kExpected);
  out = number;
}

void MappingReader::real(const std::string& key, double min, double max, bool above_min,
                         double& out, Need need) {
  const std::string expected = above_min ? fmt::format("a number above {} and at most {}", min, max)
                                         : fmt::format("a number from {} to {}", min, max);
  const YamlNode* node = scalar(key, expected, need);
  if (node == nullptr) return;
  double number = 0.0;
  const bool parsed = parse_number(*node, number);
  if (!node->quoted && (is_not_finite_word(node->text) || (parsed && !std::isfinite(number)))) {
    return wrong_type(key, *node, "finite");
  }
  if (!parsed || number > max || (above_min ? number <= min : number < min)) {
    return wrong_type(key, *node, expected);
  }
  out = number;
}

void MappingReader::boolean(const std::string& key, bool& out) {
  const YamlNode* node = scalar(key, "true or false", Need::kOptional);
  if (node == nullptr) return;
  if (node->quoted || (node->text != "true" && node->text != "false")) {
    return wrong_type(key, *node, "true or false");
  }
  out = node->text == "true";
}

void MappingReader::text(const std::string& key, std::string& out, Need need) {
  const YamlNode* node = scalar(key, "text", need);
  if (node == nullptr) return;
  const bool has_break = node->text.find_first_of("\r\n") != std::string::npos;
  if (node->text.empty() || node->text.size() > kTextBytesMaxInSpec || has_break) {
    return wrong_type(key, *node, "one line of 1 to 4096 bytes");
  }
  out = node->text;
}

std::optional<size_t> MappingReader::word(const std::string& key,
                                          const std::vector<std::string>& words, Need need) {
  const YamlNode* node = value(key, need);
  if (node == nullptr) return std::nullopt;
  const auto index = index_of(*node, words);
  if (!index) wrong_type(key, *node, alternatives(words), did_you_mean(node->text, words));
  return index;
}

std::vector<bool> MappingReader::word_list(const std::string& key,
                                           const std::vector<std::string>& words) {
  std::vector<bool> listed(words.size());
  const YamlNode* list = value(key);
  if (list == nullptr) return listed;
  const std::string expected = "a list out of " + joined(words);
  if (list->kind != YamlNode::Kind::kSequence) {
    wrong_type(key, *list, expected);
    return listed;
  }
  for (const YamlNode& item : list->items) {
    if (const auto index = index_of(item, words)) {
      listed[*index] = true;
    } else {
      wrong_type(key, item, expected, did_you_mean(item.text, words));
    }
  }
  return listed;
}

void MappingReader::only(const std::string& key, const std::vector<std::string>& supported,
                         const std::string& why, Need need) {
  const YamlNode* node = value(key, need);
  if (node == nullptr) return;
  const std::string text = node->kind == YamlNode::Kind::kNull ? "null" : node->text;
  const bool leaf = node->kind == YamlNode::Kind::kNull || node->kind == YamlNode::Kind::kScalar;
  if (leaf && std::find(supported.begin(), supported.end(), text) != supported.end()) return;
  problems_.wrong(*node, fmt::format("{}: {} is not supported; {}", full(key), shown(*node), why));
}

void MappingReader::finish() {
  if (node_ == nullptr) return;
  for (const YamlNode& key : node_->keys) {
    if (std::find(known_.begin(), known_.end(), key.text) != known_.end()) continue;
    if (std::find(ignored_.begin(), ignored_.end(), key.text) != ignored_.end()) continue;
    const std::string hint = did_you_mean(key.text, known_);
    const std::string place = path_.empty() ? "" : " in " + path_;
    problems_.wrong(key, fmt::format("unknown key \"{}\"{}{}", clipped(key.text), place,
                                     hint.empty() ? "; valid keys: " + joined(known_) : hint));
  }
}

}  // namespace penstock
