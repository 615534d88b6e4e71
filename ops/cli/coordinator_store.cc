#include "ops/cli/coordinator_store.h"

#include <fmt/format.h>

#include "coordinator/store/state_directory.h"

namespace penstock {

namespace {

constexpr const char* kDevFolder = "coordinator";

}  // namespace

Result<std::unique_ptr<RecordStore>> open_coordinator_store(const Path& state_dir) {
  for (const Path& folder : {state_dir / kRecordsFolder, state_dir / kDevFolder / kRecordsFolder}) {
    auto store = open_rocks_store_for_reading(folder);
    if (store.ok() || store.status().code() != Code::kNotFound) return store;
  }
  return not_found(
      fmt::format("{} is no state directory of a coordinator; it is what the coordinator's "
                  "--state-dir names, or the state folder of penstock dev up",
                  state_dir.string()));
}

}  // namespace penstock
