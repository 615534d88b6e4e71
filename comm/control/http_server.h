// A small HTTP/1.1 server for APIs, metrics pages and probes: bounded in every direction, never
// crashes on what a socket sends. Boost.Beast is confined to http_server.cc.
#pragma once

#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "comm/base/status.h"

namespace boost::asio {
class io_context;
}

namespace penstock {

struct HttpRequest {
  std::string method;  // "GET"
  std::string path;  // percent-decoded, starts with '/', no query; segments are never empty or ".."
  std::vector<std::pair<std::string, std::string>> query;  // decoded, in order
  std::string body;    // at most HttpServerOptions::body_bytes_max

  // First value of a query parameter; nullopt when absent.
  std::optional<std::string_view> parameter(std::string_view name) const;
};

struct HttpResponse {
  int status = 200;
  std::string content_type = "application/json";
  std::string body;
};

// A JSON body with its status.
HttpResponse json_response(std::string json, int status = 200);
// {"error":{"code":"not_found","message":"..."}} with the HTTP status that fits the code.
HttpResponse error_response(const Status& error);
int http_status_of(Code code);

// Answers one request. Callable once, on the loop's thread, now or later (a long poll); further
// calls, and calls after the client went away, do nothing. A responder dropped without a call
// answers 500.
using HttpResponder = std::function<void(HttpResponse)>;
// Runs on the loop's thread; must not block.
using HttpHandler = std::function<void(const HttpRequest&, HttpResponder)>;

struct HttpServerOptions {
  std::string bind = "127.0.0.1";  // IPv4 or IPv6 address
  uint16_t port = 0;               // 0: the system chooses
  size_t body_bytes_max = 1 << 20;
  size_t header_bytes_max = 16 << 10;
  size_t connections_max = 512;  // further ones get 503 and are closed
  std::chrono::milliseconds read_timeout{
      10'000};  // for one whole request to arrive, and idle keep-alive
  std::chrono::milliseconds write_timeout{10'000};   // for the client to take one whole answer
  std::chrono::milliseconds answer_timeout{75'000};  // for the handler's responder to be called
};

// Single-threaded: everything happens on the loop's thread. Borrows the io_context, which must
// outlive it. Keep-alive is supported, pipelining is not needed: one request at a time per
// connection. Malformed requests get a JSON 400 (413 too large, 431 header too large) and the
// connection is closed.
class HttpServer {
  class Impl;

 public:
  // Binds and listens. kAlreadyExists when the port is in use, naming address and port.
  static Result<std::unique_ptr<HttpServer>> start(boost::asio::io_context& loop,
                                                   HttpServerOptions options, HttpHandler handler);
  ~HttpServer();  // closes everything; handlers' responders become inert
  HttpServer(const HttpServer&) = delete;
  HttpServer& operator=(const HttpServer&) = delete;

  explicit HttpServer(std::shared_ptr<Impl> impl);  // for start(): nobody else can name an Impl

  uint16_t port() const;  // the real one

 private:
  std::shared_ptr<Impl> impl_;
};

}  // namespace penstock
