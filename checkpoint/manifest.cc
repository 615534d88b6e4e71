#include "checkpoint/manifest.h"

#include <fmt/format.h>

#include <algorithm>
#include <charconv>
#include <nlohmann/json.hpp>

#include "checkpoint/slice_digest.h"
#include "checkpoint/tiling.h"

namespace penstock {
namespace {

using Json = nlohmann::json;

constexpr std::string_view kFormatName = "penstock-manifest";
constexpr std::string_view kDigestKey = "digest ";
constexpr size_t kDigestLineBytes = kDigestKey.size() + 32 + 1;
constexpr int kJsonDepthMax = 8;
constexpr size_t kManifestNameDigits = 12;

Json to_json(const ManifestTensor& tensor, bool with_digest) {
  Json pieces = Json::array();
  for (const ManifestPiece& piece : tensor.pieces) {
    pieces.push_back({{"segment", piece.segment},
                      {"offset", piece.box.offset},
                      {"size", piece.box.size},
                      {"digest", to_hex(piece.digest)}});
  }
  Json json = {{"name", tensor.name},
               {"dtype", dtype_name(tensor.dtype)},
               {"shape", tensor.shape},
               {"pieces", std::move(pieces)}};
  if (with_digest) json["digest"] = to_hex(tensor.digest());
  return json;
}

// Typed, bounded access to the members of one JSON object. The first error sticks and later calls
// return zeros, so that a decoder reads as a list of fields and checks once at its end.
class Fields {
 public:
  Fields(const Json& object, std::string where) : object_(object), where_(std::move(where)) {
    if (!object.is_object()) fail("it is not an object");
  }

  std::string text(const char* key, size_t bytes_max) {
    const Json* value = find(key);
    if (value == nullptr) return {};
    if (!value->is_string() || value->get_ref<const std::string&>().size() > bytes_max) {
      fail(fmt::format("\"{}\" is not a text of at most {} bytes", key, bytes_max));
      return {};
    }
    return value->get<std::string>();
  }
  uint64_t number(const char* key, uint64_t max) {
    const Json* value = find(key);
    if (value == nullptr) return 0;
    if (!value->is_number_unsigned() || value->get<uint64_t>() > max) {
      fail(fmt::format("\"{}\" is not a whole number from 0 to {}", key, max));
      return 0;
    }
    return value->get<uint64_t>();
  }
  Digest digest(const char* key) {
    const Result<Uuid> hex = parse_uuid(text(key, 32));
    if (!hex.ok()) {
      fail(fmt::format("\"{}\": {}", key, hex.status().message()));
      return {};
    }
    return {.low = hex->low, .high = hex->high};
  }
  std::vector<int64_t> sizes(const char* key) {
    std::vector<int64_t> sizes;
    for (const Json& value : array(key, kTensorDimensionsMax)) {
      if (!value.is_number_unsigned() || value.get<uint64_t>() > INT64_MAX) {
        fail(fmt::format("\"{}\" holds something that is not a size", key));
        return {};
      }
      sizes.push_back(value.get<int64_t>());
    }
    return sizes;
  }
  const Json& array(const char* key, size_t count_max) {
    static const Json kEmpty = Json::array();
    const Json* value = find(key);
    if (value == nullptr) return kEmpty;
    if (!value->is_array() || value->size() > count_max) {
      fail(fmt::format("\"{}\" is not a list of at most {}", key, count_max));
      return kEmpty;
    }
    return *value;
  }
  void fail(const std::string& what) {
    if (status_.ok()) status_ = data_loss(where_ + ": " + what);
  }
  const Status& status() const { return status_; }

 private:
  const Json* find(const char* key) {
    if (!status_.ok()) return nullptr;
    const auto found = object_.find(key);
    if (found != object_.end()) return &*found;
    fail(fmt::format("\"{}\" is missing", key));
    return nullptr;
  }

