// Registration of the compiled kernels under the op names that toolx_kernels/ops/ defines.
#include <Python.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>

namespace toolx {

using torch::stable::Tensor;

void kv_write_cpu(Tensor key, Tensor value, Tensor key_cache, Tensor value_cache, Tensor slots);
void exp_sums_cpu(Tensor z, Tensor anchor, Tensor out, Tensor sums);
void bit_sum_cpu(Tensor words, Tensor columns, Tensor rows, Tensor out);
Tensor paged_attention_cpu(
    Tensor query, Tensor key_cache, Tensor value_cache, Tensor block_table, Tensor seq_lens, Tensor cu_seqlens_q,
    std::optional<Tensor> cu_groups, std::optional<Tensor> prefix_lens, int64_t max_queries, double scale,
    double softcap, int64_t window);
void sample_sweep_cpu(
    Tensor hidden, Tensor weight, std::optional<Tensor> streams, double temperature, std::optional<Tensor> bias,
    double softcap, Tensor tokens, Tensor stats, std::optional<Tensor> logits);
void add_gumbel_cpu(Tensor logits, Tensor streams);
#ifdef USE_CUDA
void kv_write_cuda(Tensor key, Tensor value, Tensor key_cache, Tensor value_cache, Tensor slots);
#endif

}  // namespace toolx

STABLE_TORCH_LIBRARY_IMPL(toolx, CPU, m) {
  m.impl("kv_write", TORCH_BOX(&toolx::kv_write_cpu));
  m.impl("exp_sums", TORCH_BOX(&toolx::exp_sums_cpu));
  m.impl("bit_sum", TORCH_BOX(&toolx::bit_sum_cpu));
  m.impl("paged_attention", TORCH_BOX(&toolx::paged_attention_cpu));
  m.impl("sample_sweep", TORCH_BOX(&toolx::sample_sweep_cpu));
  m.impl("add_gumbel", TORCH_BOX(&toolx::add_gumbel_cpu));
}

#ifdef USE_CUDA
STABLE_TORCH_LIBRARY_IMPL(toolx, CUDA, m) {
  m.impl("kv_write", TORCH_BOX(&toolx::kv_write_cuda));
}
#endif

// Importing the module runs the registrations above; the module itself is empty.
PyMODINIT_FUNC PyInit__C() {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr};
  return PyModule_Create(&module);
}
