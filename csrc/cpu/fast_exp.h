// exp in fp32, written so that a loop over it is vectorised for whatever instruction set the loop is compiled for.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__GNUC__)
#define TOOLX_INLINE inline __attribute__((always_inline))
#else
#define TOOLX_INLINE inline
#endif

namespace toolx {

// exp(x) to about 1e-7 relative; zero below -87, where fp32 turns denormal. A NaN stays one. Beyond 88 it is exp(88).
TOOLX_INLINE float exp_of(float x) {
  const float bounded = x > 88.0f ? 88.0f : x < -87.0f ? -88.0f : x;  // -88 leaves 2^-127, which becomes a zero
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
  int32_t exponent;
  std::memcpy(&exponent, &shifted, sizeof exponent);
  exponent = static_cast<int32_t>((static_cast<uint32_t>(exponent) - 0x4B400000u + 127u) << 23);
  float power;
  std::memcpy(&power, &exponent, sizeof power);
  return p * power;
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

}  // namespace toolx
