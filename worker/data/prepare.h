// Makes a training and a held-out data set out of text.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "comm/base/status.h"
#include "worker/data/text_reader.h"

namespace penstock {

struct PrepareOptions {
  std::vector<std::string> inputs;  // plain text files or *.jsonl; read in this order
  std::string output;  // writes <output>_train.{bin,idx} and <output>_heldout.{bin,idx}
  std::string tokenizer = "bytes";
  DocumentSplit split = DocumentSplit::kBlankLine;
  double holdout = 0.05;  // share of the documents, 0 <= holdout < 1; 0 writes no held-out set
  uint64_t seed = 0;      // chooses which
};

struct DatasetCounts {
  std::string prefix;
  int64_t documents = 0;
  int64_t tokens = 0;
};

struct PrepareReport {
  DatasetCounts train;
  DatasetCounts heldout;  // prefix empty when there is none
  int64_t input_bytes = 0;
  int64_t vocab_size = 0;
  std::string token_type;
  // Entropy of the held-out tokens' own frequencies (of the training tokens' when there are no
  // held-out ones), in nats per token: no model that ignores context can have a lower loss on that
  // text.
  double unigram_entropy = 0.0;
};

// Each document ends with the tokenizer's end-of-document token. Document i (from 0, over all
// inputs) is held out when draw i of Random(seed) falls below `holdout`; but document 0 always
// trains and document 1 is always held out, so that neither side is empty. Deterministic: same
// options and files, same bytes.
// kInvalidArgument when there are fewer documents than sides, or as read_documents says. On an
// error no data set is left behind or changed, unless the disk failed while both files of one were
// put in place.
Result<PrepareReport> prepare_corpus(const PrepareOptions& options);

// -Σ p ln p of the counts' frequencies, in nats; 0 when there are none.
double entropy_nats(const std::vector<int64_t>& counts);

}  // namespace penstock
