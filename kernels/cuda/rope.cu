#include "kernels/cuda/rope.h"

#include "kernels/cuda/lanes.cuh"
#include "kernels/cuda/launch.cuh"

namespace penstock::cuda {
namespace {

constexpr int kThreads = 256;

// A thread turns the four pairs of a vector; neighbours have neighbouring vectors of a head.
template <typename T>
__global__ __launch_bounds__(kThreads) void rope_vectors(Rope<T> in) {
  const int64_t per_head = in.dim / kVector;
  const int64_t number = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (number >= in.tokens * in.heads * per_head) return;
  const int64_t vector = number % per_head;
  const int64_t head = number / per_head % in.heads;
  const int64_t token = number / per_head / in.heads;
  const int64_t angle = token % in.seq_length * (in.dim / 2) + vector * (kVector / 2);
  const float4 c = *reinterpret_cast<const float4*>(in.cosine + angle);
  const float4 s = *reinterpret_cast<const float4*>(in.sine + angle);
  const float cosine[4] = {c.x, c.y, c.z, c.w};
  const float sine[4] = {s.x, s.y, s.z, s.w};
  T* const at = in.x + token * in.token_stride + head * in.head_stride + vector * kVector;
  float x[kVector];
  load_floats(at, x);
#pragma unroll
  for (int pair = 0; pair < kVector / 2; ++pair) {
    const float turn = in.inverse ? -sine[pair] : sine[pair];
    const float a = x[2 * pair];
    const float b = x[2 * pair + 1];
    x[2 * pair] = a * cosine[pair] - b * turn;
    x[2 * pair + 1] = b * cosine[pair] + a * turn;
  }
  put(at, pack<T>(x));
}

}  // namespace

template <typename T>
void rope(Stream& stream, const Rope<T>& in) {
  const int64_t vectors = in.tokens * in.heads * (in.dim / kVector);
  if (vectors == 0) return;
  launch(stream, "rope", static_cast<unsigned>(ceil_div(vectors, kThreads)), kThreads, 0,
         rope_vectors<T>, in);
}

template void rope<Bf16>(Stream&, const Rope<Bf16>&);
template void rope<float>(Stream&, const Rope<float>&);

}  // namespace penstock::cuda
