#include "comm/base/ip_address.h"

#include <arpa/inet.h>
#include <fmt/format.h>

namespace penstock {

bool is_ip_address(const std::string& text) {
  in6_addr parsed = {};
  return ::inet_pton(AF_INET, text.c_str(), &parsed) == 1 ||
         ::inet_pton(AF_INET6, text.c_str(), &parsed) == 1;
}

bool is_unspecified_address(const std::string& address) {
  return address == "0.0.0.0" || address == "::";
}

std::string host_and_port(std::string_view host, uint16_t port) {
  const bool is_version_6 = host.find(':') != std::string_view::npos;
  return is_version_6 ? fmt::format("[{}]:{}", host, port) : fmt::format("{}:{}", host, port);
}

}  // namespace penstock
