#include "kernels/cuda/grouped_gemm.h"

#include <algorithm>
#include <limits>
#include <utility>

#include "kernels/reference/matmul_reference.h"
#include "tests/gpu/harness.h"

namespace penstock::gpu_test {
namespace {

using cuda::Bf16;
// Tensor cores cut what they add to fewer bits than fp32 has.
constexpr double kSumTolerance = 1e-4;

// Groups of so many rows, behind `before` rows and in front of `behind` that are of none.
struct Shape {
  std::vector<int64_t> rows;
  int64_t n;
  int64_t k;  // m, where the depth is ragged
  int64_t before = 0;
  int64_t behind = 0;
};
// A tile and less, and more, of every dimension; groups that begin anywhere; none of rows. The
// widest have more tiles than a device has multiprocessors, so that a block comes to several.
const Shape kShapes[] = {
    {{1}, 8, 8},
    {{128}, 256, 64},
    {{129}, 264, 72},
    {{0, 5, 0}, 16, 200},
    {{0, 0}, 64, 64, 3, 5},
    {{64, 63, 65, 1, 0, 127}, 120, 96, 9, 40},
    {{300, 0, 17, 200, 3}, 520, 136, 1, 1},
    {{7, 0, 33, 256, 1, 0, 2, 130}, 248, 40, 77, 13},
    {{130}, 264, 712},
    {{400, 129, 0, 513, 90}, 392, 264, 5, 60},
    {{1100, 40}, 1032, 136, 11, 0},
    {std::vector<int64_t>(70, 37), 320, 104, 2, 130},
};

// A matrix in rows wider than it, on both sides. What is not of it, in and between its lines, is
// NaN.
template <typename T>
struct Operand {
  Operand(Run& run, int64_t line_count, int64_t columns, int64_t padding)
      : lines(line_count),
        width(columns),
        stride(columns + padding),
        data(run, lines * stride),
        values(static_cast<size_t>(lines * stride), std::numeric_limits<double>::quiet_NaN()) {}
  // Lines [first, last) become random.
  void fill(Run& run, int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      for (int64_t j = 0; j < width; ++j) {
        values[i * stride + j] = static_cast<float>(T(static_cast<float>(run.normal())));
      }
    }
    write();
  }
  void write() {
    std::vector<T> all;
    all.reserve(values.size());
    for (const double value : values) all.push_back(T(static_cast<float>(value)));
    data.write(all);
  }
  reference::MatrixView<const double> from(int64_t line) const {
    return {values.data() + line * stride, stride};
  }
  int64_t lines;
  int64_t width;
  int64_t stride;
  Data<T> data;
  std::vector<double> values;
};

struct Groups {
  Groups(Run& run, const Shape& shape)
      : offsets{shape.before}, data(run, static_cast<int64_t>(shape.rows.size()) + 1) {
    for (const int64_t rows : shape.rows) offsets.push_back(offsets.back() + rows);
    rows_most = offsets.back() + shape.behind;
    data.write(offsets);
  }
  int64_t count() const { return static_cast<int64_t>(offsets.size()) - 1; }
  cuda::RowGroups of_device() const { return {count(), rows_most, data.get()}; }
  std::vector<int64_t> offsets;
  int64_t rows_most = 0;
  Data<int64_t> data;
};

void check_product(Run& run, const Shape& shape, Transpose transpose, Store store, bool portable) {
  const Groups groups(run, shape);
  const auto& offsets = groups.offsets;
  const auto [n, k] = std::pair(shape.n, shape.k);
  const bool forward = transpose == Transpose::kYes;
  const int64_t b_lines = (forward ? n : k) + 3;  // three that are of no group, behind each
  Operand<Bf16> a(run, groups.rows_most, k, 8);
  Operand<Bf16> b(run, groups.count() * b_lines, forward ? k : n, 16);
  Operand<Bf16> c(run, groups.rows_most, n, 24);
  a.fill(run, offsets.front(), offsets.back());
  for (int64_t g = 0; g < groups.count(); ++g) b.fill(run, g * b_lines, (g + 1) * b_lines - 3);
  if (store == Store::kAccumulate) c.fill(run, 0, c.lines);
  cuda::GroupedMatmul product{.groups = groups.of_device()};
  product.n = n;
  product.k = k;
  product.a = a.data.view(a.stride);
  product.b = b.data.view(b.stride);
  product.group_stride = b_lines * b.stride;
  product.transpose_b = transpose;
  product.store = store;
  product.c = c.data.view(c.stride);
  product.portable = portable;
  cuda::grouped_matmul(run.stream(), product);
  for (int64_t g = 0; g < groups.count(); ++g) {
    reference::matmul<double>(offsets[g + 1] - offsets[g], n, k, a.from(offsets[g]), Transpose::kNo,
                              b.from(g * b_lines), transpose, store,
                              {c.values.data() + offsets[g] * c.stride, c.stride}, 1.0);
  }
  run.compare("c", c.data.read(run), c.values, kBf16Tolerance);
}

void check_ragged(Run& run, const Shape& shape, bool portable) {
  const Groups groups(run, shape);
  const auto& offsets = groups.offsets;
  const auto [n, m] = std::pair(shape.n, shape.k);
  const int64_t c_lines = m + 1;
  Operand<Bf16> a(run, groups.rows_most, m, 16);
  Operand<Bf16> b(run, groups.rows_most, n, 8);
  Operand<float> c(run, groups.count() * c_lines, n, 8);
  a.fill(run, offsets.front(), offsets.back());
  b.fill(run, offsets.front(), offsets.back());
  c.fill(run, 0, c.lines);
  cuda::GroupedMatmulRaggedK product{.groups = groups.of_device()};
  product.m = m;
  product.n = n;
  product.a = a.data.view(a.stride);
  product.b = b.data.view(b.stride);
  product.c = c.data.view(c.stride);
  product.group_stride = c_lines * c.stride;
  product.portable = portable;
  cuda::grouped_matmul_ragged_k(run.stream(), product);
  for (int64_t g = 0; g < groups.count(); ++g) {
    reference::matmul<double>(m, n, offsets[g + 1] - offsets[g], a.from(offsets[g]),
                              Transpose::kYes, b.from(offsets[g]), Transpose::kNo,
                              Store::kAccumulate,
                              {c.values.data() + g * c_lines * c.stride, c.stride}, 1.0);
  }
  run.compare("c", c.data.read(run), c.values, kSumTolerance);
}

void check_products(Run& run, Transpose transpose, Store store) {
  for (const Shape& shape : kShapes) {
    for (const bool portable : {true, false}) {
      check_product(run, shape, transpose, store, portable);
    }
  }
}

}  // namespace

