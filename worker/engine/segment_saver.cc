#include "worker/engine/segment_saver.h"

#include "comm/base/check.h"

namespace penstock {
namespace {

DiskBuffers make_buffers() {
  Result<DiskBuffers> made = DiskBuffers::make();
  PENSTOCK_CHECK(made.ok(), made.status().to_string());
  made->touch();
  return *std::move(made);
}

}  // namespace

SegmentSaver::SegmentSaver(Path directory, SegmentIdentity identity, Done done, FileSystem& files)
    : directory_(std::move(directory)),
      identity_(identity),
      done_(std::move(done)),
      files_(files),
      buffers_(make_buffers()) {
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

void SegmentSaver::save(int64_t step, std::span<const SliceSource> state) {
  {
    const std::lock_guard lock(mutex_);
    PENSTOCK_CHECK(!pending_, step, step_);
    step_ = step;
    state_ = state;
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
    done_(step_, write_segment(directory_, identity, state_, buffers_, files_));
    {
      const std::lock_guard lock(mutex_);
      pending_ = false;
    }
    changed_.notify_all();
  }
}

}  // namespace penstock
