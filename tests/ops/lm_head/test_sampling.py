"""Sampling: the distribution, the filters and the counter-based noise."""

import os

import pytest
import torch

from tests.ops.cases import DEVICE, TRITON_DTYPES, needs_triton
from tests.without_gpu.launches import Launches
from toolx_kernels import linear_logprob, reference
from toolx_kernels.errors import InputError
from toolx_kernels.ops import library
from toolx_kernels.ops.lm_head import sampling, sampling_torch, tiles
from toolx_kernels.ops.lm_head.sampling import sample

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TRITON = pytest.param("triton", marks=needs_triton)
BACKENDS = ["dispatched", "torch", TRITON]
CASES = [(backend, dtype) for backend in BACKENDS[:2] for dtype in DTYPES]
CASES += [pytest.param("triton", dtype, marks=needs_triton) for dtype in TRITON_DTYPES]
FILTERS = [{"top_k": 5}, {"top_p": 0.8}, {"min_p": 0.1}, {"top_k": 20, "top_p": 0.9, "min_p": 0.05}]


@pytest.fixture(params=BACKENDS)
def backend(request, monkeypatch) -> str:
    """The dispatcher's choice (compiled C++ or the GPU), plain torch, or Triton, interpreted if there is no GPU."""
    if request.param == "torch":
        monkeypatch.setattr(sampling, "kernels", lambda dtype: sampling_torch)
        monkeypatch.setattr(sampling_torch, "TORCH_COLUMNS", 256)
    if request.param == "triton":
        from toolx_kernels.ops.lm_head import sampling_triton

        monkeypatch.setattr(sampling, "kernels", lambda dtype: sampling_triton)
    return request.param


def streams(rows, *, seed=0, step=0, rollout=0, position=0, first_row=0):
    columns = [torch.full((rows,), seed), torch.full((rows,), step), torch.arange(rows) + first_row]
    return torch.stack([*columns, torch.full((rows,), rollout), torch.full((rows,), position)], dim=1).to(DEVICE)


def make(rows, dim, vocab, dtype=torch.float32, extras=False, spread=1.5):
    """hidden, weight and options (bias, softcap); logits have a standard deviation of about ``spread``."""
    g = torch.Generator().manual_seed(rows + dim + vocab)
    hidden = torch.randn(rows, dim, generator=g).to(DEVICE, dtype)
    weight = (torch.randn(vocab, dim, generator=g) * spread / dim**0.5).to(DEVICE, dtype)
    options = {"bias": torch.randn(vocab, generator=g).to(DEVICE, dtype), "softcap": 4.0} if extras else {}
    return hidden, weight, options


def truth_of(hidden, weight, drawn_from, bias=None, **options):
    bias = None if bias is None else bias.double()
    return reference.sample(hidden.double(), weight.double(), drawn_from, bias=bias, **options)


def decided(hidden, weight, drawn_from, temperature=1.0, bias=None, softcap=None, filters=(0, 1.0, 0.0), gap=1e-4):
    """Rows whose two largest perturbed logits differ by more than rounding can change."""
    bias = None if bias is None else bias.double()
    z = reference.linear_logits(hidden.double(), weight.double(), temperature or 1.0, bias, softcap)
    z = reference.filter_logits(z, *filters)
    if temperature:
        z = z + reference.gumbel_noise(drawn_from, len(weight))
    if len(weight) == 1:
        return torch.ones_like(z[:, 0], dtype=torch.bool)
    largest = z.topk(2).values
    return largest[:, 0] - largest[:, 1] > gap


