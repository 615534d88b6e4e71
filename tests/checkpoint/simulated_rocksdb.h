// RocksDB on a simulated disk: all its changes are calls of that disk, which may fail, tear or
// forget them. Its information log and its lock file are left out: nothing depends on them.
#pragma once

#include <memory>

#include "tests/checkpoint/simulated_disk.h"

namespace rocksdb {
class Env;
}

namespace penstock::checkpoint_test {

// Borrows the disk, which from now on waits for RocksDB's background work before each change made
// by the store. The databases opened with it must be closed before it goes.
std::shared_ptr<rocksdb::Env> simulated_env(SimulatedDisk& disk);

}  // namespace penstock::checkpoint_test
