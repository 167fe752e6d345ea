#include "../checks.h"
#include "simd.h"

#include <algorithm>
#include <atomic>

namespace toolx {

namespace {

constexpr int64_t kWordsPerThread = 64 * 1024;

// The sum of words times weights; it wraps around.
TOOLX_INLINE uint64_t weighted(const int32_t* words, const int32_t* weights, int64_t n) {
  uint64_t sum = 0;
  for (int64_t i = 0; i < n; ++i) {
    sum += static_cast<uint64_t>(static_cast<int64_t>(words[i]) * weights[i]);
  }
  return sum;
}

}  // namespace

// words (n) int32; columns (C) int32; rows (at least n / C) int64; out () int64.
void bit_sum_cpu(Tensor words, Tensor columns, Tensor rows, Tensor out) {
  require(
      words.dim() == 1 && columns.dim() == 1 && rows.dim() == 1 && out.numel() == 1 && columns.size(0) > 0 &&
          words.size(0) <= columns.size(0) * rows.size(0),
      "bit_sum: words, columns and rows must have one dimension, and a row weight for each row of words.");
  require(
      words.scalar_type() == ScalarType::Int && columns.scalar_type() == ScalarType::Int &&
          rows.scalar_type() == ScalarType::Long && out.scalar_type() == ScalarType::Long,
      "bit_sum: words and columns must be int32, rows and out int64.");
  require(
      words.is_contiguous() && columns.is_contiguous() && rows.is_contiguous(),
      "bit_sum: words, columns and rows must be contiguous.");
  const int32_t* const of_words = words.const_data_ptr<int32_t>();
  const int32_t* const of_columns = columns.const_data_ptr<int32_t>();
  const int64_t* const of_rows = rows.const_data_ptr<int64_t>();
  const int64_t n = words.size(0);
  const int64_t width = columns.size(0);
  const int64_t grain = std::max<int64_t>(1, kWordsPerThread / width);
  const int best = best_lanes();
  std::atomic<uint64_t> total{0};  // sums wrap around, so threads may add theirs in any order
  torch::stable::parallel_for(0, (n + width - 1) / width, grain, [&](int64_t begin, int64_t end) {
    uint64_t part = 0;
    for_lanes(best, [&](auto) TOOLX_INLINE_LAMBDA {
      for (int64_t row = begin; row < end; ++row) {
        const int64_t count = std::min(width, n - row * width);
        part += weighted(of_words + row * width, of_columns, count) * static_cast<uint64_t>(of_rows[row]);
      }
    });
    total.fetch_add(part, std::memory_order_relaxed);
  });
  *out.mutable_data_ptr<int64_t>() = static_cast<int64_t>(total.load());
}

}  // namespace toolx
