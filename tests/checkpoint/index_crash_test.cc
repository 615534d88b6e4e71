// Crashes and power losses at every change that the store and the RocksDB index beside it make to
// the disk: open, save, commit, index, remove, compact, rebuild. The oracle is
// CrashScenario::broken_promise(). What became of each crash point is recorded as properties, from
// which tests/checkpoint/fault_tables.py makes docs/checkpoint-faults.md.
#include <fmt/format.h>

#include "tests/checkpoint/crash_scenario.h"

namespace penstock {
namespace {

using namespace checkpoint_test;

std::vector<std::string> calls_of_an_undisturbed_run() {
  CrashScenario scenario(/*with_index=*/true);
  EXPECT_TRUE(scenario.run().finished);
  return scenario.disk().calls();
}

TEST(IndexCrashTest, EqualRunsMakeEqualCallsSoACallNumberRepeatsARun) {
  // Names of segments and witnesses are random or depend on them: left out.
  const auto verbs = [](const std::vector<std::string>& calls) {
    std::string text;
    for (const std::string& call : calls) {
      text += call.substr(0, call.find(' ')) + call.substr(call.rfind('.')) + "\n";
    }
    return text;
  };
  const auto named = [](std::vector<std::string> calls) {
    for (std::string& call : calls) {
      if (call.find("head-") != std::string::npos) call.resize(call.find("head-"));
      if (call.find('.') == std::string::npos) call += ".";
    }
    return calls;
  };
  const std::string first = verbs(named(calls_of_an_undisturbed_run()));
  EXPECT_EQ(verbs(named(calls_of_an_undisturbed_run())), first);
  EXPECT_NE(first.find("unlink.sst"), std::string::npos) << "RocksDB compacts its tables\n"
                                                         << first;
}

TEST(IndexCrashTest, AKilledProcessLeavesStoreAndIndexWhole) {
  const size_t calls = calls_of_an_undisturbed_run().size();
  ASSERT_GT(calls, 100u);
  FaultTable table;
  for (size_t call = 1; call <= calls; ++call) {
    for (const bool torn : {true, false}) {
      CrashScenario scenario(/*with_index=*/true);
      scenario.disk().crash_at(static_cast<int64_t>(call), torn);
      const Attempt attempt = scenario.run();
      const std::string point = crash_point(scenario.disk().calls(), torn);
      ASSERT_EQ(scenario.broken_promise(attempt), "") << "killed at call " << call << ", " << point;
      ASSERT_EQ(scenario.index_report(), "") << "killed at call " << call << ", " << point;
      table.add(point, scenario.newest_step());
    }
  }
  table.record();
}

TEST(IndexCrashTest, APowerLossLeavesStoreAndIndexWhole) {
  const size_t calls = calls_of_an_undisturbed_run().size();
  FaultTable table;
  for (size_t call = 1; call <= calls + 1; ++call) {
    for (uint64_t seed = 0; seed < 4; ++seed) {
      CrashScenario scenario(/*with_index=*/true);
      const bool torn = seed % 2 == 0;
      scenario.disk().crash_at(static_cast<int64_t>(call), torn);
      const Attempt attempt = scenario.run();
      scenario.disk().lose_power(seed);
      const std::string point = crash_point(scenario.disk().calls(), torn);
      const std::string run = fmt::format("power lost at call {}, {}, seed {}: {}", call, point,
                                          seed, scenario.disk().calls().back());
      ASSERT_EQ(scenario.broken_promise(attempt), "") << run;
      ASSERT_EQ(scenario.index_report(), "") << run;
      table.add(point, scenario.newest_step());
    }
  }
  table.record();
}

TEST(IndexCrashTest, AnErrorAtAnyCallKeepsTheOldCheckpointOrGivesTheNew) {
  const size_t calls = calls_of_an_undisturbed_run().size();
  for (size_t call = 1; call <= calls; ++call) {
    CrashScenario scenario(/*with_index=*/true);
    const Code code = call % 2 == 0 ? Code::kResourceExhausted : Code::kInternal;
    scenario.disk().fail_call(static_cast<int64_t>(call), code);
    const Attempt attempt = scenario.run();
    scenario.disk().lose_power(call);
    ASSERT_EQ(scenario.broken_promise(attempt), "")
        << "error at call " << call << ": " << scenario.disk().calls()[call - 1];
  }
}

TEST(IndexCrashTest, MoreCrashesDuringRecoveryChangeNothing) {
  const size_t calls = calls_of_an_undisturbed_run().size();
  for (size_t call = 1; call <= calls; call += 3) {
    CrashScenario scenario(/*with_index=*/true);
    scenario.disk().crash_at(static_cast<int64_t>(call));
    const Attempt attempt = scenario.run();
    scenario.disk().lose_power(call);
    for (int64_t again = 2; again <= 50; again += 8) {
      scenario.crash_again(again + static_cast<int64_t>(call) % 8, call);
    }
    ASSERT_EQ(scenario.broken_promise(attempt), "")
        << "killed at call " << call << ": " << scenario.disk().calls().back();
  }
}

TEST(IndexCrashTest, ARebuildOfTheIndexMayBeCutShortAnywhere) {
  FaultTable table;
  for (int64_t call = 1;; ++call) {
    for (uint64_t seed = 0; seed < 3; ++seed) {
      CrashScenario scenario(/*with_index=*/true);
      scenario.disk().crash_at(call);
      const bool rebuilt = scenario.rebuild_index();
      scenario.disk().lose_power(seed);
      ASSERT_EQ(scenario.broken_promise({}), "") << "power lost at call " << call << ", " << seed;
      table.add("C25", scenario.newest_step());
      if (rebuilt) return table.record();
    }
  }
}

// These show that the tests above would notice an index that forgets to sync.
TEST(IndexCrashTest, WithoutFileSyncsAPowerLossShows) {
  int broken = 0;
  for (uint64_t seed = 0; seed < 10; ++seed) {
    CrashScenario scenario(/*with_index=*/true);
    scenario.disk().ignore_file_syncs();
    const Attempt attempt = scenario.run();
    scenario.disk().lose_power(seed);
    broken += !scenario.broken_promise(attempt).empty() || !scenario.index_report().empty();
  }
  EXPECT_GT(broken, 5);
}

}  // namespace
}  // namespace penstock
