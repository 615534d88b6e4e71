#include "checkpoint/hf_weights.h"

#include <fmt/format.h>

#include <algorithm>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>

#include "checkpoint/float_formats.h"
#include "checkpoint/hf_folder.h"
#include "checkpoint/names.h"
#include "checkpoint/tensor_stream.h"
#include "comm/base/check.h"
#include "comm/base/minifloat.h"

namespace penstock {
namespace {

using Json = nlohmann::ordered_json;

constexpr uint64_t kReadBytes = 4 << 20;
constexpr std::string_view kRouterBias = ".e_score_correction_bias";
constexpr std::string_view kMtpProjection = "eh_proj.weight";

// Name in the folder to the tensor whose bytes it holds.
using Sources = std::map<std::string, const ManifestTensor*>;

Result<Sources> weight_sources(const Manifest& manifest) {
  Sources sources;
  for (const ManifestTensor& tensor : manifest.tensors) {
    if (parse_logical_name(tensor.name).kind != TensorKind::kWeight) continue;
    if (tensor.name.find('|') != std::string::npos) continue;  // state of a kind not known here
    if (!converts_to_float(tensor.dtype)) {
      return data_loss(fmt::format("tensor {}: the checkpoint holds it as {}, not as real numbers",
                                   tensor.name, dtype_name(tensor.dtype)));
    }
    sources[tensor.name] = &tensor;
  }
  if (sources.empty()) {
    return not_found(fmt::format("the checkpoint of step {} holds no weights", manifest.step));
  }
  const std::map<std::string, std::string> shared = {
      {"embed_tokens.weight", "model.embed_tokens.weight"},
      {"shared_head.head.weight", "lm_head.weight"}};
  for (const ManifestTensor& tensor : manifest.tensors) {
    if (!tensor.name.ends_with(kMtpProjection)) continue;
    const std::string layer = tensor.name.substr(0, tensor.name.size() - kMtpProjection.size());
    for (const auto& [copy, original] : shared) {
      if (const auto found = sources.find(original); found != sources.end()) {
        sources.emplace(layer + copy, found->second);
      }
    }
  }
  return sources;
}

std::vector<SafetensorsHeader> plan_files(const Sources& sources, const HfWeightsOptions& options) {
  std::vector<SafetensorsHeader> files;
  std::vector<SafetensorsEntry> entries;
  uint64_t bytes = 0;
  for (const auto& [name, tensor] : sources) {
    const DType dtype = name.ends_with(kRouterBias) ? DType::kF32 : options.dtype;
    const uint64_t size = byte_count(whole_tensor(name, dtype, tensor->shape));
    if (!entries.empty() && bytes + size > options.shard_bytes_max) {
      files.push_back(lay_out_safetensors(std::exchange(entries, {})));
      bytes = 0;
    }
    entries.push_back({.name = name, .dtype = dtype, .shape = tensor->shape});
    bytes += size;
  }
  files.push_back(lay_out_safetensors(std::move(entries)));
  return files;
}

void convert(DType from, Bytes bytes, DType to, std::vector<std::byte>& into) {
  std::vector<float> values(bytes.size() / dtype_bytes(from));
  to_floats(from, bytes, values);
  into.resize(values.size() * dtype_bytes(to));
  for (size_t i = 0; i < values.size(); ++i) {
    const uint16_t rounded = encode_bf16(values[i]);
    if (to == DType::kBf16) {
      std::memcpy(into.data() + i * sizeof rounded, &rounded, sizeof rounded);
    } else {
      std::memcpy(into.data() + i * sizeof(float), &values[i], sizeof(float));
    }
  }
}

// Writes the tensors of one file, in the file's order.
class FileCopy {
 public:
  FileCopy(const SafetensorsHeader& header, const Sources& sources, SafetensorsWriter& writer)
      : header_(header), sources_(sources), writer_(writer) {}

  Status run(const CheckpointFiles& files) {
    TensorStream stream(files, [this](size_t index, Bytes bytes, bool last) {
      return write(header_.tensors[index], bytes, last);
    });
    for (const SafetensorsEntry& entry : header_.tensors) {
      PENSTOCK_TRY(stream.add(*sources_.at(entry.name)));
    }
    return stream.flush();
  }

  std::vector<HfWeights::Tensor> take_written() { return std::move(written_); }

