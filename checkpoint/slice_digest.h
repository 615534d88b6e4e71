// The digest of a slice's elements, made so that digests of boxes add up: over any boxes that tile
// a tensor, however they cut it, the sum is the same. Two checkpoints of one state in different
// layouts are compared by their manifests alone.
//
//   digest word l = sum over positions p of  R[l][p / 1024] * K[l][p % 1024] * value[p]   mod 2^64
//
// p counts units of the whole tensor, row-major; a unit is an element, or half an element of eight
// bytes, as an unsigned number of at most 32 bits. K (32 random bits) and R (64, odd) come from
// Philox: docs/checkpoint-format.md has the exact words.
//
// Why different tensors differ: such sums are a multilinear universal hash (Carter and Wegman,
// "Universal classes of hash functions", 1979; Lemire and Kaser, "Strongly universal string hashing
// is fast", 2014), added up as in Bellare and Micciancio, "A new paradigm for collision-free
// hashing", EUROCRYPT 1997. For two tensors of one shape take a block of 1024 units in which they
// differ. At most one value of one unit's K makes the differences of that block cancel, and in
// general they are a multiple of 2^m for a share of at most 2^-(m-31) of the keys; a difference
// divisible by 2^m and no more then vanishes in the sum for at most one R in 2^(63-m). Over all m
// that is below 2^-27 a word, and the words have independent keys: 2^-54 for the worst difference
// there is (signs only). Keys are fixed, so this detects accidents, not attackers.
#pragma once

#include <cstdint>
#include <vector>

#include "checkpoint/slice.h"
#include "comm/base/hash.h"

namespace penstock {

// Digests of disjoint boxes of one tensor give the digest of their union.
Digest add_digests(const Digest& a, const Digest& b);

// One slice's digest from its bytes, fed in order. Single-threaded; allocates only when made.
class SliceDigestStream {
 public:
  // REQUIRES: check_slice(slice) is ok.
  explicit SliceDigestStream(const TensorSlice& slice);

  // The slice's next bytes. REQUIRES: whole elements, and no more than the slice has.
  void update(Bytes bytes);
  const Digest& finish() const { return digest_; }

 private:
  void begin_run();
  void add(uint64_t position, const std::byte* values, uint64_t count);

  uint64_t unit_bytes_ = 0;
  uint64_t run_units_ = 0;        // of every run: the box's longest contiguous ones
  std::vector<int64_t> strides_;  // in units, of the dimensions outside a run
  std::vector<int64_t> size_;     // likewise
  std::vector<int64_t> index_;    // of the current run
  uint64_t position_ = 0;         // of the next unit
  uint64_t first_position_ = 0;   // of the box
  uint64_t run_left_ = 0;
  uint64_t factors_block_ = UINT64_MAX;  // whose R is in factors_
  uint64_t factors_[2] = {0, 0};
  Digest digest_;
};

Digest slice_digest(const TensorSlice& slice, Bytes bytes);

}  // namespace penstock