def assert_near(drawn, truth, tolerance=1e-5):
    for name in ("logprobs", "lse", "entropy", "kept_mass"):
        ours, exact = getattr(drawn, name), getattr(truth, name)
        torch.testing.assert_close(
            ours.double(), exact, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


def one_distribution(rows, vocab=37, seed=1):
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(vocab, 6, generator=g)
    return torch.randn(1, 6, generator=g).expand(rows, 6).to(DEVICE), weight.to(DEVICE)


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
    from scipy.stats import kstest

    assert kstest(noise.double().cpu().numpy(), "gumbel_r").pvalue > 0.01
    assert noise.isfinite().all()


@pytest.mark.parametrize("field", range(5))
def test_every_word_of_the_stream_matters(field):
    base = streams(3)
    changed = base.clone()
    changed[:, field] += 1
    assert not torch.isclose(reference.gumbel_noise(base, 40), reference.gumbel_noise(changed, 40)).all(1).any()


def test_every_backend_has_the_same_noise(backend):
    for vocab in (1, 6, 1030):
        noise = torch.zeros(5, vocab, device=DEVICE)
        stream = torch.randint(-(2**40), 2**40, (5, 5), generator=torch.Generator().manual_seed(vocab)).to(DEVICE)
        sampling.kernels(torch.float32).add_gumbel(noise, stream)
        torch.testing.assert_close(noise, reference.gumbel_noise(stream, vocab), rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("extras", [False, True], ids=["plain", "bias-softcap"])
@pytest.mark.parametrize("backend, dtype", CASES, ids=str, indirect=["backend"])
@pytest.mark.parametrize("rows, dim, vocab", [(37, 70, 611), (1, 24, 1030), (9, 800, 65), (3, 5, 1), (0, 8, 40)])
def test_agrees_with_the_reference(rows, dim, vocab, dtype, extras, backend):
    hidden, weight, options = make(rows, dim, vocab, dtype, extras)
    for temperature in (0.7, 0.0):
        drawn = sample(hidden, weight, streams(rows), temperature=temperature, **options)
        truth = truth_of(hidden, weight, streams(rows), temperature=temperature, **options)
        clear = decided(hidden, weight, streams(rows), temperature, **options)
        assert clear.all() or clear.float().mean() > 0.9
        assert torch.equal(drawn.tokens[clear], truth.tokens[clear])
        if clear.all():
            assert_near(drawn, truth)


@pytest.mark.parametrize("filters", FILTERS, ids=str)
def test_filtered_samples_agree_with_the_reference(filters, backend, monkeypatch):
    hidden, weight, options = make(10, 70, 611, torch.float16, extras=True)
    few_rows = 4 * sampling.FILTER_BYTES * 611
    monkeypatch.setattr(tiles, "default_workspace_bytes", lambda _: few_rows)
    for temperature in (0.7, 0.0):
        drawn = sample(hidden, weight, streams(10), temperature=temperature, **filters, **options)
        truth = truth_of(hidden, weight, streams(10), temperature=temperature, **filters, **options)
        whole = {"top_k": 0, "top_p": 1.0, "min_p": 0.0} | filters
        assert decided(hidden, weight, streams(10), temperature, **options, filters=tuple(whole.values())).all()
        assert torch.equal(drawn.tokens, truth.tokens)
        assert_near(drawn, truth)


@pytest.mark.parametrize("candidates", [512, 30, 2])
@pytest.mark.parametrize("filters", FILTERS, ids=str)
def test_filters_are_those_of_the_reference(filters, candidates, monkeypatch):
    """``candidates`` suffice for top-p in all rows, in some rows, or in none."""
    monkeypatch.setattr(sampling, "TOP_P_CANDIDATES", candidates)
    hidden, weight, _ = make(20, 30, 900, torch.float64, spread=4)
    logits = (hidden @ weight.T).mul(4).round().div(4)  # with ties
    whole = {"top_k": 0, "top_p": 1.0, "min_p": 0.0} | filters
    ours, theirs = (module.filter_logits(logits, **whole) for module in (sampling, reference))
    assert torch.equal(ours, theirs)
    logits[3, 5], logits[4] = torch.nan, -torch.inf
    assert torch.equal(sampling.filter_logits(logits, **whole)[5:], theirs[5:])


def test_float64_stays_float64():
    hidden, weight, options = make(7, 70, 611, torch.float64, extras=True)
    for filters in ({}, FILTERS[-1]):
        drawn = sample(hidden, weight, streams(7), temperature=0.7, **options, **filters)
        truth = truth_of(hidden, weight, streams(7), temperature=0.7, **options, **filters)
        assert torch.equal(drawn.tokens, truth.tokens) and drawn.logprobs.dtype == torch.float64
        assert_near(drawn, truth, 1e-12)


@pytest.mark.parametrize("settings", [{"temperature": t} for t in (0.7, 1.0, 1.6)] + FILTERS, ids=str)
def test_samples_follow_the_distribution(settings):
    rows = 20_000
    hidden, weight = one_distribution(rows)
    drawn = sample(hidden, weight, streams(rows), **settings)
    whole = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0} | settings
    logits = hidden[:1].double() @ weight.double().T / whole.pop("temperature")
    probs = reference.filter_logits(logits, **whole).softmax(-1)[0].cpu()
    counts = torch.bincount(drawn.tokens.cpu(), minlength=37).double()
    assert counts[probs == 0].sum() == 0
    common = probs * rows >= 5
    observed, expected = counts[common], probs[common] * rows
    if (rest := probs[~common].sum() * rows) > 0:
        observed, expected = torch.cat([observed, counts[~common].sum()[None]]), torch.cat([expected, rest[None]])
    from scipy.stats import chisquare

    assert chisquare(observed.numpy(), expected.numpy() * rows / expected.sum().item()).pvalue > 0.001


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_log_probs_are_those_of_training(dtype):
    hidden, weight, options = make(50, 96, 900, dtype, extras=True)
    drawn = sample(hidden, weight, streams(50), temperature=0.7, **options)
    trained = linear_logprob(hidden, weight, drawn.tokens, temperature=0.7, entropy=True, **options)
    for name in ("logprobs", "lse", "entropy"):
        torch.testing.assert_close(getattr(drawn, name), getattr(trained, name), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(drawn.kept_mass, torch.ones_like(drawn.lse))


def test_of_equal_tokens_the_lowest_wins(backend):
    hidden, weight, _ = make(4, 24, 1200)
    weight[[1150, 700, 613, 97, 90]] = 3 * hidden[0]
    tokens = sample(hidden, weight, streams(4), temperature=0.0).tokens
    assert tokens[0] == 90
    assert torch.equal(tokens[1:], (hidden @ weight.T)[1:].argmax(-1))
    assert (sample(hidden, torch.zeros_like(weight), streams(4), temperature=0.0).tokens == 0).all()


@pytest.mark.parametrize("filters", [{}, FILTERS[-1]], ids=["plain", "filtered"])
def test_a_sample_does_not_depend_on_its_neighbours(filters):
    """It is bit-identical in the compiled part, which sums logits row by row."""
    dtype = torch.float64 if library.compiled_error or DEVICE.type == "cuda" else torch.bfloat16
    hidden, weight, _ = make(100, 70, 700, dtype)
    together = sample(hidden, weight, streams(100), **filters)
    for rows in (slice(0, 1), slice(1, 6), slice(6, 17), slice(17, 100)):
        alone = sample(hidden[rows], weight, streams(100)[rows], **filters)
        assert torch.equal(together.tokens[rows], alone.tokens)
        if dtype == torch.bfloat16:
            for ours, theirs in zip(alone[1:4], together[1:4], strict=True):
                assert torch.equal(ours, theirs[rows])


def test_the_number_of_threads_changes_no_bit():
    hidden, weight, _ = make(37, 70, 3000, torch.bfloat16)
    before, runs = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            runs.append(sample(hidden, weight, streams(37)))
    finally:
        torch.set_num_threads(before)
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], run, strict=True))


