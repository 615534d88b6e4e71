// A model folder in Hugging Face's layout, for reading: config.json beside model.safetensors, or
// beside model-XXXXX-of-YYYYY.safetensors with model.safetensors.index.json.
//
// Weights may be F32, BF16, F16, or FP8 as DeepSeek-V3 was published: F8_E4M3 [out, in] beside
// <name>_scale_inv, F32 [ceil(out/128), ceil(in/128)]; a value is its FP8 number times its block's
// scale (the layout of the released DeepSeek-V3).
#pragma once

#include <functional>
#include <map>
#include <span>
#include <string>
#include <vector>

#include "checkpoint/safetensors.h"

namespace penstock {

inline constexpr const char* kHfConfigFile = "config.json";
inline constexpr const char* kHfIndexFile = "model.safetensors.index.json";
inline constexpr const char* kHfSingleFile = "model.safetensors";
inline constexpr uint64_t kHfConfigBytesMax = 256 << 10;
inline constexpr int64_t kHfScaleBlock = 128;

// "model-00002-of-00163.safetensors". REQUIRES: 1 <= number <= count.
std::string hf_shard_name(size_t number, size_t count);

// Constant after open; concurrent reads are safe. Errors name file, tensor and rule.
class HfFolder {
 public:
  // Reads every header, no data. kNotFound when a file is missing; kDataLoss when the index and the
  // files do not agree, a tensor is there twice, or FP8 weights and scales do not belong together.
  static Result<HfFolder> open(const Path& directory);

  const Path& path() const { return path_; }
  const std::string& config() const { return config_; }  // the text of config.json
  size_t file_count() const { return files_.size(); }

  struct Weight {
    const SafetensorsFile* file = nullptr;
    const SafetensorsEntry* entry = nullptr;
    const Weight* scales = nullptr;  // of an FP8 weight
  };
  // By name, scales not among them.
  const std::map<std::string, Weight>& weights() const { return weights_; }

  // Ok when there is a weight of this name and shape, of a type that stands for real numbers; else
  // kDataLoss.
  Status check(const std::string& name, std::span<const int64_t> shape) const;
  // check(), then the weight's values as fp32, in order and in pieces of whole rows that are at
  // most a few MiB (or one row), each with the index of its first element. An error of `visit` ends
  // the reading.
  using Visit = std::function<Status(int64_t first, std::span<const float> values)>;
  Status for_each_piece(const std::string& name, std::span<const int64_t> shape,
                        const Visit& visit) const;
  // The same, into memory of the caller's. REQUIRES: `into` has the shape's elements.
  Status read(const std::string& name, std::span<const int64_t> shape, std::span<float> into) const;

 private:
  HfFolder() = default;
  Status open_files();
  Status match_scales();
  Status apply_scales(const Weight& weight, int64_t first_row, std::span<float> rows) const;

  Path path_;
  std::string config_;
  std::vector<std::unique_ptr<SafetensorsFile>> files_;
  std::map<std::string, Weight> weights_;
  std::map<std::string, Weight> scales_;
};

}  // namespace penstock
