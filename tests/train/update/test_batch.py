"""How groups are laid out in a batch and how a step is cut into micro-batches; what comes out of it: test_packing."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from toolx_kernels.train.update.batch import PackedGroup, Part, micro_batches, pack


def test_the_docstring_example():
    batch = pack([PackedGroup([1, 7], [[5, 2]]), PackedGroup([3], [[4, 6, 2], [8]])])
    assert batch.input_ids.tolist() == [1, 7, 5, 3, 4, 6]
    assert batch.context.tokens.position.tolist() == [0, 1, 2, 0, 1, 2]
    assert batch.context.tokens.segment.tolist() == [0, 0, 1, 2, 3, 3]
    assert batch.context.tokens.prompt.tolist() == [0, 0, 0, 2, 2, 2]
    assert batch.source.tolist() == [1, 2, 3, 4, 5, 3]
    assert batch.targets.tolist() == [5, 2, 4, 6, 2, 8]
    assert batch.cu_seqlens.tolist() == [0, 2, 5, 6]
    assert batch.mask is None
    masked = pack([PackedGroup([1, 7], [[5, 2]]), PackedGroup([3], [[4, 6, 2], [8]], [[True, False, True], None])])
    assert masked.mask.tolist() == [True, True, True, False, True, True]
    assert masked.input_ids.equal(batch.input_ids) and masked.targets.equal(batch.targets)
    assert pack([PackedGroup([3], [[4, 6]], [[True, True]])]).mask is None


def test_a_part_is_the_prompt_with_some_completions():
    group = PackedGroup((1, 7), ((5, 2), (9, 2, 4), (3,)), (None, (True, False, True), None))
    assert group.part(slice(1, 3)) == PackedGroup((1, 7), ((9, 2, 4), (3,)), ((True, False, True), None))
    assert group.n_tokens == 5 and group.part(slice(1, 3)).n_tokens == 4
    assert PackedGroup((1,), ((5, 2), (9,))).part(slice(1)) == PackedGroup((1,), ((5, 2),))


@pytest.mark.parametrize(
    "budget, parts",
    [
        (100, [[(0, 0, 3), (1, 0, 2)]]),
        (25, [[(0, 0, 3)], [(1, 0, 2)]]),  # 10 + 3 x 5 tokens fit, the next group's 4 + 2 x 3 do not
        (20, [[(0, 0, 2)], [(0, 2, 3)], [(1, 0, 2)]]),  # the last run leaves 5 tokens, and a whole group is not cut
        (16, [[(0, 0, 1)], [(0, 1, 2)], [(0, 2, 3)], [(1, 0, 2)]]),
        (8, [[(0, 0, 1)], [(0, 1, 2)], [(0, 2, 3)], [(1, 0, 1)], [(1, 1, 2)]]),  # nothing of the first group fits
    ],
)
def test_a_group_is_cut_only_where_it_does_not_fit(budget, parts):
    groups = [PackedGroup([1] * 10, [[2] * 6] * 3), PackedGroup([1] * 4, [[2] * 4] * 2)]
    expected = [[Part(group, slice(start, stop)) for group, start, stop in batch] for batch in parts]
    assert micro_batches(groups, budget) == expected


def test_runs_share_micro_batches_with_other_groups():
    groups = [PackedGroup([1] * 2, [[2] * 2]), PackedGroup([1] * 4, [[2] * 9] * 2), PackedGroup([1] * 3, [[2] * 2])]
    (first, last), runs = (Part(i, slice(0, 1)) for i in (0, 2)), (Part(1, slice(k, k + 1)) for k in (0, 1))
    assert micro_batches(groups, 16) == [[first, next(runs)], [next(runs), last]]


LENGTHS = st.lists(st.tuples(st.integers(1, 40), st.lists(st.integers(1, 20), min_size=1, max_size=8)), max_size=12)


@given(LENGTHS, st.integers(1, 90))
def test_micro_batches_hold_every_completion_once_within_the_budget(lengths, budget):
    groups = [PackedGroup([1] * prompt, [[2] * n for n in completions]) for prompt, completions in lengths]
    batches = micro_batches(groups, budget)
    parts = [part for batch in batches for part in batch]
    held = [(part.group, k) for part in parts for k in range(part.completions.start, part.completions.stop)]
    assert held == [(g, k) for g, group in enumerate(groups) for k in range(len(group.completions))]
    for batch in batches:
        tokens = sum(groups[part.group].part(part.completions).n_tokens for part in batch)
        alone = len(batch) == 1 and len(range(batch[0].completions.start, batch[0].completions.stop)) == 1
        assert tokens <= budget or alone
    for index, group in enumerate(groups):
        cuts = [part.completions for part in parts if part.group == index]
        assert len(cuts) == 1 or group.n_tokens > budget
        for run, after in zip(cuts, cuts[1:], strict=False):  # a run ends where one more completion would not fit
            assert group.part(slice(run.start, after.start + 1)).n_tokens > budget
