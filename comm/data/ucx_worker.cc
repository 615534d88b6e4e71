#include "comm/data/ucx_worker.h"

#include <fmt/format.h>
#include <ucs/config/global_opts.h>

#include <cstdlib>

namespace penstock {
namespace {

constexpr const char* kRendezvousBytes = "256K";

struct ConfigRelease {
  void operator()(ucp_config_t* config) const { ucp_config_release(config); }
};

Status set_unless_in_environment(ucp_config_t* config, const char* name, const std::string& value) {
  if (std::getenv(fmt::format("UCX_{}", name).c_str()) != nullptr) return {};
  const ucs_status_t status = ucp_config_modify(config, name, value.c_str());
  return status == UCS_OK ? Status()
                          : ucx_status(status, fmt::format("set UCX_{}={}", name, value));
}

}  // namespace

Status ucx_status(ucs_status_t status, const std::string& what) {
  const std::string message = fmt::format("{}: {}", what, ucs_status_string(status));
  switch (status) {
    case UCS_ERR_NO_MEMORY:
    case UCS_ERR_NO_RESOURCE:
      return resource_exhausted(message);
    case UCS_ERR_INVALID_PARAM:
    case UCS_ERR_INVALID_ADDR:
      return invalid_argument(message);
    case UCS_ERR_NO_DEVICE:
    case UCS_ERR_UNREACHABLE:
    case UCS_ERR_NOT_CONNECTED:
    case UCS_ERR_CONNECTION_RESET:
    case UCS_ERR_ENDPOINT_TIMEOUT:
    case UCS_ERR_REJECTED:
      return unavailable(message);
    default:
      return internal_error(message);
  }
}

Result<std::unique_ptr<UcxWorker>> UcxWorker::create(const std::string& tls,
                                                     const std::string& net_devices) {
  auto worker = std::make_unique<UcxWorker>();
  PENSTOCK_TRY(worker->open(tls, net_devices));
  return worker;
}

Status UcxWorker::open(const std::string& tls, const std::string& net_devices) {
  // UCX reports every broken connection on stdout; a peer's death is news we report ourselves.
  if (std::getenv("UCX_LOG_LEVEL") == nullptr) ucs_global_opts_set_value("LOG_LEVEL", "fatal");

  // Without these UCX falls back to TCP for endpoints that must survive their peer. They belong to
  // single transports, which read nothing but the environment.
  setenv("UCX_POSIX_ERROR_HANDLING", "y", 0);
  setenv("UCX_SYSV_ERROR_HANDLING", "y", 0);

  ucp_config_t* config_raw = nullptr;
  ucs_status_t status = ucp_config_read(nullptr, nullptr, &config_raw);
  if (status != UCS_OK) return ucx_status(status, "read UCX configuration");
  const std::unique_ptr<ucp_config_t, ConfigRelease> config(config_raw);
  PENSTOCK_TRY(set_unless_in_environment(config.get(), "TLS", tls));
  PENSTOCK_TRY(set_unless_in_environment(config.get(), "NET_DEVICES", net_devices));
  // Without cross-memory attach a rendezvous copies as often as an eager message, but wakes sender
  // and receiver once more each: a third of all context switches of a small model's step.
  PENSTOCK_TRY(set_unless_in_environment(config.get(), "RNDV_THRESH", kRendezvousBytes));

  ucp_params_t params = {};
  params.field_mask = UCP_PARAM_FIELD_FEATURES;
  params.features = UCP_FEATURE_TAG | UCP_FEATURE_WAKEUP;
  status = ucp_init(&params, config.get(), &context_);
  if (status != UCS_OK) return ucx_status(status, fmt::format("start UCX with UCX_TLS={}", tls));

  ucp_worker_params_t worker_params = {};
  worker_params.field_mask = UCP_WORKER_PARAM_FIELD_THREAD_MODE;
  worker_params.thread_mode = UCS_THREAD_MODE_SERIALIZED;
  status = ucp_worker_create(context_, &worker_params, &worker_);
  if (status != UCS_OK) return ucx_status(status, "create UCX worker");
  status = ucp_worker_get_efd(worker_, &event_fd_);
  if (status != UCS_OK) return ucx_status(status, "get UCX event descriptor");

  ucp_address_t* address = nullptr;
  size_t address_size = 0;
  status = ucp_worker_get_address(worker_, &address, &address_size);
  if (status != UCS_OK) return ucx_status(status, "get UCX worker address");
  address_.assign(reinterpret_cast<const char*>(address), address_size);
  ucp_worker_release_address(worker_, address);
  return {};
}

void UcxWorker::abandon() {
  worker_ = nullptr;
  context_ = nullptr;
}

UcxWorker::~UcxWorker() {
  if (worker_ != nullptr) ucp_worker_destroy(worker_);
  if (context_ != nullptr) ucp_cleanup(context_);
}

}  // namespace penstock
