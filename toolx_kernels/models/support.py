"""Support of models: whether one runs exactly on our attention, tested on a narrow random copy and then on itself.

Some architectures carry state outside attention, see tokens in chunks or have attention sinks; training or sampling
them with this package would be silently wrong. A random copy with a few narrow layers shows it in a fraction of a
second, for a model of any size and without its weights.
"""

from __future__ import annotations

import re
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging

from toolx_kernels.errors import InputError, out_of_memory
from toolx_kernels.models.bridge import Unsupported, alone_with, attention_of, evaluating, head_of
from toolx_kernels.models.config import meta_model
from toolx_kernels.models.narrow import narrow_copies
from toolx_kernels.models.shape import SUPPORTED, cache_shape, context_of, has_experts
from toolx_kernels.models.trial import (
    TOLERANCE,
    Unmade,
    largest_difference,
    own_logprobs,
    packed_logprobs,
    said,
)

TOLERANCE_BF16, ORDINARY_LOGPROB = 0.25, 32.0
MOST_PARAMETERS = 200_000_000  # of a copy

# Modules that carry more than keys and values from token to token, by the names of their classes.
STATEFUL = re.compile(
    "(?i:conv|mamba|recurren|rglru|lstm|rwkv|retention|delta(net|rule|attention)|lightning|indexer|linear_?att|mixer)"
    "|SSM|Ssm|RNN|GRU"
)


class Untried(Unsupported):
    """No copy could be made or run."""


class Lacking(Unmade):
    """The modules that a copy lacks; a deeper copy may have them."""


def check_supported(model: PreTrainedModel) -> None:
    """Compares log-probs through our attention and head with the model's own: for three rows in a narrow random copy of
    its architecture, packed and paged, once per process and config, and for six tokens in the model itself.

    Raises:
        InputError: they differ, or the model cannot be run this way at all.
    """
    try:
        _check_weights(model)
        _try_architecture(model)
        _try_itself(model)
    except Unsupported as reason:
        raise _refused(model, reason) from reason


def check_config(config: PreTrainedConfig) -> float:
    """``check_supported`` for a config, without weights; returns the largest difference of log-probs in the copy.

    Raises:
        InputError: transformers has no causal LM for this config, or it cannot be run exactly.
    """
    model = meta_model(config, torch.float32)
    try:
        return _try_architecture(model)
    except Unsupported as reason:
        raise _refused(model, reason) from reason


def _refused(model: PreTrainedModel, reason: Unsupported) -> InputError:
    return InputError(f"{type(model).__name__} cannot be run exactly: {reason}; {SUPPORTED}.")


# ---- the architecture

_verdicts: dict[tuple, float | str] = {}  # the difference, or why it is not supported
_one_at_a_time = threading.Lock()  # because ``_undisturbed`` changes state that all threads share


def _try_architecture(model: PreTrainedModel) -> float:
    _check_parts(model)
    kinds = _kinds(model)
    settings = model.config.to_dict()
    for name in ("_name_or_path", "dtype", "transformers_version"):
        settings.pop(name, None)
    key = type(model), frozenset(kinds), repr(settings)
    with _one_at_a_time:
        if key not in _verdicts:
            try:
                _verdicts[key] = _of_copies(model, kinds)
            except Untried:  # the reason may not be the architecture
                raise
            except Unsupported as reason:
                _verdicts[key] = str(reason)
        verdict = _verdicts[key]
    if isinstance(verdict, str):
        raise Unsupported(verdict)
    return verdict


def _check_weights(model: PreTrainedModel) -> None:
    weights = list(model.parameters()) if isinstance(model, nn.Module) else []
    if any(weight.is_inference() for weight in weights):
        raise InputError(
            f"{type(model).__name__} was made under torch.inference_mode, so it has no gradients: make it "
            "outside, or under torch.no_grad."
        )
    if any(type(weight).__name__ == "DTensor" for weight in weights):  # by name: importing it takes a second
        raise Unsupported("its weights are sharded (FSDP's fully_shard), but one process must hold them whole")
    devices = sorted({str(weight.device) for weight in weights})
    if "meta" in devices:
        raise Unsupported("it is without weights (on the meta device)")
    if len(devices) > 1:
        raise Unsupported(f"its weights are on several devices ({', '.join(devices)}), but must be on one")


def _check_parts(model: PreTrainedModel) -> None:
    if not isinstance(model, PreTrainedModel):
        inside = next((name for name in ("get_base_model", "module", "_orig_mod") if hasattr(model, name)), None)
        raise Unsupported("it is not a PreTrainedModel of transformers" + f", but its {inside} may be" * bool(inside))
    if not model._supports_attention_backend:
        raise Unsupported("it does not take its attention function from transformers' registry")
    decoder = model.get_decoder()
    if model.get_output_embeddings() is None or decoder is model or not isinstance(decoder, PreTrainedModel):
        raise Unsupported("get_decoder() and get_output_embeddings() do not give a decoder and the head on it")
    head = type(model.get_output_embeddings())
    if not issubclass(head, nn.Linear):  # for example an adapter on it
        raise Unsupported(f"its head is a {head.__module__}.{head.__name__}, not a linear layer of torch")
    prefix = type(model).__name__.removesuffix("ForCausalLM")
    for name, module in decoder.named_modules():
        if isinstance(module, PreTrainedModel | GradientCheckpointingLayer | Conv1D):
            continue  # containers, whose parts come next, and GPT-2's linear layer
        if STATEFUL.search(type(module).__name__.removeprefix(prefix)):
            raise Unsupported(f"its {type(module).__name__} ({name}) carries state outside attention")
    cache_shape(decoder.config), context_of(decoder.config)


