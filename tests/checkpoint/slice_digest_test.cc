#include "checkpoint/slice_digest.h"

#include <set>

#include "tests/checkpoint/support.h"

namespace penstock {
namespace {

using namespace checkpoint_test;

// Boxes that tile `box`: cut in two again and again, along random dimensions.
void cut(const Box& box, int depth, Random& random, std::vector<Box>& pieces) {
  std::vector<size_t> cuttable;
  for (size_t d = 0; d < box.size.size(); ++d) {
    if (box.size[d] > 1) cuttable.push_back(d);
  }
  if (depth == 0 || cuttable.empty()) return pieces.push_back(box);
  const size_t d = cuttable[random.below(cuttable.size())];
  const auto first = static_cast<int64_t>(1 + random.below(box.size[d] - 1));
  Box low = box;
  Box high = box;
  low.size[d] = first;
  high.offset[d] += first;
  high.size[d] -= first;
  cut(low, depth - 1, random, pieces);
  cut(high, depth - 1, random, pieces);
}

Digest digest_of_known(const std::string& name, DType dtype, const std::vector<int64_t>& shape,
                       const Box& box) {
  const OwnedSlice owned = known_slice(name, dtype, shape, box);
  return slice_digest(owned.slice, owned.bytes);
}

TEST(SliceDigestTest, HoweverATensorIsCutTheDigestsOfItsPiecesAddUpToItsOwn) {
  Random random(1, 0);
  const std::vector<std::vector<int64_t>> shapes = {{}, {1}, {5000}, {70, 50}, {6, 5, 4, 3, 2}};
  for (const auto& shape : shapes) {
    for (const DType dtype : {DType::kF32, DType::kBf16, DType::kI64, DType::kU8}) {
      const Box whole{std::vector<int64_t>(shape.size(), 0), shape};
      const Digest wanted = digest_of_known("w", dtype, shape, whole);
      for (int round = 0; round < 5; ++round) {
        std::vector<Box> pieces;
        cut(whole, round, random, pieces);
        Digest sum;
        for (const Box& piece : pieces) {
          sum = add_digests(sum, digest_of_known("w", dtype, shape, piece));
        }
        EXPECT_EQ(sum, wanted) << to_string(whole) << ", " << pieces.size() << " pieces";
      }
    }
  }
}

TEST(SliceDigestTest, HowItsBytesAreFedDoesNotMatter) {
  const OwnedSlice owned = known_slice("w", DType::kF32, {40, 90}, {{3, 7}, {20, 80}});
  Random random(2, 0);
  SliceDigestStream stream(owned.slice);
  for (Bytes rest = owned.bytes; !rest.empty();) {
    const size_t count = std::min<size_t>(rest.size(), 4 * (1 + random.below(500)));
    stream.update(rest.first(count));
    rest = rest.subspan(count);
  }
  EXPECT_EQ(stream.finish(), slice_digest(owned.slice, owned.bytes));
}

TEST(SliceDigestTest, AnyChangedByteAndAnyTwoSwappedElementsShow) {
  OwnedSlice owned = known_slice("w", DType::kF32, {3000}, {{0}, {3000}});
  const Digest before = slice_digest(owned.slice, owned.bytes);
  for (size_t i = 0; i < owned.bytes.size(); ++i) {
    owned.bytes[i] ^= std::byte{0x80};  // of every fourth byte the sign: the worst difference
    const Digest after = slice_digest(owned.slice, owned.bytes);
    EXPECT_NE(after.low, before.low) << i;
    EXPECT_NE(after.high, before.high) << i;
    owned.bytes[i] ^= std::byte{0x80};
  }
  for (size_t i = 4; i < owned.bytes.size(); i += 4) {
    std::swap_ranges(owned.bytes.begin(), owned.bytes.begin() + 4, owned.bytes.begin() + i);
    EXPECT_NE(slice_digest(owned.slice, owned.bytes), before) << "element 0 and " << i / 4;
    std::swap_ranges(owned.bytes.begin(), owned.bytes.begin() + 4, owned.bytes.begin() + i);
  }
}

TEST(SliceDigestTest, ManySmallTensorsThatDifferLittleAllHaveDigestsOfTheirOwn) {
  std::set<Digest> seen;
  std::vector<std::byte> bytes(64 * 4, std::byte{0});
  const TensorSlice slice = whole_tensor("w", DType::kF32, {64});
  size_t count = 0;
  for (size_t i = 0; i < 64; ++i) {
    for (size_t j = i + 1; j < 64; ++j) {
      for (const int bit : {0, 23, 31}) {  // lowest of the mantissa and exponent, sign
        const uint32_t value = uint32_t{1} << bit;
        std::fill(bytes.begin(), bytes.end(), std::byte{0});
        std::memcpy(bytes.data() + 4 * i, &value, 4);
        std::memcpy(bytes.data() + 4 * j, &value, 4);
        seen.insert(slice_digest(slice, bytes));
        ++count;
      }
    }
  }
  EXPECT_EQ(seen.size(), count);
}

// The words are part of the file format: docs/checkpoint-format.md.
TEST(SliceDigestTest, TheDocumentedExampleHolds) {
  const uint32_t units[2] = {1, 0};
  const uint32_t other[2] = {0, 2};
  const TensorSlice slice = whole_tensor("w", DType::kU32, {2});
  const uint64_t seed = 0x6b636f74736e6570;
  const auto block = philox(seed, 1, 0);
  const uint64_t low = (uint64_t{block[1]} << 32 | block[0]) | 1;
  const uint64_t high = (uint64_t{block[3]} << 32 | block[2]) | 1;
  EXPECT_EQ(slice_digest(slice, std::as_bytes(std::span(units))),
            (Digest{low * philox(seed, 0, 0)[0], high * philox(seed, 0, 0)[1]}));
  EXPECT_EQ(slice_digest(slice, std::as_bytes(std::span(other))),
            (Digest{low * 2 * philox(seed, 0, 1)[0], high * 2 * philox(seed, 0, 1)[1]}));
}

}  // namespace
}  // namespace penstock
