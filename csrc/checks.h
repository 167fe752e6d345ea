// Checks that keep kernels memory-safe, once per call. Their messages are written for users.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <sstream>
#include <stdexcept>

namespace toolx {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Not STD_TORCH_CHECK: its message begins with the path and line of this source file, which do not help a user.
template <typename... Parts>
void require(bool ok, const Parts&... parts) {
  if (!ok) {
    std::ostringstream message;
    (message << ... << parts);
    throw std::runtime_error(message.str());
  }
}

inline bool same_device(const Tensor& a, const Tensor& b) {
  return a.is_cuda() == b.is_cuda() && a.get_device_index() == b.get_device_index();
}

// The byte layout of one paged KV write: `tokens` tokens of `heads` rows of `row_bytes`, into `n_slots` cache slots.
struct KvLayout {
  int64_t tokens;
  int64_t heads;
  int64_t row_bytes;
  int64_t n_slots;
};

// key, value (T, Hkv, Dh); key_cache, value_cache (pages, page_size, Hkv, Dh); slots (T) int64.
inline KvLayout check_kv_write(
    const Tensor& key,
    const Tensor& value,
    const Tensor& key_cache,
    const Tensor& value_cache,
    const Tensor& slots) {
  require(
      key.dim() == 3 && value.dim() == 3 && key_cache.dim() == 4 && value_cache.dim() == 4 && slots.dim() == 1,
      "kv_write: key and value must have 3 dimensions, the caches 4 and slots 1; got ", key.dim(), ", ", value.dim(),
      ", ", key_cache.dim(), ", ", value_cache.dim(), " and ", slots.dim(), ".");
  for (int64_t i = 0; i < 3; ++i) {
    require(
        key.size(i) == value.size(i), "kv_write: key and value differ in dimension ", i, ": ", key.size(i), " and ",
        value.size(i), ".");
  }
  for (int64_t i = 0; i < 4; ++i) {
    require(
        key_cache.size(i) == value_cache.size(i), "kv_write: key_cache and value_cache differ in dimension ", i, ": ",
        key_cache.size(i), " and ", value_cache.size(i), ".");
  }
  require(
      key.size(1) == key_cache.size(2) && key.size(2) == key_cache.size(3), "kv_write: a token has (", key.size(1),
      ", ", key.size(2), ") heads and head dim, the cache (", key_cache.size(2), ", ", key_cache.size(3), ").");
  require(
      slots.size(0) == key.size(0), "kv_write: ", key.size(0), " tokens need as many slots; got ", slots.size(0), ".");
  require(slots.scalar_type() == ScalarType::Long, "kv_write: slots must be int64.");
  require(
      key.scalar_type() == value.scalar_type() && key.scalar_type() == key_cache.scalar_type() &&
          key.scalar_type() == value_cache.scalar_type(),
      "kv_write: key, value and both caches must have one dtype: cast key and value to the dtype of the cache.");
  require(
      key_cache.is_contiguous() && value_cache.is_contiguous(),
      "kv_write: key_cache and value_cache must be contiguous, because they are written in place.");
  require(
      same_device(key, value) && same_device(key, key_cache) && same_device(key, value_cache) &&
          same_device(key, slots),
      "kv_write: key, value, both caches and slots must be on one device.");
  return {
      key.size(0), key.size(1), key.size(2) * static_cast<int64_t>(key.element_size()),
      key_cache.size(0) * key_cache.size(1)};
}

// Tokens and heads may be strided (a slice of a fused QKV projection); within a row Dh must be dense.
inline Tensor with_dense_rows(const Tensor& t) {
  return t.stride(2) == 1 || t.size(2) == 1 ? t : torch::stable::contiguous(t);
}

inline bool is_int32(const Tensor& t, int64_t dims) {
  return t.scalar_type() == ScalarType::Int && t.dim() == dims;
}

// query (T, H, Dh); caches (pages, page_size, Hkv, Dh); block_table (R, width), seq_lens (R), cu_seqlens_q (R + 1),
// cu_groups (G + 1) and prefix_lens (R) int32.
inline void check_paged_attention(
    const Tensor& query,
    const Tensor& key_cache,
    const Tensor& value_cache,
    const Tensor& block_table,
    const Tensor& seq_lens,
    const Tensor& cu_seqlens_q,
    const std::optional<Tensor>& cu_groups,
    const std::optional<Tensor>& prefix_lens,
    double softcap,
    int64_t window) {
  require(
      query.dim() == 3 && key_cache.dim() == 4 && value_cache.dim() == 4,
      "paged_attention: query must have 3 dimensions and the caches 4; got ", query.dim(), ", ", key_cache.dim(),
      " and ", value_cache.dim(), ".");
  for (int64_t i = 0; i < 4; ++i) {
    require(
        key_cache.size(i) == value_cache.size(i), "paged_attention: key_cache and value_cache differ in dimension ", i,
        ": ", key_cache.size(i), " and ", value_cache.size(i), ".");
  }
  require(
      query.size(2) == key_cache.size(3), "paged_attention: the query has head dim ", query.size(2),
      ", the caches have ", key_cache.size(3), ".");
  require(
      key_cache.size(2) > 0 && query.size(1) % key_cache.size(2) == 0, "paged_attention: ", query.size(1),
      " query heads cannot share ", key_cache.size(2), " key heads evenly.");
  require(key_cache.size(1) > 0, "paged_attention: a page of the caches must hold at least one token; got page size 0.");
  require(
      query.scalar_type() == key_cache.scalar_type() && query.scalar_type() == value_cache.scalar_type(),
      "paged_attention: query and both caches must have one dtype: cast the query to the dtype of the caches.");
  require(
      query.scalar_type() == ScalarType::Float || query.scalar_type() == ScalarType::BFloat16 ||
          query.scalar_type() == ScalarType::Half,
      "paged_attention: the compiled kernel takes fp32, bf16 and fp16; toolx_kernels.paged_attention takes float64 too.");
  require(
      key_cache.is_contiguous() && value_cache.is_contiguous(),
      "paged_attention: key_cache and value_cache must be contiguous.");
  require(
      is_int32(block_table, 2) && is_int32(seq_lens, 1) && is_int32(cu_seqlens_q, 1),
      "paged_attention: block_table (R, pages per row), seq_lens (R) and cu_seqlens_q (R + 1) must be int32.");
  const int64_t rows = seq_lens.size(0);
  require(
      block_table.size(0) == rows && cu_seqlens_q.size(0) == rows + 1, "paged_attention: ", rows,
      " seq_lens need as many rows of block_table and one more cu_seqlens_q; got ", block_table.size(0), " and ",
      cu_seqlens_q.size(0), ".");
  require(
      cu_groups.has_value() == prefix_lens.has_value(),
      "paged_attention: cu_groups and prefix_lens must be given together.");
  require(softcap >= 0 && window >= 0, "paged_attention: softcap and window must not be negative; got ", softcap,
          " and ", window, ".");
  bool one_device = same_device(query, key_cache) && same_device(query, value_cache) &&
      same_device(query, block_table) && same_device(query, seq_lens) && same_device(query, cu_seqlens_q);
  if (cu_groups.has_value()) {
    require(
        is_int32(*cu_groups, 1) && is_int32(*prefix_lens, 1) && cu_groups->size(0) > 0 && prefix_lens->size(0) == rows,
        "paged_attention: cu_groups (G + 1) and prefix_lens (R = ", rows, ") must be int32 of these sizes.");
    one_device = one_device && same_device(query, *cu_groups) && same_device(query, *prefix_lens);
  }
  require(one_device, "paged_attention: all tensors must be on one device.");
}

// The rows of a batch in host memory: the pages of each row and its queries.
struct PagedRows {
  int64_t rows;
  int64_t pages;
  int64_t page_size;
  const int32_t* table;  // (rows, table_width)
  int64_t table_width;
  const int32_t* seq_lens;
  const int32_t* bounds;  // (rows + 1)

