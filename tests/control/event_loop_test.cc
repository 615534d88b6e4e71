#include "comm/control/event_loop.h"

#include <gtest/gtest.h>
#include <signal.h>
#include <unistd.h>

#include <array>
#include <thread>

#include "comm/base/file.h"
#include "tests/control/loop_support.h"

namespace penstock {
namespace {

using std::chrono::milliseconds;

struct Pipe {
  Pipe() {
    std::array<int, 2> fds{};
    EXPECT_EQ(pipe(fds.data()), 0);
    read = FileDescriptor(fds[0]);
    write = FileDescriptor(fds[1]);
  }
  void put(char c) { EXPECT_EQ(::write(write.get(), &c, 1), 1); }
  char get() {
    char c = 0;
    EXPECT_EQ(::read(read.get(), &c, 1), 1);
    return c;
  }
  FileDescriptor read;
  FileDescriptor write;
};

TEST(EventLoopTest, PostedCallbacksRunInOrder) {
  EventLoop loop;
  std::string order;
  loop.post([&] { order += "a"; });
  loop.post([&] { order += "b"; });
  loop.post([&] { loop.stop(); });
  loop.run();
  EXPECT_EQ(order, "ab");
}

TEST(EventLoopTest, PostWorksFromAnotherThread) {
  EventLoop loop;
  const std::thread::id loop_thread = std::this_thread::get_id();
  std::thread::id ran_on;
  std::thread other([&] {
    loop.post([&] {
      ran_on = std::this_thread::get_id();
      loop.stop();
    });
  });
  loop.run();
  other.join();
  EXPECT_EQ(ran_on, loop_thread);
}

TEST(EventLoopTest, StopFromAnotherThreadEndsAnIdleLoop) {
  EventLoop loop;
  std::thread other([&] { loop.stop(); });
  loop.run();
  other.join();
}

TEST(EventLoopTest, AStopBeforeRunIsNotForgotten) {
  EventLoop loop;
  loop.stop();
  bool ran_out_of_patience = false;
  loop.call_after(std::chrono::seconds(10), [&] {
    ran_out_of_patience = true;
    loop.stop();
  });
  loop.run();
  EXPECT_FALSE(ran_out_of_patience);
}

TEST(EventLoopTest, RunsAgainAfterStop) {
  EventLoop loop;
  int runs = 0;
  for (int i = 0; i < 3; ++i) {
    loop.post([&] {
      ++runs;
      loop.stop();
    });
    loop.run();
  }
  EXPECT_EQ(runs, 3);
}

TEST(EventLoopTest, ATimerFiresOnceAndNotEarly) {
  EventLoop loop;
  const int64_t begin = monotonic_ns();
  int64_t fired_after = 0;
  int count = 0;
  loop.call_after(milliseconds(20), [&] {
    fired_after = monotonic_ns() - begin;
    ++count;
  });
  run_for(loop, milliseconds(80));
  EXPECT_EQ(count, 1);
  EXPECT_GE(fired_after, 20'000'000);
}

TEST(EventLoopTest, TimersFireInOrderOfTheirTimes) {
  EventLoop loop;
  std::string order;
  loop.call_after(milliseconds(30), [&] { order += "b"; });
  loop.call_after(milliseconds(5), [&] { order += "a"; });
  EXPECT_TRUE(run_until(loop, [&] { return order.size() == 2; }));
  EXPECT_EQ(order, "ab");
}

TEST(EventLoopTest, ACancelledTimerNeverFires) {
  EventLoop loop;
  bool fired = false;
  const TimerId timer = loop.call_after(milliseconds(5), [&] { fired = true; });
  loop.cancel(timer);
  run_for(loop, milliseconds(40));
  EXPECT_FALSE(fired);
}

// Both are due in the same turn; the first cancels the second, whose completion is queued already.
TEST(EventLoopTest, ATimerCancelledWhenDueNeverFires) {
  EventLoop loop;
  bool fired = false;
  TimerId second;
  loop.call_after(milliseconds(1), [&] {
    const int64_t until = monotonic_ns() + 20'000'000;
    while (monotonic_ns() < until) {
    }
    loop.cancel(second);
  });
  second = loop.call_after(milliseconds(2), [&] { fired = true; });
  run_for(loop, milliseconds(60));
  EXPECT_FALSE(fired);
}

TEST(EventLoopTest, ARepeatingTimerRepeatsUntilCancelledFromWithin) {
  EventLoop loop;
  int count = 0;
  TimerId timer;
  timer = loop.call_every(milliseconds(2), [&] {
    if (++count == 3) loop.cancel(timer);
  });
  run_for(loop, milliseconds(60));
  EXPECT_EQ(count, 3);
}

TEST(EventLoopTest, UnknownTimersAndWatchesAreIgnored) {
  EventLoop loop;
  loop.cancel(TimerId{0});
  loop.cancel(TimerId{77});
  loop.unwatch(WatchId{0});
  loop.unwatch(WatchId{77});
}

TEST(EventLoopTest, AReadableDescriptorIsReportedUntilItIsDrained) {
  EventLoop loop;
  Pipe pipe;
  pipe.put('x');
  pipe.put('y');
  std::string seen;  // one byte per turn: the second turn needs no new event
  const WatchId watch = loop.watch_readable(pipe.read.get(), [&] { seen += pipe.get(); });
  EXPECT_TRUE(run_until(loop, [&] { return seen.size() == 2; }));
  EXPECT_EQ(seen, "xy");
  loop.unwatch(watch);
}

TEST(EventLoopTest, AClosedPipeIsReadable) {
  EventLoop loop;
  Pipe pipe;
  bool seen = false;
  WatchId watch;
  watch = loop.watch_readable(pipe.read.get(), [&] {
    seen = true;
    loop.unwatch(watch);
  });
  pipe.write = FileDescriptor();
  EXPECT_TRUE(run_until(loop, [&] { return seen; }));
}

TEST(EventLoopTest, AnUnwatchedDescriptorIsNotReportedAndStaysOpen) {
  EventLoop loop;
  Pipe pipe;
  bool seen = false;
  const WatchId watch = loop.watch_readable(pipe.read.get(), [&] { seen = true; });
  loop.unwatch(watch);
  pipe.put('z');
  run_for(loop, milliseconds(20));
  EXPECT_FALSE(seen);
  EXPECT_EQ(pipe.get(), 'z');
}

TEST(EventLoopTest, ADescriptorCanBeWatchedAgain) {
  EventLoop loop;
  Pipe pipe;
  std::string seen;
  loop.unwatch(loop.watch_readable(pipe.read.get(), [&] { seen += "first"; }));
  const WatchId watch = loop.watch_readable(pipe.read.get(), [&] { seen += pipe.get(); });
  pipe.put('2');
  EXPECT_TRUE(run_until(loop, [&] { return !seen.empty(); }));
  EXPECT_EQ(seen, "2");
  loop.unwatch(watch);
}

TEST(EventLoopTest, TheLoopsEndLeavesWatchedDescriptorsOpen) {
  Pipe pipe;
  {
    EventLoop loop;
    loop.watch_readable(pipe.read.get(), [] {});
  }
  pipe.put('o');
  EXPECT_EQ(pipe.get(), 'o');
}

TEST(EventLoopTest, SignalsBecomeCallbacksEachTime) {
  EventLoop loop;
  std::vector<int> seen;
  loop.on_signals({SIGUSR1, SIGUSR2}, [&](int signal) { seen.push_back(signal); });
  raise(SIGUSR1);
  EXPECT_TRUE(run_until(loop, [&] { return seen.size() == 1; }));
  raise(SIGUSR2);
  EXPECT_TRUE(run_until(loop, [&] { return seen.size() == 2; }));
  EXPECT_EQ(seen, (std::vector<int>{SIGUSR1, SIGUSR2}));
}

}  // namespace
}  // namespace penstock
