"""AdamW in its forms, as the setting ``optim`` names them.

Bytes per trained parameter, weight + gradient + the rest:

    adamw             float32: 4 + 4 + 8; bfloat16: 2 + 4 + 12 (fp32 masters, gradients added up in fp32)
    adamw_8bit        float32: 4 + 4 + 2; bfloat16: 2 + 2 + 2
    adamw_stochastic  bfloat16: 2 + 2 + 8
    adamw_offload     on the card 2 or 4 and one parameter's gradient; in the CPU's memory 4 + 12

Gradients of bfloat16 weights that are added up in bfloat16 err by 0.4 % after 8 micro-batches, 0.7 % after 32 and 1.4 %
after 128 (relative to their norm, of random ones), in fp32 by no more than the 0.17 % that each was rounded by: adamw
and adamw_offload, which have room for it, add up in fp32.

A bfloat16 weight has 8 bits: an update at a rate near 1e-6 is lost in it unless a master keeps what rounding drops, or
rounding is by chance, up as often as the part that is dropped is large.
"""

from __future__ import annotations

import importlib.util
from contextlib import ExitStack, contextmanager, nullcontext

import torch
from torch import Tensor
from transformers import PreTrainedModel

from toolx_kernels.errors import InputError
from toolx_kernels.reference import compute_dtype
from toolx_kernels.train.config import UpdateSettings
from toolx_kernels.train.update.offload import OffloadedAdamW
from toolx_kernels.train.update.optimizer import Optimizer, moments, seeded

CHUNK = 1 << 22  # weights that are in fp32 at a time while they are rounded


def make_optimizer(model: PreTrainedModel, args: UpdateSettings, learning_rate: float) -> Optimizer:
    """The optimizer that ``args.optim`` names, of the parameters of ``model`` that need a gradient.

    Raises:
        InputError: the optimizer needs a package that is not installed, or another dtype of the weights.
    """
    kinds = {
        "adamw": AdamW,
        "adamw_8bit": AdamW8bit,
        "adamw_stochastic": StochasticAdamW,
        "adamw_offload": OffloadedAdamW,
    }
    return kinds[args.optim](model, args, learning_rate)


class AdamW(Optimizer):
    """torch's fused AdamW; weights below fp32 have fp32 masters, and gradients that are added up in fp32."""

    def __init__(self, model: PreTrainedModel, args: UpdateSettings, learning_rate: float):
        super().__init__(model, args, learning_rate)
        for parameter in self.parameters.values():
            parameter.grad_dtype = compute_dtype(parameter)

    def close(self) -> None:
        super().close()
        for parameter in self.parameters.values():
            parameter.grad_dtype = parameter.dtype

    def _updating(self, seed: tuple[int, int]):
        return nullcontext()

    def _prepare(self, name: str) -> None:
        parameter = self.parameters[name]
        state, dtype = self.base.state[parameter], compute_dtype(parameter)
        if not state:
            state |= moments(parameter, dtype, parameter.device)
            if parameter.dtype != dtype:
                state["master"] = parameter.detach().to(dtype)

    def _update(self, name: str, gradient: Tensor, clip: Tensor) -> None:
        parameter = self.parameters[name]
        state = self.base.state[parameter]
        weight = state.get("master", parameter)
        self._fused_adamw(weight, gradient.mul_(clip), state["exp_avg"], state["exp_avg_sq"], state["step"])
        if weight is not parameter:
            parameter.copy_(weight)


class StochasticAdamW(Optimizer):
    """AdamW with fp32 moments on bfloat16 weights that are rounded stochastically: right on average, without masters.

    Raises:
        InputError: the trained weights are not bfloat16.
    """

    def __init__(self, model: PreTrainedModel, args: UpdateSettings, learning_rate: float):
        super().__init__(model, args, learning_rate)
        others = {p.dtype for p in self.parameters.values()} - {torch.bfloat16}
        if others:
            dtype = str(others.pop()).removeprefix("torch.")
            raise InputError(
                f"optim='adamw_stochastic' rounds bfloat16 weights, and {dtype} ones are trained here: use "
                "--optim adamw, or --dtype bfloat16 without an adapter."
            )

    def _updating(self, seed: tuple[int, int]):
        return seeded(seed, self.device)

    def _prepare(self, name: str) -> None:
        parameter = self.parameters[name]
        state = self.base.state[parameter]
        if not state:
            state |= moments(parameter, torch.float32, parameter.device)

    def _update(self, name: str, gradient: Tensor, clip: Tensor) -> None:
        parameter = self.parameters[name]
        state = self.base.state[parameter]
        flat = [t.reshape(-1).split(CHUNK) for t in (gradient, state["exp_avg"], state["exp_avg_sq"])]
        for weight, gradients, first, second in zip(parameter.detach().view(-1).split(CHUNK), *flat, strict=True):
            exact = weight.float()
            self._fused_adamw(exact, gradients.float().mul_(clip), first, second, state["step"].clone())
            weight.copy_(round_stochastically(exact))
        state["step"] += 1


def round_stochastically(exact: Tensor) -> Tensor:
    """fp32 to bfloat16, away from zero with the probability that makes the mean of many roundings ``exact``.

    A finite fp32 number lies between two bfloat16 ones that its upper 16 bits name; its lower 16 bits are how far it
    has gone from the one to the other.
    """
    noise = torch.randint(1 << 16, exact.shape, dtype=torch.int32, device=exact.device)
    return ((exact.view(torch.int32) + noise) & -(1 << 16)).view(torch.float32).bfloat16()


class AdamW8bit(Optimizer):
    """torchao's AdamW with 8-bit moments; bfloat16 weights are rounded stochastically.

    Moments of parameters with fewer than 4096 elements, or whose number 256 does not divide, stay in the dtype of the
    weight. On a GPU torchao compiles its step once for each shape of a parameter; without, intermediate fp32 copies of
    the whole parameter would be made. On a CPU it runs as it is written, without a compiler.

    Raises:
        InputError: torchao is not installed.
    """

    def _make_base(self, parameters: list[Tensor], **settings) -> torch.optim.Optimizer:
        if importlib.util.find_spec("torchao") is None:
            raise InputError("optim='adamw_8bit' needs torchao: pip install 'toolx_kernels[optim]'.")
        from torchao.optim import AdamW8bit as EightBit

        optimizer = EightBit(parameters, bf16_stochastic_round=True, **settings)
        optimizer.param_groups[0]["lr"] = settings["lr"]  # torchao's own is a tensor, a schedule's a number
        return optimizer

    @contextmanager
    def _updating(self, seed: tuple[int, int]):
        with ExitStack() as stack:
            stack.enter_context(seeded(seed, self.device))
            if self.device.type == "cpu":
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            yield

    def _prepare(self, name: str) -> None:
        # torchao makes the states in its step: one of rate 0 with a gradient of zeros leaves the weight as it is
        parameter = self.parameters[name]
        if not self.base.state[parameter]:
            self._step(parameter, torch.zeros_like(parameter), 0.0)
            self.base.state[parameter]["step"].zero_()

    def _update(self, name: str, gradient: Tensor, clip: Tensor) -> None:
        self._step(self.parameters[name], gradient.mul_(clip), self.base.param_groups[0]["lr"])

    def _step(self, parameter: Tensor, gradient: Tensor, rate: float) -> None:
        group = self.base.param_groups[0]
        before = dict(group)
        group |= {"params": [parameter], "lr": torch.tensor(rate, dtype=torch.float32)}
        parameter.grad = gradient
        try:
            self.base.step()
        finally:
            parameter.grad = None
            group |= before
