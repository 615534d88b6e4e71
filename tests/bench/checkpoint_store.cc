// checkpoint_bench: saves, loads, reshards, damages and plans checkpoints of synthetic state
// through the public interface of checkpoint/, and prints what it measured as one JSON document.
// For ops/bench checkpoint, which empties the page cache between calls and alternates with a peer.
#include <fcntl.h>
#include <sys/stat.h>

#include <CLI/CLI.hpp>

#include <cmath>
#include <condition_variable>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <map>
#include <mutex>
#include <nlohmann/json.hpp>
#include <thread>

#include "checkpoint/loader.h"
#include "checkpoint/segment_reader.h"
#include "checkpoint/store.h"
#include "comm/base/clock.h"
#include "comm/base/log.h"
#include "comm/base/random.h"
#include "worker/engine/segment_saver.h"

namespace penstock {
namespace {

using nlohmann::json;

constexpr JobId kJob{1};
constexpr Epoch kEpoch{1};

struct Flags {
  std::string directory;
  int64_t tensors = 256;
  int64_t rows = 1024;  // f32 elements a tensor has
  int64_t columns = 1024;
  int64_t saves = 3;
  int64_t from = 1;  // ranks that save, ranks that load
  int64_t to = 1;
  int64_t pieces = 32768;
  int64_t places = 24;
  double step_ms = 50;
  int64_t steps = 20;
};

double seconds_since(int64_t begin_ns) {
  return static_cast<double>(monotonic_ns() - begin_ns) * 1e-9;
}

// Of this process: /proc/self/<file>, the number after "<key>:", 0 when there is none.
uint64_t proc_number(const char* file, const std::string& key) {
  std::ifstream lines(std::string("/proc/self/") + file);
  for (std::string line; std::getline(lines, line);) {
    if (line.rfind(key + ":", 0) == 0) return std::stoull(line.substr(key.size() + 1));
  }
  return 0;
}

// What the kernel counts for this process while a piece of work runs.
class Use {
 public:
  Use() {
    std::ofstream("/proc/self/clear_refs") << 5;  // the peak of the resident set starts again
    resident_kib_ = proc_number("status", "VmRSS");
    read_ = proc_number("io", "rchar");
    written_ = proc_number("io", "write_bytes");
  }
  void report(json& out) const {
    const uint64_t peak_kib = proc_number("status", "VmHWM");
    out["extra_bytes"] = peak_kib > resident_kib_ ? (peak_kib - resident_kib_) << 10 : 0;
    out["rchar"] = proc_number("io", "rchar") - read_;
    out["write_bytes"] = proc_number("io", "write_bytes") - written_;
  }

 private:
  uint64_t resident_kib_;
  uint64_t read_;
  uint64_t written_;
};

// One rank's share of `tensors` tensors, cut by rows into `ranks`; 0 of 1: everything.
struct State {
  std::vector<TensorSlice> slices;
  std::vector<std::vector<std::byte>> bytes;

  State(const Flags& flags, int64_t rank, int64_t ranks, bool fill) {
    const int64_t begin = flags.rows * rank / ranks;
    const int64_t end = flags.rows * (rank + 1) / ranks;
    for (int64_t t = 0; t < flags.tensors; ++t) {
      TensorSlice slice = whole_tensor(fmt::format("model.layers.{}.weight", t), DType::kF32,
                                       {flags.rows, flags.columns});
      slice.box = {{begin, 0}, {end - begin, flags.columns}};
      bytes.emplace_back(byte_count(slice));
      if (fill) fill_with_known(slice, bytes.back());
      slices.push_back(std::move(slice));
    }
  }

