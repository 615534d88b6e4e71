// One function per parser of bytes that others may have written. Each parses `input` and aborts
// where what comes of it breaks the parser's contract: a value that keeps its bounds and encodes
// to what it was read from, or an error. libfuzzer_main.cc hands them the inputs that libFuzzer
// makes up; corpus_test.cc, in every build, those of corpus/ and changes of them.
#pragma once

#include "comm/base/bytes.h"

namespace penstock::fuzz {

void control_frame(Bytes input);
void dataset(Bytes input);
void http_request(Bytes input);
void index_row(Bytes input);
void job_spec(Bytes input);
void manifest(Bytes input);
void model_config(Bytes input);
void record(Bytes input);
void removal(Bytes input);
void safetensors(Bytes input);
void segment(Bytes input);
void trace(Bytes input);
void ucx_address(Bytes input);

}  // namespace penstock::fuzz
