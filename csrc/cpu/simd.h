// SIMD code, written once and compiled for several instruction sets; the best one is selected at run time.
//
// A kernel is a template over L, the number of fp32 lanes in a vector, and is called by for_lanes. It and all that it
// calls must be TOOLX_INLINE: code that is not inlined is compiled for the baseline. compiled_for keeps a part of it
// out of line. Loops over elementary functions (vector_math.h) are vectorized by the compiler; explicit vectors are
// used where the compiler would keep the accumulators of a product in memory.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

#define TOOLX_INLINE inline TOOLX_INLINE_LAMBDA
#define TOOLX_INLINE_LAMBDA __attribute__((always_inline))

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__)
#define TOOLX_X86 1
#define TOOLX_TARGET(name) __attribute__((noinline, target(name)))
#else
#define TOOLX_TARGET(name) __attribute__((noinline))
#endif

#pragma GCC diagnostic ignored "-Wpsabi"  // about passing vectors, which never happens because all code is inlined

namespace toolx {

constexpr int kMostLanes = 16;

template <int L>
using Lanes = std::integral_constant<int, L>;

// The lanes of the processor's best instruction set: 16 with AVX-512, 8 with AVX2, else 4. ATEN_CPU_CAPABILITY
// ("default" or "avx2") limits it as it limits torch's own kernels.
inline int best_lanes() {
#ifdef TOOLX_X86
  const char* const given = std::getenv("ATEN_CPU_CAPABILITY");
  const std::string_view most = given == nullptr ? "" : given;
  if (most != "default" && most != "avx2" && __builtin_cpu_supports("x86-64-v4")) {
    return 16;
  }
  if (most != "default" && __builtin_cpu_supports("x86-64-v3")) {
    return 8;
  }
#endif
  return 4;
}

template <typename F>
TOOLX_TARGET("arch=x86-64-v4,prefer-vector-width=512") void compiled_for(Lanes<16> lanes, const F& f) {
  f(lanes);
}

template <typename F>
TOOLX_TARGET("arch=x86-64-v3") void compiled_for(Lanes<8> lanes, const F& f) {
  f(lanes);
}

template <typename F>
__attribute__((noinline)) void compiled_for(Lanes<4> lanes, const F& f) {
  f(lanes);
}

// Calls f(Lanes), a TOOLX_INLINE_LAMBDA, compiled for the instruction set with this number of lanes.
template <typename F>
void for_lanes(int lanes, const F& f) {
  switch (lanes) {
#ifdef TOOLX_X86
    case 16: return compiled_for(Lanes<16>{}, f);
    case 8: return compiled_for(Lanes<8>{}, f);
#endif
    default: return compiled_for(Lanes<4>{}, f);
  }
}

template <int L>
struct Of {
  typedef float Vector __attribute__((vector_size(L * sizeof(float)), aligned(sizeof(float)), may_alias));
  typedef uint32_t Bits __attribute__((vector_size(L * sizeof(uint32_t))));
  typedef int32_t Integers __attribute__((vector_size(L * sizeof(int32_t))));
};

template <int L>
using Vector = typename Of<L>::Vector;

template <int L>
TOOLX_INLINE const Vector<L>& vector_at(const float* p) {
  return *reinterpret_cast<const Vector<L>*>(p);
}

template <int L>
TOOLX_INLINE Vector<L>& vector_at(float* p) {
  return *reinterpret_cast<Vector<L>*>(p);
}

TOOLX_INLINE float as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

TOOLX_INLINE uint32_t as_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

TOOLX_INLINE float widen(float value) { return value; }

TOOLX_INLINE float widen(c10::BFloat16 value) { return as_float(static_cast<uint32_t>(value.x) << 16); }

TOOLX_INLINE float widen(c10::Half value) {
  const uint32_t magnitude = as_bits(as_float((value.x & 0x7FFFu) << 13) * 0x1p112f);
  const uint32_t special = (value.x & 0x7C00u) == 0x7C00u ? 0x7F800000u : 0u;
  return as_float(magnitude | special | (value.x & 0x8000u) << 16);
}

// Writes n numbers in fp32, then zeros up to `width`.
template <int L, typename Number>
TOOLX_INLINE void widen_row(const Number* from, int64_t n, int64_t width, float* to) {
  int64_t d = 0;
  if constexpr (std::is_same_v<Number, float>) {
    for (; d + L <= n; d += L) {  // compilers turn the loop below into a call
      vector_at<L>(to + d) = vector_at<L>(from + d);
    }
  }
  for (; d < n; ++d) {
    to[d] = widen(from[d]);
  }
  for (; d < width; ++d) {
    to[d] = 0.0f;
  }
}

// The first n of L numbers in fp32, then zeros.
template <int L, typename Number>
TOOLX_INLINE Vector<L> widen(const Number* from, int64_t n) {
  if (n >= L) {
    if constexpr (std::is_same_v<Number, float>) {
      return vector_at<L>(from);
    }
    float wide[L];
    widen_row<L>(from, L, L, wide);
    return vector_at<L>(wide);
  }
  Vector<L> wide = {};
  for (int64_t i = 0; i < n; ++i) {
    wide[i] = widen(from[i]);
  }
  return wide;
}

// Swaps the off-diagonal blocks of `Step` columns of two rows of a square.
template <int L, int Step, int... J>
TOOLX_INLINE void swap_blocks(Vector<L>& upper, Vector<L>& lower, std::integer_sequence<int, J...>) {
  const Vector<L> top = upper;
  const Vector<L> bottom = lower;
  upper = __builtin_shufflevector(top, bottom, (J & Step ? L + J - Step : J)...);
  lower = __builtin_shufflevector(top, bottom, (J & Step ? L + J : J + Step)...);
}

template <int L, int Step = 1>
TOOLX_INLINE void transpose(Vector<L>* square) {
  if constexpr (Step < L) {
#pragma GCC unroll 16
    for (int i = 0; i < L; ++i) {
      if (!(i & Step)) {
        swap_blocks<L, Step>(square[i], square[i + Step], std::make_integer_sequence<int, L>());
      }
    }
    transpose<L, 2 * Step>(square);
  }
}

template <int L, bool Largest, int Step, int... J>
TOOLX_INLINE float fold(const Vector<L>& v, std::integer_sequence<int, J...> lanes) {
  if constexpr (Step < L) {
    const Vector<L> other = __builtin_shufflevector(v, v, (J ^ Step)...);
    return fold<L, Largest, 2 * Step>(Largest ? (other > v ? other : v) : v + other, lanes);
  } else {
    return v[0];
  }
}

template <int L>
TOOLX_INLINE float largest_of(const Vector<L>& v) {
  return fold<L, true, 1>(v, std::make_integer_sequence<int, L>());
}

template <int L>
TOOLX_INLINE float sum_of(const Vector<L>& v) {
  return fold<L, false, 1>(v, std::make_integer_sequence<int, L>());
}

// c (rows, columns) = a (rows, depth) @ b (depth, columns) + keep (rows) * c; the last term is left out if `keep` is
// null. Strides are those of rows.
struct Matrices {
  const float* a;
  int64_t a_stride;
  const float* b;
  int64_t b_stride;
  float* c;
  int64_t c_stride, depth;
  const float* keep;
};

constexpr int kHigh = 6;  // rows of a that share a row of b: kHigh * kWide accumulators fit into the registers

template <int L>
constexpr int kWide = L == 16 ? 4 : 2;  // vectors

// The product for `Rows` rows and `Wide` vectors, accumulated in registers.
template <int L, int Wide, int Rows>
TOOLX_INLINE void multiply_registers(Matrices m) {
  Vector<L> sum[Rows][Wide];
#pragma GCC unroll 8
  for (int i = 0; i < Rows; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < Wide; ++j) {
      sum[i][j] = m.keep ? vector_at<L>(m.c + i * m.c_stride + j * L) * m.keep[i] : Vector<L>{};
    }
  }
  for (int64_t k = 0; k < m.depth; ++k, m.b += m.b_stride) {
    Vector<L> row[Wide];
#pragma GCC unroll 8
    for (int j = 0; j < Wide; ++j) {
      row[j] = vector_at<L>(m.b + j * L);
    }
#pragma GCC unroll 8
    for (int i = 0; i < Rows; ++i) {
      const float factor = m.a[i * m.a_stride + k];
#pragma GCC unroll 8
      for (int j = 0; j < Wide; ++j) {
        sum[i][j] += row[j] * factor;
      }
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < Rows; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < Wide; ++j) {
      vector_at<L>(m.c + i * m.c_stride + j * L) = sum[i][j];
    }
  }
}

