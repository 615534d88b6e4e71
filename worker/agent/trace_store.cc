#include "worker/agent/trace_store.h"

#include <fcntl.h>

#include <algorithm>
#include <array>
#include <charconv>
#include <optional>
#include <utility>
#include <vector>

#include "comm/run/trace_file.h"

namespace penstock {
namespace {

Result<uint64_t> number_of(const HttpRequest& request, std::string_view name,
                           std::optional<uint64_t> otherwise = std::nullopt) {
  const std::optional<std::string_view> text = request.parameter(name);
  if (!text && otherwise) return *otherwise;
  uint64_t value = 0;
  if (text) {
    const char* const end = text->data() + text->size();
    const auto [parsed, error] = std::from_chars(text->data(), end, value);
    if (error == std::errc() && parsed == end && value <= INT32_MAX) return value;
  }
  return invalid_argument(fmt::format("{} must be a whole number below 2^31", name));
}

// A rank may be writing the file at the time.
Result<Trace> read_trace(const Path& path) {
  constexpr uint64_t kBytesMax = kTraceRecordsOffset + kTraceRecordsMax * sizeof(TraceRecord);
  PENSTOCK_TRY_ASSIGN(const FileDescriptor file, open_file(path, O_RDONLY));
  PENSTOCK_TRY_ASSIGN(const std::string bytes, read_file(path, kBytesMax));
  std::array<std::byte, kTraceRecordsOffset> header_after;
  PENSTOCK_TRY(read_at(file.get(), path, 0, header_after));
  Result<Trace> trace = decode_trace(as_bytes(bytes), trace_records_added(header_after));
  if (trace.ok()) return trace;
  return trace.status().with_context(path.string());
}

}  // namespace

TraceStore::TraceStore(Path folder, size_t device_count)
    : folder_(std::move(folder)), files_max_(std::max(kFilesMin, 2 * device_count)) {}

Path TraceStore::file_of(uint64_t job, uint64_t rank) const {
  return folder_ / fmt::format("job-{}.rank-{}.trace", job, rank);
}

Result<Path> TraceStore::make_room(JobId job, Rank rank) const {
  PENSTOCK_TRY(create_directories_durably(folder_));
  std::vector<std::pair<std::filesystem::file_time_type, Path>> files;
  std::error_code error;
  for (const auto& entry : std::filesystem::directory_iterator(folder_, error)) {
    files.emplace_back(entry.last_write_time(error), entry.path());
  }
  std::sort(files.begin(), files.end());
  for (size_t i = 0; i + files_max_ <= files.size(); ++i) {
    std::filesystem::remove(files[i].second, error);
  }
  return file_of(job.value, static_cast<uint64_t>(rank.value));
}

HttpResponse TraceStore::list(uint64_t job) const {
  std::string items;
  std::error_code error;
  const std::string prefix = fmt::format("job-{}.", job);
  for (const auto& entry : std::filesystem::directory_iterator(folder_, error)) {
    if (!entry.path().filename().string().starts_with(prefix)) continue;
    const Result<Trace> trace = read_trace(entry.path());
    if (!trace.ok()) continue;  // made this moment, or of another version
    items += fmt::format(R"({}{{"rank": {}, "epoch": {}, "first_step": {}, "last_step": {}}})",
                         items.empty() ? "" : ", ", trace->rank, trace->epoch, trace->steps.first,
                         trace->steps.last);
  }
  return json_response(fmt::format("{{\"items\": [{}]}}\n", items));
}

HttpResponse TraceStore::answer(const HttpRequest& request) const {
  const Result<uint64_t> job = number_of(request, "job");
  if (!job.ok()) return error_response(job.status());
  if (request.path == "/traces") return list(*job);
  const Result<uint64_t> rank = number_of(request, "rank");
  if (!rank.ok()) return error_response(rank.status());
  const Result<uint64_t> first = number_of(request, "first", 1);
  if (!first.ok()) return error_response(first.status());
  const Result<uint64_t> last = number_of(request, "last", INT32_MAX);
  if (!last.ok()) return error_response(last.status());
  const Result<Trace> trace = read_trace(file_of(*job, *rank));
  if (!trace.ok()) return error_response(trace.status());
  return {
      .status = 200,
      .content_type = "application/octet-stream",
      .body = encode_trace(*trace, {static_cast<int32_t>(*first), static_cast<int32_t>(*last)})};
}

}  // namespace penstock
