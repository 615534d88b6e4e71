#include "ops/cli/checkpoint_damage.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <array>

#include "checkpoint/segment_reader.h"
#include "checkpoint/store.h"
#include "comm/base/counted.h"

namespace penstock {

namespace {

Status invert_byte(const Path& path, uint64_t offset) {
  PENSTOCK_TRY_ASSIGN(const FileDescriptor file, open_file(path, O_RDWR | O_NOFOLLOW));
  std::array<std::byte, 1> byte{};
  PENSTOCK_TRY(read_at(file.get(), path, offset, byte));
  byte[0] = ~byte[0];
  PENSTOCK_TRY(write_at(file.get(), path, offset, byte));
  if (::fdatasync(file.get()) == 0) return {};
  return errno_status(errno, "sync " + path.string());
}

}  // namespace

Result<FlippedByte> flip_byte(const Path& directory, JobId job, Rank rank) {
  const StoreListing listing = list_checkpoints(directory, job);
  PENSTOCK_TRY(listing.directory);
  if (listing.checkpoints.size() < 2) {
    return failed_precondition(fmt::format(
        "{} has {}: with the newest damaged there must be one before it to go on from; "
        "try again after the next checkpoint, or with a larger checkpoint.keep_last",
        directory.string(), counted(std::ssize(listing.checkpoints), "usable checkpoint")));
  }
  PENSTOCK_TRY_ASSIGN(const StoredManifest newest,
                      read_manifest(directory / listing.checkpoints.back().manifest_file));
  const auto& segments = newest.manifest.segments;
  const auto segment = std::find_if(segments.begin(), segments.end(),
                                    [&](const ManifestSegment& of) { return of.rank == rank; });
  if (segment == segments.end()) {
    return failed_precondition(fmt::format("rank {} saved nothing of the checkpoint of step {}",
                                           rank, newest.manifest.step));
  }
  const Path path = directory / segment->file;
  PENSTOCK_TRY_ASSIGN(const SegmentReader reader, SegmentReader::open(path));
  const auto& slices = reader.slices();
  const auto largest = std::max_element(
      slices.begin(), slices.end(),
      [](const SegmentSlice& a, const SegmentSlice& b) { return a.byte_count < b.byte_count; });
  if (largest == slices.end() || largest->byte_count == 0) {
    return failed_precondition(fmt::format("{} holds no tensor", path.string()));
  }
  const uint64_t offset = largest->file_offset + largest->byte_count / 2;
  PENSTOCK_TRY(invert_byte(path, offset));
  return FlippedByte{path.string(), offset, largest->slice.name, newest.manifest.step};
}

}  // namespace penstock
