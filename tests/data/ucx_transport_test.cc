#include "comm/data/ucx_transport.h"

#include "tests/data/transport_conformance.h"

namespace penstock {
namespace {

INSTANTIATE_TEST_SUITE_P(Ucx, TransportConformance, testing::Values(TransportKind::kUcx));

}  // namespace
}  // namespace penstock
