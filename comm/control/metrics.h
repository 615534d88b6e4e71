// Prometheus metrics of one process. Names and labels follow docs/metrics.md; every series exists
// from the moment it is known, counters at 0, because the first increment of a series that did not
// exist is invisible to increase(). prometheus-cpp is confined to metrics.cc.
#pragma once

#include <map>
#include <memory>
#include <string>
#include <vector>

namespace prometheus {
class Counter;
class Gauge;
class Histogram;
}  // namespace prometheus

namespace penstock {

using MetricLabels = std::map<std::string, std::string>;

// Handles: cheap to copy, thread-safe, valid until their series is removed or the registry ends.
class Counter {
 public:
  explicit Counter(prometheus::Counter& counter) : counter_(&counter) {}
  void increment(double by = 1.0);  // REQUIRES: by >= 0
  double value() const;

 private:
  prometheus::Counter* counter_;
};

class Gauge {
 public:
  explicit Gauge(prometheus::Gauge& gauge) : gauge_(&gauge) {}
  void set(double value);
  double value() const;

 private:
  prometheus::Gauge* gauge_;
};

class Histogram {
 public:
  explicit Histogram(prometheus::Histogram& histogram) : histogram_(&histogram) {}
  void observe(double value);

 private:
  prometheus::Histogram* histogram_;
};

// Thread-safe. A name has one kind and one help text for the life of the registry; asking again for
// the same (name, labels) returns the same series. A wrong name is a bug and aborts.
class MetricRegistry {
 public:
  MetricRegistry();
  ~MetricRegistry();
  MetricRegistry(const MetricRegistry&) = delete;
  MetricRegistry& operator=(const MetricRegistry&) = delete;

  Counter counter(const std::string& name, const std::string& help,
                  const MetricLabels& labels = {});
  Gauge gauge(const std::string& name, const std::string& help, const MetricLabels& labels = {});
  // `bounds`: upper bucket bounds, ascending; those of the name's first series hold for all.
  Histogram histogram(const std::string& name, const std::string& help,
                      const std::vector<double>& bounds, const MetricLabels& labels = {});

  // Removes every series, of any name, that carries label = value. Handles to them end here.
  void remove_series(const std::string& label, const std::string& value);

  // Text exposition format 0.0.4; serve it as kMetricsContentType.
  std::string render() const;

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

inline constexpr const char* kMetricsContentType = "text/plain; version=0.0.4; charset=utf-8";

// Bounds that fit control-plane latencies, seconds: 0.5 ms … 10 s.
const std::vector<double>& latency_bounds_seconds();

}  // namespace penstock
