#include "checkpoint/state_files.h"

#include <fcntl.h>
#include <fmt/format.h>

#include <algorithm>
#include <charconv>
#include <limits>
#include <map>
#include <set>

#include "checkpoint/slice_digest.h"
#include "checkpoint/tensor_stream.h"
#include "checkpoint/torch_files.h"

namespace penstock {
namespace {

constexpr uint64_t kReadBytes = 4 << 20;
constexpr const char* kFormatValue = "penstock-state";

// Where one tensor went, and its digest as it was loaded.
struct Written {
  const ManifestTensor* tensor = nullptr;
  Path file;
  uint64_t offset = 0;  // of its first byte
  Digest digest;
};

TensorSlice slice_of(const ManifestTensor& tensor) {
  return whole_tensor(tensor.name, tensor.dtype, tensor.shape);
}
uint64_t bytes_of(const ManifestTensor& tensor) {
  return byte_count(slice_of(tensor));
}

std::vector<std::vector<const ManifestTensor*>> plan_files(const Manifest& manifest,
                                                           uint64_t file_bytes_max) {
  std::vector<std::vector<const ManifestTensor*>> files(1);
  uint64_t bytes = 0;
  for (const ManifestTensor& tensor : manifest.tensors) {
    if (!files.back().empty() && bytes + bytes_of(tensor) > file_bytes_max) {
      files.emplace_back();
      bytes = 0;
    }
    files.back().push_back(&tensor);
    bytes += bytes_of(tensor);
  }
  return files;
}

// Streams one file's tensors, in the order of `tensors`, to `put`; adds what was written.
template <typename Put>
Status copy_tensors(const CheckpointFiles& checkpoint,
                    const std::vector<const ManifestTensor*>& tensors, const Path& file,
                    const std::vector<uint64_t>& offsets, std::vector<Written>& written,
                    const Put& put) {
  std::optional<SliceDigestStream> digest;
  uint64_t position = 0;
  TensorStream stream(checkpoint, [&](size_t index, Bytes bytes, bool last) -> Status {
    if (!digest) digest.emplace(slice_of(*tensors[index]));
    digest->update(bytes);
    PENSTOCK_TRY(put(offsets[index] + position, bytes));
    position += bytes.size();
    if (last) {
      written.push_back({tensors[index], file, offsets[index], digest->finish()});
      digest.reset();
      position = 0;
    }
    return {};
  });
  for (const ManifestTensor* tensor : tensors) PENSTOCK_TRY(stream.add(*tensor));
  return stream.flush();
}

std::string state_file_name(size_t number, size_t count) {
  if (count == 1) return "state.safetensors";
  return fmt::format("state-{:05}-of-{:05}.safetensors", number, count);
}

std::map<std::string, std::string> metadata_of(const Manifest& manifest, size_t file_count) {
  std::map<std::string, std::string> metadata = {
      {"format", "pt"},
      {"penstock.format", kFormatValue},
      {"penstock.files", std::to_string(file_count)},
      {"penstock.job", std::to_string(manifest.job.value)},
      {"penstock.step", std::to_string(manifest.step)},
      {"penstock.layout", manifest.layout},
      {"penstock.spec", manifest.spec_json}};
  if (manifest.has_tensor_digests()) metadata["penstock.digest"] = state_digest(manifest);
  return metadata;
}

Status write_safetensors(const CheckpointFiles& checkpoint,
                         const std::vector<std::vector<const ManifestTensor*>>& plan,
                         const Path& folder, FileSystem& files, std::vector<Written>& written) {
  std::map<std::string, const ManifestTensor*> by_name;
  for (const ManifestTensor& tensor : checkpoint.manifest.tensors) by_name[tensor.name] = &tensor;
  for (size_t i = 0; i < plan.size(); ++i) {
    std::vector<SafetensorsEntry> entries;
    for (const ManifestTensor* tensor : plan[i]) {
      entries.push_back({.name = tensor->name, .dtype = tensor->dtype, .shape = tensor->shape});
    }
    SafetensorsHeader header = lay_out_safetensors(std::move(entries));
    header.metadata = metadata_of(checkpoint.manifest, plan.size());
    const uint64_t data_offset = encode_safetensors_header(header).size();
    const Path file = folder / state_file_name(i + 1, plan.size());
    PENSTOCK_TRY_ASSIGN(SafetensorsWriter writer, SafetensorsWriter::create(file, header, files));
    std::vector<const ManifestTensor*> tensors;
    std::vector<uint64_t> offsets;
    for (const SafetensorsEntry& entry : header.tensors) {
      tensors.push_back(by_name.at(entry.name));
      offsets.push_back(data_offset + entry.begin);
    }
    PENSTOCK_TRY(copy_tensors(checkpoint, tensors, file, offsets, written,
                              [&](uint64_t, Bytes bytes) { return writer.append(bytes); }));
    PENSTOCK_TRY(writer.finish());
  }
  return {};
}

Status write_dcp(const CheckpointFiles& checkpoint,
                 const std::vector<std::vector<const ManifestTensor*>>& plan, const Path& folder,
                 FileSystem& files, std::vector<Written>& written) {
  std::vector<DcpEntry> entries;
  for (size_t i = 0; i < plan.size(); ++i) {
    const std::string name = fmt::format("__0_{}.distcp", i);
    std::vector<std::string> headers;
    std::vector<uint64_t> offsets;
    uint64_t end = 0;
    for (const ManifestTensor* tensor : plan[i]) {
      std::string header = torch_save_header(tensor->dtype, tensor->shape);
      const uint64_t length = header.size() + bytes_of(*tensor);
      entries.push_back({tensor->name, tensor->dtype, tensor->shape, name, end, length});
      offsets.push_back(end + header.size());
      end += length;
      headers.push_back(std::move(header));
    }
    PENSTOCK_TRY_ASSIGN(const std::unique_ptr<WritableFile> file, files.create(folder / name));
    PENSTOCK_TRY(file->reserve(end));
    for (size_t t = 0; t < headers.size(); ++t) {
      PENSTOCK_TRY(file->write_at(offsets[t] - headers[t].size(), as_bytes(headers[t])));
    }
    PENSTOCK_TRY(copy_tensors(checkpoint, plan[i], folder / name, offsets, written,
                              [&](uint64_t at, Bytes bytes) { return file->write_at(at, bytes); }));
    PENSTOCK_TRY(file->sync());
    PENSTOCK_TRY(file->close());
  }
  return write_new_file(files, folder / ".metadata", as_bytes(dcp_metadata(entries)));
}

Status read_back(const std::vector<Written>& written) {
  std::vector<std::byte> buffer;
  Path open;
  FileDescriptor file;
  for (const Written& at : written) {
    if (at.file != open) {
      PENSTOCK_TRY_ASSIGN(file, open_file(at.file, O_RDONLY));
      open = at.file;
      // Else what is read were the pages that the writes left in memory. Only a hint: where it is
      // not taken, as on a file system in memory, they are.
      ::posix_fadvise(file.get(), 0, 0, POSIX_FADV_DONTNEED);
    }
    SliceDigestStream digest(slice_of(*at.tensor));
    const uint64_t bytes = bytes_of(*at.tensor);
    for (uint64_t done = 0; done < bytes; done += buffer.size()) {
      buffer.resize(std::min(kReadBytes, bytes - done));  // whole elements: a power of two
      PENSTOCK_TRY(read_at(file.get(), at.file, at.offset + done, buffer));
      digest.update(buffer);
    }
    if (digest.finish() == at.digest) continue;
    return data_loss(
        fmt::format("{}: tensor {} is not what was written", at.file.string(), at.tensor->name));
  }
  return {};
}

Result<std::string> text_of(const SafetensorsFile& file, const char* key) {
  const auto found = file.header().metadata.find(key);
  if (found != file.header().metadata.end()) return found->second;
  return data_loss(fmt::format("{}: its __metadata__ has no {}: it is no exported state",
                               file.path().string(), key));
}

template <typename Number>
Result<Number> number_of(const SafetensorsFile& file, const char* key, Number min) {
  PENSTOCK_TRY_ASSIGN(const std::string text, text_of(file, key));
  Number value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error == std::errc() && end == text.data() + text.size() && value >= min) return value;
  return data_loss(fmt::format("{}: its {} is no number from {} to {}", file.path().string(), key,
                               min, std::numeric_limits<Number>::max()));
}

}  // namespace

