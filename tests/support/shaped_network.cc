#include "tests/support/shaped_network.h"

#include <arpa/inet.h>
#include <fcntl.h>
#include <linux/if_tun.h>
#include <net/if.h>
#include <poll.h>
#include <sched.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <csignal>
#include <cstring>
#include <deque>
#include <optional>

#include "comm/base/check.h"
#include "comm/base/random.h"
#include "tests/support/private_mounts.h"

namespace penstock {
namespace {

constexpr int32_t kMembersMax = 250;
// Jumbo frames: few packets to move, yet short enough that two transfers share a link fairly.
constexpr int kPacketBytesMax = 9000;
constexpr uint32_t kNetwork = 10U << 24 | 73U << 16;  // 10.73.0.0/16; member m is .m+1

Status may_not(int error, const std::string& what) {
  return failed_precondition(
      fmt::format("{}: {}; a shaped network needs root, network namespaces and /dev/net/tun", what,
                  std::strerror(error)));
}

// ---- one namespace

Status write_setting(const std::string& name, const std::string& value) {
  const FileDescriptor fd(::open(("/proc/sys/net/ipv4/" + name).c_str(), O_WRONLY | O_CLOEXEC));
  if (!fd.valid() || ::write(fd.get(), value.data(), value.size()) < 0) {
    return may_not(errno, fmt::format("set net.ipv4.{} to {}", name, value));
  }
  return {};
}

Status set_up_interface(const char* device, const std::optional<uint32_t>& address) {
  const FileDescriptor control(::socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0));
  ifreq request = {};
  std::strncpy(request.ifr_name, device, IFNAMSIZ - 1);
  const auto set = [&](unsigned long what) { return ::ioctl(control.get(), what, &request) == 0; };
  const auto set_address = [&](unsigned long what, uint32_t value) {
    sockaddr_in socket_address = {};
    socket_address.sin_family = AF_INET;
    socket_address.sin_addr.s_addr = htonl(value);
    std::memcpy(&request.ifr_addr, &socket_address, sizeof(socket_address));
    return set(what);
  };
  if (!control.valid()) return may_not(errno, "socket");
  if (address) {
    request.ifr_mtu = kPacketBytesMax;
    if (!set(SIOCSIFMTU) || !set_address(SIOCSIFADDR, *address) ||
        !set_address(SIOCSIFNETMASK, 0xFFFF0000)) {
      return may_not(errno, fmt::format("configure {}", device));
    }
  }
  request.ifr_flags = IFF_UP | IFF_RUNNING;
  if (!set(SIOCSIFFLAGS)) return may_not(errno, fmt::format("bring {} up", device));
  return {};
}

// Makes a namespace with its link and moves this process into it. The device end of the link.
Result<FileDescriptor> enter_new_namespace(int32_t member) {
  if (::unshare(CLONE_NEWNET) != 0) return may_not(errno, "make a network namespace");
  FileDescriptor tun(::open("/dev/net/tun", O_RDWR | O_NONBLOCK | O_CLOEXEC));
  if (!tun.valid()) return may_not(errno, "open /dev/net/tun");
  ifreq request = {};
  std::strncpy(request.ifr_name, ShapedNetwork::kDevice, IFNAMSIZ - 1);
  request.ifr_flags = IFF_TUN | IFF_NO_PI;
  if (::ioctl(tun.get(), TUNSETIFF, &request) != 0) return may_not(errno, "make a TUN device");
  PENSTOCK_TRY(set_up_interface("lo", {}));
  PENSTOCK_TRY(
      set_up_interface(ShapedNetwork::kDevice, kNetwork + static_cast<uint32_t>(member) + 1));
  // A pause in the traffic is no congestion, and probing for the rate would halve it now and then.
  PENSTOCK_TRY(write_setting("tcp_slow_start_after_idle", "0"));
  PENSTOCK_TRY(write_setting("tcp_congestion_control", "reno"));
  return tun;
}

// ---- the switch

struct Packet {
  int64_t arrives_ns = 0;
  std::vector<std::byte> bytes;
};

struct Port {
  FileDescriptor device;
  int64_t out_free_ns = 0;  // when the last packet has left
  int64_t in_free_ns = 0;   // when the last packet has arrived
  std::deque<Packet> arriving;
};

class Switch {
 public:
  Switch(std::vector<FileDescriptor> devices, const ShapedNetworkOptions& options,
         const std::atomic<bool>* cut_off)
      : cut_off_(cut_off),
        ns_per_byte_(1e9 / options.bytes_per_second),
        delay_ns_(options.delay.count()),
        loss_(options.loss),
        random_(options.seed, 0) {
    for (FileDescriptor& device : devices) {
      polled_.push_back({.fd = device.get(), .events = POLLIN, .revents = 0});
      ports_.emplace_back();
      ports_.back().device = std::move(device);
    }
  }

