"""What a plan needs to know of a model and its prompts, without reading a weight."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

from toolx_kernels.errors import LOADING_ERRORS, InputError, first_line
from toolx_kernels.models.adapters import base_of
from toolx_kernels.models.load import SMOLLM2
from toolx_kernels.models.tiny import is_tiny, tiny_config, tiny_tokenizer
from toolx_kernels.toolcall.demonstrations import DemonstrationIndex
from toolx_kernels.toolcall.self_exemplify import INSTRUCTIONS
from toolx_kernels.train.config import ToolExpanderConfig
from toolx_kernels.train.memory.work import Work
from toolx_kernels.train.rows import MADE_UP, Prompts, load_demonstrations, load_rows
from toolx_kernels.train.run.checkpoint import latest_checkpoint

SMOLLM2_SHAPE = dict(
    vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
    num_key_value_heads=3, max_position_embeddings=8192, tie_word_embeddings=True,
)  # fmt: skip
LARGEST_DATASET = 16 << 20  # bytes of a file whose prompts are looked at


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


def work_at_hand(args: ToolExpanderConfig, config: PreTrainedConfig) -> Work | None:
    """What the run's rows ask, where they and the tokenizer lie on this machine; else None."""
    named = (args.dataset, args.eval_dataset, args.demonstration_dataset)
    if not all(map(_is_at_hand, named)):
        return None
    tokenizer = _tokenizer_at_hand(args.model)
    if tokenizer is None:
        return None
    rows, eval_rows = load_rows(args)
    prompts = Prompts(tokenizer, config.max_position_embeddings, INSTRUCTIONS if args.self_exemplify else "")
    index = DemonstrationIndex.of(rows, load_demonstrations(args.demonstration_dataset))
    return Work.of(args, prompts, index, rows, eval_rows)


def _is_at_hand(dataset: str | None) -> bool:
    file = Path(dataset or "")
    return dataset is None or dataset in MADE_UP or (file.is_file() and file.stat().st_size <= LARGEST_DATASET)


def _tokenizer_at_hand(name: str) -> PreTrainedTokenizerBase | None:
    if is_tiny(name):
        return tiny_tokenizer()
    path = Path(name)
    if not path.is_dir():
        return None
    try:
        return AutoTokenizer.from_pretrained(latest_checkpoint(path) or path)
    except LOADING_ERRORS:
        return None  # a folder with a config alone can be planned for
