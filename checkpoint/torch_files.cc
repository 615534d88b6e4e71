#include "checkpoint/torch_files.h"

#include <fmt/format.h>

#include <string_view>

namespace penstock {
namespace {

using namespace std::string_view_literals;

constexpr std::string_view kMetadataModule = "torch.distributed.checkpoint.metadata";

// PyTorch's names of an element type. The older container knows the type of a storage by its class,
// and types that came later have none: their bytes lie in a storage of elements as large, and the
// tensor, rebuilt by _rebuild_tensor_v3, says what they are. (What torch.save itself writes for
// them, an UntypedStorage, is refused by torch.load.)
struct TorchType {
  const char* dtype = nullptr;
  const char* storage = nullptr;
  bool tensor_says_type = false;
};
TorchType torch_type(DType dtype) {
  switch (dtype) {
    case DType::kF32:
      return {"float32", "FloatStorage"};
    case DType::kF64:
      return {"float64", "DoubleStorage"};
    case DType::kF16:
      return {"float16", "HalfStorage"};
    case DType::kBf16:
      return {"bfloat16", "BFloat16Storage"};
    case DType::kF8E4m3:
      return {"float8_e4m3fn", "ByteStorage", true};
    case DType::kF8E5m2:
      return {"float8_e5m2", "ByteStorage", true};
    case DType::kI64:
      return {"int64", "LongStorage"};
    case DType::kI32:
      return {"int32", "IntStorage"};
    case DType::kI16:
      return {"int16", "ShortStorage"};
    case DType::kI8:
      return {"int8", "CharStorage"};
    case DType::kU64:
      return {"uint64", "LongStorage", true};
    case DType::kU32:
      return {"uint32", "IntStorage", true};
    case DType::kU16:
      return {"uint16", "ShortStorage", true};
    case DType::kU8:
      return {"uint8", "ByteStorage"};
    case DType::kBool:
      return {"bool", "BoolStorage"};
  }
  return {};
}

void put_little_endian(std::string& text, uint64_t value, int bytes) {
  for (int i = 0; i < bytes; ++i) text += static_cast<char>(value >> (8 * i) & 0xff);
}

// Writes a pickle of protocol 2 (Python's pickletools names the opcodes). Values are pushed on the
// reader's stack; what takes several is preceded by mark().
class Pickle {
 public:
  Pickle() { text_ += "\x80\x02"; }

  void mark() { text_ += '('; }
  void none() { text_ += 'N'; }
  void no() { text_ += '\x89'; }
  void empty_dict() { text_ += '}'; }
  void empty_list() { text_ += ']'; }
  void empty_tuple() { text_ += ')'; }
  void tuple() { text_ += 't'; }          // of all since mark()
  void set_items() { text_ += 'u'; }      // keys and values since mark(), into the dict before it
  void append_items() { text_ += 'e'; }   // values since mark(), into the list before it
  void call() { text_ += 'R'; }           // function, then the tuple of its arguments
  void new_object() { text_ += '\x81'; }  // class, then the tuple for its __new__
  void build() { text_ += 'b'; }          // object, then its state
  void persistent() { text_ += 'Q'; }
  void global(std::string_view module, std::string_view name) {
    text_ += fmt::format("c{}\n{}\n", module, name);
  }
  void text(std::string_view value) {  // printable ASCII, as logical names are
    text_ += 'X';
    put_little_endian(text_, value.size(), 4);
    text_ += value;
  }
  void number(int64_t value) {
    text_ += "\x8a\x08"sv;
    put_little_endian(text_, static_cast<uint64_t>(value), 8);
  }
  void numbers(const std::vector<int64_t>& values) {
    mark();
    for (const int64_t value : values) number(value);
    tuple();
  }
  // An object whose state is a dict: its members follow, between begin_ and end_object().
  void begin_object(std::string_view module, std::string_view name) {
    global(module, name);
    empty_tuple();
    new_object();
    empty_dict();
    mark();
  }
  void end_object() {
    set_items();
    build();
  }
  std::string finish() {
    text_ += '.';
    return std::move(text_);
  }

