// The JSON of a manifest, under a digest line that is right.
#include "checkpoint/manifest.h"
#include "comm/base/check.h"
#include "tests/fuzz/targets.h"

namespace penstock {

void fuzz::manifest(Bytes input) {
  const std::string body(as_text(input));
  const auto manifest = decode_manifest(body + "digest " + to_hex(digest_of(input)) + "\n");
  if (!manifest.ok()) return;
  const Status whole = prove_whole(*manifest);
  PENSTOCK_CHECK(whole.ok() || whole.code() == Code::kDataLoss);
  const auto text = encode_manifest(*manifest);
  PENSTOCK_CHECK(text.ok());
  const auto again = decode_manifest(*text);
  PENSTOCK_CHECK(again.ok() && *again == *manifest);
}

}  // namespace penstock
