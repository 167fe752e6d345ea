"""Packing with shared prompts is exact: it equals running every completion on its own."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.models import ARCHITECTURES, VOCAB, small_model
from toolx_kernels.ops.hf_attention import head_of, toolx_attention
from toolx_kernels.ops.linear_grpo import linear_grpo_loss
from toolx_kernels.ops.linear_logprob import linear_logprob
from toolx_kernels.ops.losses import GRPOLossConfig
from toolx_kernels.train.batch import PackedGroup, micro_batches, pack


def make_groups(seed=0):
    g = torch.Generator().manual_seed(seed)

    def tokens(n):
        return torch.randint(3, VOCAB, (n,), generator=g).tolist()

    return [
        PackedGroup(tokens(20), [tokens(7), tokens(1), tokens(13)]),
        PackedGroup(tokens(1), [tokens(4)]),
        PackedGroup(tokens(31), [tokens(2), tokens(2)]),
    ]


def test_the_docstring_example():
    batch = pack([PackedGroup([1, 7], [[5, 2]]), PackedGroup([3], [[4, 6, 2], [8]])])
    assert batch.input_ids.tolist() == [1, 7, 5, 3, 4, 6]
    assert batch.position_ids.tolist() == [0, 1, 2, 0, 1, 2]
    assert batch.source.tolist() == [1, 2, 3, 4, 5, 3]
    assert batch.targets.tolist() == [5, 2, 4, 6, 2, 8]
    assert batch.cu_seqlens.tolist() == [0, 2, 5, 6]
    assert batch.mask is None
    masked = pack([PackedGroup([1, 7], [[5, 2]]), PackedGroup([3], [[4, 6, 2], [8]], [[True, False, True], None])])
    assert masked.mask.tolist() == [True, True, True, False, True, True]
    assert masked.input_ids.equal(batch.input_ids) and masked.targets.equal(batch.targets)
    assert pack([PackedGroup([3], [[4, 6]], [[True, True]])]).mask is None


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_logprobs_and_gradients_equal_those_of_single_rows(architecture):
    model, groups = small_model(architecture).double(), make_groups()
    batch = pack(groups)
    upstream = torch.linspace(-1, 2, len(batch.targets), dtype=torch.float64)
    with toolx_attention(model):
        packed = linear_logprob(batch.hidden(model), targets=batch.targets, **head_of(model)).logprobs
        (packed * upstream).sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    single, start = [], 0
    for group in groups:
        for completion in group.completions:
            logits = model(torch.tensor([[*group.prompt, *completion]])).logits[0, len(group.prompt) - 1 : -1]
            logprobs = logits.double().log_softmax(-1).gather(1, torch.tensor(completion)[:, None]).squeeze(1)
            (logprobs * upstream[start : start + len(completion)]).sum().backward()
            start += len(completion)
            single.append(logprobs.detach())
    # fp32 rotary tables and norms inside transformers set the limit, not packing
    torch.testing.assert_close(packed.detach(), torch.cat(single), rtol=1e-5, atol=1e-5)
    for name, parameter in model.named_parameters():
        error = (gradients[name] - parameter.grad).norm() / parameter.grad.norm().clamp(min=1e-9)
        assert error < 1e-5, name


@pytest.mark.parametrize("loss_type", ["grpo", "bnpo"])
def test_masked_tokens_are_context_and_have_no_gradient_of_their_own(loss_type):
    """A group of several turns through the fused loss, against each completion alone in plain torch."""
    model, groups = small_model("llama").double(), make_groups()
    turns = [[True] * 3 + [False] * 2 + [True] * 2, None, [True] * 4 + [False] * 5 + [True] * 2 + [False] * 2]
    groups = [PackedGroup(groups[0].prompt, groups[0].completions, turns), *groups[1:]]
    advantages = torch.tensor([1.5, -0.5, 0.7, -2.0, 0.3, -0.9], dtype=torch.float64)
    batch = pack(groups)
    with toolx_attention(model):
        output = linear_grpo_loss(
            batch.hidden(model), targets=batch.targets, cu_seqlens=batch.cu_seqlens, advantages=advantages,
            mask=batch.mask, config=GRPOLossConfig(loss_type=loss_type), **head_of(model),
        )  # fmt: skip
        output.loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    completions = [
        (group.prompt, ids, torch.tensor(mask or [True] * len(ids)))
        for group in groups
        for ids, mask in zip(group.completions, group.masks or [None] * len(group.completions), strict=True)
    ]
    live = sum(int(mask.sum()) for *_, mask in completions)
    total = 0.0
    for (prompt, ids, mask), advantage in zip(completions, advantages, strict=True):
        logits = model(torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 : -1]
        logprobs = logits.log_softmax(-1).gather(1, torch.tensor(ids)[:, None]).squeeze(1)[mask]
        losses = -advantage * (logprobs - logprobs.detach()).exp()
        loss = losses.mean() / len(completions) if loss_type == "grpo" else losses.sum() / live
        loss.backward()
        total += float(loss.detach())
    assert float(output.loss.detach()) == pytest.approx(total, rel=1e-6)
    assert output.logprobs.isnan().equal(~batch.mask)
    for name, parameter in model.named_parameters():
        error = (gradients[name] - parameter.grad).norm() / parameter.grad.norm().clamp(min=1e-9)
        assert error < 1e-5, name


def test_with_activation_checkpointing():
    model, groups = small_model("llama"), make_groups()
    gradients = []
    for checkpointed in (False, True):
        if checkpointed:
            model.gradient_checkpointing_enable()
            model.train()
        batch = pack(groups)
        with toolx_attention(model):
            linear_logprob(batch.hidden(model), targets=batch.targets, **head_of(model)).logprobs.sum().backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
        model.zero_grad()
    torch.testing.assert_close(*gradients)


@given(st.lists(st.integers(1, 50), min_size=1, max_size=20), st.integers(1, 80))
def test_micro_batches_cover_all_groups_in_order_within_the_budget(sizes, budget):
    groups = [PackedGroup([1] * size, [[2]]) for size in sizes]
    batches = list(micro_batches(groups, budget))
    assert [i for batch in batches for i in batch] == list(range(len(groups)))
    for batch, following in zip(batches, [*batches[1:], None], strict=True):
        tokens = sum(sizes[i] for i in batch)
        assert tokens <= budget or len(batch) == 1
        if following:
            assert tokens + sizes[following[0]] > budget
