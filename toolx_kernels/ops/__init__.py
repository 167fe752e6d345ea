"""The ops: one file each, from public function down to kernel. ``reference.py`` holds their definitions."""

from toolx_kernels.ops import advantages, attention, linear_grpo, sampling  # noqa: F401 (defines every op)
