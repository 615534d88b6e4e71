#include "checkpoint/loader.h"

#include <fmt/format.h>

#include <algorithm>
#include <map>

#include "checkpoint/block_reads.h"
#include "checkpoint/disk_buffers.h"
#include "checkpoint/segment_reader.h"
#include "checkpoint/tiling.h"

namespace penstock {
namespace {

// No read goes beyond a window of this size, at fixed file positions.
constexpr uint64_t kWindowBytes = 1 << 20;
static_assert(kWindowBytes % kBlockBytesMax == 0, "blocks never straddle two windows");
static_assert(kReadBudgetBytes >= 2 * kWindowBytes, "one is verified while another is read");
// Collected copies that make it worth executing those whose windows are complete; bounds the memory
// of plans that cut tensors into single elements.
constexpr size_t kCopiesMax = 1 << 18;

// One intersection of a saved piece with a target.
struct Hit {
  const ManifestTensor* tensor = nullptr;
  const ManifestPiece* piece = nullptr;
  size_t target = 0;
  Box region;
};

// A contiguous copy from the file into a target, within one window.
struct Copy {
  uint64_t file_offset = 0;
  uint64_t byte_count = 0;
  std::byte* destination = nullptr;
  bool shared = false;
};

// Blocks [first, last) of one window, and the copies [copies_begin, copies_end) out of them.
struct Read {
  uint64_t first = 0;
  uint64_t last = 0;
  size_t copies_begin = 0;
  size_t copies_end = 0;
  bool shared = false;  // one of the copies is
};

// The pieces of one tensor, findable by box: sorted along the dimension with the most cut points.
class PieceFinder {
 public:
  explicit PieceFinder(const ManifestTensor& tensor) {
    size_t most_cuts = 0;
    for (size_t d = 0; d < tensor.shape.size(); ++d) {
      std::vector<int64_t> offsets;
      for (const ManifestPiece& piece : tensor.pieces) offsets.push_back(piece.box.offset[d]);
      std::sort(offsets.begin(), offsets.end());
      const size_t cuts = std::unique(offsets.begin(), offsets.end()) - offsets.begin();
      if (cuts > most_cuts) {
        most_cuts = cuts;
        dimension_ = d;
      }
    }
    for (const ManifestPiece& piece : tensor.pieces) {
      if (element_count(piece.box) > 0) pieces_.push_back(&piece);
    }
    if (tensor.shape.empty()) return;
    std::sort(pieces_.begin(), pieces_.end(), [this](const auto* a, const auto* b) {
      return a->box.offset[dimension_] < b->box.offset[dimension_];
    });
    for (const ManifestPiece* piece : pieces_) {
      size_max_ = std::max(size_max_, piece->box.size[dimension_]);
    }
  }

  template <typename Visit>
  void for_each_hit(const Box& box, const Visit& visit) const {
    auto first = pieces_.begin();
    if (!box.offset.empty()) {
      // No piece that starts this far below can reach the box.
      const int64_t below = box.offset[dimension_] - size_max_;
      first = std::partition_point(pieces_.begin(), pieces_.end(), [&](const auto* piece) {
        return piece->box.offset[dimension_] <= below;
      });
    }
    for (; first != pieces_.end(); ++first) {
      if (!box.offset.empty() &&
          (*first)->box.offset[dimension_] >= box.offset[dimension_] + box.size[dimension_]) {
        return;
      }
      if (auto region = intersect(box, (*first)->box)) visit(**first, *std::move(region));
    }
  }

