// What a kernel must know to be memory-safe, checked once per call. Messages are the user's to read.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <sstream>
#include <stdexcept>

namespace toolx {

using torch::stable::Tensor;

// Not STD_TORCH_CHECK: its message leads with this source file's path and line, which a user cannot use.
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

// The byte layout of one paged KV write. T tokens of `heads` rows of `row_bytes`, into `n_slots` cache slots.
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
  require(slots.scalar_type() == torch::headeronly::ScalarType::Long, "kv_write: slots must be int64.");
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

// Rows may be strided over tokens and heads (a slice of a fused QKV projection); within a row Dh must be dense.
inline Tensor with_dense_rows(const Tensor& t) {
  return t.stride(2) == 1 || t.size(2) == 1 ? t : torch::stable::contiguous(t);
}

}  // namespace toolx
