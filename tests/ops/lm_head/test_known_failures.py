"""Known failures of other fused losses, one test for each."""

import itertools
import math
import os

import pytest
import torch

from tests.ops.cases import (
    BACKENDS,
    DEAD_GROUP,
    DEVICE,
    EXTRAS,
    PATHS,
    N,
    assert_agrees,
    assert_equal_gradients,
    double,
    force,
    make_case,
    make_head,
    needs_triton,
    run_head,
    run_loss,
    sweep_triton,
    use_backend,
    with_leaves,
    without_logprobs,
)
from toolx_kernels import reference
from toolx_kernels.loss_config import GRPOLossConfig
from toolx_kernels.ops.lm_head import gradients as module
from toolx_kernels.ops.lm_head import per_row, sweep_torch, tiles
from toolx_kernels.ops.lm_head.head import Head
from toolx_kernels.ops.lm_head.linear_grpo import linear_grpo_loss
from toolx_kernels.ops.lm_head.linear_logprob import linear_logprob
from toolx_kernels.ops.lm_head.objective import RowVectors

ON_BACKENDS = pytest.mark.parametrize("backend", BACKENDS)
ON_PATHS = pytest.mark.parametrize("path", PATHS)
# The interpreter is slow, and "one chunk" and "deferred" make no difference to Triton's sweeps.
ON_EVERYTHING = pytest.mark.parametrize(
    "path, backend",
    [(path, "torch") for path in PATHS]
    + [pytest.param(path, "triton", marks=needs_triton) for path in ("chunks", "recompute")],
)
OLD, SAMPLER = "old_logprobs", "sampler_logprobs"


def on(path, **settings):
    return GRPOLossConfig(recompute=path == "deferred", **settings)


# ---- numbers


@ON_EVERYTHING
def test_no_phantom_columns_beyond_the_vocabulary(path, backend, monkeypatch):
    """V is not a multiple of a tile and all logits are near -200: a column of zeros would get all the probability."""
    case = without_logprobs(make_case(vocab=33, dim=24))
    case["hidden"][:, 0], case["weight"][:, 0] = 10.0, -20.0
    truth, exact = run_loss(reference.linear_grpo_loss, double(case), on(path))
    assert truth.logprobs.min() > -20
    force(monkeypatch, path, rows=16, columns=20)
    use_backend(monkeypatch, backend)
    ours, grads = run_loss(linear_grpo_loss, case, on(path))
    assert_agrees(ours, truth, 2e-4)
    assert_equal_gradients(grads, exact, 1e-4)


@ON_BACKENDS
@pytest.mark.parametrize("level", [-500.0, 500.0])
def test_logits_that_are_all_far_from_zero(level, backend, monkeypatch):
    case = make_head(3, 4, 1013)
    case["hidden"] = torch.ones(3, 4, device=DEVICE)
    case["weight"] = level / 4 + case["weight"]
    case["targets"] = torch.tensor([0, 1012, 500], device=DEVICE)
    truth, exact = run_head(reference.linear_logprob, double(case))
    use_backend(monkeypatch, backend)
    ours, grads = run_head(linear_logprob, case)
    for mine, true in zip(ours, truth, strict=True):
        torch.testing.assert_close(mine.double(), true, rtol=1e-5, atol=2e-4)
    assert_equal_gradients(grads, exact, 1e-4)


@pytest.mark.parametrize("known", [False, True], ids=["target anchor", "anchor of old"])
@pytest.mark.parametrize(
    "logprob, backend",
    [(logprob, "torch") for logprob in (-54.0, -56.0, -120.0, -3000.0)]
    + [pytest.param(logprob, "triton", marks=needs_triton) for logprob in (-56.0, -120.0)],
)
def test_targets_of_hardly_any_probability(logprob, known, backend, monkeypatch, taken):
    """Near and far beyond the overflow of exponentials relative to the target: correct, or redone by recomputing."""
    case = without_logprobs(make_case(vocab=101, noise=0.02), OLD) | {"softcap": None}
    for row in (4, 21):
        case["weight"][case["targets"][row]] = 0
        hidden = case["hidden"][row].double()
        logits = case["weight"].double() @ hidden
        case["hidden"][row] = (hidden * (-logprob / logits.max())).float()
    own = reference.linear_logprob(*(double(case)[name] for name in ("hidden", "weight", "targets"))).logprobs
    assert logprob - 3 < own[4] < logprob + 1e-3
    case[OLD] = own.float() + 0.05
    if not known:
        del case[OLD]
    config = GRPOLossConfig(entropy_coef=0.01)
    truth, exact = run_loss(reference.linear_grpo_loss, double(case), config)
    force(monkeypatch, "one chunk")
    use_backend(monkeypatch, backend)
    ours, grads = run_loss(linear_grpo_loss, case, config)
    if logprob < -70:
        assert taken == ["recompute"]
    if logprob > -50:
        assert taken == ["single"]
    assert_agrees(ours, truth, 1e-5 * max(1, -logprob / 10))
    assert_equal_gradients(grads, exact, 1e-5 * max(1, -logprob / 10))


