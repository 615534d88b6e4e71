// Copies of ranks' state: taken while ranks train, kept by two daemons, and gone on from.
#include <gtest/gtest.h>
#include <poll.h>
#include <pthread.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <unistd.h>

#include <atomic>
#include <condition_variable>
#include <ctime>
#include <thread>

#include "comm/base/clock.h"
#include "comm/control/pulse.h"
#include "tests/support/cluster.h"
#include "tests/worker/held_memory.h"
#include "worker/agent/state_holders.h"
#include "worker/agent/state_mirror.h"
#include "worker/rank/state_fetch.h"

namespace penstock {
namespace {

constexpr Epoch kEpoch{1};
constexpr uint64_t kStateBytes = (3 << 20) + 17;
constexpr int kPatienceMs = static_cast<int>(std::chrono::milliseconds(kPatience).count());

// A rank's memory, and the rank: it trains when it is told to.
class SimpleRank {
 public:
  SimpleRank(StateHolders& holders, int32_t rank, Epoch epoch = kEpoch,
             uint64_t bytes = kStateBytes)
      : memory_(*StateMemory::make(identity(rank), bytes,
                                   *holders.hold(kJob, epoch, Rank{rank}, false))),
        bytes_(bytes) {}
  // Through that step; its state is a value that tells.
  void train(int64_t step) {
    while (step_ < step) {
      ++step_;
      write_step(memory_, bytes_, step_, value(step_));
    }
  }
  static std::byte value(int64_t step) { return static_cast<std::byte>(step * 7 + 1); }

 private:
  StateMemory memory_;
  const uint64_t bytes_;
  int64_t step_ = 0;
};

// A daemon's part in it, with what it says.
struct Site {
  explicit Site(uint64_t bytes_max = 1 << 30)
      : mirror(bytes_max, [this](const RanksMirrored& outcome) {
          const std::lock_guard lock(mutex);
          said.push_back(outcome);
          speaks.notify_all();
        }) {
    EXPECT_TRUE(mirror.listen("tcp://127.0.0.1:1").ok());
  }
  StatePlace place() const { return {mirror.address(), mirror.key()}; }
  // The next thing that it says.
  RanksMirrored next() {
    std::unique_lock lock(mutex);
    if (speaks.wait_for(lock, kPatience, [this] { return said.size() > heard; })) {
      return said[heard++];
    }
    ADD_FAILURE() << "it says nothing";
    return {};
  }
  bool has_said_nothing() {
    const std::lock_guard lock(mutex);
    return said.empty();
  }
  void order(const MirrorRanks& order) { mirror.order(order, holders.share(order)); }

  StateHolders holders;
  std::mutex mutex;
  std::condition_variable speaks;
  std::vector<RanksMirrored> said;
  size_t heard = 0;
  StateMirror mirror;
};

// In the place of another daemon: it answers what the test says.
class FakeBuddy {
 public:
  FakeBuddy() {
    const Result<SocketAddress> reached = resolve_endpoint("tcp://127.0.0.1:1");
    EXPECT_TRUE(reached.ok());
    const Result<FileDescriptor> socket = connect_datagrams(*reached);
    EXPECT_TRUE(socket.ok());
    Result<FileDescriptor> port = listen_beside(*socket, &number_);
    EXPECT_TRUE(port.ok());
    port_ = std::move(port).value();
  }
  StatePlace place() const { return {fmt::format("127.0.0.1:{}", number_), {1, 2}}; }
  // The next one that asks it, for anything.
  StateConnection caller() const {
    pollfd waiting = {port_.get(), POLLIN, 0};
    EXPECT_EQ(::poll(&waiting, 1, kPatienceMs), 1);
    const int socket = ::accept4(port_.get(), nullptr, nullptr, SOCK_NONBLOCK | SOCK_CLOEXEC);
    StateConnection caller{FileDescriptor(socket)};
    EXPECT_TRUE(caller.hear_request(kPatience).ok());
    return caller;
  }
  // The same, and its state is taken from it.
  StateConnection sender() const {
    StateConnection asking = caller();
    std::vector<std::byte> state(kStateBytes);
    EXPECT_TRUE(asking.answer({}, kPatience).ok());
    EXPECT_TRUE(asking.receive_state(state, kPatience).ok());
    EXPECT_EQ(std::count(state.begin(), state.end(), SimpleRank::value(7)), kStateBytes);
    return asking;
  }

