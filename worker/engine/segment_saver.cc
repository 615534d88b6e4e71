#include "worker/engine/segment_saver.h"

#include <cstring>

namespace penstock {
namespace {

DiskBuffers make_buffers() {
  Result<DiskBuffers> made = DiskBuffers::make();
  PENSTOCK_CHECK(made.ok(), made.status().to_string());
  made->touch();
  return *std::move(made);
}

}  // namespace

SegmentSaver::SegmentSaver(Path directory, SegmentIdentity identity,
                           std::span<const SliceSource> state, Done done, FileSystem& files)
    : directory_(std::move(directory)),
      identity_(identity),
      state_(state),
      done_(std::move(done)),
      files_(files),
      buffers_(make_buffers()) {
  uint64_t bytes = 0;
  for (const SliceSource& source : state) bytes += source.bytes.size();
  staging_.resize(bytes);  // zero-filled, hence touched
  uint64_t offset = 0;
  for (const SliceSource& source : state) {
    staged_.push_back({source.slice, Bytes(staging_).subspan(offset, source.bytes.size())});
    offset += source.bytes.size();
  }
  thread_ = std::thread([this] { run(); });
}

SegmentSaver::~SegmentSaver() {
  {
    const std::lock_guard lock(mutex_);
    stopping_ = true;
  }
  changed_.notify_all();
  thread_.join();
}

void SegmentSaver::wait() {
  std::unique_lock lock(mutex_);
  changed_.wait(lock, [this] { return !pending_; });
}

void SegmentSaver::save(int64_t step) {
  wait();
  step_ = step;
  std::byte* into = staging_.data();
  for (const SliceSource& source : state_) {
    if (source.bytes.empty()) continue;
    std::memcpy(into, source.bytes.data(), source.bytes.size());
    into += source.bytes.size();
  }
  {
    const std::lock_guard lock(mutex_);
    pending_ = true;
  }
  changed_.notify_all();
}

void SegmentSaver::run() {
  for (;;) {
    {
      std::unique_lock lock(mutex_);
      changed_.wait(lock, [this] { return pending_ || stopping_; });
      if (!pending_) return;
    }
    SegmentIdentity identity = identity_;
    identity.step = step_;
    done_(step_, write_segment(directory_, identity, staged_, buffers_, files_));
    {
      const std::lock_guard lock(mutex_);
      pending_ = false;
    }
    changed_.notify_all();
  }
}

}  // namespace penstock
