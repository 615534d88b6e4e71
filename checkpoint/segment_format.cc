#include <fmt/format.h>

#include <algorithm>
#include <charconv>

#include "checkpoint/segment.h"

namespace penstock {
namespace {

constexpr std::string_view kHeaderMagic = "PNSTKSEG";
constexpr std::string_view kFooterMagic = "PNSTKFTR";
constexpr std::string_view kEndMagic = "PNSTKEND";
constexpr size_t kHeaderFieldBytes = 80;
constexpr size_t kFooterFixedBytes = 48;
// Name length, dtype, dimensions, padding, offset, byte count, digest: a slice without name and
// sizes.
constexpr size_t kSliceFixedBytes = 4 + 4 + 8 + 8 + 16;

bool take_magic(ByteReader& reader, std::string_view magic) {
  const auto bytes = reader.get_bytes(magic.size());
  return bytes.ok() && as_text(*bytes) == magic;
}

// Takes "<letter><digits>-" off the front; nothing when it is not there or the number does not fit.
std::optional<uint32_t> take_number(std::string_view& text, char letter, size_t digits) {
  if (text.size() < digits + 2 || text[0] != letter || text[digits + 1] != '-') return std::nullopt;
  uint32_t number = 0;
  const char* begin = text.data() + 1;
  const auto [end, error] = std::from_chars(begin, begin + digits, number);
  if (error != std::errc() || end != begin + digits) return std::nullopt;
  text.remove_prefix(digits + 2);
  return number;
}

Result<std::vector<int64_t>> get_sizes(ByteReader& reader, size_t count) {
  std::vector<int64_t> sizes(count);
  for (int64_t& size : sizes) {
    PENSTOCK_TRY_ASSIGN(size, reader.get<int64_t>());
  }
  return sizes;
}

Result<SegmentSlice> decode_slice(ByteReader& reader) {
  SegmentSlice entry;
  PENSTOCK_TRY_ASSIGN(entry.slice.name, reader.get_string(kTensorNameBytesMax));
  PENSTOCK_TRY_ASSIGN(const uint8_t dtype, reader.get<uint8_t>());
  PENSTOCK_TRY_ASSIGN(const uint8_t dimensions, reader.get<uint8_t>());
  PENSTOCK_TRY_ASSIGN(const uint16_t reserved, reader.get<uint16_t>());
  if (dimensions > kTensorDimensionsMax || reserved != 0) {
    return data_loss("a slice's dimension count is out of range");
  }
  PENSTOCK_TRY_ASSIGN(entry.slice.dtype, dtype_from_number(dtype));
  PENSTOCK_TRY_ASSIGN(entry.slice.shape, get_sizes(reader, dimensions));
  PENSTOCK_TRY_ASSIGN(entry.slice.box.offset, get_sizes(reader, dimensions));
  PENSTOCK_TRY_ASSIGN(entry.slice.box.size, get_sizes(reader, dimensions));
  PENSTOCK_TRY_ASSIGN(entry.file_offset, reader.get<uint64_t>());
  PENSTOCK_TRY_ASSIGN(entry.byte_count, reader.get<uint64_t>());
  PENSTOCK_TRY_ASSIGN(entry.digest.low, reader.get<uint64_t>());
  PENSTOCK_TRY_ASSIGN(entry.digest.high, reader.get<uint64_t>());
  if (const Status status = check_slice(entry.slice); !status.ok()) {
    return data_loss(status.message());
  }
  if (entry.byte_count != byte_count(entry.slice)) {
    return data_loss(fmt::format("tensor {}: its box takes {} bytes, the file says {}",
                                 entry.slice.name, byte_count(entry.slice), entry.byte_count));
  }
  return entry;
}

}  // namespace

std::string segment_file_name(Epoch epoch, Rank rank, const Uuid& uuid) {
  PENSTOCK_CHECK(rank.value >= 0, rank);
  return fmt::format("e{:010}-r{:010}-{}.segment", epoch.value, rank.value, to_hex(uuid));
}

Result<SegmentFileName> parse_segment_file_name(std::string_view name) {
  std::string_view rest = name;
  const auto epoch = take_number(rest, 'e', 10);
  const auto rank = epoch ? take_number(rest, 'r', 10) : std::nullopt;
  constexpr std::string_view kSuffix = ".segment";
  if (rank && *rank <= INT32_MAX && rest.ends_with(kSuffix)) {
    const auto uuid = parse_uuid(rest.substr(0, rest.size() - kSuffix.size()));
    if (uuid.ok()) {
      return SegmentFileName{{*epoch}, {static_cast<int32_t>(*rank)}, *uuid};
    }
  }
  return invalid_argument(
      fmt::format("\"{}\" is not the name of a segment file", name.substr(0, 200)));
}

uint32_t block_sum(const Uuid& segment, uint64_t block_index, Bytes bytes) {
  const uint64_t salt[3] = {segment.low, segment.high, block_index};
  return crc32c(bytes, crc32c(std::as_bytes(std::span(salt))));
}

namespace segment_format {

std::vector<std::byte> encode_header(const SegmentHeader& header) {
  ByteWriter writer;
  writer.put_bytes(as_bytes(kHeaderMagic));
  writer.put(header.format);
  writer.put(static_cast<uint32_t>(kSegmentHeaderBytes));
  writer.put(header.block_bytes);
  writer.put(uint32_t{0});
  writer.put(header.segment.low);
  writer.put(header.segment.high);
  writer.put(header.store.low);
  writer.put(header.store.high);
  writer.put(header.identity.job.value);
  writer.put(header.identity.epoch.value);
  writer.put(header.identity.rank.value);
  writer.put(header.identity.step);
  std::vector<std::byte> bytes = writer.take();
  PENSTOCK_CHECK(bytes.size() == kHeaderFieldBytes, bytes.size());
  bytes.resize(kSegmentHeaderBytes - sizeof(uint32_t));
  const uint32_t sum = crc32c(bytes);
  const auto sum_bytes = std::as_bytes(std::span(&sum, 1));
  bytes.insert(bytes.end(), sum_bytes.begin(), sum_bytes.end());
  return bytes;
}

Result<SegmentHeader> decode_header(Bytes bytes) {
  PENSTOCK_CHECK(bytes.size() == kSegmentHeaderBytes, bytes.size());
  ByteReader reader(bytes);
  if (!take_magic(reader, kHeaderMagic)) return data_loss("it does not begin like a segment file");
  SegmentHeader header;
  PENSTOCK_TRY_ASSIGN(header.format, reader.get<uint32_t>());
  if (header.format == 0 || header.format > kSegmentFormat) {
    return data_loss(
        fmt::format("its format is {}, this program reads 1 to {}", header.format, kSegmentFormat));
  }
  uint32_t sum = 0;
  std::memcpy(&sum, bytes.data() + bytes.size() - sizeof(sum), sizeof(sum));
  if (sum != crc32c(bytes.first(bytes.size() - sizeof(sum)))) {
    return data_loss("its header is damaged (bytes 0 to 4096): the checksum does not match");
  }
  PENSTOCK_TRY_ASSIGN(const uint32_t header_bytes, reader.get<uint32_t>());
  PENSTOCK_TRY_ASSIGN(header.block_bytes, reader.get<uint32_t>());
  PENSTOCK_TRY_ASSIGN(const uint32_t reserved, reader.get<uint32_t>());
  PENSTOCK_TRY_ASSIGN(header.segment.low, reader.get<uint64_t>());
  PENSTOCK_TRY_ASSIGN(header.segment.high, reader.get<uint64_t>());
  PENSTOCK_TRY_ASSIGN(header.store.low, reader.get<uint64_t>());
  PENSTOCK_TRY_ASSIGN(header.store.high, reader.get<uint64_t>());
  PENSTOCK_TRY_ASSIGN(header.identity.job.value, reader.get<uint64_t>());
  PENSTOCK_TRY_ASSIGN(header.identity.epoch.value, reader.get<uint32_t>());
  PENSTOCK_TRY_ASSIGN(header.identity.rank.value, reader.get<int32_t>());
  PENSTOCK_TRY_ASSIGN(header.identity.step, reader.get<int64_t>());
  const Bytes filler = bytes.subspan(kHeaderFieldBytes).first(reader.remaining() - sizeof(sum));
  const bool filled =
      std::any_of(filler.begin(), filler.end(), [](std::byte byte) { return byte != std::byte{}; });
  const bool power_of_two = (header.block_bytes & (header.block_bytes - 1)) == 0;
  if (header_bytes != kSegmentHeaderBytes || reserved != 0 || filled || !power_of_two ||
      header.block_bytes < kSliceAlignment || header.block_bytes > kBlockBytesMax ||
      header.identity.rank.value < 0 || header.identity.step < 0) {
    return data_loss("its header holds a value out of range");
  }
  return header;
}

uint64_t footer_bytes(const std::vector<SegmentSlice>& slices, uint64_t block_count) {
  uint64_t bytes = kFooterFixedBytes + block_count * sizeof(uint32_t);
  for (const SegmentSlice& entry : slices) {
    bytes += kSliceFixedBytes + entry.slice.name.size() + 24 * entry.slice.shape.size();
  }
  return bytes;
}

std::vector<std::byte> encode_footer(const SegmentHeader& header, const Footer& footer) {
  ByteWriter writer;
  writer.put_bytes(as_bytes(kFooterMagic));
  writer.put(header.segment.low);
  writer.put(header.segment.high);
  writer.put(footer.data_end);
  writer.put(static_cast<uint32_t>(footer.slices.size()));
  writer.put(uint32_t{0});
  writer.put(static_cast<uint64_t>(footer.block_sums.size()));
  for (const SegmentSlice& entry : footer.slices) {
    writer.put_string(entry.slice.name);
    writer.put(static_cast<uint8_t>(entry.slice.dtype));
    writer.put(static_cast<uint8_t>(entry.slice.shape.size()));
    writer.put(uint16_t{0});
    for (const int64_t size : entry.slice.shape) writer.put(size);
    for (const int64_t offset : entry.slice.box.offset) writer.put(offset);
    for (const int64_t size : entry.slice.box.size) writer.put(size);
    writer.put(entry.file_offset);
    writer.put(entry.byte_count);
    writer.put(entry.digest.low);
    writer.put(entry.digest.high);
  }
  writer.put_bytes(std::as_bytes(std::span(footer.block_sums)));
  std::vector<std::byte> bytes = writer.take();
  PENSTOCK_CHECK(bytes.size() == footer_bytes(footer.slices, footer.block_sums.size()));
  return bytes;
}

Result<Footer> decode_footer(const SegmentHeader& header, Bytes bytes) {
  ByteReader reader(bytes);
  if (!take_magic(reader, kFooterMagic)) return data_loss("its footer does not begin like one");
  Uuid segment;
  Footer footer;
  PENSTOCK_TRY_ASSIGN(segment.low, reader.get<uint64_t>());
  PENSTOCK_TRY_ASSIGN(segment.high, reader.get<uint64_t>());
  if (segment != header.segment) return data_loss("its footer belongs to another segment");
  PENSTOCK_TRY_ASSIGN(footer.data_end, reader.get<uint64_t>());
  PENSTOCK_TRY_ASSIGN(const uint32_t slice_count, reader.get<uint32_t>());
  PENSTOCK_TRY_ASSIGN(const uint32_t reserved, reader.get<uint32_t>());
  PENSTOCK_TRY_ASSIGN(const uint64_t sum_count, reader.get<uint64_t>());
  if (footer.data_end < kSegmentHeaderBytes || footer.data_end % kSliceAlignment != 0 ||
      reserved != 0 || slice_count > kSegmentSlicesMax ||
      slice_count > reader.remaining() / kSliceFixedBytes ||
      sum_count != block_count(footer.data_end, header.block_bytes) ||
      sum_count > reader.remaining() / sizeof(uint32_t)) {
    return data_loss("its footer holds a count or length out of range");
  }
  footer.slices.reserve(slice_count);
  uint64_t previous_end = kSegmentHeaderBytes;
  for (uint32_t i = 0; i < slice_count; ++i) {
    PENSTOCK_TRY_ASSIGN(SegmentSlice entry, decode_slice(reader));
    if (entry.file_offset < previous_end || entry.file_offset > footer.data_end ||
        entry.file_offset % dtype_bytes(entry.slice.dtype) != 0 ||
        entry.byte_count > footer.data_end - entry.file_offset) {
      return data_loss(
          fmt::format("tensor {}: its bytes {} to {} leave the file's data, overlap "
                      "another slice's or are not aligned",
                      entry.slice.name, entry.file_offset, entry.file_offset + entry.byte_count));
    }
    previous_end = entry.file_offset + entry.byte_count;
    footer.slices.push_back(std::move(entry));
  }
  if (reader.remaining() != sum_count * sizeof(uint32_t)) {
    return data_loss("its footer has not the length its counts ask for");
  }
  footer.block_sums.resize(sum_count);
  PENSTOCK_TRY_ASSIGN(const Bytes sums, reader.get_bytes(reader.remaining()));
  if (!sums.empty()) std::memcpy(footer.block_sums.data(), sums.data(), sums.size());
  return footer;
}

std::vector<std::byte> encode_trailer(const Trailer& trailer) {
  ByteWriter writer;
  writer.put(trailer.footer_offset);
  writer.put(trailer.footer_byte_count);
  writer.put(trailer.file_byte_count);
  writer.put(trailer.footer_digest.low);
  writer.put(trailer.footer_digest.high);
  writer.put(trailer.format);
  writer.put(uint64_t{0});
  writer.put(crc32c(writer.data()));
  writer.put_bytes(as_bytes(kEndMagic));
  PENSTOCK_CHECK(writer.data().size() == kSegmentTrailerBytes, writer.data().size());
  return writer.take();
}

Result<Trailer> decode_trailer(Bytes bytes) {
  PENSTOCK_CHECK(bytes.size() == kSegmentTrailerBytes, bytes.size());
  ByteReader reader(bytes);
  Trailer trailer;
  PENSTOCK_TRY_ASSIGN(trailer.footer_offset, reader.get<uint64_t>());
  PENSTOCK_TRY_ASSIGN(trailer.footer_byte_count, reader.get<uint64_t>());
  PENSTOCK_TRY_ASSIGN(trailer.file_byte_count, reader.get<uint64_t>());
  PENSTOCK_TRY_ASSIGN(trailer.footer_digest.low, reader.get<uint64_t>());
  PENSTOCK_TRY_ASSIGN(trailer.footer_digest.high, reader.get<uint64_t>());
  PENSTOCK_TRY_ASSIGN(trailer.format, reader.get<uint32_t>());
  PENSTOCK_TRY_ASSIGN(const uint64_t reserved, reader.get<uint64_t>());
  PENSTOCK_TRY_ASSIGN(const uint32_t sum, reader.get<uint32_t>());
  if (!take_magic(reader, kEndMagic)) {
    return data_loss("it does not end like a segment file: truncated, or bytes were appended");
  }
  if (sum != crc32c(bytes.first(kSegmentTrailerBytes - 12))) {
    return data_loss("its last 64 bytes are damaged: the checksum does not match");
  }
  if (trailer.format == 0 || trailer.format > kSegmentFormat || reserved != 0) {
    return data_loss("its trailer holds a value out of range");
  }
  return trailer;
}

uint64_t block_count(uint64_t data_end, uint32_t block_bytes) {
  return (data_end - kSegmentHeaderBytes + block_bytes - 1) / block_bytes;
}

}  // namespace segment_format
}  // namespace penstock
