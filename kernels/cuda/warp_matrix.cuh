// The tensor core as one warp uses it from sm_80 on, and copies to shared memory that run beside
// it. Every function is one instruction: PTX ISA 8, mma.m16n8k16, ldmatrix, cp.async. Device code.
//
// Who holds what, lane = 4 g + t (g = 0..7, t = 0..3), two bf16 to a word:
//   A, 16 x 16, rows by depth: a[0] (g, 2t..2t+1)  a[1] (g + 8, 2t..)
//                              a[2] (g, 2t + 8..)  a[3] (g + 8, 2t + 8..)
//   B, 16 x 8, depth by columns: b0 (2t..2t+1, g)  b1 (2t + 8.., g)
//   C, 16 x 8, fp32: c[0], c[1] (g, 2t..2t+1)      c[2], c[3] (g + 8, 2t..)
// So the words of two neighbouring C, rounded, are those of one A: rows stay with their lanes.
#pragma once

#include <cstdint>

namespace penstock::cuda {

__device__ inline uint32_t shared_address(const void* in_shared_memory) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(in_shared_memory));
}

// Four 8 x 8 matrices of bf16. Lanes 8 i .. 8 i + 7 point to the rows, 16 bytes each, of matrix i;
// words[i] of lane 4 g + t becomes elements (g, 2t..2t+1) of matrix i.
__device__ inline void load_matrices(uint32_t address, uint32_t (&words)[4]) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(address)
               : "memory");
}
// Likewise of their transposes: elements (2t..2t+1, g) of what lies in memory.
__device__ inline void load_matrices_transposed(uint32_t address, uint32_t (&words)[4]) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(address)
               : "memory");
}

// c += a * b.
__device__ inline void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                    uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Copies kBytes, 4 or 16 and aligned so, or writes as many zeros: then nothing is read.
template <int kBytes>
__device__ inline void copy_async(uint32_t to, const void* from, bool valid) {
  static_assert(kBytes == 4 || kBytes == 16);
  const int read = valid ? kBytes : 0;
  if constexpr (kBytes == 16) {  // .cg: past L1, where nobody would read it again
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(read)
                 : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(to), "l"(from), "r"(read)
                 : "memory");
  }
}
// Waits for all of this thread's copies; a barrier makes those of others visible.
__device__ inline void wait_for_copies() {
  asm volatile("cp.async.wait_all;" ::: "memory");
}

// The same number, of which the compiler knows nothing.
__device__ inline int opaque(int x) {
  asm volatile("" : "+r"(x));
  return x;
}

// 2^x, with 0 for what is below the normal numbers.
__device__ inline float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

}  // namespace penstock::cuda
