// penstock-poison: a copy of a spec's first training source in which everything that some steps
// read is random bytes. For spike.py.
#include <CLI/CLI.hpp>

#include <cstdio>
#include <fstream>
#include <sstream>

#include "comm/base/random.h"
#include "worker/data/sampler.h"

namespace penstock {
namespace {

struct Flags {
  std::string spec;
  std::string out;
  int64_t first = 1;
  int64_t last = 1;
};

Status poison(const Flags& flags) {
  std::ifstream file(flags.spec);
  std::ostringstream text;
  text << file.rdbuf();
  PENSTOCK_TRY_ASSIGN(const JobSpec spec, parse_job_spec(text.str(), flags.spec));
  PENSTOCK_TRY_ASSIGN(const Sampler sampler, open_training_sampler(spec));
  const int64_t width = token_bytes(sampler.sources()[0].data->type());
  if (width != 2) return invalid_argument("only data sets of 16-bit tokens");
  for (const char* ending : {".bin", ".idx"}) {
    std::filesystem::copy_file(spec.data.train[0].path + ending, flags.out + ending,
                               std::filesystem::copy_options::overwrite_existing);
  }
  std::fstream tokens(flags.out + ".bin", std::ios::in | std::ios::out | std::ios::binary);
  Random random(1, 1);
  for (int64_t step = flags.first; step <= flags.last; ++step) {
    for (int64_t i = 0; i < spec.tokens_at(step) / spec.data.seq_length; ++i) {
      const Sampler::Window window = sampler.window(step, i);
      if (window.source != 0 || window.epoch != 0) {
        return invalid_argument("only the first epoch of one source");  // what else reads it?
      }
      tokens.seekp((window.first_token + 1) * width);  // the first is also another window's last
      for (int64_t t = 1; t < spec.data.seq_length; ++t) {
        const auto token = static_cast<uint16_t>(random.below(256));
        tokens.write(reinterpret_cast<const char*>(&token), sizeof token);
      }
    }
  }
  tokens.close();
  return tokens.good() ? Status() : data_loss("could not write " + flags.out + ".bin");
}

}  // namespace
}  // namespace penstock

int main(int argc, char** argv) {
  penstock::Flags flags;
  CLI::App app("a copy of a training source in which some steps read random bytes");
  app.add_option("spec", flags.spec, "job spec")->required();
  app.add_option("out", flags.out, "prefix of the copy")->required();
  app.add_option("--first", flags.first, "first poisoned step");
  app.add_option("--last", flags.last, "last poisoned step");
  CLI11_PARSE(app, argc, argv);
  const penstock::Status done = penstock::poison(flags);
  if (!done.ok()) std::fprintf(stderr, "penstock-poison: %s\n", done.to_string().c_str());
  return done.ok() ? 0 : 1;
}
