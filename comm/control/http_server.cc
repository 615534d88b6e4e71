#include "comm/control/http_server.h"

#include <boost/asio/io_context.hpp>
#include <boost/asio/ip/tcp.hpp>
#include <boost/asio/steady_timer.hpp>
#include <boost/beast/core.hpp>
#include <boost/beast/http.hpp>
#include <nlohmann/json.hpp>
#include <unordered_set>

#include "comm/base/ip_address.h"
#include "comm/base/log.h"

namespace penstock {
namespace {

namespace asio = boost::asio;
namespace beast = boost::beast;
namespace http = beast::http;
using asio::ip::tcp;

// What is left of a refused request is read and dropped for this long, so that closing the socket
// does not reset the connection before the client has read why it was refused.
constexpr std::chrono::milliseconds kDrainTimeout{1000};
constexpr size_t kDrainBytesMax = 4 << 20;
// Bytes read at a time, on top of the longest header. The reader's limits do not count chunk
// extensions and trailers, which it buffers whole: this bound does.
constexpr size_t kReadBytesMax = 64 << 10;

int hex_digit(char c) {
  if (c >= '0' && c <= '9') return c - '0';
  if (c >= 'a' && c <= 'f') return c - 'a' + 10;
  if (c >= 'A' && c <= 'F') return c - 'A' + 10;
  return -1;
}

std::optional<std::string> percent_decode(std::string_view text, bool plus_is_space) {
  std::string decoded;
  decoded.reserve(text.size());
  for (size_t i = 0; i < text.size(); ++i) {
    char c = text[i];
    if (c == '%') {
      if (i + 2 >= text.size()) return std::nullopt;
      const int high = hex_digit(text[i + 1]);
      const int low = hex_digit(text[i + 2]);
      if (high < 0 || low < 0) return std::nullopt;
      c = static_cast<char>(high * 16 + low);
      i += 2;
    } else if (c == '+' && plus_is_space) {
      c = ' ';
    }
    if (c == '\0') return std::nullopt;
    decoded.push_back(c);
  }
  return decoded;
}

bool valid_path(std::string_view path) {
  if (path.empty() || path.front() != '/') return false;
  if (path == "/") return true;
  size_t begin = 1;
  while (begin <= path.size()) {
    const size_t end = std::min(path.find('/', begin), path.size());
    const std::string_view segment = path.substr(begin, end - begin);
    if (segment.empty() || segment == "." || segment == "..") return false;
    begin = end + 1;
  }
  return true;
}

Status parse_target(std::string_view target, HttpRequest* request) {
  const size_t question = target.find('?');
  std::string_view raw_path = target.substr(0, question);
  if (raw_path.size() > 1 && raw_path.back() == '/') raw_path.remove_suffix(1);
  const std::optional<std::string> path = percent_decode(raw_path, false);
  if (!path || !valid_path(*path)) {
    return invalid_argument("the request's path is not valid; it must look like /api/v1/jobs");
  }
  request->path = *path;
  std::string_view rest = question == std::string_view::npos ? "" : target.substr(question + 1);
  while (!rest.empty()) {
    const std::string_view pair = rest.substr(0, rest.find('&'));
    rest.remove_prefix(std::min(rest.size(), pair.size() + 1));
    if (pair.empty()) continue;
    const size_t equals = pair.find('=');
    const auto name = percent_decode(pair.substr(0, equals), true);
    const auto value =
        percent_decode(equals == std::string_view::npos ? "" : pair.substr(equals + 1), true);
    if (!name || !value)
      return invalid_argument("the request's query is not valid percent-encoding");
    request->query.emplace_back(*name, *value);
  }
  return {};
}

// "127.0.0.1:7070", "[::1]", "localhost:7070": no name that somebody else's DNS gave this host.
bool is_local_name(std::string_view host) {
  const size_t colon = host.rfind(':');
  const bool has_port = colon != std::string_view::npos && host.find(']', colon) == host.npos;
  std::string name(host.substr(0, has_port ? colon : host.size()));
  if (name.starts_with('[') && name.ends_with(']')) name = name.substr(1, name.size() - 2);
  return name == "localhost" || is_ip_address(name);
}

// A page of another site may not drive the API through the visitor's browser: where an Origin is
// sent, it must be this server's own. A server on loopback has no name but its own, else the site
// could have its name resolve to this host (DNS rebinding).
bool origin_allowed(std::string_view origin, std::string_view host, bool on_loopback) {
  if (origin.empty()) return true;
  const size_t scheme = origin.find("://");
  const bool own = scheme != origin.npos && origin.substr(scheme + 3) == host;
  return own && (!on_loopback || is_local_name(host));
}

}  // namespace

class HttpServer::Impl : public std::enable_shared_from_this<HttpServer::Impl> {
 public:
  Impl(asio::io_context& loop, HttpServerOptions options, HttpHandler handler)
      : loop_(loop), options_(std::move(options)), handler_(std::move(handler)), acceptor_(loop) {}

