#include "../checks.h"
#include "attention_block.h"

#include <algorithm>
#include <atomic>
#include <optional>
#include <vector>

namespace toolx::attention {

namespace {

// Calls f with a number of that dtype.
template <typename F>
void for_dtype(ScalarType dtype, const F& f) {
  switch (dtype) {
    case ScalarType::Float: return f(0.0f);
    case ScalarType::Half: return f(c10::Half(0.0f));
    default: return f(c10::BFloat16(0.0f));
  }
}

// Rows with few queries over a long context would leave threads idle, so they are cut into pieces of this many
// positions. Only the row decides, so that no result depends on the rest of the batch or on the number of threads.
constexpr int64_t kPiece = 1024;
constexpr int64_t kFewQueries = 8;
constexpr int64_t kProductsPerThread = 1024 * 1024;  // with fewer, waking a thread costs more than it saves

// Calls f(0) to f(n - 1) in any order, on as many threads as `products` multiplications justify.
template <typename F>
void share_out(int64_t n, int64_t products, const F& f) {
  const int64_t worth = products / kProductsPerThread + 1;
  const int64_t threads = std::min({n, worth, static_cast<int64_t>(torch::stable::get_num_threads())});
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    for (int64_t i = next++; i < n; i = next++) {
      f(i);
    }
  });
}

// A thread keeps its buffers: they are so large that every new allocation would go to the operating system.
Scratch thread_scratch(int64_t dim) {
  thread_local Space memory(0);
  const int64_t padded = padded_dim(dim);
  if (memory.size() < Scratch::size(padded)) {
    memory = Space(Scratch::size(padded));
  }
  const Scratch scratch(memory.begin(), padded);
  std::fill_n(scratch.zeros, padded, 0.0f);  // a call with another head dim may have written there
  return scratch;
}

// The pieces of one block of queries, whose partial results are consecutive in memory.
struct Pieces {
  Block first;
  int64_t count;
};

// Adds the blocks of rows [begin, end), which share a prefix. Counts the floats of partial results without placing
// them. Returns the number of multiplications.
int64_t plan_group(
    const Call& call, int64_t begin, int64_t end, int64_t prefix, std::vector<Block>& blocks,
    std::vector<Pieces>& split, int64_t& partial_floats) {
  const int64_t tokens = call.bounds[end] - call.bounds[begin];
  if (tokens == 0) {
    return 0;
  }
  int64_t longest = 0;
  int64_t most_queries = 0;
  for (int64_t row = begin; row < end; ++row) {
    const int64_t queries = call.bounds[row + 1] - call.bounds[row];
    most_queries = std::max(most_queries, queries);
    longest = std::max<int64_t>(longest, queries ? call.seq_lens[row] : 0);
  }
  const int64_t pieces = most_queries <= kFewQueries ? (longest + kPiece - 1) / kPiece : 1;
  // Blocks of about equal size that end between tokens, unless the heads of one token exceed a block.
  const int64_t queries = tokens * call.share;
  const int64_t n_blocks = (queries + kQueries - 1) / kQueries;
  const int64_t tokens_per_block = std::min((tokens + n_blocks - 1) / n_blocks, kQueries / call.share);
  const int64_t step = tokens_per_block ? tokens_per_block * call.share : kQueries;
  const int64_t first = call.bounds[begin] * call.share;
  // The last queries see the most keys and come first: the smaller blocks after them even out the threads' work.
  for (int64_t offset = (queries - 1) / step * step; offset >= 0; offset -= step) {
    int64_t row = begin;
    while (call.bounds[row + 1] * call.share <= first + offset) {
      ++row;
    }
    const int64_t count = std::min(step, queries - offset);
    for (int64_t kv_head = 0; kv_head < call.kv_heads; ++kv_head) {
      Block block{row, first + offset, count, kv_head, 0, longest, prefix, nullptr};
      if (pieces == 1) {
        blocks.push_back(block);
        continue;
      }
      split.push_back({block, pieces});
      partial_floats += pieces * count * (call.dim + 2);
    }
  }
  return queries * call.kv_heads * longest * call.dim * 2;
}

// Sums the pieces of a split block, in order, into the first. The weights of a piece are relative to its own largest
// score.
void merge_pieces(const Call& call, const Pieces& pieces) {
  const int64_t stride = call.dim + 2;
  const int64_t size = pieces.first.count * stride;
  for (int64_t i = 0; i < pieces.first.count; ++i) {
    float* const merged = pieces.first.partial + i * stride;
    for (int64_t piece = 1; piece < pieces.count; ++piece) {
      const float* const other = merged + piece * size;
      const float largest = std::max(merged[0], other[0]);
      const float ours = merged[0] == largest ? 1.0f : exp_of(merged[0] - largest);
      const float theirs = other[0] == largest ? 1.0f : exp_of(other[0] - largest);
      merged[0] = largest;
      for (int64_t d = 1; d < stride; ++d) {
        merged[d] = merged[d] * ours + other[d] * theirs;
      }
    }
  }
}

