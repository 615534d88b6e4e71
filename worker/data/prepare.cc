#include "worker/data/prepare.h"

#include <fmt/format.h>

#include <cmath>
#include <filesystem>
#include <optional>

#include "comm/base/random.h"
#include "worker/data/indexed_dataset.h"
#include "worker/data/tokenizer.h"

namespace penstock {

namespace {

constexpr uint64_t kHoldoutStream = 0x686f6c646f7574;  // "holdout"

// One side of the split while it is written.
struct Side {
  IndexedDatasetWriter writer;
  DatasetCounts counts;
  std::vector<int64_t> token_counts;  // by token id

  Status add(std::span<const int32_t> tokens) {
    PENSTOCK_TRY(writer.add_document(tokens));
    ++counts.documents;
    counts.tokens += static_cast<int64_t>(tokens.size());
    for (const int32_t token : tokens) ++token_counts[token];
    return {};
  }
};

Result<Side> open_side(const std::string& prefix, const Tokenizer& tokenizer) {
  PENSTOCK_TRY_ASSIGN(IndexedDatasetWriter writer,
                      IndexedDatasetWriter::create(prefix, token_type_for(tokenizer.vocab_size())));
  return Side{std::move(writer), {.prefix = prefix}, std::vector<int64_t>(tokenizer.vocab_size())};
}

Status check_options(const PrepareOptions& options) {
  if (options.inputs.empty()) return invalid_argument("no input files");
  if (options.output.empty()) return invalid_argument("no output prefix");
  if (!(options.holdout >= 0.0 && options.holdout < 1.0)) {
    return invalid_argument(fmt::format("holdout {} is not in [0, 1)", options.holdout));
  }
  return {};
}

Result<int64_t> input_bytes(const std::vector<std::string>& inputs) {
  int64_t total = 0;
  for (const std::string& input : inputs) {
    std::error_code error;
    const auto bytes = std::filesystem::file_size(input, error);
    if (error) return errno_status(error.value(), "read " + input);
    total += static_cast<int64_t>(bytes);
  }
  return total;
}

// Sends documents to their sides. The first document trains and the second is held out whatever the
// draws say, so that neither side is empty.
class Splitter {
 public:
  Splitter(const PrepareOptions& options, const Tokenizer& tokenizer, Side& train, Side* heldout)
      : options_(options),
        tokenizer_(tokenizer),
        train_(train),
        heldout_(heldout),
        random_(options.seed, kHoldoutStream) {}

  Status take(std::string_view document) {
    tokens_.clear();
    PENSTOCK_TRY(tokenizer_.encode(document, tokens_));
    tokens_.push_back(tokenizer_.end_of_document());
    const bool drawn = random_.uniform() < options_.holdout;
    const int64_t index = index_++;
    const bool held_out = heldout_ != nullptr && (index == 1 || (index > 1 && drawn));
    return (held_out ? *heldout_ : train_).add(tokens_);
  }

  int64_t document_count() const { return index_; }

 private:
  const PrepareOptions& options_;
  const Tokenizer& tokenizer_;
  Side& train_;
  Side* heldout_;  // null: everything trains
  Random random_;
  int64_t index_ = 0;
  std::vector<int32_t> tokens_;
};

}  // namespace

double entropy_nats(const std::vector<int64_t>& counts) {
  double total = 0.0;
  for (const int64_t count : counts) total += static_cast<double>(count);
  double entropy = 0.0;
  for (const int64_t count : counts) {
    if (count > 0) entropy -= count / total * std::log(count / total);
  }
  return entropy;
}

Result<PrepareReport> prepare_corpus(const PrepareOptions& options) {
  PENSTOCK_TRY(check_options(options));
  PENSTOCK_TRY_ASSIGN(const auto tokenizer, make_tokenizer(options.tokenizer));
  PrepareReport report;
  PENSTOCK_TRY_ASSIGN(report.input_bytes, input_bytes(options.inputs));
  PENSTOCK_TRY_ASSIGN(Side train, open_side(options.output + "_train", *tokenizer));
  std::optional<Side> heldout;
  if (options.holdout > 0.0) {
    PENSTOCK_TRY_ASSIGN(heldout, open_side(options.output + "_heldout", *tokenizer));
  }
  Splitter splitter(options, *tokenizer, train, heldout ? &*heldout : nullptr);
  for (const std::string& input : options.inputs) {
    PENSTOCK_TRY(read_documents(input, options.split, [&](std::string_view document) {
      return splitter.take(document).with_context(input);
    }));
  }
  const int64_t needed = heldout ? 2 : 1;
  if (splitter.document_count() < needed) {
    return invalid_argument(
        fmt::format("{} document{} in {} bytes of input, needed {}; is the split right?",
                    splitter.document_count(), splitter.document_count() == 1 ? "" : "s",
                    report.input_bytes, needed));
  }
  PENSTOCK_TRY(train.writer.finish());
  if (heldout) PENSTOCK_TRY(heldout->writer.finish());
  report.train = train.counts;
  if (heldout) report.heldout = heldout->counts;
  report.vocab_size = tokenizer->vocab_size();
  report.token_type = token_type_name(token_type_for(report.vocab_size));
  report.unigram_entropy = entropy_nats(heldout ? heldout->token_counts : train.token_counts);
  return report;
}

}  // namespace penstock
