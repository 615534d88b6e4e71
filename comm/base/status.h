// Errors as values. A Status says what the caller should do next (its Code) and, in one sentence,
// what went wrong, with which subject, and how to fix it. Penstock throws no exceptions of its own;
// those of libraries are caught in the file that wraps the library.
#pragma once

#include <optional>
#include <string>
#include <string_view>
#include <utility>

#include "comm/base/check.h"

namespace penstock {

enum class Code {
  kOk,
  kInvalidArgument,     // the caller's input is wrong; repeating it cannot help
  kNotFound,            // no such thing
  kAlreadyExists,       // the name or id is taken
  kFailedPrecondition,  // right input, wrong state; look at the state first
  kUnavailable,         // the other side is away; the same call may succeed later
  kAborted,             // overtaken (a newer epoch, a stop); start over from current state
  kResourceExhausted,   // disk, memory, queue or descriptors are full
  kDataLoss,            // bytes are damaged or missing
  kDeadlineExceeded,    // no answer in time; whether it took effect is unknown
  kPermissionDenied,    // not allowed
  kInternal,            // a library failed in a way that has no better name
};

// The stable lower-case name used in JSON, events and logs, such as "invalid_argument".
std::string_view code_name(Code code);

// How much to repeat after an error.
enum class RetryScope { kNone, kCall, kTransaction };
RetryScope retry_scope(Code code);

class [[nodiscard]] Status {
 public:
  Status() = default;
  Status(Code code, std::string message) : code_(code), message_(std::move(message)) {
    PENSTOCK_CHECK(code != Code::kOk);
  }

  bool ok() const { return code_ == Code::kOk; }
  Code code() const { return code_; }
  const std::string& message() const { return message_; }
  std::string to_string() const;

  // The same error with `context` and ": " before its message.
  Status with_context(std::string_view context) const;

 private:
  Code code_ = Code::kOk;
  std::string message_;
};

Status invalid_argument(std::string message);
Status not_found(std::string message);
Status already_exists(std::string message);
Status failed_precondition(std::string message);
Status unavailable(std::string message);
Status aborted(std::string message);
Status resource_exhausted(std::string message);
Status data_loss(std::string message);
Status deadline_exceeded(std::string message);
Status permission_denied(std::string message);
Status internal_error(std::string message);

// The Status of a failed system call: `what` names the call and its subject, such as "open /x/y".
// ENOSPC and EDQUOT are kResourceExhausted, ENOENT is kNotFound, EEXIST is kAlreadyExists.
Status errno_status(int error_number, std::string_view what);

// A T or the reason there is none.
template <typename T>
class [[nodiscard]] Result {
 public:
  Result(T value) : value_(std::move(value)) {}         // NOLINT: implicit on purpose
  Result(Status status) : status_(std::move(status)) {  // NOLINT: implicit on purpose
    PENSTOCK_CHECK(!status_.ok());
  }

  bool ok() const { return status_.ok(); }
  const Status& status() const { return status_; }
  const T& value() const& {
    PENSTOCK_CHECK(ok(), status_.message());
    return *value_;
  }
  T& value() & {
    PENSTOCK_CHECK(ok(), status_.message());
    return *value_;
  }
  T&& value() && {
    PENSTOCK_CHECK(ok(), status_.message());
    return *std::move(value_);
  }
  const T& operator*() const& { return value(); }
  T& operator*() & { return value(); }
  T&& operator*() && { return std::move(*this).value(); }
  const T* operator->() const { return &value(); }
  T* operator->() { return &value(); }

 private:
  Status status_;
  std::optional<T> value_;
};

}  // namespace penstock

// Returns from the enclosing function when `expression` (a Status) is an error.
#define PENSTOCK_TRY(expression)                                              \
  do {                                                                        \
    if (::penstock::Status penstock_try_ = (expression); !penstock_try_.ok()) \
      return penstock_try_;                                                   \
  } while (false)

#define PENSTOCK_CONCAT_INNER(a, b) a##b
#define PENSTOCK_CONCAT(a, b) PENSTOCK_CONCAT_INNER(a, b)

// PENSTOCK_TRY_ASSIGN(auto value, function_returning_result(...)): declares, or returns the error.
#define PENSTOCK_TRY_ASSIGN(declaration, expression)               \
  auto PENSTOCK_CONCAT(penstock_result_, __LINE__) = (expression); \
  if (!PENSTOCK_CONCAT(penstock_result_, __LINE__).ok())           \
    return PENSTOCK_CONCAT(penstock_result_, __LINE__).status();   \
  declaration = std::move(PENSTOCK_CONCAT(penstock_result_, __LINE__)).value()
