#include "kernels/bench/matmul_bench.h"

#if PENSTOCK_BENCH_OPENBLAS
#include <cblas.h>
#endif
#if PENSTOCK_BENCH_ONEDNN
#include <dnnl.h>
#include <omp.h>
#endif
#if PENSTOCK_BENCH_LIBXSMM
#include <libxsmm.h>
#endif
#include <fmt/format.h>

#include <cstdio>
#include <memory>

#include "comm/base/random.h"
#include "kernels/arena.h"
#include "kernels/bench/measure.h"
#include "kernels/cpu/cpu_kernels.h"

namespace penstock::bench {
namespace {

struct Shape {
  const char* name;
  int64_t m, n, k;
  char transpose_a, transpose_b;
};

// d: model width; rows: tokens of a micro-batch, or of one expert.
constexpr Shape kShapes[] = {
    {"square", 256, 256, 256, 'N', 'T'},
    {"d256 projection", 1024, 768, 256, 'N', 'T'},
    {"d256 down", 1024, 256, 1024, 'N', 'T'},
    {"d256 input gradient", 1024, 256, 768, 'N', 'N'},
    {"d256 weight gradient", 1024, 256, 1024, 'T', 'N'},
    {"d128 projection", 256, 384, 128, 'N', 'T'},
    {"d128 weight gradient", 128, 384, 512, 'T', 'N'},
    {"expert 256 rows", 256, 512, 256, 'N', 'T'},
    {"expert 128 rows", 128, 512, 256, 'N', 'T'},
    {"expert 32 rows", 32, 512, 256, 'N', 'T'},
    {"expert 8 rows", 8, 512, 256, 'N', 'T'},
    {"expert d128 32 rows", 32, 256, 128, 'N', 'T'},
    {"expert d128 8 rows", 8, 256, 128, 'N', 'T'},
    {"expert input gradient 32", 32, 128, 256, 'N', 'N'},
    {"expert weight gradient 128", 512, 256, 128, 'T', 'N'},
    {"expert weight gradient 32", 512, 256, 32, 'T', 'N'},
    {"expert weight gradient 8", 512, 256, 8, 'T', 'N'},
    {"attention scores", 64, 256, 48, 'N', 'T'},
    {"attention values", 64, 32, 256, 'N', 'N'},
    {"attention key gradient", 256, 48, 64, 'T', 'N'},
    {"router", 512, 64, 256, 'N', 'T'},
    {"head, bytes", 1024, 259, 128, 'N', 'T'},
    {"head, 8192", 512, 8192, 256, 'N', 'T'},
};

// One product's operands, and each library's call for it.
struct Operands {
  Operands(const Shape& shape, Arena& arena)
      : s(shape),
        a(arena.floats(s.m * s.k)),
        b(arena.floats(s.n * s.k)),
        c(arena.floats(s.m * s.n)),
        a_stride(s.transpose_a == 'T' ? s.m : s.k),
        b_stride(s.transpose_b == 'T' ? s.k : s.n) {
    Random random(7, 0);  // never zeros: processors run those faster
    for (int64_t i = 0; i < s.m * s.k; ++i) a[i] = static_cast<float>(random.normal());
    for (int64_t i = 0; i < s.n * s.k; ++i) b[i] = static_cast<float>(random.normal());
  }

  void run_ours(Kernels& kernels) const {
    kernels.matmul(s.m, s.n, s.k, {a, a_stride},
                   s.transpose_a == 'T' ? Transpose::kYes : Transpose::kNo, {b, b_stride},
                   s.transpose_b == 'T' ? Transpose::kYes : Transpose::kNo, Store::kOverwrite,
                   {c, s.n});
  }
#if PENSTOCK_BENCH_OPENBLAS
  void run_openblas() const {
    const auto flag = [](char t) { return t == 'T' ? CblasTrans : CblasNoTrans; };
    const auto size = [](int64_t n) { return static_cast<blasint>(n); };
    cblas_sgemm(CblasRowMajor, flag(s.transpose_a), flag(s.transpose_b), size(s.m), size(s.n),
                size(s.k), 1.0F, a, size(a_stride), b, size(b_stride), 0.0F, c, size(s.n));
  }
#endif
#if PENSTOCK_BENCH_ONEDNN
  void run_onednn() const {
    dnnl_sgemm(s.transpose_a, s.transpose_b, s.m, s.n, s.k, 1.0F, a, a_stride, b, b_stride, 0.0F, c,
               s.n);
  }
#endif
#if PENSTOCK_BENCH_LIBXSMM
  // Column-major library: the transposed product with the operands exchanged.
  void run_libxsmm() const {
    const auto size = [](int64_t n) { return static_cast<libxsmm_blasint>(n); };
    const libxsmm_blasint m = size(s.n), n = size(s.m), k = size(s.k);
    const libxsmm_blasint lda = size(b_stride), ldb = size(a_stride), ldc = size(s.n);
    const float one = 1.0F;
    const float zero = 0.0F;
    libxsmm_sgemm(&s.transpose_b, &s.transpose_a, &m, &n, &k, &one, b, &lda, a, &ldb, &zero, c,
                  &ldc);
  }
#endif

  Shape s;
  float* a;
  float* b;
  float* c;
  int64_t a_stride;
  int64_t b_stride;
};

std::vector<Candidate> candidates_of(const Operands& operands, Kernels& kernels) {
  std::vector<Candidate> list = {{"penstock", [&] { operands.run_ours(kernels); }}};
#if PENSTOCK_BENCH_OPENBLAS
  list.push_back({"openblas", [&] { operands.run_openblas(); }});
#endif
#if PENSTOCK_BENCH_ONEDNN
  list.push_back({"onednn", [&] { operands.run_onednn(); }});
#endif
#if PENSTOCK_BENCH_LIBXSMM
  list.push_back({"libxsmm", [&] { operands.run_libxsmm(); }});
#endif
  return list;
}

}  // namespace

void run_matmul_bench(int round_count) {
#if PENSTOCK_BENCH_OPENBLAS
  openblas_set_num_threads(1);
#endif
#if PENSTOCK_BENCH_ONEDNN
  omp_set_num_threads(1);
#endif
  Arena arena("matmul bench", 64 << 20);
  const auto kernels = make_cpu_kernels();
  fmt::print("matrix products, one thread; GFLOP/s, and penstock's speed over the library's\n");
  fmt::print("{:<28}{:>16} op {:>7} {:>6}", "shape", "m x n x k", "peak", "of it");
  bool first = true;
  for (const Shape& shape : kShapes) {
    const Arena::Mark mark = arena.mark();
    const Operands operands(shape, arena);
    const std::vector<Candidate> candidates = candidates_of(operands, *kernels);
    if (first) {
      for (const Candidate& candidate : candidates) fmt::print(" {:>15}", candidate.name);
      fmt::print("\n");
      first = false;
    }
    const double peak = peak_gflops();
    const std::vector<Measured> measured = alternate(candidates, round_count, 0.002);
    const double work = 2e-9 * static_cast<double>(shape.m * shape.n * shape.k);
    fmt::print("{:<28}{:>16} {}{} {:>7.1f} {:>5.0f}%", shape.name,
               fmt::format("{}x{}x{}", shape.m, shape.n, shape.k), shape.transpose_a,
               shape.transpose_b, peak, 100 * work / measured[0].seconds / peak);
    for (const Measured& m : measured) {
      fmt::print(" {:>7.1f} ({:.2f}x)", work / m.seconds, 1 / m.speed_ratio);
    }
    fmt::print("\n");
    std::fflush(stdout);
    arena.rewind(mark);
  }
}

}  // namespace penstock::bench