def test_strided_inputs():
    hidden, weight, _ = make(11, 48, 130)
    expected = sample(hidden, weight, streams(11))
    for other in (weight.T.contiguous().T, torch.cat([weight, weight], 1)[:, :48]):
        strided = torch.cat([hidden, hidden], 1)[:, :48]
        drawn = sample(strided, other, streams(22)[:11], bias=torch.zeros(260, device=DEVICE)[::2])
        assert torch.equal(drawn.tokens, expected.tokens)
        torch.testing.assert_close(drawn.logprobs, expected.logprobs)


def test_logits_that_are_no_numbers(backend):
    hidden, weight, _ = make(6, 24, 600)
    clean = sample(hidden, weight, streams(6))
    bias = torch.zeros(600, device=DEVICE)
    bias[:550] = -torch.inf
    drawn = sample(hidden, weight, streams(6), bias=bias)
    assert (drawn.tokens >= 550).all() and drawn.logprobs.isfinite().all() and drawn.entropy.isfinite().all()
    hidden[1] = torch.nan
    drawn = sample(hidden, weight, streams(6))
    weight[77] = torch.nan
    broken = sample(hidden, weight, streams(6))
    bias[:] = -torch.inf
    nothing = sample(hidden, weight, streams(6), bias=bias)
    weight[77] = 0
    bias[:] = 0
    bias[5] = torch.inf
    infinite = sample(hidden, weight, streams(6), bias=bias)
    others = torch.tensor([0, 2, 3, 4, 5], device=DEVICE)
    assert drawn.logprobs[1].isnan() and torch.equal(drawn.tokens[others], clean.tokens[others])
    for filters in ({}, *FILTERS):
        broken = sample(
            hidden, weight.index_fill(0, torch.tensor([77], device=DEVICE), torch.nan), streams(6), **filters
        )
        for run in (drawn, broken, nothing, infinite):
            assert ((run.tokens >= 0) & (run.tokens < 600)).all()
        for run in (broken, nothing, infinite):
            assert run.logprobs.isnan().all()