  int64_t window;  // 0 for none

  int64_t queries(int64_t row) const { return bounds[row + 1] - bounds[row]; }

  int32_t page(int64_t row, int64_t i) const { return table[row * table_width + i]; }

  // The number of pages at the start of a row that its window no longer sees; they may belong to other rows by now.
  int64_t unseen(int64_t row) const {
    return window ? std::max<int64_t>(seq_lens[row] - queries(row) + 1 - window, 0) / page_size : 0;
  }
};

// Checks that everything that will be read is in the caches. Nothing is read of rows without queries.
inline void check_paged_rows(const PagedRows& r, int64_t tokens) {
  require(r.bounds[0] == 0, "paged_attention: cu_seqlens_q must start at 0; got ", r.bounds[0], ".");
  for (int64_t row = 0; row < r.rows; ++row) {
    const int64_t queries = r.queries(row);
    const int64_t length = r.seq_lens[row];
    require(
        queries >= 0, "paged_attention: cu_seqlens_q must not decrease; cu_seqlens_q[", row + 1, "] = ",
        r.bounds[row + 1], " follows ", r.bounds[row], ".");
    if (queries == 0) {
      continue;
    }
    require(
        length >= queries, "paged_attention: seq_lens[", row, "] = ", length, " must count the row's ", queries,
        " queries.");
    const int64_t used = (length + r.page_size - 1) / r.page_size;
    require(
        used <= r.table_width, "paged_attention: row ", row, " has ", length, " tokens on ", used,
        " pages, but block_table names ", r.table_width, " a row.");
    for (int64_t i = r.unseen(row); i < used; ++i) {
      require(
          r.page(row, i) >= 0 && r.page(row, i) < r.pages, "paged_attention: block_table[", row, ", ", i, "] = ", r.page(row, i),
          " is outside [0, ", r.pages, "): the cache has ", r.pages, " pages.");
    }
  }
  require(
      r.bounds[r.rows] == tokens, "paged_attention: cu_seqlens_q ends at ", r.bounds[r.rows], ", but there are ",
      tokens, " queries.");
}

// Checks that the rows of a group are adjacent and have the same pages for their prefix.
inline void check_groups(const PagedRows& r, const int32_t* groups, int64_t n_groups, const int32_t* prefix) {
  require(
      groups[0] == 0 && groups[n_groups] == r.rows, "paged_attention: cu_groups must run from 0 to the ", r.rows,
      " rows; got ", groups[0], " to ", groups[n_groups], ".");
  for (int64_t g = 0; g < n_groups; ++g) {
    require(
        groups[g] <= groups[g + 1] && groups[g + 1] <= r.rows, "paged_attention: cu_groups[", g + 1, "] = ",
        groups[g + 1], " must lie between ", groups[g], " and ", r.rows, ".");
    const int64_t first = groups[g];
    int64_t seen = -1;  // the first row with queries
    for (int64_t row = first; row < groups[g + 1]; ++row) {
      require(
          prefix[row] == prefix[first] && prefix[row] >= 0 && prefix[row] % r.page_size == 0,
          "paged_attention: prefix_lens[", row, "] = ", prefix[row], " must be a multiple of the page size ",
          r.page_size, " and equal within the group, whose first row has ", prefix[first], ".");
      require(
          r.queries(row) == 0 || prefix[row] <= r.seq_lens[row] - r.queries(row), "paged_attention: prefix_lens[", row,
          "] = ", prefix[row], " reaches beyond the row's first query at position ",
          r.seq_lens[row] - r.queries(row), ".");
      if (r.queries(row) == 0) {
        continue;
      }
      seen = seen < 0 ? row : seen;
      for (int64_t i = std::max(r.unseen(row), r.unseen(seen)); i < prefix[row] / r.page_size; ++i) {
        require(
            r.page(row, i) == r.page(seen, i), "paged_attention: rows ", seen, " and ", row,
            " of one group have different pages, ", r.page(seen, i), " and ", r.page(row, i), ", at place ", i,
            " of their prefix.");
      }
    }
  }
}

}  // namespace toolx
