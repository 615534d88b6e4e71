#include "comm/control/metrics.h"

#include <prometheus/counter.h>
#include <prometheus/family.h>
#include <prometheus/gauge.h>
#include <prometheus/histogram.h>
#include <prometheus/registry.h>
#include <prometheus/text_serializer.h>

#include <algorithm>
#include <mutex>
#include <sstream>
#include <stdexcept>

#include "comm/base/check.h"

namespace penstock {
namespace {

// The series of one name, with what prometheus-cpp does not give back: which labels each has.
template <typename Metric>
struct Series {
  prometheus::Family<Metric>* family = nullptr;
  std::map<MetricLabels, Metric*> by_labels;
};

template <typename Metric>
using SeriesByName = std::map<std::string, Series<Metric>>;

template <typename Metric>
void remove_matching(SeriesByName<Metric>& names, const std::string& label,
                     const std::string& value) {
  for (auto& [name, series] : names) {
    for (auto at = series.by_labels.begin(); at != series.by_labels.end();) {
      const auto found = at->first.find(label);
      if (found == at->first.end() || found->second != value) {
        ++at;
        continue;
      }
      series.family->Remove(at->second);
      at = series.by_labels.erase(at);
    }
  }
}

}  // namespace

void Counter::increment(double by) {
  PENSTOCK_CHECK(by >= 0, by);
  counter_->Increment(by);
}
double Counter::value() const {
  return counter_->Value();
}
void Gauge::set(double value) {
  gauge_->Set(value);
}
double Gauge::value() const {
  return gauge_->Value();
}
void Histogram::observe(double value) {
  histogram_->Observe(value);
}

struct MetricRegistry::Impl {
  // Finds or makes the series; `build` makes the family, `arguments` go to the metric's
  // constructor.
  template <typename Metric, typename Build, typename... Arguments>
  Metric& series(SeriesByName<Metric>& names, const std::string& name, const std::string& help,
                 const MetricLabels& labels, Build build, const Arguments&... arguments) {
    const std::lock_guard lock(mutex);
    Series<Metric>& entry = names[name];
    try {  // the library throws for a name that is not one, or that has another kind already
      if (!entry.family) entry.family = &build().Name(name).Help(help).Register(registry);
      Metric*& metric = entry.by_labels[labels];
      if (!metric) metric = &entry.family->Add(labels, arguments...);
      return *metric;
    } catch (const std::exception& error) {
      check_failed(__FILE__, __LINE__, "metric name and labels are valid",
                   " " + name + ": " + error.what());
    }
  }

  prometheus::Registry registry{prometheus::Registry::InsertBehavior::Throw};
  std::mutex mutex;  // guards the three maps
  SeriesByName<prometheus::Counter> counters;
  SeriesByName<prometheus::Gauge> gauges;
  SeriesByName<prometheus::Histogram> histograms;
};

MetricRegistry::MetricRegistry() : impl_(std::make_unique<Impl>()) {}
MetricRegistry::~MetricRegistry() = default;

Counter MetricRegistry::counter(const std::string& name, const std::string& help,
                                const MetricLabels& labels) {
  return Counter(impl_->series(impl_->counters, name, help, labels, prometheus::BuildCounter));
}
Gauge MetricRegistry::gauge(const std::string& name, const std::string& help,
                            const MetricLabels& labels) {
  return Gauge(impl_->series(impl_->gauges, name, help, labels, prometheus::BuildGauge));
}
Histogram MetricRegistry::histogram(const std::string& name, const std::string& help,
                                    const std::vector<double>& bounds, const MetricLabels& labels) {
  return Histogram(
      impl_->series(impl_->histograms, name, help, labels, prometheus::BuildHistogram, bounds));
}

void MetricRegistry::remove_series(const std::string& label, const std::string& value) {
  const std::lock_guard lock(impl_->mutex);
  remove_matching(impl_->counters, label, value);
  remove_matching(impl_->gauges, label, value);
  remove_matching(impl_->histograms, label, value);
}

std::string MetricRegistry::render() const {
  std::vector<prometheus::MetricFamily> families = impl_->registry.Collect();
  std::erase_if(families, [](const auto& family) { return family.metric.empty(); });
  std::sort(families.begin(), families.end(),
            [](const auto& a, const auto& b) { return a.name < b.name; });
  for (auto& family : families) {
    std::sort(family.metric.begin(), family.metric.end(),
              [](const auto& a, const auto& b) { return a.label < b.label; });
  }
  std::ostringstream text;
  prometheus::TextSerializer().Serialize(text, families);
  return text.str();
}

const std::vector<double>& latency_bounds_seconds() {
  static const std::vector<double> bounds = {0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05,
                                             0.1,    0.25,  0.5,    1.0,   2.5,  5.0,   10.0};
  return bounds;
}

}  // namespace penstock
