// penstock checkpoint show, verify, diff, pin, prune, reindex: on checkpoints made here
// and damaged on purpose, with no coordinator anywhere.
#include <fcntl.h>
#include <sys/stat.h>

#include <nlohmann/json.hpp>

#include "checkpoint/marks.h"
#include "comm/run/job_spec.h"
#include "tests/checkpoint/support.h"
#include "tests/support/cluster.h"

namespace penstock {
namespace {

using namespace checkpoint_test;

constexpr JobId kJob{7};

class CheckpointTest : public testing::Test {
 protected:
  void SetUp() override {
    for (const int64_t step : {10, 20, 30}) commit(step, Epoch{1}, static_cast<uint64_t>(step));
  }
  // Opened for each, as a coordinator does, so that the lock is free in between.
  CheckpointInfo commit(int64_t step, Epoch epoch, uint64_t version) {
    auto store = CheckpointStore::open(path(), kJob, nullptr);
    EXPECT_TRUE(store.ok()) << store.status().to_string();
    return commit_model(*store, kJob, epoch, step, version);
  }
  static ProgramRun penstock(std::vector<std::string> arguments) {
    arguments.insert(arguments.begin(), {binary("penstock").string(), "checkpoint"});
    return run_program(arguments, {"PENSTOCK_SERVER=http://127.0.0.1:1", "NO_COLOR=1"});
  }
  static Json json_of(std::vector<std::string> arguments, int exit_code) {
    arguments.insert(arguments.end(), {"-o", "json"});
    const ProgramRun run = penstock(arguments);
    EXPECT_EQ(run.exit_code, exit_code) << run.out << run.err;
    const Json json = Json::parse(run.out, nullptr, false);
    EXPECT_TRUE(json.is_object()) << run.out << run.err;
    return json;
  }
  Path state() const { return directory_.path() / "state"; }
  Path path() const { return state() / "checkpoints" / "7"; }
  std::string text() const { return path().string(); }
  Path segment(uint64_t commit_seq, size_t index) const {
    const auto stored = read_manifest(path() / manifest_file_name(commit_seq));
    return path() / stored->manifest.segments[index].file;
  }
  std::vector<int64_t> steps() const {
    std::vector<int64_t> steps;
    for (const auto& info : list_checkpoints(path(), kJob).checkpoints) steps.push_back(info.step);
    return steps;
  }

