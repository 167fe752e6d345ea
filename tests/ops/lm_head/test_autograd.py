"""Other ways to differentiate than a backward pass are refused, and tensors of inference mode are read."""

import pytest
import torch
from torch.autograd import forward_ad

from tests.ops.cases import make_case, make_head
from toolx_kernels.errors import InputError
from toolx_kernels.loss_config import GRPOLossConfig
from toolx_kernels.ops.lm_head.linear_grpo import linear_grpo_loss
from toolx_kernels.ops.lm_head.linear_logprob import linear_logprob

CASE, HEAD = make_case(extras=("bias",)), make_head(extras=("bias", "temperature"))


def scalar(of):
    """A scalar function of the named arguments of the op, the others being those of its case."""
    if of is linear_logprob:
        return lambda **given: linear_logprob(**HEAD | given).logprobs.sum()
    return lambda **given: linear_grpo_loss(**CASE | given).loss


def forward_mode(function, value):
    with forward_ad.dual_level():
        return function(forward_ad.make_dual(value, torch.ones_like(value)))


WAYS = {
    "jvp": lambda function, value: torch.func.jvp(function, (value,), (torch.ones_like(value),)),
    "jacfwd": lambda function, value: torch.func.jacfwd(function)(value),
    "grad": lambda function, value: torch.func.grad(function)(value),
    "vjp": lambda function, value: torch.func.vjp(function, value),
    "vmap of jvp": lambda function, value: torch.func.vmap(
        lambda v: torch.func.jvp(function, (v,), (torch.ones_like(v),))
    )(value[None]),
    "forward mode": forward_mode,
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("of", [linear_grpo_loss, linear_logprob])
def test_derivatives_that_would_be_zeros_are_refused(of, way):
    names = ("hidden", "weight", "bias", "temperature" if of is linear_logprob else "old_logprobs")
    for name in names:
        case = HEAD if of is linear_logprob else CASE
        with pytest.raises(InputError, match="a backward pass only: use torch.autograd.grad"):
            WAYS[way](lambda value, name=name: scalar(of)(**{name: value}), case[name])


def test_rewards_are_refused_too():
    with pytest.raises(InputError, match="a backward pass only"):
        torch.func.jvp(lambda value: scalar(linear_grpo_loss)(rewards=value), (CASE["rewards"],), (CASE["rewards"],))


@pytest.mark.parametrize("of", [linear_grpo_loss, linear_logprob])
def test_vmap_has_the_gradients_of_a_loop(of):
    function = scalar(of)
    case = HEAD if of is linear_logprob else CASE
    hidden = torch.stack([case["hidden"], 2 * case["hidden"]]).requires_grad_()
    weight = case["weight"].clone().requires_grad_()
    mapped = torch.func.vmap(lambda h: function(hidden=h, weight=weight))(hidden)
    looped = torch.stack([function(hidden=h, weight=weight) for h in hidden])
    for mine, theirs in zip(*(torch.autograd.grad(x.sum(), (hidden, weight)) for x in (mapped, looped)), strict=True):
        torch.testing.assert_close(mine, theirs)


def in_inference_mode(case, names):
    with torch.inference_mode():
        return case | {name: case[name].clone() for name in names}


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("of", [linear_grpo_loss, linear_logprob])
def test_tensors_of_inference_mode(of, recompute):
    case = HEAD if of is linear_logprob else CASE
    more = {} if of is linear_logprob else {"config": GRPOLossConfig(recompute=recompute)}
    given = in_inference_mode(case, [name for name in case if torch.is_tensor(case[name])])

    def result(arguments):
        output = of(**arguments, **more)
        return output.logprobs.sum() if of is linear_logprob else output.loss

    expected = result(case)
    assert result(given) == expected
    leaves = {name: case[name].clone().requires_grad_() for name in ("hidden", "weight", "bias")}
    constants = {name: value for name, value in given.items() if name not in leaves}
    grads = torch.autograd.grad(result(constants | leaves), leaves.values())
    plain = torch.autograd.grad(result(case | leaves), leaves.values())
    assert all(map(torch.equal, grads, plain))

    for name in ("hidden", "weight"):
        mixed = case | {"bias": leaves["bias"], name: given[name]}
        if of is linear_grpo_loss and not recompute:
            assert result(mixed).requires_grad
        else:
            with pytest.raises(InputError, match=rf"{name} was made under torch.inference_mode.*{name}.clone\(\)"):
                result(mixed)
