// The tile kernels, written once in terms of the vector lanes of `Isa`. See cpu_kernels_impl.h.
#pragma once

#include <cstdint>

#include "exponential.h"
#include "tile_kernels.h"

namespace alignpro {
namespace {

// Finite, so that 0 * (z - m) is 0 and not NaN where z is -inf: in columns beyond the vocabulary or for masked tokens.
constexpr float kMinLogit = -1e30f;

// Turns u into z in place for one row; returns the maximum, which may miss a NaN: the sums propagate it.
inline float transform(float* z, const LogitsTile& shape, float inverse_tau, const float* bias) {
  for (int64_t j = shape.columns; j < shape.stride; ++j) z[j] = -kInfinity;
  F top = Isa::set(-kInfinity);
  if (bias == nullptr && shape.softcap == 0 && inverse_tau == 1) {
    for (int64_t j = 0; j < shape.stride; j += Isa::width) top = Isa::max(top, Isa::load(z + j));
    return Isa::largest(top);
  }
  const F scale = Isa::set(inverse_tau);
  for (int64_t j = 0; j < shape.stride; j += Isa::width) {
    F u = Isa::load(z + j);
    if (bias != nullptr) u = Isa::add(u, Isa::load(bias + j));
    if (shape.softcap != 0) u = cap(u, shape.softcap);
    Isa::store(z + j, Isa::mul(u, scale));
  }
  for (int64_t j = shape.columns; j < shape.stride; ++j) z[j] = -kInfinity;  // a soft-cap makes them finite
  for (int64_t j = 0; j < shape.stride; j += Isa::width) top = Isa::max(top, Isa::load(z + j));
  return Isa::largest(top);
}

inline F relative(const float* z, F m) { return Isa::max(Isa::set(kMinLogit), Isa::sub(Isa::load(z), m)); }

void statistics(float* logits, float* reference, const LogitsTile& shape, const float* bias, const float* reference_bias,
                const Partials& out) {
  for (int64_t i = 0; i < shape.rows; ++i) {
    float* z = logits + i * shape.stride;
    const float inverse_tau = shape.inverse_tau == nullptr ? 1.0f : shape.inverse_tau[i];
    out.m[i] = transform(z, shape, inverse_tau, bias);
    const F m = Isa::set(finite(out.m[i]));
    F s = Isa::set(0), a = s, b = s, s_r = s;
    if (reference == nullptr) {
      for (int64_t j = 0; j < shape.stride; j += Isa::width) {
        const F t = relative(z + j, m), e = exponential(t);
        s = Isa::add(s, e);
        a = Isa::fma(e, t, a);
      }
    } else {
      float* w = reference + i * shape.stride;
      out.m_r[i] = transform(w, shape, inverse_tau, reference_bias);
      const F m_r = Isa::set(finite(out.m_r[i]));
      for (int64_t j = 0; j < shape.stride; j += Isa::width) {
        const F t = relative(z + j, m), e = exponential(t), t_r = relative(w + j, m_r);
        s = Isa::add(s, e);
        a = Isa::fma(e, t, a);
        s_r = Isa::add(s_r, exponential(t_r));
        b = Isa::fma(e, Isa::sub(t, t_r), b);
      }
      out.s_r[i] = Isa::sum(s_r);
      out.b[i] = Isa::sum(b);
    }
    out.s[i] = Isa::sum(s);
    out.a[i] = Isa::sum(a);
  }
}

void gradient(const float* logits, const float* reference, const LogitsTile& shape, const int64_t* active,
              const int64_t* target, const Upstream& up, float* du, float* bias_gradient) {
  for (int64_t i = 0; i < shape.rows; ++i) {
    const int64_t row = active == nullptr ? i : active[i];
    const float* z = logits + row * shape.stride;
    const float* w = reference == nullptr ? nullptr : reference + row * shape.stride;
    float* d = du + i * shape.stride;
    const float inverse_tau = shape.inverse_tau == nullptr ? 1.0f : shape.inverse_tau[row];
    const float alpha = up.alpha == nullptr ? 0.0f : up.alpha[row];
    const float eta = up.eta == nullptr ? 0.0f : up.eta[row];
    const float kappa = up.kappa == nullptr || w == nullptr ? 0.0f : up.kappa[row];
    const F m = Isa::set(finite(up.m[row])), log_s = Isa::set(up.log_s[row]);
    const F slope = Isa::set(inverse_tau);
    // 1 - tanh^2 = 1 - (z tau / softcap)^2
    const F per_cap = Isa::set(shape.softcap == 0 ? 0.0f : 1.0f / (inverse_tau * shape.softcap));
    const F one = Isa::set(1.0f);
    // dz = -p (alpha + eta (log p + H) - kappa (log p - log q - KL)), plus alpha at the target
    const F entropy = Isa::set(eta == 0 ? 0.0f : up.entropy[row]);
    const bool with_reference = kappa != 0;
    const F m_r = Isa::set(with_reference ? finite(up.m_r[row]) : 0.0f);
    const F log_s_r = Isa::set(with_reference ? up.log_s_r[row] : 0.0f);
    const F kl = Isa::set(with_reference ? up.kl[row] : 0.0f);
    const F v_alpha = Isa::set(alpha), v_eta = Isa::set(eta), v_kappa = Isa::set(-kappa);
    for (int64_t j = 0; j < shape.stride; j += Isa::width) {
      const F zj = Isa::load(z + j);
      const F logp = Isa::max(Isa::set(kMinLogit), Isa::sub(Isa::sub(zj, m), log_s));
      F factor = v_alpha;
      if (eta != 0) factor = Isa::fma(v_eta, Isa::add(logp, entropy), factor);
      if (with_reference) {
        const F logq = Isa::max(Isa::set(kMinLogit), Isa::sub(Isa::sub(Isa::load(w + j), m_r), log_s_r));
        factor = Isa::fma(v_kappa, Isa::sub(Isa::sub(logp, logq), kl), factor);
      }
      Isa::store(d + j, Isa::mul(factor, exponential(logp)));
    }
    // d holds -dz, except at the target.
    const int64_t y = target[row];
    if (y >= 0 && y < shape.columns) d[y] -= alpha;
    for (int64_t j = 0; j < shape.stride; j += Isa::width) {
      F g = Isa::mul(Isa::load(d + j), Isa::sub(Isa::set(0.0f), slope));
      if (shape.softcap != 0) {
        const F t = Isa::mul(Isa::max(Isa::set(kMinLogit), Isa::load(z + j)), per_cap);
        g = Isa::mul(g, Isa::sub(one, Isa::mul(t, t)));
      }
      Isa::store(d + j, g);
    }
    if (bias_gradient != nullptr) {
      for (int64_t j = 0; j < shape.columns; ++j) bias_gradient[j] += d[j];
    }
  }
}

// An upper bound of each lane's noise. With v = 1 - u, g = -log(-log u) <= -log v, since -log(1 - v) >= v. The bits of v, read
// as an integer, give an upper bound of -log2 v: the mantissa is a chord below the logarithm. Exact logarithms are computed
// only for lanes whose bound exceeds the best value so far.
inline F noise_bound(uint64_t seed, int64_t first) {
  const F v = Isa::mul(Isa::noise_complement(seed, first), Isa::set(0x1p-31f * (1 - 0x1p-22f)));  // at most the true v
  return Isa::fma(Isa::bits(v), Isa::set(-0.69314718f * 0x1p-23f), Isa::set(127 * 0.69314718f + 1e-4f));
}

void sample(float* logits, const LogitsTile& shape, const float* bias, const int64_t* seeds, const bool* greedy, int64_t first,
            const Partials& out, const Best& best) {
  for (int64_t i = 0; i < shape.rows; ++i) {
    float* z = logits + i * shape.stride;
    out.m[i] = transform(z, shape, shape.inverse_tau == nullptr ? 1.0f : shape.inverse_tau[i], bias);
    const F m = Isa::set(finite(out.m[i]));
    F s = Isa::set(0), a = s;
    F record = Isa::set(best.noisy[i]);
    const uint64_t seed = static_cast<uint64_t>(seeds[i]);
    for (int64_t j = 0; j < shape.stride; j += Isa::width) {
      const F zj = Isa::load(z + j);
      const F t = Isa::max(Isa::set(kMinLogit), Isa::sub(zj, m)), e = exponential(t);
      s = Isa::add(s, e);
      a = Isa::fma(e, t, a);
      unsigned candidates =
          greedy[i] ? Isa::greater(zj, record) : Isa::greater(Isa::add(zj, noise_bound(seed, first + j)), record);
      if (candidates == 0) continue;
      for (; candidates != 0; candidates &= candidates - 1) {
        const int64_t column = j + __builtin_ctz(candidates);
        const float noisy = z[column] + (greedy[i] ? 0.0f : gumbel(seed, first + column));
        if (noisy > best.noisy[i]) {
          best.noisy[i] = noisy;
          best.logit[i] = z[column];
          best.index[i] = first + column;
        }
      }
      record = Isa::set(best.noisy[i]);
    }
    out.s[i] = Isa::sum(s);
    out.a[i] = Isa::sum(a);
  }
}

constexpr TileKernels kTileKernels = {statistics, gradient, sample};

}  // namespace
}  // namespace alignpro
