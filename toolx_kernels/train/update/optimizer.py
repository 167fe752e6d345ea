"""Base class of all optimizers: clips, applies and frees gradients one parameter at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch.optim.adamw import adamw
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import PreTrainedModel

from toolx_kernels.errors import InputError, retry_with_less
from toolx_kernels.train.config import UpdateSettings


class Optimizer:
    """Updates the parameters of ``model`` that need a gradient, tied ones once.

    Args:
        model: ``backward()`` adds its gradients up in ``parameter.grad``, whose dtype the optimizer chooses.
        args: betas, epsilon and weight decay.

    ``base`` is torch's or torchao's optimizer: its ``state`` is the state, and its ``param_groups[*]["lr"]`` are the
    rates, numbers that a schedule may set at any time.

    The first ``apply`` makes each parameter's state, from its weight at that time. A model has one optimizer at a time:
    ``close`` it before making the next.
    """

    def __init__(self, model: PreTrainedModel, args: UpdateSettings, learning_rate: float):
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.device = next(iter(self.parameters.values())).device
        self.base = self._make_base(
            list(self.parameters.values()),
            lr=learning_rate,
            betas=(args.adam_beta1, args.adam_beta2),
            eps=args.adam_epsilon,
            weight_decay=args.weight_decay,
        )

    def collect(self) -> None:
        """Must be called after each micro-batch's ``backward()``."""

    def drop_gradients(self) -> None:
        """Discards the gradients accumulated so far, e.g. to restart an update."""
        for parameter in self.parameters.values():
            parameter.grad = None

    def close(self) -> None:
        """Restores the model's parameters to how they were before this optimizer, except for their values."""
        self.drop_gradients()

    def apply(
        self, max_grad_norm: float, seed: tuple[int, int], make_room: Callable[[str], bool] = lambda reason: False
    ) -> float:
        """Makes one update with the accumulated gradients and frees each as soon as it is used.

        Args:
            max_grad_norm: gradients are scaled by ``min(1, max_grad_norm / (norm + 1e-6))``, as by
                ``torch.nn.utils.clip_grad_norm_``; norm is the 2-norm of all of them together.
            seed: (run seed, step); stochastic rounding is a function of it. Global random states stay untouched.
            make_room: called with the reason if memory for the first update's states runs out; returns whether to try
                again.

        Returns:
            The norm before clipping. If it is not finite, the gradients are dropped and no weight changes.
        """
        gradients = self._take()
        norm = global_norm(gradients.values())
        known = float(norm)  # the only wait for the device
        if math.isfinite(known):
            clip = (max_grad_norm / (norm + 1e-6)).clamp(max=1.0)
            self._prepare_all(gradients, make_room)  # if memory runs out here, no weight has changed yet
            with torch.no_grad(), self._updating(seed):
                for name in list(gradients):
                    self._update(name, gradients.pop(name), clip)
        return known

    def state_dict(self) -> dict[str, Tensor]:
        """Returns the live states as plain tensors under ``"<parameter name>|<state key>"``; a tensor subclass is split
        into its parts."""
        return {
            f"{name}|{part}": tensor
            for name, parameter in self.parameters.items()
            for key, value in self.base.state.get(parameter, {}).items()
            for part, tensor in _plain(key, value)
        }

    @torch.no_grad()
    def load_state_dict(self, tensors: dict[str, Tensor]) -> None:
        """Copies the states that ``state_dict`` returned, bit for bit.

        Raises:
            InputError: a tensor does not belong to this model and optimizer, or one is missing.
        """
        names = dict.fromkeys(key.split("|")[0] for key in tensors)
        for name in names:
            if name not in self.parameters:
                raise InputError(
                    f"The optimizer's state has a parameter {name} that is not trained here: resume with the model "
                    "and settings that the run was started with."
                )
        self.base.state.clear()
        self._prepare_all(names)
        mine = self.state_dict()
        for key in mine.keys() | tensors.keys():
            there, here = (_kind(where.get(key)) for where in (tensors, mine))
            if there != here:
                raise InputError(
                    f"The optimizer's state holds {there} as {key}, and this optimizer needs {here}: resume with the "
                    "optim and dtype that the run was started with."
                )
        for key, tensor in tensors.items():
            mine[key].copy_(tensor)

    @torch.no_grad()
    def _prepare_all(self, names: Iterable[str], make_room: Callable[[str], bool] = lambda reason: False) -> None:
        def give_back(name: str, reason: str) -> bool:
            self.base.state.pop(self.parameters[name], None)
            return make_room(reason)

        with self._updating((0, 0)):  # not the step's seed: its noise is for rounding
            for name in names:
                retry_with_less(partial(self._prepare, name), partial(give_back, name))

    # ---- differences between optimizers

    def _make_base(self, parameters: list[Tensor], **settings) -> torch.optim.Optimizer:
        return torch.optim.AdamW(parameters, fused=True, **settings)

    def _take(self) -> dict[str, Tensor]:
        """Takes the gradients off the parameters; returns them by name in parameter order."""
        taken = {}
        for name, parameter in self.parameters.items():
            if parameter.grad is not None:
                taken[name], parameter.grad = parameter.grad, None
        return taken

    def _updating(self, seed: tuple[int, int]):
        """Returns a context around all parameter updates of one step."""
        raise NotImplementedError

    def _prepare(self, name: str) -> None:
        """Makes the parameter's states if it has none."""
        raise NotImplementedError

    def _update(self, name: str, gradient: Tensor, clip: Tensor) -> None:
        """Updates one parameter with ``clip * gradient``, which it may overwrite."""
        raise NotImplementedError

    # ---- AdamW, shared by subclasses

    def _fused_adamw(self, weight: Tensor, gradient: Tensor, first: Tensor, second: Tensor, step: Tensor) -> None:
        """Runs torch's AdamW on one weight and its moments in place, and increments ``step``."""
        group = self.base.param_groups[0]
        beta1, beta2 = group["betas"]
        options = dict(beta1=beta1, beta2=beta2, lr=group["lr"], weight_decay=group["weight_decay"], eps=group["eps"])
        adamw([weight], [gradient], [first], [second], [], [step], fused=True, amsgrad=False, maximize=False, **options)


