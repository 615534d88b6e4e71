// A job spec in YAML, and a model's config.json: refused with a reason, or a spec that its own JSON
// gives again.
#include "comm/base/check.h"
#include "comm/run/job_spec.h"
#include "tests/fuzz/targets.h"

namespace penstock {
namespace {

template <typename Parse>
void try_text(Bytes input, const Parse& parse) {
  const auto spec = parse(as_text(input), "fuzz");
  if (!spec.ok()) {
    PENSTOCK_CHECK(!spec.status().message().empty());
    return;
  }
  const std::string json = to_json(*spec);
  const auto again = parse(json, "fuzz");
  PENSTOCK_CHECK(again.ok(), again.status().message());
  PENSTOCK_CHECK(to_json(*again) == json, json);
}

}  // namespace

void fuzz::job_spec(Bytes input) {
  try_text(input, parse_job_spec);
}

void fuzz::model_config(Bytes input) {
  try_text(input, parse_model_config);
}

}  // namespace penstock