@pytest.mark.parametrize("drift", [-100.0, -56.0, 56.0, 100.0])
def test_old_log_probs_that_are_no_anchor(drift, monkeypatch, taken):
    """Old log-probs far too low or too high, as after a bad update or with a wrong temperature."""
    case = without_logprobs(make_case(), OLD)
    case[OLD] = case[OLD] + drift
    config = GRPOLossConfig(loss_type="cispo", epsilon_high=5.0)
    truth, exact = run_loss(reference.linear_grpo_loss, double(case), config)
    force(monkeypatch, "chunks")
    ours, grads = run_loss(linear_grpo_loss, case, config)
    torch.testing.assert_close(ours.logprobs.double(), truth.logprobs, rtol=1e-5, atol=1e-5)
    assert_equal_gradients(grads, exact, 1e-4)


def test_float64_does_not_creep_in():
    """An fp32 head with float64 rewards and log-probs gives fp32; a float64 head gives float64."""
    case = make_case(extras=EXTRAS)
    wide = {name: case[name].double() for name in ("rewards", OLD, "ref_logprobs", SAMPLER, "temperature")}
    wide["denominator"] = torch.tensor(8.0, dtype=torch.float64, device=DEVICE)
    for path in ("single", "deferred"):
        output, grads = run_loss(linear_grpo_loss, case | wide, on(path, beta=0.1, entropy_coef=0.1))
        floats = [output.loss, output.logprobs, output.entropy, *output.stats.values(), *grads.values()]
        assert {value.dtype for value in floats} == {torch.float32}
        narrow, expected = run_loss(linear_grpo_loss, case | {"denominator": 8}, on(path, beta=0.1, entropy_coef=0.1))
        torch.testing.assert_close(output.loss, narrow.loss)
        assert_equal_gradients(grads, expected, 1e-5)
    output, grads = run_loss(linear_grpo_loss, double(case), GRPOLossConfig())
    assert {value.dtype for value in (output.loss, output.logprobs, *grads.values())} == {torch.float64}
    stats = linear_logprob(**make_head(extras=EXTRAS) | {"temperature": torch.ones(N).double().to(DEVICE)})
    assert stats.logprobs.dtype == torch.float32


# ---- sizes


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_one_sequence_of_70_000_tokens(level):
    n, dim, vocab = 70_000, 2, 3
    g = torch.Generator().manual_seed(0)
    case = {
        "hidden": torch.randn(n, dim, generator=g).to(DEVICE),
        "weight": torch.randn(vocab, dim, generator=g).to(DEVICE),
        "targets": torch.randint(vocab, (n,), generator=g).to(DEVICE),
        "cu_seqlens": torch.tensor([0, n], dtype=torch.int32, device=DEVICE),
        "advantages": torch.ones(1, device=DEVICE),
    }  # fmt: skip
    config = GRPOLossConfig(importance_sampling_level=level)
    truth, exact = run_loss(reference.linear_grpo_loss, double(case), config)
    ours, grads = run_loss(linear_grpo_loss, case, config)
    torch.testing.assert_close(ours.loss.double(), truth.loss, rtol=1e-5, atol=1e-5)
    assert_equal_gradients(grads, exact, 1e-5)


LAUNCHED = (
    "sweep_kernel", "add_online_kernel", "target_logits_kernel", "reweigh_kernel", "move_rows_kernel",
    "place_targets_kernel", "finish_rows_kernel", "statistics_kernel",
)  # fmt: skip


class Launches:
    """Stand-in for a kernel that records grid and arguments instead of running."""

    def __init__(self, kernel):
        self.kernel, self.grids, self.arguments = kernel, [], []

    def __getitem__(self, grid):
        def launch(*arguments, **constants):
            self.grids.append(grid)
            self.arguments.append((arguments, constants))

        return launch


