"""Benchmark of sampling the next token of R rows: ours and plain torch with materialized logits, as in SmolLM2-135M.

``generate`` does the same as transformers' own loop: logits in the weights' dtype, fp32 softmax, ``torch.multinomial``;
plus the log-prob of the drawn token, which a trainer needs. ``reference`` is the definition, with noise in int64 torch.
"""

import pytest
import torch

from toolx_kernels import reference
from toolx_kernels.ops.lm_head.sampling import sample

DIM, VOCAB = 576, 49_152
FILTERS = {"top_k": 50, "top_p": 0.95}


def generate(hidden, weight, streams, top_k=0, top_p=1.0):
    logits = torch.nn.functional.linear(hidden, weight).float()
    kept = logits
    if top_k:
        kept = kept.masked_fill(kept < kept.topk(top_k).values[:, -1:], -torch.inf)
    if top_p < 1:
        ordered, index = kept.sort(descending=False)
        remove = ordered.softmax(-1).cumsum(-1) <= 1 - top_p
        kept = kept.masked_fill(remove.scatter(1, index, remove), -torch.inf)
    tokens = kept.softmax(-1).multinomial(1)
    return tokens, logits.log_softmax(-1).gather(1, tokens)


@pytest.mark.parametrize("filters", [{}, FILTERS], ids=["plain", "top-k and top-p"])
@pytest.mark.parametrize("rows", [1, 10, 40], ids=lambda n: f"R{n}")
@pytest.mark.parametrize("provider", [sample, generate, reference.sample], ids=["toolx", "generate", "reference"])
def test_sampling(benchmark, provider, rows, filters):
    weight = (torch.randn(VOCAB, DIM) / DIM**0.5).bfloat16()
    hidden = 2 * torch.randn(rows, DIM).bfloat16()
    streams = torch.arange(5 * rows).view(rows, 5)
    benchmark(provider, hidden, weight, streams, **filters)
