#include "tests/gpu/emulation/emulator.h"

#include <ucontext.h>

#include <cstdio>
#include <cstdlib>
#include <memory>
#include <vector>

namespace penstock::emulation {
namespace {

constexpr size_t kStackBytes = 128 * 1024;
constexpr size_t kSharedBytes = 227 * 1024;  // of a block on Hopper
constexpr int kWarp = 32;

struct Barrier {
  int size = 0;
  int arrived = 0;
  uint64_t generation = 0;
};
struct Fiber {
  ucontext_t context;
  Thread thread;
  bool done = false;
  const Barrier* waits = nullptr;
  uint64_t generation = 0;  // of it, when this fiber came
  uint64_t offered = 0;     // to the other lanes
};

alignas(1024) unsigned char shared[kSharedBytes];
std::vector<std::unique_ptr<char[]>> stacks;
std::vector<Fiber> fibers;
std::vector<Barrier> warps;
Barrier block;
Fiber* running = nullptr;
ucontext_t scheduler;
const std::function<void()>* body = nullptr;

void open(Barrier& barrier) {
  barrier.arrived = 0;
  ++barrier.generation;
}

void wait_at(Barrier& barrier) {
  if (++barrier.arrived == barrier.size) return open(barrier);
  running->waits = &barrier;
  running->generation = barrier.generation;
  swapcontext(&running->context, &scheduler);
}

// A thread that has returned is waited for no more by its block; a warp waits for it in vain, as
// lanes that are named in a shuffle must come to it.
void enter() {
  (*body)();
  running->done = true;
  if (--block.size > 0 && block.arrived == block.size) open(block);
  swapcontext(&running->context, &scheduler);
}

void prepare(dim3 size, dim3 at) {
  const int count = static_cast<int>(size.x * size.y * size.z);
  while (std::ssize(stacks) < count) stacks.push_back(std::make_unique<char[]>(kStackBytes));
  fibers = std::vector<Fiber>(static_cast<size_t>(count));
  warps = std::vector<Barrier>(static_cast<size_t>((count + kWarp - 1) / kWarp));
  block = {count, 0, 0};
  for (int i = 0; i < count; ++i) {
    Fiber& fiber = fibers[i];
    const auto number = static_cast<unsigned>(i);
    const dim3 thread(number % size.x, number / size.x % size.y, number / size.x / size.y);
    fiber.thread = {thread, at, i};
    ++warps[i / kWarp].size;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = stacks[i].get();
    fiber.context.uc_stack.ss_size = kStackBytes;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, enter, 0);
  }
}

void run_block() {
  for (int64_t left = std::ssize(fibers); left > 0;) {
    bool moved = false;
    for (Fiber& fiber : fibers) {
      const bool waits = fiber.waits != nullptr && fiber.waits->generation == fiber.generation;
      if (fiber.done || waits) continue;
      fiber.waits = nullptr;
      running = &fiber;
      swapcontext(&scheduler, &fiber.context);
      moved = true;
      left -= fiber.done;
    }
    if (moved) continue;
    std::fputs("emulation: threads wait for others of their warp that have returned\n", stderr);
    std::abort();
  }
}

}  // namespace

const Thread& current() {
  return running->thread;
}
void sync_block() {
  wait_at(block);
}
void sync_warp() {
  wait_at(warps[running->thread.number / kWarp]);
}
unsigned char* shared_memory() {
  return shared;
}

uint64_t exchange(uint64_t value, int from) {
  const int first = running->thread.number / kWarp * kWarp;
  running->offered = value;
  sync_warp();
  const uint64_t got = fibers[first + from].offered;
  sync_warp();
  return got;
}

void run(dim3 grid, dim3 size, const std::function<void()>& thread) {
  body = &thread;
  for (unsigned z = 0; z < grid.z; ++z) {
    for (unsigned y = 0; y < grid.y; ++y) {
      for (unsigned x = 0; x < grid.x; ++x) {
        prepare(size, dim3(x, y, z));
        run_block();
      }
    }
  }
}

}  // namespace penstock::emulation
