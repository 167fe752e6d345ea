"""Configs of models by name, without loading weights."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from transformers import AutoConfig, PreTrainedConfig

from toolx_kernels.errors import LOADING_ERRORS, InputError, first_line
from toolx_kernels.models.adapters import base_of
from toolx_kernels.models.load import SMOLLM2, latest_checkpoint
from toolx_kernels.models.tiny import is_tiny, tiny_config, tiny_tokenizer

SMOLLM2_SHAPE = dict(
    vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
    num_key_value_heads=3, max_position_embeddings=8192, tie_word_embeddings=True,
)  # fmt: skip


def config_of(name: str) -> PreTrainedConfig:
    """The config of the model called ``name``, as ``load_model`` takes it.

    Raises:
        InputError: nothing of that name has a config that can be read.
    """
    if is_tiny(name):
        return tiny_config(tiny_tokenizer())
    if name == SMOLLM2:
        return AutoConfig.for_model("llama", **SMOLLM2_SHAPE)
    path = Path(name)
    source: Path | str
    if name.endswith(".gguf"):
        if not path.is_file():
            raise InputError(f"There is no file {name}: give the path of a .gguf file.")
        if importlib.util.find_spec("gguf") is None:
            raise InputError(f"Reading {path.name} needs gguf: pip install 'toolx_kernels[models]'.")
        source, arguments = path.parent, {"gguf_file": path.name}
    elif path.is_dir():
        source, arguments = latest_checkpoint(path) or path, {}
        if (source / "adapter_config.json").is_file():
            return config_of(base_of(source))
    elif path.exists() or name.startswith((".", "/", "~")):
        raise InputError(f"{name} is not a model folder: give a folder, a .gguf file, a hub name, tiny or {SMOLLM2}.")
    else:
        source, arguments = name, {}
    try:
        return AutoConfig.from_pretrained(source, **arguments)
    except LOADING_ERRORS as error:
        raise InputError(
            f"The config of {name!r} cannot be read ({first_line(error)}): give tiny, {SMOLLM2}, a folder with a "
            "config.json, a .gguf file or a hub name."
        ) from error