 private:
  std::string text_;
};

void put_size(Pickle& pickle, const std::vector<int64_t>& size) {
  pickle.global("torch", "Size");
  pickle.mark();
  pickle.numbers(size);
  pickle.tuple();
  pickle.call();
}

// TensorProperties restores itself from a tuple.
void put_properties(Pickle& pickle, DType dtype) {
  pickle.global(kMetadataModule, "TensorProperties");
  pickle.empty_tuple();
  pickle.new_object();
  pickle.mark();
  pickle.global("torch", torch_type(dtype).dtype);
  pickle.global("torch.serialization", "_get_layout");
  pickle.mark();
  pickle.text("torch.strided");
  pickle.tuple();
  pickle.call();
  pickle.no();  // requires_grad
  pickle.global(kMetadataModule, "_MEM_FORMAT_ENCODING");
  pickle.mark();
  pickle.number(0);  // contiguous
  pickle.tuple();
  pickle.call();
  pickle.no();  // pin_memory
  pickle.tuple();
  pickle.build();
}

void put_tensor_metadata(Pickle& pickle, const DcpEntry& entry) {
  pickle.begin_object(kMetadataModule, "TensorStorageMetadata");
  pickle.text("properties");
  put_properties(pickle, entry.dtype);
  pickle.text("size");
  put_size(pickle, entry.shape);
  pickle.text("chunks");
  pickle.empty_list();
  pickle.mark();
  pickle.begin_object(kMetadataModule, "ChunkStorageMetadata");
  pickle.text("offsets");
  put_size(pickle, std::vector<int64_t>(entry.shape.size(), 0));
  pickle.text("sizes");
  put_size(pickle, entry.shape);
  pickle.end_object();
  pickle.append_items();
  pickle.end_object();
}

void put_place(Pickle& pickle, const DcpEntry& entry) {
  pickle.begin_object(kMetadataModule, "MetadataIndex");
  pickle.text("fqn");
  pickle.text(entry.name);
  pickle.text("offset");
  put_size(pickle, std::vector<int64_t>(entry.shape.size(), 0));
  pickle.text("index");
  pickle.number(0);
  pickle.end_object();
  pickle.begin_object("torch.distributed.checkpoint.filesystem", "_StorageInfo");
  pickle.text("relative_path");
  pickle.text(entry.file);
  pickle.text("offset");
  pickle.number(static_cast<int64_t>(entry.offset));
  pickle.text("length");
  pickle.number(static_cast<int64_t>(entry.length));
  pickle.end_object();
}

// Three pickles that are the same in every file: a magic number, the container's version, and the
// sizes of C's integer types.
std::string container_start() {
  Pickle sizes;
  sizes.empty_dict();
  sizes.mark();
  sizes.text("protocol_version");
  sizes.number(1001);
  sizes.text("little_endian");
  sizes.number(1);
  sizes.text("type_sizes");
  sizes.empty_dict();
  sizes.mark();
  for (const auto& [type, bytes] : {std::pair{"short", 2}, {"int", 4}, {"long", 4}}) {
    sizes.text(type);
    sizes.number(bytes);
  }
  sizes.set_items();
  sizes.set_items();
  Pickle version;
  version.number(1001);
  constexpr std::string_view kMagic = "\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19.";
  return std::string(kMagic) + version.finish() + sizes.finish();
}

}  // namespace

std::string torch_save_header(DType dtype, const std::vector<int64_t>& shape) {
  const TorchType type = torch_type(dtype);
  const int64_t count = element_count(shape);
  Pickle tensor;
  tensor.global("torch._utils",
                type.tensor_says_type ? "_rebuild_tensor_v3" : "_rebuild_tensor_v2");
  tensor.mark();
  tensor.mark();
  tensor.text("storage");
  tensor.global("torch", type.storage);
  tensor.text("0");
  tensor.text("cpu");
  tensor.number(count);
  tensor.none();
  tensor.tuple();
  tensor.persistent();
  tensor.number(0);  // first element
  tensor.numbers(shape);
  tensor.numbers(dense_strides(shape));
  tensor.no();  // requires_grad
  tensor.global("collections", "OrderedDict");
  tensor.empty_tuple();
  tensor.call();
  if (type.tensor_says_type) tensor.global("torch", type.dtype);
  tensor.tuple();
  tensor.call();
  Pickle storages;
  storages.empty_list();
  storages.mark();
  storages.text("0");
  storages.append_items();
  std::string header = container_start() + tensor.finish() + storages.finish();
  put_little_endian(header, static_cast<uint64_t>(count), 8);
  return header;
}

std::string dcp_metadata(const std::vector<DcpEntry>& entries) {
  Pickle pickle;
  pickle.begin_object(kMetadataModule, "Metadata");
  pickle.text("state_dict_metadata");
  pickle.empty_dict();
  pickle.mark();
  for (const DcpEntry& entry : entries) {
    pickle.text(entry.name);
    put_tensor_metadata(pickle, entry);
  }
  pickle.set_items();
  pickle.text("planner_data");
  pickle.empty_dict();
  pickle.mark();
  for (const DcpEntry& entry : entries) {
    pickle.text(entry.name);
    pickle.mark();
    pickle.text(entry.name);
    pickle.tuple();
  }
  pickle.set_items();
  pickle.text("storage_data");
  pickle.empty_dict();
  pickle.mark();
  for (const DcpEntry& entry : entries) put_place(pickle, entry);
  pickle.set_items();
  pickle.text("storage_meta");
  pickle.none();
  pickle.text("version");
  pickle.text("1.0.0");
  pickle.end_object();
  return pickle.finish();
}

}  // namespace penstock