  Status listen();
  void accept();
  void stop();
  uint16_t port() const { return port_; }

 private:
  friend class HttpServer;
  class Session;
  class Answer;

  asio::io_context& loop_;
  const HttpServerOptions options_;
  HttpHandler handler_;
  tcp::acceptor acceptor_;
  uint16_t port_ = 0;
  bool stopped_ = false;
  std::unordered_set<Session*> sessions_;  // each removes itself when it ends
};

// One connection. Owned by the operation it has pending; the server only knows where it is.
class HttpServer::Impl::Session : public std::enable_shared_from_this<Session> {
 public:
  Session(tcp::socket socket, std::shared_ptr<Impl> server)
      : stream_(std::move(socket)),
        timer_(server->loop_),
        server_(std::move(server)),
        buffer_(server_->options_.header_bytes_max + kReadBytesMax) {
    server_->sessions_.insert(this);
  }
  ~Session() { server_->sessions_.erase(this); }

  void read_request();
  void refuse_connection();
  void answer(uint64_t exchange, HttpResponse response);
  void close();

 private:
  void on_header(beast::error_code error);
  void read_body();
  void on_request(beast::error_code error);
  void on_read_error(beast::error_code error);
  void dispatch();
  void watch_for_departure(uint64_t exchange);
  void send(HttpResponse response, bool keep_alive);
  void drain();

  beast::tcp_stream stream_;
  asio::steady_timer timer_;  // bounds the wait for the handler's answer
  std::shared_ptr<Impl> server_;
  beast::flat_buffer buffer_;
  std::optional<http::request_parser<http::string_body>> parser_;
  http::response<http::string_body> response_;
  http::response<http::empty_body> head_response_;
  http::response<http::empty_body> continue_;
  std::array<char, 4096> drained_;
  size_t drained_bytes_ = 0;
  uint64_t exchange_ = 0;  // counts requests, so that a late answer to an earlier one is dropped
  bool waiting_ = false;   // for the handler's answer
  bool is_head_ = false;
  bool keep_alive_ = false;
  unsigned version_ = 11;
};

// What a responder shares: answers 500 by itself when every copy is gone and nobody answered.
class HttpServer::Impl::Answer {
 public:
  Answer(std::weak_ptr<Session> session, uint64_t exchange)
      : session_(std::move(session)), exchange_(exchange) {}
  ~Answer() { give(error_response(internal_error("the request was dropped without an answer"))); }
  Answer(const Answer&) = delete;
  Answer& operator=(const Answer&) = delete;

  void give(HttpResponse response) {
    if (std::exchange(given_, true)) return;
    if (const auto session = session_.lock()) session->answer(exchange_, std::move(response));
  }

