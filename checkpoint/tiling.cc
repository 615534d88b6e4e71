#include "checkpoint/tiling.h"

#include <fmt/format.h>

#include <algorithm>

namespace penstock {
namespace {

// Box visits the proof may cost: a grid uses at most one per box for every pair of dimensions, and
// small irregular shapes get a fixed allowance. Keeps the time linear in the boxes, whatever a file
// holds.
constexpr int64_t kWorkPerBox = 2 * kTensorDimensionsMax * kTensorDimensionsMax;
constexpr int64_t kWorkAllowance = 1 << 20;
// Nested cuts; a grid needs one per dimension, a spiral one per box.
constexpr int kDepthMax = 512;

class TilingProof {
 public:
  explicit TilingProof(size_t box_count)
      : work_max_(kWorkPerBox * static_cast<int64_t>(box_count) + kWorkAllowance) {}

  // `boxes` lie in region and have elements; their order is changed.
  Status prove(const Box& region, std::span<Box> boxes, int depth = 0) {
    work_ += static_cast<int64_t>(boxes.size()) + 1;
    if (work_ > work_max_ || depth > kDepthMax) {
      return data_loss(
          fmt::format("the slices of {} are too irregular to check; save with a layout "
                      "that cuts tensors into grids",
                      to_string(region)));
    }
    if (boxes.empty()) return data_loss(fmt::format("no slice holds {}", to_string(region)));
    for (const Box& box : boxes) {
      if (box != region) continue;
      if (boxes.size() == 1) return {};
      const Box& other = &box == &boxes[0] ? boxes[1] : boxes[0];
      return data_loss(fmt::format("slices {} and {} overlap", to_string(box), to_string(other)));
    }
    for (size_t d = 0; d < region.size.size(); ++d) {
      bool divided = false;
      PENSTOCK_TRY(divide(region, boxes, d, depth, &divided));
      if (divided) return {};
    }
    return slabs(region, boxes, depth);
  }

 private:
  // Cuts the region wherever no box crosses dimension d, and proves each part. *divided stays false
  // when every cut is crossed by a box.
  Status divide(const Box& region, std::span<Box> boxes, size_t d, int depth, bool* divided) {
    std::sort(boxes.begin(), boxes.end(),
              [d](const Box& a, const Box& b) { return a.offset[d] < b.offset[d]; });
    work_ += static_cast<int64_t>(boxes.size());
    const int64_t region_end = region.offset[d] + region.size[d];
    size_t first = 0;
    int64_t begin = region.offset[d];
    while (begin < region_end) {
      int64_t end = first < boxes.size() ? boxes[first].offset[d] : region_end;
      size_t last = first;
      if (end == begin) {
        while (last < boxes.size() && (last == first || boxes[last].offset[d] < end)) {
          end = std::max(end, boxes[last].offset[d] + boxes[last].size[d]);
          ++last;
        }
      }
      if (begin == region.offset[d] && end == region_end && last == boxes.size()) return {};
      *divided = true;
      Box part = region;
      part.offset[d] = begin;
      part.size[d] = end - begin;
      PENSTOCK_TRY(prove(part, boxes.subspan(first, last - first), depth + 1));
      first = last;
      begin = end;
    }
    return {};
  }

  // The general case: cut at every box border of the dimension with the fewest, clipping the boxes.
  Status slabs(const Box& region, std::span<const Box> boxes, int depth) {
    size_t dimension = 0;
    std::vector<int64_t> cuts;
    for (size_t d = 0; d < region.size.size(); ++d) {
      std::vector<int64_t> borders;
      for (const Box& box : boxes) {
        borders.push_back(box.offset[d]);
        borders.push_back(box.offset[d] + box.size[d]);
      }
      std::sort(borders.begin(), borders.end());
      borders.erase(std::unique(borders.begin(), borders.end()), borders.end());
      if (borders.size() > 2 && (cuts.empty() || borders.size() < cuts.size())) {
        cuts = std::move(borders);
        dimension = d;
      }
    }
    // Every box spans the region in every dimension only if it equals it, and prove() looked for
    // that.
    PENSTOCK_CHECK(cuts.size() > 2, cuts.size());
    for (size_t i = 0; i + 1 < cuts.size(); ++i) {
      Box slab = region;
      slab.offset[dimension] = cuts[i];
      slab.size[dimension] = cuts[i + 1] - cuts[i];
      std::vector<Box> clipped;
      work_ += static_cast<int64_t>(boxes.size());
      for (const Box& box : boxes) {
        if (auto part = intersect(slab, box)) clipped.push_back(*std::move(part));
      }
      PENSTOCK_TRY(prove(slab, clipped, depth + 1));
    }
    return {};
  }

  const int64_t work_max_;
  int64_t work_ = 0;
};

}  // namespace

Status prove_tiling(const Box& region, std::span<const Box> boxes) {
  std::vector<Box> filled;
  for (const Box& box : boxes) {
    PENSTOCK_CHECK(contains(region, box), to_string(region), to_string(box));
    if (element_count(box) > 0) filled.push_back(box);
  }
  if (element_count(region) == 0) return {};
  return TilingProof(filled.size()).prove(region, filled);
}

}  // namespace penstock
