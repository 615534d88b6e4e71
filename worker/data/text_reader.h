// Documents out of plain text files and JSONL.
#pragma once

#include <functional>
#include <string>
#include <string_view>

#include "comm/base/status.h"

namespace penstock {

// Where one document of a plain text file ends and the next begins.
enum class DocumentSplit {
  kBlankLine,  // "blank-line": at one or more empty lines
  kPercent,    // "percent": at a line that is just "%", as in fortune files
  kFile,       // "file": the whole file is one document
};

Result<DocumentSplit> parse_document_split(std::string_view name);

inline constexpr uint64_t kCorpusFileBytesMax = uint64_t{64} << 30;
inline constexpr uint64_t kDocumentBytesMax = uint64_t{1} << 30;

// Calls `take` with each document of the file, in order, until it returns an error. Files named
// *.jsonl hold one object per line with the text under "text" and ignore `split`; every other file
// is plain text. Documents are not empty, do not begin or end with a line break, and are valid
// UTF-8. kNotFound, kPermissionDenied; kInvalidArgument "path:line: …" for bytes that are not UTF-8
// and for JSON that is not an object with a string "text".
Status read_documents(const std::string& path, DocumentSplit split,
                      const std::function<Status(std::string_view document)>& take);

}  // namespace penstock
