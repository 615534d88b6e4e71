#include "checkpoint/segment_reader.h"

#include <fcntl.h>
#include <fmt/format.h>

#include <algorithm>
#include <numeric>
#include <tuple>

#include "checkpoint/slice_digest.h"

namespace penstock {
namespace {

constexpr uint64_t kReadBytesMax = 4 << 20;
constexpr std::string_view kWrongSum = "the checksum does not match";

// Compares the digests of slices with their bytes while a segment's data goes by.
class SliceCheck {
 public:
  SliceCheck(uint32_t format, const std::vector<SegmentSlice>& slices)
      : format_(format), slices_(slices), skipped_(slices.size(), false) {}

  // Its damage is known already.
  void skip(size_t slice) { skipped_[slice] = true; }

  // The file's bytes from `begin` on. Returns the slices that end there with a wrong digest.
  std::vector<size_t> add(uint64_t begin, Bytes bytes) {
    std::vector<size_t> wrong;
    const uint64_t end = begin + bytes.size();
    for (; slice_ < slices_.size() && slices_[slice_].file_offset < end; ++slice_) {
      const SegmentSlice& entry = slices_[slice_];
      const uint64_t from = std::max(begin, entry.file_offset);
      const uint64_t to = std::min(end, entry.file_offset + entry.byte_count);
      update(entry, bytes.subspan(from - begin, to - from));
      if (to < entry.file_offset + entry.byte_count) return wrong;  // goes on in the next bytes
      if (finish() != entry.digest && !skipped_[slice_]) wrong.push_back(slice_);
    }
    return wrong;
  }

 private:
  void update(const SegmentSlice& entry, Bytes bytes) {
    if (format_ == 1) {
      if (!content_) content_ = std::make_unique<DigestStream>();
      content_->update(bytes);
    } else {
      if (!positional_) positional_.emplace(entry.slice);
      positional_->update(bytes);
    }
  }
  Digest finish() {
    const Digest digest = format_ == 1 ? content_->finish() : positional_->finish();
    content_.reset();
    positional_.reset();
    return digest;
  }

