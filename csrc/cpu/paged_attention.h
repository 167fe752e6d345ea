// What the driver of the paged attention hands to its kernel, which is compiled once per instruction set.
#pragma once

#include <cstdint>

namespace toolx::attention {

constexpr int64_t kTile = 64;     // cached tokens that are unpacked and multiplied together
constexpr int64_t kQueries = 48;  // queries of a block, so that the fp32 copies of a tile serve many products
constexpr int64_t kMaxLanes = 16;

// One call. Strides are in elements. A query is a (token, head) pair; the `share` = H / Hkv heads of one token that
// read one kv head are numbered next to each other: query i is head i % share of token i / share.
struct Call {
  const void* query;
  int64_t query_token_stride;
  int64_t query_head_stride;
  const void* key_cache;
  const void* value_cache;
  void* out;  // (T, H, Dh), contiguous
  int64_t heads;
  int64_t kv_heads;
  int64_t share;
  int64_t dim;
  int64_t page_size;
  const int32_t* table;
  int64_t table_stride;
  const int32_t* seq_lens;
  const int32_t* bounds;  // cu_seqlens_q
  float scale;
  float softcap;
  int64_t window;
};

// Queries `first` to `first + count` - 1 of one kv head over positions [begin, end) of their rows. Below `prefix` all of
// these rows have the same pages.
struct Block {
  int64_t first_row;  // the row of the first query
  int64_t first;
  int64_t count;
  int64_t kv_head;
  int64_t begin;
  int64_t end;
  int64_t prefix;
  float* partial;  // (count, dim + 2): largest score, sum of weights, weighted sum of values; null writes to `out`
};

inline int64_t padded_dim(int64_t dim) { return (dim + kMaxLanes - 1) / kMaxLanes * kMaxLanes; }

// A thread's buffers, all fp32 and padded to whole vectors.
struct Scratch {
  float* queries;  // (kQueries, padded)
  float* sums;     // (kQueries, padded)
  float* scores;   // (kQueries, kTile), then the weights
  float* keys;     // (padded, kTile), transposed
  float* values;   // (kTile, padded)
  float* zeros;    // (padded)

  static int64_t size(int64_t padded) { return (2 * kQueries + 2 * kTile + 1) * padded + kQueries * kTile; }

  Scratch(float* memory, int64_t padded)
      : queries(memory),
        sums(queries + kQueries * padded),
        scores(sums + kQueries * padded),
        keys(scores + kQueries * kTile),
        values(keys + kTile * padded),
        zeros(values + kTile * padded) {}
};

}  // namespace toolx::attention
