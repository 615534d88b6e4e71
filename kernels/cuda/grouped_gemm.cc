#include "kernels/cuda/grouped_gemm.h"

#include "kernels/cuda/gemm_tiles.h"

namespace penstock::cuda {
namespace {

void launch(Stream& stream, GemmForm form, const GemmProblem& problem, bool portable) {
  if (problem.rows_most == 0 || problem.group_count == 0) return;
  int device = 0;
  int major = 0;
  stream.note("device", cudaGetDevice(&device));
  stream.note("device", cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
  if (major == 9 && !portable && launch_gemm_sm90(stream, form, problem)) return;
  launch_gemm_sm80(stream, form, problem);
}

GemmProblem problem_of(const RowGroups& groups) {
  GemmProblem problem;
  problem.group_count = static_cast<int>(groups.count);
  problem.offsets = groups.offsets;
  problem.rows_most = groups.rows_most;
  return problem;
}

}  // namespace

void grouped_matmul(Stream& stream, const GroupedMatmul& product) {
  GemmProblem problem = problem_of(product.groups);
  problem.n = product.n;
  problem.k = product.k;
  problem.a = product.a;
  problem.b = product.b;
  problem.b_group_stride = product.group_stride;
  problem.c = product.c.data;
  problem.c_stride = product.c.stride;
  problem.accumulate = product.store == Store::kAccumulate;
  launch(stream,
         product.transpose_b == Transpose::kYes ? GemmForm::kForward : GemmForm::kInputGradient,
         problem, product.portable);
}

void grouped_matmul_ragged_k(Stream& stream, const GroupedMatmulRaggedK& product) {
  GemmProblem problem = problem_of(product.groups);
  problem.m = product.m;
  problem.n = product.n;
  problem.a = product.a;
  problem.b = product.b;
  problem.c = product.c.data;
  problem.c_stride = product.c.stride;
  problem.c_group_stride = product.group_stride;
  launch(stream, GemmForm::kWeightGradient, problem, product.portable);
}

}  // namespace penstock::cuda