 private:
  Status write(const SafetensorsEntry& entry, Bytes bytes, bool last) {
    const DType from = sources_.at(entry.name)->dtype;
    if (from != entry.dtype) {
      convert(from, bytes, entry.dtype, converted_);
      bytes = converted_;
    }
    PENSTOCK_TRY(writer_.append(bytes));
    digest_->update(bytes);
    if (last) {
      written_.push_back({entry.name, digest_->finish()});
      digest_ = std::make_unique<DigestStream>();
    }
    return {};
  }

  const SafetensorsHeader& header_;
  const Sources& sources_;
  SafetensorsWriter& writer_;
  std::vector<std::byte> converted_;
  std::unique_ptr<DigestStream> digest_ = std::make_unique<DigestStream>();
  std::vector<HfWeights::Tensor> written_;
};

Status write_index(const Path& folder, const std::vector<SafetensorsHeader>& headers,
                   uint64_t byte_count, FileSystem& files) {
  Json places = Json::object();
  for (size_t i = 0; i < headers.size(); ++i) {
    for (const SafetensorsEntry& entry : headers[i].tensors) {
      places[entry.name] = hf_shard_name(i + 1, headers.size());
    }
  }
  const Json index = {{"metadata", {{"total_size", byte_count}}}, {"weight_map", places}};
  return write_new_file(files, folder / kHfIndexFile, as_bytes(index.dump(2) + "\n"));
}

}  // namespace

Result<HfWeights> write_hf_weights(const Path& checkpoint, const Manifest& manifest,
                                   const Path& folder, const HfWeightsOptions& options,
                                   FileSystem& files) {
  PENSTOCK_CHECK(options.dtype == DType::kF32 || options.dtype == DType::kBf16);
  PENSTOCK_TRY_ASSIGN(const Sources sources, weight_sources(manifest));
  const std::vector<SafetensorsHeader> headers = plan_files(sources, options);
  HfWeights written{.tensors = {}, .byte_count = 0, .file_count = headers.size()};
  for (const SafetensorsHeader& header : headers) written.byte_count += header.data_bytes();
  PENSTOCK_TRY(check_room(folder, written.byte_count));
  for (size_t i = 0; i < headers.size(); ++i) {
    const std::string name =
        headers.size() == 1 ? kHfSingleFile : hf_shard_name(i + 1, headers.size());
    PENSTOCK_TRY_ASSIGN(SafetensorsWriter writer,
                        SafetensorsWriter::create(folder / name, headers[i], files));
    FileCopy copy(headers[i], sources, writer);
    PENSTOCK_TRY(copy.run({checkpoint, manifest}));
    PENSTOCK_TRY(writer.finish());
    for (HfWeights::Tensor& tensor : copy.take_written()) {
      written.tensors.push_back(std::move(tensor));
    }
  }
  if (headers.size() > 1) {
    PENSTOCK_TRY(write_index(folder, headers, written.byte_count, files));
  }
  return written;
}

Status verify_hf_weights(const Path& folder, const HfWeights& written) {
  PENSTOCK_TRY_ASSIGN(const HfFolder opened, HfFolder::open(folder));
  if (opened.weights().size() != written.tensors.size()) {
    return data_loss(fmt::format("{} holds {} tensors, {} were written", folder.string(),
                                 opened.weights().size(), written.tensors.size()));
  }
  std::vector<std::byte> buffer(kReadBytes);
  for (const HfWeights::Tensor& tensor : written.tensors) {
    const auto found = opened.weights().find(tensor.name);
    if (found == opened.weights().end()) {
      return data_loss(fmt::format("{} lost tensor {}", folder.string(), tensor.name));
    }
    const auto& [name, weight] = *found;
    DigestStream digest;
    for (uint64_t at = 0; at < weight.entry->byte_count(); at += kReadBytes) {
      const auto some = MutableBytes(buffer).first(
          std::min<uint64_t>(kReadBytes, weight.entry->byte_count() - at));
      PENSTOCK_TRY(weight.file->read(*weight.entry, at, some));
      digest.update(some);
    }
    if (digest.finish() != tensor.digest) {
      return data_loss(fmt::format("{}: tensor {} is not what was written: digest {}, not {}",
                                   weight.file->path().string(), name, to_hex(digest.finish()),
                                   to_hex(tensor.digest)));
    }
  }
  return {};
}

}  // namespace penstock
