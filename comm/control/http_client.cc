#include "comm/control/http_client.h"

#include <boost/asio/io_context.hpp>
#include <boost/asio/ip/tcp.hpp>
#include <boost/beast/core.hpp>
#include <boost/beast/http.hpp>
#include <charconv>
#include <optional>

#include "comm/base/ip_address.h"

namespace penstock {
namespace {

namespace asio = boost::asio;
namespace beast = boost::beast;
namespace http = beast::http;
using asio::ip::tcp;

constexpr uint64_t kReplyBytesMax = 64 << 20;

struct Url {
  std::string host;
  uint16_t port = 80;
  std::string target;
};

Result<Url> parse_url(std::string_view text) {
  const std::string whole(text);
  constexpr std::string_view kScheme = "http://";
  if (!text.starts_with(kScheme)) {
    return invalid_argument("\"" + whole + "\" is not an address like http://127.0.0.1:7070");
  }
  text.remove_prefix(kScheme.size());
  Url url;
  const size_t slash = std::min(text.find('/'), text.size());
  url.target = slash == text.size() ? "/" : std::string(text.substr(slash));
  std::string_view authority = text.substr(0, slash);
  const size_t colon = authority.rfind(':');
  const bool has_port =
      colon != std::string_view::npos && authority.find(']', colon) == std::string_view::npos;
  const std::string_view port = has_port ? authority.substr(colon + 1) : "80";
  if (has_port) authority = authority.substr(0, colon);
  if (authority.starts_with('[') && authority.ends_with(']')) {
    authority = authority.substr(1, authority.size() - 2);
  }
  url.host = std::string(authority);
  const char* const port_end = port.data() + port.size();
  const auto [rest, error] = std::from_chars(port.data(), port_end, url.port);
  if (url.host.empty() || error != std::errc() || rest != port_end || url.port == 0) {
    return invalid_argument("\"" + whole + "\" has no host and port like 127.0.0.1:7070");
  }
  const bool printable =
      url.target.find_first_of(std::string_view("\r\n \0", 4)) == std::string::npos;
  if (!printable)
    return invalid_argument("\"" + whole + "\" has characters that must be percent-encoded");
  return url;
}

// One exchange, driven by its own loop on the caller's thread: Beast's timeouts act on asynchronous
// operations only.
class Exchange {
 public:
  Exchange(const HttpCall& call, Url url)
      : call_(call), url_(std::move(url)), stream_(loop_), resolver_(loop_) {}

  Result<HttpReply> run() {
    parser_.body_limit(kReplyBytesMax);
    request_.method_string(call_.method);
    request_.target(url_.target);
    request_.version(11);
    request_.set(http::field::host, host_and_port(url_.host, url_.port));
    request_.set(http::field::user_agent, "penstock");
    request_.set(http::field::connection, "close");
    if (!call_.body.empty()) request_.set(http::field::content_type, call_.content_type);
    request_.body() = call_.body;
    request_.prepare_payload();
    resolver_.async_resolve(
        url_.host, std::to_string(url_.port), [this](beast::error_code error, auto endpoints) {
          if (error) return finish(error);
          stream_.expires_after(call_.deadline);
          stream_.async_connect(endpoints, [this](beast::error_code connect_error, const auto&) {
            connect_error ? finish(connect_error) : write();
          });
        });
    loop_.run_for(call_.deadline);
    if (!finished_) return deadline();
    if (error_) return failure();
    const auto& message = parser_.get();
    return HttpReply{static_cast<int>(message.result_int()),
                     std::string(message[http::field::content_type]), message.body()};
  }

 private:
  void write() {
    http::async_write(stream_, request_, [this](beast::error_code error, size_t) {
      // A server that refuses a body early answers before it has read all of it: look for that
      // answer.
      write_error_ = error;
      http::async_read(stream_, buffer_, parser_,
                       [this](beast::error_code read_error, size_t) { finish(read_error); });
    });
  }
  void finish(beast::error_code error) {
    finished_ = true;
    error_ = error;
  }
  std::string where() const { return "http://" + host_and_port(url_.host, url_.port); }
  Status deadline() const {
    return deadline_exceeded("no whole answer from " + where() + " within " +
                             std::to_string(call_.deadline.count()) + " ms");
  }
  Status failure() const {
    if (error_ == beast::error::timeout) return deadline();
    if (error_ == http::error::body_limit) {
      return data_loss("the answer from " + where() + " is larger than 64 MiB");
    }
    const bool not_http =
        error_.category() == http::make_error_code(http::error::bad_method).category();
    if (not_http && error_ != http::error::end_of_stream &&
        error_ != http::error::partial_message) {
      return data_loss("the answer from " + where() + " is not HTTP: " + error_.message());
    }
    const beast::error_code cause = write_error_ ? write_error_ : error_;
    return unavailable("cannot talk to " + where() + ": " + cause.message());
  }

  const HttpCall& call_;
  const Url url_;
  asio::io_context loop_;
  beast::tcp_stream stream_;
  tcp::resolver resolver_;
  beast::flat_buffer buffer_;
  http::request<http::string_body> request_;
  http::response_parser<http::string_body> parser_;
  beast::error_code error_;
  beast::error_code write_error_;
  bool finished_ = false;
};

}  // namespace

Result<HttpReply> http_call(const HttpCall& call) {
  PENSTOCK_TRY_ASSIGN(Url url, parse_url(call.url));
  return Exchange(call, std::move(url)).run();
}

std::string percent_encode(std::string_view text) {
  static constexpr char kHex[] = "0123456789ABCDEF";
  std::string encoded;
  for (const char c : text) {
    const auto byte = static_cast<unsigned char>(c);
    const bool plain = (byte >= '0' && byte <= '9') || (byte >= 'a' && byte <= 'z') ||
                       (byte >= 'A' && byte <= 'Z') || c == '-' || c == '_' || c == '.' || c == '~';
    if (plain) {
      encoded.push_back(c);
    } else {
      encoded += {'%', kHex[byte >> 4], kHex[byte & 15]};
    }
  }
  return encoded;
}

}  // namespace penstock
