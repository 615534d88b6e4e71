#include "tests/checkpoint/simulated_rocksdb.h"

#include <rocksdb/env.h>
#include <rocksdb/file_system.h>

#include <condition_variable>

namespace penstock::checkpoint_test {
namespace {

using rocksdb::IODebugContext;
using rocksdb::IOOptions;
using rocksdb::IOStatus;

IOStatus to_rocksdb(const Status& status) {
  if (status.ok()) return IOStatus::OK();
  if (status.code() == Code::kResourceExhausted) return IOStatus::NoSpace(status.message());
  if (status.code() == Code::kNotFound) return IOStatus::PathNotFound(status.message());
  return IOStatus::IOError(status.message());
}

bool is_simulated(const Path& path) {
  return !path.filename().string().starts_with("LO");  // LOG, LOG.old.…, LOCK
}

class SimulatedFile : public rocksdb::FSWritableFileOwnerWrapper {
 public:
  SimulatedFile(SimulatedDisk& disk, Path path, uint64_t size,
                std::unique_ptr<rocksdb::FSWritableFile> file)
      : FSWritableFileOwnerWrapper(std::move(file)),
        disk_(disk),
        path_(std::move(path)),
        size_(size) {}

  IOStatus Append(const rocksdb::Slice& data, const IOOptions& options,
                  IODebugContext* context) override {
    const Status failed = disk_.rocksdb_write(path_, size_);
    if (failed.ok()) {
      size_ += data.size();
      return FSWritableFileOwnerWrapper::Append(data, options, context);
    }
    if (disk_.tears_writes() && !torn_) {  // the write that the crash interrupts
      torn_ = true;
      FSWritableFileOwnerWrapper::Append(rocksdb::Slice(data.data(), data.size() / 2), options,
                                         context)
          .PermitUncheckedError();
    }
    return to_rocksdb(failed);
  }
  IOStatus Append(const rocksdb::Slice& data, const IOOptions& options,
                  const rocksdb::DataVerificationInfo&, IODebugContext* context) override {
    return Append(data, options, context);
  }
  IOStatus Sync(const IOOptions&, IODebugContext*) override {
    return to_rocksdb(disk_.rocksdb_sync(path_, size_));
  }
  IOStatus Fsync(const IOOptions& options, IODebugContext* context) override {
    return Sync(options, context);
  }

 private:
  SimulatedDisk& disk_;
  const Path path_;
  uint64_t size_;
  bool torn_ = false;
};

class SimulatedDirectory : public rocksdb::FSDirectoryWrapper {
 public:
  SimulatedDirectory(SimulatedDisk& disk, Path path, std::unique_ptr<rocksdb::FSDirectory> inner)
      : FSDirectoryWrapper(std::move(inner)), disk_(disk), path_(std::move(path)) {}
  IOStatus Fsync(const IOOptions&, IODebugContext*) override {
    return to_rocksdb(disk_.rocksdb_sync_directory(path_));
  }
  IOStatus FsyncWithDirOptions(const IOOptions& options, IODebugContext* context,
                               const rocksdb::DirFsyncOptions&) override {
    return Fsync(options, context);
  }

 private:
  SimulatedDisk& disk_;
  const Path path_;
};

class SimulatedFiles : public rocksdb::FileSystemWrapper {
 public:
  explicit SimulatedFiles(SimulatedDisk& disk)
      : FileSystemWrapper(rocksdb::FileSystem::Default()), disk_(disk) {}
  const char* Name() const override { return "penstock simulated disk"; }

