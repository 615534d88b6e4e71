// penstock export and import, the programs: a trained model out and back, and everything that can
// be wrong on the way.
#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/file.h>

#include <fstream>

#include "checkpoint/hf_folder.h"
#include "tests/support/cluster.h"
#include "tests/support/small_disk.h"

namespace penstock {
namespace {

constexpr int kSteps = 3;

// One tiny job, trained once for all tests: two checkpoints, of steps 2 and 3.
class HfTest : public testing::Test {
 protected:
  static void SetUpTestSuite() {
    trained_ = new ScratchFolder;
    std::ofstream(trained_->path() / "job.yaml")
        << tiny_job_yaml(trained_->path(), {.steps = kSteps, .checkpoint_interval = 2});
    const ProgramRun run = train(trained_->path() / "job.yaml", kSteps, "checkpoints");
    ASSERT_EQ(run.exit_code, 0) << run.err;
    held_out_loss_ = last_held_out_loss(run);
  }
  static void TearDownTestSuite() {
    delete trained_;
    trained_ = nullptr;
  }

  static ProgramRun train(const Path& spec, int steps, const std::string& checkpoints = "") {
    std::vector<std::string> command = {binary("penstock-standalone").string(),
                                        "--spec",
                                        spec.string(),
                                        "--steps",
                                        std::to_string(steps),
                                        "--json",
                                        "--evaluate"};
    if (!checkpoints.empty()) {
      command.insert(command.end(),
                     {"--checkpoint-dir", (trained_->path() / checkpoints).string()});
    }
    return run_program(command);
  }
  static std::vector<Json> lines(const ProgramRun& run) {
    std::vector<Json> found;
    std::istringstream text(run.out);
    for (std::string line; std::getline(text, line);) found.push_back(Json::parse(line));
    return found;
  }
  static double last_held_out_loss(const ProgramRun& run) {
    double loss = NAN;
    for (const Json& line : lines(run)) loss = line.value("held_out_loss", loss);
    return loss;
  }

  static ProgramRun penstock(std::vector<std::string> arguments) {
    arguments.insert(arguments.begin(), binary("penstock").string());
    return run_program(arguments, {"PENSTOCK_SERVER=http://127.0.0.1:1", "NO_COLOR=1"});
  }
  static ProgramRun export_to(const std::string& folder, std::vector<std::string> more = {}) {
    std::vector<std::string> arguments = {
        "export", "--checkpoint", checkpoints().string(), "-o", folder, "-o", "json"};
    arguments.insert(arguments.end(), more.begin(), more.end());
    return penstock(arguments);
  }
  static Path checkpoints() { return trained_->path() / "checkpoints"; }
  std::string path(const std::string& name) const { return (folder_.path() / name).string(); }
  static std::string text_of(const Path& file) { return read_file(file, 1 << 26).value(); }

  // A folder exported anew, for a test to damage.
  std::string exported(const std::string& dtype = "fp32") {
    const ProgramRun run = export_to(path("model"), {"--dtype", dtype, "--shard-size", "40KB"});
    EXPECT_EQ(run.exit_code, 0) << run.err;
    return path("model");
  }

