#include "comm/data/ucx_address.h"

#include <fmt/format.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>
#include <charconv>

#include "comm/base/bytes.h"
#include "comm/base/hash.h"

namespace penstock {
namespace {

constexpr uint32_t kMagic = 0x58555350;  // "PSUX"
constexpr uint64_t kProcFileBytesMax = 4096;

// Field 22 of /proc/<pid>/stat; counted from behind the last ')', because a command name may hold
// anything.
Result<uint64_t> start_ticks_of(int32_t pid) {
  PENSTOCK_TRY_ASSIGN(const std::string stat,
                      read_file(fmt::format("/proc/{}/stat", pid), kProcFileBytesMax));
  constexpr int kFieldsBetween = 20;  // from the state, field 3, to field 22
  size_t at = stat.rfind(')');
  for (int i = 0; i < kFieldsBetween && at != std::string::npos; ++i) at = stat.find(' ', at + 1);
  uint64_t ticks = 0;
  if (at == std::string::npos ||
      std::from_chars(stat.data() + at + 1, stat.data() + stat.size(), ticks).ec != std::errc()) {
    return internal_error(fmt::format("/proc/{}/stat has no start time", pid));
  }
  return ticks;
}

Result<uint64_t> host_digest() {
  PENSTOCK_TRY_ASSIGN(std::string name,
                      read_file("/proc/sys/kernel/random/boot_id", kProcFileBytesMax));
  char link[64];
  const ssize_t size = readlink("/proc/self/ns/pid", link, sizeof(link));
  if (size < 0) return errno_status(errno, "readlink /proc/self/ns/pid");
  name.append(link, static_cast<size_t>(size));
  return digest_of(as_bytes(name)).low;
}

int hex_value(char digit) {
  if (digit >= '0' && digit <= '9') return digit - '0';
  if (digit >= 'a' && digit <= 'f') return digit - 'a' + 10;
  return -1;
}

Result<std::string> from_hex(std::string_view text) {
  if (text.size() % 2 != 0) return invalid_argument("odd number of digits");
  std::string bytes(text.size() / 2, '\0');
  for (size_t i = 0; i < bytes.size(); ++i) {
    const int high = hex_value(text[2 * i]);
    const int low = hex_value(text[2 * i + 1]);
    if (high < 0 || low < 0) return invalid_argument("not hexadecimal");
    bytes[i] = static_cast<char>(high << 4 | low);
  }
  return bytes;
}

Result<UcxAddress> decode_fields(Bytes bytes) {
  if (bytes.size() < sizeof(uint32_t)) return invalid_argument("too short");
  const Bytes covered = bytes.first(bytes.size() - sizeof(uint32_t));
  uint32_t crc = 0;
  std::memcpy(&crc, covered.data() + covered.size(), sizeof(crc));
  if (crc != crc32c(covered)) return invalid_argument("its checksum does not match");

  ByteReader reader(covered);
  UcxAddress address;
  PENSTOCK_TRY_ASSIGN(const uint32_t magic, reader.get<uint32_t>());
  if (magic != kMagic) return invalid_argument("of another kind of transport");
  PENSTOCK_TRY_ASSIGN(address.rank.value, reader.get<int32_t>());
  PENSTOCK_TRY_ASSIGN(address.epoch.value, reader.get<uint32_t>());
  PENSTOCK_TRY_ASSIGN(address.process.host, reader.get<uint64_t>());
  PENSTOCK_TRY_ASSIGN(address.process.pid, reader.get<int32_t>());
  PENSTOCK_TRY_ASSIGN(address.process.start_ticks, reader.get<uint64_t>());
  PENSTOCK_TRY_ASSIGN(address.worker, reader.get_string(kUcxWorkerAddressBytesMax));
  if (address.worker.empty()) return invalid_argument("without a worker address");
  if (reader.remaining() != 0) return invalid_argument("with bytes after its end");
  if (address.process.pid <= 0) return invalid_argument("without a process");
  return address;
}

}  // namespace

Result<ProcessIdentity> own_process_identity() {
  ProcessIdentity identity;
  identity.pid = getpid();
  PENSTOCK_TRY_ASSIGN(identity.host, host_digest());
  PENSTOCK_TRY_ASSIGN(identity.start_ticks, start_ticks_of(identity.pid));
  return identity;
}

Result<FileDescriptor> watch_process(const ProcessIdentity& process) {
  PENSTOCK_TRY_ASSIGN(const uint64_t own_host, host_digest());
  if (process.host != own_host) return FileDescriptor();
  const auto gone = [&] { return unavailable(fmt::format("process {} has ended", process.pid)); };
  FileDescriptor watch(static_cast<int>(syscall(SYS_pidfd_open, process.pid, 0)));
  if (!watch.valid()) {
    if (errno == ESRCH) return gone();
    return errno_status(errno, fmt::format("pidfd_open {}", process.pid));
  }
  // Only now: the descriptor pins the process it found, so a start time read later is that
  // process's own, or missing because it has ended.
  const Result<uint64_t> start_ticks = start_ticks_of(process.pid);
  if (!start_ticks.ok() || *start_ticks != process.start_ticks) return gone();
  return watch;
}

std::string encode_ucx_address(const UcxAddress& address) {
  ByteWriter writer;
  writer.put(kMagic);
  writer.put(address.rank.value);
  writer.put(address.epoch.value);
  writer.put(address.process.host);
  writer.put(address.process.pid);
  writer.put(address.process.start_ticks);
  writer.put_string(address.worker);
  writer.put(crc32c(writer.data()));
  std::string text;
  for (const std::byte byte : writer.data())
    text += fmt::format("{:02x}", static_cast<unsigned>(byte));
  return text;
}

Result<UcxAddress> decode_ucx_address(std::string_view text) {
  Result<std::string> bytes = from_hex(text);
  Result<UcxAddress> address =
      bytes.ok() ? decode_fields(as_bytes(*bytes)) : Result<UcxAddress>(bytes.status());
  if (address.ok()) return address;
  return invalid_argument(fmt::format(
      "data-plane address of {} characters is not valid: {}; every rank's address must be "
      "passed on unchanged",
      text.size(), address.status().message()));
}

}  // namespace penstock
