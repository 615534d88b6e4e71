#include "worker/rank/host_check.h"

#include <arpa/inet.h>
#include <fcntl.h>
#include <fmt/format.h>
#include <netinet/in.h>
#include <pthread.h>
#include <sched.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/timex.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <fstream>
#include <memory>
#include <thread>

#include "comm/base/clock.h"
#include "comm/base/hash.h"
#include "comm/base/random.h"
#include "kernels/kernels.h"
#include "worker/model/linear.h"

namespace penstock {
namespace {

constexpr uint64_t kMiB = 1 << 20;
constexpr uint64_t kSeed = 0x9e3779b97f4a7c15;
constexpr int64_t kProductSize = 192;  // m = n = k: the three matrices fit a second-level cache
constexpr double kProductError = 1e-5;

// Of what was moved since `begin_ns`.
std::string rate(uint64_t byte_count, int64_t begin_ns) {
  const double seconds = to_seconds(Duration(monotonic_ns() - begin_ns + 1));
  return fmt::format("{:.2f} GiB/s", static_cast<double>(byte_count) / seconds / (1 << 30));
}

// Different in each word, so that a word at the wrong address shows as well.
uint64_t pattern_at(size_t word, size_t pattern) {
  const uint64_t value = (word + 1) * kSeed;
  return pattern == 0 ? value : ~value;
}

std::vector<std::byte> random_bytes(uint64_t byte_count) {
  std::vector<std::byte> bytes(byte_count);
  const std::span<uint64_t> words(reinterpret_cast<uint64_t*>(bytes.data()), byte_count / 8);
  for (size_t i = 0; i < words.size(); ++i) words[i] = pattern_at(i, 0);
  return bytes;
}

uint64_t free_memory_bytes() {
  std::ifstream file("/proc/meminfo");
  std::string word;
  while (file >> word) {
    uint64_t kib = 0;
    if (word == "MemAvailable:" && file >> kib) return kib << 10;
  }
  return 0;
}

std::vector<int> usable_processors() {
  cpu_set_t usable;
  std::vector<int> processors;
  if (sched_getaffinity(0, sizeof usable, &usable) != 0) return {0};
  for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
    if (CPU_ISSET(cpu, &usable)) processors.push_back(cpu);
  }
  return processors;
}

void run_on(int processor) {
  cpu_set_t one;
  CPU_ZERO(&one);
  CPU_SET(processor, &one);
  // Where that is not allowed the scheduler chooses, and the check is of what it chose.
  (void)pthread_setaffinity_np(pthread_self(), sizeof one, &one);
}

struct Product {
  static constexpr size_t kElements = kProductSize * kProductSize;
  std::vector<float> a, b;
  std::vector<double> right;  // in fp64

  Product() : a(kElements), b(kElements), right(kElements) {
    Random random(kSeed, 0);
    for (float& value : a) value = static_cast<float>(random.uniform() - 0.5);
    for (float& value : b) value = static_cast<float>(random.uniform() - 0.5);
    for (int64_t i = 0; i < kProductSize; ++i) {
      for (int64_t k = 0; k < kProductSize; ++k) {
        for (int64_t j = 0; j < kProductSize; ++j) {
          right[at(i, j)] += static_cast<double>(a[at(i, k)]) * b[at(k, j)];
        }
      }
    }
  }
  static size_t at(int64_t row, int64_t column) {
    return static_cast<size_t>(row * kProductSize + column);
  }
  double error_of(const std::vector<float>& c) const {
    double difference = 0.0;
    double norm = 0.0;
    for (size_t i = 0; i < kElements; ++i) {
      difference += (c[i] - right[i]) * (c[i] - right[i]);
      norm += right[i] * right[i];
    }
    return std::sqrt(difference / norm);
  }
};

// What one processor made of it.
struct Computed {
  int processor = 0;
  Digest first = {};
  double error = 0.0;
  int64_t count = 0;
  int64_t differing = 0;  // of those after the first

