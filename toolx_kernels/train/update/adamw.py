"""AdamW variants, chosen by the setting ``optim``.

Bytes per trained parameter: weight + gradient + optimizer state:

    adamw             float32: 4 + 4 + 8; bfloat16: 2 + 4 + 12 (fp32 masters, gradients accumulated in fp32)
    adamw_8bit        float32: 4 + 4 + 2; bfloat16: 2 + 2 + 2
    adamw_stochastic  bfloat16: 2 + 2 + 8
    adamw_offload     on the GPU 2 or 4 and one parameter's gradient; in CPU memory 4 + 12

Accumulating gradients of bfloat16 weights in bfloat16 gives an error of 0.4 % after 8 micro-batches, 0.7 % after 32 and
1.4 % after 128 (relative to the norm, random gradients); in fp32 the error stays within the 0.17 % from rounding each
gradient. adamw and adamw_offload, which have room for it, accumulate in fp32.

A bfloat16 weight has 8 bits of precision: an update at a rate near 1e-6 is lost unless an fp32 master keeps what
rounding drops, or rounding is stochastic: up with a probability equal to the dropped fraction.
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

CHUNK = 1 << 22  # weights converted to fp32 at a time for rounding


def make_optimizer(model: PreTrainedModel, args: UpdateSettings, learning_rate: float) -> Optimizer:
    """Builds the optimizer ``args.optim`` for the parameters of ``model`` that need a gradient.

    Raises:
        InputError: the optimizer needs a package that is not installed, or weights of another dtype.
    """
    kinds = {
        "adamw": AdamW,
        "adamw_8bit": AdamW8bit,
        "adamw_stochastic": StochasticAdamW,
        "adamw_offload": OffloadedAdamW,
    }
    return kinds[args.optim](model, args, learning_rate)


class AdamW(Optimizer):
    """torch's fused AdamW; weights below fp32 have fp32 masters and fp32 gradient accumulation."""

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
    """AdamW with fp32 moments and stochastic rounding of bfloat16 weights: right on average, without masters.

    Raises:
        InputError: the trained weights are not bfloat16.
    """

    def __init__(self, model: PreTrainedModel, args: UpdateSettings, learning_rate: float):
        super().__init__(model, args, learning_rate)
        others = {p.dtype for p in self.parameters.values()} - {torch.bfloat16}
        if others:
            dtype = str(others.pop()).removeprefix("torch.")
            raise InputError(
                f"optim='adamw_stochastic' trains bfloat16 weights only, and this run trains {dtype}: use "
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
    """Rounds fp32 to bfloat16 at random, so that the mean of many roundings is ``exact``.

    The upper 16 bits of a finite fp32 number are the nearest bfloat16 number toward zero; its lower 16 bits are the
    fraction of the way to the next one, and become the probability of rounding away from zero.
    """
    noise = torch.randint(1 << 16, exact.shape, dtype=torch.int32, device=exact.device)
    return ((exact.view(torch.int32) + noise) & -(1 << 16)).view(torch.float32).bfloat16()


class AdamW8bit(Optimizer):
    """torchao's AdamW with 8-bit moments; bfloat16 weights are rounded stochastically.

    Parameters with fewer than 4096 elements, or with a number of elements that 256 does not divide, keep their moments
    in the dtype of the weight. On a GPU torchao compiles its step once per parameter shape; uncompiled, it would make
    fp32 copies of the whole parameter. On a CPU it runs uncompiled.

    Raises:
        InputError: torchao is not installed.
    """

    def _make_base(self, parameters: list[Tensor], **settings) -> torch.optim.Optimizer:
        if importlib.util.find_spec("torchao") is None:
            raise InputError("optim='adamw_8bit' needs torchao: pip install 'toolx_kernels[optim]'.")
        from torchao.optim import AdamW8bit as EightBit

        optimizer = EightBit(parameters, bf16_stochastic_round=True, **settings)
        optimizer.param_groups[0]["lr"] = settings["lr"]  # torchao makes it a tensor, a schedule sets numbers
        return optimizer

    @contextmanager
    def _updating(self, seed: tuple[int, int]):
        with ExitStack() as stack:
            stack.enter_context(seeded(seed, self.device))
            if self.device.type == "cpu":
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            yield

    def _prepare(self, name: str) -> None:
        # torchao makes the states in its step: a step at rate 0 with a zero gradient leaves the weight unchanged
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
