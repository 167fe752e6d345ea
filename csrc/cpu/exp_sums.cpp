#include "../checks.h"
#include "vector_math.h"

#include <algorithm>

namespace toolx {

namespace {

constexpr int64_t kBlock = 64;  // vocabulary entries summed separately, so that rounding errors stay small
constexpr int64_t kRows = 32;  // rows handled together
constexpr int64_t kElementsPerThread = 32 * 1024;

TOOLX_INLINE void store(float* to, float value) { *to = value; }

// Rounds to bf16, to nearest, ties to even. A NaN may become a number that is never used: the sums of its row are NaN.
TOOLX_INLINE void store(uint16_t* to, float value) {
  const uint32_t bits = as_bits(value);
  *to = static_cast<uint16_t>((bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16);
}

// For `n` <= kRows adjacent rows: out = exp(z - anchor), and its sums over the columns. z and out may be the same.
template <typename Out>
TOOLX_INLINE void exp_lanes(
    const float* z,
    int64_t z_stride,
    const float* anchor,
    Out* out,
    int64_t out_stride,
    int64_t n,
    int64_t columns,
    float* total,
    float* moment) {
  double whole[kRows] = {};  // in fp32, blocks after a very large exponential would be rounded away
  double whole_moment[kRows] = {};
  for (int64_t first = 0; first < columns; first += kBlock) {
    const int64_t last = std::min(first + kBlock, columns);
    float totals[kRows] = {};
    float moments[kRows] = {};
    for (int64_t column = first; column < last; ++column) {
      const float* from = z + column * z_stride;
      Out* to = out + column * out_stride;
      for (int64_t lane = 0; lane < n; ++lane) {
        const float d = from[lane] - anchor[lane];
        const float bounded = d < -1e4f ? -1e4f : d;  // zero times -inf would be NaN
        const float e = exp_of(bounded);
        totals[lane] += e;
        moments[lane] += e * bounded;
        store(to + lane, e);
      }
    }
    for (int64_t lane = 0; lane < n; ++lane) {
      whole[lane] += totals[lane];
      whole_moment[lane] += moments[lane];
    }
  }
  for (int64_t lane = 0; lane < n; ++lane) {
    total[lane] += static_cast<float>(whole[lane]);
    moment[lane] += static_cast<float>(whole_moment[lane]);
  }
}

template <typename Out>
TOOLX_INLINE void exp_rows(
    const float* z,
    int64_t z_stride,
    const float* anchor,
    Out* out,
    int64_t out_stride,
    int64_t rows,
    int64_t columns,
    float* total,
    float* moment) {
  int64_t row = 0;
  for (; row + kRows <= rows; row += kRows) {  // a constant count lets the compiler keep the lanes in registers
    exp_lanes(
        z + row, z_stride, anchor + row, out + row, out_stride, kRows, columns, total + row, moment + row);
  }
  if (row < rows) {
    exp_lanes(
        z + row, z_stride, anchor + row, out + row, out_stride, rows - row, columns, total + row, moment + row);
  }
}

}  // namespace

// z (N, C) fp32; anchor (N) fp32; out (N, C) fp32 or bf16, may be z; sums (2, N) fp32, added to. z and out are
// column-major, as the GEMM that fills z writes them fastest.
void exp_sums_cpu(Tensor z, Tensor anchor, Tensor out, Tensor sums) {
  const int64_t rows = z.dim() == 2 ? z.size(0) : -1;
  const int64_t columns = z.dim() == 2 ? z.size(1) : -1;
  require(
      z.dim() == 2 && out.dim() == 2 && out.size(0) == rows && out.size(1) == columns && anchor.dim() == 1 &&
          anchor.size(0) == rows && sums.dim() == 2 && sums.size(0) == 2 && sums.size(1) == rows,
      "exp_sums: z and out must be (N, C), anchor (N) and sums (2, N).");
  require(
      z.scalar_type() == ScalarType::Float && anchor.scalar_type() == ScalarType::Float &&
          sums.scalar_type() == ScalarType::Float &&
          (out.scalar_type() == ScalarType::Float || out.scalar_type() == ScalarType::BFloat16),
      "exp_sums: z, anchor and sums must be fp32, out fp32 or bf16.");
  require(
      (rows <= 1 || (z.stride(0) == 1 && out.stride(0) == 1)) && anchor.is_contiguous() && sums.is_contiguous(),
      "exp_sums: columns of z and out, anchor and sums must be contiguous.");
  if (rows == 0 || columns == 0) {
    return;
  }
  const float* const logits = z.const_data_ptr<float>();
  const float* const anchors = anchor.const_data_ptr<float>();
  float* const totals = sums.mutable_data_ptr<float>();
  const int64_t zs = z.stride(1);
  const int64_t os = out.stride(1);
  const int64_t groups = (rows + kRows - 1) / kRows;
  const int64_t grain = std::max<int64_t>(1, kElementsPerThread / (columns * kRows));
  const int best = best_lanes();
  const auto write = [&](auto* results) {
    torch::stable::parallel_for(0, groups, grain, [&](int64_t begin, int64_t end) {
      const int64_t first = begin * kRows;
      const int64_t n = std::min(end * kRows, rows) - first;
      float* const total = totals + first;
      for_lanes(best, [&](auto) TOOLX_INLINE_LAMBDA {
        exp_rows(logits + first, zs, anchors + first, results + first, os, n, columns, total, total + rows);
      });
    });
  };
  if (out.scalar_type() == ScalarType::Float) {
    write(out.mutable_data_ptr<float>());
  } else {
    write(static_cast<uint16_t*>(out.mutable_data_ptr()));
  }
}

}  // namespace toolx