std::string state_digest(const Manifest& manifest, std::optional<TensorKind> kind) {
  DigestStream stream;
  for (const ManifestTensor& tensor : manifest.tensors) {  // ascending by name
    if (kind && parse_logical_name(tensor.name).kind != *kind) continue;
    ByteWriter writer;
    writer.put_string(tensor.name);
    writer.put(tensor.dtype);
    for (const int64_t size : tensor.shape) writer.put(size);
    writer.put(tensor.digest());
    stream.update(writer.data());
  }
  return to_hex(stream.finish());
}

Result<StateFiles> write_state_files(const CheckpointFiles& checkpoint, StateFormat format,
                                     uint64_t file_bytes_max, const Path& folder,
                                     FileSystem& files) {
  const auto plan = plan_files(checkpoint.manifest, file_bytes_max);
  StateFiles report{.tensor_count = checkpoint.manifest.tensors.size(),
                    .file_count = plan.size(),
                    .byte_count = checkpoint.manifest.payload_bytes()};
  PENSTOCK_TRY(check_room(folder, report.byte_count));
  std::vector<Written> written;
  PENSTOCK_TRY(format == StateFormat::kDcp
                   ? write_dcp(checkpoint, plan, folder, files, written)
                   : write_safetensors(checkpoint, plan, folder, files, written));
  PENSTOCK_TRY(read_back(written));
  return report;
}

