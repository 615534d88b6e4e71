#include "worker/data/text_reader.h"

#include <fmt/format.h>

#include <algorithm>
#include <nlohmann/json.hpp>

#include "comm/run/utf8.h"
#include "worker/data/mapped_file.h"

namespace penstock {

namespace {

using TakeDocument = std::function<Status(std::string_view document)>;

constexpr int kJsonDepthMax = 32;

std::string_view without_outer_breaks(std::string_view text) {
  while (!text.empty() && (text.front() == '\n' || text.front() == '\r')) text.remove_prefix(1);
  while (!text.empty() && (text.back() == '\n' || text.back() == '\r')) text.remove_suffix(1);
  return text;
}

Status hand_over(std::string_view document, const TakeDocument& take) {
  document = without_outer_breaks(document);
  return document.empty() ? Status() : take(document);
}

Status check_utf8(std::string_view text, const std::string& path) {
  const size_t valid = utf8_valid_prefix(text);
  if (valid == text.size()) return {};
  const auto line = 1 + std::count(text.begin(), text.begin() + valid, '\n');
  return invalid_argument(
      fmt::format("{}:{}: byte 0x{:02x} is not UTF-8; convert the file first, as with "
                  "iconv -t UTF-8",
                  path, line, static_cast<unsigned char>(text[valid])));
}

// The line that starts at `at`, without its break; moves `at` past it.
std::string_view take_line(std::string_view text, size_t& at) {
  const size_t end = std::min(text.find('\n', at), text.size());
  std::string_view line = text.substr(at, end - at);
  at = std::min(end + 1, text.size());
  if (!line.empty() && line.back() == '\r') line.remove_suffix(1);
  return line;
}

bool is_separator(std::string_view line, DocumentSplit split) {
  if (split == DocumentSplit::kPercent) return line == "%";
  return line.find_first_not_of(" \t") == std::string_view::npos;
}

Status read_plain_text(std::string_view text, DocumentSplit split, const TakeDocument& take) {
  if (split == DocumentSplit::kFile) return hand_over(text, take);
  size_t document_begin = 0;
  size_t at = 0;
  while (at < text.size()) {
    const size_t line_begin = at;
    if (!is_separator(take_line(text, at), split)) continue;
    PENSTOCK_TRY(hand_over(text.substr(document_begin, line_begin - document_begin), take));
    document_begin = at;
  }
  return hand_over(text.substr(document_begin), take);
}

// The "text" of one line of JSONL.
Result<std::string> text_of(std::string_view line) {
  using Json = nlohmann::json;
  bool too_deep = false;
  const auto limit_depth = [&](int depth, Json::parse_event_t, Json&) {
    too_deep |= depth > kJsonDepthMax;
    return !too_deep;
  };
  const Json object = Json::parse(line, limit_depth, /*allow_exceptions=*/false);
  if (too_deep) return invalid_argument(fmt::format("nested deeper than {}", kJsonDepthMax));
  if (object.is_discarded()) return invalid_argument("not valid JSON");
  if (!object.is_object()) return invalid_argument("not an object; expected {\"text\": \"…\"}");
  const auto text = object.find("text");
  if (text == object.end()) return invalid_argument("has no key \"text\"");
  if (!text->is_string()) return invalid_argument("\"text\" is not a string");
  return text->get<std::string>();
}

Status read_json_lines(std::string_view text, const std::string& path, const TakeDocument& take) {
  size_t at = 0;
  for (int64_t number = 1; at < text.size(); ++number) {
    const std::string_view line = take_line(text, at);
    if (line.find_first_not_of(" \t") == std::string_view::npos) continue;
    const auto document = text_of(line);
    if (!document.ok()) return document.status().with_context(fmt::format("{}:{}", path, number));
    PENSTOCK_TRY(hand_over(*document, take));
  }
  return {};
}

}  // namespace

Result<DocumentSplit> parse_document_split(std::string_view name) {
  if (name == "blank-line") return DocumentSplit::kBlankLine;
  if (name == "percent") return DocumentSplit::kPercent;
  if (name == "file") return DocumentSplit::kFile;
  return invalid_argument(fmt::format("split \"{}\" is none of blank-line, percent, file", name));
}

Status read_documents(const std::string& path, DocumentSplit split, const TakeDocument& take) {
  PENSTOCK_TRY_ASSIGN(const MappedFile file, MappedFile::open(path));
  const std::string_view text = as_text(file.bytes());
  if (text.size() > kCorpusFileBytesMax) {
    return resource_exhausted(
        fmt::format("{} is larger than {} GiB; split it", path, kCorpusFileBytesMax >> 30));
  }
  PENSTOCK_TRY(check_utf8(text, path));
  const auto bounded = [&](std::string_view document) -> Status {
    if (document.size() <= kDocumentBytesMax) return take(document);
    return invalid_argument(fmt::format(
        "{}: a document of {} bytes, more than 1 GiB; is --split right?", path, document.size()));
  };
  return path.ends_with(".jsonl") ? read_json_lines(text, path, bounded)
                                  : read_plain_text(text, split, bounded);
}

}  // namespace penstock
