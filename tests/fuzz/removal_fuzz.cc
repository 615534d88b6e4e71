// The GC file, under a digest line that is right: it may name nothing but files of the store.
#include "checkpoint/removal.h"
#include "comm/base/check.h"
#include "tests/fuzz/targets.h"

namespace penstock {

void fuzz::removal(Bytes input) {
  const std::string body(as_text(input));
  const auto removal = decode_removal(body + "digest " + to_hex(digest_of(input)) + "\n");
  if (!removal.ok()) return;
  for (const auto* names : {&removal->manifests, &removal->segments}) {
    for (const std::string& name : *names) {
      PENSTOCK_CHECK(name.find('/') == std::string::npos && !name.starts_with('.'), name);
    }
  }
}

}  // namespace penstock
