#include "comm/base/hash.h"

#include <gtest/gtest.h>

namespace penstock {
namespace {

TEST(HashTest, Crc32cMatchesThePublishedCheckValue) {
  EXPECT_EQ(crc32c(as_bytes("123456789")), 0xe3069283u);
  EXPECT_EQ(crc32c({}), 0u);
}

TEST(HashTest, Crc32cContinuesAcrossPieces) {
  const std::string text = "the quick brown fox jumps over the lazy dog";
  for (size_t cut = 0; cut <= text.size(); ++cut) {
    const uint32_t head = crc32c(as_bytes(text.substr(0, cut)));
    EXPECT_EQ(crc32c(as_bytes(text.substr(cut)), head), crc32c(as_bytes(text)));
  }
}

TEST(HashTest, Crc32cSeesEverySingleBitFlip) {
  std::string text(64, 'a');
  const uint32_t original = crc32c(as_bytes(text));
  for (size_t bit = 0; bit < text.size() * 8; ++bit) {
    text[bit / 8] ^= static_cast<char>(1 << bit % 8);
    EXPECT_NE(crc32c(as_bytes(text)), original) << "bit " << bit;
    text[bit / 8] ^= static_cast<char>(1 << bit % 8);
  }
}

TEST(HashTest, StreamedDigestEqualsDigestOfTheWhole) {
  const std::string text(10'000, 'x');
  DigestStream stream;
  stream.update(as_bytes(text.substr(0, 1)));
  stream.update(as_bytes(text.substr(1, 5'000)));
  stream.update(as_bytes(text.substr(5'001)));
  EXPECT_EQ(stream.finish(), digest_of(as_bytes(text)));
}

TEST(HashTest, HexNamesAre32DigitsHighWordFirst) {
  EXPECT_EQ(to_hex({.low = 0xab, .high = 1}), "000000000000000100000000000000ab");
  EXPECT_EQ(to_hex(digest_of({})), "99aa06d3014798d86001c324468d497f");  // XXH3-128 of nothing
}

}  // namespace
}  // namespace penstock