def test_reads_nothing_that_nobody_wrote(backend, poisoned):
    hidden, weight, options = make(19, 70, 611, torch.float16, extras=True)
    for filters in ({}, FILTERS[-1]):
        drawn = sample(hidden, weight, streams(19), **options, **filters)
        assert_near(drawn, truth_of(hidden, weight, streams(19), **options, **filters))


def peak_bytes(function) -> int:
    """Peak memory of a call, in bytes above the memory in use before it."""
    function()
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return torch.cuda.max_memory_allocated() - before

    def resident(name):
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) << 10 for line in file if line.startswith(name))

    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    before = resident("VmRSS")
    function()
    return resident("VmHWM") - before


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="no peak memory to read")
def test_memory(monkeypatch):
    rows, vocab = 200, 30_000
    hidden, weight, _ = make(rows, 8, vocab, torch.bfloat16)
    logits_bytes = rows * vocab * 4
    assert peak_bytes(lambda: sample(hidden, weight, streams(rows))) < logits_bytes / 4
    monkeypatch.setattr(tiles, "default_workspace_bytes", lambda _: 16 << 20)
    assert peak_bytes(lambda: sample(hidden, weight, streams(rows), top_k=99, top_p=0.9, min_p=0.01)) < 18 << 20


@pytest.mark.parametrize(
    "filters, kept",
    [
        ({"top_k": 2}, [0, 1]),
        ({"top_p": 0.65}, [0, 1]),  # 0.4, 0.3: the token that crosses the bound stays
        ({"top_p": 0.71}, [0, 1, 2]),
        ({"min_p": 0.3}, [0, 1, 2]),  # at least 0.3 * 0.4
        ({"top_k": 3, "top_p": 0.5}, [0, 1]),  # 0.4, 0.3, 0.2 renormalized: 0.444, 0.333, 0.222
        ({"top_p": 1e-9}, [0]),
        ({"top_k": 99}, [0, 1, 2, 3]),
    ],
)
def test_filters_keep_what_they_say(filters, kept):
    probs = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64, device=DEVICE)
    rows = 2000
    weight = torch.eye(4, dtype=torch.float64, device=DEVICE)
    drawn = sample(probs.log().expand(rows, 4), weight, streams(rows), **filters)
    assert sorted(drawn.tokens.unique().tolist()) == kept
    torch.testing.assert_close(drawn.kept_mass, probs[kept].sum().expand(rows))
    torch.testing.assert_close(drawn.logprobs, probs.log()[drawn.tokens])  # under the unfiltered distribution
    share = torch.bincount(drawn.tokens, minlength=4)[kept].double() / rows
    torch.testing.assert_close(share, probs[kept] / probs[kept].sum(), rtol=0, atol=0.05)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"temperature": -0.5}, "temperature=-0.5"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"top_k": -1}, "top_k=-1"),
        ({"top_p": 0.0}, "top_p=0.0"),
        ({"min_p": 1.5}, "min_p=1.5"),
        ({"softcap": -1.0}, "softcap=-1.0"),
        ({"bias": torch.zeros(3)}, r"bias \(3,\)"),
        ({"streams": torch.zeros(4, 5, dtype=torch.int64)}, r"streams \(4, 5\)"),
        ({"streams": torch.zeros(5, 5)}, "float32"),
        ({"weight": torch.zeros(37, 7)}, r"\(37, 7\)"),
        ({"weight": torch.zeros(0, 6)}, "no rows"),
    ],
    ids=lambda x: str(x) if isinstance(x, str) else "",
)
def test_bad_input(changes, words):
    hidden, weight = one_distribution(5)
    changes = {name: value.to(DEVICE) if torch.is_tensor(value) else value for name, value in changes.items()}
    with pytest.raises(InputError, match=words):
        sample(**({"hidden": hidden, "weight": weight, "streams": streams(5)} | changes))


