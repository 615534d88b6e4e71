// A tokenizer as the files of a Hugging Face model folder.
#pragma once

#include <string>

#include "comm/base/file.h"
#include "comm/base/status.h"

namespace penstock {

class Tokenizer;

// Writes into `folder`, which exists. `name` is DataSpec::tokenizer, of which `tokenizer` was made.
//   "bytes"     tokenizer.json: byte-level BPE without merges, whose 256 symbols have their bytes'
//               values as ids, and the end of a document as a special token
//   *.model     the SentencePiece model itself, as tokenizer.model
// and tokenizer_config.json. Neither adds tokens at the ends of a text by itself.
Status write_hf_tokenizer(const std::string& name, const Tokenizer& tokenizer,
                          int64_t context_length, const Path& folder);

}  // namespace penstock
