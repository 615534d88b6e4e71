// How --help looks.
#pragma once

#include <memory>

namespace CLI {
class FormatterBase;
}  // namespace CLI

namespace penstock {

// Begins with the examples of add_verb(), says of each value what it is instead of which type holds
// it, and ends with the options of the verbs above.
std::shared_ptr<CLI::FormatterBase> help_formatter();

}  // namespace penstock
