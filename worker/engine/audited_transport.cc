#include "worker/engine/audited_transport.h"

#include <algorithm>
#include <map>
#include <tuple>

#include "comm/base/check.h"

namespace penstock {

TransferHandle AuditedTransport::send(Rank peer, Tag tag, Bytes bytes) {
  if (pass_) passes_[*pass_].push_back({{true, peer, tag}, digest_of(bytes)});
  return ForwardingTransport::send(peer, tag, bytes);
}

TransferHandle AuditedTransport::receive(Rank peer, Tag tag, MutableBytes into) {
  const TransferHandle handle = ForwardingTransport::receive(peer, tag, into);
  if (pass_) receiving_.push_back({handle.index, {false, peer, tag}, into});
  return handle;
}

// Before what was received can be used, so that it stands before everything made of it.
Result<uint64_t> AuditedTransport::wait(TransferHandle handle, int64_t* completed_ns) {
  Result<uint64_t> moved = ForwardingTransport::wait(handle, completed_ns);
  const auto received =
      std::find_if(receiving_.begin(), receiving_.end(),
                   [&](const UnderWay& one) { return one.handle == handle.index; });
  if (received == receiving_.end()) return moved;
  if (moved.ok()) {
    passes_[*pass_].push_back({received->what, digest_of(received->into.first(*moved))});
  }
  receiving_.erase(received);
  return moved;
}

void AuditedTransport::begin_pass(size_t pass) {
  PENSTOCK_CHECK(receiving_.empty());
  pass_ = pass;
  passes_[pass].clear();
}

std::optional<TransferDifference> AuditedTransport::end_passes() {
  PENSTOCK_CHECK(receiving_.empty());
  pass_.reset();
  using Key = std::tuple<bool, Rank, uint64_t>;
  const auto key_of = [](const TransferDifference& what) {
    return Key(what.sent, what.peer, what.tag.value);
  };
  std::map<Key, std::vector<Digest>> again;
  for (const Transfer& transfer : passes_[1]) {
    again[key_of(transfer.what)].push_back(transfer.digest);
  }
  std::map<Key, size_t> seen;
  for (const Transfer& transfer : passes_[0]) {
    const Key key = key_of(transfer.what);
    const std::vector<Digest>& repeated = again[key];
    const size_t index = seen[key]++;
    if (index >= repeated.size() || repeated[index] != transfer.digest) return transfer.what;
  }
  return std::nullopt;
}

}  // namespace penstock