GPU_CASE(grouped_gemm_forward) {
  check_products(run, Transpose::kYes, Store::kOverwrite);
}
GPU_CASE(grouped_gemm_forward_accumulate) {
  check_products(run, Transpose::kYes, Store::kAccumulate);
}
GPU_CASE(grouped_gemm_input_gradient) {
  check_products(run, Transpose::kNo, Store::kOverwrite);
}
GPU_CASE(grouped_gemm_input_gradient_accumulate) {
  check_products(run, Transpose::kNo, Store::kAccumulate);
}
GPU_CASE(grouped_gemm_weight_gradient) {
  for (const Shape& shape : kShapes) {
    for (const bool portable : {true, false}) check_ragged(run, shape, portable);
  }
}

GPU_CASE(grouped_gemm_random_shapes) {
  for (int i = 0; i < 24; ++i) {
    Shape shape{
        {}, 8 * (1 + run.below(80)), 8 * (1 + run.below(60)), run.below(200), run.below(200)};
    for (int64_t g = 1 + run.below(9); g > 0; --g) {
      shape.rows.push_back(run.below(4) == 0 ? 0 : run.below(300));
    }
    const Transpose transpose = run.below(2) == 0 ? Transpose::kNo : Transpose::kYes;
    const Store store = run.below(2) == 0 ? Store::kOverwrite : Store::kAccumulate;
    check_product(run, shape, transpose, store, run.below(2) == 0);
    check_ragged(run, shape, run.below(2) == 0);
  }
}

