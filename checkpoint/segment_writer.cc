#include "checkpoint/segment_writer.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstring>
#include <set>

#include "checkpoint/slice_digest.h"
#include "checkpoint/store.h"

namespace penstock {
namespace {

// What is copied, digested and summed at a time: fits into a core's own cache.
constexpr uint64_t kPieceBytes = 256 << 10;
static_assert(kDiskBufferBytes % kPieceBytes == 0 && kPieceBytes % kBlockBytes == 0,
              "a block never straddles two pieces, nor a piece two buffers");

uint64_t align_up(uint64_t value, uint64_t alignment) {
  return (value + alignment - 1) / alignment * alignment;
}

// Where each source goes: large ones first, so that small ones pack into one tail.
struct Plan {
  std::vector<size_t> order;  // indices of sources, in file order
  std::vector<SegmentSlice> slices;
  uint64_t data_end = 0;
};

Result<Plan> plan_segment(std::span<const SliceSource> sources) {
  if (sources.size() > kSegmentSlicesMax) {
    return invalid_argument(fmt::format("{} slices for one segment, at most {} fit", sources.size(),
                                        kSegmentSlicesMax));
  }
  Plan plan;
  std::set<std::pair<std::string_view, std::string>> seen;
  for (size_t i = 0; i < sources.size(); ++i) {
    const TensorSlice& slice = sources[i].slice;
    PENSTOCK_TRY(check_slice(slice));
    if (sources[i].bytes.size() != byte_count(slice)) {
      return invalid_argument(fmt::format("tensor {}: box {} of {} takes {} bytes, {} were given",
                                          slice.name, to_string(slice.box), dtype_name(slice.dtype),
                                          byte_count(slice), sources[i].bytes.size()));
    }
    if (!seen.emplace(slice.name, to_string(slice.box)).second) {
      return invalid_argument(
          fmt::format("tensor {}: box {} is given twice", slice.name, to_string(slice.box)));
    }
    plan.order.push_back(i);
  }
  std::stable_partition(plan.order.begin(), plan.order.end(),
                        [&](size_t i) { return sources[i].bytes.size() >= kAlignedSliceBytesMin; });
  uint64_t position = kSegmentHeaderBytes;
  for (const size_t i : plan.order) {
    const uint64_t bytes = sources[i].bytes.size();
    position =
        align_up(position, bytes >= kAlignedSliceBytesMin ? kSliceAlignment : kSmallSliceAlignment);
    plan.slices.push_back(
        {.slice = sources[i].slice, .file_offset = position, .byte_count = bytes, .digest = {}});
    position += bytes;
  }
  plan.data_end = align_up(position, kSliceAlignment);
  return plan;
}

// Copies data through the buffers, one being filled while others are on their way to the disk.
// Digests and block sums are taken from the copy, piece by piece while it is in the cache, so they
// describe exactly what is written.
class DataStream {
 public:
  DataStream(WritableFile& file, const Uuid& segment, uint64_t data_end, const DiskBuffers& buffers)
      : file_(file), segment_(segment), buffers_(buffers) {
    sums_.reserve(segment_format::block_count(data_end, kBlockBytes));
  }

  // Zeros up to file position `offset`.
  Status pad_to(uint64_t offset) {
    while (position() < offset) {
      const MutableBytes piece = next_piece(offset - position());
      std::memset(piece.data(), 0, piece.size());
      PENSTOCK_TRY(filled(piece.size()));
    }
    return {};
  }

  Result<Digest> append(const TensorSlice& slice, Bytes bytes) {
    SliceDigestStream digest(slice);
    while (!bytes.empty()) {
      const MutableBytes piece = next_piece(bytes.size());
      std::memcpy(piece.data(), bytes.data(), piece.size());
      digest.update(piece);
      bytes = bytes.subspan(piece.size());
      PENSTOCK_TRY(filled(piece.size()));
    }
    return digest.finish();
  }

  // Starts the last write and waits for all of them. REQUIRES: position() is aligned.
  Status finish() {
    PENSTOCK_CHECK(position() % kDirectAlignment == 0, position());
    if (fill_ > 0) {
      sum_blocks(fill_);
      PENSTOCK_TRY(write_out());
    }
    while (under_way_ > 0) PENSTOCK_TRY(finish_oldest());
    return {};
  }

  std::vector<uint32_t> take_sums() { return std::move(sums_); }

 private:
  uint64_t position() const { return written_ + fill_; }
  MutableBytes buffer() const { return buffers_[next_buffer_]; }

  // Room for some of `wanted` bytes: to the end of a piece at most.
  MutableBytes next_piece(uint64_t wanted) const {
    const uint64_t room = kPieceBytes - fill_ % kPieceBytes;
    return buffer().subspan(fill_, std::min(wanted, room));
  }
  Status filled(uint64_t count) {
    fill_ += count;
    if (fill_ % kPieceBytes == 0) sum_blocks(fill_);
    return fill_ == kDiskBufferBytes ? write_out() : Status();
  }
  // Blocks of the buffer up to `end`; the last one of the data may be short.
  void sum_blocks(uint64_t end) {
    while (summed_ < end) {
      const uint64_t count = std::min<uint64_t>(kBlockBytes, end - summed_);
      sums_.push_back(block_sum(segment_, sums_.size(), buffer().subspan(summed_, count)));
      summed_ += count;
    }
  }
  Status write_out() {
    PENSTOCK_TRY(file_.start_write(written_, buffer().first(fill_)));
    ++under_way_;
    written_ += fill_;
    fill_ = 0;
    summed_ = 0;
    next_buffer_ = (next_buffer_ + 1) % buffers_.count();
    // The next buffer is that of the oldest write.
    return under_way_ == buffers_.count() ? finish_oldest() : Status();
  }
  Status finish_oldest() {
    PENSTOCK_TRY(file_.finish_write());
    --under_way_;
    return {};
  }

