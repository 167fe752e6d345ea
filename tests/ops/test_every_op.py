"""Every op once, small and ragged, against float64, on the GPU if there is one; compute-sanitizer runs this file too.

N, D and V are not multiples of a tile, and rows of the vocabulary do not start at aligned addresses.
"""

import pytest
import torch

from tests.ops.attention.cases import assert_as_good_as_torch, make_grouped
from tests.small_models import small_model
from toolx_kernels import (
    RolloutEngine,
    SamplingParams,
    kv_write,
    linear_grpo_loss,
    linear_logprob,
    reference,
    sample,
)
from toolx_kernels.loss_config import GRPOLossConfig

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
N, D, V = 37, 72, 1003
LENGTHS = [9, 1, 8, 3, 0, 5, 7, 4]  # two groups of four completions
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Relative errors: 16-bit gradients are rounded once in the workspace and once at the end.
GRADIENT_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 4e-3, torch.float16: 4e-3}
# A CPU has no matrix product with 16-bit inputs and an fp32 result.
STATISTICS_TOLERANCE = 1e-2 if DEVICE.type == "cpu" else 1e-4


def make_head(dtype, extras):
    """The leaves of the head, and the other arguments of ``linear_logprob``."""
    g = torch.Generator().manual_seed(0)
    leaves = {"hidden": torch.randn(N, D, generator=g), "weight": torch.randn(V, D, generator=g) / 3}
    options = {"targets": torch.randint(V, (N,), generator=g).to(DEVICE)}
    options["targets"][-1] = V - 1  # the last column of the last, partial tile
    if extras:
        leaves["bias"] = torch.randn(V, generator=g)
        options |= {"softcap": 4.0, "temperature": torch.linspace(0.5, 1.5, N).to(DEVICE)}
    return {name: leaf.to(DEVICE, dtype).requires_grad_() for name, leaf in leaves.items()}, options


def double(leaves):
    return {name: leaf.detach().double().requires_grad_(leaf.requires_grad) for name, leaf in leaves.items()}


def gradients(loss, leaves):
    wanted = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
    return dict(zip(wanted, torch.autograd.grad(loss, wanted.values()), strict=True))


def same_dtype_torch(hidden, weight, targets, bias=None, softcap=None, temperature=1.0):
    """Log-probs as plain torch code computes them: logits in the weights' dtype, softmax in fp32."""
    logits = torch.nn.functional.linear(hidden, weight, bias).float()
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits / (temperature[:, None] if torch.is_tensor(temperature) else temperature)
    return logits.log_softmax(-1).gather(-1, targets[:, None]).squeeze(-1)


def assert_as_good(mine, torchs, truth, tolerance, what):
    """Asserts ``|mine - truth| <= |same-dtype torch - truth| + tolerance``, in norms relative to the truth's norm."""

    def error(value):
        return float((value.detach().double() - truth.detach()).norm() / truth.detach().norm())

    assert error(mine) <= error(torchs) + tolerance, (what, error(mine), error(torchs))


