#include "comm/control/http_server.h"

#include <poll.h>

#include "comm/base/clock.h"
#include "comm/base/ip_address.h"
#include "comm/base/random.h"
#include "tests/control/http_fixture.h"

namespace penstock {
namespace {

// The default options but for one.
template <typename Field, typename Value>
HttpServerOptions with(Field HttpServerOptions::*field, Value value) {
  HttpServerOptions options;
  options.*field = value;
  return options;
}

class HttpServerTest : public HttpFixture {
 protected:
  // Answers with what it understood.
  void start_echo(HttpServerOptions options = {}) {
    start(std::move(options), [](const HttpRequest& request, HttpResponder respond) {
      std::string text = request.method + " " + request.path;
      for (const auto& [name, value] : request.query) text += " " + name + "=" + value;
      respond({200, "text/plain", text + "\n" + request.body});
    });
  }
};

TEST_F(HttpServerTest, ARequestReachesTheHandlerDecoded) {
  start_echo();
  const auto reply = call("POST", "/a%20b/c?x=1%202&flag&y=a+b", "body");
  ASSERT_TRUE(reply.ok()) << reply.status().to_string();
  EXPECT_EQ(reply->status, 200);
  EXPECT_EQ(reply->content_type, "text/plain");
  EXPECT_EQ(reply->body, "POST /a b/c x=1 2 flag= y=a b\nbody");
}

TEST_F(HttpServerTest, SeveralRequestsShareOneConnection) {
  start_echo();
  const FileDescriptor fd = connect_raw();
  send_raw(fd, "GET /one HTTP/1.1\r\nHost: x\r\n\r\n");
  char buffer[4096];
  ASSERT_GT(recv(fd.get(), buffer, sizeof buffer, 0), 0);
  send_raw(fd, "GET /two HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
  EXPECT_NE(receive_all(fd).find("GET /two"), std::string::npos);
}

TEST_F(HttpServerTest, ATrailingSlashMakesNoDifference) {
  start_echo();
  EXPECT_EQ(call("GET", "/jobs/")->body, "GET /jobs\n");
  EXPECT_EQ(call("GET", "/")->body, "GET /\n");
}

TEST_F(HttpServerTest, HeadGivesTheHeaderOfGetWithoutABody) {
  start_echo();
  const std::string reply = exchange("HEAD /x HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
  EXPECT_NE(reply.find("200 OK"), std::string::npos);
  EXPECT_NE(reply.find("Content-Length: 7"), std::string::npos) << reply;
  EXPECT_TRUE(reply.ends_with("\r\n\r\n"));
}

TEST_F(HttpServerTest, MalformedRequestsGetAJson400AndAreClosed) {
  start_echo();
  for (const char* bytes :
       {"nonsense\r\n\r\n", "GET\r\n\r\n", "GET / HTTP/9.9\r\n\r\n", "GET / HTTP/1.1\nHost x\n\n",
        "POST / HTTP/1.1\r\nContent-Length: many\r\n\r\n", "\x16\x03\x01\x02\x00\x01\x00\r\n\r\n",
        "GET /%zz HTTP/1.1\r\nHost: x\r\n\r\n", "GET /a/../b HTTP/1.1\r\nHost: x\r\n\r\n",
        "GET //a HTTP/1.1\r\nHost: x\r\n\r\n", "GET /a%00b HTTP/1.1\r\nHost: x\r\n\r\n",
        "GET http://x/a HTTP/1.1\r\nHost: x\r\n\r\n", "OPTIONS * HTTP/1.1\r\nHost: x\r\n\r\n",
        "GET /a?x=%f HTTP/1.1\r\nHost: x\r\n\r\n"}) {
    const std::string reply = exchange(bytes);
    EXPECT_TRUE(reply.starts_with("HTTP/1.1 400")) << bytes << " -> " << reply;
    EXPECT_NE(reply.find("{\"error\":{\"code\":\"invalid_argument\""), std::string::npos) << reply;
    EXPECT_EQ(reply.find("(no end)"), std::string::npos) << bytes;
  }
  EXPECT_EQ(call("GET", "/still-there")->status, 200);
}

TEST_F(HttpServerTest, RandomBytesNeverHurt) {
  start_echo();
  for (uint64_t seed = 0; seed < 200; ++seed) {
    Random random(seed, 7);
    std::string bytes = random.below(2) ? "GET /" : "";
    for (uint64_t left = 1 + random.below(300); left > 0; --left) {
      bytes.push_back(static_cast<char>(random.next()));
    }
    const FileDescriptor fd = connect_raw();
    send_raw(fd, bytes);
    shutdown(fd.get(), SHUT_WR);
    EXPECT_EQ(receive_all(fd).find("(no end)"), std::string::npos) << "seed " << seed;
  }
  EXPECT_EQ(call("GET", "/still-there")->status, 200);
}

TEST_F(HttpServerTest, ABodyLargerThanTheBoundIs413) {
  start_echo(with(&HttpServerOptions::body_bytes_max, 1000));
  EXPECT_EQ(call("POST", "/", std::string(1000, 'x'))->status, 200);
  const auto reply = call("POST", "/", std::string(1001, 'x'));
  ASSERT_TRUE(reply.ok()) << reply.status().to_string();
  EXPECT_EQ(reply->status, 413);
  EXPECT_NE(reply->body.find("larger than 1000 bytes"), std::string::npos);
}

TEST_F(HttpServerTest, AnEndlessChunkedBodyIs413) {
  start_echo(with(&HttpServerOptions::body_bytes_max, 1000));
  std::string bytes = "POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n";
  for (int i = 0; i < 100; ++i) bytes += "100\r\n" + std::string(256, 'x') + "\r\n";
  EXPECT_TRUE(exchange(bytes).starts_with("HTTP/1.1 413"));
}

TEST_F(HttpServerTest, EndlessChunkExtensionsAndTrailersAreRefused) {
  start_echo();
  const std::string head = "POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n";
  for (const std::string& begin : {head + "5;extension=", head + "0\r\nTrailer: "}) {
    const FileDescriptor client = connect_raw();
    send_raw(client, begin);
    const std::string more(64 << 10, 'x');
    size_t sent = 0;
    // Until the server has had enough and closes; it must not keep all of this.
    while (sent < (16u << 20)) {
      const ssize_t count = send(client.get(), more.data(), more.size(), MSG_NOSIGNAL);
      if (count < 0) break;
      sent += static_cast<size_t>(count);
    }
    EXPECT_LT(sent, 16u << 20);
  }
}

TEST_F(HttpServerTest, AHeaderLargerThanTheBoundIs431) {
  start_echo();
  const std::string reply =
      exchange("GET / HTTP/1.1\r\nX: " + std::string(100'000, 'y') + "\r\n\r\n");
  EXPECT_TRUE(reply.starts_with("HTTP/1.1 431")) << reply.substr(0, 200);
}

TEST_F(HttpServerTest, AClientThatAsksBeforeSendingItsBodyIsToldToGoOn) {
  start_echo();
  const FileDescriptor fd = connect_raw();
  send_raw(fd,
           "POST /x HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: 4\r\n"
           "Connection: close\r\n\r\n");
  char buffer[256];
  const ssize_t count = recv(fd.get(), buffer, sizeof buffer, 0);
  ASSERT_GT(count, 0);
  EXPECT_TRUE(std::string_view(buffer, static_cast<size_t>(count)).starts_with("HTTP/1.1 100"));
  send_raw(fd, "body");
  EXPECT_TRUE(receive_all(fd).ends_with("POST /x\nbody"));
}

TEST_F(HttpServerTest, ASlowClientIsDropped) {
  start_echo(with(&HttpServerOptions::read_timeout, std::chrono::milliseconds(100)));
  EXPECT_EQ(exchange("GET / HTT"), "");
}

TEST_F(HttpServerTest, ARefusedClientThatTricklesOnIsDropped) {
  start_echo();
  const FileDescriptor fd = connect_raw();
  send_raw(fd, "nonsense\r\n\r\n");
  ASSERT_TRUE(receive_all(fd).starts_with("HTTP/1.1 400"));
  const int64_t begun_ns = monotonic_ns();
  while (send(fd.get(), "x", 1, MSG_NOSIGNAL) == 1) {  // fails once the server has closed
    ASSERT_LT(monotonic_ns() - begun_ns, 60'000'000'000) << "it may hold its place for ever";
    pollfd closed = {fd.get(), 0, 0};
    poll(&closed, 1, 50);
  }
}

TEST_F(HttpServerTest, PipelinedRequestsAreAnsweredInTurn) {
  start_echo();
  const std::string replies = exchange(
      "GET /one HTTP/1.1\r\nHost: x\r\n\r\nPOST /two HTTP/1.1\r\nHost: x\r\nContent-Length: 3"
      "\r\n\r\nabcGET /three HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
  const size_t one = replies.find("GET /one\n");
  const size_t two = replies.find("POST /two\nabc");
  const size_t three = replies.find("GET /three\n");
  EXPECT_TRUE(one < two && two < three && three != std::string::npos) << replies;
}

TEST_F(HttpServerTest, WhatFollowsAHeadIsRefusedWithItsReason) {
  start_echo();
  const std::string replies = exchange("HEAD /x HTTP/1.1\r\nHost: x\r\n\r\nnonsense\r\n\r\n");
  EXPECT_NE(replies.find("HTTP/1.1 400"), std::string::npos);
  EXPECT_NE(replies.find("not a valid HTTP/1.1 request"), std::string::npos) << replies;
}

TEST_F(HttpServerTest, AClientThatHasClosedItsOwnDirectionIsAnswered) {
  start_echo();
  const FileDescriptor fd = connect_raw();
  send_raw(fd, "GET /x HTTP/1.1\r\nHost: x\r\n\r\n");
  shutdown(fd.get(), SHUT_WR);
  EXPECT_NE(receive_all(fd).find("GET /x"), std::string::npos);
}

TEST_F(HttpServerTest, AnIdleConnectionIsDropped) {
  start_echo(with(&HttpServerOptions::read_timeout, std::chrono::milliseconds(100)));
  EXPECT_EQ(exchange(""), "");
}

TEST_F(HttpServerTest, AnAnswerMayComeLater) {
  HttpResponder kept;
  std::promise<void> asked;
  start({}, [&](const HttpRequest&, HttpResponder respond) {
    kept = std::move(respond);
    asked.set_value();
  });
  auto reply = std::async(std::launch::async, [&] { return call("GET", "/poll"); });
  asked.get_future().wait();
  on_loop([&] {
    kept({200, "text/plain", "now"});
    kept({200, "text/plain", "and again, which does nothing"});
    kept = nullptr;
  });
  EXPECT_EQ(reply.get()->body, "now");
}

TEST_F(HttpServerTest, AResponderDroppedWithoutAnAnswerIs500) {
  start({}, [](const HttpRequest&, HttpResponder) {});
  const auto reply = call("GET", "/");
  ASSERT_TRUE(reply.ok());
  EXPECT_EQ(reply->status, 500);
  EXPECT_NE(reply->body.find("\"internal\""), std::string::npos);
}

TEST_F(HttpServerTest, AnAnswerThatDoesNotComeInTimeIs504) {
  HttpResponder kept;
  start(with(&HttpServerOptions::answer_timeout, std::chrono::milliseconds(50)),
        [&](const HttpRequest&, HttpResponder respond) { kept = std::move(respond); });
  EXPECT_EQ(call("GET", "/")->status, 504);
  on_loop([&] { kept = nullptr; });
}

TEST_F(HttpServerTest, AnAnswerAfterTheClientLeftDoesNothing) {
  HttpResponder kept;
  std::promise<void> asked;
  start({}, [&](const HttpRequest&, HttpResponder respond) {
    kept = std::move(respond);
    asked.set_value();
  });
  {
    const FileDescriptor fd = connect_raw();
    send_raw(fd, "GET / HTTP/1.1\r\nHost: x\r\n\r\n");
    asked.get_future().wait();
  }
  on_loop([&] {
    kept({200, "text/plain", std::string(1 << 20, 'x')});
    kept = nullptr;
  });
  on_loop([] {});
}

TEST_F(HttpServerTest, AClientThatLeavesWhileItWaitsGivesItsPlaceBack) {
  std::vector<HttpResponder> held;  // on the loop's thread
  std::promise<void> both_wait;
  HttpServerOptions options;
  options.connections_max = 2;
  start(options, [&](const HttpRequest& request, HttpResponder respond) {
    if (request.path == "/now") return respond(json_response("{}"));
    held.push_back(std::move(respond));
    if (held.size() == 2) both_wait.set_value();
  });
  std::optional<FileDescriptor> first = connect_raw();
  std::optional<FileDescriptor> second = connect_raw();
  for (const auto* client : {&*first, &*second}) {
    send_raw(*client, "GET /hold HTTP/1.1\r\nHost: x\r\n\r\n");
  }
  both_wait.get_future().wait();
  EXPECT_EQ(call("GET", "/now")->status, 503);
  first.reset();
  second.reset();
  const int64_t deadline_ns = monotonic_ns() + 10'000'000'000;
  int status = 503;
  while (status == 503 && monotonic_ns() < deadline_ns) status = call("GET", "/now")->status;
  EXPECT_EQ(status, 200);
  on_loop([&] { held.clear(); });
}

TEST_F(HttpServerTest, AnEarlyNextRequestDoesNotEndTheOneThatWaits) {
  std::vector<HttpResponder> held;
  std::promise<void> waits;
  start({}, [&](const HttpRequest& request, HttpResponder respond) {
    if (request.path == "/now") return respond(json_response("\"second\""));
    held.push_back(std::move(respond));
    waits.set_value();
  });
  const FileDescriptor client = connect_raw();
  send_raw(client, "GET /hold HTTP/1.1\r\nHost: x\r\n\r\n");
  waits.get_future().wait();
  send_raw(client, "GET /now HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
  on_loop([&] { held.front()(json_response("\"first\"")); });
  const std::string answers = receive_all(client);
  EXPECT_LT(answers.find("\"first\""), answers.find("\"second\""));
  EXPECT_NE(answers.find("\"second\""), std::string::npos) << answers;
}

TEST_F(HttpServerTest, AVersionSixAddressServesWhereTheHostHasOne) {
  HttpServerOptions options;
  options.bind = "::1";
  const HttpHandler answer = [](const HttpRequest&, HttpResponder respond) {
    respond(json_response("{}"));
  };
  if (const auto tried = HttpServer::start(loop.io_context(), options, answer); !tried.ok()) {
    EXPECT_NE(tried.status().message().find("[::1]"), std::string::npos);
    return;
  }
  start(options, answer);
  HttpCall over_version_6;
  over_version_6.url = "http://" + host_and_port("::1", server->port()) + "/";
  const Result<HttpReply> reply = http_call(over_version_6);
  ASSERT_TRUE(reply.ok()) << reply.status().to_string();
  EXPECT_EQ(reply->status, 200);
}

TEST_F(HttpServerTest, ConnectionsBeyondTheCapAreTurnedAway) {
  start_echo(with(&HttpServerOptions::connections_max, 2));
  const FileDescriptor one = connect_raw();
  const FileDescriptor two = connect_raw();
  for (const FileDescriptor* fd : {&one, &two}) {  // so that both have been accepted
    send_raw(*fd, "GET / HTTP/1.1\r\nHost: x\r\n\r\n");
    char buffer[1024];
    ASSERT_GT(recv(fd->get(), buffer, sizeof buffer, 0), 0);
  }
  EXPECT_TRUE(exchange("GET / HTTP/1.1\r\nHost: x\r\n\r\n").starts_with("HTTP/1.1 503"));
}

TEST_F(HttpServerTest, APageOfAnotherOriginMayNotPost) {
  start_echo();
  const auto post = [&](const std::string& origin, const std::string& host = "localhost:1") {
    return exchange("POST / HTTP/1.1\r\nHost: " + host + "\r\nOrigin: " + origin +
                    "\r\nContent-Length: 0\r\nConnection: close\r\n\r\n");
  };
  EXPECT_TRUE(post("http://elsewhere").starts_with("HTTP/1.1 403"));
  EXPECT_TRUE(post("null").starts_with("HTTP/1.1 403"));
  EXPECT_TRUE(post("http://localhost:1").starts_with("HTTP/1.1 200"));
  EXPECT_TRUE(post("http://[::1]:7", "[::1]:7").starts_with("HTTP/1.1 200"));
  EXPECT_TRUE(post("http://127.0.0.1", "127.0.0.1").starts_with("HTTP/1.1 200"));
  // A name that its owner had resolve to this host.
  EXPECT_TRUE(post("http://evil.example:1", "evil.example:1").starts_with("HTTP/1.1 403"));
}

TEST_F(HttpServerTest, APortInUseSaysWhichOne) {
  start_echo();
  EventLoop other;
  HttpServerOptions options;
  options.port = server->port();
  const auto second =
      HttpServer::start(other.io_context(), options, [](const HttpRequest&, HttpResponder) {});
  ASSERT_FALSE(second.ok());
  EXPECT_EQ(second.status().code(), Code::kAlreadyExists);
  EXPECT_NE(second.status().message().find(std::to_string(options.port)), std::string::npos);
}

TEST_F(HttpServerTest, AnAddressThatIsNoneIsRefused) {
  HttpServerOptions options;
  options.bind = "not-an-address";
  const auto started =
      HttpServer::start(loop.io_context(), options, [](const HttpRequest&, HttpResponder) {});
  EXPECT_EQ(started.status().code(), Code::kInvalidArgument);
}

TEST_F(HttpServerTest, ManyClientsAtOnceAreAllAnswered) {
  start_echo();
  std::vector<std::future<bool>> clients;
  for (int i = 0; i < 20; ++i) {
    clients.push_back(std::async(std::launch::async, [this, i] {
      for (int n = 0; n < 10; ++n) {
        const auto reply = call("GET", "/" + std::to_string(i));
        if (!reply.ok() || reply->body != "GET /" + std::to_string(i) + "\n") return false;
      }
      return true;
    }));
  }
  for (auto& client : clients) EXPECT_TRUE(client.get());
}

TEST_F(HttpServerTest, EveryErrorCodeHasItsStatus) {
  EXPECT_EQ(error_response(invalid_argument("x")).status, 400);
  EXPECT_EQ(error_response(permission_denied("x")).status, 403);
  EXPECT_EQ(error_response(not_found("x")).status, 404);
  EXPECT_EQ(error_response(already_exists("x")).status, 409);
  EXPECT_EQ(error_response(failed_precondition("x")).status, 409);
  EXPECT_EQ(error_response(aborted("x")).status, 409);
  EXPECT_EQ(error_response(resource_exhausted("x")).status, 429);
  EXPECT_EQ(error_response(data_loss("x")).status, 500);
  EXPECT_EQ(error_response(internal_error("x")).status, 500);
  EXPECT_EQ(error_response(unavailable("x")).status, 503);
  EXPECT_EQ(error_response(deadline_exceeded("x")).status, 504);
  EXPECT_EQ(error_response(not_found("no \"x\"\xFF")).body.find('\xFF'), std::string::npos);
}

}  // namespace
}  // namespace penstock
