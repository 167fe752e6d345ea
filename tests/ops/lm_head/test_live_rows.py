"""Live rows, the rows that the loss computes: the kernels find the same rows as plain torch, for any values."""

import itertools
import math

import pytest
import torch

from tests.ops.cases import BACKENDS, DEVICE, needs_triton
from toolx_kernels.loss_config import GRPOLossConfig
from toolx_kernels.ops.lm_head import live_rows

LENGTHS = (5, 0, 1300, 9, 600, 1)
N, VOCAB = sum(LENGTHS), 50
DEAD, ALIVE = 7, 1400  # rows of the third and the second-last completion, with zero and nonzero advantage


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
        {}, {"mask": None}, {"rewards": None, "denominator": torch.tensor(3.0)},
        {"denominator": torch.tensor(-1.0)}, {"advantages": torch.zeros(6)},
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


# ---- token advantages

MASKED, SPARSE, LONE = 2, 700, 1899  # rows of the first, the third and the second-last completion


def by_token(*changed: tuple[int, float]) -> torch.Tensor:
    """Token advantages: in the first completion only the masked row has one, in the fourth none, in the fifth one."""
    g = torch.Generator().manual_seed(1)
    advantages = torch.randn(N, generator=g) * (torch.rand(N, generator=g) < 0.3)
    advantages[:5] = 0
    advantages[1305:1914] = 0
    for row, value in ((MASKED, 1.0), (SPARSE, 0.0), (LONE, -2.0), (N - 1, 0.5), *changed):
        advantages[row] = value
    return advantages


MASK = torch.arange(N) % 3 != MASKED


def wanted_rows(call, whole, every):
    """The rows to compute, whether all values that matter are valid, and the number of unmasked tokens."""
    advantages, targets, temperature = (x.tolist() for x in (call.advantages, call.targets, call.temperature))
    mask, rows = [True] * N if call.mask is None else call.mask.tolist(), []
    for start, end in itertools.pairwise(call.cu_seqlens.tolist()):
        unmasked = [row for row in range(start, end) if mask[row]]
        moving = [row for row in unmasked if advantages[row] != 0]
        rows += unmasked if every or (whole and moving) else moving
    fine = all(0 <= targets[row] < VOCAB and 0 < temperature[row] < math.inf for row in rows)
    return rows, fine and all(map(math.isfinite, advantages)), sum(mask)


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("every", [False, True], ids=["live", "all"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_advantages_by_token(backend, every, level):
    """An invalid value is reported only if its row is computed, an advantage that is not finite in any row."""
    config = GRPOLossConfig(compute_all_logprobs=every, importance_sampling_level=level)
    for change in (
        {}, with_one("targets", SPARSE, VOCAB), with_one("temperature", 1310, torch.nan),
        with_one("targets", MASKED, VOCAB) | {"mask": MASK},
        {"advantages": by_token((MASKED, torch.inf))}, {"advantages": by_token((1310, torch.nan))},
        {"advantages": torch.zeros(N)},
    ):  # fmt: skip
        call = make_call(**{"advantages": by_token(), "rewards": None} | change | {"mask": change.get("mask", MASK)})
        rows, fine, n_unmasked = wanted_rows(call, level == "sequence", every)
        found = getattr(live_rows, f"in_{backend}")(call, config, torch.float32)
        assert found.facts[1].sum() == len(rows) and found.facts[2].sum() == n_unmasked
        assert found.facts[3].any() == (not fine)
        assert found.rows[: len(rows)].tolist() == rows
        torch.testing.assert_close(found.advantages[: len(rows)], call.advantages[rows], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_advantages_of_completions_are_those_of_their_tokens(backend, level):
    find, config = getattr(live_rows, f"in_{backend}"), GRPOLossConfig(importance_sampling_level=level)
    call = make_call(rewards=None)
    of_tokens = call.advantages.repeat_interleave(torch.tensor(LENGTHS, device=DEVICE))
    one, other = (find(given, config, torch.float32) for given in (call, call._replace(advantages=of_tokens)))
    n = int(one.facts[1].sum())
    assert other.facts.equal(one.facts) and all(b[:n].equal(a[:n]) for a, b in zip(one[1:], other[1:], strict=True))
