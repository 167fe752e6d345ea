"""Optimizers compared with float64 AdamW, torch's AdamW, and themselves when cut, resumed or interrupted."""

import importlib.util
import math
import weakref

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from tests.ops.cases import DEVICE
from toolx_kernels.errors import InputError
from toolx_kernels.train.config import ToolExpanderConfig
from toolx_kernels.train.update import adamw, offload
from toolx_kernels.train.update.adamw import make_optimizer, round_stochastically
from toolx_kernels.train.update.schedule import ExponentialDecay

FP32, BF16 = torch.float32, torch.bfloat16
needs_torchao = pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="torchao is not installed")


def _kind(optim, dtype):
    marks = needs_torchao if optim == "adamw_8bit" else ()
    return pytest.param(optim, dtype, id=f"{optim}-{str(dtype)[6:]}", marks=marks)


KINDS = [
    _kind("adamw", FP32), _kind("adamw", BF16), _kind("adamw_8bit", FP32), _kind("adamw_8bit", BF16),
    _kind("adamw_stochastic", BF16), _kind("adamw_offload", FP32), _kind("adamw_offload", BF16),
]  # fmt: skip
every_kind = pytest.mark.parametrize(("optim", "dtype"), KINDS)


class Toy(nn.Module):
    """A model with a tied head, a weight large enough for 8-bit states, small weights and a frozen one."""

    def __init__(self, dtype=FP32):
        super().__init__()
        g = torch.Generator().manual_seed(0)
        self.embed = nn.Embedding(12, 64)
        self.inner = nn.Linear(64, 64)
        self.scale = nn.Parameter(torch.ones(64))
        self.frozen = nn.Parameter(torch.ones(3), requires_grad=False)
        self.head = nn.Linear(64, 12, bias=False)
        self.head.weight = self.embed.weight
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=g) * 0.3)
        self.to(DEVICE, dtype)

    def get_input_embeddings(self):
        return self.embed

    def forward(self, ids):
        return self.head(self.scale * self.inner(self.embed(ids)))


def make(optim, dtype=FP32, model=None, learning_rate=1e-2, **settings):
    model = model or Toy(dtype)
    args = ToolExpanderConfig(optim=optim, **settings)
    return model, make_optimizer(model, args, learning_rate)


def give(optimizer, step, micro_batches=1):
    """Runs backward passes with random gradients; returns their float64 sums by name."""
    sums = {}
    for cut in range(micro_batches):
        g = torch.Generator().manual_seed(1000 * step + cut)
        loss = 0
        for name, parameter in optimizer.parameters.items():
            gradient = torch.randn(parameter.shape, generator=g).to(parameter)
            sums[name] = sums.get(name, 0) + gradient.double()
            loss = loss + (parameter * gradient).sum()
        loss.backward()
        optimizer.collect()
    return sums


def run(optimizer, steps, max_grad_norm=1.0):
    for step in steps:
        give(optimizer, step, micro_batches=2)
        optimizer.apply(max_grad_norm, (7, step))


