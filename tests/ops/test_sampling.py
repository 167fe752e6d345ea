"""Sampling: the distribution, the filters, and the counter-based noise."""

import pytest
import torch
from scipy import stats

from toolx_kernels import reference
from toolx_kernels.ops.sampling import sample


def streams(rows, *, seed=0, step=0, rollout=0, position=0, first_row=0):
    columns = [torch.full((rows,), seed), torch.full((rows,), step), torch.arange(rows) + first_row]
    return torch.stack([*columns, torch.full((rows,), rollout), torch.full((rows,), position)], dim=1)


def one_distribution(rows, vocab=37, seed=1):
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(vocab, 6, generator=g)
    return torch.randn(1, 6, generator=g).expand(rows, 6), weight


def test_philox_known_answers():
    """The published test vectors of Philox4x32-10 (Random123, kat_vectors)."""
    zeros = [torch.tensor(0)] * 6
    ones = [torch.tensor(0xFFFFFFFF)] * 6
    pi = [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344, 0xA4093822, 0x299F31D0]
    for words, expected in [
        (zeros, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        (ones, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        ([torch.tensor(w) for w in pi], [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]),
    ]:
        assert [int(word) for word in reference.philox(*words)] == expected


def test_the_noise_is_gumbel_distributed():
    noise = reference.gumbel_noise(streams(400), 250).flatten()
    assert stats.kstest(noise.double().numpy(), "gumbel_r").pvalue > 0.01
    assert noise.isfinite().all()


@pytest.mark.parametrize("field", range(5))
def test_every_word_of_the_stream_matters(field):
    base = streams(3)
    changed = base.clone()
    changed[:, field] += 1
    assert not torch.isclose(reference.gumbel_noise(base, 40), reference.gumbel_noise(changed, 40)).all(1).any()


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.6])
def test_samples_follow_the_distribution(temperature):
    rows = 20_000
    hidden, weight = one_distribution(rows)
    drawn = sample(hidden, weight, streams(rows), temperature=temperature)
    probs = (hidden[0].double() @ weight.double().T / temperature).softmax(-1)
    counts = torch.bincount(drawn.tokens, minlength=37).double()
    common = probs * rows >= 5
    observed = torch.cat([counts[common], counts[~common].sum()[None]])
    expected = torch.cat([probs[common], probs[~common].sum()[None]]) * rows
    assert (
        stats.chisquare(observed.numpy(), expected.numpy() * observed.sum().item() / expected.sum().item()).pvalue
        > 0.001
    )


def test_what_is_reported_of_a_token():
    hidden, weight = one_distribution(50)
    drawn = sample(hidden, weight, streams(50), temperature=0.7)
    expected = reference.linear_logprob(hidden, weight, drawn.tokens, temperature=0.7, entropy=True)
    torch.testing.assert_close(drawn.logprobs, expected.logprobs)
    torch.testing.assert_close(drawn.lse, expected.lse)
    torch.testing.assert_close(drawn.entropy, expected.entropy)
    torch.testing.assert_close(drawn.kept_mass, torch.ones(50))


def test_greedy_takes_the_most_likely_token():
    hidden, weight = torch.randn(20, 6), torch.randn(37, 6)
    drawn = sample(hidden, weight, streams(20), temperature=0.0)
    assert torch.equal(drawn.tokens, (hidden @ weight.T).argmax(-1))
    torch.testing.assert_close(drawn.logprobs, (hidden @ weight.T).log_softmax(-1).amax(-1))


def test_a_sample_does_not_depend_on_its_neighbours():
    hidden, weight = torch.randn(20, 6, dtype=torch.float64), torch.randn(37, 6, dtype=torch.float64)
    together = sample(hidden, weight, streams(20))
    alone = [sample(hidden[i : i + 1], weight, streams(1, first_row=i)).tokens for i in range(20)]
    assert torch.equal(together.tokens, torch.cat(alone))


@pytest.mark.parametrize(
    "filters, kept",
    [
        ({"top_k": 2}, [0, 1]),
        ({"top_p": 0.65}, [0, 1]),  # 0.4, 0.3: the token that crosses the bound stays
        ({"top_p": 0.71}, [0, 1, 2]),
        ({"min_p": 0.3}, [0, 1, 2]),  # at least 0.3 * 0.4
        ({"top_k": 3, "top_p": 0.5}, [0, 1]),  # of 0.4, 0.3, 0.2 renormalised: 0.444, 0.333
        ({"top_p": 1e-9}, [0]),
        ({"top_k": 99}, [0, 1, 2, 3]),
    ],
)
def test_filters_keep_what_they_say(filters, kept):
    probs = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
    rows = 2000
    weight = torch.eye(4, dtype=torch.float64)
    drawn = sample(probs.log().expand(rows, 4), weight, streams(rows), **filters)
    assert sorted(drawn.tokens.unique().tolist()) == kept
    torch.testing.assert_close(drawn.kept_mass, probs[kept].sum().expand(rows))
    torch.testing.assert_close(drawn.logprobs, probs.log()[drawn.tokens])  # of the unfiltered distribution
    share = torch.bincount(drawn.tokens, minlength=4)[kept].double() / rows
    torch.testing.assert_close(share, probs[kept] / probs[kept].sum(), rtol=0, atol=0.05)


def test_registered_properly():
    hidden, weight = one_distribution(5)
    arguments = (hidden.contiguous(), weight, streams(5), 0.7, 3, 0.9, 0.01, torch.zeros(37), 5.0)
    torch.library.opcheck(torch.ops.toolx.sample.default, arguments)
