// Rows to experts and back.
#include "kernels/cuda/permute.h"

#include "tests/gpu/harness.h"

namespace penstock::gpu_test {
namespace {

using cuda::Bf16;

struct Sorted {
  std::vector<int64_t> offsets;
  std::vector<int32_t> place;
};

Sorted sort_on_host(const std::vector<int32_t>& ids, int experts) {
  Sorted sorted;
  sorted.offsets.push_back(0);
  sorted.place.assign(ids.size(), -1);
  int32_t next = 0;
  for (int32_t expert = 0; expert < experts; ++expert) {
    for (size_t a = 0; a < ids.size(); ++a) {
      if (ids[a] == expert) sorted.place[a] = next++;
    }
    sorted.offsets.push_back(next);
  }
  return sorted;
}

// `missing`: one in so many assignments is of another rank; 0: none, 1: all.
std::vector<int32_t> random_ids(Run& run, int64_t count, int experts, int64_t missing) {
  std::vector<int32_t> ids;
  for (int64_t a = 0; a < count; ++a) {
    const bool here = missing == 0 || run.below(missing) != 0;
    ids.push_back(here ? static_cast<int32_t>(run.below(experts)) : -1);
  }
  return ids;
}

void check_sort(Run& run, int64_t rows, int64_t topk, int experts, int64_t missing,
                int64_t rows_there) {
  const int64_t count = rows * topk;
  Data<int32_t> ids(run, count), place(run, count);
  Data<int32_t> scratch(run, cuda::sort_scratch_ints(count, experts));
  Data<int64_t> offsets(run, experts + 1), row_count(run, 1);
  std::vector<int32_t> chosen = random_ids(run, count, experts, missing);
  ids.write(chosen);
  row_count.write({rows_there});
  cuda::CountSort sort{.assignments = count, .topk = topk, .experts = experts};
  sort.row_count = rows_there == rows ? nullptr : row_count.get();
  sort.ids = ids.get();
  sort.offsets = offsets.get();
  sort.place = place.get();
  sort.scratch = scratch.get();
  cuda::count_sort(run.stream(), sort);
  std::fill(chosen.begin() + rows_there * topk, chosen.end(), -1);
  const Sorted want = sort_on_host(chosen, experts);
  run.expect(offsets.read_exact(run) == want.offsets, "offsets");
  run.expect(place.read_exact(run) == want.place, "places");
}

template <typename T>
void check_rows(Run& run, int64_t rows, int64_t topk, int64_t width) {
  constexpr int kExperts = 7;
  const int64_t count = rows * topk;
  const Sorted order = sort_on_host(random_ids(run, count, kExperts, 3), kExperts);
  const int64_t sorted_count = order.offsets.back();
  Data<int32_t> place(run, count);
  Data<float> weights(run, count), dots(run, count), sorted_weights(run, sorted_count);
  Data<T> x(run, rows * width), sorted(run, sorted_count * width), y(run, rows * width);
  Data<T> of(run, sorted_count * width);
  place.write(order.place);
  const std::vector<double> w = weights.fill_random(run);
  const std::vector<double> in = x.fill_random(run);
  const std::vector<double> combined = of.fill_random(run);
  std::vector<double> want_sorted(static_cast<size_t>(sorted_count * width));
  std::vector<double> want_dots(w.size()), want_y(in.size());
  std::vector<double> want_weights(static_cast<size_t>(sorted_count));
  for (int64_t a = 0; a < count; ++a) {
    const int64_t at = order.place[a];
    if (at < 0) continue;
    want_weights[at] = w[a];
    for (int64_t i = 0; i < width; ++i) {
      const double value = in[a / topk * width + i];
      const double other = combined[at * width + i];
      want_sorted[at * width + i] = w[a] * value;
      want_dots[a] += value * other;
      want_y[a / topk * width + i] += w[a] * other;
    }
  }
  const cuda::PermuteRows<T> permute{
      .rows = rows, .width = width, .topk = topk, .place = place.get()};
  cuda::expand_rows<T>(run.stream(), permute, x.view(width), weights.get(), sorted.view(width),
                       of.view(width), dots.get());
  cuda::expand_weights(run.stream(), count, place.get(), weights.get(), sorted_weights.get());
  cuda::combine_rows<T>(run.stream(), permute, of.view(width), weights.get(), y.view(width));
  run.compare("sorted", sorted.read(run), want_sorted, tolerance_of<T>());
  run.compare("dots", dots.read(run), want_dots, kFp32Tolerance);
  run.compare("weights", sorted_weights.read(run), want_weights, kFp32Tolerance);
  run.compare("combined", y.read(run), want_y, tolerance_of<T>());
}

}  // namespace

GPU_CASE(permute_sort) {
  check_sort(run, 1, 1, 1, 0, 1);
  check_sort(run, 341, 3, 64, 4, 341);  // one block, not full
  check_sort(run, 4096, 8, 256, 0, 4096);
  check_sort(run, 5000, 8, 512, 2, 4321);  // rows that the device counts
  check_sort(run, 2048, 6, 32, 1, 2048);   // all of them of other ranks
  check_sort(run, 1024, 2, 8, 0, 0);
  check_sort(run, 0, 8, 16, 0, 0);
}
GPU_CASE(permute_rows_bf16) {
  check_rows<Bf16>(run, 257, 8, 2048);
  check_rows<Bf16>(run, 3, 1, 8);
}
GPU_CASE(permute_rows_fp32) {
  check_rows<float>(run, 65, 6, 264);
}

}  // namespace penstock::gpu_test
