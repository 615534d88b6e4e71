// penstock admin backup, restore: the coordinator's records in a file of their own.
#include <fcntl.h>
#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <memory>
#include <nlohmann/json.hpp>

#include "comm/base/clock.h"
#include "comm/base/counted.h"
#include "coordinator/store/backup.h"
#include "ops/cli/cli.h"
#include "ops/cli/coordinator_store.h"
#include "ops/cli/output.h"
#include "ops/cli/text.h"

namespace penstock {

namespace {

// Written beside the file, which appears whole or not at all.
class BackupFile {
 public:
  static Result<BackupFile> create(const Path& path) {
    std::error_code error;
    if (std::filesystem::exists(std::filesystem::symlink_status(path, error))) {
      return already_exists(path.string() + " exists; name a file that does not");
    }
    BackupFile file;
    file.path_ = path;
    file.partial_ = path.string() + ".partial";
    PENSTOCK_TRY_ASSIGN(file.fd_, open_file(file.partial_, O_WRONLY | O_CREAT | O_TRUNC, 0600));
    return file;
  }
  BackupFile(BackupFile&&) = default;
  ~BackupFile() {
    std::error_code error;
    if (fd_.valid()) std::filesystem::remove(partial_, error);
  }

  Status append(std::string_view text) {
    PENSTOCK_TRY(write_at(fd_.get(), partial_, offset_, as_bytes(text)));
    offset_ += text.size();
    return {};
  }

  // Reads it again first.
  Result<BackupContents> publish() {
    if (fsync(fd_.get()) != 0) return errno_status(errno, "sync " + partial_.string());
    PENSTOCK_TRY_ASSIGN(const BackupContents contents,
                        read_backup(partial_, [](const Record&) { return Status(); }));
    PENSTOCK_TRY(rename_no_replace(partial_, path_));
    PENSTOCK_TRY(fd_.close(path_));
    PENSTOCK_TRY(sync_directory(std::filesystem::absolute(path_).parent_path()));
    return contents;
  }

  uint64_t byte_count() const { return offset_; }

 private:
  BackupFile() = default;

  Path path_, partial_;
  FileDescriptor fd_;  // invalid: nothing to remove
  uint64_t offset_ = 0;
};

Status fetch(const Client& client, BackupFile& file) {
  PENSTOCK_TRY_ASSIGN(Json piece, client.post("/api/v1/backups"));
  while (true) {
    PENSTOCK_TRY(file.append(field_string(piece, "text")));
    if (piece.value("done", false)) return {};
    PENSTOCK_TRY_ASSIGN(
        piece, client.get(fmt::format("/api/v1/backups/{}?offset={}", field_text(piece, "backup"),
                                      file.byte_count())));
  }
}

Status copy(const Path& state_dir, BackupFile& file) {
  PENSTOCK_TRY_ASSIGN(auto store, open_coordinator_store(state_dir));
  BackupText text(std::move(store), wall_now());
  constexpr size_t kPieceBytes = 1 << 20;
  while (!text.done()) {
    PENSTOCK_TRY_ASSIGN(const std::string piece, text.next(kPieceBytes));
    PENSTOCK_TRY(file.append(piece));
  }
  return {};
}

Result<ExitCode> backup(Cli& cli, const std::string& path, const std::string& state_dir) {
  PENSTOCK_TRY_ASSIGN(BackupFile file, BackupFile::create(path));
  PENSTOCK_TRY(state_dir.empty() ? fetch(cli.client(), file) : copy(state_dir, file));
  PENSTOCK_TRY_ASSIGN(const BackupContents contents, file.publish());
  cli.out.document({{"apiVersion", "penstock/v1"},
                    {"kind", "BackupFile"},
                    {"file", path},
                    {"taken_at", format_utc(contents.taken_at)},
                    {"records", contents.records},
                    {"bytes", file.byte_count()}});
  cli.out.answer(path);
  cli.out.note(fmt::format("{}: {}, {} bytes, read again and whole", path,
                           counted(static_cast<int64_t>(contents.records), "record"),
                           file.byte_count()));
  cli.out.note("checkpoints and logs are not in it; next: penstock admin restore --help");
  return ExitCode::kOk;
}

Result<ExitCode> restore(Cli& cli, const std::string& path, const std::string& state_dir) {
  PENSTOCK_TRY(check_own_state(state_dir));
  // Read whole first: a file that is no good makes no directory.
  PENSTOCK_TRY(read_backup(path, [](const Record&) { return Status(); }).status());
  PENSTOCK_TRY_ASSIGN(const RestoredStore restored, restore_backup(path, state_dir, wall_now()));
  const std::string taken_at = format_utc(restored.backup.taken_at);
  cli.out.document({{"apiVersion", "penstock/v1"},
                    {"kind", "RestoredRecords"},
                    {"state_dir", state_dir},
                    {"taken_at", taken_at},
                    {"records", restored.backup.records},
                    {"jobs", restored.jobs},
                    {"open_jobs", restored.open_jobs}});
  cli.out.answer(state_dir);
  const std::string going_on =
      restored.open_jobs == 1
          ? "1 goes on from its newest checkpoint"
          : fmt::format("{} go on from their newest checkpoints", restored.open_jobs);
  cli.out.note(fmt::format(
      "{} holds the records of {}: {}, of which {} once a coordinator is started; what was "
      "submitted later is not in them",
      state_dir, taken_at, counted(static_cast<int64_t>(restored.jobs), "job"), going_on));
  cli.out.note(fmt::format("next: penstock-coordinator --state-dir {}", state_dir));
  return ExitCode::kOk;
}

}  // namespace

void add_admin_verbs(CLI::App& app, Cli& cli) {
  CLI::App* admin =
      add_verb(app, "admin", "Keep the coordinator's records safe",
               "penstock admin backup penstock-$(date +%F).backup\n"
               "penstock admin restore penstock-2026-11-23.backup --state /var/lib/penstock");
  admin->require_subcommand(1);
  struct Flags {
    std::string file, state_dir;
  };
  auto flags = std::make_shared<Flags>();
  CLI::App* backup_verb = add_verb(
      *admin, "backup", "Copy the coordinator's records to a file, while it runs",
      "penstock admin backup penstock-$(date +%F).backup\n"
      "penstock admin backup last.backup --state /var/lib/penstock    # without a coordinator");
  backup_verb->add_option("file", flags->file, "File to make")->required();
  backup_verb->add_option("--state", flags->state_dir,
                          "Read a coordinator's state directory instead of asking one; changes "
                          "nothing there, and it may run");
  backup_verb->callback([&cli, flags] {
    cli.action = [&cli, flags] { return backup(cli, flags->file, flags->state_dir); };
  });
  CLI::App* restore_verb =
      add_verb(*admin, "restore", "Make a coordinator's records from a backup",
               "penstock admin restore penstock-2026-11-23.backup --state /var/lib/penstock");
  restore_verb->add_option("file", flags->file, "A file that backup made")->required();
  restore_verb
      ->add_option("--state", flags->state_dir,
                   "State directory to make or fill, of a coordinator that does not run; one that "
                   "holds records is left alone")
      ->required();
  restore_verb->callback([&cli, flags] {
    cli.action = [&cli, flags] { return restore(cli, flags->file, flags->state_dir); };
  });
}

}  // namespace penstock
