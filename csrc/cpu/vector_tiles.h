// Vectors, small matrix products and transposes for one instruction set. No include guard: attention_block.h includes
// this file once per instruction set, inside a namespace that defines kLanes (fp32 numbers in a vector) and kWide
// (vectors of an output row that are accumulated in registers at once).
//
// Vectors are spelled out, because what the compiler finds by itself keeps the accumulators of a product in memory.
// Nothing here or there may call a function template of the standard library: a copy compiled here for a newer
// processor could be the one that the linker keeps for all.

typedef float Vector __attribute__((vector_size(kLanes * sizeof(float)), aligned(sizeof(float)), may_alias));

typedef uint32_t Bits __attribute__((vector_size(kLanes * sizeof(uint32_t))));

TOOLX_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
TOOLX_INLINE int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
TOOLX_INLINE const Vector& vector_at(const float* p) { return *reinterpret_cast<const Vector*>(p); }
TOOLX_INLINE Vector& vector_at(float* p) { return *reinterpret_cast<Vector*>(p); }

// c (M, N vectors) = a (M, depth) @ b (depth, N vectors) + keep (M) * c, without the latter if `keep` is null.
template <int M, int N>
inline void multiply_registers(
    const float* a, int64_t a_stride, const float* b, int64_t b_stride, float* c, int64_t c_stride, int64_t depth,
    const float* keep) {
  Vector sum[M][N];
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) {
      sum[m][n] = keep ? vector_at(c + m * c_stride + n * kLanes) * keep[m] : Vector{};
    }
  }
  for (int64_t k = 0; k < depth; ++k, b += b_stride) {
    Vector row[N];
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) {
      row[n] = vector_at(b + n * kLanes);
    }
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      const float factor = a[m * a_stride + k];
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) {
        sum[m][n] += row[n] * factor;
      }
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) {
      vector_at(c + m * c_stride + n * kLanes) = sum[m][n];
    }
  }
}

constexpr int64_t kHigh = 6;  // rows of a that share a row of b: kHigh * kWide accumulators fit into the registers

template <int N>
inline void multiply_columns(
    int64_t rows, const float* a, int64_t a_stride, const float* b, int64_t b_stride, float* c, int64_t c_stride,
    int64_t depth, const float* keep) {
  for (; rows >= kHigh; rows -= kHigh, a += kHigh * a_stride, c += kHigh * c_stride) {
    multiply_registers<kHigh, N>(a, a_stride, b, b_stride, c, c_stride, depth, keep);
    keep = keep ? keep + kHigh : nullptr;
  }
  switch (rows) {
    case 1: return multiply_registers<1, N>(a, a_stride, b, b_stride, c, c_stride, depth, keep);
    case 2: return multiply_registers<2, N>(a, a_stride, b, b_stride, c, c_stride, depth, keep);
    case 3: return multiply_registers<3, N>(a, a_stride, b, b_stride, c, c_stride, depth, keep);
    case 4: return multiply_registers<4, N>(a, a_stride, b, b_stride, c, c_stride, depth, keep);
    case 5: return multiply_registers<5, N>(a, a_stride, b, b_stride, c, c_stride, depth, keep);
    default: return;
  }
}

// c (rows, vectors) = a (rows, depth) @ b (depth, vectors). A number of c depends on no other row or column.
inline void multiply(
    int64_t rows, int64_t vectors, const float* a, int64_t a_stride, const float* b, int64_t b_stride, float* c,
    int64_t c_stride, int64_t depth, const float* keep) {
  for (; vectors >= kWide; vectors -= kWide, b += kWide * kLanes, c += kWide * kLanes) {
    multiply_columns<kWide>(rows, a, a_stride, b, b_stride, c, c_stride, depth, keep);
  }
  if constexpr (kWide > 2) {
    if (vectors >= 2) {
      multiply_columns<2>(rows, a, a_stride, b, b_stride, c, c_stride, depth, keep);
      vectors -= 2, b += 2 * kLanes, c += 2 * kLanes;
    }
  }
  if (vectors) {
    multiply_columns<1>(rows, a, a_stride, b, b_stride, c, c_stride, depth, keep);
  }
}

// Of two rows of a square: swaps the off-diagonal blocks of `Step` columns.
template <int Step, int... J>
TOOLX_INLINE void swap_blocks(Vector& upper, Vector& lower, std::integer_sequence<int, J...>) {
  const Vector top = upper;
  const Vector bottom = lower;
  upper = __builtin_shufflevector(top, bottom, (J & Step ? kLanes + J - Step : J)...);
  lower = __builtin_shufflevector(top, bottom, (J & Step ? kLanes + J : J + Step)...);
}

template <int Step>
TOOLX_INLINE void transpose(Vector* square) {
  if constexpr (Step < kLanes) {
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) {
      if (!(i & Step)) {
        swap_blocks<Step>(square[i], square[i + Step], std::make_integer_sequence<int, kLanes>{});
      }
    }
    transpose<2 * Step>(square);
  }
}

template <bool Largest, int Step, int... J>
TOOLX_INLINE Vector fold(Vector v, std::integer_sequence<int, J...> lanes) {
  if constexpr (Step < kLanes) {
    const Vector other = __builtin_shufflevector(v, v, (J ^ Step)...);
    return fold<Largest, 2 * Step>(Largest ? (other > v ? other : v) : v + other, lanes);
  }
  return v;
}

template <bool Largest>
TOOLX_INLINE float fold(Vector v) {
  return fold<Largest, 1>(v, std::make_integer_sequence<int, kLanes>{})[0];
}

// kLanes numbers in fp32
TOOLX_INLINE Vector widen(const float* from) { return vector_at(from); }

TOOLX_INLINE Vector widen(const c10::BFloat16* from) {
  typedef uint16_t Words __attribute__((vector_size(kLanes * sizeof(uint16_t)), aligned(sizeof(uint16_t)), may_alias));
  return reinterpret_cast<Vector>(__builtin_convertvector(*reinterpret_cast<const Words*>(from), Bits) << 16);
}

TOOLX_INLINE Vector widen(const c10::Half* from) {
  Vector wide;
  for (int i = 0; i < kLanes; ++i) {
    wide[i] = static_cast<float>(from[i]);
  }
  return wide;
}

// the same of fewer numbers, followed by zeros
template <typename Number>
TOOLX_INLINE Vector widen_tail(const Number* from, int64_t n) {
  Vector wide = {};
  for (int64_t i = 0; i < n; ++i) {
    wide[i] = static_cast<float>(from[i]);
  }
  return wide;
}

template <typename Number>
constexpr bool kPairs = false;
template <>
constexpr bool kPairs<c10::BFloat16> = true;
