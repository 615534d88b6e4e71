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
  std::string spec_path() const { return (folder_.path() / "job.yaml").string(); }
  // What is wrong with the data of the spec last written.
  Status data_status() const {
    const SpecSource source = *read_spec(spec_path());
    return check_spec_data(source, *load_spec(source, ""));
  }
  ScratchFolder folder_;
};

TEST_F(SpecFileTest, RelativePathsStartAtTheSpecsFolder) {
  const auto spec = load_spec_file(write_with_data(1000), "");
  ASSERT_TRUE(spec.ok()) << spec.status().message();
  EXPECT_EQ(spec->data.train[0].path, (folder_.path() / "train").string());
  EXPECT_EQ(spec->data.validation[0].path, (folder_.path() / "heldout").string());
  EXPECT_EQ(spec->data.tokenizer, "bytes");
  EXPECT_TRUE(check_spec_data(*read_spec(spec_path()), *spec).ok());
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

TEST_F(SpecFileTest, MissingDataIsNamedWithItsPlaceBeforeAnythingStarts) {
  const std::string path = write(std::string(kValidSpec));
  const Status status = data_status();
  EXPECT_EQ(status.code(), Code::kInvalidArgument);
  EXPECT_EQ(status.message(), path +
                                  ":23:18: data.train[0]: open /data/corpus_train.idx: No such "
                                  "file or directory; it is looked for from the spec's folder; "
                                  "penstock data prepare makes data sets");
}

TEST_F(SpecFileTest, TheSourceThatIsMissingIsTheOneNamed) {
  write_with_data(1000);
  std::string text = *read_file(spec_path(), 1 << 20);
  text.replace(text.find("[{path: heldout}]"), 17, "[heldout, {path: gone}]");
  const std::string path = write(text);
  const Status status = data_status();
  EXPECT_EQ(status.message().find(path + ":24:32: data.validation[1]: open "), 0u)
      << status.message();
}

// A checkout in small: the spec, and the script that makes its corpus.
TEST_F(SpecFileTest, TheMissingCorpusOfAnExampleComesWithTheCommandThatMakesIt) {
  write(edited("/data/corpus_train", "build/corpus/fortunes_train"));
  const std::string before = data_status().message();
  EXPECT_NE(before.find("penstock data prepare makes"), std::string::npos) << before;
  const Path script = folder_.path() / "ops/corpus";
  std::filesystem::create_directories(script.parent_path());
  std::ofstream(script) << "#!/bin/sh\n";
  EXPECT_TRUE(data_status().message().ends_with("; make it with: " + script.string()))
      << data_status().message();
  write(edited("/data/corpus_train", "build/corpus/other_train"));
  const std::string other = data_status().message();
  EXPECT_NE(other.find("penstock data prepare makes"), std::string::npos) << other;
}

TEST_F(SpecFileTest, DataShorterThanASequenceIsFoundBeforeAnythingStarts) {
  write_with_data(1000);
  std::string text = *read_file(spec_path(), 1 << 20);
  text.replace(text.find("seq_length: 128"), 15, "seq_length: 4000");
  const std::string path = write(text);
  EXPECT_EQ(data_status().code(), Code::kInvalidArgument);
  EXPECT_EQ(data_status().message().find(path + ":23:10: data.train: "), 0u)
      << data_status().message();
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
  const SpecSource source = *read_spec(path);
  EXPECT_EQ(section_place(source, "parallelism needs 4 ranks"), path + ":27:1: ");
  EXPECT_EQ(section_place(source, "the disk is full"), "");
}

}  // namespace
}  // namespace penstock
