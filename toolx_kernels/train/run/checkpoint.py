"""Checkpoints: folders ``checkpoint-<step>`` that ``from_pretrained`` opens and from which a run resumes exactly.

model.safetensors, config.json, tokenizer files    as transformers writes them (for an adapter: as peft does)
optimizer.safetensors                              the optimizer's state, by parameter name
state.json                                         format version, size and CRC of every other file, the model's shape
                                                   and the state of the run; its own CRC

A checkpoint is written to a temporary folder, synced to disk and renamed, so it is either whole or absent. All files
are checked to the last byte before any is used. The checksums detect accidents, not forgeries.
"""

from __future__ import annotations

import json
import shutil
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from toolx_kernels.engine.bit_sum import bit_sum
from toolx_kernels.errors import LOADING_ERRORS, InputError, first_line
from toolx_kernels.files import file_crc, sync, write_atomically
from toolx_kernels.models.adapters import WEIGHTS_FILE, adapter_tensors, check_same_adapter, has_adapter, save_adapter
from toolx_kernels.models.load import checkpoints, latest_checkpoint
from toolx_kernels.train.run.lock import gone
from toolx_kernels.train.run.metrics import read_object

FORMAT = 5  # of checkpoints; raised when the content of state.json or its meaning changes
STATE_FILE, OPTIMIZER_FILE = "state.json", "optimizer.safetensors"


class DamagedError(InputError):
    """A file of a checkpoint is not as it was written."""


