"""``linear_grpo_loss`` against the float64 definition, on each of its paths."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils.checkpoint import checkpoint

from tests.ops.cases import (
    BACKENDS,
    DEAD_GROUP,
    DEVICE,
    EXTRAS,
    LENGTHS,
    PATHS,
    REWARDS,
    N,
    as_written,
    assert_agrees,
    assert_as_good,
    assert_equal_gradients,
    double,
    error,
    force,
    make_case,
    needs_triton,
    run_loss,
    use_backend,
    with_leaves,
    without_logprobs,
)
from toolx_kernels import reference
from toolx_kernels.errors import InputError
from toolx_kernels.loss_config import GRPOLossConfig
from toolx_kernels.ops.lm_head import gradients, linear_grpo, live_rows, per_row, sweep, sweep_torch, tiles
from toolx_kernels.ops.lm_head.linear_grpo import linear_grpo_loss

WAYS = {
    "one chunk": {"single"},
    "chunks": {"single"},
    "recompute": {"recompute"},
    "deferred": {"forward", "deferred"},
}
SHAPES = {"aligned": ((32, 0, 16, 16), 32, 256), "ragged": ((5, 1, 9, 4), 24, 213), "odd": ((3, 2, 1, 7), 7, 5)}


def on(path, config=GRPOLossConfig()):  # noqa: B008 (frozen)
    return replace(config, recompute=path == "deferred")


# ---- precision


@pytest.mark.parametrize("extras", [(), EXTRAS], ids=["plain", "extras"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("path", PATHS)
def test_no_worse_than_torch_in_the_same_dtype(path, dtype, shape, extras, monkeypatch, taken):
    lengths, dim, vocab = SHAPES[shape]
    rewards = (1.0, 0.0, 0.3, 0.5)
    case = make_case(lengths, rewards, noise=0.05, dim=dim, vocab=vocab, dtype=dtype, extras=extras)
    case = without_logprobs(case, "old_logprobs")  # well inside the clip: no token's clip depends on rounding
    config = on(path, GRPOLossConfig(entropy_coef=0.02))
    truth, exact = run_loss(reference.linear_grpo_loss, double(case), config)
    with as_written():
        theirs, theirs_grads = run_loss(reference.linear_grpo_loss, case, config)
    force(monkeypatch, path)
    ours, grads = run_loss(linear_grpo_loss, case, config)
    assert set(taken) == (WAYS["deferred"] if dtype == torch.float16 else WAYS[path])
    tolerance = {torch.float64: 1e-12, torch.float32: 2e-6}.get(dtype, 4e-4)
    assert all(grads[name].dtype == dtype for name in grads)
    assert_as_good(grads, theirs_grads, exact, tolerance)
    if dtype == torch.bfloat16 and not extras:
        assert all(error(grads[name], true) <= 4e-3 for name, true in exact.items())
    tolerance = {torch.float64: 1e-13}.get(dtype, 1e-6)
    assert ours.loss.dtype == ours.logprobs.dtype == ours.entropy.dtype == reference.compute_dtype(case["hidden"])
    assert_as_good(*({"logprobs": o.logprobs, "entropy": o.entropy} for o in (ours, theirs, truth)), tolerance)
    # absolute errors: the loss may be close to zero
    assert (ours.loss - truth.loss).abs() <= (theirs.loss - truth.loss).abs() + tolerance


def test_bf16_gemms_as_on_a_gpu(monkeypatch, taken):
    case = without_logprobs(make_case(noise=0.05, dtype=torch.bfloat16, extras=EXTRAS), "old_logprobs")
    config = GRPOLossConfig(entropy_coef=0.02)
    _, exact = run_loss(reference.linear_grpo_loss, double(case), config)
    with as_written():
        _, theirs = run_loss(reference.linear_grpo_loss, case, config)
    for path in ("one chunk", "chunks", "recompute"):
        with monkeypatch.context() as patch:
            force(patch, path, gemm_dtype=torch.bfloat16)
            _, grads = run_loss(linear_grpo_loss, case, config)
        assert set(taken) == WAYS[path]
        taken.clear()
        assert_as_good(grads, theirs, exact, 4e-4)


@pytest.mark.parametrize("extras", [(), EXTRAS], ids=["plain", "extras"])
@pytest.mark.parametrize("entropy_coef", [0.0, 0.02])
def test_one_chunk_adds_up_no_fp32_gradient_of_the_weight(entropy_coef, extras, monkeypatch):
    """It also multiplies the unrounded hidden states where the exponentials are reweighed anyway."""
    case = without_logprobs(make_case(noise=0.05, dtype=torch.bfloat16, extras=extras), "old_logprobs")
    config = GRPOLossConfig(entropy_coef=entropy_coef)
    _, exact = run_loss(reference.linear_grpo_loss, double(case), config)
    with as_written():
        _, theirs = run_loss(reference.linear_grpo_loss, case, config)
    products = []

    def as_a_gpu_multiplies(self, total, left, right, *, fresh=False):
        if left.shape[0] == 213 and right.shape[1] == 24:  # the weight's gradient
            products.append((total.dtype, right))
        product = left.to(torch.bfloat16).float() @ right.to(torch.bfloat16).float()
        total.copy_(product if fresh else total + product)

    monkeypatch.setattr(gradients.Gradients, "multiply", as_a_gpu_multiplies)
    for path, dtype in (("one chunk", torch.bfloat16), ("chunks", torch.float32)):
        force(monkeypatch, path, rows=16, columns=213, gemm_dtype=torch.bfloat16)
        _, grads = run_loss(linear_grpo_loss, case, config)
        assert {total for total, _ in products} == {dtype}
        exact_hidden = torch.cat([right for _, right in products]).equal(case["hidden"])
        assert exact_hidden == bool(entropy_coef or extras)
        assert_as_good(grads, theirs, exact, 4e-4)
        products.clear()


def test_gradients_in_bf16_at_a_real_width():
    """D 576 and V 12,289 on the path that the library picks: within 4e-3 of the norm, and no worse than torch."""
    case = make_case((40, 24, 31, 33), (1.0, 0.0, 0.3, 0.5), noise=0.05, dim=576, vocab=12_289, dtype=torch.bfloat16)
    case = without_logprobs(case, "old_logprobs")
    _, exact = run_loss(reference.linear_grpo_loss, double(case), GRPOLossConfig())
    with as_written():
        _, theirs = run_loss(reference.linear_grpo_loss, case, GRPOLossConfig())
    _, grads = run_loss(linear_grpo_loss, case, GRPOLossConfig())
    assert_as_good(grads, theirs, exact, 0.0)
    assert all(error(grads[name], true) <= 4e-3 for name, true in exact.items())


@pytest.mark.skipif(DEVICE.type != "cpu", reason="a GPU multiplies bf16 with fp32 sums")
@pytest.mark.parametrize("path", PATHS)
def test_a_cpu_multiplies_bf16_heads_in_fp32(path, monkeypatch, taken):
    """Results, memory and time then do not depend on AMX, and no product is rounded to bf16."""
    force(monkeypatch, path)
    case = without_logprobs(make_case(dtype=torch.bfloat16, extras=EXTRAS))
    with torch.profiler.profile(record_shapes=True) as profile:
        run_loss(linear_grpo_loss, case, on(path, GRPOLossConfig(entropy_coef=0.02)))
    assert set(taken) == WAYS[path]
    products = [e for e in profile.profiler.kineto_results.events() if e.name() in ("aten::mm", "aten::addmm_")]
    assert products and not any("c10::BFloat16" in product.dtypes() for product in products)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("path", ["chunks", "recompute"])
@pytest.mark.parametrize("level", [0.8, 0.98])
def test_confident_tokens_are_as_good_as_torchs(level, path, backend, monkeypatch):
    """Where p is near 1, log p and 1 - p are small differences between the target's logit and all others."""
    n, dim, vocab = 24, 96, 500
    case = without_logprobs(make_case((n // 2, n // 2), (1.0, 0.0), vocab=vocab, dim=dim)) | {"group_size": 2}
    hidden, weight = case["hidden"], case["weight"] * 0.1
    along = 30 * hidden / hidden.square().sum(1, keepdim=True)
    gap = math.log(level / (1 - level))
    weight[0 : 2 * n : 2], weight[1 : 2 * n : 2] = along, along * (1 - gap / 30)  # the target and the runner-up
    case |= {"weight": weight, "targets": torch.arange(0, 2 * n, 2, device=DEVICE)}
    use_backend(monkeypatch, backend)
    force(monkeypatch, path)
    truth, exact = run_loss(reference.linear_grpo_loss, double(case), GRPOLossConfig())
    theirs, theirs_grads = run_loss(reference.linear_grpo_loss, case, GRPOLossConfig())
    ours, grads = run_loss(linear_grpo_loss, case, GRPOLossConfig())
    assert (truth.logprobs.exp() - level).abs().max() < 0.01
    assert (ours.logprobs - truth.logprobs).abs().max() <= (theirs.logprobs - truth.logprobs).abs().max() + 2e-6
    assert_as_good(grads, theirs_grads, exact, 1e-5)


@pytest.mark.parametrize("path", PATHS)
def test_entropies_of_the_rows_that_keep_a_gradient_go_with_them(path, monkeypatch):
    """Rows below the entropy quantile lose both coefficients, so the remaining rows are moved together."""
    force(monkeypatch, path)
    config = GRPOLossConfig(entropy_coef=0.1, top_entropy_quantile=0.4, recompute=path == "deferred")
    case = make_case(dtype=torch.float64)
    _, ours = run_loss(linear_grpo_loss, case, config)
    _, truth = run_loss(reference.linear_grpo_loss, case, config)
    assert_equal_gradients(ours, truth)


def test_an_old_log_prob_above_zero_does_not_cost_the_batch_its_single_sweep(monkeypatch, taken):
    force(monkeypatch, "chunks")
    case = make_case()
    case["old_logprobs"][3] = 100.0
    run_loss(linear_grpo_loss, case, GRPOLossConfig())
    assert taken == ["single"]


def test_a_second_derivative_is_refused():
    arguments, leaves = with_leaves(without_logprobs(make_case()))
    for config in (GRPOLossConfig(), GRPOLossConfig(recompute=True)):
        loss = linear_grpo_loss(**arguments, config=config).loss
        with pytest.raises(InputError, match="no second derivative: leave out create_graph=True"):
            torch.autograd.grad(loss, list(leaves.values()), create_graph=True)


def test_without_gradients_nothing_but_the_statistics_is_computed(monkeypatch, taken):
    case = make_case(dtype=torch.float64, extras=EXTRAS)
    force(monkeypatch, "chunks")
    monkeypatch.setattr(gradients.Gradients, "multiply", None)
    config = GRPOLossConfig(beta=0.1, entropy_coef=0.1)
    expected = reference.linear_grpo_loss(**case, config=config)
    assert_agrees(linear_grpo_loss(**case, config=config), expected)
    arguments, _ = with_leaves(case)
    with torch.no_grad():
        assert_agrees(linear_grpo_loss(**arguments, config=config), expected)
    assert taken == ["forward", "forward"]


# ---- objectives

OLD, REF, SAMPLER = "old_logprobs", "ref_logprobs", "sampler_logprobs"
OBJECTIVES = [
    ({}, ()),
    ({}, (OLD,)),
    ({"epsilon_high": 0.26, "delta": 1.4}, (OLD,)),
    ({"loss_type": "bnpo"}, (OLD,)),
    ({"loss_type": "dapo", "scale_rewards": "batch"}, (OLD, SAMPLER)),
    ({"loss_type": "dr_grpo", "max_completion_length": 16, "scale_rewards": "none"}, (OLD,)),
    ({"loss_type": "cispo", "epsilon_high": 1.2}, (OLD,)),
    ({"loss_type": "sapo"}, (OLD,)),
    ({"loss_type": "luspo", "importance_sampling_level": "sequence"}, (OLD,)),
    ({"loss_type": "vespo"}, (OLD, SAMPLER)),
    ({"importance_sampling_level": "sequence", "epsilon": 0.05}, (OLD,)),
    ({"importance_sampling_level": "sequence", "loss_type": "sapo", "entropy_coef": 0.1}, (OLD,)),
    ({"beta": 0.1, "kl_estimator": "k1"}, (OLD, REF)),
    ({"beta": 0.1, "kl_estimator": "k2", "kl_gradient": "none"}, (OLD, REF)),
    ({"beta": 0.1, "use_bias_correction_kl": True}, (OLD, REF)),
    ({"beta": 0.1, "kl_gradient": "straight_through"}, (REF,)),
    ({"importance_sampling_cap": 1.2}, (OLD, SAMPLER)),
    ({"importance_sampling_cap": 1.2, "importance_sampling_mode": "token_mask"}, (OLD, SAMPLER)),
    ({"importance_sampling_cap": 1.1, "importance_sampling_mode": "sequence_truncate"}, (SAMPLER,)),
    ({"importance_sampling_cap": 1.1, "importance_sampling_mode": "sequence_mask"}, (OLD, SAMPLER)),
    ({"entropy_coef": 0.1}, (OLD,)),
    ({"entropy_coef": 0.1, "top_entropy_quantile": 0.4, "beta": 0.1}, (OLD, REF)),
    ({"temperature": 1.7}, ()),
    ({"compute_all_logprobs": True}, (OLD, REF)),
]


@pytest.mark.parametrize("masked", [(), (0, 1, 5, 20), tuple(range(5, 19))], ids=["full", "holes", "two all masked"])
@pytest.mark.parametrize("settings, kept", OBJECTIVES, ids=[str(settings) for settings, _ in OBJECTIVES])
def test_objectives_agree_with_the_definition(settings, kept, masked, monkeypatch, taken):
    case = without_logprobs(make_case(rewards=DEAD_GROUP, dtype=torch.float64, masked=masked), *kept)
    config = GRPOLossConfig(**settings)
    truth, exact = run_loss(reference.linear_grpo_loss, case, config)
    assert exact["hidden"].abs().sum() > 0
    for path in ("chunks", "recompute"):
        with monkeypatch.context() as patch:
            force(patch, path, rows=11)
            ours, grads = run_loss(linear_grpo_loss, case, config)
        whole_batch = config.top_entropy_quantile < 1
        assert taken == (["recompute"] if whole_batch or path == "recompute" else ["single"])
        taken.clear()
        assert_agrees(ours, truth)
        assert_equal_gradients(grads, exact)


def test_a_completion_that_fits_no_chunk_is_swept_twice(monkeypatch, taken):
    case = without_logprobs(make_case(dtype=torch.float64), OLD)
    config = GRPOLossConfig(importance_sampling_level="sequence")
    truth, exact = run_loss(reference.linear_grpo_loss, case, config)
    for rows, way in ((max(LENGTHS), "single"), (max(LENGTHS) - 1, "recompute")):
        with monkeypatch.context() as patch:
            force(patch, "chunks", rows=rows)
            ours, grads = run_loss(linear_grpo_loss, case, config)
        assert taken.pop() == way
        assert_agrees(ours, truth)
        assert_equal_gradients(grads, exact)


def test_by_hand():
    """Completions of one and two tokens, uniform over four tokens, rewards 1 and 0, ratio 1: the loss is the negative
    mean advantage, 0, and its gradient with respect to each log-prob is -A / (length * B)."""
    hidden = torch.zeros(3, 2, dtype=torch.float64, requires_grad=True)
    weight = torch.tensor([[1.0, 0], [-1, 0], [0, 1], [0, -1]], dtype=torch.float64)
    out = linear_grpo_loss(
        hidden,
        weight,
        torch.tensor([0, 2, 3]),
        cu_seqlens=torch.tensor([0, 1, 3]),
        rewards=torch.tensor([1.0, 0.0]),
        group_size=2,
        config=GRPOLossConfig(scale_rewards="none"),
    )
    assert out.loss.item() == pytest.approx(0.0)
    torch.testing.assert_close(out.logprobs, torch.full((3,), 0.25, dtype=torch.float64).log())
    out.loss.backward()
    # d logp / d hidden = weight[target] - mean(weight) = weight[target]
    expected = torch.stack([weight[0] * -0.5 / 2, weight[2] * 0.5 / 4, weight[3] * 0.5 / 4])
    torch.testing.assert_close(hidden.grad, expected)


# ---- batches and their parts


def test_micro_batches_add_up():
    """With the batch's denominator, loss and gradient do not depend on how the batch is split."""
    case = without_logprobs(make_case(dtype=torch.float64))
    whole, whole_grads = run_loss(linear_grpo_loss, case, GRPOLossConfig())
    bounds = case["cu_seqlens"].tolist()
    losses, parts = [], []
    for group in (0, 1):
        rows, completions = slice(bounds[4 * group], bounds[4 * group + 4]), slice(4 * group, 4 * group + 4)
        part = {name: case[name][rows] for name in ("hidden", "targets", "mask")}
        part |= {"weight": case["weight"], "rewards": case["rewards"][completions], "group_size": 4, "denominator": 8}
        part["cu_seqlens"] = case["cu_seqlens"][4 * group : 4 * group + 5] - bounds[4 * group]
        output, grads = run_loss(linear_grpo_loss, part, GRPOLossConfig())
        losses.append(output.loss)
        parts.append(grads)
    torch.testing.assert_close(sum(losses), whole.loss)
    torch.testing.assert_close(torch.cat([part["hidden"] for part in parts]), whole_grads["hidden"])
    torch.testing.assert_close(sum(part["weight"] for part in parts), whole_grads["weight"])


def test_groups_of_equal_reward_are_not_computed_and_change_nothing():
    case = without_logprobs(make_case(rewards=DEAD_GROUP, dtype=torch.float64))
    ours, grads = run_loss(linear_grpo_loss, case, GRPOLossConfig())
    every, same_grads = run_loss(linear_grpo_loss, case, GRPOLossConfig(compute_all_logprobs=True))
    dead = sum(LENGTHS[:4])
    assert ours.logprobs[:dead].isnan().all() and ours.logprobs[dead:].isfinite().all()
    assert every.logprobs.isfinite().all() and every.entropy.isfinite().all()
    torch.testing.assert_close(ours.loss, every.loss)
    assert_equal_gradients(grads, same_grads)
    assert (grads["hidden"][:dead] == 0).all()


@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dapo", "dr_grpo"])
def test_tokens_and_completions_without_gradient_count_in_the_normaliser(loss_type):
    """An explicit ``denominator`` replaces the normalizer."""
    config = GRPOLossConfig(loss_type=loss_type, max_completion_length=16)
    case = make_case(rewards=DEAD_GROUP, masked=(2, 25), dtype=torch.float64)
    ours, _ = run_loss(linear_grpo_loss, case, config)
    truth, _ = run_loss(reference.linear_grpo_loss, case, config)
    torch.testing.assert_close(ours.loss, truth.loss, rtol=1e-11, atol=1e-13)
    normaliser = {"grpo": 8, "bnpo": N - 2, "dapo": N - 2, "dr_grpo": 8 * 16}[loss_type]
    for denominator in (3 * normaliser, torch.tensor(3.0 * normaliser, device=DEVICE)):
        for function in (linear_grpo_loss, reference.linear_grpo_loss):
            given, _ = run_loss(function, case | {"denominator": denominator}, config)
            torch.testing.assert_close(3 * given.loss, truth.loss, rtol=1e-11, atol=1e-13)


def test_what_was_left_out_may_be_fed_back():
    """``.logprobs`` is NaN on rows without a gradient and serves as ``old_logprobs`` of the next update."""
    case = without_logprobs(make_case(rewards=DEAD_GROUP, dtype=torch.float64))
    expected, grads = run_loss(linear_grpo_loss, case, GRPOLossConfig())
    assert expected.logprobs.isnan().any()
    case[OLD] = case[SAMPLER] = expected.logprobs
    for config in (GRPOLossConfig(), GRPOLossConfig(compute_all_logprobs=True)):
        output, again = run_loss(linear_grpo_loss, case, config)
        torch.testing.assert_close(output.loss, expected.loss)
        assert_equal_gradients(again, grads)


def test_old_logprobs_with_a_graph_do_not_cancel_the_gradient():
    case = without_logprobs(make_case(dtype=torch.float64))
    arguments, leaves = with_leaves(case)
    old = reference.linear_logprob(arguments["hidden"], arguments["weight"], arguments["targets"]).logprobs
    attached = torch.autograd.grad(linear_grpo_loss(**arguments, old_logprobs=old).loss, leaves.values())
    detached = torch.autograd.grad(linear_grpo_loss(**arguments).loss, leaves.values())
    torch.testing.assert_close(attached, detached)
    assert attached[0].abs().sum() > 0


def test_masked_rows_may_hold_anything():
    case = without_logprobs(make_case(masked=(3,)), OLD)
    expected, grads = run_loss(linear_grpo_loss, case, GRPOLossConfig(beta=0.0))
    case = case | {name: case[name].clone() for name in ("targets", "hidden", OLD)}
    case["targets"][3] = -100
    case["hidden"][3] = torch.nan
    case[OLD][3] = torch.inf
    actual, same = run_loss(linear_grpo_loss, case, GRPOLossConfig())
    assert torch.equal(actual.loss, expected.loss) and actual.stats["nonfinite"] == 0
    assert all(torch.equal(same[name], grads[name]) for name in grads)


# ---- rows that are not finite


@pytest.mark.parametrize("path", ["chunks", "recompute", "deferred"])
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize(
    "broken, value",
    [
        ("hidden", torch.nan),
        ("hidden", torch.inf),
        (OLD, torch.inf),
        (OLD, -torch.inf),
        (OLD, torch.nan),
        (SAMPLER, -torch.inf),
        (REF, torch.nan),
    ],
)
def test_a_row_that_is_not_finite_touches_no_gradient(broken, value, level, path, monkeypatch):
    case = make_case(dtype=torch.float64)
    case[broken] = case[broken].clone()
    case[broken][7] = value
    config = GRPOLossConfig(beta=0.1, importance_sampling_level=level)
    truth, exact = run_loss(reference.linear_grpo_loss, case, config)
    force(monkeypatch, path)
    ours, grads = run_loss(linear_grpo_loss, case, on(path, config))
    assert ours.stats["nonfinite"] == 1 and (grads["hidden"][7] == 0).all()
    assert all(grad.isfinite().all() for grad in grads.values()) and ours.loss.isfinite()
    torch.testing.assert_close(ours.loss, truth.loss, check_dtype=False)
    assert_equal_gradients(grads, exact)
    assert ours.stats.keys() == truth.stats.keys()
    for name, expected in truth.stats.items():
        torch.testing.assert_close(ours.stats[name], expected, check_dtype=False, msg=name)


@pytest.mark.parametrize("gap", [-1e30, -200.0, 200.0, 1e30])
@pytest.mark.parametrize("settings", [{}, {"delta": 1.4}, {"importance_sampling_level": "sequence"}], ids=str)
def test_ratios_that_overflow_leave_finite_gradients(settings, gap, monkeypatch):
    case = without_logprobs(make_case(), OLD)
    case[OLD] = case[OLD] - gap
    for path in ("chunks", "recompute"):
        with monkeypatch.context() as patch:
            force(patch, path)
            output, grads = run_loss(linear_grpo_loss, case, GRPOLossConfig(**settings))
        assert output.loss.isfinite() and all(grad.isfinite().all() for grad in grads.values())
        assert output.stats["nonfinite"] == 0


# ---- memory and work


@pytest.mark.parametrize("path", PATHS)
def test_memory_that_nobody_wrote_is_not_read(path, monkeypatch, poisoned):
    case = without_logprobs(make_case(rewards=DEAD_GROUP, masked=(22,), extras=EXTRAS), OLD)
    config = GRPOLossConfig(entropy_coef=0.1)
    truth, exact = run_loss(reference.linear_grpo_loss, double(case), config)
    force(monkeypatch, path)
    ours, grads = run_loss(linear_grpo_loss, case, on(path, config))
    assert_agrees(ours, truth, 1e-4)
    assert_equal_gradients(grads, exact, 1e-5)


def peak_of(arguments, config) -> int:
    """Peak of the bytes allocated in forward and backward."""
    with torch.profiler.profile(profile_memory=True) as profile:
        linear_grpo_loss(**arguments, config=config).loss.backward()
    held = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


@pytest.mark.skipif(DEVICE.type != "cpu", reason="a bound of 512 MiB is not reached by small shapes")
@pytest.mark.parametrize("settings", [{}, {"entropy_coef": 0.1}], ids=["plain", "entropy"])
@pytest.mark.parametrize("recompute", [False, True], ids=["single sweep", "recompute"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_extra_memory_stays_within_the_workspace(dtype, recompute, settings, monkeypatch, taken):
    """For any N, it is the gradients with their fp32 sums, the workspace of 4 MiB and some vectors of length N."""
    monkeypatch.setattr(tiles, "CPU_SWEEP_ROWS", 16)
    monkeypatch.setattr(tiles, "CPU_WORKSPACE_BYTES", 4 << 20)
    vocab, dim = 6000, 32
    g = torch.Generator().manual_seed(0)
    for n in (1024, 2048):
        hidden, weight = (torch.randn(rows, dim, generator=g) / 3 for rows in (n, vocab))
        hidden, weight = hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()
        arguments = {"hidden": hidden, "weight": weight, "targets": torch.randint(vocab, (n,), generator=g)}
        arguments |= {"cu_seqlens": torch.arange(0, n + 1, n // 4), "rewards": torch.rand(4), "group_size": 4}
        peak = peak_of(arguments, GRPOLossConfig(recompute=recompute, **settings))
        assert set(taken) == (WAYS["deferred"] if recompute else WAYS["chunks"])
        taken.clear()
        gradients = (n + vocab) * dim * dtype.itemsize + 2 * n * dim * 4 + (0 if recompute else vocab * dim * 4)
        vectors = 32 * 4 * n
        assert peak <= gradients + vectors + (4 << 20), (n, peak / 2**20)


H100 = tiles.Card(memory=85 * 10**9, processors=132)
CARDS = {
    "H100": H100,
    "H200": tiles.Card(150 * 10**9, 132),
    "4090": tiles.Card(25 * 10**9, 128),
    "12 GB": tiles.Card(12 * 10**9, 46),
}


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("mib", [None, 8, 200])
@pytest.mark.parametrize(
    "shape",
    [(8192, 151_936, 896), (4096, 49_152, 576), (65_536, 256_000, 4096), (200, 49_152, 576), (1, 5, 3)],
    ids=str,
)
def test_plans_stay_within_the_workspace(shape, mib, device):
    n, vocab, dim = shape
    device = torch.device(device)
    card = None if device.type == "cpu" else H100
    bound = tiles.workspace_bytes(device, n, vocab, mib, card)
    default = 64 if device.type == "cpu" else 2048
    assert bound <= (mib or default) << 20
    assert bound <= max(n * vocab, 1 << 20)  # a quarter of fp32 logits
    for dtype in (torch.float32, torch.bfloat16):
        single = tiles.single_sweep_size(n, vocab, dim, device, dtype, mib, trains_weight=False, card=card)
        if single is not None:
            alive = single.rows * vocab * single.dtype.itemsize
            if device.type == "cpu" and single.dtype != torch.float32:  # fp32 logits do not fit in place
                alive += single.rows * single.columns * 4
            assert 1 <= single.rows <= n and 1 <= single.columns <= vocab and alive <= bound
            assert single.dtype == dtype
        twice = tiles.recompute_size(n, vocab, dim, device, dtype, mib, card)
        assert 1 <= twice.rows <= n and 1 <= twice.columns <= vocab
        alive = twice.rows * twice.columns * (4 + twice.dtype.itemsize if device.type == "cpu" else dtype.itemsize)
        assert alive <= bound or (twice.rows, twice.columns) == (1, 1)
        assert tiles.single_sweep_size(n, vocab, dim, device, torch.float16, mib) is None
    forward = tiles.forward_size(n, vocab, dim, device, mib, card)
    assert 1 <= forward.rows <= n and 1 <= forward.columns <= vocab


def gpu_plan(n, dim, card, dtype=torch.bfloat16, **more):
    return tiles.single_sweep_size(n, 151_936, dim, torch.device("cuda"), dtype, card=CARDS[card], **more)


@pytest.mark.parametrize(
    "card, dim, rows, waves",
    [
        ("H100", 896, 2944, [2, 2, 1]),
        ("H100", 1536, 2816, [2, 2, 2]),
        ("H100", 4096, 3072, [6, 6, 4]),
        ("H200", 896, 2944, [2, 2, 1]),
        ("4090", 896, 2048, [1, 1, 1, 1]),
        ("4090", 1536, 2048, [2, 2, 2, 2]),
        ("12 GB", 896, 1536, [2, 2, 2, 2, 2, 1]),
    ],
)
def test_chunks_of_a_gpu_are_few_and_fill_its_processors(card, dim, rows, waves):
    """8,192 tokens, vocabulary 151,936; a wave is the time of one 128 x 128 tile of ``E W``."""
    assert gpu_plan(8192, dim, card).rows == rows
    chunks = [min(rows, 8192 - start) for start in range(0, 8192, rows)]
    assert [tiles.waves(n, dim, CARDS[card].processors) for n in chunks] == waves


def test_all_rows_at_once_where_they_take_no_more_than_the_fp32_sum_that_they_spare():
    n, vocab, dim = 8192, 151_936, 896
    workspace = tiles.workspace_bytes(torch.device("cuda"), n, vocab, card=H100)
    live = gpu_plan(n // 2, dim, "H100", n_tokens=n)  # half of the tokens are masked or in groups of equal reward
    assert live.rows == n // 2
    assert workspace <= live.rows * vocab * 2 < workspace + vocab * dim * (4 - 2)
    assert gpu_plan(n // 2, dim, "H100", n_tokens=n, trains_weight=False).rows < n // 2
    assert gpu_plan(n // 2, dim, "H100", n_tokens=n, dtype=torch.float32).rows < n // 2
    assert gpu_plan(n, dim, "H100").rows < n


@pytest.mark.parametrize("card, mib", [("H100", 2048), ("H200", 2048), ("4090", 25e9 * 0.03 / 2**20), ("12 GB", 512)])
def test_the_workspace_follows_the_cards_memory(card, mib):
    assert tiles.default_workspace_bytes(torch.device("cuda"), CARDS[card]) == int(mib * 2**20)


@pytest.mark.parametrize("recompute", [False, True], ids=["single sweep", "recompute"])
def test_the_given_workspace_reaches_every_plan(recompute, monkeypatch):
    asked = []
    original = tiles.workspace_bytes
    monkeypatch.setattr(tiles, "workspace_bytes", lambda *a: asked.append(a[3] if len(a) > 3 else None) or original(*a))
    case = without_logprobs(make_case())
    run_loss(linear_grpo_loss, case, GRPOLossConfig(workspace_mib=3, recompute=recompute))
    assert asked and set(asked) == {3}


@pytest.fixture
def gemm_rows(monkeypatch):
    """Counts of token rows that enter the GEMMs of the logits, of hidden's gradient and of the weight's gradient."""
    seen = {"logits": 0, "hidden": 0, "weight": 0}
    kind = gradients.Gradients
    multiply, add_weight, exponentials = kind.multiply, kind.add_weight, sweep_torch.exponentials

    def counted(self, total, left, right, **named):
        seen["hidden"] += len(left)
        return multiply(self, total, left, right, **named)

    def weight_counted(self, dz, *others):
        before = seen["hidden"]
        add_weight(self, dz, *others)
        seen["hidden"] = before
        seen["weight"] += len(dz)

    def swept(head, *arguments):
        seen["logits"] += len(head.hidden)
        return exponentials(head, *arguments)

    monkeypatch.setattr(kind, "multiply", counted)
    monkeypatch.setattr(kind, "add_weight", weight_counted)
    monkeypatch.setattr(sweep_torch, "exponentials", swept)
    return seen


@pytest.mark.skipif(DEVICE.type != "cpu", reason="counts calls of the torch sweeps")
def test_rows_that_cannot_have_a_gradient_never_enter_a_gemm(monkeypatch, gemm_rows):
    force(monkeypatch, "chunks", rows=10, columns=10**9)
    case = without_logprobs(make_case(rewards=DEAD_GROUP, masked=(30,)))
    run_loss(linear_grpo_loss, case, GRPOLossConfig())
    live = sum(LENGTHS[4:]) - 1
    assert gemm_rows == {"logits": live, "hidden": live, "weight": live}
    gemm_rows.update(logits=0, hidden=0, weight=0)
    run_loss(linear_grpo_loss, case, GRPOLossConfig(compute_all_logprobs=True))
    assert gemm_rows["logits"] == N - 1
    assert gemm_rows["hidden"] == gemm_rows["weight"] == live


@pytest.mark.skipif(DEVICE.type != "cpu", reason="counts calls of the torch sweeps")
def test_rows_that_the_clip_killed_leave_before_the_gradient_gemms(monkeypatch, gemm_rows):
    force(monkeypatch, "chunks", rows=16, columns=10**9)
    case = without_logprobs(make_case((8,) * 4, (1.0, 0.0, 1.0, 0.0), noise=0.0, dtype=torch.float64), OLD)
    up = case["rewards"].repeat_interleave(8) > 0
    killed = torch.arange(32) % 2 == 0
    # beyond the clip, where the gradient is zero
    case[OLD] = case[OLD] + torch.where(killed, torch.where(up, -0.5, 0.5), 0.0)
    truth, exact = run_loss(reference.linear_grpo_loss, case, GRPOLossConfig())
    ours, grads = run_loss(linear_grpo_loss, case, GRPOLossConfig())
    assert gemm_rows == {"logits": 32, "hidden": 16, "weight": 16}
    assert_agrees(ours, truth)
    assert_equal_gradients(grads, exact)
    assert (grads["hidden"][killed] == 0).all() and (grads["hidden"][~killed] != 0).any(1).all()


def below_autograd(case: dict, key: str):
    """Calls the op's implementation below autograd, where a dispatch mode sees each of its operations."""
    return linear_grpo.compute(
        case["hidden"],
        case["weight"],
        case["targets"],
        torch.ones(N, device=DEVICE),
        None,
        0.0,
        -1,
        case["cu_seqlens"],
        case["rewards"],
        case.get(OLD),
        None,
        None,
        case["mask"],
        None,
        key,
        [True, True, False],
        case["rewards"],
    )


class Operations(TorchDispatchMode):
    """Records the names of all torch operations; those that return a view get the prefix ``view:``."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        aliases = [result.alias_info for result in function._schema.returns]
        is_view = any(alias is not None and not alias.is_write for alias in aliases)
        self.names.append("view:" * is_view + function._schema.name)
        return function(*arguments, **named or {})


@pytest.mark.parametrize("rewards", [REWARDS, DEAD_GROUP], ids=["all rows", "some rows"])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_the_host_reads_one_tensor_before_the_first_gemm(level, rewards, monkeypatch):
    """Each further read would wait for the GPU. ``tolist`` of a CPU tensor is not an operation."""
    reads, read = [], linear_grpo.OnHost.read
    monkeypatch.setattr(linear_grpo.OnHost, "read", lambda *a: reads.append(1) or read(*a))
    force(monkeypatch, "chunks", rows=16)
    case = without_logprobs(make_case(rewards=rewards, masked=(3,)), OLD)
    key = GRPOLossConfig(importance_sampling_level=level).key
    with Operations() as seen:
        below_autograd(case, key)
    before = set(seen.names[: seen.names.index("aten::mm")])
    assert reads == [1] and "aten::nonzero_static" in before
    assert not before & {"aten::nonzero", "aten::_local_scalar_dense", "aten::repeat_interleave", "aten::unique"}


class Counted:
    """A Triton kernel that counts a launch as one operation and hides the interpreter's torch operations."""

    def __init__(self, name, kernel, names):
        self.name, self.kernel, self.names = name, kernel, names

    def __getitem__(self, grid):
        def launch(*arguments, **constants):
            self.names.append(self.name)
            with _disable_current_modes():
                self.kernel[grid](*arguments, **constants)

        return launch


@needs_triton
@pytest.mark.parametrize("kept, most", [((), (13, 78)), ((OLD,), (20, 100))], ids=["on-policy", "off-policy"])
def test_a_gpu_is_asked_for_few_things(kept, most, monkeypatch):
    """The GPU idles until the first sweep, and each operation takes the host longer than the GPU."""
    use_backend(monkeypatch, "triton")
    force(monkeypatch, "one chunk")
    case, config = without_logprobs(make_case(), *kept), GRPOLossConfig()
    seen = Operations()
    for module in (live_rows, per_row, sweep.backend(None)):
        for name in [name for name in vars(module) if name.endswith("_kernel") and name != "per_row_kernel"]:
            monkeypatch.setattr(module, name, Counted(name, getattr(module, name), seen.names))
    with seen:
        below_autograd(case, config.key)
    of_the_host = ("view:", "aten::empty", "aten::new_empty", "aten::promote_types", "aten::resolve_")
    work = [name for name in seen.names if not name.startswith(of_the_host)]
    assert work.index("sweep_kernel") <= most[0] and len(work) <= most[1], work


# ---- torch's machinery


def test_the_op_is_registered_properly():
    case = make_case((2, 3), (1.0, 0.0), extras=("bias", "temperature"), vocab=11, dim=6)
    for needs in ([True] * 3, [True, False, False], [False] * 3):
        for config, advantages in (
            (GRPOLossConfig(beta=0.1), [0.5, -0.5]),
            (GRPOLossConfig(recompute=True, entropy_coef=0.1), [0.5, 0.0, -0.5, 1.0, 0.0]),
        ):
            tensors = [case["hidden"], case["weight"], case["bias"]]
            hidden, weight, bias = (t.clone().requires_grad_(need) for t, need in zip(tensors, needs, strict=True))
            arguments = (
                hidden, weight, case["targets"], case["temperature"], bias, 3.0, -1,
                case["cu_seqlens"], torch.tensor(advantages, device=DEVICE), case[OLD], case[REF], case[SAMPLER],
                case["mask"], None, config.key, needs,
            )  # fmt: skip
            torch.library.opcheck(torch.ops.toolx.linear_grpo.default, arguments)


def batch_of(lengths, seed):
    case = make_case(lengths, (1.0, 0.0, 0.2, 1.0), seed=seed, vocab=61, dim=8)
    return without_logprobs(case, OLD)


@pytest.mark.parametrize(
    "backend, recompute",
    [
        ("aot_eager", False),
        ("aot_eager", True),
        ("inductor", False),
        pytest.param("inductor", True, marks=pytest.mark.soak),  # to inductor the op is one node on either path
    ],
)
def test_under_compile_with_changing_lengths(backend, recompute):
    """One graph, not recompiled for new lengths; once with rewards, once with an advantage per token."""
    compiled_graphs = []
    counting = torch._dynamo.utils.counters
    counting.clear()
    torch._dynamo.reset()
    config = GRPOLossConfig(recompute=recompute)

    def step(hidden, weight, targets, cu_seqlens, scores, old_logprobs):
        output = linear_grpo_loss(
            hidden * 1.5,
            weight,
            targets,
            cu_seqlens=cu_seqlens,
            old_logprobs=old_logprobs,
            config=config,
            **({"advantages": scores} if recompute else {"rewards": scores, "group_size": 4}),
        )
        return output.loss * 3, output.logprobs

    compiled = torch.compile(step, backend=backend, fullgraph=True, dynamic=True)
    for seed, lengths in enumerate([(3, 4, 2, 5), (6, 1, 8, 2), (9, 9, 3, 4), (2, 2, 3, 1)]):
        case = batch_of(lengths, seed)
        case["scores"] = torch.linspace(0.5, 2, sum(lengths), device=DEVICE) if recompute else case["rewards"]
        names = ("targets", "cu_seqlens", "scores", OLD)
        results = []
        for function in (step, compiled):
            leaves = [case[name].clone().requires_grad_() for name in ("hidden", "weight")]
            loss, logprobs = function(*leaves, *(case[name] for name in names))
            results.append((loss.detach(), logprobs, *torch.autograd.grad(loss, leaves)))
        torch.testing.assert_close(results[1], results[0])
        compiled_graphs.append(counting["stats"]["unique_graphs"])
    assert set(compiled_graphs) == {1}


@pytest.mark.parametrize("path", ["chunks", "recompute", "deferred"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_under_activation_checkpointing(reentrant, path, monkeypatch):
    case = without_logprobs(make_case(dtype=torch.float64), OLD)
    force(monkeypatch, path)

    def loss_of(hidden, weight):
        return linear_grpo_loss(**case | {"hidden": hidden * 1.5, "weight": weight}, config=on(path)).loss

    def gradients(function):
        leaves = [case[name].clone().requires_grad_() for name in ("hidden", "weight")]
        return torch.autograd.grad(function(*leaves), leaves) if not reentrant else _backward(function, leaves)

    expected = gradients(loss_of)
    actual = gradients(lambda *leaves: checkpoint(loss_of, *leaves, use_reentrant=reentrant))
    torch.testing.assert_close(actual, expected)


def _backward(function, leaves):
    function(*leaves).backward()
    return tuple(leaf.grad for leaf in leaves)


@pytest.mark.parametrize("extras", [(), EXTRAS], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_costs_no_precision(dtype, extras):
    case = make_case(extras=extras)
    config = GRPOLossConfig(beta=0.1, entropy_coef=0.1)
    expected, grads = run_loss(linear_grpo_loss, case, config)
    with torch.autocast(DEVICE.type, dtype=dtype):
        actual, same = run_loss(linear_grpo_loss, case, config)
    assert torch.equal(actual.loss, expected.loss) and torch.equal(actual.logprobs, expected.logprobs)
    assert all(torch.equal(same[name], grads[name]) for name in grads)


# ---- bad input

BOUNDS = list(itertools.accumulate(LENGTHS, initial=0))


@pytest.mark.parametrize(
    "change, settings, message",
    [
        ({"rewards": None}, {}, "Give either rewards or advantages"),
        ({"advantages": torch.zeros(8)}, {}, "Give either rewards or advantages"),
        ({"rewards": torch.zeros(7)}, {}, r"rewards has shape \(7,\): it must be \(8,\)"),
        ({"rewards": torch.tensor([*[0.0] * 7, torch.nan])}, {}, r"rewards\[7\] = nan is not finite"),
        ({"rewards": None, "advantages": torch.full((8,), torch.inf)}, {}, r"advantages\[0\] = inf is not finite"),
        ({"rewards": None, "advantages": torch.zeros(8, 1)}, {}, r"advantages has shape \(8, 1\)"),
        ({"group_size": 3}, {}, "group_size=3 does not divide the 8 rewards"),
        ({"group_size": None}, {}, "Give either group_size or group_ids"),
        ({"mask": torch.ones(3, dtype=torch.bool)}, {}, r"mask has shape \(3,\)"),
        ({"mask": torch.ones(N, dtype=torch.int64)}, {}, r"mask is torch.int64: pass mask.bool\(\)"),
        ({OLD: torch.zeros(N - 1)}, {}, rf"old_logprobs has shape \({N - 1},\)"),
        ({SAMPLER: torch.zeros(N, 1)}, {}, rf"sampler_logprobs has shape \({N}, 1\)"),
        ({"temperature": torch.ones(N + 1)}, {}, rf"temperature has shape \({N + 1},\)"),
        ({"temperature": torch.zeros(N)}, {}, r"temperature\[0\] = 0.0 must be positive"),
        ({"cu_seqlens": torch.tensor([*BOUNDS[:-1], N - 1])}, {}, f"from 0 to {N - 1}: it must rise from 0 to N = {N}"),
        ({"cu_seqlens": torch.tensor([1, *BOUNDS[1:]])}, {}, f"cu_seqlens runs from 1 to {N}"),
        ({"cu_seqlens": torch.tensor([0, 9, 5, *BOUNDS[3:]])}, {}, "cu_seqlens falls from 9 to 5 at 2"),
        ({"cu_seqlens": torch.tensor([-2, *BOUNDS[1:-1], 2**40])}, {}, f"cu_seqlens runs from -2 to {2**40}"),
        ({"cu_seqlens": torch.tensor(BOUNDS).float()}, {}, r"cu_seqlens \(9,\) of torch.float32"),
        ({"cu_seqlens": torch.tensor([[0, N]])}, {}, r"cu_seqlens \(1, 2\)"),
        ({"targets": torch.full((N,), 213)}, {}, r"targets\[0\] = 213 is outside the vocabulary of 213"),
        ({"targets": torch.full((N,), -1)}, {}, r"targets\[0\] = -1 is outside"),
        ({"targets": torch.zeros(N, dtype=torch.int32)}, {}, "of torch.int32 must be int64"),
        ({"hidden": torch.zeros(N, 23)}, {}, rf"hidden \({N}, 23\) and weight \(213, 24\)"),
        ({"hidden": torch.zeros(N, 24, dtype=torch.int64)}, {}, "hidden is torch.int64"),
        ({"weight": torch.zeros(213, 24, dtype=torch.int8)}, {}, "weight is torch.int8"),
        ({"hidden": torch.zeros(24)}, {}, r"hidden \(24,\)"),
        ({"bias": torch.zeros(212)}, {}, r"bias \(212,\) must have one entry for each of the 213"),
        ({}, {"beta": 0.1}, "beta=0.1 needs ref_logprobs"),
    ],
)
def test_bad_input_is_named_before_any_sweep(change, settings, message, monkeypatch):
    case = without_logprobs(make_case())
    monkeypatch.setattr(sweep, "backend", None)
    change = {name: value.to(DEVICE) if torch.is_tensor(value) else value for name, value in change.items()}
    with pytest.raises(InputError, match=message) as caught:
        linear_grpo_loss(**(case | change), config=GRPOLossConfig(**settings))
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize("name", ["weight", "targets", "bias", "cu_seqlens", "rewards", "mask", OLD])
def test_a_tensor_on_another_device_is_named(name):
    case = make_case(extras=EXTRAS)
    case[name] = case[name].to("meta")
    with pytest.raises(InputError, match=f"{name} is on meta and hidden on {DEVICE.type}"):
        linear_grpo_loss(**case)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"loss_type": "ppo"}, "loss_type='ppo' is unknown"),
        ({"epsilon": -0.1}, r"epsilon=-0.1 must lie in \[0, 1\)"),
        ({"epsilon": 1.0}, r"epsilon=1.0 must lie in \[0, 1\), as the lower clip"),
        ({"importance_sampling_cap": -1.0}, "importance_sampling_cap=-1.0 must be positive"),
        ({"temperature": 0}, "temperature=0 must be positive and finite"),
        ({"delta": 1.1}, "delta=1.1 must exceed"),
        ({"loss_type": "dr_grpo"}, "max_completion_length"),
    ],
)
def test_a_config_that_cannot_work_is_refused(settings, message):
    with pytest.raises(InputError, match=message):
        GRPOLossConfig(**settings)
