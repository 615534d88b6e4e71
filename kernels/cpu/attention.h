// Causal attention, one block of queries of one head at a time: scores of a block against every key
// it sees are one matrix product, the softmax of its rows one pass, so that no online rescaling is
// needed and the largest thing in memory is [block, seq_length]. Contract: kernels/kernels.h, whose
// REQUIRES the caller has checked.
#pragma once

#include "kernels/kernels.h"

namespace penstock::cpu {

int64_t attention_workspace_floats(const AttentionShape& shape);

// `gemm_workspace`: gemm_workspace_floats() floats, besides the caller's workspace.
void attention(const AttentionShape& shape, float scale, const AttentionInputs& in, Heads out,
               float* log_sum_exp, float* workspace, float* gemm_workspace);
void attention_backward(const AttentionShape& shape, float scale, const AttentionInputs& in,
                        ConstHeads out, const float* log_sum_exp, ConstHeads d_out,
                        const AttentionGradients& gradients, float* workspace,
                        float* gemm_workspace);

}  // namespace penstock::cpu
