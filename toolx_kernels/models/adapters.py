"""LoRA adapters by peft: small matrices next to a model's linear layers, which are trained instead of its weights.

peft inserts its layers into the model, so rollouts, packed training and ``save_pretrained`` work as with any other
model, with the adapter active. Adapters are in fp32, whatever the dtype of the base model's weights.
"""

from __future__ import annotations

import copy
import json
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from toolx_kernels.errors import LOADING_ERRORS, InputError, first_line
from toolx_kernels.models.peft_library import using_peft

LINEAR = (torch.nn.Linear, Conv1D)  # Conv1D is GPT-2's linear layer, not a convolution
TRAINED, REFERENCE = "default", "reference"
CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."  # of the module names in peft's files


def add_adapter(
    model: PreTrainedModel,
    *,
    rank: int,
    alpha: int,
    target_modules: list[str] | None = None,
    seed: int = 0,
    name: str | None = None,
) -> None:
    """Adds an adapter to a model; from then on only the adapter's parameters need a gradient.

    Its output is zero until it is trained. There is no dropout, so that the trained policy is the one that sampled.

    Args:
        target_modules: the linear layers that get one; None: all except the head.
        seed: of its random half.
        name: of the base model, for ``load_model``; only used if transformers gave it none (see ``name_base``).

    Raises:
        InputError: peft is not installed or refuses, or a target is the head, is not a linear layer or is not a module
            of the model. The model is then unchanged.
    """
    check_targets(model, target_modules)
    with using_peft(
        "use_peft=True", f"No adapter can be made for {type(model).__name__}", "choose other lora_target_modules"
    ):
        from peft import LoraConfig

        targets = target_modules or "all-linear"
        config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets, task_type="CAUSAL_LM")
        with torch.random.fork_rng(devices=[]):
            torch.random.default_generator.manual_seed(seed)
            _add(model, config, TRAINED)
    name_base(model, name)


def has_adapter(model: PreTrainedModel) -> bool:
    return bool(getattr(model, "_hf_peft_config_loaded", False))


def name_base(model: PreTrainedModel, name: str | None) -> None:
    """Writes the base model's name into the adapter's config, for ``load_model``: the name that transformers or
    ``load_model`` gave it, or else ``name``. Folders are written as absolute paths, so that they work from anywhere."""
    loaded_from = str(model.name_or_path)
    without_config = os.path.isdir(loaded_from) and not os.path.isfile(os.path.join(loaded_from, "config.json"))
    base = name if name and (without_config or not loaded_from) else loaded_from
    is_local = os.path.isfile(base) or os.path.isfile(os.path.join(base, "config.json"))
    model.peft_config[TRAINED].base_model_name_or_path = os.path.abspath(base) if is_local else base


def attach_adapter(model: PreTrainedModel, folder: Path) -> None:
    """Adds the saved adapter of ``folder`` to its bare base model, for rollouts: nothing needs a gradient.

    Raises:
        InputError: peft is not installed or refuses, or the folder holds no readable adapter of this model.
    """
    with using_peft(
        f"The adapter in {folder}",
        f"{folder} holds no adapter for {type(model).__name__}",
        "give a folder that a run with use_peft wrote for a model of the same shape",
    ):
        from peft import PeftConfig

        _add(model, PeftConfig.from_pretrained(str(folder)), TRAINED)
    load_adapter_weights(folder, model, remedy=f"write the base model that it was made for into its {CONFIG_FILE}")
    model.requires_grad_(False)


def base_of(folder: Path) -> str:
    """The name of the base model of the saved adapter in ``folder``, as written there.

    Raises:
        InputError: peft is not installed, or the adapter's config cannot be read or names none.
    """
    with using_peft(
        f"The adapter in {folder}", f"{folder} holds no readable {CONFIG_FILE}", "give another adapter, or repair it"
    ):
        from peft import PeftConfig

        name = PeftConfig.from_pretrained(str(folder)).base_model_name_or_path
    if not name:
        raise InputError(f"{folder}/{CONFIG_FILE} names no base model: write its base_model_name_or_path there.")
    if not isinstance(name, str):
        raise InputError(f"{folder}/{CONFIG_FILE}: base_model_name_or_path is {name!r}: write a folder or a hub name.")
    return name