@pytest.fixture
def launches(monkeypatch):
    """Recorders in place of all Triton kernels of the loss, by name; no kernel runs."""
    kernel = type(sweep_triton.sweep_kernel)
    modules = {name: sweep_triton for name, value in vars(sweep_triton).items() if isinstance(value, kernel)}
    modules = {name: where for name, where in modules.items() if name.endswith("_kernel")}
    modules["statistics_kernel"] = per_row
    found = {name: Launches(getattr(where, name)) for name, where in modules.items()}
    for name, where in modules.items():
        monkeypatch.setattr(where, name, found[name])
    return found


def launch_every_kernel(n, dim, vocab, first_row=0):
    """Launches on meta tensors; per-row tensors are slices that begin at ``first_row``."""
    meta = {"device": "meta"}
    vector = torch.empty(first_row + n, **meta)[first_row:]
    index = torch.empty(first_row + n, dtype=torch.int64, **meta)[first_row:]
    hidden, weight = torch.empty(first_row + n, dim, **meta)[first_row:], torch.empty(vocab, dim, **meta)
    head = Head(hidden, weight, index, vector, torch.empty(vocab, **meta), 3.0)
    plan = tiles.SweepSize(n, vocab, torch.float32, torch.float32)
    out = sweep_triton.workspace(n, vocab, vector, torch.float32)
    sweep_triton.target_logits(head)
    sweep_triton.online_sums(head, vector, plan, entropy=True)
    partials = sweep_triton.exponentials(head, vector, vector, out, plan)
    sweep_triton.logit_gradients(head, vector, vector, vector, vector, out, plan)
    sweep_triton.reweigh(head, out, vector, vector, vector, plan)
    sweep_triton.move_rows(out, index, index)
    sweep_triton.place_targets(head, out, vector)
    sweep_triton.finish_rows(head, head.hidden, vector, vector, head.hidden, index)
    vectors = RowVectors(vector, vector, vector, vector, vector)
    per_row.fused_statistics(partials, vector, vector, head, vectors, GRPOLossConfig())


@needs_triton
def test_every_grid_has_one_dimension(launches):
    """The y and z of a grid are limited to 65,535, its x to 2^31 - 1."""
    launch_every_kernel(70_000, 64, 256_000)
    launch_every_kernel(1_000_000, 64, 151_936)
    assert set(launches) == set(LAUNCHED)
    for name, kernel in launches.items():
        assert len(kernel.grids) >= 2, f"{name} was not launched"
        assert all(len(grid) == 1 and 0 < grid[0] < 2**31 for grid in kernel.grids), name