  void repeat(const Product& product, const Multiply& multiply, int64_t until_ns) {
    std::vector<float> c(Product::kElements);
    do {
      multiply(kProductSize, product.a.data(), product.b.data(), c.data());
      const Digest digest = digest_of(std::as_bytes(std::span(c)));
      if (count++ == 0) {
        first = digest;
        error = product.error_of(c);
      } else if (digest != first) {
        ++differing;
      }
    } while (monotonic_ns() < until_ns);
  }
};

HostCheck failed(const std::string& name, const std::string& problem) {
  return {name, "", problem};
}

// Both ends of a connection over 127.0.0.1.
Result<std::array<FileDescriptor, 2>> connect_to_self() {
  const FileDescriptor listener(::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0));
  if (!listener.valid()) return errno_status(errno, "socket");
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  socklen_t size = sizeof address;
  auto* const any = reinterpret_cast<sockaddr*>(&address);
  if (::bind(listener.get(), any, size) != 0 || ::listen(listener.get(), 1) != 0 ||
      ::getsockname(listener.get(), any, &size) != 0) {
    return errno_status(errno, "listen on 127.0.0.1");
  }
  std::array<FileDescriptor, 2> ends;
  ends[0] = FileDescriptor(::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0));
  if (!ends[0].valid() || ::connect(ends[0].get(), any, size) != 0) {
    return errno_status(errno, "connect to 127.0.0.1");
  }
  ends[1] = FileDescriptor(::accept4(listener.get(), nullptr, nullptr, SOCK_CLOEXEC));
  if (!ends[1].valid()) return errno_status(errno, "accept on 127.0.0.1");
  return ends;
}

}  // namespace

HostCheck check_memory(MutableBytes memory, const std::function<void(size_t pattern)>& between) {
  const int64_t begin = monotonic_ns();
  const std::span<uint64_t> words(reinterpret_cast<uint64_t*>(memory.data()), memory.size() / 8);
  for (size_t pattern = 0; pattern < 2; ++pattern) {
    for (size_t i = 0; i < words.size(); ++i) words[i] = pattern_at(i, pattern);
    if (between) between(pattern);
    for (size_t i = 0; i < words.size(); ++i) {
      const uint64_t changed = words[i] ^ pattern_at(i, pattern);
      if (changed == 0) continue;
      return failed("memory", fmt::format("a word held {:#018x} after {:#018x} was written to it: "
                                          "this host's memory changes bits; replace it",
                                          words[i], pattern_at(i, pattern)));
    }
  }
  return {"memory",
          fmt::format("{} MiB kept what was written, {}", memory.size() / kMiB,
                      rate(4 * memory.size(), begin)),
          ""};
}

Multiply multiply_by_kernels() {
  return [kernels = std::shared_ptr<Kernels>(make_kernels(Precision::kFp32))](
             int64_t size, const float* a, const float* b, float* c) {
    kernels->matmul(size, size, size, {a, size}, Transpose::kNo, {b, size}, Transpose::kNo,
                    Store::kOverwrite, {c, size});
  };
}

HostCheck check_processors(const std::function<Multiply(int processor)>& multiply_on,
                           Duration span) {
  const Product product;
  std::vector<Computed> all;
  for (const int processor : usable_processors()) all.push_back({.processor = processor});
  const int64_t until = monotonic_ns() + span.count();
  std::vector<std::thread> threads;
  for (Computed& one : all) {
    threads.emplace_back([&] {
      run_on(one.processor);
      one.repeat(product, multiply_on(one.processor), until);
    });
    if (span == Duration::zero()) threads.back().join();  // one after the other
  }
  for (std::thread& thread : threads) {
    if (thread.joinable()) thread.join();
  }
  int64_t count = 0;
  for (const Computed& one : all) {
    const std::string where = fmt::format("processor {}", one.processor);
    count += one.count;
    if (!(one.error <= kProductError)) {
      return failed("processors", fmt::format("{} computes a matrix product with an error of "
                                              "{:.1e}: it computes wrongly; take it offline",
                                              where, one.error));
    }
    if (one.differing > 0 || one.first != all.front().first) {
      return failed("processors", fmt::format("{} computes other bits than before or than "
                                              "processor {}: one of them computes wrongly; take "
                                              "it offline",
                                              where, all.front().processor));
    }
  }
  return {"processors",
          fmt::format("all {} computed the same bits, {} matrix products", all.size(), count), ""};
}

