#include "worker/data/indexed_dataset.h"

#include <cstring>
#include <limits>
#include <string_view>

#include "comm/base/check.h"
#include "worker/data/mapped_file.h"

namespace penstock {

namespace {

constexpr std::string_view kMagic("MMIDIDX\0\0", 9);
constexpr uint64_t kVersion = 1;
constexpr size_t kHeaderBytes = 34;

// Field `index` of an array in the .idx file, whose arrays are not aligned.
template <typename T>
T field(Bytes array, int64_t index) {
  T value;
  std::memcpy(&value, array.data() + index * sizeof(T), sizeof(T));
  return value;
}

template <typename Stored>
int64_t widen(Bytes tokens, int64_t index) {
  return static_cast<int64_t>(field<Stored>(tokens, index));
}

// The token at `index`, whatever its stored type.
int64_t token_at(TokenType type, Bytes tokens, int64_t index) {
  switch (type) {
    case TokenType::kU8:
      return widen<uint8_t>(tokens, index);
    case TokenType::kI8:
      return widen<int8_t>(tokens, index);
    case TokenType::kI16:
      return widen<int16_t>(tokens, index);
    case TokenType::kI32:
      return widen<int32_t>(tokens, index);
    case TokenType::kI64:
      return widen<int64_t>(tokens, index);
    case TokenType::kU16:
      return widen<uint16_t>(tokens, index);
  }
  std::abort();
}

Result<TokenType> token_type_of(uint8_t code, const std::string& path) {
  switch (code) {
    case 1:
    case 2:
    case 3:
    case 4:
    case 5:
    case 8:
      return static_cast<TokenType>(code);
    case 6:
    case 7:
      return data_loss(
          fmt::format("{}: type code {} is floating point; token ids are integers", path, code));
    default:
      return data_loss(fmt::format("{}: type code {} at byte 17 is none of 1 to 8", path, code));
  }
}

}  // namespace

int64_t token_bytes(TokenType type) {
  switch (type) {
    case TokenType::kU8:
    case TokenType::kI8:
      return 1;
    case TokenType::kI16:
    case TokenType::kU16:
      return 2;
    case TokenType::kI32:
      return 4;
    case TokenType::kI64:
      return 8;
  }
  std::abort();
}

std::string_view token_type_name(TokenType type) {
  switch (type) {
    case TokenType::kU8:
      return "u8";
    case TokenType::kI8:
      return "i8";
    case TokenType::kI16:
      return "i16";
    case TokenType::kI32:
      return "i32";
    case TokenType::kI64:
      return "i64";
    case TokenType::kU16:
      return "u16";
  }
  std::abort();
}

TokenType token_type_for(int64_t vocab_size) {
  constexpr int64_t kMegatronU16VocabularyMax = 65500;
  return vocab_size < kMegatronU16VocabularyMax ? TokenType::kU16 : TokenType::kI32;
}

// Arrays point into `index`.
struct IndexedDataset::Mapped {
  std::string prefix;
  MappedFile tokens;
  MappedFile index;
  TokenType type = TokenType::kU16;
  int64_t sequence_count = 0;
  int64_t document_count = 0;
  int64_t token_count = 0;
  Bytes lengths;    // i32[sequence_count]
  Bytes pointers;   // i64[sequence_count]
  Bytes documents;  // i64[document_count + 1]

