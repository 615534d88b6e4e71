#include "coordinator/core/scaling.h"

#include <fmt/format.h>

#include <optional>

#include "coordinator/plan/schedule.h"

namespace penstock {
namespace {

// Micro-batches of `size` that `data` replicas each take instead of `count` by the old layout;
// nullopt: they do not come out whole.
std::optional<int64_t> spread(const ParallelismSpec& old, int64_t count, int64_t data,
                              int64_t size) {
  const int64_t sequences = count * old.micro_batch_size * old.data;
  if (sequences % (data * size) != 0) return std::nullopt;
  return sequences / (data * size);
}

Result<JobSpec> with_micro_batches_of(const JobSpec& spec, int64_t data, int64_t size) {
  const ParallelismSpec& old = spec.parallelism;
  JobSpec scaled = spec;
  ParallelismSpec& next = scaled.parallelism;
  next.data = data;
  next.micro_batch_size = size;
  std::vector<int64_t*> counts = {&next.microbatches};
  for (auto& level : next.microbatch_levels) counts.push_back(&level.value);
  for (int64_t* count : counts) {
    const std::optional<int64_t> each = spread(old, *count, data, size);
    if (!each) {
      return invalid_argument(
          fmt::format("the {} sequences of a step do not divide by expert {} x data {}",
                      *count * old.micro_batch_size * old.expert * old.data, old.expert, data));
    }
    *count = *each;
  }
  Result<JobSpec> checked = parse_job_spec(to_json(scaled), "spec");
  if (!checked.ok()) return checked;
  if (const auto programs = make_programs(next); !programs.ok()) return programs.status();
  return checked;
}

}  // namespace

Result<JobSpec> with_data_width(const JobSpec& spec, int64_t data) {
  if (data < 1) return invalid_argument("data must be at least 1");
  const int64_t largest = spec.parallelism.micro_batch_size;
  std::optional<Status> first;
  for (int64_t size = largest; size >= 1; --size) {
    if (largest % size != 0) continue;
    Result<JobSpec> scaled = with_micro_batches_of(spec, data, size);
    if (scaled.ok()) return scaled;
    if (!first) first = scaled.status();
  }
  return invalid_argument(fmt::format("data {} is not possible: {}", data, first->message()));
}

}  // namespace penstock
