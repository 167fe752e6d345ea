"""Providers of rollouts: ours, transformers' two ways, vLLM, nano-vllm.

Peers run with their defaults unless a comment says why not. They return only tokens; ours also returns each token's
log-prob and entropy, and its time includes that.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence
from importlib.util import find_spec
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig, PreTrainedModel

from bench.common.absent import Absent
from bench.rollout.cases import Case, token_bytes
from toolx_kernels.engine import RolloutEngine, SamplingParams
from toolx_kernels.models.tiny import tiny_tokenizer

# transformers' names for sampling from the model's own distribution.
SAMPLING = dict(do_sample=True, temperature=1.0, top_k=0, top_p=1.0)


class RolloutProvider:
    """One way of sampling. ``kv_bytes`` is the peak of KV memory in use, if the provider reports it."""

    name: str
    package: str | None = None  # what to install
    own_pool = False  # whether it reserves memory up front, so that its peak says nothing about the work
    kv_bytes: int | None = None
    note = ""

    def __init__(self, model: PreTrainedModel, case: Case):
        """Imports and loads what the provider needs. Raises Absent or ImportError."""
        self.model, self.case = model, case

    def generate(self, prompts: Sequence[Sequence[int]], new: int) -> list[list[int]]:
        """``case.n`` completions of each prompt, ``new`` tokens each; fewer or shorter ones if time ran out."""
        raise NotImplementedError

    def close(self) -> None:
        """Frees the memory that is held between calls."""


class Toolx(RolloutProvider):
    name = "toolx"

    def __init__(self, model, case):
        super().__init__(model, case)
        self.engine = RolloutEngine(model)

    def generate(self, prompts, new):
        groups = self.engine.generate(prompts, self.case.n, SamplingParams(max_new_tokens=new))
        pool = self.engine.pool
        self.kv_bytes = pool.peak * pool.page_size * token_bytes(self.model)
        if self.model.device.type == "cuda":
            self.note = f"CUDA graphs: {len(self.engine.runner.graphs)}"
        return [completion.ids for group in groups for completion in group.completions]


class ToolxCompiled(Toolx):
    name = "toolx, compiled"

    def __init__(self, model, case):
        super().__init__(model, case)
        self.engine = RolloutEngine(model, compile=True)


class HFGenerate(RolloutProvider):
    """Every sample is a separate row from the start, so each prompt is prefilled n times."""

    name = "HF generate"
    package = "transformers"

    def __init__(self, model, case):
        super().__init__(model, case)
        self.prompts_at_once = case.prompts
        self.kv_bytes = 0

    def generate(self, prompts, new):
        started = time.perf_counter()
        completions: list[list[int]] = []
        while len(completions) < len(prompts) * self.case.n:
            at = len(completions) // self.case.n
            left = self.case.limit_s - (time.perf_counter() - started)
            try:
                completions += self.batch(prompts[at : at + self.prompts_at_once], new, left)
            except torch.OutOfMemoryError:
                if self.prompts_at_once == 1:
                    raise
                self.prompts_at_once = math.ceil(self.prompts_at_once / 2)
                self.note = f"prompts at once, because of memory: {self.prompts_at_once}"
        return completions

    def batch(self, prompts, new: int, seconds: float) -> list[list[int]]:
        width, device = max(map(len, prompts)), self.model.device
        mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts], device=device)
        ids = torch.tensor([[0] * (width - len(ids)) + ids for ids in prompts], device=device)
        output = self.model.generate(
            ids,
            attention_mask=mask,
            generation_config=GenerationConfig(
                **SAMPLING,
                max_new_tokens=new,
                max_time=seconds,
                num_return_sequences=self.case.n,
                pad_token_id=0,
                return_dict_in_generate=True,
            ),
        )
        kept = sum(layer.keys.nbytes + layer.values.nbytes for layer in output.past_key_values.layers)
        self.kv_bytes = max(self.kv_bytes, kept)
        return output.sequences[:, width:].tolist()


class TransformersBatching(RolloutProvider):
    """transformers' paged engine: prefills a prompt once and forks it, which shares its full pages of 256 tokens."""

    name = "transformers continuous batching"
    package = "transformers"

    def __init__(self, model, case):
        super().__init__(model, case)
        # Its errors are not logged, because the report names them as the reason why it is absent.
        logging.getLogger("ContinuousBatchingLogger").setLevel(logging.CRITICAL)

    def settings(self) -> dict:
        block = ContinuousBatchingConfig().block_size
        # By default it takes nine tenths of the memory. This much is enough for every row even if nothing is shared.
        blocks = self.case.rows * math.ceil((1.04 * self.case.length + self.case.new) / block)
        # Without flash-attn it builds masks of (batch tokens, pool tokens): gigabytes at its default of 8,192.
        tokens = 8192 if self.flash else 2048
        return {
            "generation_config": GenerationConfig(**SAMPLING, num_return_sequences=self.case.n, eos_token_id=-1),
            "continuous_batching_config": ContinuousBatchingConfig(num_blocks=blocks, max_batch_tokens=tokens),
        }

    @property
    def flash(self) -> bool:
        from transformers.utils.import_utils import is_flash_attn_2_available, is_flash_attn_3_available

        return any(
            is_here(kernels_fallback_ok=True) for is_here in (is_flash_attn_2_available, is_flash_attn_3_available)
        )

    def generate(self, prompts, new):
        # generate_batch does the same, but does not return the forks' tokens.
        started = time.perf_counter()
        completions: list[tuple[int, list[int]]] = []
        with self.model.continuous_batching_context_manager(persistent_manager=True, **self.settings()) as manager:
            self.note = f"attention: {self.model.config._attn_implementation}"
            order = manager.add_requests([list(ids) for ids in prompts], max_new_tokens=new)
            while len(completions) < len(prompts) * self.case.n:
                result = manager.get_result(timeout=1)
                if time.perf_counter() - started > self.case.limit_s:
                    manager.stop(hard_stop=True)  # otherwise the end of the block waits for the rest
                    break
                if result is None and not manager.is_running():
                    raise RuntimeError(f"its thread ended: {manager.background_thread_status.fatal_error}")
                if result is not None and result.error:
                    raise RuntimeError(result.error)
                if result is not None and result.is_finished():
                    parent = result.request_id.partition("__")[0]  # a fork is called <parent>__child#<number>
                    completions.append((order.index(parent), result.generated_tokens))
        return [tokens for _, tokens in sorted(completions)]

    def close(self):
        self.model.destroy_cached_continuous_batching_manager()


