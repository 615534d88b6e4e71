#include "checkpoint/segment_writer.h"

#include <fmt/format.h>

#include <algorithm>
#include <set>

#include "checkpoint/slice_digest.h"
#include "checkpoint/store.h"

namespace penstock {
namespace {

constexpr uint64_t kStagingBytes = 4 << 20;
static_assert(kStagingBytes % kBlockBytes == 0, "a block never straddles two staging buffers");

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

// Copies data through one staging buffer. Digests and block sums are taken from the staged copy, so
// they describe exactly what is written.
class DataStream {
 public:
  DataStream(WritableFile& file, const Uuid& segment) : file_(file), segment_(segment) {
    buffer_.reserve(kStagingBytes);
  }

  // Zeros up to file position `offset`.
  Status pad_to(uint64_t offset) {
    while (position() < offset) {
      const uint64_t count =
          std::min<uint64_t>(offset - position(), kStagingBytes - buffer_.size());
      buffer_.resize(buffer_.size() + count);
      PENSTOCK_TRY(flush_when_full());
    }
    return {};
  }

  Result<Digest> append(const TensorSlice& slice, Bytes bytes) {
    SliceDigestStream digest(slice);
    while (!bytes.empty()) {
      const size_t count = std::min<size_t>(bytes.size(), kStagingBytes - buffer_.size());
      buffer_.insert(buffer_.end(), bytes.begin(), bytes.begin() + count);
      digest.update(Bytes(buffer_).last(count));
      bytes = bytes.subspan(count);
      PENSTOCK_TRY(flush_when_full());
    }
    return digest.finish();
  }

  Status flush() {
    if (buffer_.empty()) return {};
    for (size_t begin = 0; begin < buffer_.size(); begin += kBlockBytes) {
      const size_t count = std::min<size_t>(kBlockBytes, buffer_.size() - begin);
      sums_.push_back(block_sum(segment_, sums_.size(), Bytes(buffer_).subspan(begin, count)));
    }
    PENSTOCK_TRY(file_.write_at(flushed_, buffer_));
    flushed_ += buffer_.size();
    buffer_.clear();
    return {};
  }

  std::vector<uint32_t> take_sums() { return std::move(sums_); }

 private:
  uint64_t position() const { return flushed_ + buffer_.size(); }
  Status flush_when_full() { return buffer_.size() == kStagingBytes ? flush() : Status(); }

  WritableFile& file_;
  const Uuid segment_;
  std::vector<std::byte> buffer_;  // file bytes [flushed_, flushed_ + size)
  uint64_t flushed_ = kSegmentHeaderBytes;
  std::vector<uint32_t> sums_;
};

// Writes the planned file; fills in the plan's digests. Returns the digest of header and footer.
Result<Digest> write_file(WritableFile& file, const SegmentHeader& header,
                          std::span<const SliceSource> sources, Plan& plan, uint64_t file_bytes) {
  PENSTOCK_TRY(file.reserve(file_bytes));
  const std::vector<std::byte> header_bytes = segment_format::encode_header(header);
  PENSTOCK_TRY(file.write_at(0, header_bytes));

  DataStream data(file, header.segment);
  for (size_t i = 0; i < plan.order.size(); ++i) {
    PENSTOCK_TRY(data.pad_to(plan.slices[i].file_offset));
    PENSTOCK_TRY_ASSIGN(plan.slices[i].digest,
                        data.append(plan.slices[i].slice, sources[plan.order[i]].bytes));
  }
  PENSTOCK_TRY(data.pad_to(plan.data_end));
  PENSTOCK_TRY(data.flush());

  const std::vector<std::byte> footer = segment_format::encode_footer(
      header, {.data_end = plan.data_end, .slices = plan.slices, .block_sums = data.take_sums()});
  DigestStream digest;
  digest.update(header_bytes);
  digest.update(footer);
  for (uint64_t begin = 0; begin < footer.size(); begin += kStagingBytes) {
    const uint64_t count = std::min<uint64_t>(kStagingBytes, footer.size() - begin);
    PENSTOCK_TRY(file.write_at(plan.data_end + begin, Bytes(footer).subspan(begin, count)));
  }
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
                                     std::span<const SliceSource> sources, FileSystem& files) {
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
  const Result<Digest> digest = write_file(*file, header, sources, plan, file_bytes);
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

}  // namespace penstock
