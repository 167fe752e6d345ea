"""Configs of models by name, without loading weights."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoConfig, PreTrainedConfig

from toolx_kernels.errors import LOADING_ERRORS, InputError, first_line
from toolx_kernels.models.load import SMOLLM2, base_source, naming_adapter, require_packages, resolve
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
    """The config of the model called ``name``, as ``load_model`` takes it.

    Raises:
        InputError: nothing of that name has a config that can be read.
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
