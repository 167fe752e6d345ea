"""Model configs by name, and models from configs, without loading weights."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from toolx_kernels.errors import LOADING_ERRORS, InputError, first_line
from toolx_kernels.models.load import SMOLLM2, base_source, naming_adapter, require_packages, resolve
from toolx_kernels.models.shape import SUPPORTED
from toolx_kernels.models.tiny import tiny_config, tiny_tokenizer

SMOLLM2_SHAPE = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}


def config_of(name: str) -> PreTrainedConfig:
    """The config of the model ``name``, a name as for ``load_model``.

    Raises:
        InputError: no config of that name can be read.
    """
    source = resolve(name)
    place, options = Path(source.place), {}
    if source.kind == "tiny":
        return tiny_config(tiny_tokenizer())
    if source.kind == "smollm2":
        return AutoConfig.for_model("llama", **SMOLLM2_SHAPE)
    if source.kind == "adapter":
        base = base_source(place)
        with naming_adapter(place, base):
            return config_of(base)
    if source.kind == "gguf":
        require_packages(place, "gguf")
        place, options = place.parent, {"gguf_file": place.name}
    try:
        return AutoConfig.from_pretrained(place, **options)
    except LOADING_ERRORS as error:
        raise InputError(
            f"The config of {name!r} cannot be read ({first_line(error)}): give tiny, {SMOLLM2}, a folder with a "
            "config.json, a .gguf file or a hub name."
        ) from error


def meta_model(config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The model of ``config`` on the meta device, in evaluation mode, with tied weights tied.

    Raises:
        InputError: transformers knows no causal LM of this config.
    """
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    except Exception as error:  # model code may raise anything
        raise InputError(
            f"No language model can be made from a {config.model_type} config ({first_line(error)}): {SUPPORTED}."
        ) from error
    for module in model.modules():  # within the context their factors are constant, and meta tensors cannot select them
        if getattr(module, "rope_type", None) in ("longrope", "dynamic"):
            module.rope_type = "default"
    return model
