"""Vocabulary shards: a vocabulary split over several ranks gives the results of the whole vocabulary."""

import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import FunctionType

import pytest
import torch

from tests.ops.cases import (
    EXTRAS,
    PATHS,
    assert_agrees,
    assert_equal_gradients,
    force,
    make_case,
    make_head,
    run_head,
    run_loss,
    use_backend,
    without_logprobs,
)

from tests.ops.cases import BACKENDS  # isort: skip
from toolx_kernels.errors import InputError
from toolx_kernels.loss_config import GRPOLossConfig
from toolx_kernels.ops.lm_head.linear_grpo import linear_grpo_loss
from toolx_kernels.ops.lm_head.linear_logprob import linear_logprob
from toolx_kernels.ops.lm_head.vocab_shard import VocabShard

VOCAB = 213
CUTS = {"two equal halves": (107, 106), "a sliver": (5, 208), "three": (64, 1, 148)}
OF_VOCAB = ("weight", "bias")


class Ranks:
    """All-reduce between threads, in the order of their ranks."""

    def __init__(self, size: int, in_place: bool):
        self.barrier = threading.Barrier(size, timeout=30)
        self.given = [None] * size
        self.calls = [[] for _ in range(size)]
        self.in_place = in_place

    def reduce(self, rank: int):
        def all_reduce(tensor, op):
            self.calls[rank].append((op, tuple(tensor.shape)))
            self.given[rank] = tensor
            self.barrier.wait()
            all_given = torch.stack(self.given)
            result = all_given.sum(0) if op == "sum" else all_given.amax(0)
            self.barrier.wait()
            return tensor.copy_(result) if self.in_place else result

        return all_reduce


def on_every_rank(sizes, case, run, in_place=False):
    """Calls ``run(case of the rank)`` in one thread per entry of ``sizes``; results in the order of the ranks."""
    ranks, starts = Ranks(len(sizes), in_place), [sum(sizes[:rank]) for rank in range(len(sizes))]

    def work(rank):
        rows = slice(starts[rank], starts[rank] + sizes[rank])
        own = case | {name: case[name][rows] for name in OF_VOCAB if name in case}
        try:
            return run(own | {"shard": VocabShard(starts[rank], sum(sizes), ranks.reduce(rank))})
        except BaseException:
            ranks.barrier.abort()
            raise

    with ThreadPoolExecutor(len(sizes)) as pool:
        results = list(pool.map(work, range(len(sizes))))
    assert ranks.calls[0] and all(calls == ranks.calls[0] for calls in ranks.calls)
    return results


def assert_whole(results, expected):
    """Asserts that every rank has the whole gradient of hidden and its own rows of the other gradients."""
    for name, value in expected.items():
        parts = [grads[name] for grads in results]
        if name in OF_VOCAB:
            assert_equal_gradients({name: torch.cat(parts)}, {name: value})
        else:
            for part in parts:
                assert_equal_gradients({name: part}, {name: value})


@pytest.mark.parametrize("extras", [(), EXTRAS], ids=["plain", "extras"])
@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("path", PATHS)
def test_linear_grpo_loss(path, cut, extras, monkeypatch, taken):
    case = without_logprobs(make_case(dtype=torch.float64, vocab=VOCAB, masked=(3, 22), extras=extras), "old_logprobs")
    force(monkeypatch, path)
    config = GRPOLossConfig(entropy_coef=0.1, recompute=path == "deferred")
    whole, exact = run_loss(linear_grpo_loss, case, config)
    once = list(taken)
    results = on_every_rank(CUTS[cut], case, lambda own: run_loss(linear_grpo_loss, own, config))
    assert sorted(taken) == sorted(once * (1 + len(CUTS[cut])))
    for output, _ in results:
        assert_agrees(output, whole)
    assert_whole([grads for _, grads in results], exact)


@pytest.mark.parametrize("settings", [{}, {"importance_sampling_level": "sequence"}], ids=["rows", "sequences"])
def test_advantages_by_token(settings, monkeypatch):
    case = without_logprobs(make_case(dtype=torch.float64, vocab=VOCAB), "old_logprobs")
    del case["rewards"], case["group_size"]
    case["advantages"] = torch.linspace(-2, 1, len(case["targets"]), device=case["targets"].device).round()
    force(monkeypatch, "chunks", rows=11)
    whole, exact = run_loss(linear_grpo_loss, case, GRPOLossConfig(**settings))
    results = on_every_rank((64, 149), case, lambda own: run_loss(linear_grpo_loss, own, GRPOLossConfig(**settings)))
    for output, _ in results:
        assert_agrees(output, whole)
    assert_whole([grads for _, grads in results], exact)


@pytest.mark.parametrize(
    "settings",
    [
        {"importance_sampling_level": "sequence"},
        {"beta": 0.1},
        {"top_entropy_quantile": 0.4},
        {"loss_type": "cispo", "epsilon_high": 1.2},
    ],
    ids=str,
)
@pytest.mark.parametrize("in_place", [False, True], ids=["new", "in place"])
def test_objectives(settings, in_place, monkeypatch):
    case = make_case(dtype=torch.float64, vocab=VOCAB)
    force(monkeypatch, "chunks", rows=11)
    whole, exact = run_loss(linear_grpo_loss, case, GRPOLossConfig(**settings))
    results = on_every_rank(
        (64, 149), case, lambda own: run_loss(linear_grpo_loss, own, GRPOLossConfig(**settings)), in_place
    )
    for output, _ in results:
        assert_agrees(output, whole)
    assert_whole([grads for _, grads in results], exact)


