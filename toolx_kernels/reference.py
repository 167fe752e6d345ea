"""READ FIRST: reference definitions of the public ops, in plain torch, naive and obviously right.

The tests compare every op with this file, at any dtype up to float64. Nothing here is fast; whole ``[N, V]`` logits are
materialized on purpose.

Dimensions, here and everywhere: N packed completion tokens, D hidden, V vocab, B completions, G group size,
P prompt tokens, T positions, R rows of a decoding batch, H / Hkv heads, Dh head dim.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from toolx_kernels.loss_config import GRPOLossConfig


class TokenStats(NamedTuple):
    """Statistics of each token from one pass over the vocabulary; fp32 (float64 for float64 inputs)."""

    logprobs: Tensor  # (N) log-probability of the target
    lse: Tensor  # (N) log-sum-exp of the scaled logits
    entropy: Tensor | None  # (N) in nats, or None if not requested


LOG_RATIO_BOUND = 40.0  # log-ratios are clamped to +-40: the product of two such exponentials still fits fp32
LARGEST_LOSS = 2.0**120  # of a row, so that the sum of rows fits fp32 too
LARGEST_COEFFICIENT = 2.0**100  # so that its products with hidden states and weights, and their sums, fit fp32 too
K3_TERMS = 19  # powers of the series of exp(gap) up to |gap| = 1: the next is below 2**-61 of the first
VESPO_LOG_BOUNDS = (math.log(1e-8), 20.0)  # of a completion's log-weight; a token's log-ratio is clamped to +-20


class GRPOOutput(NamedTuple):
    """``loss`` (scalar) carries the gradient; the rest is for logging and has none.

    logprobs, entropy: (N), NaN on rows that were not computed. stats: scalars. ``live_tokens`` counts the computed
    rows and ``nonfinite`` those of them that were dropped: all zeros in loss and gradient. A row is dropped

    - if its log-prob, or its log-ratio to old, reference or sampler log-probs, is NaN or infinite;
    - if its weighted loss is beyond +-2^120 or NaN, or a derivative of the whole loss, in its log-prob or entropy, is
      beyond +-2^100 (1e30) or NaN, in every precision; at sequence level the whole completion with it.

    The other stats are means over the remaining live rows: ``entropy``, ``ratio``, ``clip_low`` and ``clip_high``
    (shares of tokens whose gradient the clip removed; for ``cispo``, high is the share that the cap cuts; none for
    ``sapo`` and ``vespo``) and, if there are reference log-probs, ``kl`` (the estimate, not multiplied by beta or a
    ratio).
    """

    loss: Tensor
    logprobs: Tensor
    entropy: Tensor
    stats: dict[str, Tensor]


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """fp32, or float64 for float64 inputs."""
    return torch.promote_types(tensor.dtype, torch.float32)


def linear_logits(hidden, weight, temperature=1.0, bias=None, softcap=None) -> Tensor:
    """``softcap * tanh(z / softcap) / temperature`` with ``z = h W^T + b``.

    hidden (N, D), weight (V, D), bias (V); returns (N, V) in ``compute_dtype``.
    """
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
    """Entropy in nats over the last dimension; a logit of -inf has probability zero."""
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
    min_std: float = 0.0,
) -> Tensor:
    """Group-relative advantages ``(r - mean) / (max(std, min_std) + eps)`` with the unbiased std, (B).

    ``scale`` selects the std: that of the ``group``, that of the whole ``batch``, or ``none`` (arXiv 2402.03300,
    4.1.2). A ``min_std`` above zero keeps much smaller differences from being scaled up to full size. A group of
    exactly equal rewards, and so a group of one, gets exact zeros.
    """
    dtype = compute_dtype(rewards) if rewards.is_floating_point() else torch.float32
    rewards = rewards.double()  # the square of a large fp32 number is not finite in fp32
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
        advantages[member] = centred if std is None else centred / (std.clamp(min=min_std) + eps)
    return advantages.to(dtype)


class CompletionLosses(NamedTuple):
    """Vectors over the T tokens of a completion, zero where ``finite`` is False."""

    losses: Tensor  # (T) differentiable in logprobs and entropy
    ratio: Tensor  # (T)
    clip_low: Tensor  # (T) bool
    clip_high: Tensor  # (T) bool
    kl: Tensor | None  # (T), None without reference log-probs
    finite: Tensor  # (T) bool


def completion_losses(
    logprobs: Tensor,  # (T)
    entropy: Tensor,  # (T)
    advantage: Tensor,  # () or (T)
    config: GRPOLossConfig,
    *,
    old: Tensor | None = None,  # (T)
    ref: Tensor | None = None,  # (T)
    sampler: Tensor | None = None,  # (T)
    kept: Tensor | bool = True,  # (T) bool: among the top entropies
    share: Tensor | float = 1.0,  # () or (T) weight of a token in the loss
) -> CompletionLosses:
    """The weighted objective of each unmasked token of one completion; which rows are dropped: see ``GRPOOutput``.

    ``share * (kept * (importance weight * policy term - entropy_coef * entropy) + beta * KL)``, see
    ``GRPOLossConfig``. Where the advantage is zero and no KL is part of it, old and sampler log-probs are used only by
    a bias-corrected KL and may otherwise be NaN. If the tokens of a completion share a ratio or a weight, the log-probs
    of all of them are used as soon as one has an advantage.
    """

    def parts_of(logprobs: Tensor, entropy: Tensor) -> CompletionLosses:
        return _losses_of_any_size(logprobs, entropy, advantage, config, old, ref, sampler, kept, share)

    with torch.enable_grad():
        leaves = [x.detach().requires_grad_() for x in (logprobs, entropy)]
        losses = parts_of(*leaves).losses
        slopes = torch.autograd.grad(losses.sum(), leaves, allow_unused=True, materialize_grads=True)
    fits = (losses.abs() <= LARGEST_LOSS) & (torch.stack(slopes).abs() <= LARGEST_COEFFICIENT).all(0)
    if config.importance_sampling_level == "sequence":
        fits = fits.all().expand_as(fits)
    parts = parts_of(*(torch.where(fits, x, x.detach()) for x in (logprobs, entropy)))
    losses, ratio, low, high, kl, finite = parts
    losses, ratio, kl = (None if x is None else torch.where(fits, x, 0) for x in (losses, ratio, kl))
    return CompletionLosses(losses, ratio, low & fits, high & fits, kl, finite & fits)


def _losses_of_any_size(logprobs, entropy, advantage, config, old, ref, sampler, kept, share) -> CompletionLosses:
    """``completion_losses`` in which only rows with a log-ratio that is NaN or infinite are dropped."""
    own, bound = logprobs.detach(), LOG_RATIO_BOUND
    old, ref, sampler = (x if x is None else x.detach().to(own.dtype) for x in (old, ref, sampler))
    weighted = (advantage != 0) | config.kl_in_advantage
    if config.needs_whole_sequences:
        weighted = weighted.any()
    if old is None:
        old = own
    elif not (config.kl_in_loss and config.use_bias_correction_kl):
        old = torch.where(weighted, old, own)
    if sampler is not None:
        sampler = torch.where(weighted, sampler, old)
    finite = own.isfinite() & (own - old).isfinite()
    finite = finite if ref is None else finite & (ref - own).isfinite()
    finite = finite if sampler is None else finite & (old - sampler).isfinite()

    # if only a later where() dropped a NaN, the gradient of the row would still be NaN
    logprobs, entropy, old = (torch.where(finite, x, 0) for x in (logprobs, entropy, old))
    log_ratio = logprobs - old
    if config.importance_sampling_level == "sequence":
        log_ratio = (log_ratio.sum() / finite.sum().clamp(min=1)).expand_as(log_ratio)
    ratio = log_ratio.clamp(-bound, bound).exp()

    penalty, kl = torch.zeros_like(logprobs), None
    if ref is not None:
        gap = (torch.where(finite, ref, 0) - logprobs).clamp(-bound, bound)
        kl = {"k1": -gap, "k2": gap**2 / 2, "k3": k3_estimate(gap)}[config.kl_estimator]
        if config.kl_in_advantage:
            advantage = advantage - config.beta * kl.detach()
        elif config.kl_in_loss:
            penalty, factor = kl, ratio
            if config.kl_gradient == "straight_through":
                penalty, factor = (kl - gap**2 / 2).detach() + gap**2 / 2, ratio.detach()
            if config.use_bias_correction_kl:
                penalty = penalty * factor

    weight = torch.ones_like(logprobs)
    if sampler is not None:
        gap = torch.where(finite, old - sampler, 0)
        if config.importance_sampling_mode.startswith("sequence"):
            gap = gap.sum().expand_as(gap)
        weight = gap.clamp(-bound, bound).exp()
        if config.importance_sampling_mode.endswith("truncate"):
            weight = weight.clamp(max=config.importance_sampling_cap)
        else:
            weight = torch.where(weight > config.importance_sampling_cap, 0, weight)

    clip_low = clip_high = torch.zeros_like(finite)
    if config.loss_type == "cispo":
        policy = -ratio.detach().clamp(max=config.clip_high) * advantage * logprobs
        clip_high = ratio > config.clip_high
    elif config.loss_type == "sapo":
        steepness = torch.where(advantage > 0, own.new_tensor(config.sapo_temperature_pos), config.sapo_temperature_neg)
        policy = -4 / steepness * torch.sigmoid(steepness * (ratio - 1)) * advantage
    elif config.loss_type == "vespo":
        low, high = VESPO_LOG_BOUNDS
        log_weight = log_ratio.detach().clamp(-high, high).sum() + weight.log().clamp(low, high).sum()
        log_weight = log_weight.clamp(low, high)
        k = torch.where(advantage >= 0, own.new_tensor(config.vespo_k_pos), config.vespo_k_neg)
        rate = torch.where(advantage >= 0, own.new_tensor(config.vespo_lambda_pos), config.vespo_lambda_neg)
        weight = (rate + k * log_weight - rate * log_weight.exp()).clamp(max=bound).exp()
        policy = -advantage * logprobs
    else:
        unclipped = ratio if config.delta is None else ratio.clamp(max=config.delta)
        clipped = ratio.clamp(1 - config.epsilon, 1 + config.clip_high)
        policy = -torch.minimum(unclipped * advantage, clipped * advantage)
        clip_low = (ratio < 1 - config.epsilon) & (advantage < 0)
        clip_high = (ratio > 1 + config.clip_high) & (advantage > 0)

    losses = share * (kept * (weight * policy - config.entropy_coef * entropy) + config.beta * penalty)
    return CompletionLosses(
        torch.where(finite, losses, 0),
        torch.where(finite, ratio.detach(), 0),
        clip_low & finite,
        clip_high & finite,
        None if kl is None else torch.where(finite, kl.detach(), 0),
        finite,
    )


def k3_estimate(gap: Tensor) -> Tensor:
    """``exp(gap) - gap - 1``, by its series near 0, where the three terms cancel."""
    series = torch.ones_like(gap)
    for k in range(K3_TERMS, 2, -1):
        series = 1 + gap * series / k
    return torch.where(gap.abs() < 1, gap**2 / 2 * series, gap.exp() - gap - 1)


def linear_grpo_loss(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    targets: Tensor,  # (N) int64
    *,
    cu_seqlens: Tensor,  # (B + 1) int32
    rewards: Tensor | None = None,  # (B)
    advantages: Tensor | None = None,  # (B) or (N)
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
    """The GRPO loss over packed completions, one completion after the other. See ``ops/lm_head/linear_grpo.py``."""
    dtype = compute_dtype(hidden)
    if advantages is None:
        advantages = group_advantages(rewards, group_size=group_size, group_ids=group_ids, scale=config.scale_rewards)
    advantages = advantages.to(dtype)
    mask = torch.ones_like(targets, dtype=torch.bool) if mask is None else mask
    bounds = cu_seqlens.tolist()
    spans = list(zip(bounds, bounds[1:], strict=False))
    if len(advantages) == len(spans):
        advantages = advantages.repeat_interleave(cu_seqlens.diff())  # (N)
    live = mask if config.computes_every_row else mask & (advantages != 0)
    if config.needs_whole_sequences:
        live = torch.cat([mask[start:end] & live[start:end].any() for start, end in spans])

    def stats_of(rows):
        return linear_logprob(
            hidden[rows],
            weight,
            targets[rows],
            bias=bias,
            softcap=softcap,
            entropy=True,
            temperature=config.temperature if temperature is None else temperature[rows],
        )

    blank = torch.full(targets.shape, torch.nan, dtype=dtype, device=hidden.device)
    with torch.no_grad():
        seen = stats_of(live)
        seen_logprobs, seen_entropy = (blank.index_put((live,), x) for x in (seen.logprobs, seen.entropy))
    # rows without a finite log-prob are kept out of the graph, where 0 * NaN would be NaN
    sound = live & seen_logprobs.isfinite()
    used = stats_of(sound)
    logprobs, entropy = (blank.index_put((sound,), x) for x in (used.logprobs, used.entropy))

    if denominator is None:
        n_completions, n_tokens = len(spans), mask.sum().clamp(min=1)
        denominator = {
            "grpo": n_completions,
            "sapo": n_completions,
            "luspo": n_completions,
            "dr_grpo": n_completions * (config.max_completion_length or 1),
        }.get(config.loss_type, n_tokens)

    kept = torch.ones_like(live)
    if config.top_entropy_quantile < 1 and sound.any():
        kept = seen_entropy >= seen_entropy[sound].quantile(1 - config.top_entropy_quantile)
    total = used.logprobs.sum() * 0  # a zero that backward accepts even if no row is live
    logged = []
    for start, end in spans:
        rows = torch.arange(start, end, device=hidden.device)[live[start:end]]
        tokens = mask[start:end].sum().clamp(min=1) if config.loss_type in ("grpo", "sapo") else 1
        parts = completion_losses(
            logprobs[rows],
            entropy[rows],
            advantages[rows],
            config,
            kept=kept[rows],
            share=total.new_ones(()) / tokens / denominator,
            old=None if old_logprobs is None else old_logprobs[rows],
            ref=None if ref_logprobs is None else ref_logprobs[rows],
            sampler=None if sampler_logprobs is None else sampler_logprobs[rows],
        )
        logged.append(parts)
        total = total + parts.losses.sum()

    finite = torch.cat([parts.finite for parts in logged])
    stats = {"entropy": seen_entropy[live]}
    for name in ("ratio", "clip_low", "clip_high", "kl"):
        if name != "kl" or ref_logprobs is not None:
            stats[name] = torch.cat([getattr(parts, name) for parts in logged])
    return GRPOOutput(
        loss=total,
        logprobs=seen_logprobs,
        entropy=seen_entropy,
        stats={"live_tokens": live.sum(), "nonfinite": (~finite).sum()}
        | {name: values[finite].to(dtype).mean() for name, values in stats.items()},
    )


def kv_write(
    key: Tensor,  # (T, Hkv, Dh)
    value: Tensor,  # (T, Hkv, Dh)
    key_cache: Tensor,  # (pages, page_size, Hkv, Dh), written in place
    value_cache: Tensor,  # (pages, page_size, Hkv, Dh), written in place
    slots: Tensor,  # (T) int64: page * page_size + offset, -1 to skip the token
) -> None:
    """Writes each token's key and value to its slot of the paged cache; no slot except -1 may occur twice."""
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
    """Per row: the sampled token and its statistics; fp32 (float64 for float64 inputs)."""

    tokens: Tensor  # (R) int64
    logprobs: Tensor  # (R) of the token, before any filter, at the sampling temperature (1 for greedy)
    lse: Tensor  # (R)
    entropy: Tensor  # (R) before any filter
    kept_mass: Tensor  # (R) total probability of the tokens that the filters kept; 1 without filters


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

    The noise of token v is a function of (stream, v) alone, so a sample does not depend on the rest of the batch.
    Filters apply in the order top-k, top-p, min-p, each to the renormalized result of the one before.
    """
    logits = linear_logits(hidden, weight, temperature or 1.0, bias, softcap)
    lse = logits.logsumexp(-1)
    kept = filter_logits(logits, top_k, top_p, min_p)
    noise = gumbel_noise(streams, logits.shape[-1]).to(logits.dtype) if temperature else 0.0
    tokens = (kept + noise).argmax(-1)
    logprobs = logits.gather(-1, tokens[:, None]).squeeze(-1) - lse
    return Sample(tokens, logprobs, lse, entropy_of(logits), (kept.logsumexp(-1) - lse).exp())


def filter_logits(logits: Tensor, top_k: int, top_p: float, min_p: float) -> Tensor:
    """``logits`` (R, V) with -inf on every token that top-k, top-p or min-p excludes; ties at a bound are kept."""
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


def gumbel_noise(streams: Tensor, vocab_size: int, start: int = 0) -> Tensor:
    """Standard Gumbel noise (R, V) in fp32 from the counter-based generator Philox4x32-10.

    It is that of the tokens from ``start`` on, a multiple of 4. Key (seed, step), counter (v // 4, position, row id,
    rollout index), word v % 4. A word x gives ``u = (x + 1/2) / 2**32`` and ``-log(-log(1 - u))``: with 1 - u, the
    upper tail, which decides the argmax, keeps all 32 bits.
    """
    seed, step, row, rollout, position = (streams[:, i, None] & 0xFFFFFFFF for i in range(5))
    block = torch.arange(start // 4, (start + vocab_size + 3) // 4, device=streams.device)[None, :]
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
