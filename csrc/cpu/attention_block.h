// The paged attention of one block of queries. No include guard: paged_attention.cpp includes this file once per
// instruction set, each time inside another namespace; see vector_tiles.h.
#include "vector_tiles.h"

// The keys and values of one kv head of `count` tokens of a row, up to a whole number of vectors of them. Tokens before
// `seen_from`, whose pages may be gone, and those past the end read as zeros.
template <typename Number>
inline void locate(const Call& call, int64_t row, int64_t kv_head, int64_t start, int64_t count, int64_t seen_from,
                   const Scratch& scratch, const Number** keys, const Number** values) {
  const int32_t* const pages = call.table + row * call.table_stride;
  int64_t page = start / call.page_size;
  int64_t offset = start % call.page_size;
  for (int64_t t = 0; t < (count + kLanes - 1) / kLanes * kLanes; ++t) {
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

// scratch.keys[d][t] = keys[t][d] for `count` tokens, a multiple of kLanes
template <typename Number>
inline void load_keys(const Number* const* keys, int64_t count, int64_t dim, const Scratch& scratch) {
  for (int64_t first = 0; first < count; first += kLanes) {
    int64_t d = 0;
    Vector square[kLanes];
    if constexpr (kPairs<Number>) {  // two neighbours fill one place of a vector: half as many to transpose
      for (; d + 2 * kLanes <= dim; d += 2 * kLanes) {
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) {
          square[i] = vector_at(reinterpret_cast<const float*>(keys[first + i] + d));
        }
        transpose<1>(square);
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) {
          const Bits pair = reinterpret_cast<Bits>(square[i]);
          float* const to = scratch.keys + (d + 2 * i) * kTile + first;
          vector_at(to) = reinterpret_cast<Vector>(pair << 16);
          vector_at(to + kTile) = reinterpret_cast<Vector>(pair & 0xFFFF0000u);
        }
      }
    }
    for (; d < dim; d += kLanes) {
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) {
        square[i] = d + kLanes <= dim ? widen(keys[first + i] + d) : widen_tail(keys[first + i] + d, dim - d);
      }
      transpose<1>(square);
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) {
        vector_at(scratch.keys + (d + i) * kTile + first) = square[i];
      }
    }
  }
}

template <typename Number>
inline void load_values(const Number* const* values, int64_t count, int64_t dim, const Scratch& scratch) {
  const int64_t padded = padded_dim(dim);
  for (int64_t t = 0; t < count; ++t) {
    float* const to = scratch.values + t * padded;
    int64_t d = 0;
    for (; d + kLanes <= dim; d += kLanes) {
      vector_at(to + d) = widen(values[t] + d);
    }
    if (d < dim) {
      vector_at(to + d) = widen_tail(values[t] + d, dim - d);
    }
  }
}

// What online softmax carries from tile to tile, for each query of a block.
struct Running {
  float largest[kQueries];  // score
  float total[kQueries];    // of the weights, which are relative to `largest`
  float keep[kQueries];     // what the next tile's larger scores leave of earlier weights
  int64_t position[kQueries];
};

// Caps and masks the scores of one query, of which [low, high) count. Returns the largest, -inf if none counts.
inline float settle_scores(float* scores, int64_t n, int64_t low, int64_t high, float softcap) {
  if (softcap > 0.0f) {
    const float inverse = 1.0f / softcap;
    for (int64_t t = 0; t < n; ++t) {
      scores[t] = softcap * tanh_of(scores[t] * inverse);
    }
  }
  for (int64_t t = 0; t < low && t < n; ++t) {
    scores[t] = -INFINITY;
  }
  for (int64_t t = most(high, 0); t < n; ++t) {
    scores[t] = -INFINITY;
  }
  Vector peaks = vector_at(scores);
  for (int64_t t = kLanes; t < n; t += kLanes) {
    const Vector next = vector_at(scores + t);
    peaks = next > peaks ? next : peaks;
  }
  return fold<true>(peaks);
}

// Turns the scores of queries `first` to `last` - 1 at the positions start to start + count - 1 into weights.
inline void weigh(
    const Call& call, const Scratch& scratch, Running& run, int64_t first, int64_t last, int64_t start, int64_t count) {
  const int64_t n = (count + kLanes - 1) / kLanes * kLanes;
  float peak[kQueries];
  for (int64_t i = first; i < last; ++i) {
    const int64_t high = least(run.position[i] + 1 - start, count);
    const int64_t low = call.window ? run.position[i] + 1 - call.window - start : 0;
    peak[i] = settle_scores(scratch.scores + i * kTile, n, low, high, call.softcap);
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
    Vector total = {};
    for (int64_t t = 0; t < n; t += kLanes) {
      total += vector_at(scores + t);
    }
    run.total[i] = run.total[i] * run.keep[i] + fold<false>(total);
  }
}

// Queries `first` to `last` - 1 of a block over the positions [begin, end) of one row's pages.
template <typename Number>
inline void attend(const Call& call, const Scratch& scratch, Running& run, int64_t first, int64_t last, int64_t row,
                   int64_t kv_head, int64_t begin, int64_t end) {
  const int64_t dim = call.dim;
  const int64_t padded = padded_dim(dim);
  int64_t oldest = run.position[first];
  int64_t newest = oldest;
  for (int64_t i = first + 1; i < last; ++i) {
    oldest = least(oldest, run.position[i]);
    newest = most(newest, run.position[i]);
  }
  end = least(end, newest + 1);
  const int64_t seen_from = call.window ? most(oldest - call.window + 1, 0) : 0;
  if (seen_from > begin) {
    begin += (seen_from - begin) / kTile * kTile;  // tiles start at the same positions whatever the window
  }
  for (int64_t start = begin; start < end; start += kTile) {
    const int64_t count = least(kTile, end - start);
    const int64_t vectors = (count + kLanes - 1) / kLanes;
    const Number* keys[kTile];
    const Number* values[kTile];
    locate(call, row, kv_head, start, count, seen_from, scratch, keys, values);
    load_keys(keys, vectors * kLanes, dim, scratch);
    float* const scores = scratch.scores + first * kTile;
    float* const sums = scratch.sums + first * padded;
    multiply(
        last - first, vectors, scratch.queries + first * padded, padded, scratch.keys, kTile, scores, kTile, dim,
        nullptr);
    weigh(call, scratch, run, first, last, start, count);
    load_values(values, count, dim, scratch);
    multiply(
        last - first, padded / kLanes, scores, kTile, scratch.values, padded, sums, padded, count, run.keep + first);
  }
}

template <typename Number>
void attend_block(const Call& call, const Block& block, const Scratch& scratch) {
  const int64_t dim = call.dim;
  const int64_t padded = padded_dim(dim);
  Running run = {};
  int64_t row = block.first_row;
  int64_t oldest = 0;
  int64_t oldest_row = row;  // with a window, it alone is sure to still have all the pages that the block sees
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
  if (block.begin < block.prefix) {
    attend<Number>(
        call, scratch, run, 0, block.count, oldest_row, block.kv_head, block.begin, least(block.end, block.prefix));
  }
  const int64_t own = most(block.begin, block.prefix);
  row = block.first_row;
  for (int64_t first = 0; first < block.count; ++row) {
    const int64_t last = least(call.bounds[row + 1] * call.share - block.first, block.count);
    if (last > first) {
      attend<Number>(
          call, scratch, run, first, last, row, block.kv_head, own, least(block.end, call.seq_lens[row]));
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