 private:
  FileDescriptor port_;
  uint16_t number_ = 0;
};

class MirrorTest : public ::testing::Test {
 protected:
  // Rank 0 is a's, and b keeps its copy.
  MirrorRanks order_of_a(int64_t step, int64_t kept = 0) {
    return {kJob, kEpoch, step, kept, int64_t{1} << 40, {{Rank{0}, b.place()}}, {}};
  }
  MirrorRanks order_of_b(int64_t step, int64_t kept = 0) {
    return {kJob, kEpoch, step, kept, int64_t{1} << 40, {}, {Rank{0}}};
  }
  MirrorRanks order_to(const FakeBuddy& buddy) {
    MirrorRanks order = order_of_a(7);
    order.send[0].to = buddy.place();
    return order;
  }
  // Begins to send step 7: the first block, and then none for days.
  void send_slowly(SimpleRank& rank) {
    rank.train(7);
    MirrorRanks slow = order_of_a(7);
    slow.bytes_per_second = 1;
    b.order(order_of_b(7));
    a.order(slow);
    EXPECT_TRUE(wait_until([&] { return a.mirror.bytes_sent() > 0; }, kPatience));
  }
  void mirror(SimpleRank& rank, int64_t step, int64_t kept = 0) {
    b.order(order_of_b(step, kept));
    rank.train(step);
    a.order(order_of_a(step, kept));
    const RanksMirrored outcome = a.next();
    EXPECT_EQ(outcome, (RanksMirrored{kJob, kEpoch, step, "", false})) << outcome.failure;
  }
  static bool lets_go_of_all(const Site& site) {
    return wait_until([&] { return site.mirror.byte_count() == 0; }, kPatience);
  }
  // What comes of a request that is not a rank's.
  static Code ask(const Site& site, StreamRequest request) {
    Result<StateConnection> caller = StateConnection::connect(site.mirror.address(), kPatience);
    EXPECT_TRUE(caller.ok());
    return caller->ask(request, kPatience).status().code();
  }
  StreamRequest fetch_request(int64_t step) {
    return {.kind = StreamKind::kFetch,
            .key = b.mirror.key(),
            .job = kJob,
            .epoch = kEpoch,
            .rank = Rank{0},
            .step = step};
  }
  StreamRequest store_request(int64_t step) {
    StreamRequest request = fetch_request(step);
    request.kind = StreamKind::kStore;
    request.byte_count = 100;
    return request;
  }

