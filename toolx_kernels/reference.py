"""READ FIRST: every op of the package in plain torch, naive and obviously right.

This file is the truth that the tests compare with, at any dtype up to float64, and the fallback where no faster
kernel exists. Nothing here is fast; whole ``[N, V]`` logits are materialised on purpose.

Dimensions, here and everywhere: N packed completion tokens, D hidden, V vocab, B completions, G group size,
P prompt tokens, T positions, R rows of a decoding batch, H / Hkv heads, Dh head dim.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from toolx_kernels.errors import InputError


class TokenStats(NamedTuple):
    """What one pass over the vocabulary knows of each token; fp32 (float64 for float64 inputs)."""

    logprobs: Tensor  # (N) log-probability of the target
    lse: Tensor  # (N) log-sum-exp of the scaled logits
    entropy: Tensor | None  # (N) in nats, or None when it was not asked for


LOG_RATIO_BOUND = 60.0  # exp() of more overflows fp32, and 0 * inf in its gradient is NaN
LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo")


@dataclass(frozen=True, slots=True)
class GRPOLossConfig:
    """The clipped policy-gradient objective, in TRL's names.

    loss_type: how token losses become one number. ``grpo``: mean over completions of the mean over their tokens
        (arXiv 2402.03300, eq. 3); ``bnpo``: mean over the tokens of this call; ``dr_grpo``: sum divided by
        ``B * max_completion_length`` (arXiv 2503.20783); ``dapo``: sum divided by the tokens of the whole
        accumulated batch, which the caller passes as ``denominator`` (arXiv 2503.14476).
    epsilon, epsilon_high: the ratio is clipped to ``[1 - epsilon, 1 + epsilon_high]``; None means ``epsilon``.
    delta: upper bound of the ratio in the unclipped branch too (two-sided clipping); None for none.
    beta: weight of the k3 estimate of KL(policy || reference); needs ``ref_logprobs``.
    temperature: logits are divided by it, as they were when the tokens were sampled.
    importance_sampling_level: ``sequence`` uses one ratio per completion, exp(mean of the log-ratios) (GSPO,
        arXiv 2507.18071).
    importance_sampling_cap: where ``sampler_logprobs`` are given, tokens are weighted by
        ``min(exp(old - sampler), cap)`` (truncated importance sampling).
    scale_rewards: the denominator of the advantages, see :func:`group_advantages`.
    max_completion_length: only ``dr_grpo`` uses it.
    compute_all_logprobs: also compute rows whose gradient is known to be zero (equal-reward groups), so that
        ``.logprobs`` and ``.entropy`` hold no NaN on unmasked rows.
    """

    loss_type: str = "grpo"
    epsilon: float = 0.2
    epsilon_high: float | None = None
    delta: float | None = None
    beta: float = 0.0
    temperature: float = 1.0
    importance_sampling_level: str = "token"
    importance_sampling_cap: float = 2.0
    scale_rewards: str = "group"
    max_completion_length: int | None = None
    compute_all_logprobs: bool = False

    def __post_init__(self):
        choices = {
            "loss_type": LOSS_TYPES,
            "importance_sampling_level": ("token", "sequence"),
            "scale_rewards": ("group", "batch", "none"),
        }
        for name, allowed in choices.items():
            if (value := getattr(self, name)) not in allowed:
                raise InputError(f"{name}={value!r} is unknown: choose one of {', '.join(allowed)}.")
        for name in ("epsilon", "epsilon_high", "beta"):
            if (value := getattr(self, name)) is not None and not value >= 0:
                raise InputError(f"{name}={value} must not be negative.")
        if not self.epsilon < 1:
            raise InputError(f"epsilon={self.epsilon} must be below 1: the lower clip is 1 - epsilon.")
        for name in ("temperature", "importance_sampling_cap"):
            if not 0 < (value := getattr(self, name)) < float("inf"):
                raise InputError(f"{name}={value} must be positive and finite.")
        if self.delta is not None and not self.delta > 1 + self.clip_high:
            raise InputError(f"delta={self.delta} must exceed 1 + epsilon_high = {1 + self.clip_high}.")
        if self.loss_type == "dr_grpo" and not self.max_completion_length:
            raise InputError("loss_type='dr_grpo' divides by max_completion_length: set it.")

    @property
    def clip_high(self) -> float:
        return self.epsilon if self.epsilon_high is None else self.epsilon_high


class GRPOOutput(NamedTuple):
    """``loss`` (scalar) carries the gradient; the rest is for logging and holds none.

    logprobs, entropy: (N), NaN on rows that were not computed. stats: scalars over the live rows: ``live_tokens``,
    ``entropy``, ``ratio``, ``clip_low`` and ``clip_high`` (shares of tokens whose gradient the clip removed), and
    ``kl`` when there are reference log-probs.
    """

    loss: Tensor
    logprobs: Tensor
    entropy: Tensor
    stats: dict[str, Tensor]


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """fp32, or float64 for float64 inputs."""
    return torch.promote_types(tensor.dtype, torch.float32)


def linear_logits(hidden, weight, temperature=1.0, bias=None, softcap=None) -> Tensor:
    """``softcap * tanh((h W^T + b) / softcap) / temperature``: (N, V) in :func:`compute_dtype`."""
    dtype = compute_dtype(hidden)
    logits = hidden.to(dtype) @ weight.to(dtype).T
    if bias is not None:
        logits = logits + bias.to(dtype)
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    if isinstance(temperature, Tensor):
        temperature = temperature.to(dtype)[:, None]
    return logits / temperature


def entropy_of(logits: Tensor) -> Tensor:
    """Entropy in nats over the last dimension; a logit of -inf counts as probability zero."""
    probs = logits.softmax(-1)
    return logits.logsumexp(-1) - (probs * logits.masked_fill(probs == 0, 0)).sum(-1)


def linear_logprob(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    targets: Tensor,  # (N) int64
    *,
    temperature: float | Tensor = 1.0,  # or (N)
    bias: Tensor | None = None,  # (V)
    softcap: float | None = None,
    entropy: bool = False,
) -> TokenStats:
    """Log-probability of each target under the LM head; differentiable in hidden, weight and bias."""
    logits = linear_logits(hidden, weight, temperature, bias, softcap)
    lse = logits.logsumexp(-1)
    logprobs = logits.gather(-1, targets[:, None]).squeeze(-1) - lse
    return TokenStats(logprobs, lse, entropy_of(logits) if entropy else None)


def group_advantages(
    rewards: Tensor,  # (B)
    *,
    group_size: int | None = None,
    group_ids: Tensor | None = None,  # (B) any integers; completions with equal ids form a group
    scale: str = "group",
    eps: float = 1e-4,
) -> Tensor:
    """Group-relative advantages ``(r - mean) / (std + eps)`` with the unbiased std, (B) (arXiv 2402.03300, 4.1.2).

    ``scale`` says whose std: the ``group``'s, the whole ``batch``'s, or ``none``. A group of exactly equal
    rewards, and so a group of one, gets exact zeros.
    """
    rewards = rewards.to(compute_dtype(rewards) if rewards.is_floating_point() else torch.float32)
    if group_ids is None:
        group_ids = torch.arange(len(rewards), device=rewards.device) // group_size
    advantages = torch.zeros_like(rewards)
    for group in group_ids.unique():
        member = group_ids == group
        r = rewards[member]
        if (r == r[0]).all():
            continue
        std = {"group": r, "batch": rewards}[scale].std() if scale != "none" else None
        centred = r - r.mean()
        advantages[member] = centred if std is None else centred / (std + eps)
    return advantages


def linear_grpo_loss(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    targets: Tensor,  # (N) int64
    *,
    cu_seqlens: Tensor,  # (B + 1) int32
    rewards: Tensor | None = None,  # (B)
    advantages: Tensor | None = None,  # (B)
    group_size: int | None = None,
    group_ids: Tensor | None = None,  # (B)
    old_logprobs: Tensor | None = None,  # (N)
    ref_logprobs: Tensor | None = None,  # (N)
    sampler_logprobs: Tensor | None = None,  # (N)
    mask: Tensor | None = None,  # (N) bool
    denominator: float | Tensor | None = None,
    bias: Tensor | None = None,  # (V)
    softcap: float | None = None,
    temperature: Tensor | None = None,  # (N)
    config: GRPOLossConfig = GRPOLossConfig(),  # noqa: B008 (frozen)
) -> GRPOOutput:
    """The clipped GRPO loss over packed completions, one completion after the other. See ``ops/linear_grpo.py``."""
    if advantages is None:
        advantages = group_advantages(rewards, group_size=group_size, group_ids=group_ids, scale=config.scale_rewards)
    all_stats = linear_logprob(
        hidden, weight, targets, bias=bias, softcap=softcap, entropy=True,
        temperature=config.temperature if temperature is None else temperature,
    )  # fmt: skip
    mask = torch.ones_like(targets, dtype=torch.bool) if mask is None else mask
    bounds = cu_seqlens.tolist()
    n_completions = len(bounds) - 1
    total = all_stats.logprobs[:0].sum()  # a zero that backward accepts, should no row be live
    live = torch.zeros_like(mask)
    logged = {name: [] for name in ("ratio", "clip_low", "clip_high", "kl")}
    for b, (start, end) in enumerate(zip(bounds, bounds[1:], strict=False)):
        rows = torch.arange(start, end, device=hidden.device)[mask[start:end]]
        needed = advantages[b] != 0 or config.beta != 0
        if len(rows) == 0 or not (needed or config.compute_all_logprobs):
            continue
        live[rows] = True
        logprobs = all_stats.logprobs[rows]
        old = logprobs.detach() if old_logprobs is None else old_logprobs[rows]
        if advantages[b] == 0:
            old = logprobs.detach()  # only the KL term is left, whatever the old log-probs hold
        log_ratio = logprobs - old
        if config.importance_sampling_level == "sequence":
            log_ratio = log_ratio.mean().expand_as(log_ratio)
        ratio = log_ratio.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND).exp()
        unclipped = ratio if config.delta is None else ratio.clamp(max=config.delta)
        clipped = ratio.clamp(1 - config.epsilon, 1 + config.clip_high)
        losses = -torch.minimum(unclipped * advantages[b], clipped * advantages[b])
        if sampler_logprobs is not None and advantages[b] != 0:
            losses = losses * (old - sampler_logprobs[rows]).exp().clamp(max=config.importance_sampling_cap)
        if config.beta:
            gap = ref_logprobs[rows] - logprobs
            losses = losses + config.beta * (gap.exp() - gap - 1)
        if ref_logprobs is not None:
            gap = ref_logprobs[rows] - logprobs.detach()
            logged["kl"].append(gap.exp() - gap - 1)
        logged["ratio"].append(ratio.detach())
        logged["clip_low"].append(((ratio < 1 - config.epsilon) & (advantages[b] < 0)).to(ratio.dtype))
        logged["clip_high"].append(((ratio > 1 + config.clip_high) & (advantages[b] > 0)).to(ratio.dtype))
        total = total + (losses.mean() if config.loss_type == "grpo" else losses.sum())
    if denominator is None:
        denominator = {
            "grpo": n_completions,
            "bnpo": mask.sum().clamp(min=1),
            "dapo": mask.sum().clamp(min=1),
            "dr_grpo": n_completions * (config.max_completion_length or 1),
        }[config.loss_type]
    dead = torch.full_like(all_stats.logprobs, torch.nan)
    stats = {name: torch.cat(values).mean() for name, values in logged.items() if values}
    return GRPOOutput(
        loss=total / denominator,
        logprobs=torch.where(live, all_stats.logprobs, dead).detach(),
        entropy=torch.where(live, all_stats.entropy, dead).detach(),
        stats={"live_tokens": live.sum(), "entropy": all_stats.entropy[live].mean().detach(), **stats},
    )


def kv_write(
    key: Tensor,  # (T, Hkv, Dh)
    value: Tensor,  # (T, Hkv, Dh)
    key_cache: Tensor,  # (pages, page_size, Hkv, Dh), written in place
    value_cache: Tensor,  # (pages, page_size, Hkv, Dh), written in place
    slots: Tensor,  # (T) int64: page * page_size + offset, -1 to skip the token
) -> None:
    """Puts each token's key and value into its slot of the paged cache; no slot but -1 may occur twice."""
    n_slots = key_cache.shape[0] * key_cache.shape[1]
    outside = (slots < -1) | (slots >= n_slots)
    if outside.any():
        at = int(outside.nonzero()[0])
        raise ValueError(f"slots[{at}] = {int(slots[at])} is outside [-1, {n_slots}): the cache has {n_slots} slots.")
    kept = slots >= 0
    page, offset = slots[kept] // key_cache.shape[1], slots[kept] % key_cache.shape[1]
    key_cache[page, offset] = key[kept]
    value_cache[page, offset] = value[kept]


