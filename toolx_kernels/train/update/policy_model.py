"""The policy model: what is trained, loaded and with its adapter."""

from __future__ import annotations

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from toolx_kernels.errors import InputError
from toolx_kernels.models.adapters import add_adapter, has_adapter
from toolx_kernels.models.load import load_model
from toolx_kernels.train.config import ToolExpanderConfig


def policy_model(
    model: PreTrainedModel | str, tokenizer: PreTrainedTokenizerBase | None, args: ToolExpanderConfig
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model, loaded if it is a name, with a new adapter if that is to be trained, and its tokenizer.

    Raises:
        InputError: there is no tokenizer, or the model has an adapter already.
    """
    if isinstance(model, str):
        model, tokenizer = load_model(model, args.dtype, args.device, args.seed)
    if tokenizer is None:
        raise InputError("processing_class is missing: pass the model's tokenizer.")
    if has_adapter(model):
        raise InputError(
            f"The model {args.model or model.name_or_path} is an adapter on its base: name the base with use_peft, "
            "or merge the adapter into it first (peft's merge_and_unload)."
        )
    if args.use_peft:
        add_adapter(
            model,
            rank=args.lora_r,
            alpha=args.lora_alpha,
            target_modules=args.lora_target_modules,
            seed=args.seed,
            name=args.model,
        )
    return model.eval(), tokenizer
