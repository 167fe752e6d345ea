"""Types of the engine: sampling parameters, completions and groups."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, field

from toolx_kernels.errors import InputError


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
        for name in ("max_new_tokens", "top_k"):
            if type(getattr(self, name)) is not int:
                raise InputError(f"{name}={getattr(self, name)!r} must be a whole number.")
        stops: tuple = (None,)
        with suppress(TypeError):
            stops = tuple(self.stop_token_ids)
        if not all(type(token) is int for token in stops):
            raise InputError(f"stop_token_ids={self.stop_token_ids!r} must be token ids, such as (2,).")
        object.__setattr__(self, "stop_token_ids", stops)
        if self.max_new_tokens < 1:
            raise InputError(f"max_new_tokens={self.max_new_tokens} must be at least 1.")
        if not (self.temperature == 0 or 1e-30 < self.temperature < float("inf")):  # 1 / T must be finite in fp32
            raise InputError(f"temperature={self.temperature} must be 0 (greedy), or positive, finite and over 1e-30.")
        if self.top_k < 0 or not 0 < self.top_p <= 1 or not 0 <= self.min_p <= 1:
            raise InputError(
                f"top_k={self.top_k}, top_p={self.top_p}, min_p={self.min_p}: top_k must be 0 or more, "
                "top_p in (0, 1] and min_p in [0, 1]."
            )


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