def paged_attention(
    query: Tensor,  # (T, H, Dh) packed: the last query_lens[r] tokens of row r
    key_cache: Tensor,  # (pages, page_size, Hkv, Dh)
    value_cache: Tensor,  # (pages, page_size, Hkv, Dh)
    block_table: Tensor,  # (R, pages per row) int32: the pages of each row in order
    seq_lens: Tensor,  # (R) int32: tokens of each row in the cache, its queries included
    cu_seqlens_q: Tensor,  # (R + 1) int32: bounds of each row's queries
    scale: float,
    softcap: float = 0.0,
    window: int = 0,
) -> Tensor:
    """Causal attention of each row's newest tokens over its pages, (T, H, Dh).

    Token i of a row sees tokens j <= i, and with ``window`` > 0 only j > i - window. Scores are
    ``softcap * tanh(scale * q k / softcap)`` when ``softcap`` > 0. H must be a multiple of Hkv.
    """
    dtype = compute_dtype(query)
    out = torch.empty_like(query)
    group = query.shape[1] // key_cache.shape[2]
    bounds = cu_seqlens_q.tolist()
    for row, seq_len in enumerate(seq_lens.tolist()):
        q = query[bounds[row] : bounds[row + 1]].to(dtype)
        pages = block_table[row].long()
        k = key_cache[pages].flatten(0, 1)[:seq_len].to(dtype).repeat_interleave(group, dim=1)
        v = value_cache[pages].flatten(0, 1)[:seq_len].to(dtype).repeat_interleave(group, dim=1)
        scores = torch.einsum("qhd,khd->hqk", q, k) * scale
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        i = torch.arange(seq_len - len(q), seq_len, device=q.device)[:, None]
        j = torch.arange(seq_len, device=q.device)[None, :]
        hidden = (j > i) | (j <= i - window) if window else j > i
        probs = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        out[bounds[row] : bounds[row + 1]] = torch.einsum("hqk,khd->qhd", probs, v).to(out.dtype)
    return out


