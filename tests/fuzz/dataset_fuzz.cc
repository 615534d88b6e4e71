// The .idx file of a Megatron data set, beside a .bin of 64 bytes.
#include <fcntl.h>
#include <stdlib.h>

#include <filesystem>

#include "comm/base/check.h"
#include "comm/base/file.h"
#include "tests/fuzz/targets.h"
#include "worker/data/indexed_dataset.h"

namespace penstock {
namespace {

struct Folder {
  Path path;
  Folder() {
    std::string name = (std::filesystem::temp_directory_path() / "penstock-fuzz-XXXXXX").string();
    PENSTOCK_CHECK(::mkdtemp(name.data()) != nullptr, name);
    path = name;
    PENSTOCK_CHECK(write_and_sync(path / "it.bin", as_bytes(std::string(64, '\1'))).ok());
  }
  ~Folder() {
    std::error_code error;
    std::filesystem::remove_all(path, error);
  }
};

}  // namespace

void fuzz::dataset(Bytes input) {
  static const Folder folder;
  const Path index = folder.path / "it.idx";
  {
    const auto file = open_file(index, O_WRONLY | O_CREAT | O_TRUNC);
    PENSTOCK_CHECK(file.ok() && write_at(file->get(), index, 0, input).ok());
  }
  const auto dataset = IndexedDataset::open((folder.path / "it").string());
  if (!dataset.ok()) return;
  const int64_t tokens = dataset->token_count();
  PENSTOCK_CHECK(tokens * token_bytes(dataset->type()) == 64);
  PENSTOCK_CHECK(dataset->document_begin(dataset->document_count()) == tokens);
  std::vector<int32_t> read(static_cast<size_t>(tokens));
  const Status status = dataset->read(0, read, 1 << 20);
  PENSTOCK_CHECK(status.ok() || status.code() == Code::kDataLoss);
}

}  // namespace penstock
