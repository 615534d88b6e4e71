// A bump arena over its own anonymous mapping, for activations and scratch: taking memory is an
// addition, giving it back is setting the mark again. Nothing is constructed or destroyed in it.
//
//   const Arena::Mark mark = arena.mark();
//   float* scores = arena.floats(rows * width);
//   ...
//   arena.rewind(mark);  // everything taken since is void
//
// Thread-safety: one thread at a time.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace penstock {

class Arena {
 public:
  static constexpr int64_t kAlignmentBytes = 64;  // a cache line, and the widest vector

  struct Mark {
    int64_t used_bytes = 0;
  };

  // Maps `capacity_bytes`, zero-filled; pages become resident when first touched. `name` says in
  // errors which arena was too small. Out of address space is a failed check: arenas are sized at
  // load time.
  Arena(std::string name, int64_t capacity_bytes);
  ~Arena();
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;

  // `count` elements, 64-byte aligned, contents unspecified. Valid until a rewind to an earlier
  // mark. More than what is left is a failed check that names the bytes wanted and left.
  float* floats(int64_t count) { return static_cast<float*>(take(count, sizeof(float))); }
  int32_t* int32s(int64_t count) { return static_cast<int32_t*>(take(count, sizeof(int32_t))); }
  int64_t* int64s(int64_t count) { return static_cast<int64_t*>(take(count, sizeof(int64_t))); }
  double* doubles(int64_t count) { return static_cast<double*>(take(count, sizeof(double))); }
  void* bytes(int64_t count) { return take(count, 1); }

  Mark mark() const { return {used_bytes_}; }
  // REQUIRES: `mark` is not past what is taken now.
  void rewind(Mark mark);

  int64_t used_bytes() const { return used_bytes_; }
  int64_t peak_bytes() const { return peak_bytes_; }  // largest used_bytes() so far
  int64_t capacity_bytes() const { return capacity_bytes_; }

  // What take() adds for `count` elements: for computing a capacity.
  static int64_t rounded_bytes(int64_t count, int64_t element_bytes);

 private:
  void* take(int64_t count, int64_t element_bytes);

  std::string name_;
  std::byte* base_ = nullptr;  // owned mapping of capacity_bytes_
  int64_t capacity_bytes_ = 0;
  int64_t used_bytes_ = 0;
  int64_t peak_bytes_ = 0;
};

}  // namespace penstock
