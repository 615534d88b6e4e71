#include "comm/data/expert_exchange.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstring>
#include <optional>
#include <utility>

#include "comm/data/expert_route.h"
#include "comm/data/reserved_memory.h"

namespace penstock {
namespace {

enum class Step : uint8_t { kDispatch, kCombine, kCombineBackward, kDispatchBackward };
constexpr const char* kStepNames[] = {"dispatch", "combine", "combine backward",
                                      "dispatch backward"};
static_assert(std::size(kStepNames) == ExpertExchange::kTagBaseStep);

constexpr int32_t kGroupSizeMax = 4096;
constexpr int32_t kTopKMax = 256;

uint64_t float_bytes(uint64_t count) {
  return count * sizeof(float);
}

Status check_config(const Transport* transport, const ExpertExchangeConfig& config) {
  const auto members = std::ssize(config.group);
  if (members < 1 || members > kGroupSizeMax || config.group_index < 0 ||
      config.group_index >= members) {
    return invalid_argument(
        fmt::format("index {} in an expert group of {} ranks", config.group_index, members));
  }
  if (config.experts_per_rank < 1 || config.top_k < 1 || config.top_k > kTopKMax ||
      config.hidden_size < 1 || config.tokens_max < 1 || config.slot_count < 1 ||
      config.in_flight_max < 1) {
    return invalid_argument("every size of an expert exchange is at least 1, top_k at most 256");
  }
  if (int64_t{1} * members * config.tokens_max * config.top_k > INT32_MAX ||
      int64_t{1} * members * config.experts_per_rank > INT32_MAX) {
    return invalid_argument(
        "group · tokens_max · top_k and group · experts_per_rank must fit 31 bits");
  }
  if (members > 1 && (transport == nullptr ||
                      transport->rank() != config.group[static_cast<size_t>(config.group_index)])) {
    return invalid_argument("the group's entry at group_index is not the transport's rank");
  }
  return {};
}

}  // namespace

// A dispatch message is the rows, count × H f32, then their routing (ExpertShape::meta_words()
// each); the count follows from the length. Every other message's length is known to both sides:
// rows alone, or (dispatch backward) rows and one f32 per assignment. Messages of known length 0
// are not sent.
class ExpertExchange::Impl {
 public:
  Impl(Transport* transport, const ExpertExchangeConfig& config)
      : transport_(transport), config_(config), shape_(config) {}
  Status reserve();

  void start_dispatch(int32_t slot, Tag tag_base, std::span<const float> x,
                      std::span<const int32_t> expert, std::span<const float> weight,
                      std::span<const int32_t> seat_of);
  Result<DispatchedRows> finish_dispatch(int32_t slot);
  void start_combine(int32_t slot, std::span<const float> y);
  Status finish_combine(int32_t slot, std::span<float> out);
  void start_combine_backward(int32_t slot, std::span<const float> dy);
  Result<std::span<const float>> finish_combine_backward(int32_t slot);
  void start_dispatch_backward(int32_t slot, std::span<const float> dx_rows,
                               std::span<const float> d_weight);
  Status finish_dispatch_backward(int32_t slot, std::span<float> dx,
                                  std::span<float> d_topk_weight);
  DispatchedRows dispatched(int32_t slot) const;

 private:
  struct Slot {
    ExpertRoute route;
    Tag tag_base;
    float* rows = nullptr;                   // [rows_max, H] as dispatched
    float* d_rows = nullptr;                 // [rows_max, H] as combine backward brought them
    std::optional<Step> under_way;           // started, not finished
    int32_t staging = -1;                    // its message buffers; -1 in a group of one
    std::span<const float> borrowed;         // what the started step still reads: x, y or dx_rows
    std::span<const float> borrowed_weight;  // d_weight
  };
  // Message buffers of one step under way, one per member at a computed address.
  struct Staging {
    bool used = false;
    std::byte* outgoing = nullptr;  // [group, message_stride()]
    std::byte* incoming = nullptr;
    std::vector<TransferHandle> sends;     // by member
    std::vector<TransferHandle> receives;  // by member
  };

