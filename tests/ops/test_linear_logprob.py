"""linear_logprob against the float64 definition."""

import pytest
import torch

from toolx_kernels import reference
from toolx_kernels.errors import InputError
from toolx_kernels.ops import tiles
from toolx_kernels.ops.linear_logprob import linear_logprob

SHAPES = [(1, 8, 5), (7, 16, 64), (33, 24, 1013), (64, 32, 512), (5, 3, 2)]  # N, D, V: aligned, ragged, odd


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Several row blocks and vocabulary tiles even at test sizes."""
    monkeypatch.setattr(tiles, "CPU_TILE_BYTES", 4096)
    monkeypatch.setattr(tiles, "CPU_WORKSPACE_BYTES", 64 << 10)


def make_case(n, d, v, dtype, extras, seed=0):
    g = torch.Generator().manual_seed(seed)
    tensors = {
        "hidden": torch.randn(n, d, generator=g).to(dtype),
        "weight": (torch.randn(v, d, generator=g) * 2 / d**0.5).to(dtype),
    }
    options = {"targets": torch.randint(v, (n,), generator=g)}
    if extras:
        tensors["bias"] = torch.randn(v, generator=g).to(dtype)
        options |= {"softcap": 3.0, "temperature": torch.rand(n, generator=g) + 0.5}
    return tensors, options


def run(function, tensors, options, entropy=True):
    """Outputs, and gradients under upstream gradients that differ from row to row and from output to output."""
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in tensors.items()}
    stats = function(leaves["hidden"], leaves["weight"], bias=leaves.get("bias"), entropy=entropy, **options)
    n = len(options["targets"])
    upstream = [torch.linspace(-1, 2, n), torch.linspace(0.5, -1, n), torch.linspace(1, -0.5, n) ** 2]
    loss = sum((out * up).sum() for out, up in zip(stats, upstream, strict=True) if out is not None)
    return stats, dict(zip(leaves, torch.autograd.grad(loss, leaves.values()), strict=True))


def as_double(tensors, options):
    return (
        {name: tensor.double() for name, tensor in tensors.items()},
        options | {k: v.double() for k, v in options.items() if isinstance(v, torch.Tensor) and v.is_floating_point()},
    )


@pytest.mark.parametrize("extras", [False, True], ids=["plain", "bias-softcap-temperature"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_no_worse_than_torch_in_the_same_dtype(shape, dtype, extras):
    tensors, options = make_case(*shape, dtype, extras)
    truth, true_grads = run(reference.linear_logprob, *as_double(tensors, options))
    plain, plain_grads = run(reference.linear_logprob, tensors, options)
    ours, our_grads = run(linear_logprob, tensors, options)
    tolerance = 1e-12 if dtype == torch.float64 else 2e-6
    for name, mine, theirs, true in zip(ours._fields, ours, plain, truth, strict=True):
        assert mine.dtype == (torch.float64 if dtype == torch.float64 else torch.float32), name
        scale = true.abs().max()
        assert (mine - true).abs().max() <= (theirs - true).abs().max() + tolerance * scale, name
    for name, true in true_grads.items():
        assert our_grads[name].dtype == dtype
        scale = true.abs().max()
        error = (our_grads[name].double() - true).abs().max()
        assert error <= (plain_grads[name].double() - true).abs().max() + tolerance * scale, name


def test_without_entropy_the_rest_is_the_same():
    tensors, options = make_case(33, 24, 1013, torch.float64, True)
    truth, true_grads = run(reference.linear_logprob, tensors, options, entropy=False)
    ours, grads = run(linear_logprob, tensors, options, entropy=False)
    assert ours.entropy is None
    torch.testing.assert_close(ours[:2], truth[:2], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(grads, true_grads, rtol=1e-11, atol=1e-12)


def test_reference_gradients_are_those_of_finite_differences():
    tensors, options = make_case(4, 3, 7, torch.float64, True)
    leaves = [tensor.requires_grad_() for tensor in tensors.values()]

    def stats(hidden, weight, bias):
        return tuple(reference.linear_logprob(hidden, weight, bias=bias, entropy=True, **options))

    assert torch.autograd.gradcheck(stats, leaves)


@pytest.mark.parametrize("level", [-500.0, 500.0])
def test_logits_far_from_zero(level):
    """Every logit strongly negative or positive, V no multiple of a tile: the running maximum starts low enough."""
    hidden, weight = torch.full((3, 4), 1.0), torch.full((1013, 4), level / 4) + torch.randn(1013, 4)
    targets = torch.tensor([0, 1012, 500])
    ours = linear_logprob(hidden, weight, targets, entropy=True)
    truth = reference.linear_logprob(hidden.double(), weight.double(), targets, entropy=True)
    for mine, true in zip(ours, truth, strict=True):
        torch.testing.assert_close(mine.double(), true, rtol=1e-5, atol=2e-4)


def test_a_token_excluded_by_an_infinite_bias():
    tensors, options = make_case(9, 16, 64, torch.float64, False)
    bias = torch.zeros(64, dtype=torch.float64)
    bias[10:20] = -torch.inf
    options["targets"] = torch.arange(9)
    tensors["bias"] = bias
    truth, true_grads = run(reference.linear_logprob, tensors, options)
    ours, grads = run(linear_logprob, tensors, options)
    torch.testing.assert_close(tuple(ours), tuple(truth))
    torch.testing.assert_close(grads, true_grads)
    assert all(grad.isfinite().all() for grad in grads.values())


def test_rows_without_upstream_gradient_are_left_out_and_change_nothing():
    tensors, options = make_case(33, 24, 1013, torch.float64, False)
    grads = []
    for function in (linear_logprob, reference.linear_logprob):
        leaves = [t.clone().requires_grad_() for t in tensors.values()]
        stats = function(*leaves, **options)
        upstream = torch.zeros(33, dtype=torch.float64)
        upstream[[3, 17, 30]] = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
        grads.append(torch.autograd.grad((stats.logprobs * upstream).sum(), leaves))
    torch.testing.assert_close(*grads, rtol=1e-11, atol=1e-12)
    assert (grads[0][0][[0, 1, 2]] == 0).all()


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_frozen_inputs_get_no_gradient(frozen):
    tensors, options = make_case(7, 16, 64, torch.float64, False)
    _, both = run(linear_logprob, tensors, options, entropy=False)
    leaves = {name: tensor.clone().requires_grad_(name != frozen) for name, tensor in tensors.items()}
    stats = linear_logprob(**leaves, **options)
    n = len(options["targets"])
    (stats.logprobs * torch.linspace(-1, 2, n) + stats.lse * torch.linspace(0.5, -1, n)).sum().backward()
    trained = ({"hidden", "weight"} - {frozen}).pop()
    torch.testing.assert_close(leaves[trained].grad, both[trained])
    assert leaves[frozen].grad is None


def test_strided_inputs():
    tensors, options = make_case(8, 16, 64, torch.float64, False)
    strided = {
        "hidden": torch.stack([tensors["hidden"], tensors["hidden"] * 9], 1)[:, 0],
        "weight": tensors["weight"].T.contiguous().T,
    }
    expected = run(linear_logprob, tensors, options)
    actual = run(linear_logprob, strided, options)
    torch.testing.assert_close(tuple(actual[0]), tuple(expected[0]))
    torch.testing.assert_close(actual[1], expected[1])


def test_no_rows():
    hidden, weight = torch.randn(0, 4, requires_grad=True), torch.randn(9, 4, requires_grad=True)
    stats = linear_logprob(hidden, weight, torch.zeros(0, dtype=torch.int64), entropy=True)
    stats.logprobs.sum().backward()
    assert stats.lse.shape == (0,) and (weight.grad == 0).all()


def test_same_bits_on_two_runs():
    tensors, options = make_case(64, 32, 512, torch.bfloat16, True)
    first, second = run(linear_logprob, tensors, options), run(linear_logprob, tensors, options)
    assert all(torch.equal(a, b) for a, b in zip(first[0], second[0], strict=True))
    assert all(torch.equal(first[1][name], second[1][name]) for name in first[1])


def test_no_tensor_of_tokens_times_vocabulary(monkeypatch):
    """The largest single allocation of forward and backward stays within the tile, far below N * V."""
    monkeypatch.setattr(tiles, "CPU_TILE_BYTES", 256 << 10)
    monkeypatch.setattr(tiles, "CPU_WORKSPACE_BYTES", 1 << 20)
    n, d, v = 512, 8, 4096
    hidden, weight = torch.randn(n, d, requires_grad=True), torch.randn(v, d, requires_grad=True)
    with torch.profiler.profile(profile_memory=True) as profile:
        linear_logprob(hidden, weight, torch.randint(v, (n,)), entropy=True).entropy.sum().backward()
    largest = max(event.cpu_memory_usage for event in profile.events())
    one_op = max(e.cpu_memory_usage for e in profile.events() if not e.cpu_children)
    assert 0 < one_op <= 256 << 10
    assert largest < n * v * 4 // 4


def test_ops_are_registered_properly():
    tensors, options = make_case(7, 16, 64, torch.float64, True)
    leaves = {name: tensor.requires_grad_() for name, tensor in tensors.items()}
    arguments = (
        leaves["hidden"],
        leaves["weight"],
        options["targets"],
        options["temperature"],
        leaves["bias"],
        3.0,
        True,
    )
    torch.library.opcheck(torch.ops.toolx.linear_logprob.default, arguments)
    detached = [a.detach() if isinstance(a, torch.Tensor) else a for a in arguments]
    logprobs, lse, entropy = torch.ops.toolx.linear_logprob(*detached)
    backward = (*detached[:6], lse, entropy, logprobs, lse, entropy, True, True, True)
    torch.library.opcheck(torch.ops.toolx.linear_logprob_backward.default, backward)


def test_under_compile_with_changing_lengths():
    compiled = torch.compile(
        lambda h, w, t: linear_logprob(h, w, t, entropy=True).logprobs,
        backend="aot_eager",
        fullgraph=True,
        dynamic=True,
    )
    for n in (3, 8, 13):
        tensors, options = make_case(n, 16, 64, torch.float64, False)
        expected = reference.linear_logprob(tensors["hidden"], tensors["weight"], options["targets"]).logprobs
        torch.testing.assert_close(compiled(tensors["hidden"], tensors["weight"], options["targets"]), expected)


def test_under_activation_checkpointing():
    tensors, options = make_case(7, 16, 64, torch.float32, False)
    _, expected = run(linear_logprob, tensors, options, entropy=False)

    def checkpointed(hidden, weight, bias=None, entropy=False, **kw):
        return torch.utils.checkpoint.checkpoint(
            lambda h, w: linear_logprob(h, w, **kw), hidden, weight, use_reentrant=False
        )

    _, actual = run(checkpointed, tensors, options, entropy=False)
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_costs_no_precision(dtype):
    tensors, options = make_case(33, 24, 1013, torch.float32, True)
    expected = run(linear_logprob, tensors, options)
    with torch.autocast("cpu", dtype=dtype):
        actual = run(linear_logprob, tensors, options)
    assert all(torch.equal(a, b) for a, b in zip(actual[0], expected[0], strict=True))
    assert all(torch.equal(actual[1][name], expected[1][name]) for name in expected[1])


@pytest.mark.parametrize("used", ["logprobs", "lse", "entropy"])
def test_each_output_alone_carries_its_gradient(used):
    tensors, options = make_case(9, 16, 64, torch.float64, True)
    grads = []
    for function in (linear_logprob, reference.linear_logprob):
        leaves = {name: tensor.clone().requires_grad_() for name, tensor in tensors.items()}
        stats = function(leaves["hidden"], leaves["weight"], bias=leaves["bias"], entropy=True, **options)
        out = getattr(stats, used)
        grads.append(torch.autograd.grad((out * torch.linspace(-1, 2, 9)).sum(), leaves.values()))
    torch.testing.assert_close(*grads, rtol=1e-11, atol=1e-12)


def test_compiled_backward_of_transposed_hidden():
    tensors, options = make_case(7, 16, 64, torch.float32, False)
    strided = tensors["hidden"].T.contiguous().requires_grad_()

    def loss(hidden_t):
        return linear_logprob((hidden_t * 1.5).T, tensors["weight"], options["targets"]).logprobs.sum()

    (expected,) = torch.autograd.grad(loss(strided), strided)
    (actual,) = torch.autograd.grad(torch.compile(loss, backend="aot_eager", fullgraph=True)(strided), strided)
    torch.testing.assert_close(actual, expected)
    arguments = (strided.detach().T, tensors["weight"], options["targets"], torch.ones(7), None, 0.0, True)
    logprobs, lse, entropy = torch.ops.toolx.linear_logprob(*arguments)
    backward = (*arguments[:6], lse, entropy, logprobs, lse, entropy, True, True, False)
    torch.library.opcheck(torch.ops.toolx.linear_logprob_backward.default, backward)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"weight": torch.zeros(9, 5)}, r"hidden \(2, 4\) and weight \(9, 5\)"),
        ({"targets": torch.tensor([0, 1], dtype=torch.int32)}, "must be int64"),
        ({"targets": torch.tensor([0])}, "one id for each of the 2 rows"),
        ({"targets": torch.tensor([0, 9])}, r"targets\[1\] = 9 is outside the vocabulary of 9"),
        ({"targets": torch.tensor([-100, 1])}, r"targets\[0\] = -100 .* mask such rows"),
        ({"bias": torch.zeros(8)}, r"bias \(8,\) must have one entry for each of the 9"),
        ({"temperature": 0.0}, "temperature=0.0 must be positive"),
        ({"temperature": torch.tensor([1.0, -1.0])}, r"temperature\[1\] = -1.0 must be positive"),
        ({"temperature": torch.ones(3)}, r"temperature has shape \(3,\)"),
    ],
)
def test_bad_input_is_named(change, message):
    arguments = {"hidden": torch.zeros(2, 4), "weight": torch.zeros(9, 4), "targets": torch.tensor([0, 1])}
    with pytest.raises(InputError, match=message):
        linear_logprob(**(arguments | change))


def test_sweep_stays_within_its_bounds(monkeypatch):
    monkeypatch.undo()
    for n, v, d in [(1, 1, 1), (1, 152_000, 1536), (65_536, 151_936, 4096), (4096, 49_152, 576), (8, 256_000, 8192)]:
        for device in ("cpu", "cuda"):
            rows, columns = tiles.choose_sweep(n, v, d, torch.device(device))
            assert 1 <= rows <= n and 1 <= columns <= v
            alive = 4 * (2 * columns * d + tiles.TILES * rows * columns)  # bytes
            workspace = tiles.CPU_WORKSPACE_BYTES if device == "cpu" else tiles.GPU_WORKSPACE_BYTES
            assert alive <= min(workspace, max(n * v, tiles.SMALLEST_BUDGET_BYTES)), (n, v, d, device)