def save_adapter(model: PreTrainedModel, folder: Path) -> None:
    """Writes the trained adapter with its base model's name, for ``from_pretrained`` of peft and transformers.

    The files are those of ``model.save_pretrained``, which also looks the base model up on the hub.

    Raises:
        InputError: peft refuses.
        OSError, SafetensorError: the files cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    save_file(adapter_tensors(model), folder / WEIGHTS_FILE, metadata={"format": "pt"})
    with using_peft("The adapter", f"The adapter's config cannot be written to {folder}", "use another", writing=True):
        model.peft_config[TRAINED].save_pretrained(folder)


@torch.no_grad()
def load_adapter_weights(
    folder: Path,
    model: PreTrainedModel,
    name: str = TRAINED,
    remedy: str = "use the lora_r and lora_target_modules that it was made with",
) -> None:
    """Copies the saved weights of ``folder`` to the model's adapter ``name``, in place and bit for bit.

    Raises:
        InputError: they cannot be read, or are those of another adapter; ``remedy`` is for the latter.
    """
    try:
        saved = load_file(folder / WEIGHTS_FILE)
    except LOADING_ERRORS as error:
        raise InputError(
            f"{folder}/{WEIGHTS_FILE} cannot be loaded ({first_line(error)}): remove it to use an older checkpoint."
        ) from None
    mine = adapter_tensors(model, name)
    for key in sorted(mine.keys() | saved.keys()):
        there, here = (tuple(where[key].shape) if key in where else "none" for where in (saved, mine))
        if there != here:
            raise InputError(
                f"{folder} holds another adapter: its {key} is {there}, but this model's is {here}; {remedy}."
            )
    for key, tensor in mine.items():
        tensor.copy_(saved[key])


def check_same_adapter(folder: Path, model: PreTrainedModel) -> None:
    """Raises InputError if the saved adapter of ``folder`` has other settings than the model's adapter."""
    try:
        saved = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    except LOADING_ERRORS as error:
        raise InputError(f"{folder} holds no readable {CONFIG_FILE} ({first_line(error)}): put it back.") from None
    config = model.peft_config[TRAINED]
    for setting in ("r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern"):
        there, here = saved.get(setting), getattr(config, setting)
        if there != here:
            raise InputError(
                f"{folder} holds another adapter: its {setting} is {there}, but this model's is {here}; resume with "
                "the adapter that the run was started with."
            )


def freeze_adapter(model: PreTrainedModel, folder: Path | None = None) -> None:
    """Adds a frozen copy of the adapter, or of the one saved in ``folder``, for ``reference_adapter``.

    The model before RL is the base model with the adapter that a cold start trained, not the base model alone; so the
    reference is a second, small adapter on the same weights.

    Raises:
        InputError: the folder's adapter cannot be read, or does not fit.
    """
    with (
        _same_trained(model),
        torch.random.fork_rng(devices=[]),
        using_peft("beta or verification='cautious'", "No second adapter can be made", "use another adapter"),
    ):
        _add(model, copy.deepcopy(model.peft_config[TRAINED]), REFERENCE)
        model.set_adapter(TRAINED)
    if folder is not None:
        load_adapter_weights(folder, model, REFERENCE)
        return
    present = adapter_tensors(model)
    for key, tensor in adapter_tensors(model, REFERENCE).items():
        tensor.copy_(present[key])


def drop_frozen_adapter(model: PreTrainedModel) -> None:
    """Removes the adapter that ``freeze_adapter`` added."""
    model.delete_adapter(REFERENCE)


def adapter_tensors(model: PreTrainedModel, name: str = TRAINED) -> dict[str, Tensor]:
    """The live weights of the adapter ``name``, by their names in a file."""
    with using_peft("The adapter", "The adapter's weights cannot be separated from the model's", "use another adapter"):
        from peft import get_peft_model_state_dict

        found = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    return {_PREFIX + key: tensor.detach().contiguous() for key, tensor in found.items()}


def _add(model: PreTrainedModel, config, name: str) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config`")  # a second adapter is intended
        model.add_adapter(config, name)
    model.train(model.training)  # peft adds layers in training mode, with dropout
    to_fp32(model, name)


def to_fp32(model: PreTrainedModel, name: str) -> None:
    """Converts the weights of the adapter ``name`` to fp32."""
    for parameter_name, parameter in model.named_parameters():
        if f".{name}." in parameter_name:
            parameter.data = parameter.data.float()


@contextmanager
def reference_adapter(model: PreTrainedModel) -> Iterator[None]:
    """Inside the block the frozen adapter is active, for forward passes without gradients or for rollouts."""
    with _same_trained(model):
        model.set_adapter(REFERENCE)
        try:
            yield
        finally:
            model.set_adapter(TRAINED)


@contextmanager
def _same_trained(model: PreTrainedModel) -> Iterator[None]:
    """Restores after the block which parameters need a gradient; ``set_adapter`` sets that by adapter only."""
    trained = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    try:
        yield
    finally:
        for parameter in model.parameters():
            parameter.requires_grad_(id(parameter) in trained)


def check_targets(model: PreTrainedModel, targets: list[str] | None) -> None:
    """Raises InputError for a target that is the head, is not a linear layer or is not a module of the model."""
    head = model.get_output_embeddings()
    linear = {name.split(".")[-1] for name, m in model.named_modules() if isinstance(m, LINEAR) and m is not head}
    remedy = f"choose among {', '.join(sorted(linear))}"
    for target in targets or ():
        found = [m for name, m in model.named_modules() if name == target or name.endswith(f".{target}")]
        if not found:
            raise InputError(f"lora_target_modules: {target!r} is not a module of {type(model).__name__}; {remedy}.")
        if any(m is head for m in found):
            raise InputError(
                f"lora_target_modules: {target!r} is the head, whose weight the loss uses directly; {remedy}."
            )
        if not all(isinstance(m, LINEAR) for m in found):
            raise InputError(f"lora_target_modules: {target!r} is not a linear layer; {remedy}.")
