// Every input of corpus/, the same cut short, and with single bits flipped, goes to its parser. A
// fuzzer's finding becomes a line there: what it was, and the bytes.
#include <gtest/gtest.h>
#include <signal.h>
#include <unistd.h>

#include "comm/base/file.h"
#include "tests/fuzz/targets.h"

namespace penstock {
namespace {

struct Target {
  const char* name;
  void (*parse)(Bytes input);
};
constexpr Target kTargets[] = {{"control_frame", fuzz::control_frame},
                               {"dataset", fuzz::dataset},
                               {"http_request", fuzz::http_request},
                               {"index_row", fuzz::index_row},
                               {"job_spec", fuzz::job_spec},
                               {"manifest", fuzz::manifest},
                               {"model_config", fuzz::model_config},
                               {"record", fuzz::record},
                               {"removal", fuzz::removal},
                               {"safetensors", fuzz::safetensors},
                               {"segment", fuzz::segment},
                               {"trace", fuzz::trace},
                               {"ucx_address", fuzz::ucx_address}};
// Of each input, evenly spread: as many cuts, and as many flipped bits.
constexpr size_t kChanges = 64;

using Input = std::vector<std::byte>;

// Inputs of a text, between lines of four dashes.
std::vector<Input> split_text(std::string_view text) {
  constexpr std::string_view kBetween = "----\n";
  std::vector<Input> inputs;
  for (size_t begin = 0; begin < text.size();) {
    const size_t end = std::min(text.find(kBetween, begin), text.size());
    const Bytes bytes = as_bytes(text.substr(begin, end - begin));
    inputs.emplace_back(bytes.begin(), bytes.end());
    begin = end + kBetween.size();
  }
  return inputs;
}

// Inputs in hexadecimal digits, one a line; other lines begin with # and say what follows.
std::vector<Input> split_hex(std::string_view text) {
  std::vector<Input> inputs;
  for (size_t begin = 0; begin < text.size();) {
    const size_t end = std::min(text.find('\n', begin), text.size());
    const std::string line(text.substr(begin, end - begin));
    begin = end + 1;
    if (line.starts_with('#')) continue;
    Input input(line.size() / 2);
    for (size_t i = 0; i < input.size(); ++i) {
      input[i] = static_cast<std::byte>(std::stoul(line.substr(2 * i, 2), nullptr, 16));
    }
    inputs.push_back(std::move(input));
  }
  return inputs;
}

std::vector<Input> corpus_of(const std::string& name) {
  const Path folder = Path(PENSTOCK_SOURCE_DIR) / "tests/fuzz/corpus";
  const auto text = read_file(folder / (name + ".txt"), 1 << 20);
  if (text.ok()) return split_text(*text);
  const auto hex = read_file(folder / (name + ".hex"), 1 << 20);
  EXPECT_TRUE(hex.ok()) << hex.status().to_string();
  return split_hex(*hex);
}

// A parser that breaks its contract aborts: what it was given is said then.
std::string given;
void say_what_was_given(int) {
  (void)!::write(STDERR_FILENO, given.data(), given.size());
}

class FuzzCorpusTest : public ::testing::TestWithParam<Target> {
 protected:
  void SetUp() override { ::signal(SIGABRT, say_what_was_given); }
  void TearDown() override { ::signal(SIGABRT, SIG_DFL); }
};

TEST_P(FuzzCorpusTest, EveryInputAndWhatIsLikeItIsReadOrRefused) {
  const std::vector<Input> inputs = corpus_of(GetParam().name);
  ASSERT_FALSE(inputs.empty());
  const auto parse = [&](size_t number, Bytes input, const std::string& change) {
    given = fmt::format("input {}{}\n", number + 1, change);
    GetParam().parse(input);
  };
  for (size_t number = 0; number < inputs.size(); ++number) {
    Input input = inputs[number];
    parse(number, input, "");
    size_t last = input.size();
    for (size_t i = 0; i < kChanges; ++i) {
      const size_t at = input.size() * i / kChanges;
      if (at == last) continue;
      last = at;
      parse(number, Bytes(input).first(at), fmt::format(" cut to {} bytes", at));
      const auto bit = static_cast<std::byte>(1 << i % 8);
      input[at] ^= bit;
      parse(number, input, fmt::format(" with byte {} changed", at));
      input[at] ^= bit;
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Parsers, FuzzCorpusTest, ::testing::ValuesIn(kTargets),
                         [](const auto& info) { return std::string(info.param.name); });

}  // namespace
}  // namespace penstock
