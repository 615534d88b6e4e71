// Folders made by transformers, read here: the logits must be those that transformers computes from
// them. See tests/fixtures/make_hf_folders.py.
#include <gtest/gtest.h>

#include <cmath>
#include <set>

#include "checkpoint/hf_folder.h"
#include "comm/run/job_spec.h"
#include "worker/model/generator.h"
#include "worker/model/weight_list.h"

namespace penstock {
namespace {

template <typename T>
std::vector<T> tensor(const SafetensorsFile& file, const std::string& name) {
  for (const SafetensorsEntry& entry : file.header().tensors) {
    if (entry.name != name) continue;
    std::vector<T> values(entry.byte_count() / sizeof(T));
    EXPECT_TRUE(file.read(entry, 0, std::as_writable_bytes(std::span(values))).ok());
    return values;
  }
  ADD_FAILURE() << "no tensor " << name;
  return {};
}

// As transformers wrote it, but for the prediction layer that it counts and did not write.
ModelConfig model_of(const HfFolder& folder) {
  std::string config = folder.config();
  const std::string counted = "\"num_nextn_predict_layers\": 1";
  if (const size_t at = config.find(counted); at != std::string::npos)
    config[at + counted.size() - 1] = '0';
  const auto model = parse_model_config(config, "config.json");
  EXPECT_TRUE(model.ok()) << model.status().message();
  return model.value();
}

class HfFolderGoldenTest : public testing::TestWithParam<std::string> {
 protected:
  HfFolderGoldenTest()
      : path_(Path(PENSTOCK_FIXTURES) / GetParam()), folder_(HfFolder::open(path_).value()) {}
  Path path_;
  HfFolder folder_;
};

TEST_P(HfFolderGoldenTest, ComputesTheLogitsOfTransformers) {
  const auto golden = SafetensorsFile::open(path_ / "logits.safetensors");
  ASSERT_TRUE(golden.ok()) << golden.status().to_string();
  const std::vector<int32_t> tokens = tensor<int32_t>(*golden, "tokens");
  const std::vector<float> expected = tensor<float>(*golden, "logits");
  Generator generator(model_of(folder_), std::ssize(tokens));
  for (const Generator::Weight& weight : generator.weights()) {
    const Status status = folder_.read(weight.name, weight.shape, weight.values);
    ASSERT_TRUE(status.ok()) << status.to_string();
  }
  const auto logits = generator.logits(tokens);
  ASSERT_TRUE(logits.ok()) << logits.status().to_string();
  ASSERT_EQ(logits->size(), expected.size());
  double worst = 0.0;
  for (size_t i = 0; i < expected.size(); ++i) {
    worst = std::max(worst, std::abs(static_cast<double>((*logits)[i]) - expected[i]));
  }
  EXPECT_LT(worst, 1e-4);
  RecordProperty("largest_difference", std::to_string(worst));
}

TEST_P(HfFolderGoldenTest, HoldsExactlyTheListedWeights) {
  std::set<std::string> listed;
  for (const WeightShape& weight : weight_list(model_of(folder_))) {
    const Status status = folder_.check(weight.name, weight.shape);
    EXPECT_TRUE(status.ok()) << status.to_string();
    EXPECT_TRUE(listed.insert(weight.name).second) << weight.name;
  }
  for (const auto& [name, weight] : folder_.weights()) EXPECT_TRUE(listed.contains(name)) << name;
}

INSTANTIATE_TEST_SUITE_P(All, HfFolderGoldenTest, testing::Values("hf_bf16", "hf_fp8"),
                         [](const auto& info) { return info.param; });

TEST(WeightListTest, IsWhatAGeneratorIsFilledWith) {
  const ModelConfig model = model_of(HfFolder::open(Path(PENSTOCK_FIXTURES) / "hf_bf16").value());
  const Generator generator(model, 4);
  std::set<std::pair<std::string, std::vector<int64_t>>> listed, filled;
  for (const WeightShape& weight : weight_list(model)) listed.emplace(weight.name, weight.shape);
  for (const Generator::Weight& weight : generator.weights()) {
    filled.emplace(weight.name, weight.shape);
  }
  EXPECT_EQ(listed, filled);
}

}  // namespace
}  // namespace penstock
