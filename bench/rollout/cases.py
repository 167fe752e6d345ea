"""Cases of the rollout benchmark, and the floor of one decode step.

A case is n samples of each prompt at temperature 1 from one model, without stop tokens, so that all engines make the
same number of tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel, Qwen2Config

from bench.common.tables import DTYPES
from toolx_kernels.models.load import load_model
from toolx_kernels.models.shape import cache_shape

BANDWIDTH_BYTES = 2**30  # far more than any cache holds
QWEN2 = dict(vocab_size=151_936, num_key_value_heads=2, max_position_embeddings=32_768, tie_word_embeddings=True)
SHAPES = {  # Qwen2.5 with random weights: speed does not depend on their values
    "qwen2.5-0.5b-shape": dict(
        hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14, **QWEN2
    ),
    "qwen2.5-1.5b-shape": dict(
        hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12, **QWEN2
    ),
    "qwen2.5-3b-shape": dict(
        hidden_size=2048, intermediate_size=11_008, num_hidden_layers=36, num_attention_heads=16, **QWEN2
    ),
}


@dataclass(frozen=True, slots=True)
class Case:
    """``n`` completions of ``new`` tokens for each of ``prompts`` prompts of about ``length`` tokens."""

    model: str  # a key of SHAPES, or a name that load_model knows
    prompts: int
    length: int
    n: int
    new: int
    dtype: str = "bfloat16"
    limit_s: float = 300.0  # a provider that needs longer for one call is given up

    @property
    def rows(self) -> int:
        return self.prompts * self.n

    def __str__(self) -> str:
        return f"{self.model}-{self.prompts}x{self.length}-n{self.n}-new{self.new}-{DTYPES[self.dtype]}"


@lru_cache(maxsize=1)
def model_of(name: str, dtype: str, device: torch.device) -> PreTrainedModel:
    """The model in evaluation mode, without the stop tokens and sampling defaults that it may have come with."""
    if name in SHAPES:
        torch.manual_seed(0)
        with device:
            model = AutoModelForCausalLM.from_config(Qwen2Config(**SHAPES[name]), dtype=getattr(torch, dtype)).eval()
    else:
        model, _ = load_model(name, dtype, str(device))
    model.generation_config = GenerationConfig()
    return model


def make_prompts(case: Case, vocab_size: int, seed: int) -> list[list[int]]:
    """Random ids; the lengths spread by 4 % around ``case.length``, so that padding is part of the work."""
    g = torch.Generator().manual_seed(seed)
    spread = torch.linspace(0.96, 1.04, case.prompts) if case.prompts > 1 else [1.0]
    lengths = [max(1, round(case.length * float(part))) for part in spread]
    return [torch.randint(3, vocab_size, (length,), generator=g).tolist() for length in lengths]


def token_bytes(model: PreTrainedModel) -> int:
    """Bytes of one token's keys and values in all layers."""
    return 2 * math.prod(cache_shape(model.config)) * model.dtype.itemsize


class Floor:
    """The least work of one decode step of all rows: every linear layer once, and one read of the cache's bytes.

    The cache counts each shared prompt once and each row's own tokens, at the middle of the completion. Its bytes are
    charged at the bandwidth of a matrix-vector product that reads 1 GiB in the same process and round.
    """

    def __init__(self, model: PreTrainedModel, case: Case):
        self.weights = [m.weight for m in model.get_decoder().modules() if isinstance(m, torch.nn.Linear)]
        self.weights.append(model.get_output_embeddings().weight)
        self.inputs = {
            width: torch.randn(case.rows, width, device=model.device).to(model.dtype)
            for width in {weight.shape[1] for weight in self.weights}
        }
        self.weight_bytes = sum(weight.nbytes for weight in self.weights)
        tokens = case.prompts * case.length + case.rows * case.new / 2
        self.kv_bytes = round(tokens * token_bytes(model))
        side = math.isqrt(BANDWIDTH_BYTES // 4)
        self.matrix = torch.ones(side, side, device=model.device)
        self.gemms = _captured(self._gemms) if model.device.type == "cuda" else self._gemms

    @torch.no_grad()
    def _gemms(self) -> None:
        for weight in self.weights:
            F.linear(self.inputs[weight.shape[1]], weight)

    def read(self) -> Tensor:
        return self.matrix @ self.matrix[0]

    def bytes_per_second(self, read_s: float) -> float:
        return self.matrix.nbytes / read_s


def _captured(call: Callable[[], None]) -> Callable[[], None]:
    """``call`` as a CUDA graph, because a floor excludes launches."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay
