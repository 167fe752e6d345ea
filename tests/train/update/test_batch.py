"""Layout of groups in a batch and the split of a step into micro-batches; for gradients see test_packing.py."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from toolx_kernels.train.update.batch import PackedGroup, micro_batches, pack


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


def test_what_the_loss_needs_of_completions_is_laid_end_to_end():
    """A part has the share of its completions. If one completion lacks reference log-probs, the batch has none."""
    old = [torch.tensor([-1.5, -2.5]), torch.tensor([-0.25]), torch.tensor([-4.0])]
    group = PackedGroup([1], [[5, 2], [6], [7]], (), [0.5, -0.5, 1.0], old, [None, *old[1:]], [[-1.0, -2.0], [0], [-3]])
    batch = pack([group.part(slice(2)), group.part(slice(2, 3))], dtype=torch.float64)
    assert batch.advantages.tolist() == [0.5, -0.5, 1.0] and batch.old_logprobs.tolist() == [-1.5, -2.5, -0.25, -4.0]
    assert batch.sampler_logprobs.tolist() == [-1, -2, 0, -3] and batch.ref_logprobs is None
    assert batch.old_logprobs.dtype == batch.advantages.dtype == batch.sampler_logprobs.dtype == torch.float64
    assert pack([group.part(slice(1, 3))]).ref_logprobs.tolist() == [-0.25, -4.0]


def test_advantages_of_tokens_are_laid_end_to_end():
    """In the same batch, a single number applies to every token of its completion."""
    numbers = PackedGroup([1], [[5, 2], [6]], (), [0.5, -0.5])
    mixed = PackedGroup([3, 4], [[7, 8, 9], [5, 2], [3]], (), [[0.1, 0.0, 0.3], 2.0, [-1.0]])
    batch = pack([numbers, mixed], dtype=torch.float64)
    assert batch.advantages.tolist() == [0.5, 0.5, -0.5, 0.1, 0.0, 0.3, 2.0, 2.0, -1.0]
    assert len(batch.advantages) == len(batch.targets) and batch.advantages.dtype == torch.float64
    assert pack([numbers]).advantages.tolist() == [0.5, -0.5]
    assert pack([mixed.part(slice(1, 3))]).advantages.tolist() == [2.0, 2.0, -1.0]
    parts = [pack(part).advantages.tolist() for part in micro_batches([numbers, mixed], 4)]
    assert parts == [[0.5, -0.5], pytest.approx([0.1, 0.0, 0.3]), [2.0, 2.0, -1.0]]
    assert pack([PackedGroup([1], [[5, 2]])]).advantages is None


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
        (20, [[(0, 0, 2)], [(0, 2, 3)], [(1, 0, 2)]]),  # 5 tokens are left, but a group that fits is not cut
        (16, [[(0, 0, 1)], [(0, 1, 2)], [(0, 2, 3)], [(1, 0, 2)]]),
        (8, [[(0, 0, 1)], [(0, 1, 2)], [(0, 2, 3)], [(1, 0, 1)], [(1, 1, 2)]]),  # no completion of the first group fits
    ],
)
def test_a_group_is_cut_only_where_it_does_not_fit(budget, parts):
    groups = [PackedGroup([1] * 10, [[2] * 6] * 3), PackedGroup([1] * 4, [[2] * 4] * 2)]
    expected = [[groups[group].part(slice(start, stop)) for group, start, stop in batch] for batch in parts]
    assert micro_batches(groups, budget) == expected


def test_runs_share_micro_batches_with_other_groups():
    groups = [PackedGroup([1] * 2, [[2] * 2]), PackedGroup([1] * 4, [[2] * 9] * 2), PackedGroup([1] * 3, [[2] * 2])]
    run = PackedGroup([1] * 4, [[2] * 9])
    assert micro_batches(groups, 16) == [[groups[0], run], [run, groups[2]]]


LENGTHS = st.lists(st.tuples(st.integers(1, 40), st.lists(st.integers(1, 20), min_size=1, max_size=8)), max_size=12)


@given(LENGTHS, st.integers(1, 90))
def test_micro_batches_hold_every_completion_once_within_the_budget(lengths, budget):
    groups = [  # token ids encode their group and completion
        PackedGroup([index] * prompt, [[place] * n for place, n in enumerate(completions)])
        for index, (prompt, completions) in enumerate(lengths)
    ]
    batches = micro_batches(groups, budget)
    parts = [part for batch in batches for part in batch]
    held = [(part.prompt, ids) for part in parts for ids in part.completions]
    assert held == [(group.prompt, ids) for group in groups for ids in group.completions]
    for batch in batches:
        alone = len(batch) == 1 and len(batch[0].completions) == 1
        assert sum(part.n_tokens for part in batch) <= budget or alone
    for index, group in enumerate(groups):
        cuts = [part for part in parts if part.prompt[0] == index]
        assert len(cuts) == 1 or group.n_tokens > budget
        for run, after in zip(cuts, cuts[1:], strict=False):  # a part ends where one more completion would not fit
            assert PackedGroup(group.prompt, [*run.completions, after.completions[0]]).n_tokens > budget