def values(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def assert_same(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert torch.equal(ours[name], value), name


class Double:
    """AdamW as in its paper (arXiv 1711.05101), in float64, after clipping by the global norm."""

    def __init__(self, start, rate, betas, eps, decay):
        self.weights = {name: value.double() for name, value in start.items()}
        self.rate, self.betas, self.eps, self.decay, self.count = rate, betas, eps, decay, 0
        self.first = {name: torch.zeros_like(value) for name, value in self.weights.items()}
        self.second = {name: torch.zeros_like(value) for name, value in self.weights.items()}

    def step(self, gradients, max_norm):
        self.count += 1
        norm = math.sqrt(sum(float(g.square().sum()) for g in gradients.values()))
        (b1, b2), factor = self.betas, min(1.0, max_norm / (norm + 1e-6))
        for name, g in gradients.items():
            g = g * factor
            self.first[name] = b1 * self.first[name] + (1 - b1) * g
            self.second[name] = b2 * self.second[name] + (1 - b2) * g * g
            mean, square = self.first[name] / (1 - b1**self.count), self.second[name] / (1 - b2**self.count)
            self.weights[name] *= 1 - self.rate * self.decay
            self.weights[name] -= self.rate * mean / (square.sqrt() + self.eps)
        return norm


# error after 20 steps, relative to the distance moved; bfloat16 rounds weights of 0.3 and steps of 0.01
TOLERANCE = {
    ("adamw", FP32): 3e-6, ("adamw_offload", FP32): 3e-6, ("adamw_8bit", FP32): 0.1,
    ("adamw", BF16): 3e-2, ("adamw_offload", BF16): 3e-2, ("adamw_8bit", BF16): 0.15, ("adamw_stochastic", BF16): 0.12,
}  # fmt: skip


@every_kind
def test_agrees_with_float64(optim, dtype):
    model, optimizer = make(optim, dtype, weight_decay=0.1, adam_beta1=0.8, adam_beta2=0.9, adam_epsilon=1e-6)
    start = values(model)
    truth = Double({name: start[name] for name in optimizer.parameters}, 1e-2, (0.8, 0.9), 1e-6, 0.1)
    for step in range(20):
        expected = truth.step(give(optimizer, step), max_norm=3.0)
        norm = optimizer.apply(3.0, (0, step))
        assert norm == pytest.approx(expected, rel=1e-5)
    moved = values(model)
    for name, true in truth.weights.items():
        error = float((moved[name].double() - true).norm() / (true - start[name].double()).norm())
        assert error <= TOLERANCE[optim, dtype], f"{name}: {error:.1e}"
    for name, value in optimizer.state_dict().items():
        if name.endswith("|step"):
            assert value == 20
        if name.endswith("|master"):
            true = truth.weights[name.removesuffix("|master")]
            error = float((value.to(DEVICE).double() - true).norm() / (true - start[name[:-7]].double()).norm())
            assert error <= 3e-6, f"{name}: {error:.1e}"
    assert torch.equal(moved["frozen"], start["frozen"])
    assert set(optimizer.parameters) == {"embed.weight", "inner.weight", "inner.bias", "scale"}


@every_kind
def test_an_update_at_1e_6_arrives(optim, dtype):
    """bfloat16 numbers near 0.01 are 6e-5 apart, so 80 steps of 1e-6 in one direction pass at least one."""

    class One(nn.Module):
        def __init__(self):
            super().__init__()
            g = torch.Generator().manual_seed(0)
            self.weight = nn.Parameter((0.009 + 0.006 * torch.rand(64, 64, generator=g)).to(DEVICE, dtype))
            self.other = nn.Embedding(1, 1).to(DEVICE, dtype)

        def get_input_embeddings(self):
            return self.other

    model, optimizer = make(optim, model=One(), learning_rate=1e-6)
    start = model.weight.detach().double()
    for step in range(80):
        model.weight.sum().backward()
        optimizer.collect()
        optimizer.apply(1e9, (0, step))
        if step == 0:
            first = (start - model.weight.detach().double()).mean()
    went = start - model.weight.detach().double()
    if dtype == BF16 and optim in ("adamw_stochastic", "adamw_8bit"):
        # the mean of 4096 random roundings has a standard error of 12 % after one step and of 1.4 % after 80
        assert float(first) == pytest.approx(1e-6, rel=0.5)
        assert float(went.mean()) == pytest.approx(80e-6, rel=0.05)
        assert float(went.std()) > 2e-5
    else:  # exact up to the nearest number of the dtype
        assert float((went - 80e-6).abs().max()) <= (2.0**-15 if dtype == BF16 else 1e-7)


def test_stochastic_rounding_is_right_on_average():
    exact = torch.tensor([1.0, -1.0, 1.0 + 2**-9, -1.0 - 3 * 2**-9, 3.0e-5, 0.0, 1e30], device=DEVICE)
    torch.manual_seed(0)
    rounded = torch.stack([round_stochastically(exact) for _ in range(4000)]).double()
    down, up = exact.double() * (1 - 2**-7), exact.double() * (1 + 2**-7)
    assert ((rounded - exact).abs() <= (up - down).abs() / 2).all()
    spacing = torch.tensor([2**-7, 2**-7, 2**-7, 2**-7, 2.0**-23, 1.0, 2.0**92], device=DEVICE)
    error = (rounded.mean(0) - exact.double()) / spacing
    assert error.abs().max() < 4 * 0.5 / math.sqrt(4000)
    assert torch.equal(rounded[:, [0, 1, 5]], exact[[0, 1, 5]].double().expand(4000, 3)), "exact numbers stay"
    assert rounded[:, 2].unique().numel() == 2


@every_kind
def test_ten_steps_are_five_and_five(optim, dtype, tmp_path):
    model, optimizer = make(optim, dtype)
    run(optimizer, range(10))

    half, first = make(optim, dtype)
    run(first, range(5))
    save_file({key: value.contiguous() for key, value in first.state_dict().items()}, tmp_path / "state")
    other = Toy(dtype)
    other.load_state_dict(half.state_dict())
    torch.manual_seed(12345)
    torch.rand(7)
    _, second = make(optim, dtype, model=other)
    second.load_state_dict(load_file(tmp_path / "state"))
    assert_same(second.state_dict(), first.state_dict())
    run(second, range(5, 10))
    assert_same(values(other), values(model))
    assert_same(second.state_dict(), optimizer.state_dict())


@every_kind
def test_a_gradient_that_is_not_finite_changes_nothing(optim, dtype):
    def states():
        return {key: value.clone() for key, value in optimizer.state_dict().items()}

    model, optimizer = make(optim, dtype)
    for bad in (math.nan, math.inf):
        run(optimizer, range(2))
        before, state = values(model), states()
        give(optimizer, 3)
        (model.scale.sum() * bad).backward()
        optimizer.collect()
        assert not math.isfinite(optimizer.apply(1.0, (7, 3)))
        assert_same(values(model), before)
        assert_same(states(), state)
        assert all(p.grad is None for p in model.parameters())
        run(optimizer, [4])
        assert not torch.equal(model.scale, before["scale"]), "the next update is as ever"
        assert model.scale.isfinite().all()


@every_kind
def test_states_that_found_no_memory_are_made_once_there_is_room(optim, dtype):
    expected, undisturbed = make(optim, dtype)
    run(undisturbed, [0])
    model, optimizer = make(optim, dtype)
    prepare, asked = optimizer._prepare, []

    def runs_out_half_way(name):
        prepare(name)
        if name == list(optimizer.parameters)[2] and not asked:
            optimizer.base.state[optimizer.parameters[name]].pop("exp_avg_sq")
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore.")

    optimizer._prepare = runs_out_half_way
    give(optimizer, 0, micro_batches=2)
    optimizer.apply(1.0, (7, 0), lambda reason: asked.append(reason) or True)
    assert asked == ["CUDA out of memory. Tried to allocate 2.00 GiB."]
    assert_same(values(model), values(expected))
    assert_same(optimizer.state_dict(), undisturbed.state_dict())

    model, optimizer = make(optim, dtype)
    prepare, asked, before = optimizer._prepare, [], values(model)
    held = []

    def holds_much(name):
        much = torch.empty(1000)
        held.append(weakref.ref(much))
        raise torch.OutOfMemoryError("CUDA out of memory.")

    optimizer._prepare = holds_much
    give(optimizer, 0)
    with pytest.raises(torch.OutOfMemoryError):
        optimizer.apply(1.0, (7, 0), lambda reason: held[-1]() is None and len(held) < 3)
    assert len(held) == 3, "what an attempt held is free when room is made for the next"
    optimizer._prepare = runs_out_half_way
    give(optimizer, 0)
    with pytest.raises(torch.OutOfMemoryError):
        optimizer.apply(1.0, (7, 0))
    assert_same(values(model), before)


@every_kind
def test_gradients_are_freed_one_by_one(optim, dtype, monkeypatch):
    model, optimizer = make(optim, dtype)
    run(optimizer, range(1))
    live, references = [], []
    take, update = optimizer._take, optimizer._update

    def spied_take():
        taken = take()
        references.extend((weakref.ref(t), t.nbytes) for t in taken.values())
        return taken

    def spied_update(*arguments):
        live.append(sum(size for reference, size in references if reference() is not None))
        update(*arguments)

    monkeypatch.setattr(optimizer, "_take", spied_take)
    monkeypatch.setattr(optimizer, "_update", spied_update)
    run(optimizer, [1])
    sizes = [size for _, size in references]
    assert len(sizes) == 4 and live == [sum(sizes[k:]) for k in range(4)]
    assert not any(reference() is not None for reference, _ in references)


@every_kind
def test_dropped_gradients_leave_no_trace(optim, dtype):
    model, optimizer = make(optim, dtype)
    run(optimizer, range(3))
    other, disturbed = make(optim, dtype)
    for step in range(3):
        give(disturbed, 50 + step)
        disturbed.drop_gradients()
        run(disturbed, [step])
    assert_same(values(other), values(model))


@every_kind
def test_a_closed_optimizer_lets_go_of_the_model(optim, dtype):
    model, optimizer = make(optim, dtype)
    run(optimizer, range(1))
    optimizer.close()
    model(torch.arange(3, device=DEVICE)).float().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == dtype for p in model.parameters() if p.requires_grad)


@every_kind
def test_starts_from_the_weights_of_its_first_step(optim, dtype):
    model, optimizer = make(optim, dtype, learning_rate=1e-6)
    with torch.no_grad():
        model.scale.fill_(100.0)  # as a cold start or a checkpoint does
    run(optimizer, range(1))
    assert float((model.scale.detach() - 100).abs().max()) <= 0.5


@every_kind
def test_schedules_set_the_rate(optim, dtype):
    model, optimizer = make(optim, dtype, learning_rate=0.5)
    schedule = ExponentialDecay(optimizer.base, 0.5)
    assert schedule.state_dict() == {"count": 0, "base_lrs": [0.5]}
    run(optimizer, [0])
    schedule.step()
    assert [group["lr"] for group in optimizer.base.param_groups] == [0.25]
    before = model.scale.detach().double()
    model.scale.sum().backward()
    for _ in range(2):
        optimizer.base.param_groups[0]["lr"] = 0.0
        optimizer.apply(1.0, (7, 1))
        assert torch.equal(model.scale.detach().double(), before), "a rate of 0 changes nothing"
    _, optimizer = make(optim, dtype, learning_rate=0.5)
    LambdaLR(optimizer.base, lambda step: 0.125)
    assert [group["lr"] for group in optimizer.base.param_groups] == [0.0625]


def test_adamw_is_torchs_to_the_bit():
    model, optimizer = make("adamw", weight_decay=0.1)
    theirs = Toy()
    trained = [p for p in theirs.parameters() if p.requires_grad]
    settings = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    torchs = torch.optim.AdamW(trained, fused=True, **settings)
    ids = torch.arange(12, device=DEVICE)
    for step, bound in enumerate((0.1, 1e9, 1.0, 1e-3)):
        for toy in (model, theirs):
            (toy(ids)[:, step] - 1).square().sum().backward()
        norm = torch.nn.utils.clip_grad_norm_(trained, bound)
        torchs.step()
        torchs.zero_grad()
        assert optimizer.apply(bound, (0, step)) == float(norm)
    assert_same(values(model), values(theirs))


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_offload_is_adamw_to_the_bit(dtype, monkeypatch):
    """In pieces of 40 bytes, with rows of a tied weight that are added directly to ``weight.grad``.

    Only in the first micro-batch: later, offload adds such rows to their own micro-batch first, not to the sum so far.
    """
    monkeypatch.setattr(offload, "BUFFER_BYTES", 40)
    (model, optimizer), (other, offloaded) = make("adamw", dtype), make("adamw_offload", dtype)
    for step in range(4):
        for toy, its in ((model, optimizer), (other, offloaded)):
            for cut in range(3):
                ids = torch.arange(step, step + 3 + cut, device=DEVICE)
                toy.head(toy.scale * toy.inner(toy.embed(ids).detach())).square().mean().backward()
                if cut == 0 and dtype == FP32:
                    toy.embed.weight.grad[ids] += 0.5
                its.collect()
                if its is offloaded:
                    assert all(p.grad is None for p in toy.parameters())
        norms = [its.apply(1.0, (0, step)) for its in (optimizer, offloaded)]
        assert norms[0] == norms[1] if DEVICE.type == "cpu" else norms[0] == pytest.approx(norms[1], rel=1e-5)
    if DEVICE.type == "cpu":
        assert_same(values(other), values(model))
    else:  # the CPU rounds differently from the GPU
        for name, value in values(model).items():
            torch.testing.assert_close(values(other)[name], value, rtol=1e-5 if dtype == FP32 else 1e-2, atol=1e-5)


def test_offload_gradients_leave_while_backward_runs():
    model, optimizer = make("adamw_offload")
    present = []
    model.embed.weight.register_hook(
        lambda _: present.append([p.grad is not None for p in optimizer.parameters.values()])
    )
    model(torch.arange(4, device=DEVICE)).sum().backward()
    names = [name for name, p in optimizer.parameters.items() if p.grad is not None]
    assert names == ["embed.weight"] and not any(map(any, present))
    optimizer.collect()
    assert model.embed.weight.grad is None


def test_offload_reports_what_fails_in_its_thread():
    model, optimizer = make("adamw_offload")
    optimizer._sums["scale"] = torch.zeros(64)
    broken = torch.Tensor.add_
    transfer = optimizer._transfer
    transfer.fetch(torch.ones(64, device=DEVICE), torch.zeros(64), lambda place, arrived: broken(place, "no tensor"))
    with pytest.raises(TypeError):
        optimizer.apply(1.0, (0, 0))


@pytest.mark.parametrize("optim", ["adamw", "adamw_offload"])
def test_many_micro_batches_of_bfloat16_add_up_in_fp32(optim):
    model, optimizer = make(optim, BF16)
    exact = give(optimizer, 0, micro_batches=64)
    rounded = {name: torch.zeros_like(p) for name, p in optimizer.parameters.items()}
    for cut in range(64):
        g = torch.Generator().manual_seed(cut)
        for name, p in optimizer.parameters.items():
            rounded[name] += torch.randn(p.shape, generator=g).to(p)
    for name, gradient in optimizer._take().items():
        error = float((gradient.to(DEVICE).double() - exact[name]).norm() / exact[name].norm())
        in_bf16 = float((rounded[name].double() - exact[name]).norm() / exact[name].norm())
        assert error < 1e-6 and in_bf16 > 5e-3, f"{name}: {error:.1e}, in bfloat16 {in_bf16:.1e}"


@pytest.mark.parametrize("optim", ["adamw_stochastic", pytest.param("adamw_8bit", marks=needs_torchao)])
def test_rounding_is_a_function_of_seed_and_step(optim):
    def once(seed, disturbance):
        torch.manual_seed(disturbance)
        model, optimizer = make(optim, BF16, learning_rate=1e-4)
        give(optimizer, 0)
        before = torch.get_rng_state()
        optimizer.apply(1.0, seed)
        assert torch.equal(torch.get_rng_state(), before), "the global generator is left alone"
        return model.inner.weight.detach().clone()

    assert torch.equal(once((0, 5), 1), once((0, 5), 2))
    for other in ((0, 6), (1, 5), (5, 0)):
        assert not torch.equal(once((0, 5), 1), once(other, 1))


def test_large_weights_are_rounded_in_pieces(monkeypatch):
    def once():
        model, optimizer = make("adamw_stochastic", BF16)
        run(optimizer, range(3))
        return optimizer.state_dict(), values(model)

    states, weights = once()
    seen = []
    rounded = adamw.round_stochastically
    monkeypatch.setattr(adamw, "round_stochastically", lambda exact: seen.append(len(exact)) or rounded(exact))
    monkeypatch.setattr(adamw, "CHUNK", 1024)
    pieces, weights_of_pieces = once()
    assert max(seen) == 1024
    assert_same(pieces, states)
    for name, value in weights.items():
        assert (weights_of_pieces[name] - value).abs().max() <= 3 * 2**-7 * value.abs().max(), name


def test_wants_bfloat16_weights():
    with pytest.raises(InputError, match="this run trains float32: use --optim adamw"):
        make("adamw_stochastic", FP32)


def test_says_that_torchao_is_missing(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"needs torchao: pip install 'toolx_kernels\[optim\]'"):
        make("adamw_8bit")


def test_refuses_the_state_of_another_run():
    _, optimizer = make("adamw", BF16)
    run(optimizer, range(1))
    state = optimizer.state_dict()
    _, fresh = make("adamw", FP32)
    with pytest.raises(InputError, match="holds float32 .* and this optimizer needs nothing"):
        fresh.load_state_dict(state)
    with pytest.raises(InputError, match="has a parameter lm_head.weight that is not trained here"):
        fresh.load_state_dict({"lm_head.weight|step": torch.zeros(())})
    _, fresh = make("adamw", BF16)
    short = {key: value for key, value in state.items() if key != "scale|exp_avg"}
    with pytest.raises(InputError, match=r"holds nothing as scale\|exp_avg, and this optimizer needs float32 \(64,\)"):
        fresh.load_state_dict(short)
