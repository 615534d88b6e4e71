#include "kernels/arena.h"

#include <gtest/gtest.h>

namespace penstock {
namespace {

TEST(ArenaTest, EveryPieceIsAlignedAndApart) {
  Arena arena("test", 4096);
  float* const a = arena.floats(3);
  int64_t* const b = arena.int64s(1);
  float* const c = arena.floats(17);
  for (const void* p : {static_cast<void*>(a), static_cast<void*>(b), static_cast<void*>(c)}) {
    EXPECT_EQ(reinterpret_cast<uintptr_t>(p) % Arena::kAlignmentBytes, 0u);
  }
  EXPECT_EQ(reinterpret_cast<std::byte*>(b) - reinterpret_cast<std::byte*>(a), 64);
  EXPECT_EQ(arena.used_bytes(), 64 + 64 + 128);
}

TEST(ArenaTest, RewindGivesBackAndThePeakRemembers) {
  Arena arena("test", 4096);
  arena.floats(16);
  const Arena::Mark mark = arena.mark();
  float* const first = arena.floats(100);
  arena.rewind(mark);
  EXPECT_EQ(arena.used_bytes(), 64);
  EXPECT_EQ(arena.peak_bytes(), 64 + 448);
  EXPECT_EQ(arena.floats(100), first);
}

TEST(ArenaTest, AllOfTheCapacityCanBeTaken) {
  Arena arena("test", 1000);  // rounded up to 1024
  EXPECT_EQ(arena.capacity_bytes(), 1024);
  std::byte* const all = static_cast<std::byte*>(arena.bytes(1024));
  all[1023] = std::byte{1};
  EXPECT_EQ(arena.floats(0), reinterpret_cast<float*>(all + 1024));
}

TEST(ArenaTest, AnEmptyArenaIsAllowed) {
  Arena arena("none", 0);
  EXPECT_EQ(arena.capacity_bytes(), 0);
}

TEST(ArenaDeathTest, OverflowNamesTheArenaAndTheBytes) {
  Arena arena("activation", 256);
  arena.floats(16);
  EXPECT_DEATH(arena.floats(100), "activation arena: wanted 448 bytes, left 192 of 256");
}

TEST(ArenaDeathTest, ACountWhoseBytesOverflowIsRefused) {
  EXPECT_DEATH(Arena::rounded_bytes(INT64_MAX / 2, 4), "count");
}

TEST(ArenaDeathTest, RewindingForwardsIsRefused) {
  Arena arena("test", 256);
  arena.floats(16);
  const Arena::Mark mark = arena.mark();
  arena.rewind({0});
  EXPECT_DEATH(arena.rewind(mark), "mark");
}

}  // namespace
}  // namespace penstock
