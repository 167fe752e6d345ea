"""Adoption of LoRA adapters that the user made, with peft's ``get_peft_model`` or transformers' ``add_adapter``."""

from __future__ import annotations

import copy
from dataclasses import MISSING, fields
from typing import Any

import torch
from transformers import PreTrainedModel

from toolx_kernels.errors import InputError
from toolx_kernels.models.adapters import TRAINED, has_adapter, name_base, to_fp32
from toolx_kernels.models.peft_library import using_peft

ELSE = "pass the model without an adapter and set use_peft=True"
# fields of peft's LoraConfig that may have any value; all others must have their defaults
ANY_VALUE = {
    "task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "init_lora_weights",
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern",
}  # fmt: skip
# other initializations move a part of the base model's weights into the adapter, and no checkpoint holds the rest
INITS = (True, False, "gaussian", "orthogonal")


def is_peft_model(model: Any) -> bool:
    """Whether ``model`` is one of peft's wrappers around a model; does not import peft."""
    return any(kind.__module__.partition(".")[0] == "peft" for kind in type(model).__mro__)


def unwrapped(model: Any) -> Any:
    """The model inside peft's wrappers, or ``model`` itself."""
    while is_peft_model(model):
        model = model.get_base_model() if hasattr(model, "get_base_model") else model.model
    return model


def adopt_adapter(model: Any, name: str | None) -> PreTrainedModel:
    """The transformers model in ``model`` with the user's LoRA adapter, as ``add_adapter`` would have made it.

    A peft model is unwrapped. The result shares all modules with it, so the user's object sees the trained weights.
    Only the outermost object is a copy, which gets transformers' flag for an adapter; peft merges and saves the user's
    object, which stays without the flag. Dropout is off in evaluation mode, as for our own adapters.

    Args:
        model: with an adapter.
        name: of the base model, for ``load_model``, if neither transformers nor peft recorded one.

    Raises:
        InputError: the adapter is of a kind that cannot be trained here.
    """
    what = f"The {type(model).__name__} given as model"
    configs: dict[str, Any] = model.peft_config
    if list(configs) != [TRAINED]:
        names = ", ".join(map(repr, configs))
        raise InputError(
            f"{what} has the adapter{'s' * (len(configs) > 1)} {names}: give it a single one, called {TRAINED!r} "
            f"(peft's adapter_name), or {ELSE}."
        )
    [config] = configs.values()
    _check_config(what, config)
    base: PreTrainedModel = unwrapped(model)
    _check_layers(what, base, config)
    if not has_adapter(base):
        base = copy.copy(base)
        base._hf_peft_config_loaded = True
    to_fp32(base, TRAINED)
    name_base(base, name or config.base_model_name_or_path)
    return base


def adapter_settings(model: PreTrainedModel) -> dict[str, Any]:
    """The settings of a run that describe the model's adapter, as well as settings can; empty if it has none."""
    if not has_adapter(model):
        return {}
    config = model.peft_config[TRAINED]
    targets = [name for name, module in model.named_modules() if hasattr(module, "lora_A")]
    return {"use_peft": True, "lora_r": config.r, "lora_alpha": config.lora_alpha, "lora_target_modules": targets}


def _check_config(what: str, config: Any) -> None:
    with using_peft(what, f"{what} has an adapter that cannot be read", ELSE):
        from peft import LoraConfig
    kind = getattr(config.peft_type, "value", config.peft_type)
    if kind != "LORA":
        raise InputError(f"{what} has an adapter of the kind {kind}, but only LORA is supported: {ELSE}.")
    for field in fields(LoraConfig):
        value = getattr(config, field.name)
        default = field.default if field.default_factory is MISSING else field.default_factory()
        if field.name not in ANY_VALUE and value != default and (value or default):
            raise InputError(f"{what} has a LoRA adapter with {field.name}={value!r}, which is not supported: {ELSE}.")
    if config.init_lora_weights not in INITS:
        raise InputError(
            f"{what} has a LoRA adapter with init_lora_weights={config.init_lora_weights!r}, which changes the weights "
            f"under it: choose one of {', '.join(map(repr, INITS))}, or {ELSE}."
        )


def _check_layers(what: str, base: PreTrainedModel, config: Any) -> None:
    ends = (base.get_input_embeddings(), base.get_output_embeddings())
    layers = {name: module for name, module in base.named_modules() if hasattr(module, "lora_A")}
    if not layers:
        raise InputError(f"{what} no longer has an adapter: pass the model that peft's merge_and_unload returned.")
    with using_peft(what, f"{what} has an adapter that cannot be read", ELSE):
        from peft.tuners.tuners_utils import check_target_module_exists

        others = [name for name in layers if not check_target_module_exists(config, name)]
    if others:
        raise InputError(
            f"{what} has an adapter on {others[0]} that its config does not target: make one adapter of all "
            f"target_modules, not one around another, or {ELSE}."
        )
    for name, layer in layers.items():
        if layer in ends or not isinstance(layer.base_layer, torch.nn.Linear):
            raise InputError(
                f"{what} has an adapter on {name}: give it one on linear layers other than the head, or {ELSE}."
            )
        if layer.merged:
            raise InputError(f"{what} has its adapter merged into {name}: unmerge it (peft's unmerge_adapter).")
        if layer.disable_adapters or list(layer.active_adapters) != [TRAINED]:
            raise InputError(
                f"{what} has its adapter switched off: call enable_adapter_layers and set_adapter({TRAINED!r})."
            )
    trained = {name for name, parameter in base.named_parameters() if parameter.requires_grad}
    if not trained:
        raise InputError(f"{what} has an adapter without trainable weights: load it with is_trainable=True, or {ELSE}.")
    own = {f"{name}.lora_{part}.{TRAINED}.weight" for name in layers for part in ("A", "B", "magnitude_vector")}
    if others := sorted(trained - own):
        raise InputError(
            f"{what} has an adapter, but {others[0]} needs a gradient too: freeze it, because checkpoints of an "
            "adapter hold nothing else."
        )
