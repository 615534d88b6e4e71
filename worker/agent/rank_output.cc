#include "worker/agent/rank_output.h"

#include <algorithm>

namespace penstock {

std::string RankOutput::add(Stream stream, std::string_view bytes) {
  std::string text;
  std::string& partial = partial_[stream];
  while (!bytes.empty()) {
    const size_t room = kLineBytesMax - partial.size();
    const size_t end = bytes.find('\n');
    if (end == std::string_view::npos && bytes.size() < room) {
      partial.append(bytes);
      break;
    }
    const size_t count = std::min(end, room);
    partial.append(bytes.substr(0, count));
    const bool at_newline = count == end;
    take_line(stream, partial, text);
    partial.clear();
    bytes.remove_prefix(at_newline ? count + 1 : count);
  }
  offset_ += text.size();
  return text;
}

std::string RankOutput::finish() {
  std::string text;
  for (const Stream stream : {kStdout, kStderr}) {
    if (!partial_[stream].empty()) take_line(stream, partial_[stream], text);
    partial_[stream].clear();
  }
  offset_ += text.size();
  return text;
}

void RankOutput::take_line(Stream stream, std::string_view line, std::string& text) {
  text.append(line);
  text.push_back('\n');
  if (stream != kStderr || line.find_first_not_of(" \t\r") == std::string_view::npos) return;
  last_lines_.emplace_back(line.substr(0, kLastWordsBytesMax));
  if (last_lines_.size() > kLogTailLinesMax) last_lines_.pop_front();
  if (!line.starts_with(kLastWordsPrefix)) return;
  last_words_ = line.substr(kLastWordsPrefix.size(), kLastWordsBytesMax);
}

std::string RankOutput::log_tail() const {
  std::string tail;
  for (auto line = last_lines_.rbegin(); line != last_lines_.rend(); ++line) {
    if (tail.size() + line->size() + 1 > kLogTailBytesMax) break;
    tail = *line + "\n" + tail;
  }
  return tail;
}

}  // namespace penstock