 private:
  std::vector<const ManifestPiece*> pieces_;
  size_t dimension_ = 0;
  int64_t size_max_ = 0;
};

// Checks every target and finds its pieces; proves that they cover it. Result: hits by segment.
Result<std::map<size_t, std::vector<Hit>>> plan_hits(const Manifest& manifest,
                                                     std::span<const LoadTarget> targets) {
  std::map<size_t, std::vector<Hit>> by_segment;
  std::map<const ManifestTensor*, PieceFinder> finders;
  for (size_t t = 0; t < targets.size(); ++t) {
    const TensorSlice& slice = targets[t].slice;
    PENSTOCK_TRY(check_destination(slice, targets[t].strides, targets[t].bytes.size()));
    const ManifestTensor* tensor = manifest.find(slice.name);
    if (tensor == nullptr) {
      return not_found(
          fmt::format("the checkpoint of step {} has no tensor {}", manifest.step, slice.name));
    }
    if (tensor->dtype != slice.dtype || tensor->shape != slice.shape) {
      return invalid_argument(fmt::format(
          "tensor {}: the checkpoint of step {} holds {} {}, the model has {} {}", slice.name,
          manifest.step, dtype_name(tensor->dtype), to_string(Box{tensor->shape, tensor->shape}),
          dtype_name(slice.dtype), to_string(slice.box)));
    }
    std::vector<Box> regions;
    const PieceFinder& finder = finders.try_emplace(tensor, *tensor).first->second;
    finder.for_each_hit(slice.box, [&](const ManifestPiece& piece, Box region) {
      regions.push_back(region);
      by_segment[piece.segment].push_back({tensor, &piece, t, std::move(region)});
    });
    if (const Status covered = prove_tiling(slice.box, regions); !covered.ok()) {
      return covered.with_context(
          fmt::format("checkpoint of step {}: tensor {}", manifest.step, slice.name));
    }
  }
  return by_segment;
}

// Executes the hits of one segment, in file order.
class SegmentLoad {
 public:
  SegmentLoad(const SegmentReader& reader, std::span<const LoadTarget> targets, MutableBytes memory,
              DiskRing* ring, LoadReport& report)
      : reader_(reader), targets_(targets), report_(report), blocks_(reader, memory, ring) {}

  Status run(const std::vector<Hit>& hits) {
    std::vector<std::pair<size_t, const Hit*>> ordered;  // slices ascend with file offset
    for (const Hit& hit : hits) {
      PENSTOCK_TRY_ASSIGN(const size_t index, reader_.find(hit.tensor->name, hit.piece->box));
      const SegmentSlice& entry = reader_.slices()[index];
      if (entry.slice.dtype != hit.tensor->dtype || entry.slice.shape != hit.tensor->shape ||
          entry.digest != hit.piece->digest) {
        return data_loss(fmt::format("segment {}: tensor {} {} is not what the manifest says",
                                     reader_.path().string(), hit.tensor->name,
                                     to_string(hit.piece->box)));
      }
      ordered.emplace_back(index, &hit);
    }
    std::sort(ordered.begin(), ordered.end());
    for (size_t i = 0; i < ordered.size(); ++i) {
      const SegmentSlice& entry = reader_.slices()[ordered[i].first];
      PENSTOCK_TRY(add_copies(entry, *ordered[i].second));
      if (copies_.size() < kCopiesMax || i + 1 == ordered.size()) continue;
      // Windows that end before the next slice begins are complete.
      const uint64_t next = reader_.slices()[ordered[i + 1].first].file_offset;
      if (window_end(copies_.front().file_offset) <= next) PENSTOCK_TRY(execute(next));
    }
    return execute(UINT64_MAX);
  }

 private:
  Status add_copies(const SegmentSlice& entry, const Hit& hit) {
    const LoadTarget& target = targets_[hit.target];
    const Box& box = target.slice.box;
    const std::vector<int64_t> strides =
        target.strides.empty() ? dense_strides(box.size) : target.strides;
    const uint64_t element_bytes = dtype_bytes(entry.slice.dtype);
    for_each_run(hit.region, entry.slice.box, box, strides, [&](const Run& run) {
      Copy copy{.file_offset = entry.file_offset + run.source * element_bytes,
                .byte_count = 0,
                .destination = target.bytes.data() + run.destination * element_bytes,
                .shared = target.shared};
      uint64_t left = run.count * element_bytes;
      while (left > 0) {
        copy.byte_count = std::min(left, window_end(copy.file_offset) - copy.file_offset);
        copies_.push_back(copy);
        copy.file_offset += copy.byte_count;
        copy.destination += copy.byte_count;
        left -= copy.byte_count;
      }
    });
    return {};
  }

  static uint64_t window_begin(uint64_t offset) {
    return offset - (offset - kSegmentHeaderBytes) % kWindowBytes;
  }
  static uint64_t window_end(uint64_t offset) { return window_begin(offset) + kWindowBytes; }