class FromFolder(RolloutProvider):
    """An engine that loads the model from a folder and keeps its own weights and pool on the GPU."""

    own_pool = True
    engine: Any

    def __init__(self, model, case):
        super().__init__(model, case)
        self.load()

    def load(self) -> None:
        raise NotImplementedError

    def start(self, engine: type, **options: object) -> Any:
        context = math.ceil(1.04 * self.case.length) + self.case.new + 1
        with TemporaryDirectory() as folder:
            self.model.save_pretrained(folder)
            tiny_tokenizer().save_pretrained(folder)  # required, although no text is used
            return engine(folder, max_model_len=context, max_num_seqs=self.case.rows, **options)

    def needed_bytes(self) -> int:
        """Bytes of the weights, each row's cache without sharing, and 4 GiB of working memory."""
        kv = self.case.rows * (self.case.length + self.case.new) * token_bytes(self.model)
        return sum(p.nbytes for p in self.model.parameters()) + round(1.2 * kv) + 4 * 2**30

    def close(self):
        del self.engine


class VLLM(FromFolder):
    name = "vLLM"
    package = "vllm"

    def load(self):
        from vllm import LLM, SamplingParams

        options: dict[str, object] = {}
        if self.model.device.type == "cuda":  # by default it would take nine tenths of the memory from the others
            options["gpu_memory_utilization"] = min(0.9, self.needed_bytes() / torch.cuda.mem_get_info()[1])
        options |= {"dtype": self.case.dtype, "enable_prefix_caching": True, "skip_tokenizer_init": True}
        self.engine = self.start(LLM, **options)
        self.params = SamplingParams

    def generate(self, prompts, new):
        params = self.params(n=self.case.n, temperature=1.0, max_tokens=new, ignore_eos=True, detokenize=False)
        requests = [{"prompt_token_ids": list(ids)} for ids in prompts]
        outputs = self.engine.generate(requests, params, use_tqdm=False)
        return [list(sample.token_ids) for output in outputs for sample in output.outputs]


class NanoVLLM(FromFolder):
    name = "nano-vllm"
    package = "nano-vllm"

    def load(self):
        if find_spec("nanovllm") is None:  # no package index has it under this name
            raise Absent("it is not installed: github.com/GeeeekExplorer/nano-vllm says how")
        from nanovllm import LLM, SamplingParams

        if self.model.device.type != "cuda":
            raise Absent("it needs a GPU")
        if self.model.config.model_type not in ("qwen2", "qwen3"):
            raise Absent(f"it runs Qwen models, not {self.model.config.model_type}")
        free, total = torch.cuda.mem_get_info()
        share = min(0.9, (total - free + self.needed_bytes()) / total)
        self.engine = self.start(LLM, gpu_memory_utilization=share)
        self.params = SamplingParams

    def generate(self, prompts, new):
        # It has no n: equal prompts share the full pages of the first one.
        requests = [list(ids) for ids in prompts for _ in range(self.case.n)]
        params = self.params(temperature=1.0, max_tokens=new, ignore_eos=True)
        return [output["token_ids"] for output in self.engine.generate(requests, params, use_tqdm=False)]

    def close(self):
        import atexit

        atexit.unregister(self.engine.exit)
        self.engine.exit()
        super().close()


PEERS = (HFGenerate, TransformersBatching, VLLM, NanoVLLM)