  [[noreturn]] void run() {
    ::prctl(PR_SET_TIMERSLACK, 1);
    while (true) {
      const int64_t next_ns = next_arrival_ns();
      const int64_t left_ns = std::max<int64_t>(0, next_ns - monotonic_ns());
      const timespec timeout = {.tv_sec = left_ns / kSecond, .tv_nsec = left_ns % kSecond};
      ::ppoll(polled_.data(), polled_.size(), next_ns == kNever ? nullptr : &timeout, nullptr);
      for (size_t i = 0; i < ports_.size(); ++i) {
        if (polled_[i].revents != 0) take_packets(ports_[i]);
      }
      for (Port& port : ports_) deliver(port);
    }
  }

 private:
  static constexpr int64_t kSecond = 1'000'000'000;
  static constexpr int64_t kNever = INT64_MAX;

  int64_t next_arrival_ns() const {
    int64_t next = kNever;
    for (const Port& port : ports_) {
      if (!port.arriving.empty()) next = std::min(next, port.arriving.front().arrives_ns);
    }
    return next;
  }

  void take_packets(Port& from) {
    while (true) {
      Packet packet{.arrives_ns = 0, .bytes = take_buffer()};
      const ssize_t size = ::read(from.device.get(), packet.bytes.data(), packet.bytes.size());
      Port* const to = size > 0 ? destination(packet, static_cast<size_t>(size)) : nullptr;
      if (to == nullptr || is_cut_off(from) || is_cut_off(*to) || is_lost()) {
        spare_.push_back(std::move(packet.bytes));
        if (size <= 0) return;
        continue;  // not for a member (multicast, IPv6), or lost
      }
      packet.bytes.resize(static_cast<size_t>(size));
      const auto on_wire_ns = static_cast<int64_t>(static_cast<double>(size) * ns_per_byte_);
      from.out_free_ns = std::max(monotonic_ns(), from.out_free_ns) + on_wire_ns;
      to->in_free_ns = std::max(from.out_free_ns + delay_ns_, to->in_free_ns + on_wire_ns);
      packet.arrives_ns = to->in_free_ns;
      to->arriving.push_back(std::move(packet));
    }
  }

  bool is_cut_off(const Port& port) const { return cut_off_[&port - ports_.data()]; }
  bool is_lost() { return loss_ > 0 && random_.uniform() < loss_; }

  Port* destination(const Packet& packet, size_t size) {
    constexpr size_t kHeaderBytes = 20;
    constexpr size_t kDestinationOffset = 16;
    if (size < kHeaderBytes || static_cast<uint8_t>(packet.bytes[0]) >> 4 != 4) return nullptr;
    uint32_t address = 0;
    std::memcpy(&address, packet.bytes.data() + kDestinationOffset, sizeof(address));
    const uint32_t member = ntohl(address) - kNetwork - 1;
    return member < ports_.size() ? &ports_[member] : nullptr;
  }

  void deliver(Port& port) {
    const int64_t now_ns = monotonic_ns();
    while (!port.arriving.empty() && port.arriving.front().arrives_ns <= now_ns) {
      Packet& packet = port.arriving.front();
      // A TUN device takes every packet while it is up; TCP repairs the rest.
      [[maybe_unused]] const ssize_t written =
          ::write(port.device.get(), packet.bytes.data(), packet.bytes.size());
      spare_.push_back(std::move(packet.bytes));
      port.arriving.pop_front();
    }
  }

