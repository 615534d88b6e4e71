// "Did you mean": the nearest of the words that would have been right.
#pragma once

#include <string>
#include <string_view>
#include <vector>

namespace penstock {

// The candidate nearest to `word` by edit distance (insert, delete, replace, swap neighbours), or
// "" when none is near enough to be what the user meant. Ignores case and treats '-' as '_'.
std::string nearest_word(std::string_view word, const std::vector<std::string>& candidates);

// The end of a refusal: "; did you mean \"dualpipe\"?", or "" when no candidate is near.
std::string did_you_mean(std::string_view word, const std::vector<std::string>& candidates);

}  // namespace penstock
