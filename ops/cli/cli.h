// What every verb gets: where to write, which coordinator to ask. One file per group of verbs,
// cmd_<group>.cc; each adds its verbs to the parser, and sets `action` when one of them was given.
#pragma once

#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "comm/base/exit_codes.h"
#include "comm/base/status.h"
#include "ops/cli/client.h"
#include "ops/cli/output.h"

namespace CLI {
class App;
class Validator;
}  // namespace CLI

namespace penstock {

struct Cli {
  Output out;
  std::string server;     // --server; empty: environment, running dev cluster, default
  std::string state_dir;  // --state-dir of the dev cluster; empty: its default
  std::function<Result<ExitCode>()> action;

  // --server, else $PENSTOCK_SERVER, else the running dev cluster's, else http://127.0.0.1:7070.
  Client client() const;
};

// Examples come first in --help; `examples` holds one command a line.
CLI::App* add_verb(CLI::App& parent, const std::string& name, const std::string& description,
                   const std::string& examples);

// Takes a rank as a flag's value.
CLI::Validator rank_number();

// Takes one of `words` as a flag's value, and names the nearest when it refuses.
CLI::Validator one_of(const std::vector<std::string>& words);

void add_job_verbs(CLI::App& app, Cli& cli);       // ps describe cancel resume rm wait
void add_submit_verb(CLI::App& app, Cli& cli);     // submit
void add_program_verb(CLI::App& app, Cli& cli);    // program
void add_record_verbs(CLI::App& app, Cli& cli);    // logs events metrics
void add_cluster_verbs(CLI::App& app, Cli& cli);   // workers version
void add_data_verbs(CLI::App& app, Cli& cli);      // data prepare, inspect
void add_dev_verbs(CLI::App& app, Cli& cli);       // dev up, down, status, kill-rank
void add_chaos_verbs(CLI::App& app, Cli& cli);     // chaos kill, pause, slow, partition, corrupt
void add_sample_verb(CLI::App& app, Cli& cli);     // sample
void add_export_verb(CLI::App& app, Cli& cli);     // export
void add_import_verb(CLI::App& app, Cli& cli);     // import
void add_trace_verb(CLI::App& app, Cli& cli);      // trace
void add_rebalance_verb(CLI::App& app, Cli& cli);  // rebalance
void add_admin_verbs(CLI::App& app, Cli& cli);     // admin backup, restore
void add_doctor_verb(CLI::App& app, Cli& cli);     // doctor
// checkpoint ls, and what follows; the others add to `checkpoint`.
void add_checkpoint_verbs(CLI::App& app, Cli& cli);
void add_checkpoint_verify_verb(CLI::App& checkpoint, Cli& cli);  // verify
void add_checkpoint_show_verbs(CLI::App& checkpoint, Cli& cli);   // show diff
void add_checkpoint_files_verbs(CLI::App& checkpoint, Cli& cli);  // export import
void add_checkpoint_keep_verbs(CLI::App& checkpoint, Cli& cli);   // pin unpin prune reindex

// A verb's own -o, which names what it writes; take_output_path() reads its values. `description`
// says what is written.
void add_output_path_option(CLI::App& verb, std::vector<std::string>& outputs,
                            const std::string& description);

// The values of a verb's own -o, which names what it writes: "json" and "table" choose the format
// as everywhere; at most one other value is the path.
Result<std::optional<std::string>> take_output_path(Cli& cli,
                                                    const std::vector<std::string>& outputs);

// The exit code that says how a job ended. REQUIRES: its state is final.
ExitCode exit_code_of_job(const Json& job);
bool state_is_final(const std::string& state);

}  // namespace penstock