template <typename Number>
void store_merged(const Call& call, const Block& block) {
  for (int64_t i = 0; i < block.count; ++i) {
    const float* const merged = block.partial + i * (call.dim + 2);
    const int64_t token = (block.first + i) / call.share;
    const int64_t head = block.kv_head * call.share + (block.first + i) % call.share;
    Number* const out = static_cast<Number*>(call.out) + (token * call.heads + head) * call.dim;
    for (int64_t d = 0; d < call.dim; ++d) {
      out[d] = static_cast<Number>(merged[2 + d] / merged[1]);
    }
  }
}

void run(const Call& call, const Tensor& query, ScalarType dtype, std::vector<Block>& blocks,
         std::vector<Pieces>& split, int64_t partial_floats, int64_t products) {
  Tensor workspace = torch::stable::new_empty(query, {partial_floats}, ScalarType::Float);
  float* partial = workspace.mutable_data_ptr<float>();
  for (Pieces& pieces : split) {
    pieces.first.partial = partial;
    for (int64_t piece = 0; piece < pieces.count; ++piece) {
      Block block = pieces.first;
      block.begin = piece * kPiece;
      block.end = std::min(block.begin + kPiece, block.end);
      block.partial = partial;
      partial += block.count * (call.dim + 2);
      blocks.push_back(block);
    }
  }
  const int best = best_lanes();
  for_dtype(dtype, [&](auto number) {
    using Number = decltype(number);
    share_out(static_cast<int64_t>(blocks.size()), products, [&](int64_t i) {
      const Scratch scratch = thread_scratch(call.dim);
      for_lanes(best, [&](auto lanes) TOOLX_INLINE_LAMBDA { attend_block<lanes, Number>(call, blocks[i], scratch); });
    });
    share_out(static_cast<int64_t>(split.size()), partial_floats, [&](int64_t i) {
      merge_pieces(call, split[i]);
      store_merged<Number>(call, split[i].first);
    });
  });
}

}  // namespace

}  // namespace toolx::attention

namespace toolx {

// See toolx_kernels/ops/attention/paged.py. Scores, weights and sums are fp32; the result is rounded once.
// `max_queries` is for kernels that cannot read the bounds.
Tensor paged_attention_cpu(
    Tensor query,
    Tensor key_cache,
    Tensor value_cache,
    Tensor block_table,
    Tensor seq_lens,
    Tensor cu_seqlens_q,
    std::optional<Tensor> cu_groups,
    std::optional<Tensor> prefix_lens,
    int64_t /*max_queries*/,
    double scale,
    double softcap,
    int64_t window) {
  using namespace attention;
  check_paged_attention(
      query, key_cache, value_cache, block_table, seq_lens, cu_seqlens_q, cu_groups, prefix_lens, softcap, window);
  Tensor out = torch::stable::new_empty(query, {query.size(0), query.size(1), query.size(2)});
  const int64_t rows = seq_lens.size(0);
  if (query.size(0) == 0 || query.size(1) == 0 || query.size(2) == 0) {
    return out;
  }
  const Tensor queries = with_dense_rows(query);
  const Tensor table = torch::stable::contiguous(block_table);
  const Tensor lengths = torch::stable::contiguous(seq_lens);
  const Tensor bounds = torch::stable::contiguous(cu_seqlens_q);
  const PagedRows paged{
      rows, key_cache.size(0), key_cache.size(1), table.const_data_ptr<int32_t>(), table.size(1),
      lengths.const_data_ptr<int32_t>(), bounds.const_data_ptr<int32_t>(), window};
  check_paged_rows(paged, query.size(0));

  const Call call{
      queries.const_data_ptr(), queries.stride(0), queries.stride(1), key_cache.const_data_ptr(),
      value_cache.const_data_ptr(), out.mutable_data_ptr(), query.size(1), key_cache.size(2),
      query.size(1) / key_cache.size(2), query.size(2), paged.page_size, paged.table, paged.table_width,
      paged.seq_lens, paged.bounds, static_cast<float>(scale), static_cast<float>(softcap), window};
  std::vector<Block> blocks;
  std::vector<Pieces> split;
  int64_t partial_floats = 0;
  int64_t products = 0;
  if (cu_groups.has_value()) {
    const Tensor group_bounds = torch::stable::contiguous(*cu_groups);
    const Tensor prefixes = torch::stable::contiguous(*prefix_lens);
    const int32_t* const groups = group_bounds.const_data_ptr<int32_t>();
    const int32_t* const prefix = prefixes.const_data_ptr<int32_t>();
    check_groups(paged, groups, group_bounds.size(0) - 1, prefix);
    for (int64_t g = 0; g + 1 < group_bounds.size(0); ++g) {
      if (groups[g] < groups[g + 1]) {
        products += plan_group(call, groups[g], groups[g + 1], prefix[groups[g]], blocks, split, partial_floats);
      }
    }
  } else {
    for (int64_t row = 0; row < rows; ++row) {
      products += plan_group(call, row, row + 1, 0, blocks, split, partial_floats);
    }
  }
  run(call, query, query.scalar_type(), blocks, split, partial_floats, products);
  return out;
}

}  // namespace toolx
