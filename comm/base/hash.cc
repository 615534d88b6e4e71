#include "comm/base/hash.h"

#include <fmt/format.h>
#include <isa-l/crc.h>
#include <xxhash.h>

#include <algorithm>
#include <limits>

namespace penstock {
namespace {

// isa-l's AVX code leaves the upper halves of vector registers in use. Until they are cleared, on
// some processors each SSE instruction waits for the one before on the same register: slice digests
// took five times as long after a checksum.
void clear_upper_halves() {
#if defined(__x86_64__)
  static const bool has_avx = __builtin_cpu_supports("avx") != 0;
  if (has_avx) asm volatile("vzeroupper");
#endif
}

}  // namespace

uint32_t crc32c(Bytes bytes, uint32_t seed) {
  // isa-l neither inverts before nor after, takes int lengths, and a non-const pointer it only
  // reads.
  uint32_t crc = ~seed;
  while (!bytes.empty()) {
    const size_t count = std::min<size_t>(bytes.size(), size_t{1} << 30);
    auto* data = const_cast<unsigned char*>(reinterpret_cast<const unsigned char*>(bytes.data()));
    crc = crc32_iscsi(data, static_cast<int>(count), crc);
    bytes = bytes.subspan(count);
  }
  clear_upper_halves();
  return ~crc;
}

Digest digest_of(Bytes bytes) {
  const XXH128_hash_t hash = XXH3_128bits(bytes.data(), bytes.size());
  return {hash.low64, hash.high64};
}

std::string to_hex(const Digest& digest) {
  return fmt::format("{:016x}{:016x}", digest.high, digest.low);
}

DigestStream::DigestStream() : state_(XXH3_createState()) {
  PENSTOCK_CHECK(state_ != nullptr);
  XXH3_128bits_reset(static_cast<XXH3_state_t*>(state_));
}

DigestStream::~DigestStream() {
  XXH3_freeState(static_cast<XXH3_state_t*>(state_));
}

void DigestStream::update(Bytes bytes) {
  XXH3_128bits_update(static_cast<XXH3_state_t*>(state_), bytes.data(), bytes.size());
}

Digest DigestStream::finish() const {
  const XXH128_hash_t hash = XXH3_128bits_digest(static_cast<const XXH3_state_t*>(state_));
  return {hash.low64, hash.high64};
}

}  // namespace penstock
