// Format: blocks of 32 KiB; in them pieces of a header (masked CRC-32C of type and bytes, length,
// type) and bytes. A record is one piece of type kFull or, where it does not fit, kFirst, others
// and kLast.
#include "checkpoint/index_log.h"

#include <fmt/format.h>

#include <algorithm>
#include <set>

#include "comm/base/hash.h"

namespace penstock {
namespace {

constexpr size_t kBlockBytes = 32768;
constexpr size_t kHeaderBytes = 7;
constexpr size_t kTypeOffset = 6;  // in the header; the checksum covers from here
constexpr uint8_t kFull = 1;
constexpr uint8_t kFirst = 2;
constexpr uint8_t kLast = 4;
constexpr uint64_t kLogBytesMax = 64 << 20;  // one is begun anew long before

template <typename T>
T load(Bytes header, size_t offset) {
  return ByteReader(header.subspan(offset)).get<T>().value();
}

uint32_t masked(uint32_t checksum) {
  return ((checksum >> 15) | (checksum << 17)) + 0xa282ead8u;
}

}  // namespace

Status check_log(Bytes log) {
  std::set<std::string> records;
  std::string record;
  for (size_t at = 0; log.size() - at >= kHeaderBytes;) {
    const size_t left = std::min(log.size() - at, kBlockBytes - at % kBlockBytes);
    if (left < kHeaderBytes) {  // filler
      at += left;
      continue;
    }
    const Bytes header = log.subspan(at, kHeaderBytes);
    const size_t size = load<uint16_t>(header, 4);
    if (size > left - kHeaderBytes) return {};
    const uint32_t checksum = crc32c(log.subspan(at + kTypeOffset, 1 + size));
    if (load<uint32_t>(header, 0) != masked(checksum)) return {};
    const auto type = load<uint8_t>(header, kTypeOffset);
    if (type == kFull || type == kFirst) record.clear();
    record += as_text(log.subspan(at + kHeaderBytes, size));
    if ((type == kFull || type == kLast) && !records.insert(record).second) {
      return data_loss(fmt::format("a record stands in it twice, again before byte {}", at));
    }
    at += kHeaderBytes + size;
  }
  return {};
}

Status check_logs(const Path& folder) {
  PENSTOCK_TRY_ASSIGN(const std::vector<std::string> names, file_names(folder));
  for (const std::string& name : names) {
    if (!name.ends_with(".log") && !name.starts_with("MANIFEST")) continue;
    const Result<std::string> log = read_plain_file(folder / name, kLogBytesMax);
    if (log.ok()) PENSTOCK_TRY(check_log(as_bytes(*log)).with_context(name));
  }
  return {};
}

}  // namespace penstock
