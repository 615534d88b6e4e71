#include "worker/data/hf_tokenizer.h"

#include <array>
#include <nlohmann/json.hpp>

#include "worker/data/tokenizer.h"

namespace penstock {

namespace {

using Json = nlohmann::ordered_json;

constexpr uint64_t kTokenizerModelBytesMax = 1 << 30;

void append_utf8(uint32_t character, std::string& text) {
  if (character < 0x80) {
    text.push_back(static_cast<char>(character));
  } else {  // at most U+0143
    text.push_back(static_cast<char>(0xc0 | character >> 6));
    text.push_back(static_cast<char>(0x80 | (character & 0x3f)));
  }
}

// The printable character that byte-level tokenizers write for each byte (GPT-2's alphabet):
// printable Latin-1 for itself, the others in order from U+0100 on.
std::array<std::string, 256> byte_symbols() {
  std::array<std::string, 256> symbols;
  uint32_t next = 0x100;
  for (uint32_t byte = 0; byte < symbols.size(); ++byte) {
    const bool printable = (byte >= '!' && byte <= '~') || (byte >= 0xa1 && byte != 0xad);
    append_utf8(printable ? byte : next++, symbols[byte]);
  }
  return symbols;
}

Json byte_tokenizer_json(const Tokenizer& tokenizer) {
  Json vocabulary = Json::object();
  const std::array<std::string, 256> symbols = byte_symbols();
  for (size_t byte = 0; byte < symbols.size(); ++byte) vocabulary[symbols[byte]] = byte;
  const auto byte_level = [] {
    return Json{{"type", "ByteLevel"},
                {"add_prefix_space", false},
                {"trim_offsets", false},
                {"use_regex", false}};
  };
  return {{"version", "1.0"},
          {"truncation", nullptr},
          {"padding", nullptr},
          {"added_tokens", Json::array({{{"id", tokenizer.end_of_document()},
                                         {"content", tokenizer.end_of_document_text()},
                                         {"single_word", false},
                                         {"lstrip", false},
                                         {"rstrip", false},
                                         {"normalized", false},
                                         {"special", true}}})},
          {"normalizer", nullptr},
          {"pre_tokenizer", byte_level()},
          {"post_processor", nullptr},
          {"decoder", byte_level()},
          {"model",
           {{"type", "BPE"},
            {"dropout", nullptr},
            {"unk_token", nullptr},
            {"continuing_subword_prefix", nullptr},
            {"end_of_word_suffix", nullptr},
            {"fuse_unk", false},
            {"byte_fallback", false},
            {"ignore_merges", false},
            {"vocab", std::move(vocabulary)},
            {"merges", Json::array()}}}};
}

Status write_json(const Path& path, const Json& json) {
  return write_and_sync(path, as_bytes(json.dump(2) + "\n"));
}

}  // namespace

Status write_hf_tokenizer(const std::string& name, const Tokenizer& tokenizer,
                          int64_t context_length, const Path& folder) {
  // Documents begin as they end.
  Json config = {{"tokenizer_class", "PreTrainedTokenizerFast"},
                 {"bos_token", tokenizer.end_of_document_text()},
                 {"eos_token", tokenizer.end_of_document_text()},
                 {"clean_up_tokenization_spaces", false},
                 {"model_max_length", context_length}};
  if (name == "bytes") {
    PENSTOCK_TRY(write_json(folder / "tokenizer.json", byte_tokenizer_json(tokenizer)));
  } else {
    PENSTOCK_TRY_ASSIGN(const std::string model, read_file(name, kTokenizerModelBytesMax));
    PENSTOCK_TRY(write_and_sync(folder / "tokenizer.model", as_bytes(model)));
    config["tokenizer_class"] = "LlamaTokenizer";
    config["add_bos_token"] = false;
    config["add_eos_token"] = false;
    config["legacy"] = false;
  }
  return write_json(folder / "tokenizer_config.json", config);
}

}  // namespace penstock