@needs_triton
@pytest.mark.parametrize("name", LAUNCHED)
def test_a_new_length_compiles_nothing(name, launches):
    """Compile keys contain no number of tokens: a kernel's specialization depends neither on the length nor on the
    first row of a chunk."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime.jit import JITFunction, create_function_from_signature

    lengths = [1, 2, 7, 15, 16, 17, 100, 1000, 1003, 4096, 16 * 4099]
    for first, n in enumerate(lengths):
        launch_every_kernel(n, 64, 1003, first_row=first)
    backend = make_backend(GPUTarget("cuda", 86, 32))
    options = ("do_not_specialize", "do_not_specialize_on_alignment")
    kernel = launches[name]
    jitted = kernel.kernel
    if not isinstance(jitted, JITFunction):  # under the interpreter
        jitted = JITFunction(jitted.fn, **{option: jitted.kwargs.get(option) for option in options})
    bind = create_function_from_signature(jitted.signature, jitted.params, backend)
    keys = {
        str(bind(*map(_with_an_address, arguments), debug=False, **constants)[1])
        for arguments, constants in kernel.arguments
    }
    assert len(kernel.arguments) >= len(lengths)
    assert len(keys) == (3 if name == "sweep_kernel" else 1), keys  # three modes


def _with_an_address(argument):
    """Replaces a meta tensor, which has no address, by a real one of the same dtype and alignment."""
    if not torch.is_tensor(argument):
        return argument
    return torch.empty(64, dtype=argument.dtype)[argument.storage_offset() % 16 :]


@pytest.fixture
def huge(tmp_path):
    """Maker of (rows, columns) tensors whose rows spread over 4 GiB or more, in the middle of a sparse file: an address
    with too few bits falls outside the tensor and reads zeros."""
    files = itertools.count()

    def make(rows, columns, stride, dtype):
        elements = 2 * rows * stride
        if DEVICE.type == "cuda":
            memory = torch.zeros(elements, dtype=dtype, device=DEVICE)
        else:
            path = str(tmp_path / str(next(files)))
            memory = torch.from_file(path, shared=True, size=elements, dtype=dtype)
            os.unlink(path)  # the mapping stays valid, and no file is left behind
        return torch.as_strided(memory, (rows, columns), (stride, 1), rows * stride)

    return make


@needs_triton
def test_workspaces_of_more_than_2_to_the_31_elements(huge):
    """Offsets into N * V need 64 bits; the interpreter wraps 32-bit offsets as a GPU does."""
    n, dim, vocab, stride = 34, 8, 40, 2**26
    case = make_head(n, dim, vocab, torch.float32)
    head = Head(case["hidden"], case["weight"], case["targets"], torch.ones(n, device=DEVICE))
    plan = tiles.SweepSize(n, vocab, torch.float32, torch.float32)
    anchor = torch.zeros(n, device=DEVICE)
    alpha, beta = torch.linspace(1, 2, n, device=DEVICE), torch.linspace(-1, 1, n, device=DEVICE)
    expected = torch.empty(vocab, n, device=DEVICE).T
    out = huge(n, vocab, stride, torch.float16)
    assert (n - 1) * stride + vocab > 2**31
    rounded = {"rtol": 2e-3, "atol": 1e-3}

    exact = sweep_torch.target_logits(head)
    sweep_torch.exponentials(head, exact, anchor, expected, plan)
    sweep_triton.exponentials(head, exact, anchor, out, plan)
    torch.testing.assert_close(out.float(), expected, **rounded)
    sweep_torch.reweigh(head, expected, anchor, alpha, beta, plan)
    sweep_triton.reweigh(head, out, anchor, alpha, beta, plan)
    torch.testing.assert_close(out.float(), expected, rtol=1e-2, atol=1e-2)
    sweep_triton.move_rows(out, torch.tensor([33, 1], device=DEVICE), torch.tensor([0, 32], device=DEVICE))
    torch.testing.assert_close(out[[0, 32]].float(), expected[[33, 1]], rtol=1e-2, atol=1e-2)
    lse = (case["hidden"] @ case["weight"].T).logsumexp(1)
    sweep_torch.logit_gradients(head, lse, alpha, beta, anchor, expected, plan)
    sweep_triton.logit_gradients(head, lse, alpha, beta, anchor, out, plan)
    torch.testing.assert_close(out.float(), expected, **rounded)


@needs_triton
def test_inputs_of_more_than_2_to_the_31_elements(huge):
    n, dim, vocab, stride = 34, 8, 40, 2**26
    case = make_head(n, dim, vocab, torch.float16)
    hidden, weight = huge(n, dim, stride, torch.float16), huge(vocab, dim, stride, torch.float16)
    hidden.copy_(case["hidden"])
    weight.copy_(case["weight"])
    ones, plan = torch.ones(n, device=DEVICE), tiles.SweepSize(n, vocab, torch.float32, torch.float32)
    near = Head(case["hidden"], case["weight"], case["targets"], ones)
    far = near._replace(hidden=hidden, weight=weight)
    for function, more in ((sweep_triton.target_logits, {}), (sweep_triton.online_sums, {"entropy": True})):
        arguments = (ones, plan) if more else ()
        assert str(function(far, *arguments, **more)) == str(function(near, *arguments, **more))


# ---- batches


@pytest.mark.parametrize("path", ["default", *PATHS])
@pytest.mark.parametrize("why", ["masked", "equal rewards", "zero advantages"])
def test_batches_without_a_live_row(why, path, monkeypatch):
    change = {
        "masked": {"mask": torch.zeros(N, dtype=torch.bool, device=DEVICE)},
        "equal rewards": {"rewards": torch.ones(8, device=DEVICE)},
        "zero advantages": {"rewards": None, "advantages": torch.zeros(8, device=DEVICE), "group_size": None},
    }[why]
    case = without_logprobs(make_case(extras=EXTRAS), OLD) | change
    if path != "default":
        force(monkeypatch, path)
    for config in (on(path), on(path, importance_sampling_level="sequence")):
        output, grads = run_loss(linear_grpo_loss, case, config)
        assert output.loss.item() == 0 and output.stats["live_tokens"] == 0
        assert output.logprobs.isnan().all()
        assert all((grad == 0).all() for grad in grads.values())
        assert_agrees(output, reference.linear_grpo_loss(**case, config=config))


@ON_EVERYTHING
def test_one_row(path, backend, monkeypatch):
    case = without_logprobs(make_case((1,), (0.7,)), OLD) | {"rewards": None, "group_size": None}
    case["advantages"] = torch.tensor([0.7], device=DEVICE)
    truth, exact = run_loss(reference.linear_grpo_loss, double(case), on(path))
    force(monkeypatch, path)
    use_backend(monkeypatch, backend)
    ours, grads = run_loss(linear_grpo_loss, case, on(path))
    assert_agrees(ours, truth, 1e-5)
    assert_equal_gradients(grads, exact, 1e-5)
    head = make_head(1, 24, 213)
    assert_equal_gradients(run_head(linear_logprob, head)[1], run_head(reference.linear_logprob, double(head))[1], 1e-5)


@ON_EVERYTHING
def test_a_batch_that_the_clip_killed(path, backend, monkeypatch, poisoned):
    """No row reaches the gradient GEMMs, so the gradients must be zeroed explicitly."""
    case = without_logprobs(make_case(), OLD)
    advantages = reference.group_advantages(case["rewards"], group_size=4)
    up = advantages.repeat_interleave(case["cu_seqlens"].diff().long()) > 0
    case[OLD] = case[OLD] + torch.where(up, -3.0, 3.0)  # too far for the noise to bring a ratio back into the clip
    force(monkeypatch, path, rows=16)
    use_backend(monkeypatch, backend)
    output, grads = run_loss(linear_grpo_loss, case, on(path))
    assert output.stats["clip_low"] + output.stats["clip_high"] == 1
    assert all((grad == 0).all() for grad in grads.values())


def test_a_group_of_equal_rewards_gets_exact_zeros():
    """In fp32 the mean of three values 0.1 is not 0.1."""
    case = without_logprobs(make_case((2, 3, 4, 2, 2, 2), (0.1, 0.1, 0.1, 0.0, 1.0, 0.3))) | {"group_size": 3}
    output, grads = run_loss(linear_grpo_loss, case, GRPOLossConfig(compute_all_logprobs=True))
    assert output.logprobs.isfinite().all()
    assert (grads["hidden"][:9] == 0).all() and (grads["hidden"][9:] != 0).any(1).all()


# ---- upstream gradients


@ON_BACKENDS
def test_upstream_gradients_differ_from_row_to_row(backend, monkeypatch):
    """Fails for a backward that reads only the first upstream gradient, and for one that takes the expanded gradient
    of a sum for a contiguous tensor."""
    case = make_head(9, 8, 33)
    use_backend(monkeypatch, backend)
    for loss_of in (
        lambda x: (x * torch.linspace(-1, 2, 9, device=x.device).to(x)).sum(),
        torch.sum,
        lambda x: x[::2].sum(),
    ):
        grads = []
        for function, inputs in ((linear_logprob, case), (reference.linear_logprob, double(case))):
            leaves = {name: inputs[name].clone().requires_grad_() for name in ("hidden", "weight")}
            loss = loss_of(function(**inputs | leaves).logprobs)
            grads.append(dict(zip(leaves, torch.autograd.grad(loss, leaves.values()), strict=True)))
        assert_equal_gradients(*grads, 1e-5)


@ON_PATHS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_loss_may_be_scaled(path, dtype, monkeypatch):
    case = without_logprobs(make_case(dtype=dtype, extras=EXTRAS), OLD)
    force(monkeypatch, path)
    _, once = run_loss(linear_grpo_loss, case, on(path, entropy_coef=0.1))
    for factor in (-4.0, 0.125, 0.0):  # powers of two round nothing
        _, scaled = run_loss(linear_grpo_loss, case, on(path, entropy_coef=0.1), upstream=factor)
        assert all(torch.equal(scaled[name], once[name] * factor) for name in once)


@ON_PATHS
def test_backward_twice_and_again(path, monkeypatch):
    """The saved gradients do not share memory with ``.grad``, which accumulates and is zeroed in place."""
    case = without_logprobs(make_case(dtype=torch.float64, extras=EXTRAS), OLD)
    force(monkeypatch, path)
    _, once = run_loss(linear_grpo_loss, case, on(path))
    arguments, leaves = with_leaves(case)
    loss = linear_grpo_loss(**arguments, config=on(path)).loss
    for times in (1, 2, 3):
        loss.backward(retain_graph=True)
        assert_equal_gradients(
            {name: leaf.grad for name, leaf in leaves.items()}, {k: v * times for k, v in once.items()}
        )
    for leaf in leaves.values():
        leaf.grad.zero_()
    loss.backward()
    assert_equal_gradients({name: leaf.grad for name, leaf in leaves.items()}, once)


@ON_PATHS
def test_a_tied_weight_adds_up(path, monkeypatch):
    """The gradients of the head and of the embedding are added in one parameter."""
    case = without_logprobs(make_case(dtype=torch.float64))
    force(monkeypatch, path)
    grads = []
    for function in (linear_grpo_loss, reference.linear_grpo_loss):
        weight = case["weight"].clone().requires_grad_()
        hidden = torch.tanh(weight[case["targets"].roll(1)])
        function(**case | {"hidden": hidden, "weight": weight}, config=on(path)).loss.backward()
        grads.append({"weight": weight.grad})
    assert_equal_gradients(*grads)


@ON_PATHS
def test_importance_weights_count(path, monkeypatch):
    """If the sampler's probabilities are e^5 times smaller, each weight is the cap and nothing else changes."""
    case = without_logprobs(make_case(dtype=torch.float64), OLD)
    force(monkeypatch, path)
    plain, grads = run_loss(linear_grpo_loss, case, on(path, importance_sampling_cap=3.0))
    weighted, tripled = run_loss(
        linear_grpo_loss, case | {SAMPLER: case[OLD] - 5}, on(path, importance_sampling_cap=3.0)
    )
    torch.testing.assert_close(weighted.loss, 3 * plain.loss)
    assert_equal_gradients(tripled, {name: 3 * grad for name, grad in grads.items()})
    masked, none = run_loss(
        linear_grpo_loss, case | {SAMPLER: case[OLD] - 5}, on(path, importance_sampling_mode="token_mask")
    )
    assert masked.loss == 0 and all((grad == 0).all() for grad in none.values())


