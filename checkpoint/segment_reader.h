// Reads one segment file, trusting nothing in it: every field is bounded, every byte that is
// returned was verified against the footer's block sums first.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "checkpoint/segment.h"
#include "comm/base/file.h"

namespace penstock {

// A part of a segment that is not as it was written.
struct SegmentDamage {
  uint64_t begin = 0;  // range of the file
  uint64_t end = 0;
  std::vector<size_t> slices;  // indices of those with bytes in the range
  std::string what;            // "the checksum does not match"
};

// Told of every read of so many bytes; false: enough, stop reading.
using ReadPace = std::function<bool(uint64_t bytes)>;

// Constant after open; concurrent reads are safe. Errors are kDataLoss and name the file, the rank
// and, where bytes are damaged, the tensors and the byte range; kNotFound when the file is missing.
class SegmentReader {
 public:
  // Reads and checks header, trailer and footer, not the data. Refuses symbolic links and what is
  // not a file.
  static Result<SegmentReader> open(const Path& path);

  const Path& path() const { return path_; }
  const SegmentHeader& header() const { return header_; }
  const Digest& footer_digest() const { return footer_digest_; }
  uint64_t byte_count() const { return byte_count_; }
  // Ascending by file_offset.
  const std::vector<SegmentSlice>& slices() const { return footer_.slices; }
  // Index of the slice with this name and exactly this box; kDataLoss when there is none.
  Result<size_t> find(const std::string& name, const Box& box) const;

  uint64_t data_end() const { return footer_.data_end; }
  uint64_t block_count() const { return footer_.block_sums.size(); }
  // File range of one block. REQUIRES: index < block_count().
  uint64_t block_begin(uint64_t index) const;
  uint64_t block_end(uint64_t index) const;

  // A hint: these blocks are read soon, so the disk may begin.
  void will_need(uint64_t first, uint64_t last) const;
  // Reads blocks [first, last) into `into`, which has exactly their bytes, and verifies each.
  Status read_blocks(uint64_t first, uint64_t last, MutableBytes into) const;
  // The second half of that, for who read the bytes himself.
  Status verify_blocks(uint64_t first, uint64_t last, Bytes bytes) const;
  // The same file once more, opened with O_DIRECT; not valid() where that is refused.
  FileDescriptor open_direct() const;

  // Reads `region` of slice `index` into a buffer whose element 0 is destination_box.offset, with
  // these strides in elements (empty: dense). REQUIRES: the slice's box and destination_box contain
  // region.
  Status read_box(size_t index, const Box& region, const Box& destination_box, MutableBytes into,
                  std::span<const int64_t> strides = {}) const;

  // Reads everything: every block and every slice digest. Visits each damaged block, and each slice
  // whose digest alone is wrong, until the visitor says false, or `pace` does.
  void find_damage(const std::function<bool(const SegmentDamage&)>& visit,
                   const ReadPace& pace = {}) const;
  // The damage as an error that names the file, the rank and the tensors.
  Status describe(const SegmentDamage& damage) const;
  // The first damage found.
  Status verify() const;

 private:
  SegmentReader() = default;
  Status sort_by_name();
  Status bad(const std::string& what) const;
  // Damage of [begin, end), with the slices that have bytes there.
  SegmentDamage damage_in(uint64_t begin, uint64_t end, std::string what) const;
  bool block_is_whole(uint64_t index, Bytes bytes) const;

  Path path_;
  FileDescriptor file_;
  SegmentHeader header_;
  segment_format::Footer footer_;
  std::vector<uint32_t> by_name_;  // indices of slices, by name and box
  Digest footer_digest_;
  uint64_t byte_count_ = 0;
};

// Checks that a buffer of `bytes` bytes with these strides (empty: dense) holds destination_box.
Status check_destination(const TensorSlice& slice, std::span<const int64_t> strides,
                         uint64_t bytes);

}  // namespace penstock