def test_the_compiled_part_refuses_what_it_could_not_read():
    hidden, weight, _ = make(3, 8, 20)
    good = [hidden, weight, streams(3), 1.0, None, 0.0, streams(3)[:, 0].contiguous(), torch.zeros(3, 3), None]
    if library.compiled_error or DEVICE.type == "cuda":
        pytest.skip("nothing is compiled for this device")
    torch.ops.toolx.sample_sweep(*good)
    for at, bad in [
        (0, hidden[:2]), (1, weight.double()), (1, weight.T.contiguous().T), (2, streams(2)), (4, torch.zeros(19)),
        (6, torch.zeros(3)), (7, torch.zeros(2, 3)), (8, torch.zeros(3, 21)),
    ]:  # fmt: skip
        with pytest.raises(RuntimeError, match="sample_sweep: "):
            torch.ops.toolx.sample_sweep(*good[:at], bad, *good[at + 1 :])
    with pytest.raises(RuntimeError, match="add_gumbel: "):
        torch.ops.toolx.add_gumbel(torch.zeros(3, 8), streams(4))


def test_registered_properly():
    hidden, weight = one_distribution(5)
    for bias, filters in [(torch.zeros(37, device=DEVICE), (3, 0.9, 0.01)), (None, (0, 1.0, 0.0))]:
        arguments = (hidden.contiguous(), weight, streams(5), 0.7, *filters, bias, 5.0)
        torch.library.opcheck(torch.ops.toolx.sample.default, arguments)
    outputs = streams(5)[:, 0].contiguous(), torch.zeros(3, 5, device=DEVICE), torch.zeros(5, 37, device=DEVICE)
    arguments = (hidden.contiguous(), weight, streams(5), 0.7, None, 0.0, *outputs)
    torch.library.opcheck(torch.ops.toolx.sample_sweep.default, arguments)
    torch.library.opcheck(torch.ops.toolx.add_gumbel.default, (torch.zeros(5, 37, device=DEVICE), streams(5)))


@needs_triton
def test_rows_choose_among_three_kernels(monkeypatch):
    from toolx_kernels.ops.lm_head import sampling_triton

    kernels = {name: Launches(getattr(sampling_triton, name)) for name in ("sample_kernel", "join_samples_kernel")}
    for name, kernel in kernels.items():
        monkeypatch.setattr(sampling_triton, name, kernel)
    monkeypatch.setattr(sampling_triton, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    for rows in (512, 320, 100, 33, 32, 17, 16, 7, 2, 1):
        hidden, weight, _ = make(rows, 64, 300)
        tokens, stats = torch.empty(rows, dtype=torch.int64, device=DEVICE), torch.empty(3, rows, device=DEVICE)
        sampling_triton.sample_sweep(hidden, weight, streams(rows), 1.0, None, 0.0, tokens, stats, None)
    assert {name: len(kernel.variants) for name, kernel in kernels.items()} == {
        "sample_kernel": 3, "join_samples_kernel": 1
    }  # fmt: skip
