// IP addresses as text, version 4 and 6.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

namespace penstock {

// A numeric address: "127.0.0.1", "::1"; no names, no brackets, no port.
bool is_ip_address(const std::string& text);
// "0.0.0.0" and "::": every address of this host, so nobody else can connect to it by that name.
bool is_unspecified_address(const std::string& address);
// "127.0.0.1:7070", "[::1]:7070".
std::string host_and_port(std::string_view host, uint16_t port);

}  // namespace penstock
