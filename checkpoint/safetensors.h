// One safetensors file, Hugging Face's container of named tensors:
//
//   | u64 N | N bytes of JSON, padded with spaces | data |
//   {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}, "__metadata__": {"format": "pt"}}
//
// Little-endian, row-major, offsets from the start of the data. Read strictly, because the format
// has no checksum: the tensors must tile the data exactly, in whatever order the header lists them.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "checkpoint/file_system.h"
#include "checkpoint/slice.h"

namespace penstock {

inline constexpr uint64_t kSafetensorsHeaderBytesMax = 100'000'000;  // as the reference library
inline constexpr size_t kSafetensorsTensorsMax = 1 << 20;

struct SafetensorsEntry {
  std::string name;
  DType dtype = DType::kF32;
  std::vector<int64_t> shape;
  uint64_t begin = 0;  // [begin, end) of the data
  uint64_t end = 0;
  uint64_t byte_count() const { return end - begin; }
};

struct SafetensorsHeader {
  std::vector<SafetensorsEntry> tensors;  // ascending by begin
  std::map<std::string, std::string> metadata;
  uint64_t data_bytes() const { return tensors.empty() ? 0 : tensors.back().end; }
};

// Gives tensors of checked shapes their places: largest elements first, so that each starts at a
// multiple of its element's size, then by name.
SafetensorsHeader lay_out_safetensors(std::vector<SafetensorsEntry> tensors);

// Length, JSON and padding: what stands before the data, a multiple of 8 bytes.
std::string encode_safetensors_header(const SafetensorsHeader& header);
// The JSON alone, of a file with `data_bytes` bytes of data. kDataLoss names the tensor and the
// rule it breaks: a key that is unknown, missing or there twice, a type or dtype that does not
// exist, a size that overflows, a byte range that is not the shape's, gaps and overlaps.
Result<SafetensorsHeader> decode_safetensors_header(std::string_view json, uint64_t data_bytes);

// Constant after open; concurrent reads are safe. Errors name the file and the tensor.
class SafetensorsFile {
 public:
  static Result<SafetensorsFile> open(const Path& path);

  const Path& path() const { return path_; }
  const SafetensorsHeader& header() const { return header_; }
  uint64_t data_offset() const { return data_offset_; }  // in the file
  // Exactly into.size() bytes of a tensor of this file, from its byte `offset` on.
  // REQUIRES: they lie within it.
  Status read(const SafetensorsEntry& tensor, uint64_t offset, MutableBytes into) const;

 private:
  Path path_;
  FileDescriptor file_;
  SafetensorsHeader header_;
  uint64_t data_offset_ = 0;
};

// Writes one file from front to back. Single-threaded. A file that was not finished is left behind:
// it lies in a folder that its writer removes.
class SafetensorsWriter {
 public:
  // Reserves the whole file, so that a full disk is known before the first tensor is read
  // (kResourceExhausted), and writes the header, which lay_out_safetensors() made.
  static Result<SafetensorsWriter> create(const Path& path, const SafetensorsHeader& header,
                                          FileSystem& files);
  // The next bytes of the data, tensor after tensor.
  Status append(Bytes bytes);
  // Durable, but for the file's name. REQUIRES: all data was appended.
  Status finish();

 private:
  SafetensorsWriter() = default;
  std::unique_ptr<WritableFile> file_;
  uint64_t position_ = 0;
  uint64_t end_ = 0;
};

}  // namespace penstock
