#include "comm/run/yaml_document.h"

#include <gtest/gtest.h>

namespace penstock {
namespace {

std::string error_of(std::string_view text) {
  const auto root = parse_yaml(text, "f");
  return root.ok() ? "no error" : root.status().message();
}

TEST(YamlDocumentTest, PositionsCountFromOneAndKeysKeepTheirOrder) {
  const auto root = parse_yaml("b: 1\na: [x, \"2\"]\n", "f");
  ASSERT_TRUE(root.ok()) << root.status().message();
  ASSERT_EQ(root->keys.size(), 2u);
  EXPECT_EQ(root->keys[0].text, "b");
  EXPECT_EQ(root->keys[1].line, 2);
  const YamlNode* list = root->find("a");
  ASSERT_NE(list, nullptr);
  ASSERT_EQ(list->items.size(), 2u);
  EXPECT_EQ(list->items[0].column, 5);
  EXPECT_FALSE(list->items[0].quoted);
  EXPECT_TRUE(list->items[1].quoted);
}

TEST(YamlDocumentTest, JsonIsYaml) {
  const auto root = parse_yaml("{\"a\": {\"b\": [1, null, true]}}", "f");
  ASSERT_TRUE(root.ok()) << root.status().message();
  EXPECT_EQ(root->find("a")->find("b")->items[1].kind, YamlNode::Kind::kNull);
}

TEST(YamlDocumentTest, AliasesAreRefused) {
  EXPECT_EQ(error_of("a: &x 1\n"), "f:1:4: anchors (&name) are not allowed; write the value out");
  EXPECT_NE(error_of("a: *x\n"), "no error");
}

TEST(YamlDocumentTest, AnAliasBombEndsAtItsFirstAnchor) {
  std::string bomb = "a0: &a0 [x, x]\n";
  for (int i = 1; i < 30; ++i) {
    bomb += fmt::format("a{}: &a{} [*a{}, *a{}]\n", i, i, i - 1, i - 1);
  }
  EXPECT_NE(error_of(bomb).find("f:1:5: anchors"), std::string::npos) << error_of(bomb);
}

TEST(YamlDocumentTest, TagsAreRefused) {
  EXPECT_NE(error_of("a: !!int 1\n").find("tags (!name) are not allowed"), std::string::npos);
}

TEST(YamlDocumentTest, DeepNestingIsRefused) {
  const std::string deep = std::string(50, '[') + std::string(50, ']');
  EXPECT_NE(error_of(deep).find("nested deeper than 16 levels"), std::string::npos)
      << error_of(deep);
  const std::string abyss = std::string(200'000, '[');
  EXPECT_NE(error_of(abyss), "no error");
}

TEST(YamlDocumentTest, TooManyValuesAreRefused) {
  std::string text = "[";
  for (int i = 0; i < kYamlNodesMax; ++i) text += "1,";
  EXPECT_NE(error_of(text + "1]").find("more than 20000 values"), std::string::npos);
}

TEST(YamlDocumentTest, AFileBeyondTheCapIsRefused) {
  const std::string text(kYamlBytesMax + 1, ' ');
  EXPECT_EQ(error_of(text), "f:1:1: larger than 256 KiB");
}

TEST(YamlDocumentTest, ATabInIndentationIsRefused) {
  EXPECT_EQ(error_of("a:\n\tb: 1\n"), "f:2:1: tab in indentation; use spaces");
}

TEST(YamlDocumentTest, NulBytesAndControlCharactersAreRefused) {
  EXPECT_EQ(error_of(std::string_view("a: \0b\n", 6)), "f:1:4: control character 0x00");
  EXPECT_EQ(error_of("a: \x1b[31m\n"), "f:1:4: control character 0x1b");
}

TEST(YamlDocumentTest, BytesThatAreNotUtf8AreRefused) {
  EXPECT_EQ(error_of("a: 1\nb: \xff\n"), "f:2:4: bytes that are not UTF-8");
}

TEST(YamlDocumentTest, SeveralDocumentsAreRefused) {
  EXPECT_NE(error_of("a: 1\n---\nb: 2\n").find("more than one YAML document"), std::string::npos);
}

TEST(YamlDocumentTest, AKeyMustBeText) {
  EXPECT_NE(error_of("? [a, b]\n: 1\n").find("a key must be text"), std::string::npos);
  EXPECT_NE(error_of("{[a]: 1}").find("a key must be text"), std::string::npos);
}

TEST(YamlDocumentTest, BrokenSyntaxGivesItsPlace) {
  EXPECT_EQ(error_of("a: 1\nb: [1, 2\nc: 3\n").substr(0, 4), "f:3:");
  EXPECT_NE(error_of("a: \"open").find("not valid YAML: illegal EOF"), std::string::npos);
}

}  // namespace
}  // namespace penstock