  Status parse_header();
  Status check_sequences() const;
  Status check_documents() const;
};

Status IndexedDataset::Mapped::parse_header() {
  const std::string path = prefix + ".idx";
  const Bytes bytes = index.bytes();
  if (bytes.size() < kHeaderBytes) {
    return data_loss(fmt::format("{}: {} bytes, shorter than its header of {}", path, bytes.size(),
                                 kHeaderBytes));
  }
  ByteReader reader(bytes);
  PENSTOCK_TRY_ASSIGN(const Bytes magic, reader.get_bytes(kMagic.size()));
  if (as_text(magic) != kMagic) return data_loss(path + ": does not start with MMIDIDX");
  PENSTOCK_TRY_ASSIGN(const uint64_t version, reader.get<uint64_t>());
  if (version != kVersion) return data_loss(fmt::format("{}: version {}, not 1", path, version));
  PENSTOCK_TRY_ASSIGN(const uint8_t type_code, reader.get<uint8_t>());
  PENSTOCK_TRY_ASSIGN(type, token_type_of(type_code, path));
  PENSTOCK_TRY_ASSIGN(const uint64_t sequences, reader.get<uint64_t>());
  PENSTOCK_TRY_ASSIGN(const uint64_t document_indices, reader.get<uint64_t>());
  // Bounded by the file's size first, so that the products below cannot overflow.
  const uint64_t rest = bytes.size() - kHeaderBytes;
  constexpr uint64_t kBytesPerSequence = sizeof(int32_t) + sizeof(int64_t);
  const bool bounded =
      sequences <= rest / kBytesPerSequence && document_indices <= rest / sizeof(int64_t);
  const uint64_t needed =
      bounded ? sequences * kBytesPerSequence + document_indices * sizeof(int64_t) : 0;
  // Multimodal sets append one i8 per sequence; it does not matter for text.
  if (!bounded || (rest != needed && rest != needed + sequences)) {
    return data_loss(fmt::format("{}: {} bytes do not fit {} sequences and {} document indices",
                                 path, bytes.size(), sequences, document_indices));
  }
  if (document_indices == 0) return data_loss(path + ": no document indices");
  sequence_count = static_cast<int64_t>(sequences);
  document_count = static_cast<int64_t>(document_indices) - 1;
  lengths = bytes.subspan(kHeaderBytes, sequences * sizeof(int32_t));
  pointers = bytes.subspan(kHeaderBytes + lengths.size(), sequences * sizeof(int64_t));
  documents = bytes.subspan(kHeaderBytes + lengths.size() + pointers.size(),
                            document_indices * sizeof(int64_t));
  return {};
}

Status IndexedDataset::Mapped::check_sequences() const {
  const int64_t width = token_bytes(type);
  const int64_t file_bytes = static_cast<int64_t>(tokens.bytes().size());
  int64_t next = 0;
  for (int64_t i = 0; i < sequence_count; ++i) {
    const int32_t length = field<int32_t>(lengths, i);
    if (length < 0) {
      return data_loss(fmt::format("{}.idx: sequence {} has length {}", prefix, i, length));
    }
    if (const int64_t pointer = field<int64_t>(pointers, i); pointer != next) {
      return data_loss(
          fmt::format("{}.idx: sequence {} starts at byte {}, but the lengths before it "
                      "end at {}",
                      prefix, i, pointer, next));
    }
    next += length * width;  // at most 2^31 · 8 per sequence, and stopped when past the file
    if (next > file_bytes) break;
  }
  if (next != file_bytes) {
    return data_loss(fmt::format("{}.bin: {} bytes, but {}.idx describes {}{}", prefix, file_bytes,
                                 prefix, next > file_bytes ? "more: " : "", next));
  }
  return {};
}

Status IndexedDataset::Mapped::check_documents() const {
  int64_t previous = 0;
  for (int64_t i = 0; i <= document_count; ++i) {
    const int64_t at = field<int64_t>(documents, i);
    const bool first_is_zero = i != 0 || at == 0;
    const bool last_is_all = i != document_count || at == sequence_count;
    if (at < previous || at > sequence_count || !first_is_zero || !last_is_all) {
      return data_loss(
          fmt::format("{}.idx: document index {} is {}; they ascend from 0 to the {} "
                      "sequences",
                      prefix, i, at, sequence_count));
    }
    previous = at;
  }
  return {};
}

IndexedDataset::IndexedDataset(std::unique_ptr<Mapped> mapped) : mapped_(std::move(mapped)) {}
IndexedDataset::~IndexedDataset() = default;
IndexedDataset::IndexedDataset(IndexedDataset&&) noexcept = default;
IndexedDataset& IndexedDataset::operator=(IndexedDataset&&) noexcept = default;

Result<IndexedDataset> IndexedDataset::open(const std::string& prefix) {
  auto mapped = std::make_unique<Mapped>();
  mapped->prefix = prefix;
  PENSTOCK_TRY_ASSIGN(mapped->index, MappedFile::open(prefix + ".idx"));
  PENSTOCK_TRY_ASSIGN(mapped->tokens, MappedFile::open(prefix + ".bin"));
  PENSTOCK_TRY(mapped->parse_header());
  PENSTOCK_TRY(mapped->check_sequences());
  PENSTOCK_TRY(mapped->check_documents());
  mapped->token_count =
      static_cast<int64_t>(mapped->tokens.bytes().size()) / token_bytes(mapped->type);
  return IndexedDataset(std::move(mapped));
}

const std::string& IndexedDataset::prefix() const {
  return mapped_->prefix;
}
TokenType IndexedDataset::type() const {
  return mapped_->type;
}
int64_t IndexedDataset::sequence_count() const {
  return mapped_->sequence_count;
}
int64_t IndexedDataset::document_count() const {
  return mapped_->document_count;
}
int64_t IndexedDataset::token_count() const {
  return mapped_->token_count;
}

Digest IndexedDataset::digest() const {
  constexpr size_t kBlockBytes = 64 << 10;
  constexpr size_t kBlocks = 256;
  const Bytes tokens = mapped_->tokens.bytes();
  const uint64_t token_file_bytes = tokens.size();
  DigestStream digest;
  digest.update(mapped_->index.bytes());
  digest.update(std::as_bytes(std::span(&token_file_bytes, 1)));
  if (tokens.size() <= kBlocks * kBlockBytes) {
    digest.update(tokens);
    return digest.finish();
  }
  const size_t last = tokens.size() - kBlockBytes;
  for (size_t i = 0; i < kBlocks; ++i) {
    // In two parts, because their product could overflow.
    const size_t at = last / (kBlocks - 1) * i + last % (kBlocks - 1) * i / (kBlocks - 1);
    digest.update(tokens.subspan(at, kBlockBytes));
  }
  return digest.finish();
}

int64_t IndexedDataset::document_begin(int64_t document) const {
  PENSTOCK_CHECK(document >= 0 && document <= document_count(), document, document_count());
  const int64_t sequence = field<int64_t>(mapped_->documents, document);
  if (sequence == sequence_count()) return token_count();
  return field<int64_t>(mapped_->pointers, sequence) / token_bytes(type());
}

Status IndexedDataset::read(int64_t first, std::span<int32_t> into, int64_t vocab_size) const {
  PENSTOCK_CHECK(first >= 0 && static_cast<int64_t>(into.size()) <= token_count() - first, first,
                 into.size(), token_count());
  const int64_t limit = std::min<int64_t>(vocab_size, std::numeric_limits<int32_t>::max());
  for (size_t i = 0; i < into.size(); ++i) {
    const int64_t token = token_at(type(), mapped_->tokens.bytes(), first + i);
    if (token < 0 || token >= limit) {
      return data_loss(fmt::format("{}.bin: token {} at position {} is not in the vocabulary of {}",
                                   prefix(), token, first + i, vocab_size));
    }
    into[i] = static_cast<int32_t>(token);
  }
  return {};
}

Status IndexedDataset::verify_tokens(int64_t vocab_size) const {
  constexpr int64_t kTokensAtOnce = 1 << 16;
  std::vector<int32_t> tokens(std::min(kTokensAtOnce, token_count()));
  for (int64_t at = 0; at < token_count(); at += kTokensAtOnce) {
    const int64_t count = std::min(kTokensAtOnce, token_count() - at);
    PENSTOCK_TRY(read(at, std::span(tokens).first(count), vocab_size));
  }
  return {};
}

}  // namespace penstock
