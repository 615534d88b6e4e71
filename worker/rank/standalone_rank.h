// One rank of a standalone run, whatever carries it. Inside of standalone*.cc.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "comm/data/transport.h"
#include "worker/rank/standalone.h"
#include "worker/rank/trainer.h"

namespace penstock {

struct StandaloneRank {
  JobId job;
  Rank rank;
  Transport* transport = nullptr;        // borrowed; null in a world of one
  RankProbe* probe = nullptr;            // borrowed; may be null
  std::function<Status()> connect = {};  // called when everything is loaded; may be empty
  // As in TrainerHooks; empty: nothing is saved.
  std::function<void(int64_t, const Result<SegmentSummary>&)> on_segment = {};
  std::function<Status(int64_t)> wait_for_commit = {};
};

// Runs one rank to the end. Fills `report` (rank 0; null on others) and `digests`.
Status run_standalone_rank(const StandaloneOptions& options, const StandaloneRank& self,
                           StandaloneReport* report,
                           std::vector<TrainingState::TensorDigest>* digests);

// Null when nobody wants one.
Result<std::unique_ptr<RankProbe>> make_probe(const StandaloneOptions& options, Rank rank);
std::string combined_digest(std::vector<TrainingState::TensorDigest> digests);
Status check_standalone(const StandaloneOptions& options);

}  // namespace penstock
