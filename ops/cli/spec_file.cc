#include "ops/cli/spec_file.h"

#include <fmt/format.h>

#include <cerrno>
#include <cstdio>
#include <initializer_list>

#include "comm/run/utf8.h"
#include "comm/run/yaml_document.h"
#include "ops/cli/hf_import.h"
#include "worker/data/indexed_dataset.h"
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

// One byte more than a spec may have, so that parsing refuses what is too long.
Result<std::string> read_standard_input() {
  std::string text(kYamlBytesMax + 1, '\0');
  text.resize(std::fread(text.data(), 1, text.size(), stdin));
  if (std::ferror(stdin) != 0) return errno_status(errno, "read <stdin>");
  return text;
}

// A value by the keys that lead to it; null when it is not there.
const YamlNode* value_at(const YamlNode& root, std::initializer_list<const char*> keys) {
  const YamlNode* node = &root;
  for (const char* key : keys) {
    if (node != nullptr && node->kind == YamlNode::Kind::kMapping) node = node->find(key);
  }
  return node;
}

std::string place_text(const SpecSource& source, const YamlNode& node) {
  return fmt::format("{}:{}:{}: ", source.origin, node.line, node.column);
}

// The sources of docs/examples come from a script of the repository that they are in.
std::string what_makes(const std::string& data_path) {
  const Path path(data_path);
  const Path folder = path.parent_path();
  const bool is_corpus = folder.filename() == "corpus" &&
                         folder.parent_path().filename() == "build" &&
                         path.filename().string().starts_with("fortunes_");
  const Path script = folder.parent_path().parent_path() / "ops" / "corpus";
  std::error_code error;
  if (!is_corpus || !std::filesystem::is_regular_file(script, error)) {
    return "it is looked for from the spec's folder; penstock data prepare makes data sets";
  }
  const Path from_here = std::filesystem::proximate(script, error);
  const bool is_below = !error && *from_here.begin() != "..";
  return "make it with: " + (is_below ? from_here : script).string();
}

// A refusal of what the spec names at `node`, a value in it (null: somewhere). A file that is not
// there is a mistake in the spec; a damaged one is not.
Status refusal(const SpecSource& source, const YamlNode* node, const Status& status,
               const std::string& hint) {
  const std::string place = node == nullptr ? source.origin + ": " : place_text(source, *node);
  if (status.code() != Code::kNotFound) return Status(status.code(), place + status.message());
  return invalid_argument(place + status.message() + (hint.empty() ? "" : "; ") + hint);
}

// Why the list data.<key> cannot be sampled, at the first source that cannot be opened.
Status data_refusal(const SpecSource& source, const YamlNode& root, const char* key,
                    const std::vector<DataSource>& data, const Status& why) {
  const YamlNode* list = value_at(root, {"data", key});
  for (size_t i = 0; i < data.size(); ++i) {
    const auto opened = IndexedDataset::open(data[i].path);
    if (opened.ok()) continue;
    const YamlNode* item = list == nullptr || i >= list->items.size() ? list : &list->items[i];
    return refusal(source, item == nullptr ? nullptr : value_at(*item, {"path"}),
                   opened.status().with_context(fmt::format("data.{}[{}]", key, i)),
                   what_makes(data[i].path));
  }
  return refusal(source, list, why.with_context(fmt::format("data.{}", key)), "");
}

}  // namespace

Result<SpecSource> read_spec(const std::string& path) {
  SpecSource source;
  std::error_code error;
  if (path == "-") {
    source.origin = "<stdin>";
    source.folder = std::filesystem::current_path(error);
    PENSTOCK_TRY_ASSIGN(source.text, read_standard_input());
  } else {
    source.origin = path;
    source.folder = std::filesystem::absolute(path, error).parent_path();
    PENSTOCK_TRY_ASSIGN(source.text, read_file(path, kYamlBytesMax));
  }
  if (error) return errno_status(error.value(), "find the folder of " + source.origin);
  return source;
}

Result<JobSpec> load_spec(const SpecSource& source, const std::string& name) {
  PENSTOCK_TRY_ASSIGN(JobSpec spec, parse_job_spec(source.text, source.origin));
  if (!name.empty()) spec.name = name;
  if (utf8_valid_prefix(source.folder.string()) != source.folder.string().size()) {
    return invalid_argument(fmt::format(
        "{}: the name of its folder is not UTF-8, and specs are; move it", source.origin));
  }
  make_paths_absolute(source.folder, spec);
  // --name and the folder's own characters go through the same checks as the file.
  return parse_job_spec(to_json(spec), source.origin + " (with --name and absolute paths)");
}

Result<JobSpec> load_spec_file(const std::string& path, const std::string& name) {
  PENSTOCK_TRY_ASSIGN(const SpecSource source, read_spec(path));
  return load_spec(source, name);
}

Status check_spec_data(const SpecSource& source, const JobSpec& spec) {
  PENSTOCK_TRY_ASSIGN(const YamlNode root, parse_yaml(source.text, source.origin));
  if (const auto training = open_training_sampler(spec); !training.ok()) {
    return data_refusal(source, root, "train", spec.data.train, training.status());
  }
  if (!spec.data.validation.empty()) {
    if (const auto validation = open_validation_sampler(spec); !validation.ok()) {
      return data_refusal(source, root, "validation", spec.data.validation, validation.status());
    }
  }
  const auto tokenizer = make_tokenizer(spec.data.tokenizer);
  if (!tokenizer.ok()) {
    return refusal(source, value_at(root, {"data", "tokenizer"}),
                   tokenizer.status().with_context("data.tokenizer"), "");
  }
  if ((*tokenizer)->vocab_size() > spec.model.vocab_size) {
    const Status too_small = invalid_argument(
        fmt::format("model.vocab_size {} is below the {} tokens of data.tokenizer {}",
                    spec.model.vocab_size, (*tokenizer)->vocab_size(), spec.data.tokenizer));
    return refusal(source, value_at(root, {"model", "vocab_size"}), too_small, "");
  }
  if (spec.checkpoint.init_from.empty()) return {};
  const Status start = check_init_from(spec);
  if (start.ok()) return {};
  return refusal(source, value_at(root, {"checkpoint", "init_from"}),
                 start.with_context("checkpoint.init_from"), "");
}

std::string section_place(const SpecSource& source, const std::string& message) {
  const auto root = parse_yaml(source.text, source.origin);
  if (!root.ok()) return {};
  const std::string section = message.substr(0, message.find_first_of(" .:"));
  for (const YamlNode& key : root->keys) {
    if (key.text == section) return place_text(source, key);
  }
  return {};
}

}  // namespace penstock