  WritableFile& file_;
  const Uuid segment_;
  const DiskBuffers& buffers_;
  size_t next_buffer_ = 0;                  // holds file bytes [written_, written_ + fill_)
  uint64_t written_ = kSegmentHeaderBytes;  // or on the way
  uint64_t fill_ = 0;
  uint64_t summed_ = 0;   // of the buffer's bytes
  size_t under_way_ = 0;  // writes; the buffers before next_buffer_
  std::vector<uint32_t> sums_;
};

// Writes the planned file; fills in the plan's digests. Returns the digest of header and footer.
Result<Digest> write_file(WritableFile& file, const SegmentHeader& header,
                          std::span<const SliceSource> sources, const DiskBuffers& buffers,
                          Plan& plan, uint64_t file_bytes) {
  PENSTOCK_TRY(file.reserve(file_bytes));
  const std::vector<std::byte> header_bytes = segment_format::encode_header(header);
  PENSTOCK_TRY(file.write_at(0, header_bytes));

  DataStream data(file, header.segment, plan.data_end, buffers);
  for (size_t i = 0; i < plan.order.size(); ++i) {
    PENSTOCK_TRY(data.pad_to(plan.slices[i].file_offset));
    PENSTOCK_TRY_ASSIGN(plan.slices[i].digest,
                        data.append(plan.slices[i].slice, sources[plan.order[i]].bytes));
  }
  PENSTOCK_TRY(data.pad_to(plan.data_end));
  PENSTOCK_TRY(data.finish());

  const std::vector<std::byte> footer = segment_format::encode_footer(
      header, {.data_end = plan.data_end, .slices = plan.slices, .block_sums = data.take_sums()});
  DigestStream digest;
  digest.update(header_bytes);
  digest.update(footer);
  PENSTOCK_TRY(file.write_at(plan.data_end, footer));
  PENSTOCK_TRY(file.write_at(plan.data_end + footer.size(),
                             segment_format::encode_trailer({.footer_offset = plan.data_end,
                                                             .footer_byte_count = footer.size(),
                                                             .file_byte_count = file_bytes,
                                                             .footer_digest = digest.finish(),
                                                             .format = header.format})));
  PENSTOCK_TRY(file.sync());
  PENSTOCK_TRY(file.close());
  return digest.finish();
}

}  // namespace

Result<SegmentSummary> write_segment(const Path& directory, const SegmentIdentity& identity,
                                     std::span<const SliceSource> sources,
                                     const DiskBuffers& buffers, FileSystem& files) {
  if (identity.rank.value < 0 || identity.step < 0) {
    return invalid_argument("a segment needs a rank and a step that are not negative");
  }
  PENSTOCK_TRY_ASSIGN(Plan plan, plan_segment(sources));
  SegmentHeader header{.segment = random_uuid(), .store = {}, .identity = identity};
  PENSTOCK_TRY_ASSIGN(header.store, store_uuid(directory, files));
  const uint64_t footer_bytes = segment_format::footer_bytes(
      plan.slices, segment_format::block_count(plan.data_end, header.block_bytes));
  if (footer_bytes > kFooterBytesMax) {
    return invalid_argument("one segment cannot hold so much: spread the slices over several");
  }
  const uint64_t file_bytes = plan.data_end + footer_bytes + kSegmentTrailerBytes;

  SegmentSummary summary{.file = segment_file_name(identity.epoch, identity.rank, header.segment),
                         .rank = identity.rank,
                         .byte_count = file_bytes,
                         .footer_digest = {},
                         .slices = {}};
  const Path path = directory / summary.file;
  PENSTOCK_TRY_ASSIGN(std::unique_ptr<WritableFile> file, files.create(path));
  const Result<Digest> digest = write_file(*file, header, sources, buffers, plan, file_bytes);
  const Status written = digest.ok() ? files.sync_directory(directory) : digest.status();
  if (!written.ok()) {
    // Best effort: what cannot be removed now, sweep_orphans() removes later.
    const Status removed = files.remove(path);
    return removed.ok() ? written : written.with_context("incomplete segment left behind");
  }
  summary.footer_digest = *digest;
  summary.slices = std::move(plan.slices);
  return summary;
}

Result<SegmentSummary> write_segment(const Path& directory, const SegmentIdentity& identity,
                                     std::span<const SliceSource> sources, FileSystem& files) {
  PENSTOCK_TRY_ASSIGN(const DiskBuffers buffers, DiskBuffers::make());
  return write_segment(directory, identity, sources, buffers, files);
}

}  // namespace penstock
