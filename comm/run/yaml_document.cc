#include "comm/run/yaml_document.h"

#include <yaml-cpp/eventhandler.h>
#include <yaml-cpp/exceptions.h>
#include <yaml-cpp/parser.h>

#include <algorithm>
#include <optional>
#include <sstream>

#include "comm/run/utf8.h"

namespace penstock {

namespace {

struct Problem {
  int line = 1;
  int column = 1;
  std::string message;
};

// Builds the tree from yaml-cpp's events. The parser cannot be stopped from a handler without
// throwing, so after the first problem the rest of the events is ignored.
class TreeBuilder : public YAML::EventHandler {
 public:
  const std::optional<Problem>& problem() const { return problem_; }
  bool has_root() const { return has_root_; }
  YamlNode take_root() { return std::move(root_); }

  void OnDocumentStart(const YAML::Mark&) override {}
  void OnDocumentEnd() override {}
  void OnAlias(const YAML::Mark& mark, YAML::anchor_t) override {
    fail(mark, "aliases (*name) are not allowed; write the value out");
  }
  void OnNull(const YAML::Mark& mark, YAML::anchor_t anchor) override {
    add_leaf(mark, anchor, "?", YamlNode::Kind::kNull, {});
  }
  void OnScalar(const YAML::Mark& mark, const std::string& tag, YAML::anchor_t anchor,
                const std::string& value) override {
    const bool is_null = tag == "?" && (value == "null" || value == "~" || value.empty());
    add_leaf(mark, anchor, tag, is_null ? YamlNode::Kind::kNull : YamlNode::Kind::kScalar, value);
  }
  void OnSequenceStart(const YAML::Mark& mark, const std::string& tag, YAML::anchor_t anchor,
                       YAML::EmitterStyle::value) override {
    open(mark, anchor, tag, YamlNode::Kind::kSequence);
  }
  void OnSequenceEnd() override { close(); }
  void OnMapStart(const YAML::Mark& mark, const std::string& tag, YAML::anchor_t anchor,
                  YAML::EmitterStyle::value) override {
    open(mark, anchor, tag, YamlNode::Kind::kMapping);
  }
  void OnMapEnd() override { close(); }

 private:
  // Positions from yaml-cpp count from 0.
  void fail(const YAML::Mark& mark, std::string message) {
    if (!problem_) problem_ = Problem{mark.line + 1, mark.column + 1, std::move(message)};
  }

  bool admit(const YAML::Mark& mark, YAML::anchor_t anchor, const std::string& tag) {
    if (problem_) return false;
    if (anchor != YAML::NullAnchor) {
      fail(mark, "anchors (&name) are not allowed; write the value out");
    } else if (!tag.empty() && tag != "?" && tag != "!") {
      fail(mark, "tags (!name) are not allowed; the key decides the type");
    } else if (++node_count_ > kYamlNodesMax) {
      fail(mark, fmt::format("more than {} values", kYamlNodesMax));
    }
    return !problem_;
  }

  void add_leaf(const YAML::Mark& mark, YAML::anchor_t anchor, const std::string& tag,
                YamlNode::Kind kind, const std::string& value) {
    if (!admit(mark, anchor, tag)) return;
    YamlNode node;
    node.kind = kind;
    node.line = mark.line + 1;
    node.column = mark.column + 1;
    if (kind == YamlNode::Kind::kScalar) node.text = value;
    node.quoted = tag == "!";
    attach(mark, std::move(node));
  }

  void open(const YAML::Mark& mark, YAML::anchor_t anchor, const std::string& tag,
            YamlNode::Kind kind) {
    if (!admit(mark, anchor, tag)) return;
    if (open_.size() >= kYamlDepthMax) {
      return fail(mark, fmt::format("nested deeper than {} levels", kYamlDepthMax));
    }
    if (!open_.empty() && wants_key(open_.back())) {
      return fail(mark, "a key must be text, not a list or a mapping");
    }
    YamlNode node;
    node.kind = kind;
    node.line = mark.line + 1;
    node.column = mark.column + 1;
    open_.push_back(std::move(node));
  }

  void close() {
    if (problem_) return;
    YamlNode node = std::move(open_.back());
    open_.pop_back();
    const YAML::Mark unused = YAML::Mark::null_mark();
    attach(unused, std::move(node));
  }

