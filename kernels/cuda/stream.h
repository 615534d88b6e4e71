// A queue of work on one device, and what went wrong on it first.
//
// Operations are launched, not run: nothing that takes a Stream waits for the device. A failed
// launch is kept with the operation's name, and so is what the device finds later, under the
// operation at which it showed; the owner asks when it waits anyway.
//
// Thread-safety: one thread at a time per instance.
#pragma once

#include <cuda_runtime_api.h>

#include <optional>
#include <string>

namespace penstock::cuda {

struct Failure {
  std::string operation;
  cudaError_t error = cudaSuccess;
  // "rms_norm: an illegal memory access was encountered (cudaErrorIllegalAddress)"
  std::string to_string() const;
};

class Stream {
 public:
  // Of the current device. `multiprocessors`: how many kernels that fill the device may take; 0:
  // all. The rest is left to communication. `high_priority`: its blocks start before others.
  explicit Stream(int multiprocessors = 0, bool high_priority = false);
  ~Stream();
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;

  cudaStream_t get() const { return stream_; }
  int multiprocessors() const { return multiprocessors_; }

  // Keeps the first error; of cudaSuccess nothing.
  void note(const char* operation, cudaError_t error);

  // Waits until all is done that was launched. Null: nothing has failed.
  const Failure* wait();
  const Failure* failure() const { return failure_ ? &*failure_ : nullptr; }

 private:
  cudaStream_t stream_ = nullptr;
  int multiprocessors_ = 0;
  std::optional<Failure> failure_;
};

// A point in a stream that others can wait for. Carries no time.
class Event {
 public:
  Event();
  ~Event();
  Event(const Event&) = delete;
  Event& operator=(const Event&) = delete;

  // Completes with what was launched on `stream` so far.
  void record(Stream& stream);
  // What is launched on `stream` from now on waits for it, on the device. Before the first record()
  // there is nothing to wait for.
  void make_wait(Stream& stream) const;
  // Whether it has completed. Does not wait.
  bool done() const;
  cudaEvent_t get() const { return event_; }

 private:
  cudaEvent_t event_ = nullptr;
};

}  // namespace penstock::cuda