  static ScratchFolder* trained_;
  static double held_out_loss_;
  ScratchFolder folder_;
};

ScratchFolder* HfTest::trained_ = nullptr;
double HfTest::held_out_loss_ = NAN;

TEST_F(HfTest, AnExportOfAnyLayoutIsWholeExactAndChecked) {
  const ProgramRun run = export_to(path("model"), {"--dtype", "fp32", "--shard-size", "40KB",
                                                   "--logits", path("logits.safetensors")});
  ASSERT_EQ(run.exit_code, 0) << run.err;
  const Json document = Json::parse(run.out);
  EXPECT_EQ(document["kind"], "Export");
  EXPECT_EQ(document["step"], kSteps);
  EXPECT_EQ(document["largest_logit_difference"], 0.0);
  EXPECT_GT(document["files"], 3);
  EXPECT_NE(run.err.find("read back byte for byte"), std::string::npos) << run.err;

  const auto folder = HfFolder::open(path("model"));
  ASSERT_TRUE(folder.ok()) << folder.status().to_string();
  EXPECT_EQ(folder->weights().size(), document["tensors"]);
  EXPECT_TRUE(folder->weights().contains("model.layers.3.mlp.experts.7.up_proj.weight"));
  EXPECT_TRUE(folder->weights().contains("model.layers.1.mlp.gate.e_score_correction_bias"));
  for (const auto& [name, weight] : folder->weights()) {
    EXPECT_EQ(weight.entry->dtype, DType::kF32) << name;
    EXPECT_EQ(name.find('|'), std::string::npos) << "optimizer state stays home: " << name;
  }
  EXPECT_FALSE(std::filesystem::exists(path("model.partial")));
  const auto logits = SafetensorsFile::open(path("logits.safetensors"));
  ASSERT_TRUE(logits.ok()) << logits.status().to_string();
  EXPECT_EQ(logits->header().tensors[0].shape, (std::vector<int64_t>{32, 257}));
}

TEST_F(HfTest, TheConfigNamesTheModelAndTheTokenizerItsBytes) {
  const std::string folder = exported("bf16");
  const Json config = Json::parse(text_of(folder + "/config.json"));
  EXPECT_EQ(config["architectures"], Json::array({"DeepseekV3ForCausalLM"}));
  EXPECT_EQ(config["torch_dtype"], "bfloat16");
  EXPECT_EQ(config["num_key_value_heads"], 2);
  EXPECT_EQ(config["topk_method"], "noaux_tc");
  EXPECT_EQ(config["eos_token_id"], 256);
  EXPECT_FALSE(config.contains("rope_scaling"));
  EXPECT_FALSE(config.contains("quantization_config"));
  const Json tokenizer = Json::parse(text_of(folder + "/tokenizer.json"));
  const Json& vocabulary = tokenizer["model"]["vocab"];
  ASSERT_EQ(vocabulary.size(), 256u);
  EXPECT_EQ(vocabulary["A"], 65);
  EXPECT_EQ(vocabulary["Ġ"], 32);    // GPT-2's sign for a space
  EXPECT_EQ(vocabulary["Ċ"], 10);    // and for a line's end
  EXPECT_EQ(vocabulary["Ń"], 0xad);  // the last that has no sign of its own
  EXPECT_EQ(vocabulary["ÿ"], 255);
  EXPECT_EQ(tokenizer["added_tokens"][0]["id"], 256);
  EXPECT_EQ(Json::parse(text_of(folder + "/generation_config.json"))["eos_token_id"], 256);
}

TEST_F(HfTest, ARunThatStartsFromAnExportIsThatModelInAnotherLayout) {
  const std::string folder = exported();
  std::ofstream(path("other.yaml")) << tiny_job_yaml(
      folder_.path(), {.name = "tiny", .pipeline = 1, .expert = 1, .microbatches = 8, .steps = 5});
  const ProgramRun import = penstock(
      {"import", folder, "--like", path("other.yaml"), "-o", path("job.json"), "-o", "json"});
  ASSERT_EQ(import.exit_code, 0) << import.err;
  EXPECT_EQ(Json::parse(import.out)["spec"], path("job.json"));
  EXPECT_EQ(Json::parse(text_of(path("job.json")))["checkpoint"]["init_from"], folder);

  const ProgramRun run = train(path("job.json"), 1);
  ASSERT_EQ(run.exit_code, 0) << run.err;
  const Json first = lines(run).front();
  ASSERT_EQ(first["step"], 0);
  EXPECT_NEAR(first["held_out_loss"], held_out_loss_, 1e-6);
}

TEST_F(HfTest, ARunInTheSameLayoutStartsFromTheSameBits) {
  const std::string folder = exported();
  const Path like = trained_->path() / "job.yaml";
  ASSERT_EQ(penstock({"import", folder, "--like", like.string(), "-o", path("job.json")}).exit_code,
            0);
  const ProgramRun run = train(path("job.json"), 1);
  ASSERT_EQ(run.exit_code, 0) << run.err;
  EXPECT_EQ(lines(run).front()["held_out_loss"], held_out_loss_);
}

TEST_F(HfTest, MultiTokenPredictionTravelsUnderItsLayer) {
  std::string spec = tiny_job_yaml(folder_.path(), {.steps = 2, .checkpoint_interval = 2});
  spec.replace(spec.find("  n_group: 2"), 0, "  num_nextn_predict_layers: 1\n");
  spec.replace(spec.find("optimizer: {"), 12, "optimizer: {ema_decay: 0.5, ema_evaluation: true, ");
  std::ofstream(path("job.yaml")) << spec;
  const ProgramRun trained = train(path("job.yaml"), 2, "predicting");
  ASSERT_EQ(trained.exit_code, 0) << trained.err;
  const ProgramRun run =
      penstock({"export", "--checkpoint", (trained_->path() / "predicting").string(), "--dtype",
                "fp32", "-o", path("model")});
  ASSERT_EQ(run.exit_code, 0) << run.err;
  EXPECT_EQ(Json::parse(text_of(path("model/config.json")))["num_nextn_predict_layers"], 1);
  const HfFolder folder = HfFolder::open(path("model")).value();
  for (const char* name :
       {"eh_proj.weight", "enorm.weight", "hnorm.weight", "shared_head.norm.weight",
        "shared_head.head.weight", "embed_tokens.weight", "mlp.experts.7.down_proj.weight",
        "mlp.gate.e_score_correction_bias", "self_attn.kv_b_proj.weight"}) {
    EXPECT_TRUE(folder.weights().contains(std::string("model.layers.4.") + name)) << name;
  }
  ASSERT_EQ(penstock({"import", path("model"), "--like", path("job.yaml"), "-o", path("job.json")})
                .exit_code,
            0);
  // Evaluated with the average of the weights, which begins as the folder's.
  const ProgramRun again = train(path("job.json"), 1);
  ASSERT_EQ(again.exit_code, 0) << again.err;
  spec.replace(spec.find("ema_evaluation: true"), 20, "ema_evaluation: false");
  std::ofstream(path("job.yaml")) << spec;
  ASSERT_EQ(
      penstock({"import", path("model"), "--like", path("job.yaml"), "-o", path("plain.json")})
          .exit_code,
      0);
  const ProgramRun plain = train(path("plain.json"), 1);
  EXPECT_EQ(lines(again).front()["held_out_loss"], lines(plain).front()["held_out_loss"]);
  EXPECT_EQ(penstock({"import", path("model")}).err.find("ignored tensor model.layers.4.eh_proj"),
            std::string::npos);
}

TEST_F(HfTest, AJobOnAClusterStartsFromAFolderAndIsExportedByItsName) {
  const std::string folder = exported();
  const Path like = trained_->path() / "job.yaml";
  ASSERT_EQ(penstock({"import", folder, "--like", like.string(), "-o", path("job.json")}).exit_code,
            0);
  Cluster cluster;
  const std::string id = cluster.submit(text_of(path("job.json")));
  ASSERT_TRUE(cluster.wait_for_state(id, "SUCCEEDED")) << cluster.describe(id);
  const Json evaluations = cluster.get("/api/v1/jobs/" + id + "/evaluations")["items"];
  ASSERT_FALSE(evaluations.empty());
  EXPECT_EQ(evaluations[0]["step"], 0);
  EXPECT_NEAR(evaluations[0]["loss"], held_out_loss_, 1e-8);  // which was printed with nine digits
  const ProgramRun run =
      penstock({"export", "tiny", "--server", cluster.server(), "-o", path("again"), "-o", "json"});
  ASSERT_EQ(run.exit_code, 0) << run.err;
  EXPECT_EQ(Json::parse(run.out)["step"], kSteps);
  EXPECT_GT(Json::parse(run.out)["largest_logit_difference"], 0.0) << "bf16 rounds";
}

TEST_F(HfTest, ASpecMadeFromAFolderAloneIsValid) {
  const std::string folder = exported();
  const ProgramRun run = penstock({"import", folder, "-o", path("job.yaml")});
  ASSERT_EQ(run.exit_code, 0) << run.err;
  EXPECT_EQ(run.out, path("job.yaml") + "\n");
  make_dataset(folder_.path(), "corpus_train", 1, 5'000);
  make_dataset(folder_.path(), "corpus_heldout", 2, 5'000);
  const ProgramRun dry = penstock({"submit", path("job.yaml"), "--dry-run", "-o", "json"});
  const Json spec = Json::parse(dry.out);
  EXPECT_EQ(spec.value("kind", ""), "TrainingRun") << dry.err;
  EXPECT_EQ(spec["checkpoint"]["init_from"], folder);
  EXPECT_EQ(spec["data"]["tokenizer"], "bytes");
  EXPECT_EQ(spec["model"]["n_routed_experts"], 8);
  EXPECT_EQ(penstock({"import", folder, "-o", path("job.yaml")}).exit_code, 6)
      << "an existing spec is not overwritten";
}

TEST_F(HfTest, FoldersOfTransformersAreTakenAsTheyAre) {
  for (const std::string name : {"hf_bf16", "hf_fp8"}) {
    const ProgramRun run =
        penstock({"import", (Path(PENSTOCK_FIXTURES) / name).string(), "-o", "json"});
    ASSERT_EQ(run.exit_code, 0) << run.err;
    EXPECT_GT(Json::parse(run.out)["parameters"], 18'000);
    EXPECT_EQ(Json::parse(run.out)["spec"], nullptr);
  }
}

TEST_F(HfTest, AnExportNeedsOneSourceAndOneFolder) {
  EXPECT_EQ(penstock({"export", "-o", path("x")}).exit_code, 2);
  EXPECT_EQ(penstock({"export", "job", "--checkpoint", "y", "-o", path("x")}).exit_code, 2);
  EXPECT_EQ(export_to(path("x"), {"-o", path("z")}).exit_code, 2);
  EXPECT_EQ(penstock({"export", "--checkpoint", checkpoints().string()}).exit_code, 2);
  EXPECT_EQ(export_to(path("x"), {"--dtype", "int4"}).exit_code, 2);
  EXPECT_EQ(penstock({"export", "job", "-o", path("x"), "-o", "json"}).exit_code, 5);
}

TEST_F(HfTest, AStepIsChosenAndAMissingOneNotFound) {
  EXPECT_EQ(Json::parse(export_to(path("two"), {"--step", "2", "--no-logits"}).out)["step"], 2);
  const ProgramRun run = export_to(path("nine"), {"--step", "9"});
  EXPECT_EQ(run.exit_code, 3);
  EXPECT_NE(run.err.find("no checkpoint of step 9"), std::string::npos) << run.err;
  EXPECT_EQ(penstock({"export", "--checkpoint", path("none"), "-o", path("x")}).exit_code, 3);
  EXPECT_EQ(
      penstock({"export", "--checkpoint", folder_.path().string(), "-o", path("x")}).exit_code, 3);
}

TEST_F(HfTest, AFolderThatExistsIsLeftAlone) {
  std::filesystem::create_directory(path("model"));
  const ProgramRun run = export_to(path("model"));
  EXPECT_EQ(run.exit_code, 6);
  EXPECT_NE(run.err.find("exists"), std::string::npos) << run.err;
  EXPECT_TRUE(std::filesystem::is_empty(path("model")));
}

TEST_F(HfTest, WhatAKilledExportLeftIsReplacedAndARunningOneIsNot) {
  std::filesystem::create_directory(path("model.partial"));
  std::ofstream(path("model.partial/model.safetensors")) << "half";
  const FileDescriptor running = open_file(path("model.partial"), O_RDONLY | O_DIRECTORY).value();
  ASSERT_EQ(::flock(running.get(), LOCK_EX | LOCK_NB), 0);
  const ProgramRun beside = export_to(path("model"));
  EXPECT_EQ(beside.exit_code, 6);
  EXPECT_NE(beside.err.find("another export"), std::string::npos) << beside.err;
  EXPECT_TRUE(std::filesystem::exists(path("model.partial/model.safetensors")));
  ASSERT_EQ(::flock(running.get(), LOCK_UN), 0);
  EXPECT_EQ(export_to(path("model")).exit_code, 0);
  EXPECT_TRUE(HfFolder::open(path("model")).ok());
}

TEST_F(HfTest, AFullDiskLeavesNothingBehind) {
  const SmallDisk disk(path("disk"), 64 << 10);
  const ProgramRun run = export_to(path("disk/model"));
  EXPECT_EQ(run.exit_code, 1) << run.err;
  EXPECT_NE(run.err.find("bytes are free, "), std::string::npos) << run.err;
  EXPECT_TRUE(std::filesystem::is_empty(path("disk")));
}

TEST_F(HfTest, ADamagedCheckpointIsNotExported) {
  std::filesystem::copy(checkpoints(), path("damaged"));
  for (const auto& entry : std::filesystem::directory_iterator(path("damaged"))) {
    if (entry.path().extension() != ".segment") continue;
    std::fstream file(entry.path(), std::ios::in | std::ios::out | std::ios::binary);
    file.seekp(5000);
    file.put('\x55').put('\xaa').put('\x55');
  }
  const ProgramRun run = penstock({"export", "--checkpoint", path("damaged"), "-o", path("model")});
  EXPECT_EQ(run.exit_code, 14) << run.err;
  EXPECT_FALSE(std::filesystem::exists(path("model")));
  EXPECT_FALSE(std::filesystem::exists(path("model.partial")));
}

TEST_F(HfTest, AFolderWithATensorMissingIsRefusedByName) {
  const std::string folder = exported();
  std::string index = text_of(folder + "/model.safetensors.index.json");
  const size_t at = index.find("    \"model.layers.0.input_layernorm.weight\"");
  ASSERT_NE(at, std::string::npos);
  std::ofstream(folder + "/model.safetensors.index.json")
      << index.erase(at, index.find('\n', at) + 1 - at);
  const ProgramRun run = penstock({"import", folder, "-o", "json"});
  EXPECT_EQ(run.exit_code, 14);
  EXPECT_NE(run.err.find("has tensor model.layers.0.input_layernorm.weight"), std::string::npos)
      << run.err;
}

TEST_F(HfTest, AValueThatIsNotFiniteIsRefusedByName) {
  ASSERT_EQ(export_to(path("model"), {"--dtype", "fp32"}).exit_code, 0);
  const Path file = path("model/model.safetensors");
  const uint64_t size = std::filesystem::file_size(file);
  const float infinity = INFINITY;
  std::fstream(file, std::ios::in | std::ios::out | std::ios::binary)
      .seekp(static_cast<std::streamoff>(size - sizeof infinity))
      .write(reinterpret_cast<const char*>(&infinity), sizeof infinity);
  const ProgramRun run = penstock({"import", path("model")});
  EXPECT_EQ(run.exit_code, 14);
  EXPECT_NE(run.err.find("tensor model.norm.weight: element 31 is inf"), std::string::npos)
      << run.err;
}

TEST_F(HfTest, ASpecOfAnotherModelIsRefusedBeforeItStarts) {
  const std::string folder = exported();
  std::string spec = tiny_job_yaml(folder_.path(), {});
  const size_t at = spec.find("num_experts_per_tok: 2");
  spec.replace(at, 22, "num_experts_per_tok: 3");
  std::ofstream(path("other.yaml")) << spec;
  const ProgramRun run =
      penstock({"import", folder, "--like", path("other.yaml"), "-o", path("job.json")});
  EXPECT_EQ(run.exit_code, 2);
  EXPECT_NE(run.err.find("model.num_experts_per_tok is 3, but 2 for the weights"),
            std::string::npos)
      << run.err;
  EXPECT_FALSE(std::filesystem::exists(path("job.json")));
  spec.replace(spec.find("checkpoint: {"), 13, "checkpoint: {init_from: model, ");
  std::ofstream(path("direct.yaml")) << spec;
  const ProgramRun submit = penstock({"submit", path("direct.yaml")});
  EXPECT_EQ(submit.exit_code, 2);
  EXPECT_NE(submit.err.find("checkpoint.init_from: model.num_experts_per_tok"), std::string::npos)
      << submit.err;
}

TEST_F(HfTest, AConfigOfAnotherKindOfModelIsRefusedWithItsPlace) {
  const std::string folder = exported();
  std::string config = text_of(folder + "/config.json");
  config.replace(config.find("\"deepseek_v3\""), 13, "\"llama\"");
  std::ofstream(folder + "/config.json") << config;
  const ProgramRun run = penstock({"import", folder});
  EXPECT_EQ(run.exit_code, 2);
  EXPECT_NE(run.err.find("config.json:"), std::string::npos) << run.err;
  EXPECT_NE(run.err.find("only deepseek_v3 is"), std::string::npos) << run.err;
}

TEST_F(HfTest, ATensorTheModelHasNoPlaceForIsNamedAndIgnored) {
  ASSERT_EQ(export_to(path("model"), {"--dtype", "fp32"}).exit_code, 0);
  std::string config = text_of(path("model/config.json"));
  config.replace(config.find("\"num_hidden_layers\": 4"), 22, "\"num_hidden_layers\": 3");
  std::ofstream(path("model/config.json")) << config;
  const ProgramRun run = penstock({"import", path("model"), "-o", "json"});
  ASSERT_EQ(run.exit_code, 0) << run.err;
  EXPECT_GT(Json::parse(run.out)["ignored_tensors"], 20);
  EXPECT_NE(run.err.find("ignored tensor model.layers.3."), std::string::npos) << run.err;
}

}  // namespace
}  // namespace penstock
