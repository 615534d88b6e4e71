#include <fcntl.h>
#include <unistd.h>

#include <cerrno>
#include <limits>

#include "comm/base/file.h"
#include "worker/data/indexed_dataset.h"

namespace penstock {

namespace {

constexpr size_t kBufferBytes = 1 << 20;

bool fits(TokenType type, int32_t token) {
  switch (type) {
    case TokenType::kU8:
      return token >= 0 && token <= std::numeric_limits<uint8_t>::max();
    case TokenType::kU16:
      return token >= 0 && token <= std::numeric_limits<uint16_t>::max();
    case TokenType::kI8:
      return token >= 0 && token <= std::numeric_limits<int8_t>::max();
    case TokenType::kI16:
      return token >= 0 && token <= std::numeric_limits<int16_t>::max();
    case TokenType::kI32:
    case TokenType::kI64:
      return token >= 0;
  }
  std::abort();
}

}  // namespace

struct IndexedDatasetWriter::State {
  std::string prefix;
  TokenType type = TokenType::kU16;
  FileDescriptor tokens;
  uint64_t flushed_bytes = 0;
  std::vector<std::byte> buffer;
  std::vector<int32_t> lengths;
  bool finished = false;

  Path token_path() const { return prefix + ".bin.tmp"; }
  Path index_path() const { return prefix + ".idx.tmp"; }

  Status flush() {
    PENSTOCK_TRY(write_at(tokens.get(), token_path(), flushed_bytes, buffer));
    flushed_bytes += buffer.size();
    buffer.clear();
    return {};
  }
  Status write_index() const;
  Status put_in_place() const;
};

IndexedDatasetWriter::IndexedDatasetWriter(std::unique_ptr<State> state)
    : state_(std::move(state)) {}
IndexedDatasetWriter::IndexedDatasetWriter(IndexedDatasetWriter&&) noexcept = default;
IndexedDatasetWriter& IndexedDatasetWriter::operator=(IndexedDatasetWriter&&) noexcept = default;

IndexedDatasetWriter::~IndexedDatasetWriter() {
  if (!state_ || state_->finished) return;
  ::unlink(state_->token_path().c_str());
  ::unlink(state_->index_path().c_str());
}

Result<IndexedDatasetWriter> IndexedDatasetWriter::create(const std::string& prefix,
                                                          TokenType type) {
  auto state = std::make_unique<State>();
  state->prefix = prefix;
  state->type = type;
  PENSTOCK_TRY(create_directories_durably(Path(prefix).parent_path()));
  PENSTOCK_TRY_ASSIGN(state->tokens, open_file(state->token_path(), O_WRONLY | O_CREAT | O_TRUNC));
  state->buffer.reserve(kBufferBytes);
  return IndexedDatasetWriter(std::move(state));
}

Status IndexedDatasetWriter::add_document(std::span<const int32_t> tokens) {
  if (tokens.empty()) return invalid_argument("a document without tokens");
  if (tokens.size() > std::numeric_limits<int32_t>::max()) {
    return invalid_argument(
        fmt::format("a document of {} tokens; the format ends at 2^31 - 1", tokens.size()));
  }
  const size_t width = token_bytes(state_->type);
  for (const int32_t token : tokens) {
    if (!fits(state_->type, token)) {
      return invalid_argument(
          fmt::format("token {} does not fit {}", token, token_type_name(state_->type)));
    }
  }
  for (const int32_t token : tokens) {
    const int64_t wide = token;  // little-endian: the low bytes are the narrower value
    const auto* bytes = reinterpret_cast<const std::byte*>(&wide);
    state_->buffer.insert(state_->buffer.end(), bytes, bytes + width);
    if (state_->buffer.size() >= kBufferBytes) PENSTOCK_TRY(state_->flush());
  }
  state_->lengths.push_back(static_cast<int32_t>(tokens.size()));
  return {};
}

Status IndexedDatasetWriter::State::write_index() const {
  ByteWriter index;
  index.put_bytes(as_bytes(std::string_view("MMIDIDX\0\0", 9)));
  index.put(uint64_t{1});
  index.put(static_cast<uint8_t>(type));
  index.put(static_cast<uint64_t>(lengths.size()));
  index.put(static_cast<uint64_t>(lengths.size() + 1));
  for (const int32_t length : lengths) index.put(length);
  int64_t pointer = 0;
  for (const int32_t length : lengths) {
    index.put(pointer);
    pointer += length * token_bytes(type);
  }
  for (size_t i = 0; i <= lengths.size(); ++i) index.put(static_cast<int64_t>(i));
  return write_and_sync(index_path(), index.data());
}

Status IndexedDatasetWriter::State::put_in_place() const {
  const Path directory = Path(prefix).parent_path();
  const Path index = prefix + ".idx";
  const Path token_file = prefix + ".bin";
  // Without its index a data set does not exist, so none does while the two files change.
  if (::unlink(index.c_str()) != 0 && errno != ENOENT) {
    return errno_status(errno, "remove " + index.string());
  }
  PENSTOCK_TRY(sync_directory(directory));
  if (::rename(token_path().c_str(), token_file.c_str()) != 0) {
    return errno_status(errno, "rename to " + token_file.string());
  }
  if (::rename(index_path().c_str(), index.c_str()) != 0) {
    return errno_status(errno, "rename to " + index.string());
  }
  return sync_directory(directory);
}

Status IndexedDatasetWriter::finish() {
  if (state_->lengths.empty()) return failed_precondition(state_->prefix + ": no documents");
  PENSTOCK_TRY(state_->flush());
  if (::fdatasync(state_->tokens.get()) != 0) {
    return errno_status(errno, "fdatasync " + state_->token_path().string());
  }
  PENSTOCK_TRY(state_->tokens.close(state_->token_path()));
  PENSTOCK_TRY(state_->write_index());
  PENSTOCK_TRY(state_->put_in_place());
  state_->finished = true;
  return {};
}

}  // namespace penstock