class Sample(NamedTuple):
    """Per row: the token and what the sampler knew of it; fp32 (float64 for float64 inputs)."""

    tokens: Tensor  # (R) int64
    logprobs: Tensor  # (R) of the token, before any filter, at the sampling temperature (1 for greedy)
    lse: Tensor  # (R)
    entropy: Tensor  # (R) before any filter
    kept_mass: Tensor  # (R) probability of the tokens that the filters kept; 1 without filters


def sample(
    hidden: Tensor,  # (R, D)
    weight: Tensor,  # (V, D)
    streams: Tensor,  # (R, 5) int64: seed, step, row id, rollout index, position, each taken modulo 2**32
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    bias: Tensor | None = None,  # (V)
    softcap: float | None = None,
) -> Sample:
    """Draws one token per row by the Gumbel-max trick; temperature 0 takes the most likely token.

    The noise of token v is a function of (stream, v) alone, so a sample does not depend on what else is in the
    batch. Filters apply in the order top-k, top-p, min-p, each on what the former left, renormalised.
    """
    logits = linear_logits(hidden, weight, temperature or 1.0, bias, softcap)
    lse = logits.logsumexp(-1)
    kept = filter_logits(logits, top_k, top_p, min_p)
    noise = gumbel_noise(streams, logits.shape[-1]).to(logits.dtype) if temperature else 0.0
    tokens = (kept + noise).argmax(-1)
    logprobs = logits.gather(-1, tokens[:, None]).squeeze(-1) - lse
    return Sample(tokens, logprobs, lse, entropy_of(logits), (kept.logsumexp(-1) - lse).exp())


