#include "ops/cli/spec_file.h"

#include <gtest/gtest.h>

#include <fstream>

#include "tests/run/spec_text.h"
#include "tests/support/cluster.h"

namespace penstock {
namespace {

class SpecFileTest : public testing::Test {
 protected:
  std::string write(const std::string& text) {
    std::ofstream(folder_.path() / "job.yaml") << text;
    return (folder_.path() / "job.yaml").string();
  }
  // The valid spec with data sets of `tokens` tokens beside it.
  std::string write_with_data(int64_t tokens) {
    make_dataset(folder_.path(), "train", 1, tokens);
    make_dataset(folder_.path(), "heldout", 2, tokens);
    std::string text = edited("/data/corpus_train", "train");
    text.replace(text.find("/data/corpus_heldout"), 20, "heldout");
    return write(text);
  }
  ScratchFolder folder_;
};

TEST_F(SpecFileTest, RelativePathsStartAtTheSpecsFolder) {
  const auto spec = load_spec_file(write_with_data(1000), "");
  ASSERT_TRUE(spec.ok()) << spec.status().message();
  EXPECT_EQ(spec->data.train[0].path, (folder_.path() / "train").string());
  EXPECT_EQ(spec->data.validation[0].path, (folder_.path() / "heldout").string());
  EXPECT_EQ(spec->data.tokenizer, "bytes");
  EXPECT_TRUE(check_spec_data(*spec).ok());
}

TEST_F(SpecFileTest, ANameReplacesTheSpecsAndIsChecked) {
  const std::string path = write(std::string(kValidSpec));
  EXPECT_EQ(load_spec_file(path, "other")->name, "other");
  EXPECT_EQ(load_spec_file(path, "No Good").status().code(), Code::kInvalidArgument);
}

TEST_F(SpecFileTest, AMistakeNamesTheFileAsItWasGiven) {
  const std::string path = write(edited("hidden_size", "hiden_size"));
  EXPECT_EQ(load_spec_file(path, "").status().message().find(path + ":6:3: unknown key"), 0u);
}

TEST_F(SpecFileTest, AMissingFileIsNotFound) {
  EXPECT_EQ(load_spec_file("/nonexistent/job.yaml", "").status().code(), Code::kNotFound);
}

TEST_F(SpecFileTest, MissingDataIsFoundBeforeAnythingStarts) {
  const auto spec = load_spec_file(write(std::string(kValidSpec)), "");
  ASSERT_TRUE(spec.ok());
  const Status status = check_spec_data(*spec);
  EXPECT_EQ(status.code(), Code::kNotFound);
  EXPECT_EQ(status.message().find("data.train: open /data/corpus_train.idx"), 0u)
      << status.message();
}

TEST_F(SpecFileTest, DataShorterThanASequenceIsFoundBeforeAnythingStarts) {
  const std::string path = write_with_data(1000);
  std::string text = *read_file(path, 1 << 20);
  text.replace(text.find("seq_length: 128"), 15, "seq_length: 4000");
  const auto spec = load_spec_file(write(text), "");
  ASSERT_TRUE(spec.ok()) << spec.status().message();
  EXPECT_EQ(check_spec_data(*spec).code(), Code::kInvalidArgument);
}

TEST_F(SpecFileTest, AFolderThatIsNotUtf8IsNamedAndNotChanged) {
  const Path folder = Path(write(std::string(kValidSpec))).parent_path() / "\xff";
  std::filesystem::create_directories(folder);
  const Path path = folder / "job.yaml";
  ASSERT_TRUE(write_and_sync(path, as_bytes(kValidSpec)).ok());
  const auto spec = load_spec_file(path.string(), "");
  ASSERT_EQ(spec.status().code(), Code::kInvalidArgument);
  EXPECT_NE(spec.status().message().find("not UTF-8"), std::string::npos);
}

TEST_F(SpecFileTest, ARefusalIsGivenThePlaceOfTheSectionItNames) {
  const std::string path = write(std::string(kValidSpec));
  EXPECT_EQ(section_place(path, "parallelism needs 4 ranks"), path + ":27:1: ");
  EXPECT_EQ(section_place(path, "the disk is full"), "");
}

}  // namespace
}  // namespace penstock
