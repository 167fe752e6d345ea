"""Activations of a decoder in forward and backward, in bytes, traced on torch's meta device.

Meta tensors have shapes and storages but no memory, so a pass through a model of any size costs only the time of its
Python code. The trace shows what transformers' layers really save for autograd, including RMSNorm's fp32 copies and an
architecture's extra norms, so no formula has to mirror them. Only attention is replaced by a stand-in: the meta device
has no attention kernels.

Layers are alike, so two depths are traced and the rest is extrapolated.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from toolx_kernels.errors import InputError, first_line
from toolx_kernels.models.adapters import LINEAR, check_targets
from toolx_kernels.models.bridge import AttentionContext, checkpointed, toolx_attention
from toolx_kernels.ops.attention.packed_flex import padded_length
from toolx_kernels.train.update.batch import PackedGroup, pack


class Adapted(nn.Module):
    """A linear layer with an fp32 LoRA adapter, computed as peft does; only its shapes matter here."""

    def __init__(self, base: nn.Module, rank: int):
        super().__init__()
        self.base = base
        outer, inner = base.weight.shape if isinstance(base, nn.Linear) else base.weight.T.shape
        self.down = nn.Linear(inner, rank, bias=False, device="meta", dtype=torch.float32)
        self.up = nn.Linear(rank, outer, bias=False, device="meta", dtype=torch.float32)

    def forward(self, x: Tensor) -> Tensor:
        out = self.base(x)
        return (out + self.up(self.down(x.to(self.down.weight.dtype))) * 2.0).to(out.dtype)


def adapt(model: PreTrainedModel, rank: int, targets: list[str] | None) -> None:
    """Freezes ``model`` and adds an adapter to each linear layer except the head, or only to those in ``targets``.

    Raises:
        InputError: a target is the head, is not a linear layer, or is not in the model.
    """
    check_targets(model, targets)
    head = model.get_output_embeddings()
    model.requires_grad_(False)
    linear = [
        (name, module) for name, module in model.named_modules() if isinstance(module, LINEAR) and module is not head
    ]
    chosen = [
        (name, module)
        for name, module in linear
        if targets is None or any(name == target or name.endswith(f".{target}") for target in targets)
    ]
    for name, module in chosen:
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, Adapted(module, rank))


@dataclass(frozen=True, slots=True)
class Activations:
    """Bytes that one pass holds in addition to weights and their gradients.

    saved     after the forward, for the backward
    training  peak over forward and backward, ``saved`` included
    """

    saved: int
    training: int

    def per_layer(self, deeper: Activations, n_more: int) -> Activations:
        """Extrapolates to ``n_more`` additional layers; ``deeper`` has one additional layer."""
        return Activations(
            self.saved + n_more * (deeper.saved - self.saved),
            self.training + n_more * (deeper.training - self.training),
        )


def training_activations(
    model: PreTrainedModel, groups: Sequence[PackedGroup], *, flex: bool, checkpointing: bool
) -> Activations:
    """Traces a forward and backward over ``groups`` in the decoder of ``model``, which is on the meta device.

    Args:
        flex: attention is block-sparse over the whole pack (on GPUs), not dense over blocks of it (on CPUs).
        checkpointing: each layer is recomputed in the backward.

    Raises:
        InputError: the model cannot be traced on the meta device.
    """
    embeds = any(p.requires_grad for p in model.get_input_embeddings().parameters())

    def pass_over() -> Activations:
        context = pack(groups, "meta").context
        positions = context.tokens.position[None]
        again = checkpointed(model) if checkpointing else nullcontext()
        with LiveBytes(model) as live, toolx_attention(model), again:
            hidden = torch.empty(
                *positions.shape, _width(model), dtype=model.dtype, device="meta", requires_grad=embeds
            )
            out = model.get_decoder()(
                inputs_embeds=hidden,
                position_ids=positions,
                use_cache=False,
                toolx=Flex() if flex else Dense(context),
            ).last_hidden_state
            saved = live.now
            out.backward(torch.empty_like(out))
            return Activations(saved, live.peak)

    return _extrapolated(model, pass_over)


def inference_activations(model: PreTrainedModel, n_tokens: int) -> int:
    """Returns the peak bytes of a forward over ``n_tokens`` without a backward, such as a prefill.

    Raises:
        InputError: the model cannot be traced on the meta device.
    """

    def pass_over() -> Activations:
        with LiveBytes(model) as live, toolx_attention(model), torch.no_grad():
            hidden = torch.empty(1, n_tokens, _width(model), dtype=model.dtype, device="meta")
            positions = torch.empty(1, n_tokens, dtype=torch.long, device="meta")
            model.get_decoder()(inputs_embeds=hidden, position_ids=positions, use_cache=False, toolx=Paged())
            return Activations(0, live.peak)

    return _extrapolated(model, pass_over).training


def _width(model: PreTrainedModel) -> int:
    return model.get_input_embeddings().weight.shape[1]


def _extrapolated(model: PreTrainedModel, pass_over: Callable[[], Activations]) -> Activations:
    decoder = model.get_decoder()
    config = decoder.config
    name, layers = next(
        (name, module)
        for name, module in decoder.named_children()
        if isinstance(module, nn.ModuleList) and len(module) == config.num_hidden_layers
    )
    named = getattr(config, "layer_types", None)
    kinds = list(named or ["alike"] * len(layers))
    first = [kinds.index(kind) for kind in dict.fromkeys(kinds)]  # each kind brings a mask and rotary tables
    others = [place for place in range(len(layers)) if place not in first]

    def traced() -> Activations:
        try:
            return pass_over()
        except Exception as error:  # the model's code may read values, and meta tensors have none
            raise InputError(
                f"The memory of a {config.model_type} model cannot be planned ({first_line(error)}): run it, its "
                "summary.json says what it took."
            ) from error

    if len(others) <= 2:
        return traced()

    def of(places: list[int]) -> Activations:
        setattr(decoder, name, nn.ModuleList(layers[place] for place in sorted(places)))
        if named:
            config.layer_types = [kinds[place] for place in sorted(places)]
        return traced()

    try:
        return of([*first, others[0]]).per_layer(of([*first, *others[:2]]), len(others) - 1)
    finally:
        setattr(decoder, name, layers)
        if named:
            config.layer_types = named


class LiveBytes(TorchDispatchMode):
    """Counts live bytes. ``now``: storages created inside and still alive; ``peak``: the maximum of ``now``.

    Gradients of ``model``'s parameters are freed as soon as they are complete: they are counted elsewhere.
    """

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.now = self.peak = 0
        self._known: dict[int, object] = {}  # by address: a weak reference, or a storage from outside
        self._hooks = [
            p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
            for p in model.parameters()
            if p.requires_grad
        ]

    def __exit__(self, *exception):
        for hook in self._hooks:
            hook.remove()
        return super().__exit__(*exception)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        for storage in _storages((args, kwargs)):
            self._known.setdefault(storage._cdata, storage)
        out = function(*args, **(kwargs or {}))
        for storage in _storages(out):
            if (address := storage._cdata) not in self._known:
                n_bytes = storage.nbytes()
                self.now += n_bytes
                self.peak = max(self.peak, self.now)
                self._known[address] = weakref.ref(storage, partial(self._gone, address, n_bytes))
        return out

    def _gone(self, address: int, n_bytes: int, _) -> None:
        self.now -= n_bytes
        del self._known[address]


def _storages(tree) -> list[torch.UntypedStorage]:
    return [leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


class Kernel(torch.autograd.Function):
    """A stand-in with the memory of a fused attention kernel: saves arguments, result and one fp32 number per query."""

    @staticmethod
    def forward(ctx, query, key, value, mask):
        out = torch.empty_like(query)
        log_sums = torch.empty(query.shape[:-1], dtype=torch.float32, device=query.device)
        ctx.save_for_backward(query, key, value, mask, out, log_sums)
        return out

    @staticmethod
    def backward(ctx, grad):
        query, key, value, *_ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value), None


class KernelOnly(TorchFunctionMode):
    """Replaces torch's CPU attention with ``Kernel``; like torch, converts a boolean mask to numbers in each call."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is scaled_dot_product_attention:
            mask = kwargs["attn_mask"]
            return Kernel.apply(*args, mask.to(args[0].dtype) if mask.dtype == torch.bool else mask)
        return function(*args, **(kwargs or {}))


class Paged:
    """An attention context whose kernel needs no mask as large as the scores."""

    def attend(self, layer, query, key, value, scale, softcap, window):
        return Kernel.apply(query, key, value, None)


class Flex:
    """An attention context like ``PackedContext.flex``, which pads the pack."""

    def attend(self, layer, query, key, value, scale, softcap, window):
        more = padded_length(len(query)) - len(query)
        padded = (pad(packed, (0, 0, 0, 0, 0, more)) for packed in (query, key, value))
        return Kernel.apply(*padded, None)[: len(query)]


class Dense:
    """Another context's attention with ``Kernel`` in place of torch's; replaced per call, as backward calls again."""

    def __init__(self, context: AttentionContext):
        self.context = context

    def attend(self, *arguments):
        with KernelOnly():
            return self.context.attend(*arguments)
