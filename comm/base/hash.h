// The two digests: CRC-32C guards blocks against damage, XXH3-128 names contents.
#pragma once

#include <array>
#include <compare>
#include <cstdint>
#include <string>

#include "comm/base/bytes.h"

namespace penstock {

// CRC-32C (Castagnoli) of `bytes`, continuing from `seed`: crc32c(b, crc32c(a)) == crc32c(a + b).
// crc32c("123456789") == 0xe3069283.
uint32_t crc32c(Bytes bytes, uint32_t seed = 0);

struct Digest {
  uint64_t low = 0;
  uint64_t high = 0;
  auto operator<=>(const Digest&) const = default;
};

// XXH3-128. Not cryptographic: it detects accidents, not attackers.
Digest digest_of(Bytes bytes);
// 32 lower-case hexadecimal digits, high word first.
std::string to_hex(const Digest& digest);

// Digest of a sequence of ranges, fed one at a time. Single-threaded.
class DigestStream {
 public:
  DigestStream();
  ~DigestStream();
  DigestStream(const DigestStream&) = delete;
  DigestStream& operator=(const DigestStream&) = delete;
  void update(Bytes bytes);
  Digest finish() const;

 private:
  void* state_;  // XXH3_state_t, owned
};

}  // namespace penstock
