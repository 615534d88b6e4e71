// Vectorised normalisation, rotary position, SwiGLU, sigmoid and loss. Contracts:
// kernels/kernels.h, whose REQUIRES the caller has checked. Pure functions of their arguments.
#pragma once

#include "kernels/kernels.h"

namespace penstock::cpu {

void rms_norm(int64_t rows, int64_t width, ConstMatrix x, const float* weight, float eps, Matrix y,
              float* inv_rms);
void rms_norm_backward(int64_t rows, int64_t width, ConstMatrix x, const float* weight,
                       const float* inv_rms, ConstMatrix dy, Store store, Matrix dx,
                       float* dweight);

// `angles`: scratch of 2 * dim floats.
void rope(int64_t tokens, int64_t seq_length, int64_t heads, int64_t dim, const float* cosine,
          const float* sine, bool inverse, Heads x, float* angles);

void swiglu(int64_t rows, int64_t width, ConstMatrix gate, ConstMatrix up, Matrix y);
void swiglu_backward(int64_t rows, int64_t width, ConstMatrix gate, ConstMatrix up, ConstMatrix dy,
                     Matrix d_gate, Matrix d_up, const SwigluWith& with);

void sigmoid(int64_t count, const float* x, float* y);

void cross_entropy(int64_t rows, int64_t vocab, ConstMatrix logits, const int32_t* targets,
                   float gradient_scale, float* losses, Matrix d_logits);

}  // namespace penstock::cpu
