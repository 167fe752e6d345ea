// The product of hidden and weight for a few rows: one pass over the weight, whose rows are widened to fp32 a few dozen
// at a time and multiplied by all rows of hidden. Every logit is summed in the same order, whatever the number of rows.
#pragma once

#include "../checks.h"
#include "simd.h"

#include <algorithm>
#include <utility>

namespace toolx {

namespace {

constexpr int64_t kChunk = 512;  // vocabulary entries of one unit of work
constexpr int64_t kStrip = 64;   // vocabulary entries widened at a time
constexpr int64_t kRows = 48;    // rows of hidden that share a widened strip
constexpr int64_t kDepth = 768;  // of D, so that a strip and kRows rows of hidden stay in the L2 cache

struct Product {
  const float* hidden;  // (parts of D, R, width), zero beyond D
  const void* weight;   // (V, D), rows `stride` elements apart
  ScalarType type;      // of the weight
  int64_t rows, vocab, dim, stride, parts, width;
};

// Adjacent pairs of each group of four lanes: (a0 + a2, b0 + b2, a1 + a3, b1 + b3).
template <int L, int... I>
TOOLX_INLINE Vector<L> fold_pairs(const Vector<L>& a, const Vector<L>& b, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(a, b, (I / 4 * 4 + I % 4 / 2 + I % 2 * L)...) +
      __builtin_shufflevector(a, b, (I / 4 * 4 + I % 4 / 2 + I % 2 * L + 2)...);
}

// The first and the last two lanes of each group of four: (a0 + a2, a1 + a3, b0 + b2, b1 + b3).
template <int L, int... I>
TOOLX_INLINE Vector<L> fold_halves(const Vector<L>& a, const Vector<L>& b, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(a, b, (I / 4 * 4 + I % 2 + I % 4 / 2 * L)...) +
      __builtin_shufflevector(a, b, (I / 4 * 4 + I % 2 + I % 4 / 2 * L + 2)...);
}

// The sum over all groups of four lanes.
template <int L, int group = 0>
TOOLX_INLINE Vector<4> fold_groups(const Vector<L>& a) {
  const Vector<4> one = __builtin_shufflevector(a, a, group, group + 1, group + 2, group + 3);
  if constexpr (group + 4 < L) {
    return fold_groups<L, group + 4>(a) + one;
  } else {
    return one;
  }
}

// z[r][t] = (or with `add`, +=) w[t] . h[r] for four rows of the weight and n rows of hidden, all `width` long.
template <int L, int n>
TOOLX_INLINE void dot(const float* w, const float* h, int64_t width, bool add, float* z) {
  Vector<L> sum[n][4] = {};
  for (int64_t d = 0; d < width; d += L) {
    Vector<L> x[4];
#pragma GCC unroll 4  // without it the vectors would be in memory
    for (int t = 0; t < 4; ++t) {
      x[t] = vector_at<L>(w + t * width + d);
    }
#pragma GCC unroll 6
    for (int r = 0; r < n; ++r) {
      const Vector<L> y = vector_at<L>(h + r * width + d);
#pragma GCC unroll 4
      for (int t = 0; t < 4; ++t) {
        sum[r][t] += x[t] * y;
      }
    }
  }
  for (int r = 0; r < n; ++r) {
    constexpr auto lanes = std::make_integer_sequence<int, L>();
    const Vector<L> left = fold_pairs<L>(sum[r][0], sum[r][1], lanes);
    const Vector<L> right = fold_pairs<L>(sum[r][2], sum[r][3], lanes);
    const Vector<4> whole = fold_groups<L>(fold_halves<L>(left, right, lanes));
    Vector<4>& out = vector_at<4>(z + r * kChunk);
    out = whole + (add ? out : Vector<4>{});
  }
}

// The most rows whose sums, with four vectors of the weight, fit into the registers.
template <int L>
constexpr int64_t kMost = L == 16 ? 6 : 2;

template <int L, int n = kMost<L>>
TOOLX_INLINE void dot_rows(int64_t rows, const float* w, const float* h, int64_t width, bool add, float* z) {
  if (rows == n) {
    dot<L, n>(w, h, width, add, z);
  } else if constexpr (n > 1) {
    dot_rows<L, n - 1>(rows, w, h, width, add, z);
  }
}

// Columns [start, start + n) of kStrip rows of the weight in fp32; zeros for rows past its last one.
template <int L>
TOOLX_INLINE void widen_strip(const Product& s, int64_t first, int64_t start, int64_t n, float* to) {
  for (int64_t t = 0; t < kStrip; ++t, to += s.width) {
    const int64_t at = (first + t) * s.stride + start;
    if (first + t >= s.vocab) {
      std::fill(to, to + s.width, 0.0f);
    } else if (s.type == ScalarType::Float) {
      widen_row<L>(static_cast<const float*>(s.weight) + at, n, s.width, to);
    } else if (s.type == ScalarType::BFloat16) {
      widen_row<L>(static_cast<const c10::BFloat16*>(s.weight) + at, n, s.width, to);
    } else {
      widen_row<L>(static_cast<const c10::Half*>(s.weight) + at, n, s.width, to);
    }
  }
}

// Prefetches four rows of the weight from `first` on, one strip before they are widened: share `part` of `parts` of
// their cache lines.
TOOLX_INLINE void prefetch_rows(const Product& s, int64_t first, int64_t part, int64_t parts) {
  const int64_t size = s.type == ScalarType::Float ? 4 : 2;
  const int64_t lines = (s.dim * size + 63) / 64;
  for (int64_t t = first; t < std::min(first + 4, s.vocab); ++t) {
    const char* const row = static_cast<const char*>(s.weight) + t * s.stride * size;
    for (int64_t line = lines * part / parts; line < lines * (part + 1) / parts; ++line) {
      __builtin_prefetch(row + line * 64, 0, 2);
    }
  }
}

// z (rows, kChunk): the logits of a chunk before bias, softcap and temperature.
template <int L>
TOOLX_INLINE void multiply(const Product& s, int64_t first, int64_t row, int64_t rows, float* strip, float* z) {
  const int64_t groups = (rows + kMost<L> - 1) / kMost<L>;
  for (int64_t at = first; at < std::min(first + kChunk, s.vocab); at += kStrip) {
    for (int64_t part = 0; part < s.parts; ++part) {
      const int64_t start = part * s.width;
      widen_strip<L>(s, at, start, std::min(s.width, s.dim - start), strip);
      for (int64_t group = 0; group < groups; ++group) {
        const int64_t from = rows * group / groups;
        const int64_t n = rows * (group + 1) / groups - from;
        const float* h = s.hidden + (part * s.rows + row + from) * s.width;
        for (int64_t t = 0; t < kStrip; t += 4) {
          prefetch_rows(s, at + kStrip + t, part * groups + group, s.parts * groups);
          dot_rows<L>(n, strip + t * s.width, h, s.width, part > 0, z + from * kChunk + at - first + t);
        }
      }
    }
  }
}

}  // namespace

}  // namespace toolx
