#include "checkpoint/disk_ring.h"

#include <fmt/format.h>
#include <liburing.h>

#include <cerrno>
#include <cstring>

#include "comm/base/check.h"

namespace penstock {
namespace {

class KernelRing : public DiskRing {
 public:
  ~KernelRing() override {
    PENSTOCK_CHECK(under_way_ == 0, under_way_);
    if (made_) ::io_uring_queue_exit(&ring_);
  }

  Status open(unsigned depth) {
    const int result = ::io_uring_queue_init(depth, &ring_, 0);
    if (result != 0) {
      return unavailable(fmt::format("no io_uring here: {}", std::strerror(-result)));
    }
    made_ = true;
    return {};
  }

  Status submit_write(int fd, uint64_t offset, Bytes bytes, uint64_t tag) override {
    return submit(tag, [&](io_uring_sqe* entry) {
      ::io_uring_prep_write(entry, fd, bytes.data(), static_cast<unsigned>(bytes.size()), offset);
    });
  }
  Status submit_read(int fd, uint64_t offset, MutableBytes into, uint64_t tag) override {
    return submit(tag, [&](io_uring_sqe* entry) {
      ::io_uring_prep_read(entry, fd, into.data(), static_cast<unsigned>(into.size()), offset);
    });
  }

  Done wait() override {
    for (;;) {
      io_uring_cqe* entry = nullptr;
      const int result = ::io_uring_wait_cqe(&ring_, &entry);
      if (result == -EINTR || result == -EAGAIN) continue;
      // Nobody could say when the memory may be used again.
      PENSTOCK_CHECK(result == 0, result);
      const Done done{::io_uring_cqe_get_data64(entry), entry->res};
      ::io_uring_cqe_seen(&ring_, entry);
      --under_way_;
      return done;
    }
  }

 private:
  template <typename Prepare>
  Status submit(uint64_t tag, const Prepare& prepare) {
    if (broken_) return unavailable("io_uring_submit failed before");
    io_uring_sqe* entry = ::io_uring_get_sqe(&ring_);
    PENSTOCK_CHECK(entry != nullptr, "more at a time than the ring was made for");
    prepare(entry);
    ::io_uring_sqe_set_data64(entry, tag);
    int result = 0;
    do {
      result = ::io_uring_submit(&ring_);
    } while (result == -EINTR);
    if (result != 1) {
      broken_ = true;  // the entry stays queued, and must never start
      return unavailable(fmt::format("io_uring_submit: {}", std::strerror(-result)));
    }
    ++under_way_;
    return {};
  }

  io_uring ring_ = {};
  bool made_ = false;
  bool broken_ = false;
  size_t under_way_ = 0;
};

}  // namespace

Result<std::unique_ptr<DiskRing>> make_disk_ring(unsigned depth) {
  auto ring = std::make_unique<KernelRing>();
  PENSTOCK_TRY(ring->open(depth));
  return std::unique_ptr<DiskRing>(std::move(ring));
}

}  // namespace penstock
