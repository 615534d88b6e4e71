// Text to token ids and back. Two kinds:
//   "bytes"          one token per byte (ids 0 … 255) and end-of-document, id 256: vocabulary 257.
//   path to *.model  a SentencePiece model; its end-of-sentence piece marks the end of a document.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "comm/base/status.h"

namespace penstock {

inline constexpr int32_t kByteEndOfDocument = 256;

// Thread-safe: constant after construction.
class Tokenizer {
 public:
  virtual ~Tokenizer() = default;

  // Ids are 0 … vocab_size() - 1. A model trained on these tokens needs at least this vocab_size.
  virtual int64_t vocab_size() const = 0;
  // The token that ends every document in a packed stream.
  virtual int32_t end_of_document() const = 0;
  // How that token is written in lists of tokens. Never looked for in a text.
  virtual std::string end_of_document_text() const = 0;
  // Appends the tokens of `text`, without an end-of-document.
  virtual Status encode(std::string_view text, std::vector<int32_t>& tokens) const = 0;
  // The text of `tokens`. End-of-document has no text of its own. kInvalidArgument for an id that
  // is not in the vocabulary. With "bytes" the result is whatever bytes the tokens name, valid
  // UTF-8 or not.
  virtual Result<std::string> decode(std::span<const int32_t> tokens) const = 0;
};

// `name` as in DataSpec::tokenizer. kNotFound or kDataLoss name the model file and what is wrong
// with it.
Result<std::unique_ptr<Tokenizer>> make_tokenizer(const std::string& name);

}  // namespace penstock
