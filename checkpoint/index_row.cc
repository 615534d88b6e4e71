#include "checkpoint/index_row.h"

#include <fmt/format.h>

#include "comm/base/bytes.h"

namespace penstock {
namespace {

constexpr uint8_t kRowFormat = 1;
constexpr size_t kFileNameBytesMax = 255;

}  // namespace

std::string encode_row(const CheckpointInfo& info) {
  ByteWriter writer;
  writer.put(kRowFormat);
  writer.put(info.job.value);
  writer.put(info.commit_seq);
  writer.put(info.step);
  writer.put(info.epoch.value);
  writer.put_string(info.manifest_file);
  writer.put(info.manifest_digest.low);
  writer.put(info.manifest_digest.high);
  writer.put(info.payload_bytes);
  writer.put(info.segment_count);
  writer.put(info.created_at.nanoseconds);
  return std::string(as_text(writer.data()));
}

Result<CheckpointInfo> decode_row(std::string_view bytes) {
  ByteReader reader(as_bytes(bytes));
  PENSTOCK_TRY_ASSIGN(const uint8_t format, reader.get<uint8_t>());
  if (format != kRowFormat) {
    return data_loss(
        fmt::format("an index row has format {}, this program reads {}", format, kRowFormat));
  }
  CheckpointInfo info;
  PENSTOCK_TRY_ASSIGN(info.job.value, reader.get<uint64_t>());
  PENSTOCK_TRY_ASSIGN(info.commit_seq, reader.get<uint64_t>());
  PENSTOCK_TRY_ASSIGN(info.step, reader.get<int64_t>());
  PENSTOCK_TRY_ASSIGN(info.epoch.value, reader.get<uint32_t>());
  PENSTOCK_TRY_ASSIGN(info.manifest_file, reader.get_string(kFileNameBytesMax));
  PENSTOCK_TRY_ASSIGN(info.manifest_digest.low, reader.get<uint64_t>());
  PENSTOCK_TRY_ASSIGN(info.manifest_digest.high, reader.get<uint64_t>());
  PENSTOCK_TRY_ASSIGN(info.payload_bytes, reader.get<uint64_t>());
  PENSTOCK_TRY_ASSIGN(info.segment_count, reader.get<uint32_t>());
  PENSTOCK_TRY_ASSIGN(info.created_at.nanoseconds, reader.get<int64_t>());
  if (reader.remaining() != 0) return data_loss("an index row is longer than its fields");
  return info;
}

std::string encode_link(const ChainLink& link) {
  ByteWriter writer;
  writer.put(link.head.count);
  writer.put(link.head.digest.low);
  writer.put(link.head.digest.high);
  writer.put(link.previous.low);
  writer.put(link.previous.high);
  return std::string(as_text(writer.data()));
}

Result<ChainLink> decode_link(std::string_view bytes) {
  ByteReader reader(as_bytes(bytes));
  ChainLink link;
  PENSTOCK_TRY_ASSIGN(link.head.count, reader.get<uint64_t>());
  PENSTOCK_TRY_ASSIGN(link.head.digest.low, reader.get<uint64_t>());
  PENSTOCK_TRY_ASSIGN(link.head.digest.high, reader.get<uint64_t>());
  PENSTOCK_TRY_ASSIGN(link.previous.low, reader.get<uint64_t>());
  PENSTOCK_TRY_ASSIGN(link.previous.high, reader.get<uint64_t>());
  if (reader.remaining() != 0) return data_loss("a link of the index is longer than its fields");
  return link;
}

}  // namespace penstock
