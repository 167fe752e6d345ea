"""Arguments of the trainer: a check of their types before any work is done."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from toolx_kernels.errors import InputError, name_of, short
from toolx_kernels.models.adopt import unwrapped
from toolx_kernels.toolcall.datasets.containers import has_splits
from toolx_kernels.toolcall.rows import Row
from toolx_kernels.train.config import ToolExpanderConfig
from toolx_kernels.train.reward_process import RewardProcess

# attributes that the trainer uses of its other arguments
PARTS = {
    "cold_start": ("__next__",),
    "hard_sample_policy": ("start_round", "groups", "retry", "needs_probe"),
    "prompt_order": ("rows", "candidates", "keeps", "max_batches"),
    "group_selector": ("__call__",),
    "advantage_shaper": ("__call__",),
    "policy_loss": ("denominator", "__call__"),
}


def check_arguments(
    model: Any,
    reward_funcs: Any,
    args: Any,
    train_dataset: Any,
    eval_dataset: Any,
    processing_class: Any,
    **others: Any,
) -> None:
    """Raises InputError for the first argument of ``ToolExpanderTrainer`` that has the wrong type, with the remedy;
    ``others`` are ``demonstrations`` and those of ``PARTS``."""
    _check_args(args)
    _check_rewards(reward_funcs, args)
    _check_model(model)
    _check_tokenizer(processing_class, named=isinstance(model, str | os.PathLike))
    _check_rows("train_dataset", train_dataset)
    if eval_dataset is not None:
        _check_rows("eval_dataset", eval_dataset)
    elif args is not None:
        for name in ("eval_steps", "eval_rows", "eval_dataset"):
            if value := getattr(args, name):
                raise InputError(
                    f"{name}={value} has nothing to evaluate: pass the argument eval_dataset, or leave it out."
                )
    demonstrations = others["demonstrations"]
    if not isinstance(demonstrations, list | tuple) or not all(isinstance(row, Row) for row in demonstrations):
        raise InputError(f"demonstrations is {_described(demonstrations)}: pass a list of rows (rows_from makes them).")
    for name, needed in PARTS.items():
        part = others[name]
        if missing := [attribute for attribute in needed if part is not None and not hasattr(part, attribute)]:
            raise InputError(f"{name} is {_described(part)}, which has no {missing[0]}: see ToolExpanderTrainer.")


def _check_args(args: Any) -> None:
    if args is None:
        return
    if isinstance(args, ToolExpanderConfig):
        replace(args)  # checks settings that were changed since the config was made
        return
    remedy = "pass a ToolExpanderConfig, whose settings have TRL's names where TRL has one"
    if isinstance(args, dict):
        remedy = "pass ToolExpanderConfig(**args)"
    elif callable(args):
        remedy = "pass args=ToolExpanderConfig(...), and functions as reward_funcs"
    raise InputError(f"args is {_described(args)}: {remedy}.")


def _check_rewards(reward_funcs: Any, args: ToolExpanderConfig | None) -> None:
    """Refuses objects that RewardFunctions would call although they are no reward functions, or could not name."""
    if isinstance(reward_funcs, RewardProcess):
        return
    if args and args.reward_funcs and reward_funcs is not None:
        raise InputError(f"args.reward_funcs={args.reward_funcs} names reward functions too: choose one.")
    remedy = "pass a function of prompts, completions and completion_ids, or a list of such"
    for func in reward_funcs if isinstance(reward_funcs, list | tuple) else [reward_funcs]:
        if isinstance(func, ToolExpanderConfig):
            raise InputError(f"reward_funcs is {_described(func)}: pass that as args.")
        if isinstance(func, type | torch.nn.Module | str):
            raise InputError(f"reward_funcs has {_described(func)}: {remedy}.")


def _check_model(model: Any) -> None:
    remedy = "pass a transformers causal LM, or the name of one"
    if isinstance(model, str | os.PathLike):
        return
    inner = unwrapped(model)
    if hasattr(inner, "module") and isinstance(inner, torch.nn.Module) and not isinstance(inner, PreTrainedModel):
        remedy = "pass the wrapped model, its .module"
    elif hasattr(inner, "_orig_mod"):
        remedy = "pass the uncompiled model, its ._orig_mod, and torch_compile=True"
    if isinstance(inner, type) and hasattr(inner, "from_pretrained"):
        remedy = f"pass a model that {inner.__name__}.from_pretrained gives, or the name of one"
    if not isinstance(inner, PreTrainedModel):
        raise InputError(f"model is {_described(model)}: {remedy}.")
    if inner.config.is_encoder_decoder:
        raise InputError(f"model is {_described(model)}, an encoder-decoder: pass a causal LM.")
    if not inner.can_generate() or inner.get_output_embeddings() is None:
        raise InputError(
            f"model is {_described(model)}, which generates no text: load it with AutoModelForCausalLM instead."
        )
    if any(parameter.is_meta for parameter in inner.parameters()):
        raise InputError(f"model is {_described(model)} without weights (on the meta device): load its weights.")


def _check_tokenizer(tokenizer: Any, named: bool) -> None:
    if tokenizer is None and named:
        return
    remedy = "pass the model's tokenizer (AutoTokenizer.from_pretrained)"
    if isinstance(tokenizer, ProcessorMixin):
        remedy = "pass its .tokenizer"
    elif isinstance(tokenizer, str | os.PathLike):
        remedy = f"pass AutoTokenizer.from_pretrained({str(tokenizer)!r})"
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise InputError(f"processing_class is {_described(tokenizer)}: {remedy}.")


def _check_rows(name: str, rows: Any) -> None:
    remedy = "pass a list of rows or a datasets.Dataset (toolx_kernels.train.rows.load_rows gives both sets)"
    if isinstance(rows, str | os.PathLike):
        remedy = f"pass toolx_kernels.toolcall.read_dataset({str(rows)!r})"
    elif has_splits(rows):
        return
    elif isinstance(rows, Mapping):
        keys = ", ".join(map(str, list(rows)[:3]))
        remedy = f"pass a list of rows, or one of its parts ({keys})"
    elif not isinstance(rows, type) and (hasattr(rows, "__iter__") or hasattr(rows, "__getitem__")):
        if not (hasattr(rows, "__len__") and len(rows) == 0):
            return
        remedy = "pass at least one row" + ", or leave it out" * (name == "eval_dataset")
    raise InputError(f"{name} is {_described(rows)}: {remedy}.")


def _described(value: Any) -> str:
    """Describes a value for a message: "model is the number 3", "is the class LlamaForCausalLM"."""
    if value is None:
        return "None"
    if isinstance(value, type):
        return f"the class {value.__name__}"
    if isinstance(value, str | os.PathLike):
        return f"the text {short(str(value))}"
    if isinstance(value, bool | int | float):
        return f"the number {value}"
    if isinstance(value, list | tuple | dict) and not value:
        return f"an empty {type(value).__name__}"
    if callable(value) and (name := name_of(value)) != type(value).__name__:
        return f"the function {name}"
    return f"an object of {type(value).__name__}"
