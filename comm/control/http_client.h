// A blocking HTTP/1.1 client for the command line and for tests. One connection per call.
#pragma once

#include <chrono>
#include <cstdint>
#include <string>
#include <string_view>

#include "comm/base/status.h"

namespace penstock {

struct HttpCall {
  std::string method = "GET";
  std::string url;  // "http://host:port/path?query"
  std::string body;
  std::string content_type = "application/json";
  std::chrono::milliseconds deadline{10'000};  // for the whole call
};

struct HttpReply {
  int status = 0;
  std::string content_type;
  std::string body;  // at most 64 MiB
};

// Any HTTP status is a value; an error means there was no whole answer: kUnavailable (refused, no
// such host, the connection broke), kDeadlineExceeded, kInvalidArgument (the URL), kDataLoss (not
// HTTP, or too large).
Result<HttpReply> http_call(const HttpCall& call);

// "a b/ü" -> "a%20b%2F%C3%BC": for one path segment or one query value.
std::string percent_encode(std::string_view text);

}  // namespace penstock