  Site a;
  Site b;
};

TEST_F(MirrorTest, ACopyIsHereAndThereAndANewRankGoesOnFromIt) {
  SimpleRank rank(a.holders, 0);
  mirror(rank, 7);
  const std::vector<HeldRank> copy = {{Rank{0}, {7}}};
  EXPECT_EQ(a.mirror.copies(kJob, kEpoch), copy);
  EXPECT_EQ(b.mirror.copies(kJob, kEpoch), copy);
  EXPECT_GE(a.mirror.bytes_sent(), kStateBytes);

  StartRank start = start_rank(2, 0);
  start.from_memory = true;
  start.restore_step = 7;
  start.state_from = b.place();
  const Path file = *b.holders.hold(kJob, {2}, Rank{0}, true);
  const Status fetched = fetch_state(start, file);
  ASSERT_TRUE(fetched.ok()) << fetched.to_string();
  const Result<StateMemory> memory = StateMemory::make(identity(0), kStateBytes, file);
  ASSERT_TRUE(memory.ok() && memory->find(7));
  const std::byte* const state = memory->generation(*memory->find(7));
  EXPECT_EQ(std::count(state, state + kStateBytes, SimpleRank::value(7)), kStateBytes);
  EXPECT_EQ(b.holders.held(kJob), copy);
}

TEST_F(MirrorTest, ARankThatGetsThereLaterIsWaitedFor) {
  SimpleRank rank(a.holders, 0);
  rank.train(3);
  b.order(order_of_b(5));
  a.order(order_of_a(5));
  rank.train(4);
  a.mirror.progressed({.job = kJob, .epoch = kEpoch, .rank = {0}, .step = 4});
  rank.train(5);
  a.mirror.progressed({.job = kJob, .epoch = kEpoch, .rank = {0}, .step = 5});
  EXPECT_EQ(a.next().failure, "");
  EXPECT_EQ(a.mirror.copies(kJob, kEpoch), (std::vector<HeldRank>{{Rank{0}, {5}}}));
}

TEST_F(MirrorTest, NothingIsSaidBeforeEveryRanksCopyIsThere) {
  SimpleRank first(a.holders, 0);
  SimpleRank second(a.holders, 1);
  MirrorRanks order = order_of_b(7);
  order.keep = {Rank{0}, Rank{1}};
  b.order(order);
  order = order_of_a(7);
  order.send.push_back({Rank{1}, b.place()});
  first.train(7);
  a.order(order);
  const auto first_is_there = [&] { return b.mirror.copies(kJob, kEpoch).size() == 1; };
  EXPECT_TRUE(wait_until(first_is_there, kPatience));
  EXPECT_TRUE(a.has_said_nothing());
  second.train(7);
  a.mirror.progressed({.job = kJob, .epoch = kEpoch, .rank = {1}, .step = 7});
  EXPECT_EQ(a.next(), (RanksMirrored{kJob, kEpoch, 7, "", false}));
  const std::vector<HeldRank> both = {{Rank{0}, {7}}, {Rank{1}, {7}}};
  EXPECT_EQ(b.mirror.copies(kJob, kEpoch), both);
}

TEST_F(MirrorTest, AnOverwrittenStepIsMissedAndSaidSo) {
  SimpleRank rank(a.holders, 0);
  rank.train(9);
  a.order(order_of_a(5));
  const RanksMirrored outcome = a.next();
  EXPECT_TRUE(outcome.missed);
  EXPECT_NE(outcome.failure, "");
  EXPECT_EQ(a.mirror.copies_missed(), 1u);
  EXPECT_TRUE(a.mirror.copies(kJob, kEpoch).empty());
  a.order(order_of_a(5));
  EXPECT_EQ(a.next(), outcome) << "asked again, it says it again";
}

// Each copy that is taken is of one step: every other time the rank overwrites generations as fast
// as it can meanwhile, and else all but the one that is copied, so that some copies are whole
// wherever training is the quicker of the two.
TEST_F(MirrorTest, NoCopyIsOfTwoSteps) {
  constexpr int64_t kNoBound = int64_t{1} << 60;
  SimpleRank rank(a.holders, 0);
  rank.train(2);
  std::atomic<int64_t> newest = 2;
  std::atomic<int64_t> bound = 2;
  std::atomic<bool> enough = false;
  const auto train_to = [&bound](int64_t step) {
    bound = step;
    bound.notify_one();
  };
  std::thread trainer([&] {
    while (!enough) {
      const int64_t last = bound;
      if (newest >= last) {
        bound.wait(last);
      } else {
        rank.train(newest + 1);
        ++newest;
      }
    }
  });
  StateCopies copies(1 << 30);
  const FileDescriptor memory = a.holders.share(kJob, kEpoch, Rank{0});
  const int64_t give_up_ns = monotonic_ns() + Duration(kPatience).count();
  int whole = 0;
  int missed = 0;
  int torn = 0;
  for (int turn = 0; (whole < 20 || missed < 20) && monotonic_ns() < give_up_ns; ++turn) {
    const bool races = turn % 2 == 1;
    const int64_t step = races ? newest - 1 : int64_t{newest};
    train_to(races ? kNoBound : step + 2);
    const auto copy = copy_held_state(memory, kJob, kEpoch, Rank{0}, step, copies);
    if (!copy.ok()) {
      missed += copy.status().code() == Code::kAborted;
      continue;
    }
    ++whole;
    const Bytes bytes = (*copy)->bytes();
    const auto count = std::count(bytes.begin(), bytes.end(), SimpleRank::value(step));
    torn += static_cast<uint64_t>(count) != kStateBytes;
  }
  enough = true;
  train_to(kNoBound + 1);
  trainer.join();
  EXPECT_GE(whole, 20);
  EXPECT_GE(missed, 20);
  EXPECT_EQ(torn, 0);
}

TEST_F(MirrorTest, WhatTheOrderDoesNotNameGoes) {
  SimpleRank rank(a.holders, 0);
  mirror(rank, 3);
  mirror(rank, 5, 3);
  const std::vector<HeldRank> both = {{Rank{0}, {3, 5}}};
  EXPECT_EQ(a.mirror.copies(kJob, kEpoch), both);
  EXPECT_EQ(b.mirror.copies(kJob, kEpoch), both);
  mirror(rank, 8, 5);
  EXPECT_EQ(b.mirror.copies(kJob, kEpoch), (std::vector<HeldRank>{{Rank{0}, {5, 8}}}));
  EXPECT_EQ(b.mirror.byte_count(), 2 * kStateBytes);
  b.mirror.drop_before(kJob, {2});
  EXPECT_EQ(b.mirror.byte_count(), 0u);
}

// Of a coordinator that was restarted, and does not know what is kept.
TEST_F(MirrorTest, AnOrderThatKnowsLessTakesNothingAwayAndIsToldSo) {
  SimpleRank rank(a.holders, 0);
  mirror(rank, 3);
  mirror(rank, 5, 3);
  const RanksMirrored outdated{kJob, kEpoch, 5, "", false, true, 3};
  for (const auto& [step, kept] : {std::pair<int64_t, int64_t>{4, 3}, {9, 0}, {5, 0}}) {
    a.order(order_of_a(step, kept));
    EXPECT_EQ(a.next(), outdated) << step;
    EXPECT_EQ(a.mirror.copies(kJob, kEpoch), (std::vector<HeldRank>{{Rank{0}, {3, 5}}}));
  }
  a.order(order_of_a(5, 3));
  EXPECT_EQ(a.next(), (RanksMirrored{kJob, kEpoch, 5, "", false})) << "it is done";
}

TEST_F(MirrorTest, CopiesOfAttemptsBeforeTheOneThatIsOverGo) {
  SimpleRank rank(a.holders, 0);
  mirror(rank, 3);
  b.mirror.fence(kJob, kEpoch);
  EXPECT_GT(b.mirror.byte_count(), 0u) << "what is over may be gone back to";
  b.mirror.fence(kJob, {kEpoch.value + 1});
  EXPECT_EQ(b.mirror.byte_count(), 0u);
}

TEST_F(MirrorTest, WhoHasNotTheKeyGetsNothingAndLeavesNothing) {
  SimpleRank rank(a.holders, 0);
  mirror(rank, 7);
  StreamRequest request = fetch_request(7);
  EXPECT_EQ(ask(b, request), Code::kOk);
  request.key.high ^= 1;
  EXPECT_EQ(ask(b, request), Code::kPermissionDenied);
  b.order(order_of_b(9, 7));
  request = store_request(9);
  request.key = {};
  EXPECT_EQ(ask(b, request), Code::kPermissionDenied);
}

TEST_F(MirrorTest, ACopyThatIsThereIsNotTakenInAgain) {
  SimpleRank rank(a.holders, 0);
  mirror(rank, 7);
  EXPECT_EQ(ask(b, store_request(7)), Code::kAlreadyExists);
}

TEST_F(MirrorTest, ABuddyThatHasNotHeardTheOrderYetIsAskedAgain) {
  SimpleRank rank(a.holders, 0);
  rank.train(7);
  const FakeBuddy buddy;
  a.order(order_to(buddy));
  EXPECT_TRUE(buddy.caller().answer({Code::kFailedPrecondition, {}, 0}, kPatience).ok());
  EXPECT_TRUE(buddy.sender().answer({}, kPatience).ok());
  EXPECT_EQ(a.next().failure, "");
}

TEST_F(MirrorTest, ACopyWhoseLastAnswerWasLostIsThere) {
  SimpleRank rank(a.holders, 0);
  rank.train(7);
  const FakeBuddy buddy;
  a.order(order_to(buddy));
  buddy.sender().shut_down();
  EXPECT_TRUE(a.has_said_nothing());
  EXPECT_TRUE(buddy.caller().answer({Code::kAlreadyExists, {}, 0}, kPatience).ok());
  EXPECT_EQ(a.next().failure, "");
}

TEST_F(MirrorTest, OneCallerTooManyIsTurnedAwayUntilAnotherIsGone) {
  b.order(order_of_b(9));
  std::vector<StateConnection> callers;
  while (callers.size() < StateServer::kCallersMax) {
    Result<StateConnection> caller = StateConnection::connect(b.mirror.address(), kPatience);
    ASSERT_TRUE(caller.ok() && caller->ask(store_request(9), kPatience).ok());
    callers.push_back(std::move(caller).value());
  }
  EXPECT_EQ(ask(b, store_request(9)), Code::kUnavailable);
  callers.pop_back();
  EXPECT_TRUE(wait_until([&] { return ask(b, store_request(9)) == Code::kOk; }, kPatience));
}

TEST_F(MirrorTest, OnlyWhatWasOrderedIsTakenIn) {
  b.order(order_of_b(9));
  EXPECT_EQ(ask(b, store_request(9)), Code::kOk);
  EXPECT_EQ(ask(b, store_request(8)), Code::kFailedPrecondition) << "another step";
  StreamRequest request = store_request(9);
  request.epoch = {2};
  EXPECT_EQ(ask(b, request), Code::kFailedPrecondition) << "another epoch";
  request = store_request(9);
  request.rank = {1};
  EXPECT_EQ(ask(b, request), Code::kFailedPrecondition) << "another rank";
  request = store_request(9);
  request.job = {99};
  EXPECT_EQ(ask(b, request), Code::kFailedPrecondition) << "another job";
}

TEST_F(MirrorTest, NothingOfAFencedEpochIsTakenInOrGivenOn) {
  SimpleRank rank(a.holders, 0);
  mirror(rank, 7);
  b.order(order_of_b(9, 7));
  Result<StateConnection> late = StateConnection::connect(b.mirror.address(), kPatience);
  ASSERT_TRUE(late.ok() && late->ask(store_request(9), kPatience).ok());
  b.mirror.fence(kJob, kEpoch);
  const std::vector<std::byte> state(100, std::byte{1});
  EXPECT_TRUE(late->send_state(state, kPatience).ok());
  EXPECT_EQ(late->hear_answer(kPatience).status().code(), Code::kAborted);
  EXPECT_EQ(ask(b, store_request(9)), Code::kFailedPrecondition);
  EXPECT_EQ(b.mirror.copies(kJob, kEpoch), (std::vector<HeldRank>{{Rank{0}, {7}}}));
  // A copy is asked for by the epoch that trained it.
  StreamRequest request = fetch_request(7);
  request.epoch = {2};
  EXPECT_EQ(ask(b, request), Code::kNotFound);
}

// Whatever was being copied or received then.
TEST(StateCopiesTest, NothingIsAddedToAFencedEpoch) {
  StateCopies copies(1000);
  const auto early = copies.make(identity(0), kEpoch, 7, 100);
  const auto late = copies.make(identity(1), kEpoch, 7, 100);
  const auto newer = copies.make(identity(1), {2}, 7, 100);
  EXPECT_TRUE(copies.put(*early).ok());
  copies.fence(kJob, kEpoch);
  EXPECT_EQ(copies.put(*late).code(), Code::kAborted);
  EXPECT_TRUE(copies.put(*newer).ok());
  EXPECT_EQ(copies.list(kJob, kEpoch), (std::vector<HeldRank>{{Rank{0}, {7}}}));
  EXPECT_EQ(copies.make(identity(0), {2}, 8, 701).status().code(), Code::kResourceExhausted);
  EXPECT_TRUE(copies.make(identity(0), {2}, 8, 700).ok());
}

TEST_F(MirrorTest, ASenderThatIsFencedStops) {
  SimpleRank rank(a.holders, 0);
  send_slowly(rank);
  a.mirror.fence(kJob, kEpoch);
  a.mirror.drop_before(kJob, {2});
  EXPECT_TRUE(lets_go_of_all(a)) << "it is sent to nobody's use";
  EXPECT_TRUE(b.mirror.copies(kJob, kEpoch).empty());
  SimpleRank next(a.holders, 0, {2});
  next.train(8);
  MirrorRanks order = order_of_b(8);
  order.epoch = {2};
  b.order(order);
  order = order_of_a(8);
  order.epoch = {2};
  a.order(order);
  EXPECT_EQ(a.next().failure, "") << "the slow one holds it up";
}

TEST_F(MirrorTest, ANewerOrderEndsASlowSending) {
  SimpleRank rank(a.holders, 0);
  send_slowly(rank);
  b.order(order_of_b(9));
  a.order(order_of_a(9));
  EXPECT_TRUE(lets_go_of_all(a)) << "it is sent to nobody's use";
  rank.train(9);
  a.mirror.progressed({.job = kJob, .epoch = kEpoch, .rank = {0}, .step = 9});
  EXPECT_EQ(a.next().failure, "") << "the slow one holds it up";
}

TEST_F(MirrorTest, MoreThanTheBoundIsRefusedWithWhereAndWhatToDo) {
  Site small(kStateBytes - 1);
  SimpleRank rank(a.holders, 0);
  rank.train(7);
  small.order(order_of_b(7));
  MirrorRanks order = order_of_a(7);
  order.send[0].to = small.place();
  a.order(order);
  const RanksMirrored outcome = a.next();
  for (const std::string& part :
       {std::string("rank 0: "), small.mirror.address() + ": ",
        std::string("memory for copies is full"), std::string("penstock-worker --copies-mib")}) {
    EXPECT_NE(outcome.failure.find(part), std::string::npos) << outcome.failure;
  }
  EXPECT_FALSE(outcome.missed);
  EXPECT_EQ(small.mirror.byte_count(), 0u);
}

TEST_F(MirrorTest, AWorkerThatWasStartedAnewIsNamed) {
  SimpleRank rank(a.holders, 0);
  rank.train(7);
  b.order(order_of_b(7));
  MirrorRanks order = order_of_a(7);
  order.send[0].to.key.low ^= 1;
  a.order(order);
  const std::string failure = a.next().failure;
  EXPECT_NE(failure.find(b.mirror.address() + ": it has another key"), std::string::npos)
      << failure;
}

TEST_F(MirrorTest, ARankThatIsNotTrustedHasNoCopyHere) {
  SimpleRank rank(a.holders, 0);
  mirror(rank, 7);
  a.mirror.distrust(kJob, Rank{0});
  EXPECT_TRUE(a.mirror.copies(kJob, kEpoch).empty());
}

TEST_F(MirrorTest, ARankWithoutMemoryFailsTheRound) {
  a.order(order_of_a(7));
  EXPECT_NE(a.next().failure, "");
}

TEST_F(MirrorTest, WhatCannotBeFetchedSaysWhy) {
  StartRank start = start_rank(2, 0);
  start.from_memory = true;
  start.restore_step = 7;
  start.state_from = b.place();
  const Path file = *a.holders.hold(kJob, {2}, Rank{0}, false);
  EXPECT_EQ(fetch_state(start, file).code(), Code::kNotFound);
  EXPECT_EQ(fetch_state(start, {}).code(), Code::kFailedPrecondition);
  start.state_from.key.low ^= 1;
  const Status refused = fetch_state(start, file);
  EXPECT_EQ(refused.code(), Code::kPermissionDenied);
  EXPECT_NE(refused.message().find(b.mirror.address()), std::string::npos) << refused.message();
}

// ---- a host at its limits

// While it lives this process gets no more file descriptors.
class NoMoreDescriptors {
 public:
  NoMoreDescriptors() {
    EXPECT_EQ(::getrlimit(RLIMIT_NOFILE, &before_), 0);
    const FileDescriptor lowest_free(::dup(STDERR_FILENO));
    rlimit limit = before_;
    limit.rlim_cur = static_cast<rlim_t>(lowest_free.get());
    EXPECT_EQ(::setrlimit(RLIMIT_NOFILE, &limit), 0);
  }
  ~NoMoreDescriptors() { EXPECT_EQ(::setrlimit(RLIMIT_NOFILE, &before_), 0); }