HostCheck check_disk(const Path& directory, uint64_t byte_count) {
  const Path path = directory / fmt::format("host_check.{}.tmp", ::getpid());
  const std::vector<std::byte> written = random_bytes(byte_count);
  const int64_t begin = monotonic_ns();
  std::vector<std::byte> read(byte_count);
  const auto move = [&]() -> Status {
    PENSTOCK_TRY_ASSIGN(const FileDescriptor file,
                        open_file(path, O_RDWR | O_CREAT | O_TRUNC, 0600));
    PENSTOCK_TRY(write_at(file.get(), path, 0, written));
    if (::fdatasync(file.get()) != 0) return errno_status(errno, "fdatasync " + path.string());
    ::posix_fadvise(file.get(), 0, 0, POSIX_FADV_DONTNEED);
    return read_at(file.get(), path, 0, read);
  };
  const Status moved = move();
  std::error_code ignored;
  std::filesystem::remove(path, ignored);
  if (!moved.ok()) return failed("disk", moved.message());
  if (read != written) {
    return failed("disk",
                  fmt::format("{} reads other bytes than were written: replace the disk, or "
                              "give another --state-dir",
                              path.string()));
  }
  return {"disk",
          fmt::format("{} MiB in {} read as written, {}", byte_count / kMiB, directory.string(),
                      rate(2 * byte_count, begin)),
          ""};
}

HostCheck check_loopback(uint64_t byte_count) {
  const auto ends = connect_to_self();
  if (!ends.ok()) return failed("loopback", ends.status().message());
  const std::vector<std::byte> sent = random_bytes(byte_count);
  const int64_t begin = monotonic_ns();
  std::thread sender([&] {
    for (size_t done = 0; done < sent.size();) {
      const ssize_t moved =
          ::send((*ends)[0].get(), sent.data() + done, sent.size() - done, MSG_NOSIGNAL);
      if (moved <= 0) break;  // the receiver then finds too little
      done += static_cast<size_t>(moved);
    }
    ::shutdown((*ends)[0].get(), SHUT_WR);
  });
  std::vector<std::byte> received(byte_count);
  const ssize_t moved = ::recv((*ends)[1].get(), received.data(), byte_count, MSG_WAITALL);
  sender.join();
  if (moved < 0 || static_cast<uint64_t>(moved) != byte_count || received != sent) {
    return failed("loopback", fmt::format("of {} bytes sent over 127.0.0.1, {} arrived{}",
                                          byte_count, moved, moved < 0 ? "" : ", some changed"));
  }
  return {"loopback",
          fmt::format("{} MiB arrived as sent, {}", byte_count / kMiB, rate(byte_count, begin)),
          ""};
}

HostCheck check_clock() {
  timex clock{};
  const bool synchronised = ::adjtimex(&clock) != TIME_ERROR && (clock.status & STA_UNSYNC) == 0;
  return {"clock",
          synchronised ? fmt::format("synchronised, error at most {:.1f} ms",
                                     static_cast<double>(clock.maxerror) / 1e3)
                       : "not synchronised: times in logs of different hosts may disagree",
          ""};
}

std::vector<HostCheck> check_host(CheckEffort effort, const Path& directory) {
  const bool quick = effort == CheckEffort::kQuick;
  std::vector<HostCheck> checks;
  const uint64_t memory_bytes = quick ? 32 * kMiB : free_memory_bytes() / 2 / kMiB * kMiB;
  void* const memory = ::mmap(nullptr, memory_bytes, PROT_READ | PROT_WRITE,
                              MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) {
    checks.push_back(failed("memory", errno_status(errno, "mmap").message()));
  } else {
    checks.push_back(check_memory({static_cast<std::byte*>(memory), memory_bytes}, {}));
    ::munmap(memory, memory_bytes);
  }
  checks.push_back(check_processors([](int) { return multiply_by_kernels(); },
                                    quick ? Duration::zero() : std::chrono::seconds(30)));
  checks.push_back(check_disk(directory, quick ? kMiB : 1024 * kMiB));
  checks.push_back(check_loopback(quick ? 4 * kMiB : 1024 * kMiB));
  checks.push_back(check_clock());
  return checks;
}

}  // namespace penstock
