#include "worker/data/sampler.h"

#include <fmt/format.h>

#include <algorithm>
#include <bit>
#include <cmath>

#include "comm/base/check.h"
#include "comm/base/random.h"

namespace penstock {

namespace {

constexpr int64_t kPatternPlaces = 65536;
constexpr uint64_t kOffsetStream = uint64_t{1} << 63;
// Every run with the same validation data evaluates on the same windows, whatever its seed.
constexpr uint64_t kValidationSeed = 0x76616c6964617465;  // "validate"

uint64_t epoch_stream(int64_t source, int64_t epoch) {
  return static_cast<uint64_t>(source) << 48 | static_cast<uint64_t>(epoch);
}

int64_t window_count(const SamplerOptions& options, const SamplerSource& source) {
  return (source.data->token_count() - 1) / options.seq_length;
}

Status check_options(const SamplerOptions& options) {
  PENSTOCK_CHECK(options.seq_length > 0 && options.sequences_per_step > 0 &&
                 options.vocab_size > 0);
  if (options.sources.empty()) return invalid_argument("no data source");
  for (const SamplerSource& source : options.sources) {
    if (!(source.weight > 0.0) || !std::isfinite(source.weight)) {
      return invalid_argument(
          fmt::format("{}: weight {} is not above 0", source.data->prefix(), source.weight));
    }
    if (source.data->token_count() <= options.seq_length) {
      return invalid_argument(
          fmt::format("{}: {} tokens, fewer than the {} of one sequence of "
                      "seq_length {} and its target; use a larger corpus or a "
                      "smaller data.seq_length",
                      source.data->prefix(), source.data->token_count(), options.seq_length + 1,
                      options.seq_length));
    }
  }
  return {};
}

// For each of `place_count` places the source that is furthest behind its share, so that any
// stretch of places mixes the sources as the weights say.
std::vector<int32_t> spread_by_weight(const std::vector<SamplerSource>& sources,
                                      int64_t place_count) {
  double total = 0.0;
  for (const SamplerSource& source : sources) total += source.weight;
  std::vector<int64_t> taken(sources.size());
  std::vector<int32_t> places;
  places.reserve(place_count);
  for (int64_t place = 0; place < place_count; ++place) {
    size_t furthest = 0;
    double furthest_deficit = -INFINITY;
    for (size_t s = 0; s < sources.size(); ++s) {
      const double due = sources[s].weight / total * static_cast<double>(place + 1);
      const double deficit = due - static_cast<double>(taken[s]);
      if (deficit > furthest_deficit) furthest = s, furthest_deficit = deficit;
    }
    ++taken[furthest];
    places.push_back(static_cast<int32_t>(furthest));
  }
  return places;
}

Result<std::vector<SamplerSource>> open_sources(const std::vector<DataSource>& specs) {
  std::vector<SamplerSource> sources;
  for (const DataSource& spec : specs) {
    PENSTOCK_TRY_ASSIGN(IndexedDataset data, IndexedDataset::open(spec.path));
    sources.push_back({std::make_shared<const IndexedDataset>(std::move(data)), spec.weight});
  }
  return sources;
}

}  // namespace

uint64_t permute(uint64_t seed, uint64_t stream, uint64_t index, uint64_t count) {
  PENSTOCK_CHECK(index < count, index, count);
  const int half_bits = std::max(1, (static_cast<int>(std::bit_width(count - 1)) + 1) / 2);
  const uint64_t half_mask = (uint64_t{1} << half_bits) - 1;
  // A Feistel network is a bijection of [0, 4^half_bits); walking it until the image is below
  // `count` makes it one of [0, count). The domain is at most four times `count`, so the walk is
  // short.
  do {
    uint64_t left = index >> half_bits;
    uint64_t right = index & half_mask;
    for (uint64_t round = 0; round < 4; ++round) {
      const uint64_t mixed = philox(seed, stream, round << 32 | right)[0] & half_mask;
      left = std::exchange(right, left ^ mixed);
    }
    index = left << half_bits | right;
  } while (index >= count);
  return index;
}

Result<Sampler> Sampler::create(SamplerOptions options) {
  PENSTOCK_TRY(check_options(options));
  Sampler sampler(std::move(options));
  const auto& sources = sampler.options_.sources;
  sampler.places_of_source_.resize(sources.size());
  for (const int32_t source : spread_by_weight(sources, sources.size() == 1 ? 1 : kPatternPlaces)) {
    int64_t& earlier = sampler.places_of_source_[source];
    sampler.pattern_.push_back({source, static_cast<int32_t>(earlier)});
    ++earlier;
  }
  for (size_t s = 0; s < sources.size(); ++s) {
    if (sampler.places_of_source_[s] > 0) continue;
    return invalid_argument(
        fmt::format("{}: weight {} is less than 1/{} of all sources; remove the "
                    "source or raise its weight",
                    sources[s].data->prefix(), sources[s].weight, kPatternPlaces));
  }
  return sampler;
}

Sampler::Window Sampler::window(int64_t step, int64_t index) const {
  PENSTOCK_CHECK(step >= 1, step);
  PENSTOCK_CHECK(
      index >= 0 && index < value_at(options_.sequence_levels, options_.sequences_per_step, step),
      index);
  const int64_t n =
      total_before(options_.sequence_levels, options_.sequences_per_step, step) + index;
  const int64_t place_count = static_cast<int64_t>(pattern_.size());
  const Place place = pattern_[n % place_count];
  const int64_t ordinal = n / place_count * places_of_source_[place.source] + place.earlier;

  const SamplerSource& source = options_.sources[place.source];
  const int64_t windows = window_count(options_, source);
  const int64_t epoch = ordinal / windows;
  const uint64_t stream = epoch_stream(place.source, epoch);
  const int64_t tail = (source.data->token_count() - 1) % options_.seq_length;
  const int64_t offset =
      static_cast<int64_t>(Random(options_.seed, stream | kOffsetStream).below(tail + 1));
  const int64_t k =
      static_cast<int64_t>(permute(options_.seed, stream, ordinal % windows, windows));
  return {place.source, epoch, offset + k * options_.seq_length};
}

Status Sampler::sequence(int64_t step, int64_t index, std::span<int32_t> into) const {
  PENSTOCK_CHECK(static_cast<int64_t>(into.size()) == options_.seq_length + 1, into.size());
  const Window at = window(step, index);
  return options_.sources[at.source].data->read(at.first_token, into, options_.vocab_size);
}

Result<Sampler> open_training_sampler(const JobSpec& spec) {
  PENSTOCK_TRY_ASSIGN(auto sources, open_sources(spec.data.train));
  std::vector<StepLevel<int64_t>> levels = spec.parallelism.microbatch_levels;
  for (StepLevel<int64_t>& level : levels) {
    level.value *= spec.sequences_per_step() / spec.parallelism.microbatches;
  }
  return Sampler::create({.sources = std::move(sources),
                          .seq_length = spec.data.seq_length,
                          .sequences_per_step = spec.sequences_per_step(),
                          .sequence_levels = std::move(levels),
                          .vocab_size = spec.model.vocab_size,
                          .seed = spec.training.seed});
}

Result<Sampler> open_validation_sampler(const JobSpec& spec) {
  if (spec.data.validation.empty()) return failed_precondition("the spec has no data.validation");
  PENSTOCK_TRY_ASSIGN(auto sources, open_sources(spec.data.validation));
  return Sampler::create({.sources = std::move(sources),
                          .seq_length = spec.data.seq_length,
                          .sequences_per_step = spec.sequences_per_step(),
                          .vocab_size = spec.model.vocab_size,
                          .seed = kValidationSeed});
}

int64_t sequence_index(const ParallelismSpec& parallelism, int64_t replica, int64_t microbatch,
                       int64_t position) {
  PENSTOCK_CHECK(replica >= 0 && replica < parallelism.expert * parallelism.data, replica);
  PENSTOCK_CHECK(microbatch >= 0 && microbatch < parallelism.microbatches, microbatch);
  PENSTOCK_CHECK(position >= 0 && position < parallelism.micro_batch_size, position);
  return (replica * parallelism.microbatches + microbatch) * parallelism.micro_batch_size +
         position;
}

}  // namespace penstock
