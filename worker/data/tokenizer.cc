#include "worker/data/tokenizer.h"

#include <fmt/format.h>
#include <sentencepiece_processor.h>

#include <filesystem>

namespace penstock {

namespace {

Status unknown_token(int32_t token, int64_t vocab_size) {
  return invalid_argument(
      fmt::format("token {} is not in the vocabulary of {}", token, vocab_size));
}

class ByteTokenizer : public Tokenizer {
 public:
  int64_t vocab_size() const override { return kByteEndOfDocument + 1; }
  int32_t end_of_document() const override { return kByteEndOfDocument; }
  std::string end_of_document_text() const override { return "<|end_of_document|>"; }

  Status encode(std::string_view text, std::vector<int32_t>& tokens) const override {
    tokens.reserve(tokens.size() + text.size());
    for (const char c : text) tokens.push_back(static_cast<unsigned char>(c));
    return {};
  }

  Result<std::string> decode(std::span<const int32_t> tokens) const override {
    std::string text;
    for (const int32_t token : tokens) {
      if (token < 0 || token >= vocab_size()) return unknown_token(token, vocab_size());
      if (token != kByteEndOfDocument) text.push_back(static_cast<char>(token));
    }
    return text;
  }
};

class SentencePieceTokenizer : public Tokenizer {
 public:
  static Result<std::unique_ptr<Tokenizer>> load(const std::string& path) {
    std::error_code error;
    if (!std::filesystem::exists(path, error)) {
      return not_found(
          fmt::format("tokenizer {}: no such file; use \"bytes\" or the path of a "
                      "SentencePiece model",
                      path));
    }
    auto tokenizer = std::unique_ptr<SentencePieceTokenizer>(new SentencePieceTokenizer);
    if (const auto status = tokenizer->processor_.Load(path); !status.ok()) {
      return data_loss(
          fmt::format("tokenizer {}: not a SentencePiece model: {}", path, status.ToString()));
    }
    if (tokenizer->processor_.eos_id() < 0) {
      return data_loss(
          fmt::format("tokenizer {}: has no end-of-sentence piece, which ends documents", path));
    }
    return std::unique_ptr<Tokenizer>(std::move(tokenizer));
  }

  int64_t vocab_size() const override { return processor_.GetPieceSize(); }
  int32_t end_of_document() const override { return processor_.eos_id(); }
  std::string end_of_document_text() const override {
    return processor_.IdToPiece(processor_.eos_id());
  }

  Status encode(std::string_view text, std::vector<int32_t>& tokens) const override {
    std::vector<int> pieces;
    if (const auto status = processor_.Encode({text.data(), text.size()}, &pieces); !status.ok()) {
      return internal_error("SentencePiece could not encode: " + status.ToString());
    }
    tokens.insert(tokens.end(), pieces.begin(), pieces.end());
    return {};
  }

  Result<std::string> decode(std::span<const int32_t> tokens) const override {
    std::vector<int> pieces;
    for (const int32_t token : tokens) {
      if (token < 0 || token >= vocab_size()) return unknown_token(token, vocab_size());
      if (token != end_of_document()) pieces.push_back(token);
    }
    std::string text;
    if (const auto status = processor_.Decode(pieces, &text); !status.ok()) {
      return internal_error("SentencePiece could not decode: " + status.ToString());
    }
    return text;
  }

 private:
  sentencepiece::SentencePieceProcessor processor_;
};

}  // namespace

Result<std::unique_ptr<Tokenizer>> make_tokenizer(const std::string& name) {
  if (name == "bytes") return std::unique_ptr<Tokenizer>(std::make_unique<ByteTokenizer>());
  return SentencePieceTokenizer::load(name);
}

}  // namespace penstock