  TempDirectory directory_;
};

TEST_F(CheckpointTest, VerifyReadsWholeDirectoriesOneStepOrOneManifest) {
  const Json all = json_of({"verify", text()}, 0);
  EXPECT_EQ(all["kind"], "CheckpointVerification");
  EXPECT_EQ(all["items"].size(), 3u);
  EXPECT_FALSE(all["damaged"]);
  EXPECT_EQ(all["items"][0]["state"], "ok");
  const Json one = json_of({"verify", text(), "--step", "20"}, 0);
  ASSERT_EQ(one["items"].size(), 1u);
  EXPECT_EQ(one["items"][0]["step"], 20);
  const Json named = json_of({"verify", text() + "/" + manifest_file_name(3)}, 0);
  ASSERT_EQ(named["items"].size(), 1u);
  EXPECT_EQ(named["items"][0]["step"], 30);
  EXPECT_EQ(penstock({"verify", text(), "--step", "99"}).exit_code, 3);
}

TEST_F(CheckpointTest, AnExportedStateImportsAsTheSameCheckpoint) {
  const std::string folder = (directory_.path() / "files").string();
  const Json exported = json_of({"export", text(), "--step", "20", "-o", folder}, 0);
  EXPECT_EQ(exported["kind"], "CheckpointExport");
  EXPECT_EQ(exported["tensors"], model_tensors().size());
  EXPECT_EQ(exported["step"], 20);
  EXPECT_EQ(penstock({"export", text(), "-o", folder}).exit_code, 6) << "it exists";
  const std::string store = (directory_.path() / "again").string();
  const Json imported = json_of({"import", folder, "-o", store}, 0);
  EXPECT_EQ(imported["job"], kJob.value);
  EXPECT_EQ(imported["step"], 20);
  EXPECT_EQ(json_of({"verify", store}, 0)["items"].size(), 1u);
  const Json same = json_of({"diff", text() + "@20", store}, 0);
  EXPECT_EQ(same["equal_tensors"], model_tensors().size());
  EXPECT_EQ(json_of({"diff", text() + "@30", store}, 1)["equal"], false);
  EXPECT_EQ(penstock({"import", folder, "-o", store}).exit_code, 6) << "a store is there";
  const std::string other = (directory_.path() / "other").string();
  EXPECT_EQ(json_of({"import", folder, "-o", other, "--job", "12"}, 0)["job"], 12);
}

TEST_F(CheckpointTest, AnExportThatWasDamagedIsNotImportedAndLeavesNothing) {
  const Path folder = directory_.path() / "files";
  ASSERT_EQ(penstock({"export", text(), "-o", folder.string()}).exit_code, 0);
  flip_byte(folder / "state.safetensors", size_of_file(folder / "state.safetensors") - 70);
  const Path store = directory_.path() / "again";
  const ProgramRun run = penstock({"import", folder.string(), "-o", store.string()});
  EXPECT_EQ(run.exit_code, 14) << run.err;
  EXPECT_NE(run.err.find("not those that were exported"), std::string::npos) << run.err;
  EXPECT_FALSE(std::filesystem::exists(store));
  EXPECT_EQ(penstock({"import", text(), "-o", store.string()}).exit_code, 3);
}

TEST_F(CheckpointTest, AnImportTouchesNoDirectoryThatHoldsAnything) {
  const std::string folder = (directory_.path() / "files").string();
  ASSERT_EQ(penstock({"export", text(), "-o", folder}).exit_code, 0);
  std::filesystem::remove(path() / "STORE");  // as after a crash: its manifests say the same
  flip_byte(folder + "/state.safetensors", size_of_file(folder + "/state.safetensors") - 70);
  const ProgramRun run = penstock({"import", folder, "-o", text()});
  EXPECT_EQ(run.exit_code, 6) << run.err;
  EXPECT_NE(run.err.find("is not empty"), std::string::npos) << run.err;
  EXPECT_EQ(json_of({"verify", text()}, 0)["items"].size(), 3u);
}

TEST_F(CheckpointTest, ACheckpointIsExportedForPyTorchToo) {
  const Path folder = directory_.path() / "torch";
  const Json json = json_of(
      {"export", text(), "--format", "dcp", "--file-size", "30kB", "-o", folder.string()}, 0);
  EXPECT_EQ(json["format"], "dcp");
  EXPECT_GT(json["files"], 1);
  EXPECT_TRUE(std::filesystem::exists(folder / ".metadata"));
  EXPECT_TRUE(std::filesystem::exists(folder / "__0_0.distcp"));
  EXPECT_EQ(penstock({"export", text(), "--format", "zip", "-o", "x"}).exit_code, 2);
  EXPECT_EQ(penstock({"export", text()}).exit_code, 2) << "no folder";
}

TEST_F(CheckpointTest, ScrubReadsTheSameAtItsOwnRate) {
  const Json whole = json_of({"scrub", text(), "--rate", "1GiB"}, 0);
  EXPECT_EQ(whole["kind"], "CheckpointVerification");
  EXPECT_EQ(whole["items"].size(), 3u);
  flip_byte(segment(2, 1), 5000);
  EXPECT_EQ(json_of({"scrub", text(), "--rate", "1GiB", "--step", "30"}, 0)["items"].size(), 1u);
  EXPECT_TRUE(json_of({"scrub", text(), "--rate", "1GiB"}, 14)["damaged"]);
  json_of({"scrub", text(), "--rate", "1100TB", "--step", "30"}, 0);
  for (const char* rate : {"0", "-1", "fast", "1100TiB"}) {
    EXPECT_EQ(penstock({"scrub", text(), "--rate", rate}).exit_code, 2) << rate;
  }
}

TEST_F(CheckpointTest, DamageIsNamedWithFileRankTensorAndBytesAndExitsFourteen) {
  const Path damaged = segment(2, 1);
  flip_byte(damaged, 5000);
  const Json json = json_of({"verify", text()}, 14);
  EXPECT_TRUE(json["damaged"]);
  EXPECT_EQ(json["items"][1]["state"], "damaged");
  const Json& damage = json["items"][1]["damages"][0];
  EXPECT_EQ(damage["file"], damaged.filename().string());
  EXPECT_EQ(damage["rank"], 1);
  EXPECT_EQ(damage["begin"], 4096);
  EXPECT_EQ(damage["end"], 4096 + 16384);
  EXPECT_EQ(damage["tensors"][0], "embed [200:300, 0:64]");
  const ProgramRun run = penstock({"verify", text()});
  EXPECT_EQ(run.exit_code, 14);
  EXPECT_NE(run.out.find("4096:20480"), std::string::npos) << run.out;
  EXPECT_EQ(penstock({"verify", text(), "--step", "30"}).exit_code, 0) << "the others are whole";
  EXPECT_EQ(steps(), (std::vector<int64_t>{10, 20, 30})) << "looking changes nothing";
}

TEST_F(CheckpointTest, RepairSetsDamagedOnesAsideAndWhatIsLeftVerifies) {
  flip_byte(segment(3, 0), 5000);
  flip_byte(path() / manifest_file_name(2), 100);
  const Json json = json_of({"verify", text(), "--repair"}, 14);
  EXPECT_EQ(json["items"][1]["repair"], "set aside as 000000000002.manifest.damaged");
  EXPECT_EQ(json["items"][2]["repair"], "set aside as 000000000003.manifest.damaged");
  EXPECT_EQ(steps(), std::vector<int64_t>{10});
  EXPECT_EQ(newest_whole(path(), kJob).checkpoint->step, 10);
  const Json after = json_of({"verify", text()}, 0);
  EXPECT_EQ(after["items"][2]["state"], "set aside");
  EXPECT_EQ(commit(40, Epoch{1}, 4).commit_seq, 4u);
}

TEST_F(CheckpointTest, RepairLeavesWhatIsLeftWhenNothingIsWhole) {
  for (const uint64_t commit_seq : {1, 2, 3}) flip_byte(segment(commit_seq, 0), 5000);
  const Json json = json_of({"verify", text(), "--repair"}, 14);
  for (size_t i = 0; i < 3; ++i) {
    const std::string repair = json["items"][i]["repair"];
    EXPECT_NE(repair.find("no other checkpoint"), std::string::npos) << repair;
  }
  EXPECT_EQ(steps().size(), 3u);
}

TEST_F(CheckpointTest, RepairWritesADamagedStoreFileAgain) {
  const std::string before = file_text(path() / "STORE");
  replace_file(path() / "STORE", "garbage");
  EXPECT_TRUE(json_of({"verify", text()}, 14)["store_damage"].is_string());
  EXPECT_TRUE(json_of({"verify", text(), "--repair"}, 14)["store_repair"].is_string());
  EXPECT_EQ(file_text(path() / "STORE"), before);
  EXPECT_TRUE(json_of({"verify", text()}, 0)["store_damage"].is_null());
}

TEST_F(CheckpointTest, ShowTellsWhatACheckpointHolds) {
  {
    auto store = CheckpointStore::open(path(), kJob, nullptr);
    ASSERT_TRUE(store.ok());
    auto request = save_model(path(), kJob, Epoch{1}, 40, 4);
    ASSERT_TRUE(request.ok());
    const auto spec = parse_job_spec(tiny_job_yaml(directory_.path(), {.name = "shown"}), "spec");
    ASSERT_TRUE(spec.ok()) << spec.status().to_string();
    request->spec_json = to_json(*spec);
    ASSERT_TRUE(store->commit(*request).ok());
  }
  const Json json = json_of({"show", text()}, 0);
  EXPECT_EQ(json["kind"], "Checkpoint");
  EXPECT_EQ(json["step"], 40);
  EXPECT_EQ(json["name"], "shown");
  EXPECT_EQ(json["commit_seq"], 4);
  EXPECT_EQ(json["previous_commit_seq"], 3);
  EXPECT_EQ(json["layout"], "pipeline 2");
  EXPECT_TRUE(json["seed"].is_number());
  EXPECT_EQ(json["spec_digest"].get<std::string>().size(), 32u);
  EXPECT_EQ(json["segments"].size(), 2u);
  EXPECT_EQ(json["tensors"], 5);
  EXPECT_FALSE(json["census"]["optimizer_complete"]);
  EXPECT_EQ(json["census"]["kinds"]["state"]["tensors"], 1);
  EXPECT_TRUE(json["damage"].is_null());
  EXPECT_EQ(json_of({"show", text(), "--step", "10"}, 0)["commit_seq"], 1);

  const Json tensor = json_of({"show", text(), "--tensor", "embed"}, 0);
  EXPECT_EQ(tensor["shape"], Json({300, 64}));
  EXPECT_EQ(tensor["pieces"].size(), 2u);
  EXPECT_EQ(tensor["pieces"][1]["rank"], 1);
  EXPECT_EQ(tensor["digest"].get<std::string>().size(), 32u);
  EXPECT_EQ(penstock({"show", text(), "--tensor", "none"}).exit_code, 3);
  std::filesystem::remove(segment(4, 1));
  EXPECT_TRUE(json_of({"show", text()}, 14)["damage"].is_string());
}

TEST_F(CheckpointTest, TextFromFilesCannotDriveATerminal) {
  auto stored = read_manifest(path() / manifest_file_name(3));
  stored->manifest.layout = "\x1b[2J pipeline";
  replace_file(path() / manifest_file_name(3), *encode_manifest(stored->manifest));
  const ProgramRun run = penstock({"show", text()});
  EXPECT_EQ(run.exit_code, 0) << run.err;
  EXPECT_EQ(run.out.find('\x1b'), std::string::npos);
  EXPECT_NE(run.out.find("?[2J pipeline"), std::string::npos) << run.out;
}

TEST_F(CheckpointTest, DiffComparesByDigestAndByValue) {
  const Path other = directory_.path() / "other";
  {
    auto store = CheckpointStore::open(other, JobId{9}, nullptr);
    ASSERT_TRUE(store.ok());
    commit_model(*store, JobId{9}, Epoch{4}, 5, 30);  // the bytes of step 30
  }
  const Json same = json_of({"diff", text(), other.string() + "@5"}, 0);
  EXPECT_TRUE(same["equal"]);
  EXPECT_EQ(same["equal_tensors"], 5);
  const Json json = json_of({"diff", text() + "@10", text() + "@20", "--values"}, 1);
  EXPECT_EQ(json["a"]["step"], 10);
  EXPECT_EQ(json["b"]["step"], 20);
  EXPECT_EQ(json["equal_tensors"], 1) << "\"empty\" has no elements to differ in";
  ASSERT_EQ(json["items"].size(), 4u);
  EXPECT_EQ(json["items"][0]["tensor"], "bias");
  EXPECT_EQ(json["items"][0]["difference"], "values");
  EXPECT_EQ(json["items"][0]["elements"], 77);
  EXPECT_EQ(penstock({"diff", text() + "@10", text() + "@99"}).exit_code, 3);
  EXPECT_EQ(penstock({"diff", text() + "@x", text()}).exit_code, 2);
}

TEST_F(CheckpointTest, PinnedOnesSurvivePruning) {
  EXPECT_TRUE(json_of({"pin", text(), "--step", "10"}, 0)["pinned"]);
  EXPECT_TRUE(json_of({"show", text(), "--step", "10"}, 0)["pinned"]);
  const Json listed = json_of({"ls", text()}, 0)["items"];
  EXPECT_TRUE(listed[0]["pinned"]) << listed;
  EXPECT_FALSE(listed[1]["pinned"]) << listed;
  const std::string table = penstock({"ls", text()}).out;
  EXPECT_NE(table.find("  complete  yes     "), std::string::npos) << table;
  const Json plan = json_of({"prune", text(), "--keep-last", "1", "--dry-run"}, 0);
  ASSERT_EQ(plan["items"].size(), 1u);
  EXPECT_EQ(plan["items"][0]["step"], 20);
  EXPECT_EQ(steps().size(), 3u);
  EXPECT_EQ(penstock({"prune", text(), "--keep-last", "1"}).exit_code, 0);
  EXPECT_EQ(steps(), (std::vector<int64_t>{10, 30}));
  const ProgramRun unpinned = penstock({"unpin", text(), "--step", "10"});
  EXPECT_EQ(unpinned.exit_code, 0);
  EXPECT_NE(unpinned.err.find("step 10 is no longer pinned"), std::string::npos) << unpinned.err;
  EXPECT_EQ(penstock({"prune", text(), "--keep-last", "1", "--keep-every", "5"}).exit_code, 0);
  EXPECT_EQ(steps(), (std::vector<int64_t>{10, 30})) << "step 10 is divisible by 5";
  EXPECT_EQ(penstock({"prune", text(), "--keep-last", "1"}).exit_code, 0);
  EXPECT_EQ(steps(), std::vector<int64_t>{30});
  EXPECT_EQ(penstock({"prune", text()}).exit_code, 2) << "how many stay must be said";
  EXPECT_EQ(penstock({"prune", text(), "--keep-last", "0"}).exit_code, 2);
}

TEST_F(CheckpointTest, AWriterThatHoldsTheLockIsAConflict) {
  const auto store = CheckpointStore::open(path(), kJob, nullptr);
  ASSERT_TRUE(store.ok());
  EXPECT_EQ(penstock({"prune", text(), "--keep-last", "1"}).exit_code, 6);
  EXPECT_EQ(penstock({"pin", text()}).exit_code, 6);
  EXPECT_EQ(penstock({"verify", text()}).exit_code, 0) << "reading needs no lock";
}

TEST_F(CheckpointTest, AnIndexThatIsGoneIsMadeAnewFromTheFiles) {
  const Path elsewhere = directory_.path() / "elsewhere";
  {
    auto store = CheckpointStore::open(elsewhere, JobId{9}, nullptr);
    ASSERT_TRUE(store.ok());
    commit_model(*store, JobId{9}, Epoch{1}, 5, 1);
  }
  std::filesystem::create_directory(state() / "checkpoints" / "8");  // has saved nothing yet
  const Json json = json_of({"reindex", state().string(), elsewhere.string()}, 0);
  ASSERT_EQ(json["items"].size(), 2u) << json.dump();
  EXPECT_EQ(json["items"][0]["job"], 7);
  EXPECT_EQ(json["items"][0]["checkpoints"], 3);
  EXPECT_TRUE(json["items"][0]["rebuilt"]);
  EXPECT_EQ(json["items"][1]["job"], 9);
  {
    const auto index = CheckpointIndex::open(state() / "checkpoint-index");
    ASSERT_TRUE(index.ok()) << index.status().to_string();
    EXPECT_EQ(*(*index)->list(kJob), list_checkpoints(path(), kJob).checkpoints);
    EXPECT_EQ(*(*index)->highest_commit(kJob), 3u);
    EXPECT_EQ(penstock({"reindex", state().string()}).exit_code, 6) << "somebody has it open";
  }
  EXPECT_FALSE(json_of({"reindex", state().string()}, 0)["items"][0]["rebuilt"]);
  std::filesystem::remove(path() / manifest_file_name(3));
  const Json lost = json_of({"reindex", state().string()}, 0);
  EXPECT_EQ(lost["items"][0]["lost_steps"], Json({30}));
  for (const uint64_t number : {1, 2}) {
    std::filesystem::remove(path() / manifest_file_name(number));
  }
  const Json all_lost = json_of({"reindex", state().string()}, 0);
  EXPECT_EQ(all_lost["items"][0]["job"], 7) << "its directory is called so";
  EXPECT_EQ(all_lost["items"][0]["lost_steps"], Json({10, 20}));
  EXPECT_EQ(penstock({"reindex", state().string(), "/nowhere"}).exit_code, 3);
  EXPECT_EQ(penstock({"reindex", directory_.path().string()}).exit_code, 3);
}

TEST_F(CheckpointTest, WhatWasPrunedOffTheIndexIsNotLost) {
  json_of({"reindex", state().string()}, 0);
  json_of({"prune", text(), "--keep-last", "2"}, 0);
  const Json pruned = json_of({"reindex", state().string()}, 0)["items"][0];
  EXPECT_EQ(pruned["checkpoints"], 2);
  EXPECT_EQ(pruned["lost_steps"], Json::array());
  std::filesystem::remove(path() / manifest_file_name(2));
  EXPECT_EQ(json_of({"reindex", state().string()}, 0)["items"][0]["lost_steps"], Json({20}));
}

TEST_F(CheckpointTest, AFileInPlaceOfTheIndexIsMovedAsideAndSaidSo) {
  replace_file(state() / "checkpoint-index", "no index");
  const ProgramRun run = penstock({"reindex", state().string()});
  EXPECT_EQ(run.exit_code, 0) << run.err;
  EXPECT_NE(run.err.find("it is no folder"), std::string::npos) << run.err;
  EXPECT_FALSE(json_of({"reindex", state().string()}, 0)["items"][0]["rebuilt"]);
}

// What the command said on stderr, in one piece.
void expect_said(const ProgramRun& run, int exit_code, const std::vector<std::string>& parts) {
  EXPECT_EQ(run.exit_code, exit_code) << run.out << run.err;
  for (const std::string& part : parts) {
    EXPECT_NE(run.err.find(part), std::string::npos) << part << " in " << run.err;
  }
}

TEST_F(CheckpointTest, LsListsADirectoryWithoutACoordinator) {
  const Json whole = json_of({"ls", text()}, 0);
  EXPECT_EQ(whole["kind"], "CheckpointList");
  ASSERT_EQ(whole["items"].size(), 3u);
  EXPECT_EQ(whole["items"][1]["step"], 20);
  EXPECT_EQ(whole["items"][1]["damaged"], false);
  std::filesystem::remove(segment(2, 1));
  flip_byte(path() / manifest_file_name(3), 100);
  const Json damaged = json_of({"ls", text()}, 0);
  EXPECT_EQ(damaged["items"][1]["damaged"], true);
  EXPECT_EQ(damaged["items"][2]["damaged"], true);
  expect_said(penstock({"ls", text()}), 0, {"damaged: rank 1", manifest_file_name(3)});
  EXPECT_EQ(penstock({"ls", "somejob"}).exit_code, 5);
  EXPECT_EQ(penstock({"ls", ""}).exit_code, 2);
}

TEST_F(CheckpointTest, NewerOnesThatCannotBeUsedAreNamedWhereAnOlderOneIsTaken) {
  flip_byte(path() / manifest_file_name(3), 100);
  expect_said(penstock({"show", text()}), 0,
              {"passed over " + manifest_file_name(3), "digest in its last line"});
  expect_said(penstock({"diff", text() + "@20", text() + "@30"}), 3,
              {"passed over " + manifest_file_name(3), "no checkpoint of step 30"});
  expect_said(penstock({"verify", text()}), 14,
              {"the newest whole one is of step 20", "verify " + text() + " --repair"});
}

TEST_F(CheckpointTest, PruneSaysWhatDoesNotCountAndWhySegmentsStay) {
  const auto prune = [&](const char* keep) {
    return penstock({"prune", text(), "--keep-last", keep, "--dry-run"});
  };
  flip_byte(segment(3, 0), kSegmentHeaderBytes + 3);
  expect_said(prune("1"), 0,
              {manifest_file_name(3) + " does not count: ", "would remove 1 checkpoint and 2 seg"});
  flip_byte(path() / manifest_file_name(3), 100);
  expect_said(prune("1"), 0, {"1 checkpoint and 0 segments", "stay, since", "--repair"});
}

TEST_F(CheckpointTest, AFolderCalledLikeAJobAndAFileInTheWayAreSaid) {
  const std::string empty = directory_.path().filename().string();
  std::filesystem::current_path(directory_.path().parent_path());
  expect_said(penstock({"show", empty}), 5, {"the folder " + empty + " holds no checkpoints"});
  const std::string folder = (directory_.path() / "files").string();
  ASSERT_EQ(penstock({"export", text(), "-o", folder}).exit_code, 0);
  expect_said(penstock({"import", folder, "-o", folder + "/state.safetensors"}), 6,
              {"is no directory"});
}

TEST_F(CheckpointTest, WhatIsNoCheckpointIsNotFoundAndAJobNeedsACoordinator) {
  for (const char* verb : {"verify", "show", "pin"}) {
    EXPECT_EQ(penstock({verb, directory_.path().string()}).exit_code, 3) << verb;
    EXPECT_EQ(penstock({verb, "./nothing-here"}).exit_code, 3) << verb;
    EXPECT_EQ(penstock({verb, "somejob"}).exit_code, 5) << verb;
  }
}

TEST_F(CheckpointTest, HostileFilesAreRefusedAndNeverWaitedFor) {
  const Path pipe = path() / manifest_file_name(4);
  ASSERT_EQ(::mkfifo(pipe.c_str(), 0600), 0);
  std::filesystem::create_symlink("/etc/passwd", path() / manifest_file_name(5));
  replace_file(path() / manifest_file_name(6), std::string(1 << 16, '['));
  std::filesystem::remove(segment(2, 0));
  std::filesystem::create_symlink("/dev/zero", segment(2, 0));
  const Json json = json_of({"verify", text()}, 14);
  ASSERT_EQ(json["items"].size(), 6u);
  EXPECT_EQ(json["items"][0]["state"], "ok");
  for (const size_t i : {1, 3, 4, 5}) EXPECT_EQ(json["items"][i]["state"], "damaged") << i;
  EXPECT_EQ(json_of({"show", text()}, 0)["step"], 30);
}

}  // namespace
}  // namespace penstock
