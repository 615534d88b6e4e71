// What every Transport must do. Each transport's test instantiates this suite with its kind.
#pragma once

#include <gtest/gtest.h>

#include "tests/data/rank_harness.h"

namespace penstock {

class TransportConformance : public testing::TestWithParam<TransportKind> {
 protected:
  void run(const HarnessOptions& options, const std::function<void(RankContext&)>& rank_main) {
    run_ranks(GetParam(), options, rank_main);
  }
};

}  // namespace penstock
