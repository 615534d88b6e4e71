#include "kernels/kernels.h"

#include <cmath>

#include "comm/base/check.h"

namespace penstock {

void make_rope_tables(int64_t positions, int64_t dim, double theta, float* cosine, float* sine) {
  PENSTOCK_CHECK(positions >= 0 && dim > 0 && dim % 2 == 0 && theta > 0, positions, dim, theta);
  const int64_t pair_count = dim / 2;
  for (int64_t pair = 0; pair < pair_count; ++pair) {
    const double frequency =
        std::pow(theta, -2.0 * static_cast<double>(pair) / static_cast<double>(dim));
    for (int64_t position = 0; position < positions; ++position) {
      const double angle = static_cast<double>(position) * frequency;
      cosine[position * pair_count + pair] = static_cast<float>(std::cos(angle));
      sine[position * pair_count + pair] = static_cast<float>(std::sin(angle));
    }
  }
}

}  // namespace penstock