  bool is_self(int32_t member) const { return member == shape_.group_index; }
  uint64_t hidden() const { return static_cast<uint64_t>(shape_.hidden_size); }
  uint64_t record_words() const { return hidden() + shape_.meta_words(); }
  // No message has more per row than a dispatch.
  uint64_t message_bytes_max() const { return float_bytes(record_words() * shape_.tokens_max); }
  uint64_t message_stride() const { return ReservedMemory::Carver::round_up(message_bytes_max()); }

  Slot& slot_at(int32_t index);
  Slot& started(int32_t index, Step step);
  void begin(Slot& slot, Step step);
  Status end(Slot& slot, Status status);
  Staging& staging_of(Slot& slot) { return staging_[static_cast<size_t>(slot.staging)]; }
  float* outgoing(Slot& slot, int32_t member) {
    return reinterpret_cast<float*>(staging_of(slot).outgoing + message_stride() * member);
  }
  float* incoming(Slot& slot, int32_t member) {
    return reinterpret_cast<float*>(staging_of(slot).incoming + message_stride() * member);
  }
  void send(Slot& slot, int32_t member, const float* data, uint64_t count);
  void receive(Slot& slot, int32_t member, float* into, uint64_t count_max);
  Result<uint64_t> wait_receive(Slot& slot, int32_t member);
  Status expect_receive(Slot& slot, int32_t member, uint64_t count);
  Status wait_sends(Slot& slot);

  Status accept_rows(Slot& slot, int32_t member);
  void gather(const Slot& slot, int32_t member, const float* from, float* rows) const;
  void scatter_add(const Slot& slot, int32_t member, const float* rows, std::span<float> to) const;