def moments(like: Tensor, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    """Returns AdamW's initial states under torch's names."""
    return {
        "step": torch.zeros((), dtype=torch.float32, device=device),
        "exp_avg": torch.zeros_like(like, dtype=dtype, device=device, requires_grad=False),
        "exp_avg_sq": torch.zeros_like(like, dtype=dtype, device=device, requires_grad=False),
    }


def global_norm(tensors) -> Tensor:
    """Returns a scalar, fp32 or wider: the 2-norm of all tensors together; 0 if there are none."""
    norms = [torch.linalg.vector_norm(t, dtype=torch.promote_types(t.dtype, torch.float32)) for t in tensors]
    return torch.linalg.vector_norm(torch.stack(norms)) if norms else torch.zeros(())


@contextmanager
def seeded(seed: tuple[int, int], device: torch.device) -> Iterator[None]:
    """Context that seeds torch's random numbers on the CPU and ``device`` with ``seed``, and restores them after."""
    number = int(np.random.SeedSequence(seed).generate_state(1, np.uint64)[0])
    on_card = device.type == "cuda"
    with torch.random.fork_rng([device] if on_card else []):
        torch.default_generator.manual_seed(number)
        if on_card:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(number)
        yield


def _plain(key: str, value: Tensor) -> Iterator[tuple[str, Tensor]]:
    if is_traceable_wrapper_subclass(value):
        for inner in value.__tensor_flatten__()[0]:
            yield f"{key}.{inner}", getattr(value, inner)
    else:
        yield key, value


def _kind(tensor: Tensor | None) -> str:
    return "nothing" if tensor is None else f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"
