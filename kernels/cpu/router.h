// The group-limited gate in one pass per token. Contract: kernels/kernels.h, whose REQUIRES the
// caller has checked.
#pragma once

#include "kernels/kernels.h"

namespace penstock::cpu {

// `workspace`: scratch of experts + groups floats.
void router(const RouterShape& shape, ConstMatrix logits, const float* bias, float* scores,
            int32_t* expert_ids, float* weights, int64_t* counts, float* workspace);
void router_backward(const RouterShape& shape, const float* scores, const int32_t* expert_ids,
                     const float* d_weights, Matrix d_logits);

}  // namespace penstock::cpu
