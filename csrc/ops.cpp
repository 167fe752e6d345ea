// The compiled kernels behind the op names that toolx_kernels/_library.py defines.
#include <Python.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

namespace toolx {

using torch::stable::Tensor;

void kv_write_cpu(Tensor key, Tensor value, Tensor key_cache, Tensor value_cache, Tensor slots);
void exp_sums_cpu(Tensor z, Tensor anchor, Tensor out, Tensor sums);
#ifdef USE_CUDA
void kv_write_cuda(Tensor key, Tensor value, Tensor key_cache, Tensor value_cache, Tensor slots);
#endif

}  // namespace toolx

STABLE_TORCH_LIBRARY_IMPL(toolx, CPU, m) {
  m.impl("kv_write", TORCH_BOX(&toolx::kv_write_cpu));
  m.impl("exp_sums", TORCH_BOX(&toolx::exp_sums_cpu));
}

#ifdef USE_CUDA
STABLE_TORCH_LIBRARY_IMPL(toolx, CUDA, m) {
  m.impl("kv_write", TORCH_BOX(&toolx::kv_write_cuda));
}
#endif

// Importing the module is what runs the registrations above; it has nothing of its own.
PyMODINIT_FUNC PyInit__C() {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr};
  return PyModule_Create(&module);
}
