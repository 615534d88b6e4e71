// Proof that boxes tile a region: every element in exactly one box. The check that makes "all
// shards are there" a fact instead of a hope, at commit (boxes of every tensor) and at load (pieces
// of every destination).
#pragma once

#include <span>

#include "checkpoint/slice.h"

namespace penstock {

// Ok, or kDataLoss naming the first gap ("no slice holds [4:6, 0:4]") or overlap ("[0:4, 0:4] and
// [2:4, 0:4] overlap"). Boxes without elements are ignored. Splits along cut points between groups
// of boxes, so a grid of n boxes costs O(n log n); pinwheels and other shapes no straight cut
// separates fall back to slabs, and are refused beyond a fixed amount of work, so that a hostile
// file cannot stall its reader. REQUIRES: every box has region's dimensions and lies in region.
Status prove_tiling(const Box& region, std::span<const Box> boxes);

}  // namespace penstock
