"""The policy model: the model to train, loaded, with its adapter and tokenizer."""

from __future__ import annotations

import os
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from toolx_kernels.errors import InputError
from toolx_kernels.models.adapters import add_adapter, has_adapter
from toolx_kernels.models.adopt import adopt_adapter
from toolx_kernels.models.load import check_tokenizer, load_model
from toolx_kernels.train.config import ToolExpanderConfig


def policy_model(
    model: Any, tokenizer: PreTrainedTokenizerBase | None, args: ToolExpanderConfig
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Returns the model to train (loaded if ``model`` is a name, with a new adapter if ``args.use_peft``) and its
    tokenizer.

    Args:
        model: a name, a transformers model, or one with a LoRA adapter (see ``adopt_adapter``).
        tokenizer: the model's; None: the one loaded with it.

    Raises:
        InputError: model and tokenizer do not fit together, no parameter needs a gradient, or the model has an adapter
            that cannot be trained here.
    """
    if isinstance(model, str | os.PathLike):
        name = os.fspath(model)
        model, loaded = load_model(name, args.dtype, args.device, args.seed)
        tokenizer = loaded if tokenizer is None else tokenizer
        if has_adapter(model):
            raise InputError(
                f"The model {name} is an adapter: name its base model with use_peft, or merge the adapter into the "
                "base first (peft's merge_and_unload)."
            )
    elif hasattr(model, "peft_config"):
        if args.use_peft:
            raise InputError(
                f"The {type(model).__name__} given as model already has an adapter: leave out use_peft=True to train "
                "that one."
            )
        model = adopt_adapter(model, args.model)
    assert tokenizer is not None  # see check_arguments
    check_tokenizer(model, tokenizer)
    if args.use_peft:
        add_adapter(
            model,
            rank=args.lora_r,
            alpha=args.lora_alpha,
            target_modules=args.lora_target_modules,
            seed=args.seed,
            name=args.model,
        )
    elif not any(parameter.requires_grad for parameter in model.parameters()):
        raise InputError(
            f"No parameter of the {type(model).__name__} given as model needs a gradient: call its "
            "requires_grad_(True), or pass use_peft=True."
        )
    return model.eval(), tokenizer
