// Hopper's own instructions as functions: barriers in shared memory, the copy engine, wgmma. Device
// code for sm_90a only.
#pragma once

#include <cuda.h>

#include <cstdint>

namespace penstock::cuda {

// ---- Barriers (mbarrier) ------------------------------------------------------------------------
// A barrier's phases are numbered from 0. A phase ends when as many threads as it was made for have
// arrived and all bytes that were announced are there. One waits for the parity of a phase: true
// once it has ended, which the phase "before the first", parity 1, has from the beginning.
__device__ inline void make_barrier(uint32_t barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
// After all were made, before all threads meet: the copy engine and the cluster see them, too.
__device__ inline void publish_barriers() {
  asm volatile(
      "fence.mbarrier_init.release.cluster;\n\t"
      "fence.proxy.async.shared::cta;" ::
          : "memory");
}
__device__ inline void arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
// At the barrier of the same address in block `rank` of the cluster. It says that products are done,
// which have read when wait_products() returns: ordinary stores before it are not yet seen there.
__device__ inline void arrive_in_block(uint32_t barrier, uint32_t rank) {
  asm volatile(
      "{\n\t"
      ".reg .b32 remote;\n\t"
      "mapa.shared::cluster.u32 remote, %0, %1;\n\t"
      "mbarrier.arrive.shared::cluster.b64 _, [remote];\n\t"
      "}" ::"r"(barrier),
      "r"(rank)
      : "memory");
}
__device__ inline void arrive_expecting(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}
__device__ inline bool ended(uint32_t barrier, uint32_t parity) {
  uint32_t done = 0;
  asm volatile(
      "{\n\t"
      ".reg .pred p;\n\t"
      "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n\t"
      "selp.u32 %0, 1, 0, p;\n\t"
      "}"
      : "=r"(done)
      : "r"(barrier), "r"(parity)
      : "memory");
  return done != 0;
}
__device__ inline void wait(uint32_t barrier, uint32_t parity) {
  while (!ended(barrier, parity)) {
  }
}

// ---- The copy engine (TMA) ----------------------------------------------------------------------
// The box at (x, y, z) of a tensor, x innermost; what is outside of the tensor comes as zeros. All
// the box's bytes are told to `barrier`, also those.
__device__ inline void copy_box(uint32_t to, const CUtensorMap& map, int x, int y, int z,
                                uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%2, %3, %4}], [%5];" ::"r"(to),
      "l"(&map), "r"(x), "r"(y), "r"(z), "r"(barrier)
      : "memory");
}
// Likewise, to the same place in every block of the cluster that has a bit in `blocks`, and told to
// the barrier of the same address there.
__device__ inline void copy_box_to(uint16_t blocks, uint32_t to, const CUtensorMap& map, int x,
                                   int y, int z, uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
      ".multicast::cluster [%0], [%1, {%2, %3, %4}], [%5], %6;" ::"r"(to),
      "l"(&map), "r"(x), "r"(y), "r"(z), "r"(barrier), "h"(blocks)
      : "memory");
}
__device__ inline void prefetch_map(const CUtensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}
// Ordinary stores of this thread to shared memory, before what wgmma or the copy engine does there
// after a barrier that orders this thread's.
__device__ inline void publish_stores() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// ---- Tensor cores (wgmma) -----------------------------------------------------------------------
// Before the first product of a batch: what this thread did to its sums is done.
__device__ inline void begin_products() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ inline void end_products() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
// Until all batches but the newest kPending are done.
template <int kPending>
__device__ inline void wait_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

#define PENSTOCK_SUMS_4(i) "+f"(d[i]), "+f"(d[(i) + 1]), "+f"(d[(i) + 2]), "+f"(d[(i) + 3])
#define PENSTOCK_SUMS_16(i) \
  PENSTOCK_SUMS_4(i), PENSTOCK_SUMS_4((i) + 4), PENSTOCK_SUMS_4((i) + 8), PENSTOCK_SUMS_4((i) + 12)

// d[64 x 256] (= or +=) A[64 x 16] B[16 x 256], from shared memory, for a warpgroup. kTranspose 1:
// the extent is inner, not the depth.
template <int kTransposeA, int kTransposeB>
__device__ inline void multiply_64x256(float (&d)[128], uint64_t a, uint64_t b, bool add) {
  asm volatile(
      "{\n\t"
      ".reg .pred p;\n\t"
      "setp.ne.b32 p, %130, 0;\n\t"
      "wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "
      "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "
      "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "
      "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, "
      "%108, %109, %110, %111, %112, %113, %114, %115, %116, %117, %118, %119, "
      "%120, %121, %122, %123, %124, %125, %126, %127}, "
      "%128, %129, p, 1, 1, %131, %132;\n\t"
      "}"
      : PENSTOCK_SUMS_16(0), PENSTOCK_SUMS_16(16), PENSTOCK_SUMS_16(32), PENSTOCK_SUMS_16(48),
        PENSTOCK_SUMS_16(64), PENSTOCK_SUMS_16(80), PENSTOCK_SUMS_16(96), PENSTOCK_SUMS_16(112)
      : "l"(a), "l"(b), "r"(static_cast<int>(add)), "n"(kTransposeA), "n"(kTransposeB));
}

#undef PENSTOCK_SUMS_16
#undef PENSTOCK_SUMS_4

// Threads that share a numbered barrier of the block; 0 is __syncthreads().
template <int kBarrier, int kThreads>
__device__ inline void sync_threads() {
  asm volatile("bar.sync %0, %1;" ::"n"(kBarrier), "n"(kThreads) : "memory");
}

// All threads of all blocks of the cluster; what they did before is seen behind it.
__device__ inline void sync_cluster() {
  asm volatile(
      "barrier.cluster.arrive.release;\n\t"
      "barrier.cluster.wait.acquire;" ::
          : "memory");
}

// How many registers each thread of this warpgroup may have from here on.
template <int kRegisters>
__device__ inline void give_up_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ inline void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

}  // namespace penstock::cuda
