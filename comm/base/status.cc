#include "comm/base/status.h"

#include <cerrno>
#include <cstdlib>
#include <cstring>

namespace penstock {

std::string_view code_name(Code code) {
  switch (code) {
    case Code::kOk:
      return "ok";
    case Code::kInvalidArgument:
      return "invalid_argument";
    case Code::kNotFound:
      return "not_found";
    case Code::kAlreadyExists:
      return "already_exists";
    case Code::kFailedPrecondition:
      return "failed_precondition";
    case Code::kUnavailable:
      return "unavailable";
    case Code::kAborted:
      return "aborted";
    case Code::kResourceExhausted:
      return "resource_exhausted";
    case Code::kDataLoss:
      return "data_loss";
    case Code::kDeadlineExceeded:
      return "deadline_exceeded";
    case Code::kPermissionDenied:
      return "permission_denied";
    case Code::kInternal:
      return "internal";
  }
  std::abort();
}

RetryScope retry_scope(Code code) {
  switch (code) {
    case Code::kUnavailable:
    case Code::kDeadlineExceeded:
      return RetryScope::kCall;
    case Code::kAborted:
      return RetryScope::kTransaction;
    case Code::kOk:
    case Code::kInvalidArgument:
    case Code::kNotFound:
    case Code::kAlreadyExists:
    case Code::kFailedPrecondition:
    case Code::kResourceExhausted:
    case Code::kDataLoss:
    case Code::kPermissionDenied:
    case Code::kInternal:
      return RetryScope::kNone;
  }
  std::abort();
}

std::string Status::to_string() const {
  if (ok()) return "ok";
  return std::string(code_name(code_)) + ": " + message_;
}

Status Status::with_context(std::string_view context) const {
  if (ok()) return *this;
  return Status(code_, std::string(context) + ": " + message_);
}

Status invalid_argument(std::string message) {
  return {Code::kInvalidArgument, std::move(message)};
}
Status not_found(std::string message) {
  return {Code::kNotFound, std::move(message)};
}
Status already_exists(std::string message) {
  return {Code::kAlreadyExists, std::move(message)};
}
Status failed_precondition(std::string message) {
  return {Code::kFailedPrecondition, std::move(message)};
}
Status unavailable(std::string message) {
  return {Code::kUnavailable, std::move(message)};
}
Status aborted(std::string message) {
  return {Code::kAborted, std::move(message)};
}
Status resource_exhausted(std::string message) {
  return {Code::kResourceExhausted, std::move(message)};
}
Status data_loss(std::string message) {
  return {Code::kDataLoss, std::move(message)};
}
Status deadline_exceeded(std::string message) {
  return {Code::kDeadlineExceeded, std::move(message)};
}
Status permission_denied(std::string message) {
  return {Code::kPermissionDenied, std::move(message)};
}
Status internal_error(std::string message) {
  return {Code::kInternal, std::move(message)};
}

Status errno_status(int error_number, std::string_view what) {
  Code code = Code::kInternal;
  switch (error_number) {
    case ENOENT:
      code = Code::kNotFound;
      break;
    case EEXIST:
      code = Code::kAlreadyExists;
      break;
    case EACCES:
    case EPERM:
    case EROFS:
      code = Code::kPermissionDenied;
      break;
    case ENOSPC:
    case EDQUOT:
    case ENOMEM:
    case EMFILE:
    case ENFILE:
      code = Code::kResourceExhausted;
      break;
    case EADDRINUSE:
      code = Code::kAlreadyExists;
      break;
    case ECONNREFUSED:
    case ECONNRESET:
    case EAGAIN:
      code = Code::kUnavailable;
      break;
    case ENOTDIR:
    case EISDIR:
    case EINVAL:
      code = Code::kInvalidArgument;
      break;
    default:
      break;
  }
  return {code, std::string(what) + ": " + std::strerror(error_number)};
}

}  // namespace penstock
