#include "checkpoint/block_reads.h"

#include "checkpoint/file_system.h"
#include "comm/base/check.h"

namespace penstock {
namespace {

constexpr int64_t kPlain = 0;  // result of what the ring has nothing to do with

}  // namespace

BlockReads::BlockReads(const SegmentReader& reader, MutableBytes memory, DiskRing* ring)
    : reader_(reader), memory_(memory), ring_(ring) {
  if (ring != nullptr) direct_ = reader.open_direct();
}

BlockReads::~BlockReads() {
  for (const Started& read : started_) {
    while (read.in_ring) wait_for_one();
  }
}

// Memory after that of the newest read, or at the beginning again; empty when there is too little.
MutableBytes BlockReads::room_for(uint64_t byte_count) const {
  if (started_.empty()) return memory_.first(byte_count);
  const auto used_begin = static_cast<uint64_t>(started_.front().into.data() - memory_.data());
  const MutableBytes newest = started_.back().into;
  const auto used_end = static_cast<uint64_t>(newest.data() + newest.size() - memory_.data());
  const uint64_t free_end = used_end > used_begin ? memory_.size() : used_begin;
  if (free_end - used_end >= byte_count) return memory_.subspan(used_end, byte_count);
  if (used_end > used_begin && used_begin >= byte_count) return memory_.first(byte_count);
  return {};
}

bool BlockReads::start(uint64_t first, uint64_t last, bool through_cache) {
  if (started_.size() == kStartedReadsMax) return false;
  const uint64_t byte_count = reader_.block_end(last - 1) - reader_.block_begin(first);
  Started read{.first = first, .last = last, .into = room_for(byte_count)};
  if (read.into.empty()) return false;
  read.in_ring = !through_cache && submit(read);
  if (!read.in_ring) reader_.will_need(first, last);
  started_.push_back(read);
  return true;
}

bool BlockReads::submit(const Started& read) {
  const uint64_t begin = reader_.block_begin(read.first);
  if (!direct_.valid() || (begin | read.into.size()) % kDirectAlignment != 0) return false;
  return ring_->submit_read(direct_.get(), begin, read.into, first_tag_ + started_.size()).ok();
}

void BlockReads::wait_for_one() {
  const DiskRing::Done done = ring_->wait();
  PENSTOCK_CHECK(done.tag - first_tag_ < started_.size(), done.tag, first_tag_);
  started_[done.tag - first_tag_].result = done.result;
  started_[done.tag - first_tag_].in_ring = false;
}

Result<Bytes> BlockReads::finish() {
  PENSTOCK_CHECK(!started_.empty(), reader_.path().string());
  while (started_.front().in_ring) wait_for_one();
  const Started read = started_.front();
  started_.pop_front();
  ++first_tag_;
  // What the ring did not read whole is read again the plain way, which takes every alignment and
  // says what is wrong with the disk; so is the rest.
  if (read.result == std::ssize(read.into)) {
    PENSTOCK_TRY(reader_.verify_blocks(read.first, read.last, read.into));
  } else {
    if (read.result != kPlain) direct_ = FileDescriptor();
    PENSTOCK_TRY(reader_.read_blocks(read.first, read.last, read.into));
  }
  return Bytes(read.into);
}

}  // namespace penstock
