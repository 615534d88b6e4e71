// Corpora and data sets in a directory that goes away with the test.
#pragma once

#include <gtest/gtest.h>
#include <stdlib.h>

#include <filesystem>
#include <fstream>
#include <memory>
#include <string>
#include <vector>

#include "worker/data/indexed_dataset.h"

namespace penstock {

class DataDirectory {
 public:
  DataDirectory() {
    std::string path = (std::filesystem::temp_directory_path() / "penstock-data-XXXXXX").string();
    if (::mkdtemp(path.data()) == nullptr) ADD_FAILURE() << "no temporary directory";
    path_ = path;
  }
  ~DataDirectory() { std::filesystem::remove_all(path_); }
  DataDirectory(const DataDirectory&) = delete;
  DataDirectory& operator=(const DataDirectory&) = delete;

  std::string path(const std::string& name) const { return (path_ / name).string(); }

  std::string write(const std::string& name, std::string_view content) const {
    std::ofstream(path(name), std::ios::binary) << content;
    return path(name);
  }
  std::string read(const std::string& name) const {
    std::ifstream file(path(name), std::ios::binary);
    return {std::istreambuf_iterator<char>(file), {}};
  }

  // A data set of one document that counts 0, 1, 2, … modulo `vocab_size`.
  std::shared_ptr<const IndexedDataset> counting(const std::string& name, int64_t token_count,
                                                 int64_t vocab_size = 60000) const {
    std::vector<int32_t> tokens(token_count);
    for (int64_t i = 0; i < token_count; ++i) tokens[i] = static_cast<int32_t>(i % vocab_size);
    auto writer = IndexedDatasetWriter::create(path(name), TokenType::kU16);
    EXPECT_TRUE(writer.ok() && writer->add_document(tokens).ok() && writer->finish().ok());
    auto data = IndexedDataset::open(path(name));
    EXPECT_TRUE(data.ok()) << data.status().message();
    return std::make_shared<const IndexedDataset>(std::move(*data));
  }

 private:
  std::filesystem::path path_;
};

}  // namespace penstock
