#include "checkpoint/index_witness.h"

#include <fmt/format.h>

#include <charconv>
#include <optional>

#include "checkpoint/uuid.h"
#include "comm/base/check.h"
#include "comm/base/log.h"

namespace penstock {
namespace {

constexpr size_t kCountDigits = 20;
constexpr size_t kDigestDigits = 32;

std::string name_prefix(const Path& index) {
  return index.filename().string() + ".head-";
}

// Nothing for the name of any other file.
std::optional<ChainHead> parse_name(const Path& index, std::string_view name) {
  const std::string prefix = name_prefix(index);
  if (!name.starts_with(prefix)) return std::nullopt;
  name.remove_prefix(prefix.size());
  if (name.size() != kCountDigits + 1 + kDigestDigits || name[kCountDigits] != '-') {
    return std::nullopt;
  }
  ChainHead head;
  const auto [end, error] = std::from_chars(name.data(), name.data() + kCountDigits, head.count);
  const Result<Uuid> digest = parse_uuid(name.substr(kCountDigits + 1));  // the same 128 bits
  if (error != std::errc() || end != name.data() + kCountDigits || !digest.ok()) {
    return std::nullopt;
  }
  head.digest = {digest->low, digest->high};
  return head;
}

}  // namespace

ChainHead next_head(const ChainHead& head, Bytes change) {
  ByteWriter link;
  link.put(head.count);
  link.put(head.digest.low);
  link.put(head.digest.high);
  link.put_bytes(change);
  return {head.count + 1, digest_of(link.data())};
}

Result<ChainHead> read_witness(const Path& index) {
  PENSTOCK_CHECK(index.is_absolute(), index.string());
  PENSTOCK_TRY_ASSIGN(const std::vector<std::string> names, file_names(index.parent_path()));
  ChainHead newest;
  for (const std::string& name : names) {
    const std::optional<ChainHead> head = parse_name(index, name);
    if (head && head->count > newest.count) newest = *head;
  }
  return newest;
}

Status write_witness(const Path& index, const ChainHead& head, FileSystem& files) {
  const Path folder = index.parent_path();
  const std::string name =
      fmt::format("{}{:020}-{}", name_prefix(index), head.count, to_hex(head.digest));
  const Status made = write_new_file(files, folder / name, {});
  if (made.code() != Code::kAlreadyExists) PENSTOCK_TRY(made);
  PENSTOCK_TRY(files.sync_directory(folder));
  PENSTOCK_TRY_ASSIGN(const std::vector<std::string> names, file_names(folder));
  for (const std::string& other : names) {
    if (other == name || !parse_name(index, other)) continue;
    if (const Status removed = files.remove(folder / other); !removed.ok()) {
      log_warning("{}", removed.message());
    }
  }
  return {};
}

}  // namespace penstock