class OptimizerState(Protocol):
    """The part of an ``Optimizer`` that checkpoints use.

    ``load_state_dict`` must copy its tensors: they may be backed by the checkpoint's file.
    """

    def state_dict(self) -> dict[str, Tensor]: ...

    def load_state_dict(self, tensors: dict[str, Tensor]) -> None: ...


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint that was read and is whole; reading it changes nothing.

    state        of each part of the run by name, as passed to ``save_checkpoint``
    weights      by the names of ``weights_of``
    optimizer    as returned by ``OptimizerState.state_dict``
    """

    path: Path
    state: dict
    weights: Mapping[str, Tensor]
    optimizer: dict[str, Tensor]

    def copy_into(self, model: PreTrainedModel, optimizer: OptimizerState) -> None:
        _copy(self.weights, model)
        optimizer.load_state_dict(self.optimizer)


# ---- removing


def remove(checkpoint: Path) -> None:
    """Removes the checkpoint; what an interrupted removal leaves is not taken for a checkpoint."""
    leaving = checkpoint.with_name(f".{checkpoint.name}.old")
    checkpoint.rename(leaving)
    _delete(leaving)


def sweep(run: Path) -> None:
    """Removes checkpoints that a killed process left half-written or half-removed."""
    for path in run.glob(".checkpoint-*"):
        _delete(path)
    for path in run.glob(f"checkpoint-*/{STATE_FILE}.part"):
        _delete(path)


def _delete(path: Path) -> None:
    """Of a checkpoint that was moved to another disk, and is linked to, only the link."""
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


# ---- writing


def save_checkpoint(
    run: Path,
    step: int,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    optimizer: OptimizerState,
    state: dict,
    *,
    keep: int,
    keep_first: bool,
) -> Path:
    """Writes ``run/checkpoint-<step>`` and removes older ones beyond ``keep`` (but not the first if ``keep_first``).

    Weights and optimizer change only with the step, so they are written once per step; if the checkpoint already
    exists, only its ``state`` is replaced.

    Raises:
        InputError: the run folder is gone, or the checkpoint cannot be written (no space, no permission); then all
            older checkpoints remain, and nothing of the new one.
    """
    if not run.is_dir():
        raise gone(run)
    final = run / f"checkpoint-{step}"
    tensors = optimizer.state_dict()
    needed = sum(tensor.nbytes for tensor in tensors.values())
    needed += sum({tensor.data_ptr(): tensor.nbytes for tensor in weights_of(model).values()}.values())
    try:
        sweep(run)
        if final.exists():
            write_atomically(final / STATE_FILE, _signed(_record(final) | {"state": state}))
            sync(final)
        else:
            free = shutil.disk_usage(run).free
            if free < needed:
                raise OSError(f"{free:,} bytes are free")
            _write(final, model, tokenizer, tensors, state)
    except Exception as error:
        # safetensors and tokenizers report the operating system's errors only as text, tokenizers in an Exception
        if not isinstance(error, OSError) and "(os error " not in str(error):
            raise
        if not run.is_dir():
            raise gone(run) from None
        why = getattr(error, "strerror", None) or first_line(error)
        older = latest_checkpoint(run)
        raise InputError(
            f"{final}, which needs {needed:,} bytes, could not be written ({why}); older checkpoints are untouched: "
            f"fix that, and --resume continues from {older.name if older else 'the start'}."
        ) from None
    for path in checkpoints(run)[1 if keep_first else 0 : -keep]:
        remove(path)
    return final


def _write(
    final: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    optimizer: dict[str, Tensor],
    state: dict,
) -> None:
    beside = final.with_name(f".{final.name}.part")
    beside.mkdir()  # without parents: a run folder that is gone must not be made again
    try:
        _write_weights(beside, model)
        tokenizer.save_pretrained(beside)
        save_file(optimizer, beside / OPTIMIZER_FILE)
        written = [path for path in sorted(beside.rglob("*")) if path.is_file()]  # tokenizers may write folders
        files = {str(path.relative_to(beside)): [path.stat().st_size, file_crc(path)] for path in written}
        record = {"format": FORMAT, "files": files, "model_shape": model_shape(model), "state": state}
        (beside / STATE_FILE).write_text(_signed(record), encoding="utf-8")
        for path in (*beside.rglob("*"), beside):
            sync(path)
        beside.rename(final)
        sync(final.parent)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


# ---- reading


def resumable_checkpoint(run: Path, model: PreTrainedModel) -> Checkpoint | None:
    """Reads the run's last checkpoint; returns None if there is none yet.

    Raises:
        InputError: it is damaged, has another format or belongs to another model; if damaged, the message names an
            older checkpoint that is whole.
    """
    found = checkpoints(run)
    if not found:
        return None
    try:
        return _read(found[-1], model)
    except DamagedError as error:
        whole = next((path for path in reversed(found[:-1]) if _is_whole(path)), None)
        remedy = (
            f"remove it, and --resume continues from {whole.name}"
            if whole
            else "start a new run, no older one is whole"
        )
        raise InputError(f"{error}: {remedy}.") from None


def load_weights(checkpoint: Path, model: PreTrainedModel) -> None:
    """Copies the weights of ``checkpoint``, the model before RL, into ``model``.

    Raises:
        InputError: the checkpoint is damaged, has another format or belongs to another model.
    """
    try:
        weights = _read(checkpoint, model).weights
    except DamagedError as error:
        raise InputError(f"{error}, but it is the model before RL: put it back, or start a new run.") from None
    _copy(weights, model)


def check_whole(checkpoint: Path) -> dict:
    """Checks every file of the checkpoint; returns the content of ``state.json``.

    Raises:
        DamagedError: a file is not as it was written; names it.
        InputError: the checkpoint has another format.
    """
    record = _record(checkpoint)
    for name, (size, crc) in record["files"].items():
        path = checkpoint / name
        try:
            found = path.stat().st_size
            same = found == size and file_crc(path) == crc
        except OSError as error:
            raise DamagedError(f"{checkpoint} lacks a readable {name} ({error.strerror})") from None
        if not same:
            how = f"has {found:,} bytes instead of {size:,}" if found != size else "has changed since it was written"
            raise DamagedError(f"{checkpoint} is damaged, its {name} {how}")
    return record


def check_reference(checkpoint: Path, why: str) -> None:
    """Raises InputError if ``checkpoint``, the model before RL, cannot be read; a resumed run needs it for ``why``."""
    if not checkpoint.exists():
        raise InputError(f"{why} needs {checkpoint}, which is missing: put it back, or start a new run.")
    try:
        check_whole(checkpoint)
    except InputError as error:
        raise InputError(f"{error}, and {why} needs it: put it back, or start a new run.") from None


def _is_whole(checkpoint: Path) -> bool:
    try:
        check_whole(checkpoint)
    except InputError:
        return False
    return True


def _read(checkpoint: Path, model: PreTrainedModel) -> Checkpoint:
    record = check_whole(checkpoint)
    if (WEIGHTS_FILE in record["files"]) != has_adapter(model):
        saved, given = ("an adapter", "none") if WEIGHTS_FILE in record["files"] else ("a whole model", "an adapter")
        raise InputError(
            f"{checkpoint} holds {saved}, and this model has {given}: resume with the model that the run was started "
            "with."
        )
    there, here = record["model_shape"], model_shape(model)
    for key, value in here.items():
        if there.get(key) != value:
            raise InputError(
                f"{checkpoint} belongs to another model, whose {key} is {there.get(key)}, and this model's is "
                f"{value}: resume with the model that the run was started with."
            )
    if has_adapter(model):
        check_same_adapter(checkpoint, model)
    try:
        weights = _read_weights(checkpoint, model)
        optimizer = load_file(checkpoint / OPTIMIZER_FILE)
    except LOADING_ERRORS as error:
        raise DamagedError(f"{checkpoint} cannot be loaded ({first_line(error)})") from None
    for name, tensor in weights_of(model).items():
        if name not in weights or weights[name].shape != tensor.shape:
            found = f"has the shape {tuple(weights[name].shape)}" if name in weights else "is missing"
            raise InputError(
                f"{checkpoint} belongs to another model, whose {name}, here {tuple(tensor.shape)}, {found}: "
                "resume with the model that the run was started with."
            )
    return Checkpoint(checkpoint, record["state"], weights, optimizer)


def _record(checkpoint: Path) -> dict:
    """Reads state.json and checks its format and CRC."""
    try:
        record = read_object((checkpoint / STATE_FILE).read_bytes())
        if type(version := record.get("format", 0)) is not int:
            raise ValueError("its format is no number")
    except (OSError, ValueError) as error:
        raise DamagedError(f"{checkpoint} has no readable {STATE_FILE} ({first_line(error)})") from None
    if version != FORMAT:
        raise InputError(
            f"{checkpoint} has format {version}, and this version of toolx_kernels reads format {FORMAT}: resume with "
            "the version that wrote it, or start another run folder."
        )
    if record.pop("crc", None) != _crc_of(record):
        raise DamagedError(f"{checkpoint} is damaged, its {STATE_FILE} has changed since it was written")
    return record


def _signed(record: dict) -> str:
    """Returns the record as JSON, with its own CRC."""
    return json.dumps(record | {"crc": _crc_of(record)})  # which writes inf, a value of some settings, as Infinity


def _crc_of(record: dict) -> int:
    return zlib.crc32(json.dumps(record, sort_keys=True).encode())


# ---- the model


def weights_of(model: PreTrainedModel) -> dict[str, Tensor]:
    """Returns the tensors that a checkpoint holds, by name: the adapter's if the model has one, else all."""
    return adapter_tensors(model) if has_adapter(model) else model.state_dict()


def _write_weights(folder: Path, model: PreTrainedModel) -> None:
    if has_adapter(model):
        save_adapter(model, folder)
    else:
        model.save_pretrained(folder)


def _read_weights(checkpoint: Path, model: PreTrainedModel) -> dict[str, Tensor]:
    if has_adapter(model):
        return load_file(checkpoint / WEIGHTS_FILE)
    return type(model).from_pretrained(checkpoint, dtype=model.dtype).state_dict()


def _copy(weights: Mapping[str, Tensor], model: PreTrainedModel) -> None:
    with torch.no_grad():
        for name, tensor in weights_of(model).items():
            tensor.copy_(weights[name])


def model_shape(model: PreTrainedModel) -> dict:
    config = model.get_decoder().config
    names = (
        "model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "head_dim", "tie_word_embeddings",
    )  # fmt: skip
    shape = {name: getattr(config, name, None) for name in names}
    if has_adapter(model):  # it fits these exact base weights only
        frozen = [bit_sum(p.detach()) for name, p in model.named_parameters() if ".lora_" not in name]
        shape["sum of its base's weights"] = int(bit_sum(torch.stack(frozen)))
    return shape