  // Every element is a function of tensor and position: a wrong byte anywhere is found.
  static void fill_with_known(const TensorSlice& slice, std::vector<std::byte>& bytes) {
    const uint64_t first = digest_of(as_bytes(slice.name)).low +
                           static_cast<uint64_t>(slice.box.offset[0] * slice.shape[1]);
    for (uint64_t i = 0; i < bytes.size() / sizeof(uint32_t); ++i) {
      const auto bits = static_cast<uint32_t>((first + i) * 0x9e3779b97f4a7c15u >> 32);
      std::memcpy(bytes.data() + i * sizeof(bits), &bits, sizeof(bits));
    }
  }
  bool holds_known() const {
    for (size_t t = 0; t < slices.size(); ++t) {
      std::vector<std::byte> wanted(bytes[t].size());
      fill_with_known(slices[t], wanted);
      if (wanted != bytes[t]) return false;
    }
    return true;
  }
  uint64_t total() const {
    uint64_t sum = 0;
    for (const auto& tensor : bytes) sum += tensor.size();
    return sum;
  }
  std::vector<SliceSource> sources() const {
    std::vector<SliceSource> all;
    for (size_t t = 0; t < slices.size(); ++t) all.push_back({slices[t], bytes[t]});
    return all;
  }
  std::vector<LoadTarget> targets() {
    std::vector<LoadTarget> all;
    for (size_t t = 0; t < slices.size(); ++t) all.push_back({slices[t], bytes[t], {}});
    return all;
  }
};

SegmentIdentity identity_of(int64_t rank, int64_t step) {
  return {kJob, kEpoch, Rank{static_cast<int32_t>(rank)}, step};
}

Status commit(CheckpointStore& store, int64_t step, const std::vector<SegmentSummary>& segments) {
  CommitRequest request{.epoch = kEpoch,
                        .step = step,
                        .created_at = wall_now(),
                        .spec_json = "{}",
                        .layout = "bench",
                        .segments = {}};
  for (const SegmentSummary& segment : segments) {
    request.segments.push_back(
        {segment.file, segment.rank, segment.byte_count, segment.footer_digest});
  }
  return store.commit(request).status();
}

Result<StoredManifest> newest_manifest(const Path& directory) {
  const NewestWhole newest = newest_whole(directory, kJob);
  PENSTOCK_TRY(newest.directory);
  if (!newest.checkpoint) return not_found("no whole checkpoint in " + directory.string());
  return read_manifest(directory / newest.checkpoint->manifest_file);
}

// Blocks this directory's files take on the disk.
uint64_t disk_bytes(const Path& directory) {
  uint64_t bytes = 0;
  for (const auto& entry : std::filesystem::directory_iterator(directory)) {
    struct stat info = {};
    if (::stat(entry.path().c_str(), &info) == 0) bytes += info.st_blocks * uint64_t{512};
  }
  return bytes;
}

// Writes and commits in the caller's thread, `saves` times; old ones stay.
Result<json> save(const Flags& flags) {
  const State state(flags, 0, 1, true);
  const std::vector<SliceSource> sources = state.sources();
  PENSTOCK_TRY_ASSIGN(CheckpointStore store, CheckpointStore::open(flags.directory, kJob, nullptr));
  json out = {{"payload_bytes", state.total()}, {"budget_bytes", kWriteBudgetBytes}};
  const Use use;
  PENSTOCK_TRY_ASSIGN(DiskBuffers buffers, DiskBuffers::make());
  buffers.touch();  // as a rank does before its first step
  for (int64_t step = 1; step <= flags.saves; ++step) {
    const int64_t begin = monotonic_ns();
    PENSTOCK_TRY_ASSIGN(const SegmentSummary segment,
                        write_segment(flags.directory, identity_of(0, step), sources, buffers));
    PENSTOCK_TRY(commit(store, step, {segment}));
    out["seconds"].push_back(seconds_since(begin));
    if (step == 1) {
      use.report(out);
      out["disk_bytes"] = disk_bytes(flags.directory);
    }
  }
  return out;
}

// A saver whose segments are awaited one at a time.
class AwaitedSaver {
 public:
  AwaitedSaver(const Flags& flags, std::span<const SliceSource> state)
      : state_(state),
        saver_(flags.directory, identity_of(0, 0),
               [this](int64_t, const Result<SegmentSummary>& saved) {
                 const std::lock_guard lock(mutex_);
                 saved_.push_back(saved);
                 done_.notify_all();
               }) {}

  void save(int64_t step) {
    saver_.wait();
    saver_.save(step, state_);
  }
  bool is_durable() {
    const std::lock_guard lock(mutex_);
    return !saved_.empty();
  }
  Result<SegmentSummary> wait() {
    std::unique_lock lock(mutex_);
    done_.wait(lock, [this] { return !saved_.empty(); });
    Result<SegmentSummary> saved = std::move(saved_.front());
    saved_.erase(saved_.begin());
    return saved;
  }
  uint64_t memory_bytes() const { return saver_.memory_bytes(); }

