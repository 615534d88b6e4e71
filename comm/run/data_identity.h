// Which data a job trains on, so that no start of it reads other tokens than the one before.
#pragma once

#include <cstdint>
#include <string>

#include "comm/base/hash.h"

namespace penstock {

// One data set, as a rank found it when it opened it.
struct DataIdentity {
  std::string path;  // prefix of its two files, as in the spec
  int64_t tokens = 0;
  Digest digest;  // IndexedDataset::digest()
  bool operator==(const DataIdentity&) const = default;
};

}  // namespace penstock
