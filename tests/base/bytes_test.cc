#include "comm/base/bytes.h"

#include <gtest/gtest.h>

namespace penstock {
namespace {

TEST(BytesTest, FieldsComeBackInTheOrderTheyWerePut) {
  ByteWriter writer;
  writer.put<uint64_t>(0x0102030405060708);
  writer.put_string("stage");
  writer.put<double>(-0.5);
  ByteReader reader(writer.data());
  EXPECT_EQ(*reader.get<uint64_t>(), 0x0102030405060708u);
  EXPECT_EQ(*reader.get_string(16), "stage");
  EXPECT_EQ(*reader.get<double>(), -0.5);
  EXPECT_EQ(reader.remaining(), 0u);
}

TEST(BytesTest, IntegersAreLittleEndian) {
  ByteWriter writer;
  writer.put<uint32_t>(0x01020304);
  EXPECT_EQ(writer.data().front(), std::byte{4});
}

TEST(BytesTest, EveryTruncationIsDataLoss) {
  ByteWriter writer;
  writer.put<uint32_t>(7);
  writer.put_string("abcdef");
  const auto whole = writer.data();
  for (size_t size = 0; size < whole.size(); ++size) {
    ByteReader reader(Bytes(whole).first(size));
    const auto number = reader.get<uint32_t>();
    const bool failed = !number.ok() || !reader.get_string(16).ok();
    EXPECT_TRUE(failed) << size;
  }
}

TEST(BytesTest, AStringLongerThanItsBoundIsRefusedBeforeItIsRead) {
  ByteWriter writer;
  writer.put<uint32_t>(UINT32_MAX);
  ByteReader reader(writer.data());
  const auto text = reader.get_string(16);
  EXPECT_EQ(text.status().code(), Code::kDataLoss);
}

}  // namespace
}  // namespace penstock