 private:
  const std::span<const SliceSource> state_;
  std::mutex mutex_;
  std::condition_variable done_;
  std::vector<Result<SegmentSummary>> saved_;  // guarded by mutex_
  SegmentSaver saver_;                         // last: its thread calls back
};

// What the training thread waits for a save, and how long until it is committed.
Result<json> stall(const Flags& flags) {
  const State state(flags, 0, 1, true);
  const std::vector<SliceSource> sources = state.sources();
  PENSTOCK_TRY_ASSIGN(CheckpointStore store, CheckpointStore::open(flags.directory, kJob, nullptr));
  json out = {{"payload_bytes", state.total()}};
  {  // The floor: the same bytes into memory that has been used before.
    std::vector<std::byte> copy(state.total());
    for (int i = 0; i < 5; ++i) {
      const int64_t begin = monotonic_ns();
      std::byte* into = copy.data();
      for (const auto& bytes : state.bytes) {
        std::memcpy(into, bytes.data(), bytes.size());
        into += bytes.size();
      }
      out["memcpy_seconds"].push_back(seconds_since(begin));
    }
  }
  int64_t begin = monotonic_ns();
  AwaitedSaver saver(flags, sources);
  out["prepare_seconds"] = seconds_since(begin);
  out["memory_bytes"] = saver.memory_bytes();
  const Use use;
  for (int64_t step = 1; step <= flags.saves; ++step) {
    begin = monotonic_ns();
    saver.save(step);
    out["stall_seconds"].push_back(seconds_since(begin));
    PENSTOCK_TRY_ASSIGN(const SegmentSummary segment, saver.wait());
    PENSTOCK_TRY(commit(store, step, {segment}));
    out["durable_seconds"].push_back(seconds_since(begin));
  }
  use.report(out);
  return out;
}

// Compute on two threads that takes about `step_ms`: what a save in the background slows down.
class Training {
 public:
  explicit Training(double step_ms) {
    double seconds = run_units(kUnitsTried);
    seconds = std::min(seconds, run_units(kUnitsTried));
    units_ = std::max<int64_t>(1, std::lround(kUnitsTried * step_ms * 1e-3 / seconds));
  }
  double step() { return run_units(units_); }

 private:
  static constexpr int kThreads = 2;
  static constexpr int64_t kUnitsTried = 64;

  double run_units(int64_t units) {
    const int64_t begin = monotonic_ns();
    std::vector<std::thread> threads;
    for (int t = 0; t < kThreads; ++t) {
      threads.emplace_back([this, t, units] { multiply(sums_[t], units); });
    }
    for (std::thread& thread : threads) thread.join();
    return seconds_since(begin);
  }
  static void multiply(std::vector<float>& values, int64_t units) {
    for (int64_t unit = 0; unit < 64 * units; ++unit) {
      for (float& value : values) value = value * 0.999f + 0.001f;
    }
  }