 private:
  std::weak_ptr<Session> session_;
  uint64_t exchange_;
  bool given_ = false;
};

void HttpServer::Impl::Session::read_request() {
  is_head_ = false;  // of the request before
  version_ = 11;
  parser_.emplace();
  parser_->header_limit(static_cast<uint32_t>(server_->options_.header_bytes_max));
  parser_->body_limit(server_->options_.body_bytes_max);
  stream_.expires_after(server_->options_.read_timeout);
  http::async_read_header(
      stream_, buffer_, *parser_,
      [self = shared_from_this()](beast::error_code error, size_t) { self->on_header(error); });
}

void HttpServer::Impl::Session::on_header(beast::error_code error) {
  if (error) return on_read_error(error);
  if (!beast::iequals(parser_->get()[http::field::expect], "100-continue")) return read_body();
  continue_ = {http::status::continue_, 11};
  http::async_write(stream_, continue_,
                    [self = shared_from_this()](beast::error_code write_error, size_t) {
                      if (write_error) return self->close();
                      self->read_body();
                    });
}

void HttpServer::Impl::Session::read_body() {
  http::async_read(
      stream_, buffer_, *parser_,
      [self = shared_from_this()](beast::error_code error, size_t) { self->on_request(error); });
}

void HttpServer::Impl::Session::on_request(beast::error_code error) {
  if (error) return on_read_error(error);
  stream_.expires_never();
  dispatch();
}

void HttpServer::Impl::Session::on_read_error(beast::error_code error) {
  if (error == http::error::end_of_stream || error == beast::error::timeout) return close();
  const std::string name = error.message();
  HttpResponse refusal;
  if (error == http::error::body_limit) {
    refusal = error_response(resource_exhausted("the request's body is larger than " +
                                                std::to_string(server_->options_.body_bytes_max) +
                                                " bytes"));
    refusal.status = 413;
  } else if (error == http::error::header_limit || error == http::error::buffer_overflow) {
    refusal = error_response(resource_exhausted("the request's header is larger than " +
                                                std::to_string(server_->options_.header_bytes_max) +
                                                " bytes"));
    refusal.status = 431;
  } else if (error.category() == http::make_error_code(http::error::bad_method).category()) {
    refusal = error_response(invalid_argument("not a valid HTTP/1.1 request: " + name));
  } else {
    return close();
  }
  send(std::move(refusal), false);
}

void HttpServer::Impl::Session::dispatch() {
  if (server_->stopped_) return close();
  const auto& message = parser_->get();
  version_ = message.version();
  keep_alive_ = message.keep_alive();
  is_head_ = message.method() == http::verb::head;
  const auto text = [](beast::string_view field) {
    return std::string_view(field.data(), field.size());
  };
  HttpRequest request;
  request.method = is_head_ ? "GET" : std::string(message.method_string());
  if (const Status parsed = parse_target(text(message.target()), &request); !parsed.ok()) {
    return send(error_response(parsed), false);
  }
  if (request.method != "GET" &&
      !origin_allowed(text(message[http::field::origin]), text(message[http::field::host]),
                      asio::ip::make_address(server_->options_.bind).is_loopback())) {
    return send(
        error_response(permission_denied("requests from pages of another origin are refused")),
        false);
  }
  request.body = std::move(parser_->get().body());

  waiting_ = true;
  const uint64_t exchange = ++exchange_;
  timer_.expires_after(server_->options_.answer_timeout);
  timer_.async_wait([self = shared_from_this(), exchange](beast::error_code error) {
    if (error) return;
    self->answer(exchange, error_response(deadline_exceeded("no answer was ready in time")));
  });
  const auto pending = std::make_shared<Answer>(weak_from_this(), exchange);
  server_->handler_(request,
                    [pending](HttpResponse response) { pending->give(std::move(response)); });
  if (waiting_) watch_for_departure(exchange);
}

// A client that goes away while its answer is awaited must not hold its place among the
// connections until the answer would be due.
void HttpServer::Impl::Session::watch_for_departure(uint64_t exchange) {
  stream_.socket().async_wait(
      tcp::socket::wait_read, [self = shared_from_this(), exchange](beast::error_code error) {
        if (error || !self->waiting_ || self->exchange_ != exchange) return;
        char byte = 0;
        self->stream_.socket().receive(asio::buffer(&byte, 1), tcp::socket::message_peek, error);
        if (!error) return;  // its next request, early
        self->waiting_ = false;
        self->close();
      });
}

void HttpServer::Impl::Session::answer(uint64_t exchange, HttpResponse response) {
  if (!waiting_ || exchange != exchange_) return;
  waiting_ = false;
  timer_.cancel();
  send(std::move(response), keep_alive_);
}

void HttpServer::Impl::Session::send(HttpResponse response, bool keep_alive) {
  const auto fill_header = [&](auto& message) {
    message.version(version_);
    message.result(static_cast<unsigned>(response.status));
    message.set(http::field::server, "penstock");
    message.set(http::field::content_type, response.content_type);
    message.set(http::field::cache_control, "no-store");
    message.keep_alive(keep_alive);
  };
  const auto on_written = [self = shared_from_this(), keep_alive](beast::error_code error, size_t) {
    if (error) return self->close();
    if (keep_alive) return self->read_request();
    self->stream_.socket().shutdown(tcp::socket::shutdown_send, error);
    self->stream_.expires_after(kDrainTimeout);  // for all of it: a trickle must not hold a place
    self->drain();
  };
  stream_.expires_after(server_->options_.write_timeout);
  if (is_head_) {
    head_response_ = {};
    fill_header(head_response_);
    head_response_.content_length(response.body.size());
    return http::async_write(stream_, head_response_, on_written);
  }
  response_ = {};
  fill_header(response_);
  response_.body() = std::move(response.body);
  response_.prepare_payload();
  http::async_write(stream_, response_, on_written);
}

void HttpServer::Impl::Session::drain() {
  stream_.async_read_some(asio::buffer(drained_),
                          [self = shared_from_this()](beast::error_code error, size_t count) {
                            self->drained_bytes_ += count;
                            if (error || self->drained_bytes_ > kDrainBytesMax)
                              return self->close();
                            self->drain();
                          });
}

void HttpServer::Impl::Session::refuse_connection() {
  send(error_response(unavailable("too many open connections; try again in a moment")), false);
}

void HttpServer::Impl::Session::close() {
  beast::error_code ignored;
  timer_.cancel();
  stream_.cancel();
  stream_.socket().close(ignored);
}

Status HttpServer::Impl::listen() {
  beast::error_code error;
  const auto address = asio::ip::make_address(options_.bind, error);
  if (error) {
    return invalid_argument("\"" + options_.bind +
                            "\" is not an IP address to listen on, such as 127.0.0.1 or ::1");
  }
  const tcp::endpoint endpoint(address, options_.port);
  const std::string where = host_and_port(options_.bind, options_.port);
  acceptor_.open(endpoint.protocol(), error);
  if (!error) acceptor_.set_option(asio::socket_base::reuse_address(true), error);
  if (!error) acceptor_.bind(endpoint, error);
  if (!error) acceptor_.listen(asio::socket_base::max_listen_connections, error);
  if (error == asio::error::address_in_use) {
    return already_exists("HTTP port " + where +
                          " is in use by another program; stop it or choose another port");
  }
  if (error) return errno_status(error.value(), "listen for HTTP on " + where);
  port_ = acceptor_.local_endpoint(error).port();
  return {};
}

void HttpServer::Impl::accept() {
  acceptor_.async_accept([self = shared_from_this()](beast::error_code error, tcp::socket socket) {
    if (self->stopped_) return;
    if (error) {
      // Out of descriptors, most likely: wait for connections to end instead of spinning.
      log_warning("cannot accept an HTTP connection: {}", error.message());
      auto pause =
          std::make_shared<asio::steady_timer>(self->loop_, std::chrono::milliseconds(100));
      pause->async_wait([self, pause](beast::error_code) {
        if (!self->stopped_) self->accept();
      });
      return;
    }
    const bool full = self->sessions_.size() >= self->options_.connections_max;
    const auto session = std::make_shared<Session>(std::move(socket), self);
    full ? session->refuse_connection() : session->read_request();
    self->accept();
  });
}

void HttpServer::Impl::stop() {
  stopped_ = true;
  beast::error_code ignored;
  acceptor_.close(ignored);
  // Closing may end sessions, which take themselves out of the set.
  const std::vector<Session*> open(sessions_.begin(), sessions_.end());
  for (Session* session : open) {
    if (sessions_.contains(session)) session->close();
  }
}

HttpServer::HttpServer(std::shared_ptr<Impl> impl) : impl_(std::move(impl)) {}
HttpServer::~HttpServer() {
  impl_->stop();
}
uint16_t HttpServer::port() const {
  return impl_->port();
}

Result<std::unique_ptr<HttpServer>> HttpServer::start(boost::asio::io_context& loop,
                                                      HttpServerOptions options,
                                                      HttpHandler handler) {
  auto impl = std::make_shared<Impl>(loop, std::move(options), std::move(handler));
  PENSTOCK_TRY(impl->listen());
  impl->accept();
  return std::make_unique<HttpServer>(std::move(impl));
}

std::optional<std::string_view> HttpRequest::parameter(std::string_view name) const {
  for (const auto& [key, value] : query) {
    if (key == name) return value;
  }
  return std::nullopt;
}

HttpResponse json_response(std::string json, int status) {
  return {status, "application/json", std::move(json)};
}

int http_status_of(Code code) {
  switch (code) {
    case Code::kOk:
      return 200;
    case Code::kInvalidArgument:
      return 400;
    case Code::kPermissionDenied:
      return 403;
    case Code::kNotFound:
      return 404;
    case Code::kAlreadyExists:
    case Code::kFailedPrecondition:
    case Code::kAborted:
      return 409;
    case Code::kResourceExhausted:
      return 429;
    case Code::kUnavailable:
      return 503;
    case Code::kDeadlineExceeded:
      return 504;
    case Code::kDataLoss:
    case Code::kInternal:
      return 500;
  }
  return 500;
}

HttpResponse error_response(const Status& error) {
  const nlohmann::json body = {
      {"error", {{"code", code_name(error.code())}, {"message", error.message()}}}};
  // Messages may quote what a client sent; bytes that are not UTF-8 are replaced, not thrown over.
  return json_response(body.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace) + "\n",
                       http_status_of(error.code()));
}

}  // namespace penstock
