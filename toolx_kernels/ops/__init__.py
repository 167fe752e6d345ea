"""Ops by subject: the LM head, attention, and those that need neither. ``reference.py`` defines them."""

from toolx_kernels.ops import advantages  # noqa: F401 (defines every op)
from toolx_kernels.ops.attention import paged  # noqa: F401
from toolx_kernels.ops.lm_head import linear_grpo, sampling  # noqa: F401