# ---- work


@pytest.fixture
def flops(monkeypatch):
    """FLOPs of each gradient GEMM."""
    counted = []
    multiply = module.Gradients.multiply

    def counting(self, total, left, right, **named):
        counted.append(2 * left.shape[0] * left.shape[1] * right.shape[1])
        return multiply(self, total, left, right, **named)

    monkeypatch.setattr(module.Gradients, "multiply", counting)
    return counted


@ON_PATHS
@pytest.mark.parametrize(
    "frozen, share", [((), 4), (("weight",), 2), (("hidden",), 2), (("hidden", "weight"), 0)], ids=str
)
def test_what_is_frozen_costs_no_gemm(frozen, share, path, monkeypatch, flops):
    case = without_logprobs(make_case(vocab=200, dtype=torch.float64))
    force(monkeypatch, path)
    arguments, leaves = with_leaves(case, frozen)
    loss = linear_grpo_loss(**arguments, config=on(path)).loss
    if leaves:
        _, both = run_loss(linear_grpo_loss, case, on(path))
        flops.clear()
        arguments, leaves = with_leaves(case, frozen)
        loss = linear_grpo_loss(**arguments, config=on(path)).loss
        loss.backward()
        assert_equal_gradients(
            {name: leaf.grad for name, leaf in leaves.items()}, {name: both[name] for name in leaves}
        )
    else:
        assert not loss.requires_grad
    assert sum(flops) == share * N * 24 * 200
    assert all(arguments[name].grad is None for name in frozen)


