#include "../checks.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

#include <cuda_runtime.h>

#include <algorithm>

namespace toolx {

namespace {

constexpr int kThreads = 128;
constexpr int64_t kMaxGrid = 2147483647;

// All lengths and strides are in units of Chunk, the widest word that divides every address.
template <typename Chunk>
struct Args {
  const Chunk* key;
  const Chunk* value;
  Chunk* key_cache;
  Chunk* value_cache;
  const int64_t* slots;
  int64_t tokens;
  int64_t n_slots;
  int64_t key_stride_t;
  int64_t key_stride_h;
  int64_t value_stride_t;
  int64_t value_stride_h;
  int row_chunks;
  int token_chunks;
};

// One block per token: the slot is read once, and neighboring threads copy neighboring words.
// A slot outside the cache is skipped, because a kernel cannot raise without stalling the stream.
template <typename Chunk>
__global__ void kv_write_kernel(Args<Chunk> a) {
  for (int64_t t = blockIdx.x; t < a.tokens; t += gridDim.x) {
    const int64_t slot = a.slots[t];
    if (slot < 0 || slot >= a.n_slots) {
      continue;
    }
    const int64_t to = slot * a.token_chunks;
    for (int i = threadIdx.x; i < a.token_chunks; i += blockDim.x) {
      const int head = i / a.row_chunks;
      const int chunk = i - head * a.row_chunks;
      a.key_cache[to + i] = a.key[t * a.key_stride_t + head * a.key_stride_h + chunk];
      a.value_cache[to + i] = a.value[t * a.value_stride_t + head * a.value_stride_h + chunk];
    }
  }
}

template <typename Chunk>
void launch(
    const Tensor& key,
    const Tensor& value,
    const Tensor& key_cache,
    const Tensor& value_cache,
    const Tensor& slots,
    const KvLayout& layout,
    cudaStream_t stream) {
  const int64_t width = sizeof(Chunk);
  const auto chunks = [&](int64_t elements) { return elements * static_cast<int64_t>(key.element_size()) / width; };
  Args<Chunk> args{
      static_cast<const Chunk*>(key.const_data_ptr()),
      static_cast<const Chunk*>(value.const_data_ptr()),
      static_cast<Chunk*>(key_cache.mutable_data_ptr()),
      static_cast<Chunk*>(value_cache.mutable_data_ptr()),
      slots.const_data_ptr<int64_t>(),
      layout.tokens,
      layout.n_slots,
      chunks(key.stride(0)),
      chunks(key.stride(1)),
      chunks(value.stride(0)),
      chunks(value.stride(1)),
      static_cast<int>(layout.row_bytes / width),
      static_cast<int>(layout.heads * layout.row_bytes / width)};
  const auto grid = static_cast<unsigned>(std::min(layout.tokens, kMaxGrid));
  kv_write_kernel<Chunk><<<grid, kThreads, 0, stream>>>(args);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

// The power of two, at most 16 bytes, that divides every base address, stride and row length.
int64_t common_width(const Tensor& key, const Tensor& value, const Tensor& key_cache, const Tensor& value_cache,
                     int64_t row_bytes) {
  auto bits = static_cast<uint64_t>(row_bytes) | 16;
  for (const Tensor* t : {&key, &value}) {
    bits |= reinterpret_cast<uintptr_t>(t->const_data_ptr());
    bits |= static_cast<uint64_t>(t->stride(0)) * t->element_size();
    bits |= static_cast<uint64_t>(t->stride(1)) * t->element_size();
  }
  for (const Tensor* t : {&key_cache, &value_cache}) {
    bits |= reinterpret_cast<uintptr_t>(t->const_data_ptr());
  }
  return static_cast<int64_t>(bits & (~bits + 1));
}

}  // namespace

// If two tokens have the same slot, either may win; out-of-range slots are skipped.
void kv_write_cuda(Tensor key, Tensor value, Tensor key_cache, Tensor value_cache, Tensor slots) {
  const KvLayout layout = check_kv_write(key, value, key_cache, value_cache, slots);
  if (layout.tokens == 0 || layout.heads == 0 || layout.row_bytes == 0) {
    return;
  }
  const torch::stable::accelerator::DeviceGuard guard(key.get_device_index());
  void* stream_ptr = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(key.get_device_index(), &stream_ptr));
  const auto stream = static_cast<cudaStream_t>(stream_ptr);

  const Tensor keys = with_dense_rows(key);
  const Tensor values = with_dense_rows(value);
  const Tensor dense_slots = torch::stable::contiguous(slots);
  switch (common_width(keys, values, key_cache, value_cache, layout.row_bytes)) {
    case 16: return launch<uint4>(keys, values, key_cache, value_cache, dense_slots, layout, stream);
    case 8: return launch<uint2>(keys, values, key_cache, value_cache, dense_slots, layout, stream);
    case 4: return launch<uint32_t>(keys, values, key_cache, value_cache, dense_slots, layout, stream);
    case 2: return launch<uint16_t>(keys, values, key_cache, value_cache, dense_slots, layout, stream);
    default: return launch<uint8_t>(keys, values, key_cache, value_cache, dense_slots, layout, stream);
  }
}

}  // namespace toolx
