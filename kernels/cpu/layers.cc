#include "kernels/cpu/layers.h"

#include <algorithm>
#include <cmath>

#include "kernels/cpu/targets.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/layers.cc"
#include <hwy/foreach_target.h>
#include <hwy/highway.h>

#include "kernels/cpu/simd_inl.h"

HWY_BEFORE_NAMESPACE();
namespace penstock::cpu::HWY_NAMESPACE {

void rms_norm(int64_t rows, int64_t width, ConstMatrix x, const float* weight, float eps, Matrix y,
              float* inv_rms) {
  for (int64_t i = 0; i < rows; ++i) {
    const float* const in = x.data + i * x.stride;
    float* const out = y.data + i * y.stride;
    const float squares = sum_lanes(width, [&](auto d, int64_t j, auto sum) HWY_ATTR {
      const auto v = hn::LoadU(d, in + j);
      return hn::MulAdd(v, v, sum);
    });
    const float inverse = 1.0F / std::sqrt(squares / static_cast<float>(width) + eps);
    inv_rms[i] = inverse;
    for_lanes(width, [&](auto d, int64_t j) HWY_ATTR {
      const auto normal = hn::Mul(hn::LoadU(d, in + j), hn::Set(d, inverse));
      hn::StoreU(hn::Mul(normal, hn::LoadU(d, weight + j)), d, out + j);
    });
  }
}

void rms_norm_backward(int64_t rows, int64_t width, ConstMatrix x, const float* weight,
                       const float* inv_rms, ConstMatrix dy, Store store, Matrix dx,
                       float* dweight) {
  for (int64_t i = 0; i < rows; ++i) {
    const float* const in = x.data + i * x.stride;
    const float* const up = dy.data + i * dy.stride;
    const float inverse = inv_rms[i];
    if (dweight != nullptr) {
      for_lanes(width, [&](auto d, int64_t j) HWY_ATTR {
        const auto normal = hn::Mul(hn::LoadU(d, in + j), hn::Set(d, inverse));
        hn::StoreU(hn::MulAdd(normal, hn::LoadU(d, up + j), hn::LoadU(d, dweight + j)), d,
                   dweight + j);
      });
    }
    if (dx.data == nullptr) continue;
    const float dot = sum_lanes(width, [&](auto d, int64_t j, auto sum) HWY_ATTR {
      const auto weighted = hn::Mul(hn::LoadU(d, weight + j), hn::LoadU(d, up + j));
      return hn::MulAdd(weighted, hn::LoadU(d, in + j), sum);
    });
    // mean(xhat * weight * dy) * inv_rms, so that x itself can be used below.
    const float pull = dot * inverse * inverse / static_cast<float>(width);
    float* const out = dx.data + i * dx.stride;
    const bool accumulate = store == Store::kAccumulate;
    for_lanes(width, [&](auto d, int64_t j) HWY_ATTR {
      const auto weighted = hn::Mul(hn::LoadU(d, weight + j), hn::LoadU(d, up + j));
      const auto rest = hn::NegMulAdd(hn::LoadU(d, in + j), hn::Set(d, pull), weighted);
      const auto before = accumulate ? hn::LoadU(d, out + j) : hn::Zero(d);
      hn::StoreU(hn::MulAdd(rest, hn::Set(d, inverse), before), d, out + j);
    });
  }
}

// Rotates one head: out = x * cosines + swapped(x) * sines, where sines carry the sign of their
// lane.
void rotate(int64_t dim, const float* cosines, const float* sines, float* x) {
  int64_t j = 0;
#if HWY_TARGET != HWY_SCALAR
  const auto whole_vectors = [&](auto d) HWY_ATTR {
    const int64_t lanes = static_cast<int64_t>(hn::Lanes(d));
    for (; j + lanes <= dim; j += lanes) {
      const auto v = hn::LoadU(d, x + j);
      const auto straight = hn::Mul(v, hn::LoadU(d, cosines + j));
      hn::StoreU(hn::MulAdd(hn::Shuffle2301(v), hn::LoadU(d, sines + j), straight), d, x + j);
    }
  };
  whole_vectors(Lanes());
  whole_vectors(Four());
#endif
  const One d;
  for (; j < dim; j += 2) {
    const auto a = hn::LoadU(d, x + j);
    const auto b = hn::LoadU(d, x + j + 1);
    const auto first = hn::Mul(a, hn::LoadU(d, cosines + j));
    const auto second = hn::Mul(b, hn::LoadU(d, cosines + j + 1));
    hn::StoreU(hn::MulAdd(b, hn::LoadU(d, sines + j), first), d, x + j);
    hn::StoreU(hn::MulAdd(a, hn::LoadU(d, sines + j + 1), second), d, x + j + 1);
  }
}

void rope(int64_t tokens, int64_t seq_length, int64_t heads, int64_t dim, const float* cosine,
          const float* sine, bool inverse, Heads x, float* angles) {
  float* const cosines = angles;
  float* const sines = angles + dim;
  for (int64_t token = 0; token < tokens; ++token) {
    const int64_t row = token % seq_length * (dim / 2);
    for (int64_t pair = 0; pair < dim / 2; ++pair) {
      const float s = inverse ? -sine[row + pair] : sine[row + pair];
      cosines[2 * pair] = cosines[2 * pair + 1] = cosine[row + pair];
      sines[2 * pair] = -s;
      sines[2 * pair + 1] = s;
    }
    for (int64_t head = 0; head < heads; ++head) {
      rotate(dim, cosines, sines, x.data + token * x.token_stride + head * x.head_stride);
    }
  }
}

void swiglu(int64_t rows, int64_t width, ConstMatrix gate, ConstMatrix up, Matrix y) {
  for (int64_t i = 0; i < rows; ++i) {
    const float* const g = gate.data + i * gate.stride;
    const float* const u = up.data + i * up.stride;
    float* const out = y.data + i * y.stride;
    for_lanes(width, [&](auto d, int64_t j) HWY_ATTR {
      const auto v = hn::LoadU(d, g + j);
      const auto silu = hn::Mul(v, sigmoid_lanes(d, v));
      hn::StoreU(hn::Mul(silu, hn::LoadU(d, u + j)), d, out + j);
    });
  }
}

void swiglu_backward(int64_t rows, int64_t width, ConstMatrix gate, ConstMatrix up, ConstMatrix dy,
                     Matrix d_gate, Matrix d_up, const SwigluWith& with) {
  for (int64_t i = 0; i < rows; ++i) {
    const float* const g = gate.data + i * gate.stride;
    const float* const u = up.data + i * up.stride;
    const float* const down = dy.data + i * dy.stride;
    float* const to_gate = d_gate.data + i * d_gate.stride;
    float* const to_up = d_up.data + i * d_up.stride;
    float* const y = with.y.data == nullptr ? nullptr : with.y.data + i * with.y.stride;
    const float weight = with.weights == nullptr ? 1.0F : with.weights[i];
    const float dot = sum_lanes(width, [&](auto d, int64_t j, auto sum) HWY_ATTR {
      const auto v = hn::LoadU(d, g + j);
      const auto w = hn::Set(d, weight);
      const auto from_above = hn::LoadU(d, down + j);
      const auto gradient = hn::Mul(w, from_above);
      const auto linear = hn::LoadU(d, u + j);
      const auto s = sigmoid_lanes(d, v);
      const auto silu = hn::Mul(v, s);
      const auto h = hn::Mul(silu, linear);
      // silu'(v) = s (1 + v (1 - s)) = s + silu - silu s
      const auto slope = hn::Add(s, hn::NegMulAdd(silu, s, silu));
      hn::StoreU(hn::Mul(hn::Mul(gradient, linear), slope), d, to_gate + j);
      hn::StoreU(hn::Mul(gradient, silu), d, to_up + j);
      if (y != nullptr) hn::StoreU(hn::Mul(w, h), d, y + j);
      return hn::MulAdd(from_above, h, sum);
    });
    if (with.dots != nullptr) with.dots[i] = dot;
  }
}

void sigmoid(int64_t count, const float* x, float* y) {
  for_lanes(count, [&](auto d, int64_t j)
                       HWY_ATTR { hn::StoreU(sigmoid_lanes(d, hn::LoadU(d, x + j)), d, y + j); });
}

void cross_entropy(int64_t rows, int64_t vocab, ConstMatrix logits, const int32_t* targets,
                   float gradient_scale, float* losses, Matrix d_logits) {
  for (int64_t i = 0; i < rows; ++i) {
    const float* const in = logits.data + i * logits.stride;
    float* const out = d_logits.data == nullptr ? nullptr : d_logits.data + i * d_logits.stride;
    const int64_t target = targets[i];
    if (target < 0) {
      losses[i] = 0.0F;
      if (out != nullptr) std::fill_n(out, vocab, 0.0F);
      continue;
    }
    const float largest = max_of(vocab, in);
    const float target_logit = in[target];  // before `out`, which may be `in`, is written
    const float sum = sum_lanes(vocab, [&](auto d, int64_t j, auto total) HWY_ATTR {
      const auto e = exp_lanes(d, hn::Sub(hn::LoadU(d, in + j), hn::Set(d, largest)));
      if (out != nullptr) hn::StoreU(e, d, out + j);
      return hn::Add(total, e);
    });
    losses[i] = (largest - target_logit) + std::log(sum);
    if (out == nullptr) continue;
    const float factor = gradient_scale / sum;
    for_lanes(vocab, [&](auto d, int64_t j) HWY_ATTR {
      hn::StoreU(hn::Mul(hn::LoadU(d, out + j), hn::Set(d, factor)), d, out + j);
    });
    out[target] -= gradient_scale;
  }
}

}  // namespace penstock::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace penstock::cpu {

