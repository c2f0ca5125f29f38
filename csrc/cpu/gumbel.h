// Stateless noise; must match alignpro_kernels/noise.py.
#pragma once

#include <cmath>
#include <cstdint>

namespace alignpro {

constexpr uint64_t kGamma = 0x9E3779B97F4A7C15u;
constexpr uint64_t kMix1 = 0xBF58476D1CE4E5B9u;
constexpr uint64_t kMix2 = 0x94D049BB133111EBu;

static inline uint64_t mix64(uint64_t z) {
  z = (z ^ (z >> 30)) * kMix1;
  z = (z ^ (z >> 27)) * kMix2;
  return z ^ (z >> 31);
}

static inline uint64_t splitmix64(uint64_t seed, int64_t index) { return mix64(seed + (static_cast<uint64_t>(index) + 1) * kGamma); }

static inline float gumbel(uint64_t seed, int64_t index) {
  const double u = (static_cast<double>(splitmix64(seed, index) >> 12) + 0.5) * 0x1p-52;
  return static_cast<float>(-std::log(-std::log(u)));
}

}  // namespace alignpro
