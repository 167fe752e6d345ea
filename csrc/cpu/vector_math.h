// Elementary math functions written so that a loop over them vectorizes: no branches, no calls.
#pragma once

#include "simd.h"

#include <cmath>
#include <cstdint>

namespace toolx {

// which ? yes : no, without the branch that compilers make if one of the two is constant and that prevents
// vectorization.
TOOLX_INLINE float select(bool which, float yes, float no) {
  const uint32_t mask = 0u - static_cast<uint32_t>(which);
  return as_float((as_bits(yes) & mask) | (as_bits(no) & ~mask));
}

// exp(x) to about 1e-7 relative; zero below -87, where fp32 becomes denormal; exp(88) beyond 88. A NaN stays NaN.
TOOLX_INLINE float exp_of(float x) {
  const float bounded = select(x > 88.0f, 88.0f, x);
  const float shifted = bounded * 1.44269504088896341f + 12582912.0f;  // adding 1.5 * 2^23 rounds to an integer
  const float n = shifted - 12582912.0f;
  const float r = bounded - n * 0.693359375f + n * 2.12194440e-4f;  // ln 2 in two parts
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  const float power = as_float((as_bits(shifted) - 0x4B400000u + 127u) << 23);
  return select(x < -87.0f, 0.0f, p * power);
}

// tanh(x) to about 2e-7 relative (Cephes: a polynomial near zero, where the quotient of exponentials would cancel).
TOOLX_INLINE float tanh_of(float x) {
  const float size = x < 0.0f ? -x : x;
  const float square = x * x;
  float p = -5.70498872745e-3f;
  p = p * square + 2.06390887954e-2f;
  p = p * square - 5.37397155531e-2f;
  p = p * square + 1.33314422036e-1f;
  p = p * square - 3.33332819422e-1f;
  const float near = p * square * x + x;
  const float far = 1.0f - 2.0f / (exp_of(2.0f * size) + 1.0f);
  return size < 0.625f ? near : x < 0.0f ? -far : far;
}

// log(x) to about 1e-7 relative, for positive normal x.
TOOLX_INLINE float log_of(float x) {
  const uint32_t offset = as_bits(x) - 0x3F3504F3u;  // the mantissa is in [sqrt(1/2), sqrt(2))
  const float n = static_cast<float>(static_cast<int32_t>(offset) >> 23);
  const float r = as_float((offset & 0x007FFFFFu) + 0x3F3504F3u) - 1.0f;
  const float square = r * r;
  float p = 7.0376836292e-2f;
  p = p * r - 1.1514610310e-1f;
  p = p * r + 1.1676998740e-1f;
  p = p * r - 1.2420140846e-1f;
  p = p * r + 1.4249322787e-1f;
  p = p * r - 1.6668057665e-1f;
  p = p * r + 2.0000714765e-1f;
  p = p * r - 2.4999993993e-1f;
  p = p * r + 3.3333331174e-1f;
  return r + (p * r * square - 2.12194440e-4f * n - 0.5f * square) + 0.693359375f * n;
}

// cap * tanh(x / cap), exact to the last bits of fp32 relative to cap.
TOOLX_INLINE float capped(float x, float cap) {
  const float e = exp_of(-2.0f * std::fabs(x / cap));
  return std::copysign(cap * ((1.0f - e) / (1.0f + e)), x);
}

// -log(-log(1 - u)) with u = (word + 1/2) / 2^32, at most 1 - 2^-24: see gumbel_noise in reference.py.
TOOLX_INLINE float gumbel_of(uint32_t word) {
  const float exact = (static_cast<float>(word) + 0.5f) * 0x1p-32f;
  const float u = select(exact > 1.0f - 0x1p-24f, 1.0f - 0x1p-24f, exact);
  const float rest = 1.0f - u;
  const float lost = (1.0f - rest) - u;  // the rounding error of 1 - u: for a small u, all of it
  return -log_of(-(log_of(rest) + lost));
}

// Philox4x32-10 (Salmon et al., SC 2011): the four words of each of n consecutive blocks, one after the other.
TOOLX_INLINE void philox(
    uint32_t first, uint32_t c1, uint32_t c2, uint32_t c3, uint32_t k0, uint32_t k1, int64_t n, uint32_t* words) {
  for (int64_t i = 0; i < n; ++i) {
    uint32_t a = first + static_cast<uint32_t>(i), b = c1, c = c2, d = c3, left = k0, right = k1;
#pragma GCC unroll 10
    for (int round = 0; round < 10; ++round) {
      // high and low words are computed separately, so that compilers find the vector instructions
      const uint32_t high_a = static_cast<uint32_t>((static_cast<uint64_t>(a) * 0xD2511F53u) >> 32);
      const uint32_t high_c = static_cast<uint32_t>((static_cast<uint64_t>(c) * 0xCD9E8D57u) >> 32);
      const uint32_t low_a = a * 0xD2511F53u;
      const uint32_t low_c = c * 0xCD9E8D57u;
      a = high_c ^ b ^ left;
      b = low_c;
      c = high_a ^ d ^ right;
      d = low_a;
      left += 0x9E3779B9u;
      right += 0xBB67AE85u;
    }
    words[4 * i] = a;
    words[4 * i + 1] = b;
    words[4 * i + 2] = c;
    words[4 * i + 3] = d;
  }
}

}  // namespace toolx
