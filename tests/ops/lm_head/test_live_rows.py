"""Which rows are computed: the kernels find what plain torch finds, whatever the values."""

import itertools

import pytest
import torch

from tests.ops.cases import DEVICE, needs_triton
from toolx_kernels.loss_config import GRPOLossConfig
from toolx_kernels.ops.lm_head import live_rows

LENGTHS = (5, 0, 1300, 9, 600, 1)
N, VOCAB = sum(LENGTHS), 50
DEAD, ALIVE = 7, 1400  # rows of the second-last and the third completion, whose advantage is and is not zero


def make_call(**change) -> live_rows.Call:
    g = torch.Generator().manual_seed(0)
    values = {
        "targets": torch.randint(VOCAB, (N,), generator=g),
        "temperature": torch.rand(N, generator=g) + 0.5,
        "vocab_size": VOCAB,
        "cu_seqlens": torch.tensor([0, *itertools.accumulate(LENGTHS)], dtype=torch.int32),
        "advantages": torch.tensor([1.0, 2.0, 0.0, 0.5, -1.0, 0.0]),
        "rewards": torch.rand(6, generator=g),
        "mask": torch.rand(N, generator=g) < 0.7,
        "denominator": None,
    } | change
    return live_rows.Call(*(x.to(DEVICE) if torch.is_tensor(x) else x for x in values.values()))


def with_one(name: str, row: int, value: float) -> dict:
    tensor = getattr(make_call(), name).clone()
    tensor[row] = value
    return {name: tensor, "mask": None}


@needs_triton
@pytest.mark.parametrize("settings", [{}, {"compute_all_logprobs": True, "loss_type": "dapo"}], ids=["live", "all"])
@pytest.mark.parametrize(
    "change",
    [
        {}, {"mask": None}, {"rewards": None, "denominator": torch.tensor(3.0)}, {"advantages": torch.zeros(6)},
        {"advantages": torch.tensor([1, 0, 2, 0, 0, 3])}, {"mask": torch.zeros(N, dtype=torch.bool)},
        with_one("targets", DEAD, VOCAB), with_one("targets", ALIVE, -1), with_one("temperature", ALIVE, 0.0),
        with_one("temperature", DEAD, torch.nan), with_one("temperature", N - 1, torch.inf),
        with_one("advantages", 1, torch.nan), with_one("rewards", 5, torch.inf),
    ],
)  # fmt: skip
def test_kernels_find_what_torch_finds(change, settings):
    arguments = make_call(**change), GRPOLossConfig(**settings), torch.float32
    ours, wanted = live_rows.in_triton(*arguments), live_rows.in_torch(*arguments)
    assert torch.equal(ours.facts[:3], wanted.facts[:3]) and ours.facts[3].any() == wanted.facts[3].any()
    n = int(wanted.facts[1].sum())
    for mine, theirs in zip(ours[1:], wanted[1:], strict=True):
        torch.testing.assert_close(mine[:n], theirs[:n], rtol=0, atol=0, equal_nan=True)


@needs_triton
@pytest.mark.parametrize("bounds", [[0, 1900, 3, 1800, 5, 1700, N], [-(2**40), 0, 1, 2, 3, 4, 2**40], [N + 9] * 7])
def test_kernels_stay_inside_whatever_the_bounds(bounds):
    call = make_call(cu_seqlens=torch.tensor(bounds), mask=None, advantages=torch.ones(6))
    found = live_rows.in_triton(call, GRPOLossConfig(), torch.float32)
    assert found.facts[0].tolist() == bounds and found.facts[1].max() <= N
