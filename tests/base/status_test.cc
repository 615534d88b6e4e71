#include "comm/base/status.h"

#include <gtest/gtest.h>

#include <cerrno>
#include <set>

namespace penstock {
namespace {

constexpr Code kAllCodes[] = {Code::kOk,
                              Code::kInvalidArgument,
                              Code::kNotFound,
                              Code::kAlreadyExists,
                              Code::kFailedPrecondition,
                              Code::kUnavailable,
                              Code::kAborted,
                              Code::kResourceExhausted,
                              Code::kDataLoss,
                              Code::kDeadlineExceeded,
                              Code::kPermissionDenied,
                              Code::kInternal};

TEST(StatusTest, EveryCodeHasItsOwnName) {
  std::set<std::string_view> names;
  for (const Code code : kAllCodes) names.insert(code_name(code));
  EXPECT_EQ(names.size(), std::size(kAllCodes));
}

TEST(StatusTest, OnlyTransientCodesAreWorthRepeatingTheCall) {
  for (const Code code : kAllCodes) {
    const bool transient = code == Code::kUnavailable || code == Code::kDeadlineExceeded;
    EXPECT_EQ(retry_scope(code) == RetryScope::kCall, transient) << code_name(code);
  }
  EXPECT_EQ(retry_scope(Code::kAborted), RetryScope::kTransaction);
}

TEST(StatusTest, ContextIsPutBeforeTheMessageAndKeepsTheCode) {
  const Status status = not_found("no file x").with_context("loading step 3");
  EXPECT_EQ(status.code(), Code::kNotFound);
  EXPECT_EQ(status.to_string(), "not_found: loading step 3: no file x");
  EXPECT_TRUE(Status().with_context("anything").ok());
}

TEST(StatusTest, SystemErrorsAreSortedByWhatTheCallerCanDo) {
  EXPECT_EQ(errno_status(ENOSPC, "write").code(), Code::kResourceExhausted);
  EXPECT_EQ(errno_status(EDQUOT, "write").code(), Code::kResourceExhausted);
  EXPECT_EQ(errno_status(ENOENT, "open").code(), Code::kNotFound);
  EXPECT_EQ(errno_status(EADDRINUSE, "bind").code(), Code::kAlreadyExists);
  EXPECT_EQ(errno_status(EROFS, "open").code(), Code::kPermissionDenied);
  EXPECT_EQ(errno_status(ECONNREFUSED, "connect").code(), Code::kUnavailable);
  EXPECT_EQ(errno_status(EIO, "fsync").code(), Code::kInternal);
}

Result<int> half(int number) {
  if (number % 2 != 0) return invalid_argument("odd");
  return number / 2;
}

Result<int> quarter(int number) {
  PENSTOCK_TRY_ASSIGN(const int once, half(number));
  PENSTOCK_TRY_ASSIGN(const int twice, half(once));
  return twice;
}

TEST(ResultTest, TryAssignPassesValuesOnAndReturnsTheFirstError) {
  EXPECT_EQ(*quarter(8), 2);
  EXPECT_EQ(quarter(6).status().code(), Code::kInvalidArgument);
}

TEST(ResultDeathTest, ReadingTheValueOfAnErrorIsABug) {
  EXPECT_DEATH((void)half(3).value(), "check failed.*odd");
}

}  // namespace
}  // namespace penstock
