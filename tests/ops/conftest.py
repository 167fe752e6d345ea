"""Fixtures for the tests of ops."""

import pytest
import torch

from toolx_kernels.ops.lm_head import linear_grpo, linear_logprob


@pytest.fixture
def taken(monkeypatch) -> list[str]:
    """The paths that the loss takes: "single", "recompute", "forward" (no gradients yet), "deferred" (in backward)."""
    seen = []

    def spy(module, name, label):
        original = getattr(module, name)

        def wrapped(*arguments, **named):
            result = original(*arguments, **named)
            if (said := label(result, arguments)) is not None:
                seen.append(said)
            return result

        monkeypatch.setattr(module, name, wrapped)

    spy(linear_grpo, "single_sweep", lambda result, _: None if result is None else "single")
    spy(linear_grpo, "two_sweeps", lambda _, arguments: "recompute" if any(arguments[0].needs) else "forward")
    spy(linear_logprob, "recompute_gradients", lambda *_: "deferred")
    return seen


@pytest.fixture
def poisoned():
    """Fills uninitialized memory with NaN."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(3).isnan().all() and torch.zeros(2).new_empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(before[0])
    torch.utils.deterministic.fill_uninitialized_memory = before[1]
