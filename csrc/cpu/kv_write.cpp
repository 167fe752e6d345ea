#include "../checks.h"

#include <algorithm>
#include <cstring>

namespace toolx {

namespace {

// With fewer bytes per thread, waking it costs more than its share of the copy.
constexpr int64_t kBytesPerThread = 1024 * 1024;

// A byte view of key or value, and of the cache that it is copied to.
struct Copy {
  const char* source;
  int64_t token_stride;
  int64_t head_stride;
  char* cache;

  Copy(const Tensor& rows, const Tensor& cache_tensor)
      : source(static_cast<const char*>(rows.const_data_ptr())),
        token_stride(rows.stride(0) * static_cast<int64_t>(rows.element_size())),
        head_stride(rows.stride(1) * static_cast<int64_t>(rows.element_size())),
        cache(static_cast<char*>(cache_tensor.mutable_data_ptr())) {}

  void token(int64_t t, int64_t slot, int64_t first_head, int64_t last_head, const KvLayout& layout) const {
    const char* from = source + t * token_stride + first_head * head_stride;
    char* to = cache + (slot * layout.heads + first_head) * layout.row_bytes;
    if (head_stride == layout.row_bytes) {
      std::memcpy(to, from, (last_head - first_head) * layout.row_bytes);
      return;
    }
    for (int64_t head = first_head; head < last_head; ++head, from += head_stride, to += layout.row_bytes) {
      std::memcpy(to, from, layout.row_bytes);
    }
  }
};

}  // namespace

// All slots are checked before the first byte is written. Heads are distributed over threads, not tokens, so that of
// two tokens with the same slot the last wins, whatever the number of threads.
void kv_write_cpu(Tensor key, Tensor value, Tensor key_cache, Tensor value_cache, Tensor slots) {
  const KvLayout layout = check_kv_write(key, value, key_cache, value_cache, slots);
  const Tensor dense_slots = torch::stable::contiguous(slots);
  const int64_t* slot = dense_slots.const_data_ptr<int64_t>();
  for (int64_t t = 0; t < layout.tokens; ++t) {
    require(
        slot[t] >= -1 && slot[t] < layout.n_slots, "kv_write: slots[", t, "] = ", slot[t], " is outside [-1, ",
        layout.n_slots, "): the cache has ", layout.n_slots, " slots.");
  }
  if (layout.tokens == 0 || layout.heads == 0 || layout.row_bytes == 0) {
    return;
  }
  const Tensor keys = with_dense_rows(key);
  const Tensor values = with_dense_rows(value);
  const Copy copies[2] = {Copy(keys, key_cache), Copy(values, value_cache)};

  const int64_t bytes_per_lane = layout.tokens * layout.row_bytes;
  const int64_t grain = (kBytesPerThread + bytes_per_lane - 1) / bytes_per_lane;
  torch::stable::parallel_for(0, 2 * layout.heads, grain, [&](int64_t begin, int64_t end) {
    for (int64_t which = 0; which < 2; ++which) {
      const int64_t first = std::max(begin - which * layout.heads, int64_t{0});
      const int64_t last = std::min(end - which * layout.heads, layout.heads);
      if (first >= last) {
        continue;
      }
      for (int64_t t = 0; t < layout.tokens; ++t) {
        if (slot[t] >= 0) {
          copies[which].token(t, slot[t], first, last, layout);
        }
      }
    }
  });
}

}  // namespace toolx
