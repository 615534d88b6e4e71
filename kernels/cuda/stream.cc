#include "kernels/cuda/stream.h"

namespace penstock::cuda {

std::string Failure::to_string() const {
  return operation + ": " + cudaGetErrorString(error) + " (" + cudaGetErrorName(error) + ")";
}

Stream::Stream(int multiprocessors, bool high_priority) {
  int device = 0;
  note("device", cudaGetDevice(&device));
  note("device", cudaDeviceGetAttribute(&multiprocessors_, cudaDevAttrMultiProcessorCount, device));
  if (multiprocessors > 0 && multiprocessors < multiprocessors_) multiprocessors_ = multiprocessors;
  int least = 0;
  int greatest = 0;
  note("stream", cudaDeviceGetStreamPriorityRange(&least, &greatest));
  note("stream", cudaStreamCreateWithPriority(&stream_, cudaStreamNonBlocking,
                                              high_priority ? greatest : least));
}

Stream::~Stream() {
  if (stream_ != nullptr) cudaStreamDestroy(stream_);
}

void Stream::note(const char* operation, cudaError_t error) {
  if (error == cudaSuccess || failure_) return;
  failure_ = {operation, error};
}

const Failure* Stream::wait() {
  note("wait", cudaStreamSynchronize(stream_));
  return failure();
}

Event::Event() {
  cudaEventCreateWithFlags(&event_, cudaEventDisableTiming);
}

Event::~Event() {
  if (event_ != nullptr) cudaEventDestroy(event_);
}

void Event::record(Stream& stream) {
  stream.note("event", cudaEventRecord(event_, stream.get()));
}

void Event::make_wait(Stream& stream) const {
  stream.note("event", cudaStreamWaitEvent(stream.get(), event_));
}

bool Event::done() const {
  return cudaEventQuery(event_) == cudaSuccess;
}

}  // namespace penstock::cuda