@pytest.mark.parametrize("backend", BACKENDS)
def test_in_fp32_on_either_backend(backend, monkeypatch):
    case = without_logprobs(make_case(vocab=VOCAB, extras=EXTRAS), "old_logprobs")
    config = GRPOLossConfig(entropy_coef=0.1)
    whole, exact = run_loss(linear_grpo_loss, case, config)
    force(monkeypatch, "chunks", rows=16)
    use_backend(monkeypatch, backend)
    # interpreted kernels patch triton.language while they run, so only one thread may run them at a time
    if backend == "triton":
        _take_turns(monkeypatch)
    for output, grads in on_every_rank((64, 149), case, lambda own: run_loss(linear_grpo_loss, own, config)):
        assert_agrees(output, whole, 1e-4)
        assert_equal_gradients({"hidden": grads["hidden"]}, {"hidden": exact["hidden"]}, 1e-5)


def _take_turns(monkeypatch):
    from toolx_kernels.ops.lm_head import live_rows, sweep_triton

    lock = threading.RLock()
    for module in (live_rows, sweep_triton):
        for name, original in list(vars(module).items()):
            if isinstance(original, FunctionType) and original.__module__ == module.__name__:

                def alone(*arguments, original=original, **named):
                    with lock:
                        return original(*arguments, **named)

                monkeypatch.setattr(module, name, alone)


@pytest.mark.parametrize("extras", [(), EXTRAS], ids=["plain", "extras"])
@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("entropy", [False, True])
def test_linear_logprob(cut, extras, entropy, monkeypatch):
    case = make_head(33, 24, VOCAB, torch.float64, extras)
    force(monkeypatch, "recompute")
    whole, exact = run_head(linear_logprob, case, entropy=entropy)
    results = on_every_rank(CUTS[cut], case, lambda own: run_head(linear_logprob, own, entropy=entropy))
    for stats, _ in results:
        torch.testing.assert_close(tuple(stats), tuple(whole), rtol=1e-11, atol=1e-11)
    assert_whole([grads for _, grads in results], exact)


def test_every_rank_has_the_same_bits(monkeypatch):
    case = without_logprobs(make_case(vocab=VOCAB, extras=EXTRAS), "old_logprobs")
    force(monkeypatch, "chunks")
    results = on_every_rank((107, 106), case, lambda own: run_loss(linear_grpo_loss, own, GRPOLossConfig()))
    (first, grads), (second, others) = results
    assert torch.equal(first.loss, second.loss) and torch.equal(first.logprobs, second.logprobs)
    assert torch.equal(grads["hidden"], others["hidden"])


@pytest.mark.parametrize("start, vocab", [(-1, VOCAB), (107, VOCAB), (0, 106)])
def test_a_shard_outside_the_vocabulary_is_refused(start, vocab):
    case = without_logprobs(make_case(vocab=107))
    shard = VocabShard(start, vocab, lambda tensor, op: tensor)
    for call in (lambda: linear_grpo_loss(**case, shard=shard), lambda: linear_logprob(
        case["hidden"], case["weight"], case["targets"], shard=shard)):  # fmt: skip
        with pytest.raises(InputError, match=rf"shard.start={start} and the 107 rows of weight must lie inside"):
            call()


WORKER = """
import sys, torch, torch.distributed as dist
from toolx_kernels import linear_grpo_loss
from toolx_kernels.ops.lm_head.vocab_shard import VocabShard
rank, store, vocab = int(sys.argv[1]), sys.argv[2], 50
dist.init_process_group("gloo", init_method="file://" + store, rank=rank, world_size=2)
g = torch.Generator().manual_seed(0)
hidden, weight = torch.randn(12, 8, generator=g), torch.randn(vocab, 8, generator=g)
batch = {"cu_seqlens": torch.tensor([0, 5, 12]), "rewards": torch.tensor([1.0, 0.0]), "group_size": 2}
targets = torch.randint(vocab, (12,), generator=g)
def run(weight, **shard):
    leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
    output = linear_grpo_loss(*leaves, targets, **batch, **shard)
    return output.logprobs, *torch.autograd.grad(output.loss, leaves)
rows = slice(0, 20) if rank == 0 else slice(20, vocab)
all_reduce = lambda t, op: dist.all_reduce(t, dist.ReduceOp.SUM if op == "sum" else dist.ReduceOp.MAX) or t
logprobs, by_hidden, by_weight = run(weight[rows], shard=VocabShard(rows.start, vocab, all_reduce))
expected = run(weight)
torch.testing.assert_close((logprobs, by_hidden), expected[:2])
torch.testing.assert_close(by_weight, expected[2][rows])
print("equal")
dist.destroy_process_group()
"""


def test_over_two_processes_as_documented(tmp_path):
    root = Path(__file__).parents[3]
    command = [sys.executable, "-c", WORKER]
    workers = [
        subprocess.Popen(
            [*command, str(rank), str(tmp_path / "store")],
            cwd=root,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for rank in (0, 1)
    ]
    for worker in workers:
        out, err = worker.communicate(timeout=60)
        assert out == "equal\n", err