  static bool wants_key(const YamlNode& node) {
    return node.kind == YamlNode::Kind::kMapping && node.keys.size() == node.items.size();
  }

  void attach(const YAML::Mark& mark, YamlNode node) {
    if (open_.empty()) {
      root_ = std::move(node);
      has_root_ = true;
      return;
    }
    YamlNode& parent = open_.back();
    if (!wants_key(parent)) {
      parent.items.push_back(std::move(node));
      return;
    }
    if (node.kind != YamlNode::Kind::kScalar) return fail(mark, "a key must be text");
    const auto same = std::find_if(parent.keys.begin(), parent.keys.end(),
                                   [&](const YamlNode& key) { return key.text == node.text; });
    if (same != parent.keys.end()) {
      return fail(mark, fmt::format("duplicate key \"{}\"; it is first given on line {}", node.text,
                                    same->line));
    }
    parent.keys.push_back(std::move(node));
  }

  std::optional<Problem> problem_;
  std::vector<YamlNode> open_;  // the chain of collections being read
  YamlNode root_;
  bool has_root_ = false;
  int node_count_ = 0;
};

// What can be told from the bytes alone.
std::optional<Problem> check_bytes(std::string_view text) {
  if (text.size() > kYamlBytesMax) {
    return Problem{1, 1, fmt::format("larger than {} KiB", kYamlBytesMax >> 10)};
  }
  const size_t valid = utf8_valid_prefix(text);
  int line = 1;
  int column = 1;
  bool in_indentation = true;
  for (size_t i = 0; i < text.size(); ++i) {
    const unsigned char byte = text[i];
    if (i == valid) return Problem{line, column, "bytes that are not UTF-8"};
    if (byte == '\n') {
      ++line;
      column = 1;
      in_indentation = true;
      continue;
    }
    if (byte == '\t' && in_indentation) {
      return Problem{line, column, "tab in indentation; use spaces"};
    }
    if ((byte < 0x20 && byte != '\t' && byte != '\r') || byte == 0x7f) {
      return Problem{line, column, fmt::format("control character 0x{:02x}", byte)};
    }
    if (byte != ' ') in_indentation = false;
    if ((byte & 0xc0) != 0x80) ++column;  // count characters, not continuation bytes
  }
  return std::nullopt;
}

}  // namespace

const YamlNode* YamlNode::find(std::string_view key) const {
  for (size_t i = 0; i < keys.size(); ++i) {
    if (keys[i].text == key) return &items[i];
  }
  return nullptr;
}

std::string_view kind_name(const YamlNode& node) {
  switch (node.kind) {
    case YamlNode::Kind::kNull:
      return "nothing";
    case YamlNode::Kind::kScalar:
      return "text";
    case YamlNode::Kind::kSequence:
      return "a list";
    case YamlNode::Kind::kMapping:
      return "a mapping";
  }
  std::abort();
}

Status yaml_error(std::string_view origin, int line, int column, std::string_view message) {
  return invalid_argument(fmt::format("{}:{}:{}: {}", origin, line, column, message));
}

Result<YamlNode> parse_yaml(std::string_view text, std::string_view origin) {
  if (const auto problem = check_bytes(text)) {
    return yaml_error(origin, problem->line, problem->column, problem->message);
  }
  TreeBuilder builder;
  try {  // the only place where yaml-cpp runs
    std::istringstream stream{std::string(text)};
    YAML::Parser parser(stream);
    if (!parser.HandleNextDocument(builder) || (!builder.has_root() && !builder.problem())) {
      return yaml_error(origin, 1, 1, "nothing in it; see docs/job-spec.md for an example");
    }
    if (!builder.problem()) {
      TreeBuilder second;
      if (parser.HandleNextDocument(second)) {
        return yaml_error(origin, 1, 1, "more than one YAML document (---); put one run in a file");
      }
    }
  } catch (const YAML::Exception& error) {
    if (!builder.problem()) {
      const bool known = !error.mark.is_null();
      return yaml_error(origin, known ? error.mark.line + 1 : 1, known ? error.mark.column + 1 : 1,
                        "not valid YAML: " + error.msg);
    }
  } catch (const std::exception& error) {
    return yaml_error(origin, 1, 1, std::string("not valid YAML: ") + error.what());
  }
  if (const auto& problem = builder.problem()) {
    return yaml_error(origin, problem->line, problem->column, problem->message);
  }
  return builder.take_root();
}

}  // namespace penstock