HWY_EXPORT(rms_norm);
HWY_EXPORT(rms_norm_backward);
HWY_EXPORT(rope);
HWY_EXPORT(swiglu);
HWY_EXPORT(swiglu_backward);
HWY_EXPORT(sigmoid);
HWY_EXPORT(cross_entropy);

void rms_norm(int64_t rows, int64_t width, ConstMatrix x, const float* weight, float eps, Matrix y,
              float* inv_rms) {
  HWY_DYNAMIC_DISPATCH(rms_norm)(rows, width, x, weight, eps, y, inv_rms);
}
void rms_norm_backward(int64_t rows, int64_t width, ConstMatrix x, const float* weight,
                       const float* inv_rms, ConstMatrix dy, Store store, Matrix dx,
                       float* dweight) {
  HWY_DYNAMIC_DISPATCH(rms_norm_backward)
  (rows, width, x, weight, inv_rms, dy, store, dx, dweight);
}
void rope(int64_t tokens, int64_t seq_length, int64_t heads, int64_t dim, const float* cosine,
          const float* sine, bool inverse, Heads x, float* angles) {
  HWY_DYNAMIC_DISPATCH(rope)
  (tokens, seq_length, heads, dim, cosine, sine, inverse, x, angles);
}
void swiglu(int64_t rows, int64_t width, ConstMatrix gate, ConstMatrix up, Matrix y) {
  HWY_DYNAMIC_DISPATCH(swiglu)(rows, width, gate, up, y);
}
void swiglu_backward(int64_t rows, int64_t width, ConstMatrix gate, ConstMatrix up, ConstMatrix dy,
                     Matrix d_gate, Matrix d_up, const SwigluWith& with) {
  HWY_DYNAMIC_DISPATCH(swiglu_backward)(rows, width, gate, up, dy, d_gate, d_up, with);
}
void sigmoid(int64_t count, const float* x, float* y) {
  HWY_DYNAMIC_DISPATCH(sigmoid)(count, x, y);
}
void cross_entropy(int64_t rows, int64_t vocab, ConstMatrix logits, const int32_t* targets,
                   float gradient_scale, float* losses, Matrix d_logits) {
  HWY_DYNAMIC_DISPATCH(cross_entropy)
  (rows, vocab, logits, targets, gradient_scale, losses, d_logits);
}

}  // namespace penstock::cpu
#endif  // HWY_ONCE
