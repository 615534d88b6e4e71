#include "ops/cli/coordinator_store.h"

#include <fmt/format.h>

#include <filesystem>

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

Status check_own_state(const Path& state_dir) {
  const Path own = state_dir / kDevFolder;
  std::error_code error;
  if (!std::filesystem::is_directory(own, error)) return {};
  return failed_precondition(
      fmt::format("{} is the state folder of a dev cluster: name its coordinator's, {}, while the "
                  "cluster is down",
                  state_dir.string(), own.string()));
}

}  // namespace penstock
