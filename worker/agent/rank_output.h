// A rank's stdout and stderr, joined line by line into its log.
#pragma once

#include <array>
#include <cstdint>
#include <deque>
#include <string>
#include <string_view>

#include "comm/control/message.h"

namespace penstock {

inline constexpr size_t kLineBytesMax = 16 << 10;  // a longer line is cut into several
inline constexpr size_t kLogTailLinesMax = 10;
inline constexpr size_t kLastWordsBytesMax = 1024;
// What a rank's line about its own end begins with.
inline constexpr std::string_view kLastWordsPrefix = "penstock-rank: ";

// Pure: bytes in, log text out. Lines of the two streams never mix within a line.
class RankOutput {
 public:
  enum Stream { kStdout = 0, kStderr = 1 };

  // Takes bytes of one stream as they were read; returns the text to append to the log: the lines
  // they completed, each ending in '\n'.
  std::string add(Stream stream, std::string_view bytes);
  // The streams have ended: returns the unfinished lines, completed.
  std::string finish();

  // Position in the log of the next text returned.
  uint64_t offset() const { return offset_; }
  // Why the rank ended, in its own words: its last line of stderr that begins with
  // kLastWordsPrefix, without that; empty: it said nothing. At most kLastWordsBytesMax.
  const std::string& last_words() const { return last_words_; }
  // The last lines of stderr that are not empty, oldest first, each ending in '\n': at most
  // kLogTailLinesMax, and as many as kLogTailBytesMax holds.
  std::string log_tail() const;

 private:
  void take_line(Stream stream, std::string_view line, std::string& text);

  std::array<std::string, 2> partial_;  // by stream; at most kLineBytesMax
  std::deque<std::string> last_lines_;
  std::string last_words_;
  uint64_t offset_ = 0;
};

}  // namespace penstock