  const Json& object_;
  const std::string where_;
  Status status_;
};

Result<ManifestSegment> segment_from(const Json& json, const Manifest& manifest) {
  Fields fields(json, "segment entry");
  ManifestSegment segment;
  segment.file = fields.text("file", 255);
  segment.rank.value = static_cast<int32_t>(fields.number("rank", INT32_MAX));
  segment.byte_count = fields.number("bytes", INT64_MAX);
  segment.footer_digest = fields.digest("footer_digest");
  PENSTOCK_TRY(fields.status());
  const auto name = parse_segment_file_name(segment.file);
  if (!name.ok()) return data_loss(name.status().message());
  if (name->rank != segment.rank || name->epoch != manifest.epoch) {
    return data_loss(fmt::format("segment {} is listed for rank {} of epoch {}", segment.file,
                                 segment.rank, manifest.epoch));
  }
  return segment;
}

Result<ManifestTensor> tensor_from(const Json& json, const Manifest& manifest, size_t pieces_max) {
  Fields fields(json, "tensor entry");
  ManifestTensor tensor;
  tensor.name = fields.text("name", kTensorNameBytesMax);
  const std::string dtype = fields.text("dtype", 16);
  tensor.shape = fields.sizes("shape");
  const Json& pieces = fields.array("pieces", pieces_max);
  PENSTOCK_TRY(fields.status());
  const auto parsed = parse_dtype(dtype);
  if (!parsed.ok()) return data_loss(parsed.status().message());
  tensor.dtype = *parsed;
  if (pieces.empty()) return data_loss("tensor " + tensor.name + " has no pieces");
  for (const Json& entry : pieces) {
    Fields piece_fields(entry, "tensor " + tensor.name);
    ManifestPiece piece;
    piece.segment = piece_fields.number("segment", manifest.segments.size() - 1);
    piece.box = {piece_fields.sizes("offset"), piece_fields.sizes("size")};
    piece.digest = piece_fields.digest("digest");
    PENSTOCK_TRY(piece_fields.status());
    const Status slice = check_slice({tensor.name, tensor.dtype, tensor.shape, piece.box});
    if (!slice.ok()) return data_loss(slice.message());
    tensor.pieces.push_back(std::move(piece));
  }
  if (manifest.has_tensor_digests()) {
    const Digest digest = fields.digest("digest");
    PENSTOCK_TRY(fields.status());
    if (digest != tensor.digest()) {
      return data_loss("tensor " + tensor.name + ": its digest is not the sum of its pieces'");
    }
  }
  return tensor;
}

Result<Json> parse_json(std::string_view text) {
  bool too_deep = false;
  const auto limit = [&](int depth, Json::parse_event_t, Json&) {
    too_deep = too_deep || depth > kJsonDepthMax;
    return !too_deep;
  };
  Json json = Json::parse(text.begin(), text.end(), limit, /*allow_exceptions=*/false);
  if (too_deep) return data_loss("its JSON is nested too deeply");
  if (json.is_discarded()) return data_loss("it is not valid JSON");
  return json;
}

Status lists_from(Fields& fields, Manifest& manifest) {
  const Json& segments = fields.array("segments", kManifestSegmentsMax);
  const Json& tensors = fields.array("tensors", kManifestPiecesMax);
  PENSTOCK_TRY(fields.status());
  if (segments.empty()) return data_loss("it lists no segments");
  for (const Json& entry : segments) {
    PENSTOCK_TRY_ASSIGN(ManifestSegment segment, segment_from(entry, manifest));
    if (!manifest.segments.empty() && manifest.segments.back().file >= segment.file) {
      return data_loss("its segments are not in order, or one is listed twice: " + segment.file);
    }
    manifest.segments.push_back(std::move(segment));
  }
  size_t pieces_left = kManifestPiecesMax;
  for (const Json& entry : tensors) {
    PENSTOCK_TRY_ASSIGN(ManifestTensor tensor, tensor_from(entry, manifest, pieces_left));
    if (!manifest.tensors.empty() && manifest.tensors.back().name >= tensor.name) {
      return data_loss("its tensors are not in order, or one is listed twice: " + tensor.name);
    }
    pieces_left -= tensor.pieces.size();
    manifest.tensors.push_back(std::move(tensor));
  }
  return {};
}

}  // namespace

Digest ManifestTensor::digest() const {
  Digest sum;
  for (const ManifestPiece& piece : pieces) sum = add_digests(sum, piece.digest);
  return sum;
}

uint64_t Manifest::payload_bytes() const {
  uint64_t bytes = 0;
  for (const ManifestTensor& tensor : tensors) {
    bytes += static_cast<uint64_t>(element_count(tensor.shape)) * dtype_bytes(tensor.dtype);
  }
  return bytes;
}

const ManifestTensor* Manifest::find(std::string_view name) const {
  const auto found = std::partition_point(tensors.begin(), tensors.end(),
                                          [&](const ManifestTensor& t) { return t.name < name; });
  return found != tensors.end() && found->name == name ? &*found : nullptr;
}

Result<std::string> encode_manifest(const Manifest& manifest) {
  // One line per segment and tensor, so that people and diff can read it.
  std::string text = "{\n";
  try {
    const auto field = [&](const char* key, const Json& value) {
      text += fmt::format("\"{}\": {},\n", key, value.dump());
    };
    field("format", kFormatName);
    field("version", manifest.version);
    field("store", to_hex(manifest.store));
    field("job", manifest.job.value);
    field("epoch", manifest.epoch.value);
    field("step", manifest.step);
    field("commit_seq", manifest.commit_seq);
    field("previous_commit_seq", manifest.previous_commit_seq);
    field("previous_digest", to_hex(manifest.previous_digest));
    field("created_at", format_utc(manifest.created_at));
    field("created_at_ns", manifest.created_at.nanoseconds);
    field("layout", manifest.layout);
    if (manifest.version >= 2) field("build", manifest.build);
    field("spec", manifest.spec_json);
    field("spec_digest", to_hex(manifest.spec_digest));
    text += "\"segments\": [";
    for (const ManifestSegment& segment : manifest.segments) {
      const Json entry = {{"file", segment.file},
                          {"rank", segment.rank.value},
                          {"bytes", segment.byte_count},
                          {"footer_digest", to_hex(segment.footer_digest)}};
      text += (text.back() == '[' ? "\n" : ",\n") + entry.dump();
    }
    text += "\n],\n\"tensors\": [";
    for (const ManifestTensor& tensor : manifest.tensors) {
      text += (text.back() == '[' ? "\n" : ",\n") +
              to_json(tensor, manifest.has_tensor_digests()).dump();
    }
    text += "\n]\n}\n";
  } catch (const Json::exception& e) {  // only invalid UTF-8 gets here
    return invalid_argument(fmt::format("the manifest cannot be written as JSON: {}", e.what()));
  }
  return text + fmt::format("{}{}\n", kDigestKey, to_hex(digest_of(as_bytes(text))));
}

Result<Manifest> decode_manifest(std::string_view text) {
  if (text.size() > kManifestBytesMax) {
    return data_loss(fmt::format("it is larger than {} bytes", kManifestBytesMax));
  }
  if (text.size() < kDigestLineBytes) return data_loss("it is truncated");
  const std::string_view body = text.substr(0, text.size() - kDigestLineBytes);
  const std::string expected = fmt::format("{}{}\n", kDigestKey, to_hex(digest_of(as_bytes(body))));
  if (text.substr(body.size()) != expected) {
    return data_loss("it is damaged or truncated: the digest in its last line does not match");
  }
  PENSTOCK_TRY_ASSIGN(const Json json, parse_json(body));
  Fields fields(json, "manifest");
  Manifest manifest;
  const std::string format = fields.text("format", 64);
  manifest.version = static_cast<uint32_t>(fields.number("version", UINT32_MAX));
  PENSTOCK_TRY(fields.status());
  if (format != kFormatName || manifest.version == 0 || manifest.version > kManifestVersion) {
    return data_loss(fmt::format("its version is {}, this program reads 1 to {}", manifest.version,
                                 kManifestVersion));
  }
  const Digest store = fields.digest("store");
  manifest.store = {.low = store.low, .high = store.high};
  manifest.job.value = fields.number("job", UINT64_MAX);
  manifest.epoch.value = static_cast<uint32_t>(fields.number("epoch", UINT32_MAX));
  manifest.step = static_cast<int64_t>(fields.number("step", INT64_MAX));
  manifest.commit_seq = fields.number("commit_seq", INT64_MAX);
  manifest.previous_commit_seq = fields.number("previous_commit_seq", INT64_MAX);
  manifest.previous_digest = fields.digest("previous_digest");
  manifest.created_at.nanoseconds = static_cast<int64_t>(fields.number("created_at_ns", INT64_MAX));
  manifest.layout = fields.text("layout", 4096);
  if (manifest.version >= 2) manifest.build = fields.text("build", 256);
  manifest.spec_json = fields.text("spec", 1 << 20);
  manifest.spec_digest = fields.digest("spec_digest");
  PENSTOCK_TRY(fields.status());
  if (manifest.commit_seq == 0 || manifest.previous_commit_seq >= manifest.commit_seq) {
    return data_loss("its commit numbers are out of order");
  }
  if (manifest.spec_digest != digest_of(as_bytes(manifest.spec_json))) {
    return data_loss("its job spec does not match the spec's digest");
  }
  PENSTOCK_TRY(lists_from(fields, manifest));
  return manifest;
}

Result<StoredManifest> read_manifest(const Path& path) {
  const std::string context = "manifest " + path.string();
  Result<std::string> text = read_plain_file(path, kManifestBytesMax);
  if (!text.ok()) return text.status().with_context(context);
  Result<Manifest> manifest = decode_manifest(*text);
  if (!manifest.ok()) return manifest.status().with_context(context);
  const Result<uint64_t> number = parse_manifest_file_name(path.filename().string());
  if (!number.ok()) return number.status();
  if (manifest->commit_seq != *number) {
    return data_loss(fmt::format("{}: it is a copy of commit {}", context, manifest->commit_seq));
  }
  // decode_manifest proved that the last line holds exactly this.
  const std::string_view body = std::string_view(*text).substr(0, text->size() - kDigestLineBytes);
  return StoredManifest{*std::move(manifest), digest_of(as_bytes(body))};
}

std::string manifest_file_name(uint64_t commit_seq) {
  return fmt::format("{:012}.manifest", commit_seq);
}

Result<uint64_t> parse_manifest_file_name(std::string_view name) {
  uint64_t number = 0;
  const char* end = name.data() + std::min(name.size(), kManifestNameDigits);
  const auto [stop, error] = std::from_chars(name.data(), end, number);
  if (error == std::errc() && stop == end && number > 0 && name == manifest_file_name(number)) {
    return number;
  }
  return invalid_argument(fmt::format("\"{}\" is not the name of a manifest", name.substr(0, 200)));
}

Status prove_whole(const Manifest& manifest) {
  for (const ManifestTensor& tensor : manifest.tensors) {
    std::vector<Box> boxes;
    boxes.reserve(tensor.pieces.size());
    for (const ManifestPiece& piece : tensor.pieces) boxes.push_back(piece.box);
    const Box whole = {std::vector<int64_t>(tensor.shape.size(), 0), tensor.shape};
    const Status tiled = prove_tiling(whole, boxes);
    if (!tiled.ok()) {
      return tiled.with_context(fmt::format("checkpoint {} of step {}: tensor {}",
                                            manifest.commit_seq, manifest.step, tensor.name));
    }
  }
  return {};
}

}  // namespace penstock