  IOStatus NewWritableFile(const std::string& path, const rocksdb::FileOptions& options,
                           std::unique_ptr<rocksdb::FSWritableFile>* file,
                           IODebugContext* context) override {
    if (!is_simulated(path)) return target_->NewWritableFile(path, options, file, context);
    const Status failed = disk_.rocksdb_create(path);
    if (!failed.ok()) return to_rocksdb(failed);
    const IOStatus made = target_->NewWritableFile(path, options, file, context);
    if (made.ok()) *file = std::make_unique<SimulatedFile>(disk_, path, 0, std::move(*file));
    return made;
  }
  IOStatus ReopenWritableFile(const std::string& path, const rocksdb::FileOptions& options,
                              std::unique_ptr<rocksdb::FSWritableFile>* file,
                              IODebugContext* context) override {
    const IOStatus opened = target_->ReopenWritableFile(path, options, file, context);
    if (opened.ok() && is_simulated(path)) {
      const uint64_t size = std::filesystem::file_size(path);
      *file = std::make_unique<SimulatedFile>(disk_, path, size, std::move(*file));
    }
    return opened;
  }
  IOStatus NewDirectory(const std::string& path, const IOOptions& options,
                        std::unique_ptr<rocksdb::FSDirectory>* directory,
                        IODebugContext* context) override {
    const IOStatus opened = target_->NewDirectory(path, options, directory, context);
    if (opened.ok()) {
      *directory = std::make_unique<SimulatedDirectory>(disk_, path, std::move(*directory));
    }
    return opened;
  }
  IOStatus CreateDirIfMissing(const std::string& path, const IOOptions& options,
                              IODebugContext* context) override {
    const Status failed = disk_.rocksdb_create_directory(path);
    if (!failed.ok()) return to_rocksdb(failed);
    return target_->CreateDirIfMissing(path, options, context);
  }
  IOStatus DeleteFile(const std::string& path, const IOOptions& options,
                      IODebugContext* context) override {
    if (!is_simulated(path)) return target_->DeleteFile(path, options, context);
    return to_rocksdb(disk_.rocksdb_remove(path));
  }
  IOStatus RenameFile(const std::string& from, const std::string& to, const IOOptions& options,
                      IODebugContext* context) override {
    if (!is_simulated(from)) return target_->RenameFile(from, to, options, context);
    return to_rocksdb(disk_.rocksdb_rename(from, to));
  }

 private:
  SimulatedDisk& disk_;
};

class SimulatedEnv : public rocksdb::EnvWrapper {
 public:
  explicit SimulatedEnv(SimulatedDisk& disk) : EnvWrapper(rocksdb::Env::Default()), disk_(disk) {
    file_system_ = std::make_shared<SimulatedFiles>(disk);
    disk_.wait_before_calls([this] { wait_until_idle(); });
  }
  ~SimulatedEnv() override {
    wait_until_idle();
    disk_.wait_before_calls(nullptr);
  }
  const char* Name() const override { return "penstock simulated disk"; }

  // RocksDB waits a second after a flush or compaction that failed, before it tries again: a disk
  // that is gone stays so.
  void SleepForMicroseconds(int) override {}

  void Schedule(void (*run)(void*), void* argument, Priority priority, void* tag,
                void (*cancel)(void*)) override {
    {
      const std::lock_guard lock(mutex_);
      ++jobs_;
    }
    auto* job = new Job{*this, run, cancel, argument};
    EnvWrapper::Schedule([](void* it) { finish(it, static_cast<Job*>(it)->run); }, job, priority,
                         tag, [](void* it) { finish(it, static_cast<Job*>(it)->cancel); });
  }

 private:
  struct Job {
    SimulatedEnv& env;
    void (*run)(void*);
    void (*cancel)(void*);  // may be null
    void* argument;
  };
  void wait_until_idle() {
    std::unique_lock lock(mutex_);
    idle_.wait(lock, [&] { return jobs_ == 0; });
  }
  static void finish(void* it, void (*how)(void*)) {
    const std::unique_ptr<Job> job(static_cast<Job*>(it));
    {
      // One at a time, so that flush and compaction do not race for the disk.
      const std::lock_guard turn(job->env.turn_);
      if (how != nullptr) how(job->argument);
    }
    const std::lock_guard lock(job->env.mutex_);
    --job->env.jobs_;
    job->env.idle_.notify_all();
  }

  SimulatedDisk& disk_;
  std::mutex turn_;
  std::mutex mutex_;
  std::condition_variable idle_;
  int jobs_ = 0;
};

}  // namespace

std::shared_ptr<rocksdb::Env> simulated_env(SimulatedDisk& disk) {
  return std::make_shared<SimulatedEnv>(disk);
}

}  // namespace penstock::checkpoint_test
