// A file system that never answers, as a network file system whose server is gone.
#pragma once

#include <linux/fuse.h>
#include <poll.h>

#include <array>
#include <memory>

#include "tests/support/private_mounts.h"

namespace penstock {

// A FUSE mount whose server, this process, answers nothing but the greeting: whoever touches it
// waits until release().
class HungFileSystem {
 public:
  // REQUIRES: the process has one thread, the kernel has FUSE, and /dev/fuse may be opened.
  static std::unique_ptr<HungFileSystem> mount_at(const Path& where) {
    auto device = open_file("/dev/fuse", O_RDWR);
    PENSTOCK_CHECK(device.ok(), device.status().message());
    enter_private_mounts();
    std::filesystem::create_directories(where);
    const std::string options = fmt::format("fd={},rootmode=40000,user_id={},group_id={}",
                                            device->get(), geteuid(), getegid());
    PENSTOCK_CHECK(mount("penstock-hung", where.c_str(), "fuse", 0, options.c_str()) == 0, errno);
    greet(device->get());
    return std::unique_ptr<HungFileSystem>(new HungFileSystem(where, *std::move(device)));
  }
  ~HungFileSystem() {
    release();
    umount2(where_.c_str(), MNT_DETACH);
  }
  // Until somebody waits for an answer.
  void await_caller() const {
    pollfd request = {device_.get(), POLLIN, 0};
    PENSTOCK_CHECK(poll(&request, 1, -1) == 1, errno);
  }
  // The same, and takes the call on: who waits for it cannot even be killed any more.
  void take_call() const {
    await_caller();
    std::array<char, FUSE_MIN_READ_BUFFER> call;
    PENSTOCK_CHECK(::read(device_.get(), call.data(), call.size()) > 0, errno);
  }
  // Every call that waits, and every later one, fails.
  void release() { device_ = FileDescriptor(); }

 private:
  // Before it the kernel would not pass on what callers ask for, and nobody could tell that they
  // do.
  static void greet(int device) {
    struct {
      fuse_in_header header;
      fuse_init_in init;
    } request;
    std::array<char, FUSE_MIN_READ_BUFFER> bytes;
    const ssize_t count = ::read(device, bytes.data(), bytes.size());
    PENSTOCK_CHECK(count >= ssize_t{sizeof(request)}, errno);
    std::memcpy(&request, bytes.data(), sizeof(request));
    struct {
      fuse_out_header header;
      fuse_init_out init;
    } reply = {};
    reply.header = {.len = sizeof(reply), .error = 0, .unique = request.header.unique};
    reply.init.major = request.init.major;
    reply.init.minor = request.init.minor;
    reply.init.max_write = 4096;
    PENSTOCK_CHECK(::write(device, &reply, sizeof(reply)) == ssize_t{sizeof(reply)}, errno);
  }

  HungFileSystem(Path where, FileDescriptor device)
      : where_(std::move(where)), device_(std::move(device)) {}

  const Path where_;
  FileDescriptor device_;
};

}  // namespace penstock
