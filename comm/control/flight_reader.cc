#include "comm/control/flight_reader.h"

#include <fcntl.h>

#include <cstddef>
#include <span>

namespace penstock {
namespace {

constexpr int kReadsMax = 100;  // a rank writes a few times in the time of one

}  // namespace

Result<FlightRecord> read_flight_record(const Path& path) {
  PENSTOCK_TRY_ASSIGN(const FileDescriptor fd, open_file(path, O_RDONLY));
  const auto read_count = [&](uint64_t* count) {
    return read_at(fd.get(), path, offsetof(FlightFile, count),
                   std::as_writable_bytes(std::span(count, 1)));
  };
  for (int i = 0; i < kReadsMax; ++i) {
    uint64_t before = 0;
    PENSTOCK_TRY(read_count(&before));
    FlightFile file;
    PENSTOCK_TRY(read_at(fd.get(), path, 0, std::as_writable_bytes(std::span(&file, 1))));
    uint64_t after = 0;
    PENSTOCK_TRY(read_count(&after));
    if (before != after || file.count != before) continue;
    Result<FlightRecord> record = decode_flight_record(file);
    return record.ok() ? std::move(record) : record.status().with_context(path.string());
  }
  return unavailable(path.string() + " changes all the time");
}

}  // namespace penstock
