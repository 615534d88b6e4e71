// Rounding to E4M3 with a scale for each tile, bit for bit as the host does it: RowFormat in
// kernels/kernels.h, tile_scale.h, comm/base/minifloat.h (but for the sign of a NaN code).
#pragma once

#include "kernels/cuda/stream.h"
#include "kernels/cuda/view.h"

namespace penstock::cuda {

// Codes: [rows, width], a byte each. scales[tile * stride + row]: rows are neighbours, as the
// products on Hopper read them. REQUIRES: codes are 8-byte aligned, their stride a multiple of 8.
struct QuantisedRows {
  View<uint8_t> codes = {};
  View<float> scales = {};  // [ceil(width / 128), rows]
};

// Of x[rows, width], 128 neighbours of a row share a scale: activations and their gradients.
template <typename T>
void quantise_rows(Stream& stream, const RowCount& rows, int64_t width, View<const T> x,
                   bool power_of_two, const QuantisedRows& out);

// Of a weight [out, in]: a scale for each block of 128 x 128, those at the ends smaller. `codes`
// [out, in] is the operand of the forward product, `transposed` [in, out], the same codes, of the
// input gradient; null data: not wanted. scales: [ceil(out / 128), ceil(in / 128)], contiguous.
struct QuantisedWeight {
  View<uint8_t> codes = {};
  View<uint8_t> transposed = {};
  float* scales = nullptr;
};
template <typename T>
void quantise_weight(Stream& stream, int64_t out, int64_t in, View<const T> weight,
                     const QuantisedWeight& quantised);

}  // namespace penstock::cuda
