#include "worker/model/linear.h"

#include <algorithm>

#include "kernels/cpu/cpu_kernels.h"

namespace penstock {
namespace {

// One tensor of a weight: rows [begin, begin + shape.out) of it.
struct Part {
  int64_t begin;
  LinearShape shape;
};

// Calls body(part) for the first tensor, and for the second where there is one.
template <typename Body>
void for_parts(const RowGroups& rows, const LinearWeight& weight, const Body& body) {
  const auto run = [&](int64_t begin, int64_t end) {
    if (begin == end) return;
    body(Part{begin, {end - begin, weight.in, rows.count(), rows.offsets(), weight.group_stride}});
  };
  run(0, weight.first_out);
  run(weight.first_out, weight.out);
}

}  // namespace

std::unique_ptr<Kernels> make_kernels(Precision precision) {
  return make_cpu_kernels(precision == Precision::kFp8Hopper ? Fp8Accumulator::kHopper
                                                             : Fp8Accumulator::kFp32);
}

LinearWeight::LinearWeight(const Parameter& first, const Parameter* second)
    : value(first.value),
      gradient(first.gradient),
      out(first.shape[0]),
      in(first.shape[1]),
      first_out(first.shape[0]) {
  if (second == nullptr) return;
  PENSTOCK_CHECK(second->offset == first.offset + first.size && second->shape[1] == in,
                 second->name);
  out += second->shape[0];
}

void Linears::take_workspace(MemoryPlan& plan, std::span<const Parameter> parameters) {
  if (!fp8()) return;
  int64_t floats = 0;
  for (const Parameter& p : parameters) {
    if (p.shape.size() != 2 || !p.name.starts_with("model.layers.")) continue;
    floats = std::max(floats, kernels_.fp8_workspace_floats(p.shape[0], p.shape[1]));
  }
  workspace_ = plan.floats(floats);
}

void Linears::forward(const RowGroups& rows, const LinearWeight& weight, ConstMatrix x, Store store,
                      Matrix y, RowFormat x_format) const {
  if (!fp8()) {
    kernels_.grouped_matmul(rows.count(), rows.offsets(), weight.out, weight.in, x,
                            {weight.value, weight.in}, weight.group_stride, Transpose::kYes, store,
                            y);
    return;
  }
  for_parts(rows, weight, [&](const Part& part) {
    kernels_.fp8_linear(part.shape, x_format, x, weight.value + part.begin * weight.in, store,
                        {y.data + part.begin, y.stride}, workspace_);
  });
}

void Linears::input_gradient(const RowGroups& rows, const LinearWeight& weight, ConstMatrix dy,
                             Matrix dx, RowFormat dy_format) const {
  if (!fp8()) {
    kernels_.grouped_matmul(rows.count(), rows.offsets(), weight.in, weight.out, dy,
                            {weight.value, weight.in}, weight.group_stride, Transpose::kNo,
                            Store::kOverwrite, dx);
    return;
  }
  for_parts(rows, weight, [&](const Part& part) {
    kernels_.fp8_linear_input_gradient(part.shape, dy_format, {dy.data + part.begin, dy.stride},
                                       weight.value + part.begin * weight.in,
                                       part.begin == 0 ? Store::kOverwrite : Store::kAccumulate, dx,
                                       workspace_);
  });
}

void Linears::weight_gradient(const RowGroups& rows, const LinearWeight& weight, ConstMatrix dy,
                              ConstMatrix x, RowFormat x_format, RowFormat dy_format) const {
  if (!fp8()) {
    kernels_.grouped_matmul_ragged_k(rows.count(), rows.offsets(), weight.out, weight.in, dy, x,
                                     {weight.gradient, weight.in}, weight.group_stride);
    return;
  }
  for_parts(rows, weight, [&](const Part& part) {
    kernels_.fp8_linear_weight_gradient(part.shape, dy_format, {dy.data + part.begin, dy.stride},
                                        x_format, x, weight.gradient + part.begin * weight.in,
                                        workspace_);
  });
}

void Linears::round(RowFormat format, int64_t rows, int64_t width, ConstMatrix x, Matrix y) const {
  if (fp8()) kernels_.round_rows(format, rows, width, x, y);
}

}  // namespace penstock