Result<StateFolder> open_state_folder(const Path& folder) {
  std::error_code error;
  if (!std::filesystem::is_directory(folder, error)) {
    return not_found(folder.string() + " is not a folder");
  }
  PENSTOCK_TRY_ASSIGN(std::vector<std::string> names, file_names(folder));
  std::erase_if(names, [](const std::string& name) { return !name.ends_with(".safetensors"); });
  std::sort(names.begin(), names.end());
  if (names.empty()) return not_found(folder.string() + " holds no safetensors files");
  StateFolder state;
  std::set<std::string> tensors;
  for (const std::string& name : names) {
    PENSTOCK_TRY_ASSIGN(SafetensorsFile file, SafetensorsFile::open(folder / name));
    PENSTOCK_TRY_ASSIGN(const std::string format, text_of(file, "penstock.format"));
    PENSTOCK_TRY_ASSIGN(const int64_t file_count, number_of(file, "penstock.files", int64_t{1}));
    if (format != kFormatValue || file_count != std::ssize(names)) {
      return data_loss(fmt::format("{}: it is one of {} files of a \"{}\", and {} are here",
                                   file.path().string(), file_count, format, names.size()));
    }
    if (!state.files.empty() && file.header().metadata != state.files[0].header().metadata) {
      return data_loss(fmt::format("{} and {} are of different checkpoints",
                                   state.files[0].path().string(), file.path().string()));
    }
    for (const SafetensorsEntry& entry : file.header().tensors) {
      if (!tensors.insert(entry.name).second) {
        return data_loss(
            fmt::format("{}: tensor {} is there twice", file.path().string(), entry.name));
      }
    }
    state.files.push_back(std::move(file));
  }
  const SafetensorsFile& first = state.files.front();
  PENSTOCK_TRY_ASSIGN(state.step, number_of(first, "penstock.step", int64_t{0}));
  PENSTOCK_TRY_ASSIGN(state.job.value, number_of(first, "penstock.job", uint64_t{1}));
  PENSTOCK_TRY_ASSIGN(state.layout, text_of(first, "penstock.layout"));
  PENSTOCK_TRY_ASSIGN(state.spec_json, text_of(first, "penstock.spec"));
  const auto digest = first.header().metadata.find("penstock.digest");
  if (digest != first.header().metadata.end()) state.digest = digest->second;
  return state;
}

}  // namespace penstock