  std::vector<float> sums_[kThreads] = {std::vector<float>(4096, 1.0f),
                                        std::vector<float>(4096, 2.0f)};
  int64_t units_ = 0;
};

// Step-seconds lost to one save: the stall, and what steps take longer until it is durable.
Result<json> busy(const Flags& flags) {
  const State state(flags, 0, 1, true);
  const std::vector<SliceSource> sources = state.sources();
  PENSTOCK_TRY_ASSIGN(CheckpointStore store, CheckpointStore::open(flags.directory, kJob, nullptr));
  AwaitedSaver saver(flags, sources);
  Training training(flags.step_ms);
  std::vector<double> quiet;
  for (int64_t i = 0; i < flags.steps; ++i) quiet.push_back(training.step());
  std::nth_element(quiet.begin(), quiet.begin() + quiet.size() / 2, quiet.end());
  const double quiet_step = quiet[quiet.size() / 2];

  json out = {{"payload_bytes", state.total()}, {"quiet_step_seconds", quiet_step}};
  for (int64_t step = 1; step <= flags.saves; ++step) {
    int64_t begin = monotonic_ns();
    saver.save(step);
    double lost = seconds_since(begin);
    while (!saver.is_durable()) lost += training.step() - quiet_step;
    out["lost_seconds"].push_back(lost);
    PENSTOCK_TRY_ASSIGN(const SegmentSummary segment, saver.wait());
    PENSTOCK_TRY(commit(store, step, {segment}));
  }
  return out;
}

// What checking takes of a load: every block's checksum once more, over warm bytes.
double checksum_seconds(const State& state) {
  const Uuid uuid = random_uuid();
  const int64_t begin = monotonic_ns();
  uint32_t sum = 0;
  for (const auto& bytes : state.bytes) {
    for (size_t at = 0; at < bytes.size(); at += kBlockBytes) {
      sum ^= block_sum(uuid, at / kBlockBytes,
                       Bytes(bytes).subspan(at, std::min<size_t>(kBlockBytes, bytes.size() - at)));
    }
  }
  return sum == 1 ? 0 : seconds_since(begin);
}

// The newest checkpoint, found and loaded into memory that training already uses.
Result<json> load(const Flags& flags) {
  State state(flags, 0, 1, false);
  const std::vector<LoadTarget> targets = state.targets();
  json out = {{"payload_bytes", state.total()}};
  const Use use;
  const int64_t begin = monotonic_ns();
  PENSTOCK_TRY_ASSIGN(const StoredManifest stored, newest_manifest(flags.directory));
  out["newest_seconds"] = seconds_since(begin);
  PENSTOCK_TRY_ASSIGN(const LoadReport report,
                      load_slices(flags.directory, stored.manifest, targets));
  out["seconds"] = seconds_since(begin);
  use.report(out);
  out["step"] = stored.manifest.step;
  out["block_bytes_read"] = report.bytes_read;
  if (!state.holds_known()) return internal_error("other bytes were loaded than were saved");
  out["checksum_seconds"] = checksum_seconds(state);
  return out;
}

// Saved by `from` ranks, loaded by `to`: bytes that were read for each byte that was needed.
Result<json> reshard(const Flags& flags) {
  PENSTOCK_TRY_ASSIGN(CheckpointStore store, CheckpointStore::open(flags.directory, kJob, nullptr));
  std::vector<SegmentSummary> segments;
  for (int64_t rank = 0; rank < flags.from; ++rank) {
    const State state(flags, rank, flags.from, true);
    PENSTOCK_TRY_ASSIGN(SegmentSummary segment,
                        write_segment(flags.directory, identity_of(rank, 1), state.sources()));
    segments.push_back(std::move(segment));
  }
  PENSTOCK_TRY(commit(store, 1, segments));
  PENSTOCK_TRY_ASSIGN(const StoredManifest stored, newest_manifest(flags.directory));
  uint64_t needed = 0;
  uint64_t read = 0;
  const int64_t begin = monotonic_ns();
  for (int64_t rank = 0; rank < flags.to; ++rank) {
    State state(flags, rank, flags.to, false);
    const uint64_t before = proc_number("io", "rchar");
    // Through the page cache, where the kernel counts what it is asked for: the same reads.
    PENSTOCK_TRY(
        load_slices(flags.directory, stored.manifest, state.targets(), {.direct = false}).status());
    read += proc_number("io", "rchar") - before;
    needed += state.total();
    if (!state.holds_known()) return internal_error("other bytes were loaded than were saved");
  }
  return json{{"needed_bytes", needed}, {"rchar", read}, {"seconds", seconds_since(begin)}};
}

// Seconds to find what to read of one tensor saved in `pieces` row shards and wanted in one fewer.
// The manifest names a segment that is not there, so the load ends where reading would begin.
Result<json> plan(const Flags& flags) {
  constexpr int64_t kRowsAPiece = 12;
  constexpr int64_t kColumns = 8;
  const int64_t rows = flags.pieces * kRowsAPiece;
  ManifestTensor tensor{.name = "w", .dtype = DType::kF32, .shape = {rows, kColumns}, .pieces = {}};
  for (int64_t i = 0; i < flags.pieces; ++i) {
    tensor.pieces.push_back(
        {.segment = 0, .box = {{i * kRowsAPiece, 0}, {kRowsAPiece, kColumns}}, .digest = {}});
  }
  Manifest manifest;
  manifest.segments.push_back(
      {.file = "none", .rank = Rank{0}, .byte_count = 0, .footer_digest = {}});
  manifest.tensors.push_back(std::move(tensor));
  std::vector<std::byte> bytes(rows * kColumns * dtype_bytes(DType::kF32));
  std::vector<LoadTarget> targets;
  const int64_t shards = flags.pieces - 1;
  for (int64_t i = 0; i < shards; ++i) {
    TensorSlice slice = whole_tensor("w", DType::kF32, {rows, kColumns});
    const int64_t begin = rows * i / shards;
    const int64_t end = rows * (i + 1) / shards;
    slice.box = {{begin, 0}, {end - begin, kColumns}};
    const uint64_t row_bytes = kColumns * dtype_bytes(DType::kF32);
    targets.push_back(
        {slice, MutableBytes(bytes).subspan(begin * row_bytes, (end - begin) * row_bytes), {}});
  }
  const int64_t begin = monotonic_ns();
  const Status ended = load_slices(flags.directory, manifest, targets).status();
  const double seconds = seconds_since(begin);
  if (ended.code() != Code::kDataLoss) return internal_error("planned: " + ended.to_string());
  return json{{"seconds", seconds}};
}

// Flips one bit of payload at a time; says how many of those the loader noticed.
Result<json> damage(const Flags& flags) {
  {
    const State state(flags, 0, 1, true);
    PENSTOCK_TRY_ASSIGN(CheckpointStore store,
                        CheckpointStore::open(flags.directory, kJob, nullptr));
    PENSTOCK_TRY_ASSIGN(const SegmentSummary segment,
                        write_segment(flags.directory, identity_of(0, 1), state.sources()));
    PENSTOCK_TRY(commit(store, 1, {segment}));
  }
  PENSTOCK_TRY_ASSIGN(const StoredManifest stored, newest_manifest(flags.directory));
  const Path path = Path(flags.directory) / stored.manifest.segments.front().file;
  PENSTOCK_TRY_ASSIGN(const SegmentReader reader, SegmentReader::open(path));
  PENSTOCK_TRY_ASSIGN(const FileDescriptor file, open_file(path, O_RDWR));
  State state(flags, 0, 1, false);
  Random random(1, 0);
  int64_t detected = 0;
  for (int64_t i = 0; i < flags.places; ++i) {
    const SegmentSlice& slice = reader.slices()[random.below(reader.slices().size())];
    const uint64_t at = slice.file_offset + random.below(slice.byte_count);
    std::byte byte;
    PENSTOCK_TRY(read_at(file.get(), path, at, {&byte, 1}));
    const std::byte flipped = byte ^ std::byte(1 << random.below(8));
    PENSTOCK_TRY(write_at(file.get(), path, at, {&flipped, 1}));
    const auto loaded = load_slices(flags.directory, stored.manifest, state.targets());
    detected += !loaded.ok() && loaded.status().code() == Code::kDataLoss;
    PENSTOCK_TRY(write_at(file.get(), path, at, {&byte, 1}));
  }
  PENSTOCK_TRY(load_slices(flags.directory, stored.manifest, state.targets()).status());
  return json{{"places", flags.places}, {"detected", detected}};
}

}  // namespace
}  // namespace penstock

