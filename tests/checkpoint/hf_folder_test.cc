// Hugging Face folders: a checkpoint's weights out and back, several files, FP8 with block scales,
// and folders that do not hold together.
#include "checkpoint/hf_folder.h"

#include <cmath>

#include "checkpoint/hf_weights.h"
#include "checkpoint/names.h"
#include "tests/checkpoint/support.h"

namespace penstock {
namespace {

using namespace checkpoint_test;

struct Saved {
  TempDirectory directory;
  Manifest manifest;
};

// A checkpoint of these tensors, each split in two where it has two rows; value i of each is i / 8.
void save(Saved& saved, const std::vector<std::pair<std::string, std::vector<int64_t>>>& tensors) {
  std::vector<std::vector<float>> values;
  for (const auto& [name, shape] : tensors) {
    std::vector<float> of_tensor(static_cast<size_t>(element_count(shape)));
    for (size_t i = 0; i < of_tensor.size(); ++i) of_tensor[i] = static_cast<float>(i) / 8.0F;
    values.push_back(std::move(of_tensor));
  }
  CommitRequest request;
  request.epoch = Epoch{1};
  request.step = 5;
  request.spec_json = "{}";
  for (int rank = 0; rank < 2; ++rank) {
    std::vector<SliceSource> sources;
    for (size_t t = 0; t < tensors.size(); ++t) {
      const auto& [name, shape] = tensors[t];
      TensorSlice slice = whole_tensor(name, DType::kF32, shape);
      const int64_t rows = shape.empty() ? 1 : shape[0];
      const int64_t cut = rows / 2;
      if (rows < 2 && rank == 1) continue;
      Bytes bytes = std::as_bytes(std::span(values[t]));
      if (rows >= 2) {
        slice.box.offset[0] = rank == 0 ? 0 : cut;
        slice.box.size[0] = rank == 0 ? cut : rows - cut;
        const size_t row_bytes = bytes.size() / rows;
        bytes = bytes.subspan(slice.box.offset[0] * row_bytes, slice.box.size[0] * row_bytes);
      }
      sources.push_back({slice, bytes});
    }
    const auto summary =
        write_segment(saved.directory.path(), {kJob, Epoch{1}, Rank{rank}, 5}, sources);
    ASSERT_TRUE(summary.ok()) << summary.status().to_string();
    request.segments.push_back(commit_segment(*summary));
  }
  auto store = CheckpointStore::open(saved.directory.path(), kJob, nullptr);
  ASSERT_TRUE(store.ok());
  const auto report = store->commit(request);
  ASSERT_TRUE(report.ok()) << report.status().to_string();
  saved.manifest =
      read_manifest(saved.directory.path() / report->info.manifest_file).value().manifest;
}

std::vector<float> floats_of(const HfFolder& folder, const std::string& name,
                             std::vector<int64_t> shape) {
  std::vector<float> values(static_cast<size_t>(element_count(shape)), -1.0F);
  const Status status = folder.read(name, shape, values);
  EXPECT_TRUE(status.ok()) << status.to_string();
  return values;
}

const std::string kGate = "model.layers.1.mlp.gate.e_score_correction_bias";

TEST(HfWeightsTest, WeightsComeBackFromSeveralFilesAndOptimizerStateStaysHome) {
  Saved saved;
  save(saved, {{"lm_head.weight", {40, 8}},
               {exp_avg_name("lm_head.weight"), {40, 8}},
               {kGate, {6}},
               {"model.embed_tokens.weight", {40, 8}},
               {"model.norm.weight", {8}},
               {state_name("step"), {}}});
  TempDirectory out;
  replace_file(out.path() / kHfConfigFile, "{}");
  const auto written = write_hf_weights(saved.directory.path(), saved.manifest, out.path(),
                                        {.dtype = DType::kF32, .shard_bytes_max = 1400});
  ASSERT_TRUE(written.ok()) << written.status().to_string();
  EXPECT_EQ(written->file_count, 2u);
  EXPECT_EQ(written->byte_count, 2 * 40 * 8 * 4u + 6 * 4 + 8 * 4);
  EXPECT_TRUE(verify_hf_weights(out.path(), *written).ok());

  const auto folder = HfFolder::open(out.path());
  ASSERT_TRUE(folder.ok()) << folder.status().to_string();
  EXPECT_EQ(folder->file_count(), 2u);
  EXPECT_EQ(folder->weights().size(), 4u);
  for (const char* name : {"lm_head.weight", "model.embed_tokens.weight"}) {
    const std::vector<float> values = floats_of(*folder, name, {40, 8});
    for (size_t i = 0; i < values.size(); ++i) ASSERT_EQ(values[i], static_cast<float>(i) / 8.0F);
  }
}

TEST(HfWeightsTest, Bf16RoundsMatricesAndLeavesRouterBiasesExact) {
  Saved saved;
  save(saved, {{kGate, {700}}, {"lm_head.weight", {70, 10}}});
  TempDirectory out;
  replace_file(out.path() / kHfConfigFile, "{}");
  const auto written = write_hf_weights(saved.directory.path(), saved.manifest, out.path(), {});
  ASSERT_TRUE(written.ok()) << written.status().to_string();
  EXPECT_EQ(written->file_count, 1u);
  EXPECT_TRUE(std::filesystem::exists(out.path() / kHfSingleFile));
  EXPECT_FALSE(std::filesystem::exists(out.path() / kHfIndexFile));
  const auto folder = HfFolder::open(out.path());
  ASSERT_TRUE(folder.ok()) << folder.status().to_string();
  EXPECT_EQ(folder->weights().at("lm_head.weight").entry->dtype, DType::kBf16);
  const std::vector<float> bias = floats_of(*folder, kGate, {700});
  const std::vector<float> head = floats_of(*folder, "lm_head.weight", {70, 10});
  int rounded = 0;
  for (size_t i = 0; i < head.size(); ++i) {
    const float exact = static_cast<float>(i) / 8.0F;
    ASSERT_EQ(bias[i], exact);
    ASSERT_NEAR(head[i], exact, exact / 256.0F);
    rounded += head[i] != exact;
  }
  EXPECT_GT(rounded, 0);
}

TEST(HfWeightsTest, APredictionLayerGetsItsCopiesOfEmbeddingAndHead) {
  Saved saved;
  save(saved, {{"lm_head.weight", {4, 2}},
               {"model.embed_tokens.weight", {4, 2}},
               {"model.layers.3.eh_proj.weight", {2, 4}}});
  TempDirectory out;
  replace_file(out.path() / kHfConfigFile, "{}");
  ASSERT_TRUE(write_hf_weights(saved.directory.path(), saved.manifest, out.path(), {}).ok());
  const auto folder = HfFolder::open(out.path());
  ASSERT_TRUE(folder.ok()) << folder.status().to_string();
  EXPECT_EQ(floats_of(*folder, "model.layers.3.embed_tokens.weight", {4, 2}),
            floats_of(*folder, "model.embed_tokens.weight", {4, 2}));
  EXPECT_EQ(floats_of(*folder, "model.layers.3.shared_head.head.weight", {4, 2}),
            floats_of(*folder, "lm_head.weight", {4, 2}));
}

TEST(HfWeightsTest, AByteChangedOnTheDiskIsFoundByTheCheckAfterwards) {
  Saved saved;
  save(saved, {{"lm_head.weight", {4, 2}}, {"model.norm.weight", {9}}});
  TempDirectory out;
  replace_file(out.path() / kHfConfigFile, "{}");
  const auto written = write_hf_weights(saved.directory.path(), saved.manifest, out.path(), {});
  ASSERT_TRUE(written.ok());
  const Path file = out.path() / kHfSingleFile;
  flip_byte(file, size_of_file(file) - 3);
  const Status status = verify_hf_weights(out.path(), *written);
  EXPECT_EQ(status.code(), Code::kDataLoss);
  EXPECT_NE(status.message().find("tensor model.norm.weight is not what was written"),
            std::string::npos)
      << status.message();
}

TEST(HfWeightsTest, ACheckpointWithoutWeightsIsRefused) {
  Saved saved;
  save(saved, {{state_name("step"), {}}});
  TempDirectory out;
  EXPECT_EQ(
      write_hf_weights(saved.directory.path(), saved.manifest, out.path(), {}).status().code(),
      Code::kNotFound);
}

// A folder written by hand.
class HfFolderTest : public testing::Test {
 protected:
  HfFolderTest() { replace_file(out_.path() / kHfConfigFile, "{}"); }