def _kinds(model: PreTrainedModel) -> set[str]:
    """The classes of the decoder's modules that a copy must have.

    Left out are those that behave the same in every model: torch's own, linear layers, embeddings and norms of any
    class, and peft's wrappers.
    """

    def is_common(module: nn.Module) -> bool:
        package = type(module).__module__.partition(".")[0]
        return (
            package in ("torch", "peft")
            or isinstance(module, nn.Linear | nn.Embedding)
            or type(module).__name__.endswith(("Linear", "Embedding", "Norm"))
        )

    return {type(module).__name__ for module in model.get_decoder().modules() if not is_common(module)}


def _of_copies(model: PreTrainedModel, kinds: set[str]) -> float:
    """The largest difference of log-probs in the first copy that can be made and has modules of all ``kinds``."""
    failures = []
    with _undisturbed():
        for widths in (True, False):
            try:
                for config in narrow_copies(model.config, widths=widths):
                    try:
                        return largest_difference(_made(type(model), config, kinds))
                    except Lacking as reason:
                        failure = str(reason)
            except Unsupported:
                raise
            except Exception as error:  # code of configs and models may raise anything
                failure = str(error) if isinstance(error, Unmade) else said(error)
            failures.append(failure)
    raise Untried(f"no small copy of it can be tried ({'; '.join(dict.fromkeys(failures))})")


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Isolates the block: no mode, default device or random state affects it from outside, and it leaves random states
    unchanged and prints no warnings or logs."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    try:
        with (
            warnings.catch_warnings(),
            torch.random.fork_rng(devices=[]),
            torch.device("cpu"),
            torch.inference_mode(False),
            torch.autocast("cpu", enabled=False),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)


def _made(model_class: type[PreTrainedModel], config: PreTrainedConfig, kinds: set[str]) -> PreTrainedModel:
    """A copy whose weights, gates, scales and biases are all random, so that each has an effect.

    Raises:
        Unmade: it lacks modules of some of the ``kinds``, or is too large. Errors of the model's code are passed on.
    """

    def built(device: str) -> PreTrainedModel:
        with torch.device(device):
            return model_class._from_config(config, dtype=torch.float32, attn_implementation="eager").eval()

    shape = built("meta")
    missing, size = kinds - _kinds(shape), sum(p.numel() for p in shape.parameters())
    if missing:
        raise Lacking(f"it lacks {', '.join(sorted(missing))}")
    if size > MOST_PARAMETERS:
        raise Unmade(f"it has {size / 1e6:,.0f} million parameters")
    model = built("cpu")
    generator = torch.Generator().manual_seed(0)
    state = model.state_dict(keep_vars=True)
    for tensor in {id(tensor): tensor for tensor in state.values() if tensor.is_floating_point()}.values():
        noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float32)
        tensor.data = 1.5 * noise / tensor.shape[-1] ** 0.5 if tensor.ndim > 1 else tensor.data + 0.3 * noise
    return model


# ---- the model itself


@torch.inference_mode(False)
@torch.no_grad()
def _try_itself(model: PreTrainedModel) -> None:
    """Tests a few tokens, packed after a row that they must not see, with the real weights, hooks and adapters."""
    other, length, device, config = 3, 6, model.device, model.get_decoder().config
    ids = torch.arange(other + length, device=device) * 7919 % len(head_of(model)["weight"])
    positions = torch.cat([torch.arange(other, device=device), torch.arange(length, device=device)])
    try:
        with alone_with(model), evaluating(model), torch.autocast(device.type, enabled=False):
            ours = packed_logprobs(model, ids, positions, [(other, []), (length, [])])[other:]
            # sdpa ignores softcaps
            with attention_of(model, "eager") if getattr(config, "attn_logit_softcapping", None) else nullcontext():
                theirs = own_logprobs(model, ids[other:]).to(ours.device, ours.dtype)
    except Unsupported:
        raise
    except Exception as error:  # model code may raise anything
        if out_of_memory(error):
            raise
        raise Unsupported(f"our attention and head cannot serve it ({said(error)})") from error
    differences, tolerance = (ours - theirs).abs(), TOLERANCE
    difference = float(differences.max())
    if model.dtype not in (torch.float32, torch.float64):
        # the model rounds its logits, so the error grows with their size
        tolerance = TOLERANCE_BF16 * max(1.0, float(theirs.abs().max()) / ORDINARY_LOGPROB)
        if has_experts(config):  # differences in the last bits sometimes select other experts for a token
            difference = float(differences.mean())
    if not difference <= tolerance:
        raise Unsupported(
            f"its log-probs differ by {difference:.2g} from the model's own, where they should be equal and finite"
        )