  const uint32_t format_;
  const std::vector<SegmentSlice>& slices_;
  std::vector<bool> skipped_;
  size_t slice_ = 0;                             // the one whose bytes come next
  std::unique_ptr<DigestStream> content_;        // its digest so far, in format 1
  std::optional<SliceDigestStream> positional_;  // in later ones
};

}  // namespace

Status SegmentReader::bad(const std::string& what) const {
  return data_loss(fmt::format("segment {} (rank {}, step {}): {}", path_.string(),
                               header_.identity.rank, header_.identity.step, what));
}

Result<SegmentReader> SegmentReader::open(const Path& path) {
  SegmentReader reader;
  reader.path_ = path;
  PENSTOCK_TRY_ASSIGN(reader.file_, open_plain_file(path, &reader.byte_count_));
  const std::string context = "segment " + path.string();
  if (reader.byte_count_ < kSegmentHeaderBytes + kSegmentTrailerBytes) {
    return data_loss(fmt::format("{}: truncated to {} bytes", context, reader.byte_count_));
  }
  std::vector<std::byte> header(kSegmentHeaderBytes);
  PENSTOCK_TRY(read_at(reader.file_.get(), path, 0, header));
  auto decoded_header = segment_format::decode_header(header);
  if (!decoded_header.ok()) return decoded_header.status().with_context(context);
  reader.header_ = *decoded_header;

  std::vector<std::byte> end(kSegmentTrailerBytes);
  const uint64_t trailer_offset = reader.byte_count_ - kSegmentTrailerBytes;
  PENSTOCK_TRY(read_at(reader.file_.get(), path, trailer_offset, end));
  auto trailer = segment_format::decode_trailer(end);
  if (!trailer.ok()) return reader.bad(trailer.status().message());
  if (trailer->format != reader.header_.format) {
    return reader.bad("its header and trailer are of different formats");
  }
  if (trailer->file_byte_count != reader.byte_count_) {
    return reader.bad(fmt::format("it has {} bytes, but {} were written", reader.byte_count_,
                                  trailer->file_byte_count));
  }
  if (trailer->footer_offset < kSegmentHeaderBytes || trailer->footer_offset > trailer_offset ||
      trailer->footer_byte_count != trailer_offset - trailer->footer_offset ||
      trailer->footer_byte_count > kFooterBytesMax) {
    return reader.bad("its trailer places the footer outside the file");
  }
  std::vector<std::byte> footer(trailer->footer_byte_count);
  PENSTOCK_TRY(read_at(reader.file_.get(), path, trailer->footer_offset, footer));
  DigestStream digest;
  digest.update(header);
  digest.update(footer);
  reader.footer_digest_ = digest.finish();
  if (reader.footer_digest_ != trailer->footer_digest) {
    return reader.bad(
        fmt::format("its footer is damaged (bytes {} to {}): the digest does not match",
                    trailer->footer_offset, trailer_offset));
  }
  auto decoded_footer = segment_format::decode_footer(reader.header_, footer);
  if (!decoded_footer.ok()) return reader.bad(decoded_footer.status().message());
  reader.footer_ = *std::move(decoded_footer);
  if (reader.footer_.data_end != trailer->footer_offset) {
    return reader.bad("its footer does not follow its data");
  }
  PENSTOCK_TRY(reader.sort_by_name());
  return reader;
}

Status SegmentReader::sort_by_name() {
  const auto key = [this](uint32_t i) {
    const TensorSlice& slice = footer_.slices[i].slice;
    return std::tie(slice.name, slice.box.offset, slice.box.size);
  };
  by_name_.resize(footer_.slices.size());
  std::iota(by_name_.begin(), by_name_.end(), 0);
  std::sort(by_name_.begin(), by_name_.end(),
            [&](uint32_t a, uint32_t b) { return key(a) < key(b); });
  for (size_t i = 1; i < by_name_.size(); ++i) {
    if (key(by_name_[i - 1]) == key(by_name_[i])) {
      return bad("it holds tensor " + footer_.slices[by_name_[i]].slice.name + " twice");
    }
  }
  return {};
}

Result<size_t> SegmentReader::find(const std::string& name, const Box& box) const {
  const auto found = std::partition_point(by_name_.begin(), by_name_.end(), [&](uint32_t i) {
    const TensorSlice& slice = footer_.slices[i].slice;
    return std::tie(slice.name, slice.box.offset, slice.box.size) <
           std::tie(name, box.offset, box.size);
  });
  if (found != by_name_.end()) {
    const TensorSlice& slice = footer_.slices[*found].slice;
    if (slice.name == name && slice.box == box) return size_t{*found};
  }
  return bad(fmt::format("it does not hold tensor {} {}", name, to_string(box)));
}

uint64_t SegmentReader::block_begin(uint64_t index) const {
  return kSegmentHeaderBytes + index * header_.block_bytes;
}

uint64_t SegmentReader::block_end(uint64_t index) const {
  return std::min(block_begin(index) + header_.block_bytes, footer_.data_end);
}

SegmentDamage SegmentReader::damage_in(uint64_t begin, uint64_t end, std::string what) const {
  SegmentDamage damage{.begin = begin, .end = end, .slices = {}, .what = std::move(what)};
  const auto& slices = footer_.slices;  // ascending and disjoint
  auto at = std::partition_point(slices.begin(), slices.end(), [&](const SegmentSlice& entry) {
    return entry.file_offset + entry.byte_count <= begin;
  });
  for (; at != slices.end() && at->file_offset < end; ++at) {
    if (at->byte_count > 0) damage.slices.push_back(static_cast<size_t>(at - slices.begin()));
  }
  return damage;
}

Status SegmentReader::describe(const SegmentDamage& damage) const {
  constexpr size_t kNamed = 3;
  std::string names;
  for (size_t i = 0; i < std::min(damage.slices.size(), kNamed); ++i) {
    const TensorSlice& slice = footer_.slices[damage.slices[i]].slice;
    names +=
        fmt::format("{}tensor {} {}", names.empty() ? "" : ", ", slice.name, to_string(slice.box));
  }
  if (damage.slices.size() > kNamed) names += ", …";
  return bad(fmt::format("bytes {} to {} are damaged ({}): {}", damage.begin, damage.end,
                         names.empty() ? "padding" : names, damage.what));
}

bool SegmentReader::block_is_whole(uint64_t index, Bytes bytes) const {
  return block_sum(header_.segment, index, bytes) == footer_.block_sums[index];
}

void SegmentReader::will_need(uint64_t first, uint64_t last) const {
  PENSTOCK_CHECK(first < last && last <= block_count(), first, last, block_count());
  ::posix_fadvise(file_.get(), static_cast<off_t>(block_begin(first)),
                  static_cast<off_t>(block_end(last - 1) - block_begin(first)),
                  POSIX_FADV_WILLNEED);
}

Status SegmentReader::read_blocks(uint64_t first, uint64_t last, MutableBytes into) const {
  PENSTOCK_CHECK(first < last && last <= block_count(), first, last, block_count());
  PENSTOCK_CHECK(into.size() == block_end(last - 1) - block_begin(first), into.size());
  PENSTOCK_TRY(read_at(file_.get(), path_, block_begin(first), into));
  return verify_blocks(first, last, into);
}

Status SegmentReader::verify_blocks(uint64_t first, uint64_t last, Bytes bytes) const {
  for (uint64_t i = first; i < last; ++i) {
    const uint64_t begin = block_begin(i);
    const uint64_t end = block_end(i);
    if (!block_is_whole(i, bytes.subspan(begin - block_begin(first), end - begin))) {
      return describe(damage_in(begin, end, std::string(kWrongSum)));
    }
  }
  return {};
}

FileDescriptor SegmentReader::open_direct() const {
  // By descriptor, not by name: the name may stand for another file by now.
  const std::string self = fmt::format("/proc/self/fd/{}", file_.get());
  return FileDescriptor(::open(self.c_str(), O_RDONLY | O_DIRECT | O_CLOEXEC));
}

Status SegmentReader::read_box(size_t index, const Box& region, const Box& destination_box,
                               MutableBytes into, std::span<const int64_t> strides) const {
  PENSTOCK_CHECK(index < footer_.slices.size(), index);
  const SegmentSlice& entry = footer_.slices[index];
  TensorSlice destination = entry.slice;
  destination.box = destination_box;
  PENSTOCK_TRY(check_destination(destination, strides, into.size()));
  const std::vector<int64_t> dense = dense_strides(destination_box.size);
  if (strides.empty()) strides = dense;

  const uint64_t element_bytes = dtype_bytes(entry.slice.dtype);
  std::vector<std::byte> buffer;
  uint64_t buffer_begin = 0;  // file range the buffer holds
  uint64_t buffer_end = 0;
  Status status;
  for_each_run(region, entry.slice.box, destination_box, strides, [&](const Run& run) {
    uint64_t source = entry.file_offset + run.source * element_bytes;
    const uint64_t source_end = source + run.count * element_bytes;
    std::byte* target = into.data() + run.destination * element_bytes;
    while (status.ok() && source < source_end) {
      if (source < buffer_begin || source >= buffer_end) {
        const uint64_t first = (source - kSegmentHeaderBytes) / header_.block_bytes;
        const uint64_t wanted =
            (source_end - kSegmentHeaderBytes + header_.block_bytes - 1) / header_.block_bytes;
        const uint64_t last = std::min(wanted, first + kReadBytesMax / header_.block_bytes);
        buffer.resize(block_end(last - 1) - block_begin(first));
        status = read_blocks(first, last, buffer);
        buffer_begin = block_begin(first);
        buffer_end = block_end(last - 1);
        if (!status.ok()) return;
      }
      const uint64_t count = std::min(source_end, buffer_end) - source;
      std::memcpy(target, buffer.data() + (source - buffer_begin), count);
      source += count;
      target += count;
    }
  });
  return status;
}

void SegmentReader::find_damage(const std::function<bool(const SegmentDamage&)>& visit,
                                const ReadPace& pace) const {
  std::vector<std::byte> buffer;
  const uint64_t blocks_per_read = std::max<uint64_t>(1, kReadBytesMax / header_.block_bytes);
  SliceCheck check(header_.format, footer_.slices);
  const auto report = [&](const SegmentDamage& damage) {
    for (const size_t slice : damage.slices) check.skip(slice);
    return visit(damage);
  };
  for (uint64_t first = 0; first < block_count(); first += blocks_per_read) {
    const uint64_t last = std::min(block_count(), first + blocks_per_read);
    const uint64_t begin = block_begin(first);
    const uint64_t end = block_end(last - 1);
    buffer.resize(end - begin);
    if (pace && !pace(buffer.size())) return;
    const Status read = read_at(file_.get(), path_, begin, buffer);
    if (!read.ok()) {
      std::fill(buffer.begin(), buffer.end(), std::byte{0});
      if (!report(damage_in(begin, end, read.message()))) return;
    }
    for (uint64_t i = first; read.ok() && i < last; ++i) {
      const uint64_t at = block_begin(i);
      if (block_is_whole(i, Bytes(buffer).subspan(at - begin, block_end(i) - at))) continue;
      if (!report(damage_in(at, block_end(i), std::string(kWrongSum)))) return;
    }
    for (const size_t slice : check.add(begin, buffer)) {
      const SegmentSlice& entry = footer_.slices[slice];
      if (!report({.begin = entry.file_offset,
                   .end = entry.file_offset + entry.byte_count,
                   .slices = {slice},
                   .what = "the digest does not match"})) {
        return;
      }
    }
  }
}

Status SegmentReader::verify() const {
  Status first;
  find_damage([&](const SegmentDamage& damage) {
    first = describe(damage);
    return false;
  });
  return first;
}

Status check_destination(const TensorSlice& slice, std::span<const int64_t> strides,
                         uint64_t bytes) {
  PENSTOCK_TRY(check_slice(slice));
  const auto& size = slice.box.size;
  if (!strides.empty() && strides.size() != size.size()) {
    return invalid_argument(fmt::format("tensor {}: {} strides for {} dimensions", slice.name,
                                        strides.size(), size.size()));
  }
  if (element_count(slice.box) == 0) return {};
  std::vector<std::pair<int64_t, int64_t>> steps;  // stride and size of dimensions that move
  for (size_t d = 0; d < strides.size(); ++d) {
    if (size[d] > 1) steps.emplace_back(strides[d], size[d]);
  }
  std::sort(steps.begin(), steps.end());
  __int128 span = strides.empty() ? element_count(slice.box) : 1;  // elements the buffer must have
  for (const auto& [stride, count] : steps) {
    if (stride < span) {
      return invalid_argument(
          fmt::format("tensor {}: with these strides two elements of {} would share memory",
                      slice.name, to_string(slice.box)));
    }
    span += static_cast<__int128>(stride) * (count - 1);
  }
  if (span * static_cast<__int128>(dtype_bytes(slice.dtype)) > static_cast<__int128>(bytes)) {
    return invalid_argument(fmt::format("tensor {}: {} does not fit into {} bytes", slice.name,
                                        to_string(slice.box), bytes));
  }
  return {};
}

}  // namespace penstock