  void write(const std::string& file, const std::vector<SafetensorsEntry>& tensors,
             const std::string& data) {
    const SafetensorsHeader header{.tensors = tensors, .metadata = {}};
    replace_file(out_.path() / file, encode_safetensors_header(header) + data);
  }
  void write_index(const std::string& weight_map) {
    replace_file(out_.path() / kHfIndexFile, R"({"metadata":{},"weight_map":)" + weight_map + "}");
  }
  std::string refusal(Code code = Code::kDataLoss) {
    const auto folder = HfFolder::open(out_.path());
    EXPECT_EQ(folder.status().code(), code) << folder.status().to_string();
    return folder.status().message();
  }
  TempDirectory out_;
};

#define EXPECT_SAYS(message, words) \
  EXPECT_NE(std::string(message).find(words), std::string::npos) << (message)

TEST_F(HfFolderTest, Fp8WeightsAreMultipliedByTheScaleOfTheirBlock) {
  constexpr int64_t kRows = 130, kColumns = 260;
  const SafetensorsEntry weight{
      "a.weight", DType::kF8E4m3, {kRows, kColumns}, 24, 24 + kRows * kColumns};
  const SafetensorsEntry scales{"a.weight_scale_inv", DType::kF32, {2, 3}, 0, 24};
  const std::vector<float> scale = {1.0F, 2.0F, 4.0F, 0.5F, 0.25F, 3.0F};
  write(kHfSingleFile, {scales, weight},
        std::string(as_text(std::as_bytes(std::span(scale)))) +
            std::string(kRows * kColumns, '\x3c'));  // 1.5 everywhere
  const auto folder = HfFolder::open(out_.path());
  ASSERT_TRUE(folder.ok()) << folder.status().to_string();
  EXPECT_EQ(folder->weights().size(), 1u);
  const std::vector<float> values = floats_of(*folder, "a.weight", {kRows, kColumns});
  for (int64_t row = 0; row < kRows; ++row) {
    for (int64_t column = 0; column < kColumns; ++column) {
      ASSERT_EQ(values[static_cast<size_t>(row * kColumns + column)],
                1.5F * scale[static_cast<size_t>(row / 128 * 3 + column / 128)]);
    }
  }
}

TEST_F(HfFolderTest, Fp8WithoutItsScalesOrScalesWithoutFp8AreRefused) {
  const SafetensorsEntry weight{"a.weight", DType::kF8E4m3, {2, 2}, 0, 4};
  write(kHfSingleFile, {weight}, "xxxx");
  EXPECT_SAYS(refusal(), "tensor a.weight: it is F8_E4M3 and has no a.weight_scale_inv");
  write(kHfSingleFile, {weight, {"a.weight_scale_inv", DType::kF32, {2}, 4, 12}}, "xxxxxxxxxxxx");
  EXPECT_SAYS(refusal(), "tensor a.weight: its scales must be F32 [1, 1]");
  write(kHfSingleFile, {{"a.weight_scale_inv", DType::kF32, {1, 1}, 0, 4}}, "xxxx");
  EXPECT_SAYS(refusal(), "tensor a.weight_scale_inv scales no F8_E4M3 tensor");
  write(
      kHfSingleFile,
      {{"a.weight", DType::kF8E4m3, {4}, 0, 4}, {"a.weight_scale_inv", DType::kF32, {1, 1}, 4, 8}},
      "xxxxxxxx");
  EXPECT_SAYS(refusal(), "tensor a.weight: it is F8_E4M3 and no matrix");
}

TEST_F(HfFolderTest, AnotherQuantizationIsRefused) {
  write(kHfSingleFile, {{"a", DType::kU8, {1}, 0, 1}}, "x");
  replace_file(out_.path() / kHfConfigFile,
               R"({"quantization_config":{"quant_method":"fp8","fmt":"e4m3",)"
               R"("weight_block_size":[64,64]}})");
  EXPECT_SAYS(refusal(), "config.json: quantization_config.weight_block_size must be [128,128]");
  replace_file(out_.path() / kHfConfigFile, R"({"quantization_config":{"quant_method":"gptq"}})");
  EXPECT_SAYS(refusal(), "quantization_config.");
}

TEST_F(HfFolderTest, AConfigThatIsMissingOrNoObjectIsRefused) {
  replace_file(out_.path() / kHfConfigFile, "[]");
  EXPECT_SAYS(refusal(), "config.json: it is not an object");
  replace_file(out_.path() / kHfConfigFile, "{\"a\":1,\"a\":2}");
  EXPECT_SAYS(refusal(), "config.json: the key \"a\" is there twice");
  std::filesystem::remove(out_.path() / kHfConfigFile);
  EXPECT_SAYS(refusal(Code::kNotFound), "config.json");
}

TEST_F(HfFolderTest, AnIndexThatDoesNotFitItsFilesIsRefused) {
  const std::string one = hf_shard_name(1, 2), two = hf_shard_name(2, 2);
  write(one, {{"a", DType::kU8, {1}, 0, 1}}, "x");
  write(two, {{"b", DType::kU8, {1}, 0, 1}}, "x");
  write_index(R"({"a":")" + one + R"(","b":")" + two + "\"}");
  EXPECT_TRUE(HfFolder::open(out_.path()).ok());
  write_index(R"({"a":")" + one + R"(","b":")" + one + R"(","c":")" + two + "\"}");
  EXPECT_SAYS(refusal(), two + " has tensor b, which model.safetensors.index.json does not place");
  write_index(R"({"a":")" + one + R"(","b":")" + two + R"(","c":")" + two + "\"}");
  EXPECT_SAYS(refusal(), two + " has no tensor c");
  write_index(R"({"a":")" + one + "\"}");
  EXPECT_TRUE(HfFolder::open(out_.path()).ok()) << "files the index does not name are not read";
  write_index(R"({"a":"../x.safetensors"})");
  EXPECT_SAYS(refusal(), "tensor a: \"../x.safetensors\" is not the name of a safetensors file");
  write_index(R"({"a":")" + hf_shard_name(1, 3) + "\"}");
  refusal(Code::kNotFound);
  write_index("7");
  EXPECT_SAYS(refusal(), "no object \"weight_map\"");
}

TEST_F(HfFolderTest, AWeightThatIsMissingOrOfAnotherShapeOrTypeIsRefused) {
  write(kHfSingleFile, {{"a", DType::kF32, {1, 2}, 0, 8}, {"i", DType::kI32, {1}, 8, 12}},
        std::string(12, '\0'));
  const auto folder = HfFolder::open(out_.path());
  ASSERT_TRUE(folder.ok()) << folder.status().to_string();
  std::vector<float> values(2);
  const std::vector<int64_t> turned = {2, 1}, single = {1};
  EXPECT_SAYS(folder->read("a", turned, values).message(),
              "tensor a: its shape is [1, 2], the model's is [2, 1]");
  EXPECT_SAYS(folder->read("i", single, std::span(values).first(1)).message(),
              "tensor i: weights are F32, BF16, F16 or F8_E4M3, not i32");
  EXPECT_SAYS(folder->read("b", single, std::span(values).first(1)).message(), "has no tensor b");
}

}  // namespace
}  // namespace penstock
