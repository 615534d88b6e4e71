#include "checkpoint/strict_json.h"

#include <fmt/format.h>

#include <nlohmann/json.hpp>
#include <vector>

namespace penstock {
namespace {

using Json = nlohmann::json;

// Builds the document from the parser's events and stops it at the first thing that is not allowed.
class Builder : public nlohmann::json_sax<Json> {
 public:
  explicit Builder(const JsonLimits& limits) : limits_(limits) {}

  bool null() override { return add(nullptr) != nullptr; }
  bool boolean(bool value) override { return add(value) != nullptr; }
  bool number_integer(number_integer_t value) override { return add(value) != nullptr; }
  bool number_unsigned(number_unsigned_t value) override { return add(value) != nullptr; }
  bool number_float(number_float_t value, const string_t&) override {
    return add(value) != nullptr;
  }
  bool string(string_t& value) override { return add(std::move(value)) != nullptr; }
  bool binary(binary_t&) override { return fail("it holds binary data"); }
  bool start_object(size_t) override { return open(Json::object()); }
  bool start_array(size_t) override { return open(Json::array()); }
  bool end_object() override { return close(); }
  bool end_array() override { return close(); }
  bool key(string_t& value) override {
    if (open_.back()->contains(value)) {
      return fail(fmt::format("the key \"{}\" is there twice", value.substr(0, 200)));
    }
    key_ = std::move(value);
    return true;
  }
  bool parse_error(size_t position, const std::string&,
                   const nlohmann::detail::exception&) override {
    return fail(fmt::format("it is not valid JSON from byte {} on", position));
  }

  Result<Json> finish() {
    if (!status_.ok()) return status_;
    return std::move(root_);
  }

 private:
  Json* add(Json value) {
    if (++value_count_ > limits_.values_max) {
      fail(fmt::format("it has more than {} values", limits_.values_max));
      return nullptr;
    }
    if (open_.empty()) {
      root_ = std::move(value);
      return &root_;
    }
    if (open_.back()->is_array()) return &open_.back()->emplace_back(std::move(value));
    return &((*open_.back())[key_] = std::move(value));
  }
  bool open(Json value) {
    if (open_.size() == limits_.depth_max) {
      return fail(fmt::format("it is nested deeper than {}", limits_.depth_max));
    }
    Json* added = add(std::move(value));
    if (added != nullptr) open_.push_back(added);
    return added != nullptr;
  }
  bool close() {
    open_.pop_back();
    return true;
  }
  bool fail(std::string what) {
    if (status_.ok()) status_ = data_loss(std::move(what));
    return false;
  }

  const JsonLimits limits_;
  Json root_;
  std::vector<Json*> open_;  // outermost first; a parent does not grow while a child is open
  std::string key_;
  size_t value_count_ = 0;
  Status status_;
};

}  // namespace

Result<Json> parse_strict_json(std::string_view text, const JsonLimits& limits) {
  Builder builder(limits);
  Json::sax_parse(text.begin(), text.end(), &builder);
  return builder.finish();
}

}  // namespace penstock
