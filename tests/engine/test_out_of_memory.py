"""Rollouts that run out of memory: they continue with less, and no completion depends on it."""

import warnings

import pytest
import torch

from tests.engine.test_engine import GREEDY, WARM, assert_empty, ids, prompts, small_model
from tests.ops.cases import DEVICE
from toolx_kernels.engine import RolloutEngine
from toolx_kernels.engine import runner as runner_module
from toolx_kernels.engine.pages import PagePool
from toolx_kernels.engine.pool_size import pages_of, pages_wanted
from toolx_kernels.engine.runner import Runner
from toolx_kernels.errors import InputError, out_of_memory

ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: you tried to"),
]


def has_pages(monkeypatch, most):
    """Makes allocations of more than ``most`` pages fail; returns the list of requested sizes."""
    asked, new_zeros = [], torch.Tensor.new_zeros

    def limited(tensor, *shape, **options):
        if len(shape) == 4:
            asked.append(shape[0])
            if shape[0] > most:
                raise ERRORS[1]
        return new_zeros(tensor, *shape, **options)

    monkeypatch.setattr(torch.Tensor, "new_zeros", limited)
    return asked


def fails(monkeypatch, method, error, fits):
    """Makes ``Runner.method`` fail with ``error`` after its work, unless ``fits(runner, argument)``.

    Returns the list of arguments of failed calls.
    """
    whole, failed = getattr(Runner, method), []

    def limited(runner, argument):
        result = whole(runner, argument)
        if not fits(runner, argument):
            failed.append(argument)
            raise error
        return result

    monkeypatch.setattr(Runner, method, limited)
    return failed


