// An HTTP server on a loop of its own thread, and a raw connection to it.
#pragma once

#include <arpa/inet.h>
#include <gtest/gtest.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <unistd.h>

#include <future>
#include <string>
#include <string_view>
#include <thread>

#include "comm/base/file.h"
#include "comm/control/event_loop.h"
#include "comm/control/http_client.h"
#include "comm/control/http_server.h"

namespace penstock {

class HttpFixture : public ::testing::Test {
 protected:
  // Call once, first.
  void start(HttpServerOptions options, HttpHandler handler) {
    auto started = HttpServer::start(loop.io_context(), std::move(options), std::move(handler));
    ASSERT_TRUE(started.ok()) << started.status().to_string();
    server = *std::move(started);
    thread = std::thread([this] { loop.run(); });
  }
  ~HttpFixture() override {
    if (!thread.joinable()) return;
    on_loop([this] { server.reset(); });
    loop.stop();
    thread.join();
  }
  void on_loop(std::function<void()> action) {
    std::promise<void> done;
    loop.post([&] {
      action();
      done.set_value();
    });
    done.get_future().wait();
  }
  std::string url(const std::string& target) const {
    return "http://127.0.0.1:" + std::to_string(server->port()) + target;
  }
  Result<HttpReply> call(const std::string& method, const std::string& target,
                         const std::string& body = {}) {
    HttpCall call;
    call.method = method;
    call.url = url(target);
    call.body = body;
    return http_call(call);
  }
  FileDescriptor connect_raw() const {
    FileDescriptor fd(socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0));
    sockaddr_in address{};
    address.sin_family = AF_INET;
    address.sin_port = htons(server->port());
    inet_pton(AF_INET, "127.0.0.1", &address.sin_addr);
    EXPECT_EQ(connect(fd.get(), reinterpret_cast<sockaddr*>(&address), sizeof address), 0);
    const timeval limit{10, 0};
    setsockopt(fd.get(), SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof limit);
    return fd;
  }
  static void send_raw(const FileDescriptor& fd, std::string_view bytes) {
    // The server may have closed already: what it answered is what counts.
    send(fd.get(), bytes.data(), bytes.size(), MSG_NOSIGNAL);
  }
  // Everything until the server closes; "(no end)" is appended when it does not within the limit.
  static std::string receive_all(const FileDescriptor& fd) {
    std::string text;
    char buffer[4096];
    while (true) {
      const ssize_t count = recv(fd.get(), buffer, sizeof buffer, 0);
      if (count == 0) return text;
      if (count < 0) return text + (errno == ECONNRESET ? "" : "(no end)");
      text.append(buffer, static_cast<size_t>(count));
    }
  }
  std::string exchange(std::string_view bytes) {
    const FileDescriptor fd = connect_raw();
    send_raw(fd, bytes);
    return receive_all(fd);
  }

  EventLoop loop;
  std::unique_ptr<HttpServer> server;
  std::thread thread;
};

}  // namespace penstock