int main(int argc, char** argv) {
  using penstock::Flags;
  CLI::App app("Measures the checkpoint store; prints JSON.");
  Flags flags;
  app.add_option("--dir", flags.directory, "an existing folder for the store")
      ->required()
      ->check(CLI::ExistingDirectory);
  app.add_option("--tensors", flags.tensors, "of f32")->check(CLI::Range(1, 1 << 16));
  app.add_option("--rows", flags.rows, "of each")->check(CLI::Range(1, 1 << 20));
  app.add_option("--columns", flags.columns, "of each")->check(CLI::Range(1, 1 << 20));
  app.add_option("--saves", flags.saves, "how often")->check(CLI::Range(1, 1000));
  app.add_option("--from", flags.from, "ranks that save")->check(CLI::Range(1, 1024));
  app.add_option("--to", flags.to, "ranks that load")->check(CLI::Range(1, 1024));
  app.add_option("--pieces", flags.pieces, "of one tensor")->check(CLI::Range(2, 1 << 20));
  app.add_option("--places", flags.places, "bits to flip, one at a time");
  app.add_option("--step-ms", flags.step_ms, "compute of a training step");
  app.add_option("--steps", flags.steps, "quiet training steps")->check(CLI::Range(1, 1000));
  std::string what;
  using Measure = penstock::Result<nlohmann::json> (*)(const Flags&);
  const std::map<std::string, Measure> measures = {
      {"save", penstock::save}, {"stall", penstock::stall},     {"busy", penstock::busy},
      {"load", penstock::load}, {"reshard", penstock::reshard}, {"damage", penstock::damage},
      {"plan", penstock::plan}};
  app.add_option("what", what, "what to measure")->required()->check(CLI::IsMember(measures));
  CLI11_PARSE(app, argc, argv);
  penstock::start_logging("bench");
  const auto result = measures.at(what)(flags);
  if (result.ok()) {
    fmt::print("{}\n", result->dump());
    return 0;
  }
  std::fprintf(stderr, "checkpoint_bench: %s\n", result.status().to_string().c_str());
  return 1;
}
