// The paged attention of one block of queries.
#pragma once

#include "vector_math.h"

#include <algorithm>
#include <cmath>

namespace toolx::attention {

constexpr int64_t kTile = 64;     // cached tokens that are unpacked and multiplied together
constexpr int64_t kQueries = 48;  // queries of a block, so that the fp32 copies of a tile are used in many products

// One call. Strides are in elements. A query is a (token, head) pair; the `share` = H / Hkv heads of a token that read
// the same kv head have consecutive numbers: query i is head i % share of token i / share.
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

// Queries `first` to `first + count - 1` of one kv head over positions [begin, end) of their rows. Below `prefix` all
// of these rows have the same pages.
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

inline int64_t padded_dim(int64_t dim) { return (dim + kMostLanes - 1) / kMostLanes * kMostLanes; }

// The buffers of a thread, all fp32 and padded to whole vectors.
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

// Addresses of the keys and values of one kv head for `count` tokens of a row, rounded up to whole vectors. Tokens
// before `seen_from`, whose pages may be gone, and tokens past the end read zeros.
template <int L, typename Number>
TOOLX_INLINE void locate(
    const Call& call, int64_t row, int64_t kv_head, int64_t start, int64_t count, int64_t seen_from,
    const Scratch& scratch, const Number** keys, const Number** values) {
  const int32_t* const pages = call.table + row * call.table_stride;
  int64_t page = start / call.page_size;
  int64_t offset = start % call.page_size;
  for (int64_t t = 0; t < (count + L - 1) / L * L; ++t) {
    keys[t] = values[t] = reinterpret_cast<const Number*>(scratch.zeros);
    if (t < count) {
      if (start + t >= seen_from) {
        const int64_t place = ((pages[page] * call.page_size + offset) * call.kv_heads + kv_head) * call.dim;
        keys[t] = static_cast<const Number*>(call.key_cache) + place;
        values[t] = static_cast<const Number*>(call.value_cache) + place;
      }
      if (++offset == call.page_size) {
        offset = 0;
        ++page;
      }
    }
  }
}

// scratch.keys[d][t] = keys[t][d] for `count` tokens, a multiple of L
template <int L, typename Number>
TOOLX_INLINE void load_keys(const Number* const* keys, int64_t count, int64_t dim, const Scratch& scratch) {
  for (int64_t first = 0; first < count; first += L) {
    int64_t d = 0;
    Vector<L> square[L];
    if constexpr (std::is_same_v<Number, c10::BFloat16>) {
      // two neighbors fill one element of a vector, so there are half as many to transpose
      for (; d + 2 * L <= dim; d += 2 * L) {
#pragma GCC unroll 16
        for (int i = 0; i < L; ++i) {
          square[i] = vector_at<L>(reinterpret_cast<const float*>(keys[first + i] + d));
        }
        transpose<L>(square);
#pragma GCC unroll 16
        for (int i = 0; i < L; ++i) {
          const auto pair = reinterpret_cast<typename Of<L>::Bits>(square[i]);
          float* const to = scratch.keys + (d + 2 * i) * kTile + first;
          vector_at<L>(to) = reinterpret_cast<Vector<L>>(pair << 16);
          vector_at<L>(to + kTile) = reinterpret_cast<Vector<L>>(pair & 0xFFFF0000u);
        }
      }
    }
    for (; d < dim; d += L) {
#pragma GCC unroll 16
      for (int i = 0; i < L; ++i) {
        square[i] = widen<L>(keys[first + i] + d, dim - d);
      }
      transpose<L>(square);
#pragma GCC unroll 16
      for (int i = 0; i < L; ++i) {
        vector_at<L>(scratch.keys + (d + i) * kTile + first) = square[i];
      }
    }
  }
}

// The state of online softmax between tiles, for each query of a block.
struct Running {
  float largest[kQueries];  // score
  float total[kQueries];    // of the weights, which are relative to `largest`
  float keep[kQueries];     // factor that rescales earlier weights to the new largest score
  int64_t position[kQueries];
};

// Caps the scores of one query and masks all but [low, high). Returns the largest, -inf if none is left.
template <int L>
TOOLX_INLINE float settle_scores(float* scores, int64_t n, int64_t low, int64_t high, float softcap) {
  if (softcap > 0.0f) {
    const float inverse = 1.0f / softcap;
    for (int64_t t = 0; t < n; ++t) {
      scores[t] = softcap * tanh_of(scores[t] * inverse);
    }
  }
  for (int64_t t = 0; t < low && t < n; ++t) {
    scores[t] = -INFINITY;
  }
  for (int64_t t = std::max<int64_t>(high, 0); t < n; ++t) {
    scores[t] = -INFINITY;
  }
  Vector<L> peaks = vector_at<L>(scores);
  for (int64_t t = L; t < n; t += L) {
    const Vector<L> next = vector_at<L>(scores + t);
    peaks = next > peaks ? next : peaks;
  }
  return largest_of<L>(peaks);
}

// Turns the scores of queries `first` to `last - 1` at positions `start` to `start + count - 1` into weights.
template <int L>
TOOLX_INLINE void weigh(
    const Call& call, const Scratch& scratch, Running& run, int64_t first, int64_t last, int64_t start, int64_t count) {
  const int64_t n = (count + L - 1) / L * L;
  float peak[kQueries];
  for (int64_t i = first; i < last; ++i) {
    const int64_t high = std::min(run.position[i] + 1 - start, count);
    const int64_t low = call.window ? run.position[i] + 1 - call.window - start : 0;
    peak[i] = settle_scores<L>(scratch.scores + i * kTile, n, low, high, call.softcap);
  }
  for (int64_t i = first; i < last; ++i) {
    const float before = run.largest[i];
    const float now = peak[i] > before ? peak[i] : before;
    const float shrink = exp_of(before - now);
    run.keep[i] = now == before ? 1.0f : shrink;
    run.largest[i] = now;
  }
  for (int64_t i = first; i < last; ++i) {
    float* const scores = scratch.scores + i * kTile;
    const float largest = run.largest[i] == -INFINITY ? 0.0f : run.largest[i];  // a query may have seen nothing yet
    for (int64_t t = 0; t < n; ++t) {
      scores[t] = exp_of(scores[t] - largest);
    }
    Vector<L> total = {};
    for (int64_t t = 0; t < n; t += L) {
      total += vector_at<L>(scores + t);
    }
    run.total[i] = run.total[i] * run.keep[i] + sum_of<L>(total);
  }
}

// Attention of queries `first` to `last - 1` of a block over positions [begin, end) of one row's pages.
template <int L, typename Number>
TOOLX_INLINE void attend(
    const Call& call, const Scratch& scratch, Running& run, int64_t first, int64_t last, int64_t row, int64_t kv_head,
    int64_t begin, int64_t end) {
  const int64_t dim = call.dim;
  const int64_t padded = padded_dim(dim);
  int64_t oldest = run.position[first];
  int64_t newest = oldest;
  for (int64_t i = first + 1; i < last; ++i) {
    oldest = std::min(oldest, run.position[i]);
    newest = std::max(newest, run.position[i]);
  }
  end = std::min(end, newest + 1);
  const int64_t seen_from = call.window ? std::max<int64_t>(oldest - call.window + 1, 0) : 0;
  if (seen_from > begin) {
    begin += (seen_from - begin) / kTile * kTile;  // tiles start at the same positions whatever the window
  }
  for (int64_t start = begin; start < end; start += kTile) {
    const int64_t count = std::min(kTile, end - start);
    const int64_t vectors = (count + L - 1) / L;
    const Number* keys[kTile];
    const Number* values[kTile];
    locate<L>(call, row, kv_head, start, count, seen_from, scratch, keys, values);
    load_keys<L>(keys, vectors * L, dim, scratch);
    float* const scores = scratch.scores + first * kTile;
    float* const sums = scratch.sums + first * padded;
    multiply<L>(
        last - first, vectors,
        {scratch.queries + first * padded, padded, scratch.keys, kTile, scores, kTile, dim, nullptr});
    weigh<L>(call, scratch, run, first, last, start, count);
    for (int64_t t = 0; t < count; ++t) {
      widen_row<L>(values[t], dim, padded, scratch.values + t * padded);
    }
    multiply<L>(
        last - first, padded / L,
        {scores, kTile, scratch.values, padded, sums, padded, count, run.keep + first});
  }
}

template <int L, typename Number>
TOOLX_INLINE void attend_block(const Call& call, const Block& block, const Scratch& scratch) {
  const int64_t dim = call.dim;
  const int64_t padded = padded_dim(dim);
  Running run = {};
  int64_t row = block.first_row;
  int64_t oldest = 0;
  int64_t oldest_row = row;  // with a window, only this row is sure to still have all pages that the block sees
  for (int64_t i = 0; i < block.count; ++i) {
    const int64_t token = (block.first + i) / call.share;
    const int64_t head = block.kv_head * call.share + (block.first + i) % call.share;
    while (token >= call.bounds[row + 1]) {
      ++row;
    }
    run.largest[i] = -INFINITY;
    run.total[i] = 0.0f;
    run.position[i] = call.seq_lens[row] - call.bounds[row + 1] + token;
    if (run.position[i] < run.position[oldest]) {
      oldest = i;
      oldest_row = row;
    }
    const Number* const query =
        static_cast<const Number*>(call.query) + token * call.query_token_stride + head * call.query_head_stride;
    for (int64_t d = 0; d < dim; ++d) {
      scratch.queries[i * padded + d] = static_cast<float>(query[d]) * call.scale;
    }
    for (int64_t d = 0; d < padded; ++d) {
      scratch.sums[i * padded + d] = 0.0f;
    }
  }
  const auto over = [&](int64_t first, int64_t last, int64_t of_row, int64_t begin, int64_t end) TOOLX_INLINE_LAMBDA {
    compiled_for(Lanes<L>(), [&](auto) TOOLX_INLINE_LAMBDA {
      attend<L, Number>(call, scratch, run, first, last, of_row, block.kv_head, begin, end);
    });
  };
  if (block.begin < block.prefix) {
    over(0, block.count, oldest_row, block.begin, std::min(block.end, block.prefix));
  }
  const int64_t own = std::max(block.begin, block.prefix);
  row = block.first_row;
  for (int64_t first = 0; first < block.count; ++row) {
    const int64_t last = std::min(call.bounds[row + 1] * call.share - block.first, block.count);
    if (last > first) {
      over(first, last, row, own, std::min<int64_t>(block.end, call.seq_lens[row]));
      first = last;
    }
  }
  for (int64_t i = 0; i < block.count; ++i) {
    const float* const sums = scratch.sums + i * padded;
    if (block.partial) {
      float* const partial = block.partial + i * (dim + 2);
      partial[0] = run.largest[i];
      partial[1] = run.total[i];
      for (int64_t d = 0; d < dim; ++d) {
        partial[2 + d] = sums[d];
      }
      continue;
    }
    const int64_t token = (block.first + i) / call.share;
    const int64_t head = block.kv_head * call.share + (block.first + i) % call.share;
    Number* const out = static_cast<Number*>(call.out) + (token * call.heads + head) * dim;
    const float inverse = 1.0f / run.total[i];
    for (int64_t d = 0; d < dim; ++d) {
      out[d] = static_cast<Number>(sums[d] * inverse);
    }
  }
}

}  // namespace toolx::attention
