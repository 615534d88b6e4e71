// What is wrong with a host is noticed, and named.
#include "worker/rank/host_check.h"

#include <gtest/gtest.h>

#include "tests/worker/engine_test_support.h"

namespace penstock {
namespace {

TEST(HostCheckTest, ASoundHostPassesAndNothingIsLeft) {
  const ScratchDirectory directory;
  for (const HostCheck& check : check_host(CheckEffort::kQuick, directory.path())) {
    EXPECT_TRUE(check.passed()) << check.name << ": " << check.problem;
    EXPECT_FALSE(check.measured.empty()) << check.name;
  }
  EXPECT_TRUE(std::filesystem::is_empty(directory.path()));
}

TEST(HostCheckTest, OneBitOfMemoryThatChangesInEitherPatternIsNoticed) {
  for (const size_t struck : {0, 1}) {
    std::vector<std::byte> memory(1 << 16);
    const HostCheck check = check_memory(memory, [&](size_t pattern) {
      if (pattern == struck) memory[40'000] ^= std::byte{4};
    });
    EXPECT_NE(check.problem.find("changes bits"), std::string::npos) << check.problem;
  }
}

// A processor whose products have one element that is `off` by so much, from the `after`th on.
Multiply wrong_multiply(float off, int after) {
  return [right = multiply_by_kernels(), off, left = std::make_shared<int>(after)](
             int64_t size, const float* a, const float* b, float* c) {
    right(size, a, b, c);
    if ((*left)-- <= 0) c[7] += off;
  };
}

TEST(HostCheckTest, AProcessorThatComputesWronglyIsNamed) {
  const auto all_wrong = [](int) { return wrong_multiply(1.0F, 0); };
  const HostCheck wrong = check_processors(all_wrong, Duration::zero());
  EXPECT_NE(wrong.problem.find("computes a matrix product with an error"), std::string::npos)
      << wrong.problem;
  const auto wrong_later = [](int) { return wrong_multiply(1e-6F, 2); };
  const HostCheck later = check_processors(wrong_later, std::chrono::milliseconds(50));
  EXPECT_NE(later.problem.find("computes other bits than before"), std::string::npos)
      << later.problem << later.measured;
}

TEST(HostCheckTest, ADiskThatCannotBeWrittenIsNamed) {
  const HostCheck check = check_disk("/nowhere", 1 << 16);
  EXPECT_NE(check.problem.find("/nowhere"), std::string::npos) << check.problem;
}

}  // namespace
}  // namespace penstock
