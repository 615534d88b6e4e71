#include "ops/cli/trace_document.h"

#include <fmt/format.h>
#include <isa-l/igzip_lib.h>

#include <algorithm>
#include <iterator>
#include <map>
#include <nlohmann/json.hpp>
#include <set>

#include "ops/cli/text.h"

namespace penstock {
namespace {

struct Event {
  int64_t begin_ns = 0;
  int64_t end_ns = 0;
  std::string name;
  std::string_view category;
  const TraceRecord* record = nullptr;
};

// Tracks of one rank, by what is shown first.
enum Queue { kCompute, kForwardExchanges, kBackwardExchanges, kSends, kReceives, kCollectives };
constexpr std::string_view kQueueNames[] = {"compute", "exchanges (F)", "exchanges (B)",
                                            "sends",   "receives",      "collectives"};
constexpr int kTracksPerQueue = 64;

Queue queue_of(const TraceRecord& record) {
  switch (record.kind) {
    case TraceKind::kExchange: {
      const auto op = static_cast<SubOp>(record.what);
      const bool forward = op == SubOp::kDispatch || op == SubOp::kCombine;
      return forward ? kForwardExchanges : kBackwardExchanges;
    }
    case TraceKind::kSend:
      return kSends;
    case TraceKind::kReceive:
      return kReceives;
    case TraceKind::kCollective:
      return kCollectives;
    case TraceKind::kStep:
    case TraceKind::kInstruction:
    case TraceKind::kSubOp:
      break;
  }
  return kCompute;
}

class ChromeWriter {
 public:
  explicit ChromeWriter(int64_t base_ns) : base_ns_(base_ns) {}

  void add(const Trace& trace) {
    metadata("process_name", trace.rank.value, 0, fmt::format("rank {}", trace.rank));
    std::map<int, std::vector<Event>> queues;
    for (const TraceRecord& record : trace.records) {
      const Queue queue = queue_of(record);
      const bool received = record.kind == TraceKind::kReceive;
      queues[queue].push_back({received ? record.wait_begin_ns : record.begin_ns,
                               received ? record.wait_end_ns : record.end_ns, trace_name(record),
                               kQueueNames[queue], &record});
      if (is_communication(record.kind) && record.wait_end_ns > record.wait_begin_ns) {
        queues[kCompute].push_back({record.wait_begin_ns, record.wait_end_ns,
                                    "wait " + trace_name(record), "wait", &record});
      }
    }
    for (auto& [queue, events] : queues) write_queue(trace, queue, events);
  }
  std::string finish() { return "{\"displayTimeUnit\":\"ms\",\"traceEvents\":[" + text_ + "]}\n"; }

 private:
  void metadata(std::string_view what, int32_t rank, int track, const std::string& name) {
    begin_item();
    fmt::format_to(std::back_inserter(text_),
                   R"({{"name":"{}","ph":"M","pid":{},"tid":{},"args":{{"name":"{}"}}}})", what,
                   rank, track, name);
  }
  void begin_item() { text_ += text_.empty() ? "\n" : ",\n"; }

  // Perfetto shows no events that overlap on one track without nesting: those of the compute thread
  // nest, of other queues each goes to the first track that is free.
  void write_queue(const Trace& trace, int queue, std::vector<Event>& events) {
    std::stable_sort(events.begin(), events.end(), [](const Event& a, const Event& b) {
      return a.begin_ns != b.begin_ns ? a.begin_ns < b.begin_ns : a.end_ns > b.end_ns;
    });
    std::vector<int64_t> free_at;
    for (const Event& event : events) {
      size_t track = 0;
      if (queue != kCompute) {
        while (track + 1 < kTracksPerQueue && track < free_at.size() &&
               free_at[track] > event.begin_ns) {
          ++track;
        }
      }
      if (track >= free_at.size()) {
        free_at.push_back(0);
        const std::string name = fmt::format("{}{}", kQueueNames[queue],
                                             track == 0 ? "" : fmt::format(" {}", track + 1));
        metadata("thread_name", trace.rank.value, tid(queue, track), name);
      }
      free_at[track] = std::max(event.end_ns, event.begin_ns);
      write(trace, tid(queue, track), event);
    }
  }
  static int tid(int queue, size_t track) {
    return queue * kTracksPerQueue + static_cast<int>(track);
  }

  void write(const Trace& trace, int track, const Event& event) {
    const TraceRecord& r = *event.record;
    const auto microseconds = [](int64_t ns) { return static_cast<double>(ns) * 1e-3; };
    begin_item();
    fmt::format_to(
        std::back_inserter(text_),
        R"({{"name":"{}","cat":"{}","ph":"X","pid":{},"tid":{},"ts":{:.3f},"dur":{:.3f},"args":{{)"
        R"("step":{})",
        event.name, event.category, trace.rank, track,
        microseconds(event.begin_ns + trace.clock_offset_ns - base_ns_),
        microseconds(std::max<int64_t>(0, event.end_ns - event.begin_ns)), r.step);
    const auto argument = [&](std::string_view name, int64_t value, bool there) {
      if (there) fmt::format_to(std::back_inserter(text_), R"(,"{}":{})", name, value);
    };
    argument("microbatch", r.microbatch, r.microbatch >= 0);
    argument("direction", r.direction, r.microbatch >= 0);
    argument(r.kind == TraceKind::kCollective ? "stage" : "layer", r.layer, r.layer >= 0);
    argument("peer", r.peer, r.peer >= 0);
    argument("bytes", r.bytes, is_communication(r.kind));
    text_ += "}}";
  }

