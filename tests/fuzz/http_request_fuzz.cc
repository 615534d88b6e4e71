// What a client sends to the HTTP server, to the last byte: a real server on loopback gets it and
// then the end of the stream. It answers, or hangs up; what its handler is given keeps the contract
// of HttpRequest.
#include <netinet/in.h>
#include <sys/socket.h>

#include <boost/asio/io_context.hpp>
#include <cerrno>

#include "comm/base/check.h"
#include "comm/base/clock.h"
#include "comm/base/file.h"
#include "comm/control/http_server.h"
#include "tests/fuzz/targets.h"

namespace penstock {
namespace {

constexpr size_t kBodyBytesMax = 1 << 10;
// Far longer than any answer takes, and than none of the server's own deadlines.
constexpr int64_t kPatienceNs = 5'000'000'000;

void answer(const HttpRequest& request, const HttpResponder& respond) {
  PENSTOCK_CHECK(!request.method.empty() && request.body.size() <= kBodyBytesMax);
  PENSTOCK_CHECK(request.path.starts_with('/') && request.path.find('\0') == std::string::npos);
  for (const char* never : {"//", "/./", "/../"}) {
    PENSTOCK_CHECK((request.path + "/").find(never) == std::string::npos || request.path == "/",
                   request.path);
  }
  for (const auto& [name, value] : request.query) {
    PENSTOCK_CHECK((name + value).find('\0') == std::string::npos);
    PENSTOCK_CHECK(request.parameter(name).has_value());
  }
  respond(json_response("{}"));
}

// One for all inputs, as one serves all clients.
struct Server {
  boost::asio::io_context loop;
  std::unique_ptr<HttpServer> server;
  Server() {
    auto started = HttpServer::start(loop, {.body_bytes_max = kBodyBytesMax}, answer);
    PENSTOCK_CHECK(started.ok(), started.status().message());
    server = *std::move(started);
  }
};

FileDescriptor connect_to(uint16_t port) {
  FileDescriptor client(::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0));
  // Closed without leaving the port waiting: a fuzzer would soon have used all.
  const linger at_once = {1, 0};
  ::setsockopt(client.get(), SOL_SOCKET, SO_LINGER, &at_once, sizeof(at_once));
  sockaddr_in address = {};
  address.sin_family = AF_INET;
  address.sin_port = htons(port);
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  PENSTOCK_CHECK(
      ::connect(client.get(), reinterpret_cast<const sockaddr*>(&address), sizeof(address)) == 0,
      errno);
  return client;
}

}  // namespace

void fuzz::http_request(Bytes input) {
  static Server server;
  const FileDescriptor client = connect_to(server.server->port());
  // Inputs are smaller than any socket's buffer.
  PENSTOCK_CHECK(::send(client.get(), input.data(), input.size(), MSG_NOSIGNAL) ==
                 std::ssize(input));
  PENSTOCK_CHECK(::shutdown(client.get(), SHUT_WR) == 0, errno);
  std::string reply;
  for (const int64_t begin = monotonic_ns();;) {
    server.loop.poll();
    char buffer[4096];
    const ssize_t count = ::recv(client.get(), buffer, sizeof(buffer), MSG_DONTWAIT);
    if (count == 0 || (count < 0 && errno == ECONNRESET)) break;
    if (count > 0) reply.append(buffer, static_cast<size_t>(count));
    PENSTOCK_CHECK(monotonic_ns() - begin < kPatienceNs, "neither answered nor hung up", reply);
  }
  PENSTOCK_CHECK(reply.empty() || reply.starts_with("HTTP/1."), reply);
}

}  // namespace penstock