@pytest.mark.parametrize("frozen, share", [((), 4), (("weight",), 2), (("hidden",), 2)], ids=str)
def test_what_is_frozen_costs_no_gemm_in_linear_logprob(frozen, share, monkeypatch, flops):
    case = make_head(N, 24, 200, torch.float64)
    force(monkeypatch, "recompute")
    _, grads = run_head(linear_logprob, case, frozen)
    assert sum(flops) == share * N * 24 * 200
    _, exact = run_head(reference.linear_logprob, case)
    assert_equal_gradients(grads, {name: exact[name] for name in grads})


# ---- forms of inputs


@pytest.mark.parametrize(
    "path, backend",
    [(path, "torch") for path in PATHS] + [pytest.param("recompute", "triton", marks=needs_triton)],
)
@pytest.mark.parametrize("extra", EXTRAS)
def test_each_extra_alone(extra, path, backend, monkeypatch):
    case = without_logprobs(make_case(extras=(extra,)), OLD)
    truth, exact = run_loss(reference.linear_grpo_loss, double(case), on(path))
    force(monkeypatch, path, rows=16, columns=70)
    use_backend(monkeypatch, backend)
    ours, grads = run_loss(linear_grpo_loss, case, on(path))
    assert_agrees(ours, truth, 1e-4)
    assert_equal_gradients(grads, exact, 2e-5)


