"""Checkpoints: a folder ``checkpoint-<step>`` that ``from_pretrained`` opens and from which a run goes on exactly.

model.safetensors, config.json, tokenizer files    as transformers writes them
optimizer.safetensors                               AdamW's state, by parameter name
state.json                                          where the run stands, and the model's shape

A checkpoint is written beside its place, synced to disk and renamed, so that it is whole or not there.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from toolx_kernels.errors import InputError

STATE_FILE = "state.json"
# what transformers, safetensors and torch raise over files that are damaged or of another model
LOADING_ERRORS = (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError)


def checkpoints(run: Path) -> list[Path]:
    """The run's checkpoints, oldest first; one whose replacement was interrupted is put back in its place."""
    for outdated in run.glob(".checkpoint-*.old"):
        final = run / outdated.name.removeprefix(".").removesuffix(".old")
        if not final.exists():
            outdated.rename(final)
    found = [
        (int(m[1]), path) for path in run.glob("checkpoint-*") if (m := re.fullmatch(r"checkpoint-(\d+)", path.name))
    ]
    return [path for _, path in sorted(found)]


def latest_checkpoint(run: Path) -> Path | None:
    return next(reversed(checkpoints(run)), None)


def write_atomically(path: Path, text: str) -> None:
    """The file holds either what it held or ``text``, whatever happens meanwhile."""
    beside = path.with_name(path.name + ".part")
    with open(beside, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)


def save_checkpoint(
    run: Path,
    step: int,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    optimizer: torch.optim.Optimizer,
    state: dict,
    *,
    keep: int,
    keep_first: bool,
) -> Path:
    """Writes ``run/checkpoint-<step>`` and removes older ones beyond ``keep`` (but not the first if ``keep_first``)."""
    final = run / f"checkpoint-{step}"
    beside = run / f".checkpoint-{step}.part"
    shutil.rmtree(beside, ignore_errors=True)
    model.save_pretrained(beside)
    tokenizer.save_pretrained(beside)
    names = {parameter: name for name, parameter in model.named_parameters()}
    tensors = {
        f"{names[parameter]}|{key}": value.contiguous()
        for parameter, values in optimizer.state.items()
        for key, value in values.items()
    }
    save_file(tensors, beside / "optimizer.safetensors")
    (beside / STATE_FILE).write_text(json.dumps(state | {"model_shape": model_shape(model)}))
    for path in (*beside.iterdir(), beside):
        _sync(path)
    if final.exists():  # of the same step: `checkpoints` takes back the outdated one if this stops in between
        outdated = run / f".checkpoint-{step}.old"
        shutil.rmtree(outdated, ignore_errors=True)
        final.rename(outdated)
        beside.rename(final)
        shutil.rmtree(outdated)
    else:
        beside.rename(final)
    _sync(run)
    older = checkpoints(run)[1 if keep_first else 0 : -keep]
    for path in older:
        shutil.rmtree(path)
    return final


def _sync(path: Path) -> None:
    """Waits until the file, or the names in the folder, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def load_state(checkpoint: Path, model: PreTrainedModel) -> dict:
    """The run's state, after checking that the checkpoint belongs to a model of this shape.

    Raises:
        InputError: the checkpoint is of another model, or has no readable state.
    """
    try:
        state = json.loads((checkpoint / STATE_FILE).read_text(encoding="utf-8"))
        there = state["model_shape"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{checkpoint} holds no readable {STATE_FILE} ({first_line(error)}): remove it to resume from an older one."
        ) from None
    here = model_shape(model)
    for key, value in here.items():
        if there.get(key) != value:
            raise InputError(
                f"{checkpoint} is a checkpoint of another model: its {key} is {there.get(key)}, this model's is "
                f"{value}; resume with the model that the run was started with."
            )
    return state


def load_weights(checkpoint: Path, model: PreTrainedModel) -> None:
    """Puts the checkpoint's weights into the model, in place.

    Raises:
        InputError: they cannot be read, or are not this model's.
    """
    try:
        saved = type(model).from_pretrained(checkpoint, dtype=model.dtype)
        model.load_state_dict(saved.state_dict())
    except LOADING_ERRORS as error:
        raise InputError(
            f"{checkpoint} cannot be loaded ({first_line(error)}): remove it to use an older one."
        ) from None


def load_optimizer(checkpoint: Path, model: PreTrainedModel, optimizer: torch.optim.Optimizer) -> None:
    """Puts the checkpoint's optimizer state into ``optimizer``, in place."""
    parameters = dict(model.named_parameters())
    try:
        for name, value in load_file(checkpoint / "optimizer.safetensors").items():
            parameter, key = name.split("|")
            optimizer.state[parameters[parameter]][key] = value.to(parameters[parameter].device)
    except LOADING_ERRORS as error:
        raise InputError(
            f"{checkpoint}/optimizer.safetensors cannot be loaded ({first_line(error)}): remove the checkpoint to "
            "resume from an older one."
        ) from None


def first_line(error: Exception) -> str:
    """What an error says, short enough to be quoted in a sentence."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def model_shape(model: PreTrainedModel) -> dict:
    config = model.get_decoder().config
    names = ("model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    return {name: getattr(config, name, None) for name in names}
