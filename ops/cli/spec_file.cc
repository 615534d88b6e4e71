#include "ops/cli/spec_file.h"

#include <fmt/format.h>

#include "comm/base/file.h"
#include "comm/run/utf8.h"
#include "comm/run/yaml_document.h"
#include "ops/cli/hf_import.h"
#include "worker/data/sampler.h"
#include "worker/data/tokenizer.h"

namespace penstock {

namespace {

std::string absolute(const Path& folder, const std::string& path) {
  return (folder / path).lexically_normal().string();
}

void make_paths_absolute(const Path& folder, JobSpec& spec) {
  for (DataSource& source : spec.data.train) source.path = absolute(folder, source.path);
  for (DataSource& source : spec.data.validation) source.path = absolute(folder, source.path);
  if (spec.data.tokenizer != "bytes") spec.data.tokenizer = absolute(folder, spec.data.tokenizer);
  for (std::string* path : {&spec.checkpoint.dir, &spec.checkpoint.init_from}) {
    if (!path->empty()) *path = absolute(folder, *path);
  }
}

}  // namespace

Result<JobSpec> load_spec_file(const std::string& path, const std::string& name) {
  PENSTOCK_TRY_ASSIGN(const std::string text, read_file(path, kYamlBytesMax));
  PENSTOCK_TRY_ASSIGN(JobSpec spec, parse_job_spec(text, path));
  if (!name.empty()) spec.name = name;
  std::error_code error;
  const Path folder = std::filesystem::absolute(path, error).parent_path();
  if (error) return errno_status(error.value(), "find the folder of " + path);
  if (utf8_valid_prefix(folder.string()) != folder.string().size()) {
    return invalid_argument(
        fmt::format("{}: the name of its folder is not UTF-8, and specs are; move it", path));
  }
  make_paths_absolute(folder, spec);
  // --name and the folder's own characters go through the same checks as the file.
  return parse_job_spec(to_json(spec), path + " (with --name and absolute paths)");
}

Status check_spec_data(const JobSpec& spec) {
  if (const auto training = open_training_sampler(spec); !training.ok()) {
    return training.status().with_context("data.train");
  }
  if (!spec.data.validation.empty()) {
    if (const auto validation = open_validation_sampler(spec); !validation.ok()) {
      return validation.status().with_context("data.validation");
    }
  }
  const auto tokenizer = make_tokenizer(spec.data.tokenizer);
  if (!tokenizer.ok()) return tokenizer.status().with_context("data.tokenizer");
  if ((*tokenizer)->vocab_size() > spec.model.vocab_size) {
    return invalid_argument(
        fmt::format("model.vocab_size {} is below the {} tokens of data.tokenizer {}",
                    spec.model.vocab_size, (*tokenizer)->vocab_size(), spec.data.tokenizer));
  }
  if (spec.checkpoint.init_from.empty()) return {};
  const Status start = check_init_from(spec);
  if (start.ok()) return start;
  // A folder that is not there is a mistake in the spec.
  const Code code = start.code() == Code::kNotFound ? Code::kInvalidArgument : start.code();
  return Status(code, "checkpoint.init_from: " + start.message());
}

std::string section_place(const std::string& path, const std::string& message) {
  const auto text = read_file(path, kYamlBytesMax);
  if (!text.ok()) return {};
  const auto root = parse_yaml(*text, path);
  if (!root.ok()) return {};
  const std::string section = message.substr(0, message.find_first_of(" .:"));
  for (const YamlNode& key : root->keys) {
    if (key.text == section) return fmt::format("{}:{}:{}: ", path, key.line, key.column);
  }
  return {};
}

}  // namespace penstock
