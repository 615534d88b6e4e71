// Byte ranges, and reading and writing little-endian fields of a file format with every access
// checked.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>
#include <string>
#include <string_view>
#include <type_traits>
#include <vector>

#include "comm/base/status.h"

namespace penstock {

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "file formats here are little-endian");

using Bytes = std::span<const std::byte>;
using MutableBytes = std::span<std::byte>;

inline Bytes as_bytes(std::string_view text) {
  return {reinterpret_cast<const std::byte*>(text.data()), text.size()};
}
inline std::string_view as_text(Bytes bytes) {
  return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
}

// Appends fields to an owned buffer.
class ByteWriter {
 public:
  template <typename T>
  requires std::is_trivially_copyable_v<T>
  void put(const T& value) { put_bytes({reinterpret_cast<const std::byte*>(&value), sizeof(T)}); }
  void put_bytes(Bytes bytes) { data_.insert(data_.end(), bytes.begin(), bytes.end()); }
  // u32 length, then the bytes.
  void put_string(std::string_view text) {
    put(static_cast<uint32_t>(text.size()));
    put_bytes(as_bytes(text));
  }
  const std::vector<std::byte>& data() const { return data_; }
  std::vector<std::byte> take() { return std::move(data_); }

 private:
  std::vector<std::byte> data_;
};

// Takes fields from a borrowed range. Every read past the end is kDataLoss, never undefined
// behaviour.
class ByteReader {
 public:
  explicit ByteReader(Bytes bytes) : rest_(bytes) {}

  template <typename T>
  requires std::is_trivially_copyable_v<T> Result<T> get() {
    if (rest_.size() < sizeof(T)) return data_loss("truncated field");
    T value;
    std::memcpy(&value, rest_.data(), sizeof(T));
    rest_ = rest_.subspan(sizeof(T));
    return value;
  }
  Result<Bytes> get_bytes(size_t count) {
    if (rest_.size() < count) return data_loss("truncated field");
    const Bytes taken = rest_.first(count);
    rest_ = rest_.subspan(count);
    return taken;
  }
  Result<std::string> get_string(size_t bytes_max) {
    PENSTOCK_TRY_ASSIGN(const uint32_t size, get<uint32_t>());
    if (size > bytes_max) return data_loss("string field longer than its bound");
    PENSTOCK_TRY_ASSIGN(const Bytes bytes, get_bytes(size));
    return std::string(as_text(bytes));
  }
  size_t remaining() const { return rest_.size(); }

 private:
  Bytes rest_;
};

}  // namespace penstock
