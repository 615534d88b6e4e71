#include "comm/base/ip_address.h"

#include <gtest/gtest.h>

namespace penstock {
namespace {

TEST(IpAddressTest, NumericAddressesOfBothVersionsAreRecognised) {
  for (const char* good : {"127.0.0.1", "0.0.0.0", "::1", "::", "fe80::1:2"}) {
    EXPECT_TRUE(is_ip_address(good)) << good;
  }
  for (const char* bad : {"", "localhost", "[::1]", "127.0.0.1:80", "1.2.3", "1.2.3.4.5"}) {
    EXPECT_FALSE(is_ip_address(bad)) << bad;
  }
}

TEST(IpAddressTest, OnlyTheAddressesThatMeanAllAreUnspecified) {
  EXPECT_TRUE(is_unspecified_address("0.0.0.0"));
  EXPECT_TRUE(is_unspecified_address("::"));
  EXPECT_FALSE(is_unspecified_address("::1"));
}

TEST(IpAddressTest, AVersionSixAddressIsBracketedBeforeItsPort) {
  EXPECT_EQ(host_and_port("127.0.0.1", 7070), "127.0.0.1:7070");
  EXPECT_EQ(host_and_port("::1", 7070), "[::1]:7070");
  EXPECT_EQ(host_and_port("host-3", 80), "host-3:80");
}

}  // namespace
}  // namespace penstock
