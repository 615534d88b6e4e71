// penstock data prepare, inspect.
#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <memory>
#include <nlohmann/json.hpp>

#include "ops/cli/cli.h"
#include "ops/cli/text.h"
#include "worker/data/indexed_dataset.h"
#include "worker/data/prepare.h"

namespace penstock {

namespace {

Json counts_json(const DatasetCounts& counts) {
  if (counts.prefix.empty()) return nullptr;
  return {{"prefix", counts.prefix}, {"documents", counts.documents}, {"tokens", counts.tokens}};
}

Result<ExitCode> prepare(Cli& cli, PrepareOptions options, const std::string& split) {
  PENSTOCK_TRY_ASSIGN(options.split, parse_document_split(split));
  PENSTOCK_TRY_ASSIGN(const PrepareReport report, prepare_corpus(options));
  cli.out.document({{"apiVersion", "penstock/v1"},
                    {"kind", "PreparedData"},
                    {"train", counts_json(report.train)},
                    {"heldout", counts_json(report.heldout)},
                    {"input_bytes", report.input_bytes},
                    {"tokenizer", options.tokenizer},
                    {"vocab_size", report.vocab_size},
                    {"token_type", report.token_type},
                    {"unigram_entropy", report.unigram_entropy}});
  std::vector<std::vector<std::string>> rows;
  for (const DatasetCounts* counts : {&report.train, &report.heldout}) {
    if (counts->prefix.empty()) continue;
    rows.push_back(
        {counts->prefix, std::to_string(counts->documents), std::to_string(counts->tokens)});
  }
  cli.out.table({"DATA SET", "DOCUMENTS", "TOKENS"}, rows);
  cli.out.note(fmt::format("read {} of text; vocabulary {} ({}); unigram entropy {:.4f} nats/token",
                           format_bytes(static_cast<double>(report.input_bytes)), report.vocab_size,
                           report.token_type, report.unigram_entropy));
  return ExitCode::kOk;
}

// "corpus_train.bin" and "corpus_train.idx" name the data set too.
std::string without_ending(std::string prefix) {
  if (prefix.ends_with(".bin") || prefix.ends_with(".idx")) prefix.resize(prefix.size() - 4);
  return prefix;
}

// Reads every token once.
Result<std::vector<int64_t>> count_tokens(const IndexedDataset& data) {
  constexpr int64_t kVocabularyMax = 1 << 24;
  constexpr int64_t kTokensAtOnce = 1 << 16;
  std::vector<int64_t> counts;
  std::vector<int32_t> tokens(std::min(kTokensAtOnce, data.token_count()));
  for (int64_t at = 0; at < data.token_count(); at += kTokensAtOnce) {
    const auto some = std::span(tokens).first(std::min(kTokensAtOnce, data.token_count() - at));
    PENSTOCK_TRY(data.read(at, some, kVocabularyMax));
    for (const int32_t token : some) {
      if (token >= static_cast<int32_t>(counts.size())) counts.resize(token + 1);
      ++counts[token];
    }
  }
  return counts;
}

Result<ExitCode> inspect(Cli& cli, const std::string& path) {
  PENSTOCK_TRY_ASSIGN(const IndexedDataset data, IndexedDataset::open(without_ending(path)));
  PENSTOCK_TRY_ASSIGN(const std::vector<int64_t> counts, count_tokens(data));
  const int64_t distinct =
      std::count_if(counts.begin(), counts.end(), [](int64_t n) { return n > 0; });
  const double entropy = entropy_nats(counts);
  cli.out.document({{"apiVersion", "penstock/v1"},
                    {"kind", "DataSet"},
                    {"prefix", data.prefix()},
                    {"token_type", token_type_name(data.type())},
                    {"documents", data.document_count()},
                    {"sequences", data.sequence_count()},
                    {"tokens", data.token_count()},
                    {"largest_token", static_cast<int64_t>(counts.size()) - 1},
                    {"distinct_tokens", distinct},
                    {"unigram_entropy", entropy}});
  cli.out.text(
      fmt::format("data set         {}\ntoken type       {}\ndocuments        {}\n"
                  "tokens           {}\nlargest token    {}\ndistinct tokens  {}\n"
                  "unigram entropy  {:.4f} nats/token\n",
                  data.prefix(), token_type_name(data.type()), data.document_count(),
                  data.token_count(), static_cast<int64_t>(counts.size()) - 1, distinct, entropy));
  return ExitCode::kOk;
}

}  // namespace

void add_data_verbs(CLI::App& app, Cli& cli) {
  CLI::App* data = add_verb(app, "data", "Prepare and inspect corpora",
                            "penstock data prepare --output corpus text/*.txt\n"
                            "penstock data inspect corpus_train");
  data->require_subcommand(1);

  auto options = std::make_shared<PrepareOptions>();
  auto split = std::make_shared<std::string>("blank-line");
  CLI::App* prepare_verb = add_verb(
      *data, "prepare", "Turn text or JSONL into training and held-out token files",
      "penstock data prepare --output corpus book.txt            # corpus_train, corpus_heldout\n"
      "penstock data prepare --output c --split percent /usr/share/games/fortunes/science\n"
      "penstock data prepare --output c --tokenizer t.model --holdout 0.01 pages.jsonl");
  prepare_verb
      ->add_option("input", options->inputs, "Plain text files, or *.jsonl with {\"text\": …}")
      ->required();
  prepare_verb->add_option("--output", options->output, "Prefix of the files to write")->required();
  prepare_verb->add_option("--tokenizer", options->tokenizer, "\"bytes\", or a SentencePiece model")
      ->capture_default_str();
  prepare_verb
      ->add_option("--split", *split,
                   "What separates documents of plain text: blank-line, percent (lines of "
                   "\"%\", as in fortune files) or file (none)")
      ->capture_default_str();
  prepare_verb->add_option("--holdout", options->holdout, "Share of documents kept out of training")
      ->capture_default_str();
  prepare_verb->add_option("--seed", options->seed, "Chooses which")->capture_default_str();
  prepare_verb->callback([&cli, options, split] {
    cli.action = [&cli, options, split] { return prepare(cli, *options, *split); };
  });

  auto prefix = std::make_shared<std::string>();
  CLI::App* inspect_verb =
      add_verb(*data, "inspect", "Check a data set and count its tokens",
               "penstock data inspect corpus_heldout -o json | jq .unigram_entropy");
  inspect_verb->add_option("prefix", *prefix, "Path without .bin and .idx")->required();
  inspect_verb->callback(
      [&cli, prefix] { cli.action = [&cli, prefix] { return inspect(cli, *prefix); }; });
}

}  // namespace penstock