def test_what_is_an_error_of_memory():
    assert all(map(out_of_memory, ERRORS))
    for said in ("CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "Triton Error [CUDA]: out of memory"):
        assert out_of_memory(RuntimeError(said))
    assert out_of_memory(MemoryError()) and not out_of_memory(ValueError("out of memory"))
    assert not out_of_memory(RuntimeError("CUDA error: device-side assert triggered"))
    with pytest.raises(RuntimeError) as real:
        torch.empty(2**60)
    assert out_of_memory(real.value)


def test_a_pool_that_cannot_be_had_is_halved(monkeypatch):
    model = small_model("llama")
    expected = ids(RolloutEngine(model, page_size=8).generate(prompts(), 3, WARM))
    asked = has_pages(monkeypatch, 20)
    engine = RolloutEngine(model, page_size=8)
    with pytest.warns(UserWarning, match="ran out of memory during rollouts: the KV pool has 16 pages, not 128"):
        assert ids(engine.generate(prompts(), 3, WARM)) == expected
    assert engine.pool.n_pages == asked[-1] == 16 and asked[0] == 128
    assert_empty(engine.pool)
    asked.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ids(engine.generate(prompts(), 3, WARM)) == expected
    assert not asked, "what could not be had once is not asked for again"


def test_a_pool_that_cannot_grow_makes_room_for_another(monkeypatch):
    model = small_model("llama")
    expected = ids(RolloutEngine(model, page_size=8).generate(prompts(), 3, WARM))
    engine = RolloutEngine(model, page_size=8)
    first = ids(engine.generate(prompts((5,)), 1, WARM))
    small = engine.pool
    has_pages(monkeypatch, 20)
    with pytest.warns(UserWarning, match="the KV pool has 16 pages"):
        assert ids(engine.generate(prompts(), 3, WARM)) == expected
    assert engine.pool is not small
    assert ids(engine.generate(prompts((5,)), 1, WARM)) == first


@pytest.mark.parametrize("max_pages", [None, 40])
def test_a_pool_in_which_a_row_fits_alone_is_the_smallest(monkeypatch, max_pages):
    model = small_model("llama")
    expected = ids(RolloutEngine(model, page_size=8).generate(prompts(), 2, GREEDY))
    has_pages(monkeypatch, 8)
    engine = RolloutEngine(model, page_size=8, max_pages=max_pages)
    with pytest.warns(UserWarning, match="the KV pool has"):
        assert ids(engine.generate(prompts(), 2, GREEDY)) == expected
    assert engine.pool.n_pages == 8 == pages_of(40, 20, 8)
    has_pages(monkeypatch, 7)
    engine = RolloutEngine(model, page_size=8, max_pages=max_pages)
    with pytest.raises(InputError, match="A pool of 8 pages of 8 tokens takes"):
        engine.generate(prompts(), 2, GREEDY)


def test_a_pool_that_failed_half_way_is_not_used(monkeypatch):
    """Memory runs out when one of three layers has grown."""
    model = small_model("llama")
    engine = RolloutEngine(model, page_size=8)
    engine.generate(prompts((5,)), 1, WARM)
    expected = ids(RolloutEngine(model, page_size=8).generate(prompts(), 3, WARM))
    enlarge = PagePool.enlarge

    def fails_once(pool, n_pages):
        if n_pages > 40:
            pool.key_caches[0] = pool.key_caches[0].new_full((n_pages, *pool.key_caches[0].shape[1:]), torch.nan)
            raise ERRORS[1]
        enlarge(pool, n_pages)

    monkeypatch.setattr(PagePool, "enlarge", fails_once)
    with pytest.warns(UserWarning, match="the KV pool has"):
        assert ids(engine.generate(prompts(), 3, WARM)) == expected


@pytest.mark.parametrize("error", ERRORS, ids=["cuda", "cpu"])
def test_a_step_that_does_not_fit_is_done_with_fewer_rows(monkeypatch, error):
    model = small_model("llama")
    expected = RolloutEngine(model, page_size=8).generate(prompts(), 3, WARM)
    failed = fails(monkeypatch, "decode", error, lambda _, inputs: len(inputs.ids) <= 4)
    engine = RolloutEngine(model, page_size=8)
    with pytest.warns(UserWarning, match="at most 9 completions are sampled at a time") as said:
        groups = engine.generate(prompts(), 3, WARM)
    assert ids(groups) == ids(expected)
    for mine, theirs in zip(groups, expected, strict=True):
        for a, b in zip(mine.completions, theirs.completions, strict=True):
            assert len(a.logprobs) == len(b.logprobs) == len(a.ids)
            torch.testing.assert_close(torch.tensor(a.logprobs), torch.tensor(b.logprobs), rtol=0, atol=1e-4)
    assert [len(inputs.ids) for inputs in failed] == [18, 9] and len(said) == 1 and engine.preemptions == 14
    assert_empty(engine.pool)
    failed.clear()
    assert ids(engine.generate(prompts(), 3, WARM)) == ids(expected)
    assert not failed, "the next call begins with as many rows as fitted"


def test_a_single_row_that_does_not_fit_raises_and_costs_nothing(monkeypatch):
    model = small_model("llama")
    engine = RolloutEngine(model, page_size=8)
    with monkeypatch.context() as patch:
        fails(patch, "decode", ERRORS[0], lambda *_: False)
        with pytest.raises(torch.OutOfMemoryError), pytest.warns(UserWarning):
            engine.generate(prompts(), 2, WARM)
    assert engine.pool is None
    assert ids(engine.generate(prompts(), 2, WARM)) == ids(RolloutEngine(model).generate(prompts(), 2, WARM))


def test_other_errors_are_raised_at_once(monkeypatch):
    failed = fails(monkeypatch, "decode", RuntimeError("device-side assert"), lambda *_: False)
    with pytest.raises(RuntimeError, match="device-side assert"):
        RolloutEngine(small_model("llama")).generate(prompts(), 2, WARM)
    assert len(failed) == 1


@pytest.mark.parametrize("error", ERRORS, ids=["cuda", "cpu"])
def test_prompts_that_do_not_fit_are_computed_in_pieces(monkeypatch, error):
    monkeypatch.setattr(runner_module, "LEAST_PREFILL_TOKENS", 8)
    monkeypatch.setitem(runner_module.MAX_PREFILL_TOKENS, DEVICE.type, 4096)
    model = small_model("llama")
    expected = ids(RolloutEngine(model, page_size=8).generate(prompts(), 3, WARM))

    def short(_, batch):
        return sum(stop - start for _, start, stop in batch) <= 20

    failed = fails(monkeypatch, "_prefill", error, short)
    engine = RolloutEngine(model, page_size=8)
    with pytest.warns(UserWarning, match="prompts are computed in pieces of at most 2048 tokens") as said:
        assert ids(engine.generate(prompts(), 3, WARM)) == expected
    assert len(said) == 1 and engine.runner.prefill_tokens == 16 and len(failed) == 8
    fails(monkeypatch, "_prefill", error, lambda *_: False)
    with pytest.raises(type(error)), pytest.warns(UserWarning):
        RolloutEngine(model, page_size=8).generate(prompts(), 3, WARM)


def test_pages_wanted_count_a_shared_prompt_once():
    # 75 pages for each prompt of 1200 tokens, and 16 for the 255 tokens that each of 320 rows writes after it
    assert pages_wanted([1200] * 32, 10, [256] * 32, 16, max_sequences=512) == 32 * 75 + 320 * 16
    assert pages_wanted([1200] * 32, 10, [256] * 32, 16, max_sequences=100) == 32 * 75 + 100 * 16
    assert pages_wanted([5, 40], 1, [20, 3], 8, max_sequences=512) == 0 + 5 + 2 * 3