// NaN in a group's rows is the group's own, also where its last tile reaches over rows of the next.
GPU_CASE(grouped_gemm_nan_stays_in_its_group) {
  constexpr int64_t kM = 72, kN = 136, kRows = 230;
  const Shape shape{{70, 90, 70}, kN, kM};
  const Groups groups(run, shape);
  for (const bool portable : {true, false}) {
    Operand<Bf16> a(run, kRows, kM, 0), b(run, kRows, kN, 0), w(run, 3 * kN, kM, 0);
    Operand<Bf16> y(run, kRows, kN, 0);
    Operand<float> c(run, 3 * kM, kN, 0);
    w.fill(run, 0, w.lines);
    b.fill(run, 0, kRows);
    a.fill(run, 0, kRows);
    std::fill(a.values.begin() + 70 * kM, a.values.begin() + 160 * kM,
              std::numeric_limits<double>::quiet_NaN());
    a.write();
    c.fill(run, 0, c.lines);
    cuda::GroupedMatmul product{.groups = groups.of_device()};
    product.n = kN;
    product.k = kM;
    product.a = a.data.view(kM);
    product.b = w.data.view(kM);
    product.group_stride = kN * kM;
    product.c = y.data.view(kN);
    product.portable = portable;
    cuda::grouped_matmul(run.stream(), product);
    cuda::GroupedMatmulRaggedK ragged{.groups = groups.of_device()};
    ragged.m = kM;
    ragged.n = kN;
    ragged.a = a.data.view(kM);
    ragged.b = b.data.view(kN);
    ragged.c = c.data.view(kN);
    ragged.group_stride = kM * kN;
    ragged.portable = portable;
    cuda::grouped_matmul_ragged_k(run.stream(), ragged);
    const auto check = [&](const std::vector<double>& got, int64_t first, int64_t last) {
      for (int64_t i = 0; i < static_cast<int64_t>(got.size()); ++i) {
        const bool nan = got[i] != got[i];
        run.expect(nan == (i >= first && i < last), "element " + std::to_string(i));
      }
    };
    check(y.data.read(run), 70 * kN, 160 * kN);
    check(c.data.read(run), kM * kN, 2 * kM * kN);
  }
}

// The number of blocks is no part of a result, and neither are offsets for a single group.
GPU_CASE(grouped_gemm_same_bits_on_fewer_multiprocessors) {
  const Shape shape{{1111}, 776, 520};
  const Groups groups(run, shape);
  Operand<Bf16> a(run, 1111, 520, 0), b(run, 776, 520, 0);
  Operand<Bf16> c(run, 1111, 776, 0), other(run, 1111, 776, 0);
  a.fill(run, 0, a.lines);
  b.fill(run, 0, b.lines);
  for (const bool portable : {true, false}) {
    cuda::GroupedMatmul product{.groups = groups.of_device()};
    product.n = 776;
    product.k = 520;
    product.a = a.data.view(520);
    product.b = b.data.view(520);
    product.c = c.data.view(776);
    product.portable = portable;
    cuda::grouped_matmul(run.stream(), product);
    run.finish();
    cuda::Stream few(3);
    product.groups.offsets = nullptr;
    product.c = other.data.view(776);
    cuda::grouped_matmul(few, product);
    run.expect(few.wait() == nullptr, "launch on few multiprocessors");
    const std::vector<Bf16> first = c.data.read_exact(run);
    const std::vector<Bf16> second = other.data.read_exact(run);
    for (size_t i = 0; i < first.size(); ++i) {
      run.expect(static_cast<float>(first[i]) == static_cast<float>(second[i]),
                 "element " + std::to_string(i));
    }
  }
}

}  // namespace penstock::gpu_test
