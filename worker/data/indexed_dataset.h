// Megatron's indexed data set: token ids in <prefix>.bin, where they start and end in <prefix>.idx.
//
//   .bin  token ids back to back, little-endian, of one integer type
//   .idx  "MMIDIDX\0\0" | u64 version = 1 | u8 type | u64 sequences | u64 documents + 1
//         | i32 length[sequences] | i64 byte_pointer[sequences] | i64 document_index[documents + 1]
//
// A document is one or more consecutive sequences. Training reads the tokens as one packed stream.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>

#include "comm/base/hash.h"
#include "comm/base/status.h"

namespace penstock {

// The type codes that can hold token ids; Megatron's float codes (6, 7) are refused.
enum class TokenType : uint8_t { kU8 = 1, kI8 = 2, kI16 = 3, kI32 = 4, kI64 = 5, kU16 = 8 };

int64_t token_bytes(TokenType type);
std::string_view token_type_name(TokenType type);  // "u16"
// Megatron's rule: u16 below 65,500 tokens, else i32.
TokenType token_type_for(int64_t vocab_size);

// An open data set, mapped read-only. Thread-safe: constant after construction. Move-only.
// The files must not shrink while it is open: the next touch of a lost page would be a SIGBUS.
class IndexedDataset {
 public:
  // Checks everything that can be checked without reading every token: magic, version, type, sizes
  // of both files, byte pointers equal to the sums of the lengths, document indices ascending from
  // 0 to the sequence count. kNotFound, or kDataLoss naming the file and the first field that is
  // wrong.
  static Result<IndexedDataset> open(const std::string& prefix);
  ~IndexedDataset();
  IndexedDataset(IndexedDataset&&) noexcept;
  IndexedDataset& operator=(IndexedDataset&&) noexcept;

  const std::string& prefix() const;
  TokenType type() const;
  int64_t sequence_count() const;
  int64_t document_count() const;
  int64_t token_count() const;
  // Names the content: of the whole .idx and, of the .bin, its size and 256 blocks of 64 KiB evenly
  // spread from its first to its last byte; up to 16 MiB that is all of it. So a start of the
  // largest corpus reads 16 MiB, and any that was tokenized or cut anew (other lengths, or other
  // tokens almost everywhere) has another digest. What it cannot see is a few tokens of a larger
  // file patched in place.
  Digest digest() const;
  // First token of a document in the packed stream; document_begin(document_count()) ==
  // token_count(). REQUIRES: 0 <= document <= document_count().
  int64_t document_begin(int64_t document) const;

  // Tokens [first, first + into.size()) of the packed stream. kDataLoss when one of them is
  // negative or not below `vocab_size`, naming its position. REQUIRES: the range lies in the
  // stream.
  Status read(int64_t first, std::span<int32_t> into, int64_t vocab_size) const;
  // Reads every token and checks it against `vocab_size`; for `penstock data inspect` and import.
  Status verify_tokens(int64_t vocab_size) const;

 private:
  struct Mapped;
  explicit IndexedDataset(std::unique_ptr<Mapped> mapped);
  std::unique_ptr<Mapped> mapped_;
};

// Writes under temporary names and puts both files in place in finish(): a crash leaves the old
// data set, the new one or none, never one file of each. Not thread-safe. Move-only.
class IndexedDatasetWriter {
 public:
  static Result<IndexedDatasetWriter> create(const std::string& prefix, TokenType type);
  ~IndexedDatasetWriter();  // without finish(): removes the temporary files
  IndexedDatasetWriter(IndexedDatasetWriter&&) noexcept;
  IndexedDatasetWriter& operator=(IndexedDatasetWriter&&) noexcept;

  // One document of one sequence. kInvalidArgument when it is empty, longer than 2^31 - 1 tokens,
  // or has an id that the token type cannot hold.
  Status add_document(std::span<const int32_t> tokens);
  // Syncs, renames both files into place. kFailedPrecondition without any document.
  Status finish();

 private:
  struct State;
  explicit IndexedDatasetWriter(std::unique_ptr<State> state);
  std::unique_ptr<State> state_;
};

}  // namespace penstock
