#include "comm/run/trace_summary.h"

#include <algorithm>
#include <map>

#include "comm/base/check.h"

namespace penstock {
namespace {

struct Span {
  int64_t begin = 0;
  int64_t end = 0;
};

double seconds(int64_t nanoseconds) {
  return static_cast<double>(nanoseconds) * 1e-9;
}

bool was_waited_for(const TraceRecord& record) {
  return record.wait_end_ns > record.wait_begin_ns;
}

// When the compute thread computed: its sub-operations and optimizer, without its waits. Ascending
// and disjoint, because one thread does one thing at a time.
std::vector<Span> compute_spans(std::span<const TraceRecord* const> records) {
  std::vector<Span> busy, waits;
  for (const TraceRecord* record : records) {
    const bool optimizer = record->kind == TraceKind::kInstruction &&
                           static_cast<Op>(record->what) == Op::kOptimizerStep;
    if (record->kind == TraceKind::kSubOp || optimizer) {
      busy.push_back({record->begin_ns, record->end_ns});
    }
    if (is_communication(record->kind) && was_waited_for(*record)) {
      waits.push_back({record->wait_begin_ns, record->wait_end_ns});
    }
  }
  const auto by_begin = [](const Span& a, const Span& b) { return a.begin < b.begin; };
  std::sort(busy.begin(), busy.end(), by_begin);
  std::sort(waits.begin(), waits.end(), by_begin);
  std::vector<Span> result;
  size_t next = 0;
  for (Span span : busy) {
    while (next < waits.size() && waits[next].end <= span.begin) ++next;
    for (size_t w = next; w < waits.size() && waits[w].begin < span.end; ++w) {
      if (waits[w].begin > span.begin) result.push_back({span.begin, waits[w].begin});
      span.begin = std::max(span.begin, waits[w].end);
    }
    if (span.begin < span.end) result.push_back(span);
  }
  return result;
}

int64_t overlap(const std::vector<Span>& spans, Span with) {
  auto at = std::lower_bound(spans.begin(), spans.end(), with.begin,
                             [](const Span& span, int64_t begin) { return span.end <= begin; });
  int64_t sum = 0;
  for (; at != spans.end() && at->begin < with.end; ++at) {
    sum += std::min(at->end, with.end) - std::max(at->begin, with.begin);
  }
  return sum;
}

void add_instruction(const TraceRecord& record, StepSummary& summary) {
  const double span = seconds(record.end_ns - record.begin_ns);
  switch (static_cast<Op>(record.what)) {
    case Op::kForward:
      summary.forward_seconds += span;
      return;
    case Op::kBackward:
      summary.backward_seconds += span;
      return;
    case Op::kBackwardInput:
      summary.backward_input_seconds += span;
      return;
    case Op::kBackwardWeight:
      summary.weight_seconds += span;
      return;
    case Op::kOverlapped:
      summary.pair_seconds += span;
      return;
    case Op::kReduceGradients:
      summary.reduce_seconds += span;
      return;
    case Op::kOptimizerStep:
      summary.optimizer_seconds += span;
      return;
    default:
      return;
  }
}

void add_communication(const TraceRecord& record, const std::vector<Span>& compute,
                       CommunicationSummary& summary) {
  const int64_t waited =
      was_waited_for(record) ? record.wait_end_ns - record.wait_begin_ns : int64_t{0};
  Span flight{record.begin_ns, std::max(record.begin_ns, record.end_ns)};
  if (record.kind == TraceKind::kReceive) flight = {record.wait_begin_ns, record.wait_end_ns};
  const int64_t in_flight = flight.end - flight.begin;
  const int64_t hidden = overlap(compute, flight);
  ++summary.count;
  summary.bytes += record.bytes;
  summary.flight_seconds += seconds(in_flight);
  summary.hidden_seconds += seconds(hidden);
  summary.exposed_seconds += seconds(in_flight - hidden);
  summary.waited_seconds += seconds(waited);
}

StepSummary summarize_step(int32_t rank, const TraceRecord& step,
                           std::span<const TraceRecord* const> records) {
  StepSummary summary{.rank = rank, .step = step.step};
  summary.total_seconds = seconds(step.end_ns - step.begin_ns);
  const std::vector<Span> compute = compute_spans(records);
  std::map<std::string, CommunicationSummary> by_name;
  for (const TraceRecord* record : records) {
    if (record->kind == TraceKind::kInstruction) add_instruction(*record, summary);
    if (record->kind == TraceKind::kSubOp && record->what < kSubOpCount &&
        is_exchange(static_cast<SubOp>(record->what))) {
      by_name[trace_name(*record)].issue_seconds += seconds(record->end_ns - record->begin_ns);
    }
    if (!is_communication(record->kind)) continue;
    add_communication(*record, compute, by_name[trace_name(*record)]);
    const bool pipeline = record->kind == TraceKind::kSend || record->kind == TraceKind::kReceive;
    if (pipeline && was_waited_for(*record)) {
      summary.bubble_seconds += seconds(record->wait_end_ns - record->wait_begin_ns);
    }
  }
  for (auto& [name, communication] : by_name) {
    if (communication.count == 0) continue;  // the exchanges of a group of one
    communication.name = name;
    summary.communications.push_back(communication);
  }
  summary.other_seconds = summary.total_seconds - summary.forward_seconds -
                          summary.backward_seconds - summary.backward_input_seconds -
                          summary.weight_seconds - summary.pair_seconds - summary.reduce_seconds -
                          summary.optimizer_seconds - summary.bubble_seconds;
  return summary;
}

}  // namespace

std::vector<StepSummary> summarize(int32_t rank, std::span<const TraceRecord> records) {
  std::map<int32_t, std::vector<const TraceRecord*>> by_step;
  std::map<int32_t, const TraceRecord*> steps;
  for (const TraceRecord& record : records) {
    by_step[record.step].push_back(&record);
    if (record.kind == TraceKind::kStep) steps[record.step] = &record;
  }
  std::vector<StepSummary> summaries;
  for (const auto& [number, step] : steps) {
    summaries.push_back(summarize_step(rank, *step, by_step[number]));
  }
  return summaries;
}

StepSummary total(std::span<const StepSummary> summaries) {
  PENSTOCK_CHECK(!summaries.empty());
  StepSummary sum{.rank = summaries.front().rank, .step = summaries.front().step};
  std::map<std::string, CommunicationSummary> by_name;
  for (const StepSummary& summary : summaries) {
    for (const auto member : {&StepSummary::total_seconds, &StepSummary::forward_seconds,
                              &StepSummary::backward_seconds, &StepSummary::backward_input_seconds,
                              &StepSummary::weight_seconds, &StepSummary::pair_seconds,
                              &StepSummary::reduce_seconds, &StepSummary::optimizer_seconds,
                              &StepSummary::bubble_seconds, &StepSummary::other_seconds}) {
      sum.*member += summary.*member;
    }
    for (const CommunicationSummary& from : summary.communications) {
      CommunicationSummary& into = by_name[from.name];
      into.name = from.name;
      into.count += from.count;
      into.bytes += from.bytes;
      for (const auto member :
           {&CommunicationSummary::issue_seconds, &CommunicationSummary::flight_seconds,
            &CommunicationSummary::hidden_seconds, &CommunicationSummary::exposed_seconds,
            &CommunicationSummary::waited_seconds}) {
        into.*member += from.*member;
      }
    }
  }
  for (const auto& [name, communication] : by_name) sum.communications.push_back(communication);
  return sum;
}

}  // namespace penstock