template <int L, int Wide, int Rows = kHigh>
TOOLX_INLINE void multiply_columns(int64_t rows, Matrices m) {
  for (; rows >= Rows; rows -= Rows, m.a += Rows * m.a_stride, m.c += Rows * m.c_stride) {
    compiled_for(Lanes<L>(), [&](auto) TOOLX_INLINE_LAMBDA { multiply_registers<L, Wide, Rows>(m); });
    m.keep = m.keep ? m.keep + Rows : nullptr;
  }
  if constexpr (Rows > 1) {
    multiply_columns<L, Wide, Rows - 1>(rows, m);
  }
}

// No element of c depends on the other rows or columns.
template <int L, int Wide = kWide<L>>
TOOLX_INLINE void multiply(int64_t rows, int64_t vectors, Matrices m) {
  for (; vectors >= Wide; vectors -= Wide, m.b += Wide * L, m.c += Wide * L) {
    multiply_columns<L, Wide>(rows, m);
  }
  if constexpr (Wide > 1) {
    multiply<L, Wide / 2>(rows, vectors, m);
  }
}

// Zero-initialized floats, aligned to a cache line: a vector that crosses two cache lines costs two loads.
class Space {
 public:
  explicit Space(int64_t size) : size_(size), values_(size + kMostLanes) {}
  int64_t size() const { return size_; }
  float* begin() {
    const auto address = reinterpret_cast<uintptr_t>(values_.data());
    return values_.data() + (kMostLanes - address / sizeof(float) % kMostLanes) % kMostLanes;
  }

 private:
  int64_t size_;
  std::vector<float> values_;
};

}  // namespace toolx
