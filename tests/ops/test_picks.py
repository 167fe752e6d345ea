"""``picks`` (rows gathered more than once) and the embedding whose gradient bypasses autograd."""

import pytest
import torch
from torch import nn

from tests.ops.cases import DEVICE
from tests.small_models import VOCAB, small_model
from toolx_kernels.models.embedding import embed
from toolx_kernels.ops.picks import Picks, sum_rows, take_rows

IDS = torch.tensor([[5, 0, 7, 5, 5, 130, 0, 7, 64]], device=DEVICE)  # 0 is the small models' padding token


def upstream_of(out):
    return torch.randn(out.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(out)


def test_rows_are_added_in_the_order_of_their_picks():
    rows = torch.tensor([1e8, 1.0, -1e8, 3.0], device=DEVICE)[:, None]
    picks = Picks(torch.tensor([1, 1, 1, 0], device=DEVICE))
    for _ in range(2):
        # 1e8 + 1 is 1e8 in fp32; in another order the sum would be 1
        assert sum_rows(rows, picks, 3).tolist() == [[3.0], [0.0], [0.0]]


def test_sums_are_those_of_one_pick_after_the_other():
    """Bit-identical, at a size where torch uses all its threads; rows without a pick are 0."""
    generator = torch.Generator().manual_seed(0)
    index = torch.randint(0, 500, (4000,), generator=generator)
    index[index == 7] = 8
    rows = torch.randn(4000, 3, 16, generator=generator)
    expected = torch.zeros(500, 3, 16)
    for place, row in zip(index.tolist(), rows, strict=True):
        expected[place] += row
    assert torch.equal(sum_rows(rows.to(DEVICE), Picks(index.to(DEVICE)), 500).cpu(), expected)


def test_take_rows_is_index_select_with_its_gradient():
    source = torch.randn(6, 2, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    index = torch.tensor([4, 4, 0, 5, 4, 0], device=DEVICE)
    results = []
    for pick in (lambda rows, index: take_rows(rows, Picks(index)), lambda rows, index: rows.index_select(0, index)):
        leaf = source.to(DEVICE).requires_grad_()
        out = pick(leaf, index)
        results.append([out.detach(), *torch.autograd.grad(out, leaf, upstream_of(out))])
    torch.testing.assert_close(*results, rtol=0, atol=1e-12)


def test_take_rows_sums_bf16_gradients_in_fp32():
    leaf = torch.zeros(1, 1, dtype=torch.bfloat16, device=DEVICE, requires_grad=True)
    index = torch.zeros(300, dtype=torch.int64, device=DEVICE)
    take_rows(leaf, Picks(index)).sum().backward()
    assert leaf.grad.item() == 300  # ones added in bf16 stay at 256


def gradient_of(model, lookup, repeats=2):
    """The output of ``lookup`` and the gradient of the embedding, accumulated over ``repeats`` backward passes."""
    embedding = model.get_input_embeddings()
    for _ in range(repeats):
        out = lookup(embedding, IDS)
        (out * upstream_of(out)).sum().backward()
    gradient = embedding.weight.grad.clone()
    model.zero_grad()
    return out.detach(), gradient


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_the_gradient_is_that_of_autograd(architecture):
    """Gemma's embedding scales its output; the padding token has no gradient."""
    model = small_model(architecture).double().to(DEVICE)
    ours, theirs = gradient_of(model, embed), gradient_of(model, lambda embedding, ids: embedding(ids))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    rows = theirs[1].abs().sum(1).nonzero().flatten().tolist()
    assert rows == [5, 7, 64, 130]
    before = model.get_input_embeddings().weight.grad
    assert before is None
    model.get_input_embeddings().padding_idx = None
    padded, alike = gradient_of(model, embed), gradient_of(model, lambda embedding, ids: embedding(ids))
    torch.testing.assert_close(padded, alike, rtol=0, atol=1e-12)
    assert padded[1][0].abs().sum() > 0


def test_in_bf16_it_errs_less_than_autograd():
    model = small_model("llama").to(DEVICE)
    truth = gradient_of(model.double(), embed, 1)[1]
    model = model.to(torch.bfloat16)
    ours, theirs = (gradient_of(model, lookup, 1)[1] for lookup in (embed, lambda module, ids: module(ids)))
    assert ours.dtype == torch.bfloat16
    assert (ours - truth).norm() <= (theirs - truth).norm() and (ours - truth).norm() < 4e-3 * truth.norm()


def test_a_token_seen_often_is_summed_in_fp32():
    embedding = nn.Embedding(VOCAB, 4, device=DEVICE, dtype=torch.bfloat16)
    embed(embedding, torch.full((300,), 7, device=DEVICE)).sum().backward()
    assert embedding.weight.grad[7].tolist() == [300.0] * 4  # ones added in bf16 stay at 256


def test_a_graph_knows_nothing_of_the_weight():
    weight = (embedding := nn.Embedding(VOCAB, 4, device=DEVICE)).weight
    out = embed(embedding, IDS)
    assert torch.autograd.grad(out.sum(), weight, allow_unused=True, retain_graph=True) == (None,)
    out.sum().backward()
    assert weight.grad.sum() == IDS.numel() * 4
    with torch.no_grad():
        assert not embed(embedding, IDS).requires_grad


class Around(nn.Module):
    def __init__(self, embedding):
        super().__init__()
        self.inner = embedding

    def forward(self, ids):
        return 2 * self.inner(ids)


def hooked(embedding):
    embedding.weight.register_hook(lambda gradient: gradient * 3)


def observed(embedding):
    def triple(weight):
        weight.grad *= 3

    embedding.weight.register_post_accumulate_grad_hook(triple)


@pytest.mark.parametrize("change, factor", [(hooked, 3), (observed, 3), (None, 2)])
def test_where_others_stand_in_between_autograd_keeps_the_gradient(change, factor):
    embedding = nn.Embedding(VOCAB, 4, device=DEVICE)
    if change:
        change(embedding)
    embed(embedding if change else Around(embedding), IDS).sum().backward()
    assert embedding.weight.grad[5].tolist() == [3.0 * factor] * 4


def test_hooks_of_the_module_and_options_of_the_lookup_are_kept():
    embedding = nn.Embedding(VOCAB, 4, device=DEVICE)
    embedding.register_forward_hook(lambda module, args, out: out * 5)
    embed(embedding, IDS).sum().backward()
    assert embedding.weight.grad[5].tolist() == [15.0] * 4
    frozen = nn.Embedding(VOCAB, 4, device=DEVICE).requires_grad_(False)
    assert not embed(frozen, IDS).requires_grad
    for options in ({"scale_grad_by_freq": True}, {"max_norm": 1.0}, {"sparse": True}):
        plain = nn.Embedding(VOCAB, 4, device=DEVICE, **options)
        out = embed(plain, IDS)
        (gradient,) = torch.autograd.grad(out.sum(), plain.weight)
        assert gradient is not None and plain.weight.grad is None