 private:
  rlimit before_ = {};
};

// While it lives this process gets no more threads: none has room for such a stack.
class NoMoreThreads {
 public:
  NoMoreThreads() {
    EXPECT_EQ(::pthread_getattr_default_np(&before_), 0);
    pthread_attr_t huge;
    EXPECT_EQ(::pthread_attr_init(&huge), 0);
    EXPECT_EQ(::pthread_attr_setstacksize(&huge, size_t{1} << 47), 0);
    EXPECT_EQ(::pthread_setattr_default_np(&huge), 0);
    ::pthread_attr_destroy(&huge);
  }
  ~NoMoreThreads() {
    EXPECT_EQ(::pthread_setattr_default_np(&before_), 0);
    ::pthread_attr_destroy(&before_);
  }

 private:
  pthread_attr_t before_;
};

Duration processor_time() {
  timespec time = {};
  EXPECT_EQ(::clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &time), 0);
  return seconds(time.tv_sec) + std::chrono::nanoseconds(time.tv_nsec);
}

TEST_F(MirrorTest, WithoutDescriptorsCallersWaitAndNoProcessorIsBusy) {
  constexpr int kLookMs = 500;
  const Result<SocketAddress> to = resolve_endpoint("tcp://" + b.mirror.address());
  ASSERT_TRUE(to.ok()) << to.status().to_string();
  const FileDescriptor caller(::socket(to->storage.ss_family, SOCK_STREAM | SOCK_CLOEXEC, 0));
  const auto request = encode_stream_request(fetch_request(7));
  pollfd answered = {caller.get(), POLLIN, 0};
  {
    const NoMoreDescriptors none;
    ASSERT_EQ(::connect(caller.get(), to->get(), to->size), 0);
    ASSERT_EQ(::send(caller.get(), request.data(), request.size(), 0), std::ssize(request));
    const Duration before = processor_time();
    EXPECT_EQ(::poll(&answered, 1, kLookMs), 0);
    EXPECT_LT(processor_time() - before, std::chrono::milliseconds(kLookMs / 5));
  }
  EXPECT_EQ(::poll(&answered, 1, kPatienceMs), 1);
}

TEST_F(MirrorTest, WithoutThreadsACallerIsDroppedAndALaterOneServed) {
  SimpleRank rank(a.holders, 0);
  mirror(rank, 7);
  {
    const NoMoreThreads none;
    EXPECT_EQ(ask(b, fetch_request(7)), Code::kUnavailable);
  }
  EXPECT_EQ(ask(b, fetch_request(7)), Code::kOk);
}

using AgentMirrorTest = AgentTest;

TEST_F(AgentMirrorTest, AnOrderIsPassedOnUntilItsEpochIsOver) {
  register_agent();
  run_rank(key(1, 0));
  const MirrorRanks order = {kJob, {1}, 9, 0, 1000, {{Rank{0}, {"w1:1", {}}}}, {}};
  coordinator(order);
  EXPECT_EQ(mirrored, (std::vector<MirrorRanks>{order}));
  const RanksMirrored outcome = {kJob, {1}, 9, "", false};
  agent->on_mirrored(outcome);
  EXPECT_EQ(sent_of<RanksMirrored>(), (std::vector<RanksMirrored>{outcome}));
  coordinator(StopRanks{kJob, {1}, 0, "recovers", true});
  EXPECT_EQ(copies_fenced, Epoch{1});
  coordinator(order);
  EXPECT_EQ(mirrored.size(), 1u);
  agent->on_mirrored(outcome);
  EXPECT_EQ(sent_of<RanksMirrored>().size(), 1u);
}

TEST_F(AgentMirrorTest, AStopThatKeepsTheStateIsAnsweredWithTheCopiesOfItsEpoch) {
  register_agent();
  copies[{2}] = {{Rank{0}, {8}}, {Rank{5}, {8}}};
  copies[{1}] = {{Rank{0}, {3}}};
  coordinator(StopRanks{kJob, {2}, 0, "recovers", true});
  ASSERT_EQ(sent_of<RanksStopped>().size(), 1u);
  EXPECT_EQ(sent_of<RanksStopped>()[0], (RanksStopped{kJob, {2}, {}, copies[{2}]}));
  coordinator(StopRanks{kJob, {2}, 0, "cancelled"});
  EXPECT_EQ(sent_of<RanksStopped>()[1], (RanksStopped{kJob, {2}, {}, {}}));
}

}  // namespace
}  // namespace penstock
