// The memory of a rank's state: three generations behind a head that says which are whole
// (comm/run/held_state.h). Private to the process, or a file in memory that its daemon made and
// keeps when the rank is gone, so that the next one can go on from there.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>

#include "comm/base/file.h"
#include "comm/base/status.h"
#include "comm/run/held_state.h"

namespace penstock {

// Whole steps may be published by another thread than the one that calls the rest; not at once.
class StateMemory {
 public:
  // Takes and touches all memory now, so that a machine too small for it fails at the start. Every
  // generation is zero and none is whole, but for those found in `file`, when it holds state of the
  // same identity and size. `file`: empty, or one in memory, which this resizes; nobody else may
  // use it meanwhile. kResourceExhausted: there is not enough.
  static Result<StateMemory> make(const HeldStateIdentity& identity, uint64_t generation_bytes,
                                  const Path& file = {});
  ~StateMemory();
  StateMemory(StateMemory&& other) noexcept
      : base_(std::exchange(other.base_, nullptr)), generation_bytes_(other.generation_bytes_) {}
  StateMemory& operator=(StateMemory&&) = delete;

  std::byte* generation(size_t index) const {
    return base_ + kHeldStateHeadBytes + index * generation_bytes_;
  }
  uint64_t byte_count() const { return held_state_bytes(generation_bytes_); }

  // From now on the generation is not whole, wherever the process dies.
  void begin_writing(size_t index);
  // It is the whole state after `step`.
  void publish(size_t index, int64_t step);
  // -1: it is not whole.
  int64_t step_of(size_t index) const;
  // The generation of that step.
  std::optional<size_t> find(int64_t step) const;

 private:
  StateMemory(std::byte* base, uint64_t generation_bytes)
      : base_(base), generation_bytes_(generation_bytes) {}
  HeldStateHead& head() const { return *reinterpret_cast<HeldStateHead*>(base_); }

  std::byte* base_;  // owned mapping of byte_count()
  uint64_t generation_bytes_;
};

}  // namespace penstock