  Transport* const transport_;
  const ExpertExchangeConfig config_;
  const ExpertShape shape_;
  ReservedMemory memory_;
  std::vector<Slot> slots_;
  std::vector<Staging> staging_;
};

Status ExpertExchange::Impl::reserve() {
  slots_.resize(static_cast<size_t>(config_.slot_count));
  staging_.resize(shape_.group_size > 1 ? static_cast<size_t>(config_.in_flight_max) : 0);
  const auto lay_out = [&](ReservedMemory::Carver& carver) {
    for (Slot& slot : slots_) {
      slot.route.lay_out(shape_, carver);
      carver.take(slot.rows, shape_.rows_max() * hidden());
      carver.take(slot.d_rows, shape_.rows_max() * hidden());
    }
    for (Staging& staging : staging_) {
      carver.take(staging.outgoing, message_stride() * shape_.group_size);
      carver.take(staging.incoming, message_stride() * shape_.group_size);
    }
  };
  ReservedMemory::Carver measure(nullptr);
  lay_out(measure);
  PENSTOCK_TRY_ASSIGN(memory_, ReservedMemory::reserve(measure.bytes()));
  ReservedMemory::Carver carver(memory_.data());
  lay_out(carver);
  for (Staging& staging : staging_) {
    staging.sends.resize(config_.group.size());
    staging.receives.resize(config_.group.size());
  }
  return {};
}

// ---- one step: begin, transfers, end

ExpertExchange::Impl::Slot& ExpertExchange::Impl::slot_at(int32_t index) {
  PENSTOCK_CHECK(index >= 0 && index < config_.slot_count, index);
  return slots_[static_cast<size_t>(index)];
}

ExpertExchange::Impl::Slot& ExpertExchange::Impl::started(int32_t index, Step step) {
  Slot& slot = slot_at(index);
  PENSTOCK_CHECK(slot.under_way == step, index, kStepNames[static_cast<size_t>(step)]);
  return slot;
}

void ExpertExchange::Impl::begin(Slot& slot, Step step) {
  PENSTOCK_CHECK(!slot.under_way, kStepNames[static_cast<size_t>(step)]);
  slot.under_way = step;
  if (staging_.empty()) return;
  const auto unused =
      std::find_if(staging_.begin(), staging_.end(), [](const Staging& s) { return !s.used; });
  PENSTOCK_CHECK(unused != staging_.end(), config_.in_flight_max);
  unused->used = true;
  slot.staging = static_cast<int32_t>(unused - staging_.begin());
}

// Ends a step. Its failure is final: the transport is aborted, so that nothing is left that writes
// into our buffers, and the transfers still under way are collected.
Status ExpertExchange::Impl::end(Slot& slot, Status status) {
  const Step step = *std::exchange(slot.under_way, {});
  slot.borrowed = slot.borrowed_weight = {};
  if (slot.staging < 0) return status;
  Staging& staging = staging_of(slot);
  if (!status.ok()) {
    transport_->abort();
    for (auto* handles : {&staging.sends, &staging.receives}) {
      for (TransferHandle& handle : *handles) {
        if (handle.valid()) (void)transport_->wait(std::exchange(handle, {}));
      }
    }
    status = status.with_context(fmt::format(
        "expert {}, tag base {:#x}", kStepNames[static_cast<size_t>(step)], slot.tag_base.value));
  }
  staging.used = false;
  slot.staging = -1;
  return status;
}

void ExpertExchange::Impl::send(Slot& slot, int32_t member, const float* data, uint64_t count) {
  const Tag tag{slot.tag_base.value + static_cast<uint64_t>(*slot.under_way)};
  staging_of(slot).sends[static_cast<size_t>(member)] = transport_->send(
      config_.group[static_cast<size_t>(member)], tag, std::as_bytes(std::span(data, count)));
}

void ExpertExchange::Impl::receive(Slot& slot, int32_t member, float* into, uint64_t count_max) {
  const Tag tag{slot.tag_base.value + static_cast<uint64_t>(*slot.under_way)};
  staging_of(slot).receives[static_cast<size_t>(member)] =
      transport_->receive(config_.group[static_cast<size_t>(member)], tag,
                          std::as_writable_bytes(std::span(into, count_max)));
}

Result<uint64_t> ExpertExchange::Impl::wait_receive(Slot& slot, int32_t member) {
  return transport_->wait(
      std::exchange(staging_of(slot).receives[static_cast<size_t>(member)], {}));
}

Status ExpertExchange::Impl::expect_receive(Slot& slot, int32_t member, uint64_t count) {
  if (count == 0) return {};
  PENSTOCK_TRY_ASSIGN(const uint64_t bytes, wait_receive(slot, member));
  if (bytes == float_bytes(count)) return {};
  return data_loss(fmt::format("rank {} sent {} bytes where {} were due",
                               config_.group[static_cast<size_t>(member)], bytes,
                               float_bytes(count)));
}

Status ExpertExchange::Impl::wait_sends(Slot& slot) {
  if (slot.staging < 0) return {};
  for (TransferHandle& handle : staging_of(slot).sends) {
    if (!handle.valid()) continue;
    const Result<uint64_t> sent = transport_->wait(std::exchange(handle, {}));
    if (!sent.ok()) return sent.status();
  }
  return {};
}

// Copies the rows of the tokens sent to `member` out of a [T, H] array.
void ExpertExchange::Impl::gather(const Slot& slot, int32_t member, const float* from,
                                  float* rows) const {
  for (const int32_t token : slot.route.sent_tokens(shape_, member)) {
    std::memcpy(rows, from + hidden() * token, float_bytes(hidden()));
    rows += hidden();
  }
}

// Adds rows that came back from `member` to a [T, H] array.
void ExpertExchange::Impl::scatter_add(const Slot& slot, int32_t member, const float* rows,
                                       std::span<float> to) const {
  for (const int32_t token : slot.route.sent_tokens(shape_, member)) {
    float* const row = to.data() + hidden() * token;
    for (int32_t i = 0; i < shape_.hidden_size; ++i) row[i] += rows[i];
    rows += hidden();
  }
}

// ---- dispatch

void ExpertExchange::Impl::start_dispatch(int32_t slot_index, Tag tag_base,
                                          std::span<const float> x, std::span<const int32_t> expert,
                                          std::span<const float> weight,
                                          std::span<const int32_t> seat_of) {
  Slot& slot = slot_at(slot_index);
  const uint64_t tokens = x.size() / hidden();
  PENSTOCK_CHECK(x.size() == tokens * hidden(), x.size());
  PENSTOCK_CHECK(tokens <= static_cast<uint64_t>(shape_.tokens_max), tokens);
  PENSTOCK_CHECK(expert.size() == tokens * static_cast<uint64_t>(shape_.top_k), expert.size());
  PENSTOCK_CHECK(weight.size() == expert.size(), weight.size());
  PENSTOCK_CHECK(tag_base.value % kTagBaseStep == 0 && tag_base.value >> kTagBits == 0,
                 tag_base.value);
  begin(slot, Step::kDispatch);
  slot.tag_base = tag_base;
  slot.borrowed = x;
  for (int32_t member = 0; member < shape_.group_size; ++member) {
    if (is_self(member)) continue;
    receive(slot, member, incoming(slot, member), record_words() * shape_.tokens_max);
  }
  slot.route.set_tokens(shape_, expert, weight, seat_of);
  for (int32_t member = 0; member < shape_.group_size; ++member) {
    if (is_self(member)) continue;
    const auto count = static_cast<uint64_t>(slot.route.sent_count(member));
    float* const message = outgoing(slot, member);
    gather(slot, member, x.data(), message);
    slot.route.write_meta(shape_, member, reinterpret_cast<int32_t*>(message + count * hidden()));
    send(slot, member, message, count * record_words());
  }
}

Result<DispatchedRows> ExpertExchange::Impl::finish_dispatch(int32_t slot_index) {
  Slot& slot = started(slot_index, Step::kDispatch);
  slot.route.begin_rows();
  Status status;
  for (int32_t member = 0; member < shape_.group_size && status.ok(); ++member) {
    if (is_self(member)) {
      gather(slot, member, slot.borrowed.data(), slot.rows + hidden() * slot.route.row_count());
      slot.route.accept_own(shape_);
    } else {
      status = accept_rows(slot, member);
    }
  }
  if (status.ok()) status = wait_sends(slot);
  PENSTOCK_TRY(end(slot, std::move(status)));
  slot.route.sort_by_expert(shape_);
  return dispatched(slot_index);
}

Status ExpertExchange::Impl::accept_rows(Slot& slot, int32_t member) {
  PENSTOCK_TRY_ASSIGN(const uint64_t bytes, wait_receive(slot, member));
  const uint64_t count = bytes / float_bytes(record_words());
  if (bytes != float_bytes(count * record_words())) {
    return data_loss(fmt::format("rank {} sent {} bytes, not a multiple of {}",
                                 config_.group[static_cast<size_t>(member)], bytes,
                                 float_bytes(record_words())));
  }
  const float* const message = incoming(slot, member);
  std::memcpy(slot.rows + hidden() * slot.route.row_count(), message,
              float_bytes(count * hidden()));
  const Status accepted = slot.route.accept_meta(
      shape_, member, reinterpret_cast<const int32_t*>(message + count * hidden()), count);
  if (accepted.ok()) return accepted;
  return accepted.with_context(fmt::format("rank {}", config_.group[static_cast<size_t>(member)]));
}

DispatchedRows ExpertExchange::Impl::dispatched(int32_t slot_index) const {
  PENSTOCK_CHECK(slot_index >= 0 && slot_index < config_.slot_count, slot_index);
  const Slot& slot = slots_[static_cast<size_t>(slot_index)];
  DispatchedRows view = slot.route.view(shape_);
  view.rows = {slot.rows, hidden() * slot.route.row_count()};
  return view;
}

// ---- combine

void ExpertExchange::Impl::start_combine(int32_t slot_index, std::span<const float> y) {
  Slot& slot = slot_at(slot_index);
  PENSTOCK_CHECK(y.size() == hidden() * slot.route.row_count(), y.size());
  begin(slot, Step::kCombine);
  slot.borrowed = y;
  for (int32_t member = 0; member < shape_.group_size; ++member) {
    if (is_self(member)) continue;
    if (const int32_t due = slot.route.sent_count(member); due > 0) {
      receive(slot, member, incoming(slot, member), hidden() * due);
    }
    // Rows are ordered by source, so those that go back to one rank are contiguous: nothing to
    // pack.
    if (const int32_t count = slot.route.rows_from(member); count > 0) {
      send(slot, member, y.data() + hidden() * slot.route.first_row(member), hidden() * count);
    }
  }
}

Status ExpertExchange::Impl::finish_combine(int32_t slot_index, std::span<float> out) {
  Slot& slot = started(slot_index, Step::kCombine);
  PENSTOCK_CHECK(out.size() == hidden() * slot.route.token_count(), out.size());
  Status status;
  for (int32_t member = 0; member < shape_.group_size && status.ok(); ++member) {
    const float* partial = slot.borrowed.data() + hidden() * slot.route.first_row(member);
    if (!is_self(member)) {
      status = expect_receive(slot, member, hidden() * slot.route.sent_count(member));
      partial = incoming(slot, member);
    }
    if (status.ok()) scatter_add(slot, member, partial, out);
  }
  if (status.ok()) status = wait_sends(slot);
  return end(slot, std::move(status));
}

void ExpertExchange::Impl::start_combine_backward(int32_t slot_index, std::span<const float> dy) {
  Slot& slot = slot_at(slot_index);
  PENSTOCK_CHECK(dy.size() == hidden() * slot.route.token_count(), dy.size());
  begin(slot, Step::kCombineBackward);
  for (int32_t member = 0; member < shape_.group_size; ++member) {
    float* const into = slot.d_rows + hidden() * slot.route.first_row(member);
    if (is_self(member)) {
      gather(slot, member, dy.data(), into);
      continue;
    }
    if (const int32_t due = slot.route.rows_from(member); due > 0) {
      receive(slot, member, into, hidden() * due);
    }
    if (const int32_t count = slot.route.sent_count(member); count > 0) {
      gather(slot, member, dy.data(), outgoing(slot, member));
      send(slot, member, outgoing(slot, member), hidden() * count);
    }
  }
}

Result<std::span<const float>> ExpertExchange::Impl::finish_combine_backward(int32_t slot_index) {
  Slot& slot = started(slot_index, Step::kCombineBackward);
  Status status;
  for (int32_t member = 0; member < shape_.group_size && status.ok(); ++member) {
    if (is_self(member)) continue;
    status = expect_receive(slot, member, hidden() * slot.route.rows_from(member));
  }
  if (status.ok()) status = wait_sends(slot);
  PENSTOCK_TRY(end(slot, std::move(status)));
  return std::span<const float>(slot.d_rows, hidden() * slot.route.row_count());
}

// ---- dispatch backward

void ExpertExchange::Impl::start_dispatch_backward(int32_t slot_index,
                                                   std::span<const float> dx_rows,
                                                   std::span<const float> d_weight) {
  Slot& slot = slot_at(slot_index);
  PENSTOCK_CHECK(dx_rows.size() == hidden() * slot.route.row_count(), dx_rows.size());
  PENSTOCK_CHECK(std::ssize(d_weight) == slot.route.assignment_count(), d_weight.size());
  begin(slot, Step::kDispatchBackward);
  slot.borrowed = dx_rows;
  slot.borrowed_weight = d_weight;
  for (int32_t member = 0; member < shape_.group_size; ++member) {
    if (is_self(member)) continue;
    if (const int32_t due = slot.route.sent_count(member); due > 0) {
      receive(slot, member, incoming(slot, member),
              hidden() * due + static_cast<uint64_t>(slot.route.sent_assignments(member)));
    }
    if (const int32_t count = slot.route.rows_from(member); count > 0) {
      const auto weights = static_cast<uint64_t>(slot.route.assignments_from(member));
      float* const message = outgoing(slot, member);
      std::memcpy(message, dx_rows.data() + hidden() * slot.route.first_row(member),
                  float_bytes(hidden() * count));
      std::memcpy(message + hidden() * count, d_weight.data() + slot.route.first_assignment(member),
                  float_bytes(weights));
      send(slot, member, message, hidden() * count + weights);
    }
  }
}

Status ExpertExchange::Impl::finish_dispatch_backward(int32_t slot_index, std::span<float> dx,
                                                      std::span<float> d_topk_weight) {
  Slot& slot = started(slot_index, Step::kDispatchBackward);
  const ExpertRoute& route = slot.route;
  PENSTOCK_CHECK(dx.size() == hidden() * route.token_count(), dx.size());
  PENSTOCK_CHECK(std::ssize(d_topk_weight) == int64_t{1} * route.token_count() * shape_.top_k,
                 d_topk_weight.size());
  std::fill(d_topk_weight.begin(), d_topk_weight.end(), 0.0f);
  Status status;
  for (int32_t member = 0; member < shape_.group_size && status.ok(); ++member) {
    const float* rows = slot.borrowed.data() + hidden() * route.first_row(member);
    const float* weights = slot.borrowed_weight.data() + route.first_assignment(member);
    if (!is_self(member)) {
      const uint64_t row_values = hidden() * route.sent_count(member);
      status = expect_receive(slot, member,
                              row_values + static_cast<uint64_t>(route.sent_assignments(member)));
      rows = incoming(slot, member);
      weights = rows + row_values;
    }
    if (!status.ok()) break;
    scatter_add(slot, member, rows, dx);
    route.place_weight_gradients(shape_, member, weights, d_topk_weight);
  }
  if (status.ok()) status = wait_sends(slot);
  return end(slot, std::move(status));
}

// ---- the public face

ExpertExchange::ExpertExchange(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
ExpertExchange::~ExpertExchange() = default;

Result<std::unique_ptr<ExpertExchange>> ExpertExchange::create(Transport* transport,
                                                               const ExpertExchangeConfig& config) {
  PENSTOCK_TRY(check_config(transport, config));
  auto impl = std::make_unique<Impl>(transport, config);
  PENSTOCK_TRY(impl->reserve());
  return std::make_unique<ExpertExchange>(std::move(impl));
}

void ExpertExchange::start_dispatch(int32_t slot, Tag tag_base, std::span<const float> x,
                                    std::span<const int32_t> expert, std::span<const float> weight,
                                    std::span<const int32_t> seat_of) {
  impl_->start_dispatch(slot, tag_base, x, expert, weight, seat_of);
}
Result<DispatchedRows> ExpertExchange::finish_dispatch(int32_t slot) {
  return impl_->finish_dispatch(slot);
}
void ExpertExchange::start_combine(int32_t slot, std::span<const float> y) {
  impl_->start_combine(slot, y);
}
Status ExpertExchange::finish_combine(int32_t slot, std::span<float> out) {
  return impl_->finish_combine(slot, out);
}
void ExpertExchange::start_combine_backward(int32_t slot, std::span<const float> dy) {
  impl_->start_combine_backward(slot, dy);
}
Result<std::span<const float>> ExpertExchange::finish_combine_backward(int32_t slot) {
  return impl_->finish_combine_backward(slot);
}
void ExpertExchange::start_dispatch_backward(int32_t slot, std::span<const float> dx_rows,
                                             std::span<const float> d_weight) {
  impl_->start_dispatch_backward(slot, dx_rows, d_weight);
}
Status ExpertExchange::finish_dispatch_backward(int32_t slot, std::span<float> dx,
                                                std::span<float> d_topk_weight) {
  return impl_->finish_dispatch_backward(slot, dx, d_topk_weight);
}
DispatchedRows ExpertExchange::dispatched(int32_t slot) const {
  return impl_->dispatched(slot);
}

}  // namespace penstock