@ON_EVERYTHING
def test_inputs_with_strides(path, backend, monkeypatch):
    case = without_logprobs(make_case(extras=EXTRAS), OLD)
    force(monkeypatch, path, rows=16, columns=70)
    use_backend(monkeypatch, backend)
    expected, grads = run_loss(linear_grpo_loss, case, on(path))

    def spaced(tensor):
        return torch.stack([tensor, torch.full_like(tensor, -7)], -1)[..., 0]

    strided = {name: spaced(case[name]) for name in ("targets", OLD, "temperature", "rewards", "bias", "cu_seqlens")}
    strided |= {"mask": spaced(case["mask"].int()).bool(), "hidden": torch.cat([case["hidden"]] * 2, 1)[:, 24:]}
    strided |= {"weight": case["weight"].T.contiguous().T}
    assert not any(tensor.is_contiguous() for name, tensor in strided.items() if name != "mask")
    leaves = {name: (case | strided)[name].detach().requires_grad_() for name in grads}
    output = linear_grpo_loss(**case | strided | leaves, config=on(path))
    same = dict(zip(leaves, torch.autograd.grad(output.loss, leaves.values()), strict=True))
    assert_agrees(output, expected, 1e-5)
    assert_equal_gradients(same, grads, 1e-5)


# ---- repeatability


@pytest.mark.parametrize(
    "path, backend, dtype",
    [(path, "torch", dtype) for path in PATHS for dtype in (torch.float32, torch.bfloat16)]
    + [
        pytest.param("recompute", "triton", torch.float32, marks=needs_triton),
        pytest.param("chunks", "triton", torch.bfloat16, marks=needs_triton),
    ],
    ids=str,
)
def test_same_bits_on_two_runs(path, backend, dtype, monkeypatch):
    case = make_case(rewards=DEAD_GROUP, dtype=dtype, extras=EXTRAS)
    force(monkeypatch, path, rows=16)
    use_backend(monkeypatch, backend)
    runs = [run_loss(linear_grpo_loss, case, on(path, beta=0.1, entropy_coef=0.1)) for _ in range(2)]
    (first, grads), (second, again) = runs
    assert torch.equal(first.loss, second.loss)
    assert torch.equal(first.logprobs.nan_to_num(9), second.logprobs.nan_to_num(9))
    assert all(torch.equal(grads[name], again[name]) for name in grads)


def test_inputs_are_not_written_to():
    case = make_case(extras=EXTRAS)
    kept = {name: value.clone() for name, value in case.items() if torch.is_tensor(value)}
    for config in (GRPOLossConfig(beta=0.1, entropy_coef=0.1), GRPOLossConfig(recompute=True)):
        run_loss(linear_grpo_loss, case, config)
    assert all(torch.equal(case[name], value) for name, value in kept.items())
    assert math.isclose(case["softcap"], 4.0)


@pytest.mark.parametrize("sums_of", [torch.ops.toolx.exp_sums, sweep_torch.exp_sums], ids=["op", "torch"])
def test_a_peak_does_not_swallow_what_follows_it(sums_of):
    """The sum of each later block is below half a unit in the last place of the first exponential."""
    z = torch.full((49_152, 40), -17.5).T
    z[:, 3] = 0.0
    out, sums = torch.empty(49_152, 40).T, torch.zeros(2, 40)
    sums_of(z.clone(), torch.zeros(40), out, sums)
    d = z.double()
    exp = d.exp()
    torch.testing.assert_close(sums[0].double(), exp.sum(1), rtol=3e-6, atol=0)
    torch.testing.assert_close(sums[1].double(), (exp * d).sum(1), rtol=1e-5, atol=0)
