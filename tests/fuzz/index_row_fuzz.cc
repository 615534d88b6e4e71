// A row of the checkpoint index, its newest link, and the log that RocksDB keeps of its changes.
#include "checkpoint/index_log.h"
#include "checkpoint/index_row.h"
#include "comm/base/check.h"
#include "tests/fuzz/targets.h"

namespace penstock {

void fuzz::index_row(Bytes input) {
  const std::string_view text = as_text(input);
  const auto row = decode_row(text);
  if (row.ok()) PENSTOCK_CHECK(encode_row(*row) == text);
  const auto link = decode_link(text);
  if (link.ok()) PENSTOCK_CHECK(encode_link(*link) == text);
  (void)check_log(input);
}

}  // namespace penstock
