"""Types of the engine: sampling parameters, completions and groups."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, field

from toolx_kernels.errors import InputError, short
from toolx_kernels.settings import SHARE, TEMPERATURE, TOP_K, TOP_P, between, check_number, plain_number

SAMPLING = {
    "max_new_tokens": between(1, 1 << 20),
    "temperature": TEMPERATURE,
    "top_k": TOP_K,
    "top_p": TOP_P,
    "min_p": SHARE,
}


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """Sampling parameters; ``temperature=0`` is greedy, 0 / 1.0 / 0.0 switch off top-k / top-p / min-p.

    ``SamplingParams(max_new_tokens=64, stop_token_ids=(2,))`` samples from the model's own distribution up to and
    including token 2, at most 64 tokens.

    Raises:
        InputError: a value of the wrong type or out of range.
    """

    max_new_tokens: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    stop_token_ids: tuple[int, ...] = ()

    def __post_init__(self):
        for name, bounds in SAMPLING.items():
            whole = name in ("max_new_tokens", "top_k")
            object.__setattr__(self, name, check_number(name, getattr(self, name), bounds, whole=whole))
        stops: tuple = (None,)
        if not isinstance(self.stop_token_ids, str | bytes):
            with suppress(TypeError):
                stops = tuple(map(plain_number, self.stop_token_ids))
        if not all(type(token) is int for token in stops):
            raise InputError(f"stop_token_ids={short(self.stop_token_ids)} must be token ids, such as (2,).")
        object.__setattr__(self, "stop_token_ids", stops)


@dataclass(slots=True)
class Completion:
    """One sampled answer, e.g. ``Completion(ids=[5, 9, 2], logprobs=[-0.1, -1.3, 0.0], ..., "stop")``.

    Each token has statistics of its distribution: log-prob, log-sum-exp and entropy (nats) at the sampling temperature
    before top-k, top-p and min-p, and the probability mass that these kept. ``finish_reason`` is "stop" (the last of
    ``ids`` is a stop token), "length", or "cancelled" (by the caller; there may be no tokens).
    """

    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    lse: list[float] = field(default_factory=list)
    entropies: list[float] = field(default_factory=list)
    kept_mass: list[float] = field(default_factory=list)
    finish_reason: str = ""


@dataclass(slots=True)
class Group:
    """A prompt and its n completions, which share the prompt's pages while they are sampled."""

    prompt_ids: list[int]
    completions: list[Completion]
