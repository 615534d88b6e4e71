#include "checkpoint/safetensors.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <sys/stat.h>

#include <algorithm>
#include <nlohmann/json.hpp>

#include "checkpoint/strict_json.h"
#include "comm/base/check.h"

namespace penstock {
namespace {

using Json = nlohmann::json;

constexpr uint64_t kLengthBytes = 8;
constexpr const char* kMetadataKey = "__metadata__";
// A tensor's entry: itself, dtype, two lists, their numbers.
constexpr size_t kValuesPerTensorMax = 6 + kTensorDimensionsMax;

// Our names of element types are theirs in lower case.
std::string their_dtype_name(DType dtype) {
  std::string name(dtype_name(dtype));
  for (char& c : name) c = static_cast<char>(c >= 'a' && c <= 'z' ? c - 'a' + 'A' : c);
  return name;
}

Result<DType> dtype_from_theirs(const std::string& name) {
  for (int number = 1; number <= static_cast<int>(DType::kBool); ++number) {
    const auto dtype = static_cast<DType>(number);
    if (their_dtype_name(dtype) == name) return dtype;
  }
  return data_loss(fmt::format("its dtype \"{}\" is unknown", name.substr(0, 40)));
}

// A list of whole numbers below 2^63.
Result<std::vector<int64_t>> numbers(const Json& entry, const char* key, size_t count_max) {
  const auto found = entry.find(key);
  if (found == entry.end()) return data_loss(fmt::format("it has no \"{}\"", key));
  if (!found->is_array() || found->size() > count_max) {
    return data_loss(fmt::format("its \"{}\" is not a list of at most {}", key, count_max));
  }
  std::vector<int64_t> values;
  for (const Json& value : *found) {
    if (!value.is_number_unsigned() || value.get<uint64_t>() > INT64_MAX) {
      return data_loss(fmt::format("its \"{}\" holds something that is not a size", key));
    }
    values.push_back(value.get<int64_t>());
  }
  return values;
}

Result<SafetensorsEntry> entry_from(const std::string& name, const Json& json) {
  if (!json.is_object()) return data_loss("its entry is not an object");
  for (const auto& [key, value] : json.items()) {
    if (key != "dtype" && key != "shape" && key != "data_offsets") {
      return data_loss(fmt::format("its entry has the unknown key \"{}\"", key.substr(0, 40)));
    }
  }
  const auto dtype = json.find("dtype");
  if (dtype == json.end() || !dtype->is_string()) {
    return data_loss("it has no \"dtype\" that is a text");
  }
  SafetensorsEntry entry;
  entry.name = name;
  PENSTOCK_TRY_ASSIGN(entry.dtype, dtype_from_theirs(dtype->get_ref<const std::string&>()));
  PENSTOCK_TRY_ASSIGN(entry.shape, numbers(json, "shape", kTensorDimensionsMax));
  PENSTOCK_TRY_ASSIGN(const std::vector<int64_t> offsets, numbers(json, "data_offsets", 2));
  const TensorSlice slice = whole_tensor(name, entry.dtype, entry.shape);
  if (const Status status = check_slice(slice); !status.ok()) return data_loss(status.message());
  if (offsets.size() != 2 || offsets[0] > offsets[1]) {
    return data_loss("its \"data_offsets\" are not [begin, end]");
  }
  entry.begin = static_cast<uint64_t>(offsets[0]);
  entry.end = static_cast<uint64_t>(offsets[1]);
  if (entry.byte_count() != byte_count(slice)) {
    return data_loss(fmt::format("its shape takes {} bytes of {}, its \"data_offsets\" hold {}",
                                 byte_count(slice), their_dtype_name(entry.dtype),
                                 entry.byte_count()));
  }
  return entry;
}

// Every byte of the data in exactly one tensor.
Status check_ranges(const std::vector<SafetensorsEntry>& tensors, uint64_t data_bytes) {
  uint64_t end = 0;
  for (const SafetensorsEntry& tensor : tensors) {
    if (tensor.begin != end) {
      return data_loss(fmt::format("tensor {}: its data begins at byte {}, {} byte {}", tensor.name,
                                   tensor.begin,
                                   tensor.begin > end ? "a gap after"
                                                      : "inside the "
                                                        "tensor that ends at",
                                   end));
    }
    end = tensor.end;
  }
  if (end == data_bytes) return {};
  return data_loss(fmt::format("its tensors take {} bytes of data, the file has {}: it is {}", end,
                               data_bytes, end > data_bytes ? "truncated" : "too long"));
}

Result<std::map<std::string, std::string>> metadata_from(const Json& json) {
  std::map<std::string, std::string> metadata;
  if (!json.is_object()) return data_loss("its __metadata__ is not an object");
  for (const auto& [key, value] : json.items()) {
    if (!value.is_string()) {
      return data_loss(fmt::format("its __metadata__ \"{}\" is not a text", key.substr(0, 40)));
    }
    metadata[key] = value.get<std::string>();
  }
  return metadata;
}

}  // namespace

SafetensorsHeader lay_out_safetensors(std::vector<SafetensorsEntry> tensors) {
  std::sort(tensors.begin(), tensors.end(), [](const auto& a, const auto& b) {
    const uint64_t bytes_a = dtype_bytes(a.dtype), bytes_b = dtype_bytes(b.dtype);
    return bytes_a != bytes_b ? bytes_a > bytes_b : a.name < b.name;
  });
  uint64_t position = 0;
  for (SafetensorsEntry& tensor : tensors) {
    tensor.begin = position;
    position += byte_count(whole_tensor(tensor.name, tensor.dtype, tensor.shape));
    tensor.end = position;
  }
  // transformers asks for "format".
  return {.tensors = std::move(tensors), .metadata = {{"format", "pt"}}};
}

std::string encode_safetensors_header(const SafetensorsHeader& header) {
  Json json = Json::object();
  if (!header.metadata.empty()) json[kMetadataKey] = header.metadata;
  for (const SafetensorsEntry& tensor : header.tensors) {
    json[tensor.name] = {{"dtype", their_dtype_name(tensor.dtype)},
                         {"shape", tensor.shape},
                         {"data_offsets", {tensor.begin, tensor.end}}};
  }
  std::string text = json.dump();
  text.resize((text.size() + kLengthBytes - 1) / kLengthBytes * kLengthBytes, ' ');
  const auto length = static_cast<uint64_t>(text.size());
  return std::string(reinterpret_cast<const char*>(&length), sizeof length) + text;
}

Result<SafetensorsHeader> decode_safetensors_header(std::string_view json, uint64_t data_bytes) {
  if (!json.starts_with('{')) return data_loss("its header does not begin with '{'");
  const JsonLimits limits{.depth_max = 3,
                          .values_max = kSafetensorsTensorsMax * kValuesPerTensorMax};
  const Result<Json> root = parse_strict_json(json, limits);
  if (!root.ok()) return root.status().with_context("its header");
  SafetensorsHeader header;
  for (const auto& [name, value] : root->items()) {
    if (name == kMetadataKey) {
      PENSTOCK_TRY_ASSIGN(header.metadata, metadata_from(value));
      continue;
    }
    Result<SafetensorsEntry> entry = entry_from(name, value);
    if (!entry.ok()) return entry.status().with_context("tensor " + name.substr(0, 200));
    header.tensors.push_back(*std::move(entry));
  }
  if (header.tensors.size() > kSafetensorsTensorsMax) {
    return data_loss(fmt::format("it has more than {} tensors", kSafetensorsTensorsMax));
  }
  // By end, too: a tensor without elements lies before one that begins at the same byte.
  std::sort(header.tensors.begin(), header.tensors.end(), [](const auto& a, const auto& b) {
    return a.begin != b.begin ? a.begin < b.begin : a.end < b.end;
  });
  PENSTOCK_TRY(check_ranges(header.tensors, data_bytes));
  return header;
}

Result<SafetensorsFile> SafetensorsFile::open(const Path& path) {
  SafetensorsFile file;
  file.path_ = path;
  PENSTOCK_TRY_ASSIGN(file.file_, open_file(path, O_RDONLY | O_NONBLOCK));  // never wait for a pipe
  struct stat facts = {};
  if (::fstat(file.file_.get(), &facts) != 0) return errno_status(errno, "fstat " + path.string());
  if (!S_ISREG(facts.st_mode)) return data_loss(path.string() + " is not a file");
  const auto file_bytes = static_cast<uint64_t>(facts.st_size);
  uint64_t header_bytes = 0;
  if (file_bytes < kLengthBytes) {
    return data_loss(fmt::format("{}: {} bytes are too few for the length of a header",
                                 path.string(), file_bytes));
  }
  PENSTOCK_TRY(
      read_at(file.file_.get(), path, 0, std::as_writable_bytes(std::span(&header_bytes, 1))));
  if (header_bytes > kSafetensorsHeaderBytesMax || header_bytes > file_bytes - kLengthBytes) {
    return data_loss(
        fmt::format("{}: a header of {} bytes, but the file has {} and a header at "
                    "most {}",
                    path.string(), header_bytes, file_bytes, kSafetensorsHeaderBytesMax));
  }
  std::string json(header_bytes, '\0');
  PENSTOCK_TRY(
      read_at(file.file_.get(), path, kLengthBytes, std::as_writable_bytes(std::span(json))));
  file.data_offset_ = kLengthBytes + header_bytes;
  auto header = decode_safetensors_header(json, file_bytes - file.data_offset_);
  if (!header.ok()) return header.status().with_context(path.string());
  file.header_ = *std::move(header);
  return file;
}

Status SafetensorsFile::read(const SafetensorsEntry& tensor, uint64_t offset,
                             MutableBytes into) const {
  PENSTOCK_CHECK(offset <= tensor.byte_count() && into.size() <= tensor.byte_count() - offset);
  const Status status = read_at(file_.get(), path_, data_offset_ + tensor.begin + offset, into);
  return status.ok() ? status : status.with_context("tensor " + tensor.name);
}

Result<SafetensorsWriter> SafetensorsWriter::create(const Path& path,
                                                    const SafetensorsHeader& header,
                                                    FileSystem& files) {
  const std::string start = encode_safetensors_header(header);
  SafetensorsWriter writer;
  PENSTOCK_TRY_ASSIGN(writer.file_, files.create(path));
  writer.position_ = start.size();
  writer.end_ = start.size() + header.data_bytes();
  PENSTOCK_TRY(writer.file_->reserve(writer.end_));
  PENSTOCK_TRY(writer.file_->write_at(0, as_bytes(start)));
  return writer;
}

Status SafetensorsWriter::append(Bytes bytes) {
  PENSTOCK_CHECK(bytes.size() <= end_ - position_);
  PENSTOCK_TRY(file_->write_at(position_, bytes));
  position_ += bytes.size();
  return {};
}

Status SafetensorsWriter::finish() {
  PENSTOCK_CHECK(position_ == end_, position_, end_);
  PENSTOCK_TRY(file_->sync());
  return file_->close();
}

}  // namespace penstock
