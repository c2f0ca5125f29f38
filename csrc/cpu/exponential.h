// Elementary functions on the vector lanes of `Isa`. Included after one of isa_*.h.
#pragma once

#include <limits>

namespace alignpro {
namespace {

using F = Isa::F;
constexpr float kInfinity = std::numeric_limits<float>::infinity();

// e^x for x <= 88, within 2 ulp; 0 below -87.3, where results would be subnormal. Cody-Waite range reduction and the
// polynomial of Cephes' expf.
inline F exponential(F x) {
  // Not less than that even where the result is dropped: processors take a hundred cycles for a subnormal one.
  const F least = Isa::set(-87.3f), from = Isa::max(least, x);  // NaN if x is
  const F n = Isa::round(Isa::mul(from, Isa::set(1.44269504088896341f)));
  F r = Isa::fma(n, Isa::set(-0.693359375f), from);
  r = Isa::fma(n, Isa::set(2.12194440e-4f), r);
  F p = Isa::set(1.9875691500e-4f);
  p = Isa::fma(p, r, Isa::set(1.3981999507e-3f));
  p = Isa::fma(p, r, Isa::set(8.3334519073e-3f));
  p = Isa::fma(p, r, Isa::set(4.1665795894e-2f));
  p = Isa::fma(p, r, Isa::set(1.6666665459e-1f));
  p = Isa::fma(p, r, Isa::set(5.0000001201e-1f));
  p = Isa::fma(p, Isa::mul(r, r), Isa::add(r, Isa::set(1.0f)));
  return Isa::zero_where_less(Isa::scale(p, n), x, least);
}

// softcap tanh(u / softcap), with an error of 1e-7 of the soft-cap: for logits the absolute error matters, not the relative
// error near 0.
inline F cap(F u, float softcap) {
  const F x = Isa::min(Isa::set(40.0f), Isa::max(Isa::set(-40.0f), Isa::mul(u, Isa::set(2.0f / softcap))));
  const F t = Isa::sub(Isa::set(1.0f), Isa::div(Isa::set(2.0f), Isa::add(exponential(x), Isa::set(1.0f))));
  return Isa::mul(t, Isa::set(softcap));
}

// The shift of scores before the exponential, given their maximum: 0 if all are -inf.
inline float finite(float m) { return m == -kInfinity ? 0.0f : m; }

}  // namespace
}  // namespace alignpro