  std::vector<std::byte> take_buffer() {
    std::vector<std::byte> buffer;
    if (!spare_.empty()) {
      buffer = std::move(spare_.back());
      spare_.pop_back();
    }
    buffer.resize(kPacketBytesMax);
    return buffer;
  }

  const std::atomic<bool>* const cut_off_;
  const double ns_per_byte_;
  const int64_t delay_ns_;
  const double loss_;
  Random random_;
  std::vector<Port> ports_;
  std::vector<pollfd> polled_;
  std::vector<std::vector<std::byte>> spare_;
};

}  // namespace

Result<std::unique_ptr<ShapedNetwork>> ShapedNetwork::create(const ShapedNetworkOptions& options) {
  if (options.member_count < 1 || options.member_count > kMembersMax ||
      !(options.bytes_per_second > 0) || options.delay.count() < 0 || !(options.loss >= 0) ||
      options.loss >= 1) {
    return invalid_argument(fmt::format(
        "a network of {} members at {} bytes/s, of which {} is lost: 1 to {} members, a rate above "
        "0, a loss of at least 0 and below 1",
        options.member_count, options.bytes_per_second, options.loss, kMembersMax));
  }
  const FileDescriptor home(::open("/proc/self/ns/net", O_RDONLY | O_CLOEXEC));
  if (!home.valid()) return may_not(errno, "open /proc/self/ns/net");
  std::unique_ptr<ShapedNetwork> network(new ShapedNetwork);
  std::vector<FileDescriptor> devices;
  Status status;
  for (int32_t member = 0; member < options.member_count && status.ok(); ++member) {
    Result<FileDescriptor> device = enter_new_namespace(member);
    status = device.status();
    if (!device.ok()) break;
    devices.push_back(std::move(device).value());
    network->namespaces_.emplace_back(::open("/proc/self/ns/net", O_RDONLY | O_CLOEXEC));
    if (!network->namespaces_.back().valid()) status = may_not(errno, "open /proc/self/ns/net");
  }
  PENSTOCK_CHECK(::setns(home.get(), CLONE_NEWNET) == 0, errno);
  PENSTOCK_TRY(status);
  void* const shared = ::mmap(nullptr, kMembersMax * sizeof(CutOff), PROT_READ | PROT_WRITE,
                              MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  if (shared == MAP_FAILED) return errno_status(errno, "map memory to share with the switch");
  network->cut_off_ = static_cast<CutOff*>(shared);  // all false: the kernel's zeros
  network->switch_ = ::fork();
  if (network->switch_ < 0) return errno_status(errno, "fork the switch");
  if (network->switch_ == 0) {
    ::prctl(PR_SET_PDEATHSIG, SIGKILL);
    Switch(std::move(devices), options, network->cut_off_).run();
  }
  return network;
}

ShapedNetwork::~ShapedNetwork() {
  if (cut_off_ != nullptr) ::munmap(cut_off_, kMembersMax * sizeof(CutOff));
  if (switch_ <= 0) return;
  ::kill(switch_, SIGKILL);
  while (::waitpid(switch_, nullptr, 0) < 0 && errno == EINTR) {
  }
}

void ShapedNetwork::set_cut_off(int32_t member, bool cut_off) {
  PENSTOCK_CHECK(member >= 0 && member < std::ssize(namespaces_), member);
  cut_off_[member] = cut_off;
}

Status ShapedNetwork::enter(int32_t member) const {
  PENSTOCK_CHECK(member >= 0 && member < std::ssize(namespaces_), member);
  if (::setns(namespaces_[static_cast<size_t>(member)].get(), CLONE_NEWNET) != 0) {
    return may_not(errno, fmt::format("enter the namespace of member {}", member));
  }
  // UCX finds its devices in /sys/class/net, which shows those of the namespace that mounted it.
  if (::unshare(CLONE_NEWNS) != 0) return may_not(errno, "make a mount namespace");
  PENSTOCK_TRY(make_mounts_private());
  if (::mount("sysfs", "/sys", "sysfs", MS_RDONLY, nullptr) != 0) {
    return may_not(errno, "mount /sys for a network namespace");
  }
  return {};
}

}  // namespace penstock