def filter_logits(logits: Tensor, top_k: int, top_p: float, min_p: float) -> Tensor:
    """``logits`` (R, V) with -inf on every token that top-k, top-p or min-p excludes; ties at a bound stay."""
    if 0 < top_k < logits.shape[-1]:
        bound = logits.topk(top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < bound, -torch.inf)
    if top_p < 1:
        ordered, _ = logits.sort(dim=-1, descending=True)
        probs = ordered.softmax(-1)
        inside = (probs.cumsum(-1) - probs) < top_p  # the token that crosses the bound is kept
        inside[:, 0] = True
        bound = ordered.masked_fill(~inside, torch.inf).amin(-1, keepdim=True)
        logits = logits.masked_fill(logits < bound, -torch.inf)
    if min_p > 0:
        probs = logits.softmax(-1)
        logits = logits.masked_fill(probs < min_p * probs.amax(-1, keepdim=True), -torch.inf)
    return logits


def gumbel_noise(streams: Tensor, vocab_size: int) -> Tensor:
    """Standard Gumbel noise (R, V) in fp32 from Philox4x32-10, counter-based.

    Key (seed, step), counter (v // 4, position, row id, rollout index), word v % 4. A word x gives
    ``u = (x + 1/2) / 2**32`` and ``-log(-log(1 - u))``: written with 1 - u, the upper tail, which decides who
    wins, keeps all 32 bits.
    """
    seed, step, row, rollout, position = (streams[:, i, None] & 0xFFFFFFFF for i in range(5))
    block = torch.arange((vocab_size + 3) // 4, device=streams.device)[None, :]
    words = torch.stack(philox(block, position, row, rollout, seed, step), dim=-1).flatten(1)[:, :vocab_size]
    uniform = ((words.to(torch.float64) + 0.5) * 2.0**-32).to(torch.float32).clamp(max=1 - 2.0**-24)
    return -torch.log(-torch.log1p(-uniform))


def philox(c0, c1, c2, c3, k0, k1) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10 (Salmon et al., SC 2011) on int64 tensors that hold 32-bit words; arguments broadcast."""
    for _ in range(10):
        high0, low0 = _multiply_32(c0, 0xD2511F53)
        high1, low1 = _multiply_32(c2, 0xCD9E8D57)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return c0, c1, c2, c3


def _multiply_32(word: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of the product of two 32-bit words, without leaving int64's positive range."""
    low_half = (word & 0xFFFF) * factor
    high_half = (word >> 16) * factor + (low_half >> 16)
    return high_half >> 16, ((high_half & 0xFFFF) << 16) | (low_half & 0xFFFF)