@pytest.mark.parametrize("extras", [False, True], ids=["plain", "bias-softcap-temperature"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_linear_logprob(dtype, extras):
    leaves, options = make_head(dtype, extras)
    exact_leaves = double(leaves)
    upstream = torch.linspace(-1, 2, N, device=DEVICE)
    truth = reference.linear_logprob(**exact_leaves, **options, entropy=True)
    ours = linear_logprob(**leaves, **options, entropy=True)
    by_hand = same_dtype_torch(**leaves, **options)
    assert_as_good(ours.logprobs, by_hand, truth.logprobs, 1e-5, "logprobs")
    for name in ("lse", "entropy"):
        mine, true = getattr(ours, name), getattr(truth, name)
        torch.testing.assert_close(mine.double(), true, rtol=STATISTICS_TOLERANCE, atol=1e-4)
    exact = gradients((truth.logprobs * upstream).sum(), exact_leaves)
    torchs = gradients((by_hand * upstream).sum(), leaves)
    for name, mine in gradients((ours.logprobs * upstream).sum(), leaves).items():
        assert_as_good(mine, torchs[name], exact[name], GRADIENT_TOLERANCE[dtype], name)
    with torch.no_grad():
        alone = linear_logprob(**leaves, **options)
    assert_as_good(alone.logprobs, by_hand, truth.logprobs, 1e-5, "logprobs, forward only")


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_linear_grpo_loss(dtype, frozen, level):
    leaves, options = make_head(dtype, extras=False)
    leaves["weight"].requires_grad_(not frozen)
    exact_leaves = double(leaves)
    g = torch.Generator().manual_seed(1)
    old = reference.linear_logprob(**exact_leaves, **options).logprobs.detach()
    old += 0.1 * torch.rand(N, generator=g).to(DEVICE)  # well inside the clip: no token's clip depends on rounding
    options |= {
        "cu_seqlens": torch.tensor([0, *LENGTHS], dtype=torch.int32).cumsum(0, dtype=torch.int32).to(DEVICE),
        "rewards": torch.tensor([1.0, 0.0, 0.5, 0.0, 1.0, 1.0, 1.0, 1.0], device=DEVICE),  # the second group is dead
        "group_size": 4,
        "config": GRPOLossConfig(importance_sampling_level=level),
    }
    truth = reference.linear_grpo_loss(**exact_leaves, **options, old_logprobs=old)
    runs = [linear_grpo_loss(**leaves, **options, old_logprobs=old.float()) for _ in range(2)]
    torch.testing.assert_close(runs[0].loss.double(), truth.loss, rtol=STATISTICS_TOLERANCE, atol=1e-4)
    first, second = (gradients(run.loss, leaves) for run in runs)
    exact = gradients(truth.loss, exact_leaves)
    for name, mine in first.items():
        assert torch.equal(mine, second[name]), f"{name} differs between two runs"
        assert_as_good(mine, exact[name], exact[name], GRADIENT_TOLERANCE[dtype], name)
    dead_rows = first["hidden"][sum(LENGTHS[:4]) :]
    assert (dead_rows == 0).all()


def test_kv_write():
    g = torch.Generator().manual_seed(2)
    key, value = (torch.randn(11, 3, 24, generator=g).to(DEVICE, torch.bfloat16) for _ in range(2))
    slots = torch.randperm(4 * 5, generator=g)[:11].to(DEVICE)
    slots[3] = -1
    written, expected = ([torch.full((4, 5, 3, 24), 7.0, device=DEVICE).bfloat16() for _ in range(2)] for _ in range(2))
    kv_write(key, value, *written, slots)
    reference.kv_write(key, value, *expected, slots)
    torch.testing.assert_close(written, expected, rtol=0, atol=0)


@pytest.mark.parametrize("shared", [False, True], ids=["alone", "groups"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_paged_attention(dtype, shared):
    groups = [(2, [(1, 1), (9, 1), (4, 3)]), (0, [(21, 21), (5, 0)]), (11, [(1, 1), (7, 5)])]
    case = make_grouped(groups, 7, heads=6, dim=20, dtype=dtype)
    for window, softcap in [(0, 0.0), (30, 0.0), (0, 4.0)]:
        assert_as_good_as_torch(case if shared else case._replace(sharing={}), softcap, window)


@pytest.mark.parametrize("filters", [{}, {"top_k": 50, "top_p": 0.9, "min_p": 0.01}], ids=["plain", "filtered"])
@pytest.mark.parametrize("extras", [False, True], ids=["plain", "bias-softcap"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sample(dtype, extras, filters):
    leaves, options = make_head(dtype, extras)
    inputs = {name: leaf.detach() for name, leaf in leaves.items()}
    exact_inputs = {name: leaf.double() for name, leaf in inputs.items()}
    streams = torch.arange(5 * N, device=DEVICE).view(N, 5)
    settings = {"temperature": 0.7, "softcap": options.get("softcap"), **filters}
    first, second = (sample(**inputs, streams=streams, **settings) for _ in range(2))
    truth = reference.sample(**exact_inputs, streams=streams, **settings)
    assert torch.equal(first.tokens, truth.tokens)  # in each row the best two differ by more than rounding
    for name in truth._fields[1:]:
        torch.testing.assert_close(getattr(first, name).double(), getattr(truth, name), rtol=1e-4, atol=1e-4)
    for mine, again in zip(first, second, strict=True):
        assert torch.equal(mine, again)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rollouts(dtype):
    """With so few pages that a row has to wait, pages are shared, copied and freed; results are those with enough."""
    model = small_model("llama").to(DEVICE, dtype)
    prompts = [[5, 6, 7, 8, 9], [5, 6, 7, 8, 10, 11, 12]]
    params = SamplingParams(6, temperature=0.8)
    tight, roomy = (RolloutEngine(model, page_size=4, max_pages=pages) for pages in (7, 60))
    for engine in (tight, roomy):
        groups = engine.generate(prompts, 3, params)
        assert [len(c.ids) for g in groups for c in g.completions] == [6] * 6
        assert all(-20 < logprob <= 0 for g in groups for c in g.completions for logprob in c.logprobs)
        assert engine.pool.n_held == 0
    if dtype == torch.float32:
        again = tight.generate(prompts, 3, params)
        assert [[c.ids for c in g.completions] for g in again] == [[c.ids for c in g.completions] for g in groups]
