// The linear layers of decoder layers in the precision of the job, and the precision map around
// them (DeepSeek-V3 report §3.3). With fp32 these are plain matrix products and nothing is rounded.
// With fp8 the three products of every linear layer have E4M3 operands, and each weight tensor has
// blocks of its own. Embedding, head, gate, norms, attention and the optimizer never come here:
// they stay in fp32.
//
//   what is kept or sent                 format
//   input of a linear layer              E4M3
//   inputs of SwiGLU                     E4M3; its output is computed again from them
//   input of o_proj                      E5M6, power-of-two scales; E4M3 in the forward product
//   dispatched tokens and the gradient
//   that enters the experts              E4M3, power-of-two scales
//   both combines                        bf16
#pragma once

#include <cstdint>
#include <memory>

#include "comm/run/job_spec.h"
#include "kernels/kernels.h"
#include "worker/model/memory_plan.h"
#include "worker/model/parameter.h"

namespace penstock {

// The host's kernels for a job of this precision.
std::unique_ptr<Kernels> make_kernels(Precision precision);

// The weight of one linear layer: a tensor, or two that lie behind each other and share an input.
// Of grouped layers, the first group's.
struct LinearWeight {
  LinearWeight() = default;
  explicit LinearWeight(const Parameter& first, const Parameter* second = nullptr);

  float* value = nullptr;     // [out, in]
  float* gradient = nullptr;  // null in a stage without gradients
  int64_t out = 0;
  int64_t in = 0;
  int64_t first_out = 0;     // rows of the first tensor
  int64_t group_stride = 0;  // from one group's weight to the next one's
};

// The rows of a call: all for one weight, or grouped as in LinearShape.
class RowGroups {
 public:
  RowGroups(int64_t rows) : one_{0, rows} {}  // NOLINT: a row count is one group
  RowGroups(int64_t group_count, const int64_t* offsets) : count_(group_count), many_(offsets) {}
  int64_t count() const { return count_; }
  const int64_t* offsets() const { return many_ != nullptr ? many_ : one_; }

 private:
  int64_t count_ = 1;
  const int64_t* many_ = nullptr;  // borrowed
  int64_t one_[2] = {0, 0};
};

// One per stage; blocks borrow it.
class Linears {
 public:
  Linears(Kernels& kernels, Precision precision) : kernels_(kernels), precision_(precision) {}

  bool fp8() const { return precision_ != Precision::kFp32; }
  // Takes the scratch of the calls below, for the largest of `parameters`. Before the first call.
  void take_workspace(MemoryPlan& plan, std::span<const Parameter> parameters);

  // y (= or +=) x W^T, x[rows, in], y[rows, out].
  void forward(const RowGroups& rows, const LinearWeight& weight, ConstMatrix x, Store store,
               Matrix y, RowFormat x_format = RowFormat::kE4m3) const;
  // dx = dy W
  void input_gradient(const RowGroups& rows, const LinearWeight& weight, ConstMatrix dy, Matrix dx,
                      RowFormat dy_format = RowFormat::kE4m3) const;
  // dW += dy^T x. The formats are those that dy and x were kept in; kFp32 for what was computed
  // again.
  void weight_gradient(const RowGroups& rows, const LinearWeight& weight, ConstMatrix dy,
                       ConstMatrix x, RowFormat x_format = RowFormat::kE4m3,
                       RowFormat dy_format = RowFormat::kE4m3) const;

  // What would be kept or sent in `format`: y = x rounded; with fp32 nothing happens. y may be x.
  void round(RowFormat format, int64_t rows, int64_t width, ConstMatrix x, Matrix y) const;

 private:
  Kernels& kernels_;
  Precision precision_;
  float* workspace_ = nullptr;
};

}  // namespace penstock