  // Reads and copies what has been collected in windows that end at `until` or before. The others
  // wait for the slices that share their blocks, so that no block is read twice.
  Status execute(uint64_t until) {
    std::sort(copies_.begin(), copies_.end(),
              [](const Copy& a, const Copy& b) { return a.file_offset < b.file_offset; });
    const size_t copied = plan_reads(until);
    size_t started = 0;
    for (const Read& read : reads_) {
      // The disk reads what comes next while this is verified and copied.
      while (started < reads_.size() &&
             blocks_.start(reads_[started].first, reads_[started].last, reads_[started].shared)) {
        ++started;
      }
      PENSTOCK_TRY_ASSIGN(const Bytes blocks, blocks_.finish());
      copy_out(read, blocks);
    }
    copies_.erase(copies_.begin(), copies_.begin() + copied);
    return {};
  }

  // The blocks these copies need, neighbours in one read that ends with its window. Returns how
  // many copies that are.
  size_t plan_reads(uint64_t until) {
    reads_.clear();
    const auto block_of = [&](uint64_t offset) {
      return (offset - kSegmentHeaderBytes) / reader_.header().block_bytes;
    };
    size_t i = 0;
    while (i < copies_.size() && window_end(copies_[i].file_offset) <= until) {
      const uint64_t end = window_end(copies_[i].file_offset);
      Read read{.first = block_of(copies_[i].file_offset), .last = 0, .copies_begin = i};
      read.last = read.first;
      while (i < copies_.size() && copies_[i].file_offset < end &&
             block_of(copies_[i].file_offset) <= read.last) {
        const Copy& copy = copies_[i];
        read.last = std::max(read.last, block_of(copy.file_offset + copy.byte_count - 1) + 1);
        read.shared |= copy.shared;
        ++i;
      }
      read.copies_end = i;
      reads_.push_back(read);
    }
    return i;
  }

  void copy_out(const Read& read, Bytes blocks) {
    report_.bytes_read += blocks.size();
    report_.read_count += 1;
    const uint64_t begin = reader_.block_begin(read.first);
    for (size_t i = read.copies_begin; i < read.copies_end; ++i) {
      const Copy& copy = copies_[i];
      std::memcpy(copy.destination, blocks.data() + (copy.file_offset - begin), copy.byte_count);
      report_.bytes_loaded += copy.byte_count;
    }
  }

  const SegmentReader& reader_;
  const std::span<const LoadTarget> targets_;
  LoadReport& report_;
  BlockReads blocks_;
  std::vector<Copy> copies_;
  std::vector<Read> reads_;  // of the first copies
};

}  // namespace

Result<LoadReport> load_slices(const Path& directory, const Manifest& manifest,
                               std::span<const LoadTarget> targets, const DiskOptions& disk) {
  PENSTOCK_TRY_ASSIGN(const auto by_segment, plan_hits(manifest, targets));
  PENSTOCK_TRY_ASSIGN(const DiskBuffers buffers, DiskBuffers::make(kReadBudgetBytes));
  std::unique_ptr<DiskRing> ring;
  if (disk.direct) {
    if (auto made = disk.make_ring(kStartedReadsMax); made.ok()) ring = *std::move(made);
  }
  LoadReport report;
  for (const auto& [index, hits] : by_segment) {
    const ManifestSegment& segment = manifest.segments[index];
    const auto reader = SegmentReader::open(directory / segment.file);
    if (!reader.ok()) {
      return data_loss(fmt::format("rank {}, wanted for tensor {} {}: {}", segment.rank,
                                   hits.front().tensor->name, to_string(hits.front().piece->box),
                                   reader.status().message()));
    }
    if (reader->byte_count() != segment.byte_count ||
        reader->footer_digest() != segment.footer_digest) {
      return data_loss(
          fmt::format("segment {} (rank {}), wanted for tensor {}, is not the one that "
                      "was saved: its footer digest is {}, not {}",
                      reader->path().string(), segment.rank, hits.front().tensor->name,
                      to_hex(reader->footer_digest()), to_hex(segment.footer_digest)));
    }
    PENSTOCK_TRY(SegmentLoad(*reader, targets, buffers.memory(), ring.get(), report).run(hits));
    report.segment_count += 1;
  }
  return report;
}

}  // namespace penstock
