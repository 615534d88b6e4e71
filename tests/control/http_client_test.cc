#include "comm/control/http_client.h"

#include "tests/control/http_fixture.h"

namespace penstock {
namespace {

// A server that sends what it is told and closes, whatever it is asked.
class CannedServer {
 public:
  explicit CannedServer(std::string answer, bool close = true) {
    listener_ = FileDescriptor(socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0));
    sockaddr_in address{};
    address.sin_family = AF_INET;
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    EXPECT_EQ(bind(listener_.get(), reinterpret_cast<sockaddr*>(&address), sizeof address), 0);
    EXPECT_EQ(listen(listener_.get(), 4), 0);
    socklen_t size = sizeof address;
    getsockname(listener_.get(), reinterpret_cast<sockaddr*>(&address), &size);
    port_ = ntohs(address.sin_port);
    thread_ = std::thread([this, answer = std::move(answer), close] {
      const FileDescriptor fd(accept(listener_.get(), nullptr, nullptr));
      char buffer[4096];
      if (recv(fd.get(), buffer, sizeof buffer, 0) <= 0) return;
      send(fd.get(), answer.data(), answer.size(), MSG_NOSIGNAL);
      if (!close) recv(fd.get(), buffer, sizeof buffer, 0);  // until the client gives up
    });
  }
  ~CannedServer() { thread_.join(); }
  std::string url() const { return "http://127.0.0.1:" + std::to_string(port_) + "/"; }

 private:
  FileDescriptor listener_;
  uint16_t port_ = 0;
  std::thread thread_;
};

Result<HttpReply> get(const std::string& url) {
  HttpCall call;
  call.url = url;
  return http_call(call);
}
Code code_of(const std::string& url) {
  return get(url).status().code();
}

TEST(HttpClientTest, ARefusedConnectionIsUnavailableAndNamesTheAddress) {
  const auto reply = get("http://127.0.0.1:1/x");
  ASSERT_FALSE(reply.ok());
  EXPECT_EQ(reply.status().code(), Code::kUnavailable);
  EXPECT_NE(reply.status().message().find("http://127.0.0.1:1"), std::string::npos);
}

TEST(HttpClientTest, AVersionSixAddressKeepsItsBrackets) {
  EXPECT_NE(get("http://[::1]:1/x").status().message().find("http://[::1]:1"), std::string::npos);
}

TEST(HttpClientTest, AddressesThatAreNoneAreRefused) {
  for (const char* url :
       {"", "127.0.0.1:7070", "https://x", "http://", "http://:80/", "http://x:/", "http://x:port/",
        "http://x:0/", "http://x:65536/", "http://x:1/a b", "http://x:1/a\r\nb"}) {
    EXPECT_EQ(code_of(url), Code::kInvalidArgument) << url;
  }
}

TEST(HttpClientTest, AnErrorStatusIsAValue) {
  const CannedServer server("HTTP/1.1 404 Not Found\r\nContent-Length: 4\r\n\r\ngone");
  const auto reply = get(server.url());
  ASSERT_TRUE(reply.ok()) << reply.status().to_string();
  EXPECT_EQ(reply->status, 404);
  EXPECT_EQ(reply->body, "gone");
}

TEST(HttpClientTest, AnAnswerThatIsNotHttpIsDataLoss) {
  const CannedServer server("220 smtp ready\r\n\r\n");
  EXPECT_EQ(code_of(server.url()), Code::kDataLoss);
}

TEST(HttpClientTest, ATruncatedAnswerIsUnavailable) {
  const CannedServer server("HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nshort");
  EXPECT_EQ(code_of(server.url()), Code::kUnavailable);
}

TEST(HttpClientTest, AConnectionClosedWithoutAnAnswerIsUnavailable) {
  const CannedServer server("");
  EXPECT_EQ(code_of(server.url()), Code::kUnavailable);
}

TEST(HttpClientTest, AnAnswerLargerThanTheBoundIsDataLoss) {
  const CannedServer server("HTTP/1.1 200 OK\r\nContent-Length: 99999999999\r\n\r\n");
  EXPECT_EQ(code_of(server.url()), Code::kDataLoss);
}

TEST(HttpClientTest, TheDeadlineHolds) {
  const CannedServer server("HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n", false);
  HttpCall call;
  call.url = server.url();
  call.deadline = std::chrono::milliseconds(100);
  EXPECT_EQ(http_call(call).status().code(), Code::kDeadlineExceeded);
}

TEST(HttpClientTest, PercentEncodingLeavesOnlySafeCharacters) {
  EXPECT_EQ(percent_encode("a b/\xC3\xBC?&=~-_.9Z"), "a%20b%2F%C3%BC%3F%26%3D~-_.9Z");
  EXPECT_EQ(percent_encode(""), "");
}

}  // namespace
}  // namespace penstock
