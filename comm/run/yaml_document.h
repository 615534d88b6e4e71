// One YAML document as a plain tree with positions. The only file that sees yaml-cpp is
// yaml_document.cc.
//
// Accepts the part of YAML that people write and JSON: mappings with text keys, sequences, scalars.
// Refuses what makes YAML dangerous or ambiguous: anchors, aliases, tags, several documents,
// duplicate keys, tabs as indentation, control characters, bytes that are not UTF-8, and anything
// beyond the bounds below.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "comm/base/status.h"

namespace penstock {

inline constexpr size_t kYamlBytesMax = 256 << 10;
inline constexpr int kYamlDepthMax = 16;
inline constexpr int kYamlNodesMax = 20000;

struct YamlNode {
  enum class Kind { kNull, kScalar, kSequence, kMapping };
  Kind kind = Kind::kNull;
  int line = 1;      // of its first character, from 1
  int column = 1;    // from 1
  std::string text;  // kScalar
  bool quoted =
      false;  // kScalar: written in quotes or as a block, so it is text and never a number
  std::vector<YamlNode> items;  // kSequence: the elements; kMapping: the values
  std::vector<YamlNode> keys;   // kMapping: keys[i] is the key of items[i], a scalar

  const YamlNode* find(std::string_view key) const;  // kMapping; null when absent
};

// "an integer" is for the reader; "nothing", "text", "a list", "a mapping" says what a node is.
std::string_view kind_name(const YamlNode& node);

// kInvalidArgument "origin:line:column: message".
Result<YamlNode> parse_yaml(std::string_view text, std::string_view origin);

Status yaml_error(std::string_view origin, int line, int column, std::string_view message);

}  // namespace penstock