  const int64_t base_ns_;
  std::string text_;
};

struct Part {
  const char* name;  // as DeepSeek's table has them
  const char* key;
  double StepSummary::*seconds;
};
constexpr Part kParts[] = {{"F", "forward", &StepSummary::forward_seconds},
                           {"bubble", "bubble", &StepSummary::bubble_seconds},
                           {"B", "backward", &StepSummary::backward_seconds},
                           {"B(input)", "backward_input", &StepSummary::backward_input_seconds},
                           {"W", "weight", &StepSummary::weight_seconds},
                           {"F&B", "pair", &StepSummary::pair_seconds},
                           {"reduce", "reduce", &StepSummary::reduce_seconds},
                           {"optimizer", "optimizer", &StepSummary::optimizer_seconds},
                           {"other", "other", &StepSummary::other_seconds},
                           {"step", "step", &StepSummary::total_seconds}};

std::string milliseconds(double seconds) {
  return fmt::format("{:.3f}", seconds * 1e3);
}
std::string percent(double part, double whole) {
  return whole > 0.0 ? fmt::format("{:.1f}%", 100.0 * part / whole) : "-";
}

}  // namespace

std::string chrome_trace(std::span<const Trace> traces) {
  int64_t base_ns = INT64_MAX;
  for (const Trace& trace : traces) {
    for (const TraceRecord& record : trace.records) {
      base_ns = std::min(base_ns, record.begin_ns + trace.clock_offset_ns);
    }
  }
  ChromeWriter writer(base_ns);
  for (const Trace& trace : traces) writer.add(trace);
  return writer.finish();
}

Result<std::string> gzip(std::string_view text) {
  // What does not compress grows by 5 bytes per block of 65535; 64 for gzip's own.
  std::string out(text.size() + (text.size() / 65535 + 1) * 5 + 64, '\0');
  std::vector<uint8_t> level_buffer(ISAL_DEF_LVL1_DEFAULT);
  isal_zstream stream;
  isal_deflate_stateless_init(&stream);
  stream.gzip_flag = IGZIP_GZIP;
  stream.end_of_stream = 1;
  stream.flush = NO_FLUSH;
  stream.level = 1;
  stream.level_buf = level_buffer.data();
  stream.level_buf_size = static_cast<uint32_t>(level_buffer.size());
  stream.next_in = reinterpret_cast<uint8_t*>(const_cast<char*>(text.data()));
  stream.avail_in = static_cast<uint32_t>(text.size());
  stream.next_out = reinterpret_cast<uint8_t*>(out.data());
  stream.avail_out = static_cast<uint32_t>(out.size());
  if (text.size() > UINT32_MAX / 2) return resource_exhausted("more than 2 GiB of trace");
  if (isal_deflate_stateless(&stream) != COMP_OK) return internal_error("gzip failed");
  out.resize(stream.total_out);
  return out;
}

nlohmann::json summary_document(std::span<const StepSummary> summaries) {
  std::set<int32_t> steps, ranks;
  for (const StepSummary& summary : summaries) {
    steps.insert(summary.step);
    ranks.insert(summary.rank);
  }
  const StepSummary sum = total(summaries);
  const double each = 1.0 / static_cast<double>(summaries.size());
  nlohmann::json seconds = nlohmann::json::object();
  for (const Part& part : kParts) seconds[part.key] = sum.*part.seconds * each;
  nlohmann::json communications = nlohmann::json::array();
  for (const CommunicationSummary& c : sum.communications) {
    communications.push_back({{"name", c.name},
                              {"count", static_cast<double>(c.count) * each},
                              {"bytes", static_cast<double>(c.bytes) * each},
                              {"issue_seconds", c.issue_seconds * each},
                              {"flight_seconds", c.flight_seconds * each},
                              {"hidden_seconds", c.hidden_seconds * each},
                              {"exposed_seconds", c.exposed_seconds * each},
                              {"waited_seconds", c.waited_seconds * each}});
  }
  return {{"first_step", *steps.begin()},
          {"last_step", *steps.rbegin()},
          {"ranks", ranks.size()},
          {"seconds", std::move(seconds)},
          {"communications", std::move(communications)}};
}

std::vector<std::vector<std::string>> seconds_rows(const StepSummary& sum, size_t count) {
  std::vector<std::vector<std::string>> rows;
  for (const Part& part : kParts) {
    rows.push_back({part.name, milliseconds(sum.*part.seconds / static_cast<double>(count)),
                    percent(sum.*part.seconds, sum.total_seconds)});
  }
  return rows;
}

std::vector<std::vector<std::string>> communication_rows(const StepSummary& sum, size_t count) {
  std::vector<std::vector<std::string>> rows;
  const auto each = static_cast<double>(count);
  for (const CommunicationSummary& c : sum.communications) {
    rows.push_back({c.name, fmt::format("{:.1f}", static_cast<double>(c.count) / each),
                    format_bytes(static_cast<double>(c.bytes) / each),
                    milliseconds(c.issue_seconds / each), milliseconds(c.flight_seconds / each),
                    percent(c.hidden_seconds, c.flight_seconds),
                    milliseconds(c.exposed_seconds / each), milliseconds(c.waited_seconds / each)});
  }
  return rows;
}

}  // namespace penstock
