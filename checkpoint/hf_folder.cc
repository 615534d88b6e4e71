#include "checkpoint/hf_folder.h"

#include <fmt/format.h>

#include <algorithm>
#include <nlohmann/json.hpp>

#include "checkpoint/float_formats.h"
#include "checkpoint/strict_json.h"
#include "comm/base/check.h"

namespace penstock {
namespace {

using Json = nlohmann::json;

constexpr uint64_t kIndexBytesMax = 256 << 20;
constexpr size_t kFilesMax = 10'000;
constexpr uint64_t kPieceBytes = 4 << 20;  // fp32
constexpr std::string_view kScaleSuffix = "_scale_inv";

int64_t blocks_of(int64_t size) {
  return (size + kHfScaleBlock - 1) / kHfScaleBlock;
}

std::string shape_text(std::span<const int64_t> shape) {
  return fmt::format("[{}]", fmt::join(shape, ", "));
}

// Tensor name to file name, as the index says.
Result<std::map<std::string, std::string>> read_index(const Path& path) {
  PENSTOCK_TRY_ASSIGN(const std::string text, read_file(path, kIndexBytesMax));
  const Result<Json> json =
      parse_strict_json(text, {.depth_max = 3, .values_max = 2 * kSafetensorsTensorsMax});
  if (!json.ok()) return json.status().with_context(path.string());
  const auto bad = [&](const std::string& what) { return data_loss(path.string() + ": " + what); };
  if (!json->is_object() || !json->contains("weight_map") || !json->at("weight_map").is_object()) {
    return bad("it has no object \"weight_map\"");
  }
  std::map<std::string, std::string> places;
  for (const auto& [name, file] : json->at("weight_map").items()) {
    if (!file.is_string()) return bad(fmt::format("tensor {}: its file is not a text", name));
    const auto& file_name = file.get_ref<const std::string&>();
    // A name, never a path: an index must not lead out of its folder.
    if (!file_name.ends_with(".safetensors") || file_name.find('/') != std::string::npos) {
      return bad(fmt::format("tensor {}: \"{}\" is not the name of a safetensors file", name,
                             file_name.substr(0, 200)));
    }
    places[name] = file_name;
  }
  return places;
}

// FP8 has one published form; another would be read as nonsense.
Status check_quantization(const Json& config) {
  const auto found = config.find("quantization_config");
  if (found == config.end() || found->is_null()) return {};
  const Json expected = {{"quant_method", "fp8"},
                         {"fmt", "e4m3"},
                         {"weight_block_size", {kHfScaleBlock, kHfScaleBlock}}};
  for (const auto& [key, value] : expected.items()) {
    if (!found->is_object() || !found->contains(key) || found->at(key) != value) {
      return data_loss(
          fmt::format("quantization_config.{} must be {}: weights in FP8 E4M3 with a "
                      "scale per block of {} x {} are read, no others",
                      key, value.dump(), kHfScaleBlock, kHfScaleBlock));
    }
  }
  return {};
}

}  // namespace

std::string hf_shard_name(size_t number, size_t count) {
  PENSTOCK_CHECK(number >= 1 && number <= count, number, count);
  return fmt::format("model-{:05}-of-{:05}.safetensors", number, count);
}

Result<HfFolder> HfFolder::open(const Path& directory) {
  HfFolder folder;
  folder.path_ = directory;
  const Path config_path = directory / kHfConfigFile;
  PENSTOCK_TRY_ASSIGN(folder.config_, read_file(config_path, kHfConfigBytesMax));
  const Result<Json> config = parse_strict_json(folder.config_);
  Status status = config.ok() ? Status() : config.status();
  if (config.ok() && !config->is_object()) status = data_loss("it is not an object");
  if (status.ok()) status = check_quantization(*config);
  if (!status.ok()) return status.with_context(config_path.string());
  PENSTOCK_TRY(folder.open_files());
  PENSTOCK_TRY(folder.match_scales());
  return folder;
}

Status HfFolder::open_files() {
  std::error_code error;
  const Path index_path = path_ / kHfIndexFile;
  const bool has_index = std::filesystem::exists(index_path, error);
  std::map<std::string, std::string> places;
  std::vector<std::string> names = {kHfSingleFile};
  if (has_index) {
    PENSTOCK_TRY_ASSIGN(places, read_index(index_path));
    names.clear();
    for (const auto& [tensor, file] : places) names.push_back(file);
    std::sort(names.begin(), names.end());
    names.erase(std::unique(names.begin(), names.end()), names.end());
    if (names.size() > kFilesMax) {
      return data_loss(fmt::format("{} names more than {} files", index_path.string(), kFilesMax));
    }
  }
  size_t tensor_count = 0;
  for (const std::string& name : names) {
    PENSTOCK_TRY_ASSIGN(SafetensorsFile opened, SafetensorsFile::open(path_ / name));
    files_.push_back(std::make_unique<SafetensorsFile>(std::move(opened)));
    for (const SafetensorsEntry& entry : files_.back()->header().tensors) {
      const auto place = places.find(entry.name);
      if (has_index && (place == places.end() || place->second != name)) {
        return data_loss(fmt::format("{} has tensor {}, which {} does not place there",
                                     (path_ / name).string(), entry.name, kHfIndexFile));
      }
      ++tensor_count;
      const bool scale = entry.name.ends_with(kScaleSuffix);
      (scale ? scales_ : weights_)[entry.name] = {files_.back().get(), &entry, nullptr};
    }
  }
  if (!has_index || tensor_count == places.size()) return {};
  for (const auto& [tensor, file] : places) {
    if (weights_.contains(tensor) || scales_.contains(tensor)) continue;
    return data_loss(fmt::format("{} has no tensor {}, which {} places there",
                                 (path_ / file).string(), tensor, kHfIndexFile));
  }
  return {};
}

Status HfFolder::match_scales() {
  size_t matched = 0;
  for (auto& [name, weight] : weights_) {
    if (weight.entry->dtype != DType::kF8E4m3) continue;
    const auto bad = [&name = name, &weight = weight](const std::string& what) {
      return data_loss(fmt::format("{}: tensor {}: {}", weight.file->path().string(), name, what));
    };
    const auto scales = scales_.find(name + std::string(kScaleSuffix));
    if (scales == scales_.end()) return bad("it is F8_E4M3 and has no " + name + "_scale_inv");
    const std::vector<int64_t>& shape = weight.entry->shape;
    if (shape.size() != 2) return bad("it is F8_E4M3 and no matrix");
    const std::vector<int64_t> expected = {blocks_of(shape[0]), blocks_of(shape[1])};
    if (scales->second.entry->dtype != DType::kF32 || scales->second.entry->shape != expected) {
      return bad(fmt::format("its scales must be F32 {}, one per block of {} x {}",
                             shape_text(expected), kHfScaleBlock, kHfScaleBlock));
    }
    weight.scales = &scales->second;
    ++matched;
  }
  if (matched == scales_.size()) return {};
  for (const auto& [name, scales] : scales_) {
    const auto weight = weights_.find(name.substr(0, name.size() - kScaleSuffix.size()));
    if (weight != weights_.end() && weight->second.scales == &scales) continue;
    return data_loss(
        fmt::format("{}: tensor {} scales no F8_E4M3 tensor", scales.file->path().string(), name));
  }
  return {};
}

// `rows` holds whole rows of the weight, from first_row on, as FP8 numbers; multiplies them.
Status HfFolder::apply_scales(const Weight& weight, int64_t first_row,
                              std::span<float> rows) const {
  const int64_t width = weight.entry->shape[1];
  std::vector<float> scales(static_cast<size_t>(blocks_of(width)));
  int64_t scales_row = -1;
  for (int64_t row = 0; row * width < std::ssize(rows); ++row) {
    if ((first_row + row) / kHfScaleBlock != scales_row) {
      scales_row = (first_row + row) / kHfScaleBlock;
      const auto bytes = std::as_writable_bytes(std::span(scales));
      PENSTOCK_TRY(
          weight.scales->file->read(*weight.scales->entry, scales_row * bytes.size(), bytes));
    }
    float* values = rows.data() + row * width;
    for (int64_t i = 0; i < width; ++i) values[i] *= scales[static_cast<size_t>(i / kHfScaleBlock)];
  }
  return {};
}

Status HfFolder::check(const std::string& name, std::span<const int64_t> shape) const {
  const auto found = weights_.find(name);
  if (found == weights_.end()) {
    return data_loss(
        fmt::format("{} has no tensor {}, which the model needs", path_.string(), name));
  }
  const Weight& weight = found->second;
  const SafetensorsEntry& entry = *weight.entry;
  const auto bad = [&](const std::string& what) {
    return data_loss(fmt::format("{}: tensor {}: {}", weight.file->path().string(), name, what));
  };
  if (!std::equal(shape.begin(), shape.end(), entry.shape.begin(), entry.shape.end())) {
    return bad(fmt::format("its shape is {}, the model's is {}", shape_text(entry.shape),
                           shape_text(shape)));
  }
  if (!converts_to_float(entry.dtype)) {
    return bad(
        fmt::format("weights are F32, BF16, F16 or F8_E4M3, not {}", dtype_name(entry.dtype)));
  }
  return {};
}

Status HfFolder::for_each_piece(const std::string& name, std::span<const int64_t> shape,
                                const Visit& visit) const {
  PENSTOCK_TRY(check(name, shape));
  const Weight& weight = weights_.at(name);
  const SafetensorsEntry& entry = *weight.entry;
  const int64_t count = element_count(entry.shape);
  const int64_t width = shape.empty() ? 1 : std::max<int64_t>(1, element_count(shape.subspan(1)));
  const int64_t step = std::max<int64_t>(1, kPieceBytes / sizeof(float) / width) * width;
  const auto element_bytes = static_cast<int64_t>(dtype_bytes(entry.dtype));
  std::vector<std::byte> raw(static_cast<size_t>(std::min(step, count) * element_bytes));
  std::vector<float> values(static_cast<size_t>(std::min(step, count)));
  for (int64_t first = 0; first < count; first += step) {
    const auto size = static_cast<size_t>(std::min(step, count - first));
    const MutableBytes bytes = MutableBytes(raw).first(size * element_bytes);
    const std::span<float> piece = std::span(values).first(size);
    PENSTOCK_TRY(weight.file->read(entry, first * element_bytes, bytes));
    to_floats(entry.dtype, bytes, piece);
    if (weight.scales != nullptr) PENSTOCK_TRY(apply_scales(weight, first / width, piece));
    PENSTOCK_TRY(visit(first, piece));
  }
  return {};
}

Status HfFolder::read(const std::string& name, std::span<const int64_t> shape,
                      std::span<float> into) const {
  PENSTOCK_CHECK(std::ssize(into) == element_count(shape));
  return for_each_piece(name, shape, [&](int64_t first, std::span<const float> values) -> Status {
    std::copy(values.begin(), values.end(), into.begin() + first);
    return {};
  });
}

}  // namespace penstock
