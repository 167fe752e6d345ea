"""GRPOLossConfig: the configuration of the GRPO loss."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, fields
from functools import cache
from typing import Literal, get_args

from toolx_kernels.errors import InputError, short
from toolx_kernels.settings import COUNT, HUGE, NOT_NEGATIVE, POSITIVE, SHARE, Bounds, between, check_number

LossType = Literal["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo"]
LOSS_TYPES = get_args(LossType)
CLIPPED_LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")

CHOICES = {
    "loss_type": LOSS_TYPES,
    "kl_estimator": ("k1", "k2", "k3"),
    "kl_gradient": ("own", "straight_through", "none"),
    "importance_sampling_level": ("token", "sequence"),
    "importance_sampling_mode": ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask"),
    "scale_rewards": ("group", "batch", "none"),
}

_MAY_BE_INF = Bounds(
    f"not be negative, and be up to {HUGE:g} or inf", lambda value: 0 <= value <= HUGE or value == float("inf")
)
BOUNDS = {
    "epsilon": Bounds("lie in [0, 1), as the lower clip is 1 - epsilon", lambda value: 0 <= value < 1),
    "epsilon_high": _MAY_BE_INF,
    "delta": _MAY_BE_INF,
    "beta": NOT_NEGATIVE,
    "entropy_coef": NOT_NEGATIVE,
    "top_entropy_quantile": SHARE,
    "sapo_temperature_neg": POSITIVE,
    "sapo_temperature_pos": POSITIVE,
    "vespo_k_pos": NOT_NEGATIVE,
    "vespo_lambda_pos": POSITIVE,
    "vespo_k_neg": NOT_NEGATIVE,
    "vespo_lambda_neg": POSITIVE,
    "temperature": POSITIVE,
    "importance_sampling_cap": POSITIVE,
    "max_completion_length": between(1, COUNT),
    "workspace_mib": between(1, 1 << 20),
}


@dataclass(frozen=True, slots=True)
class GRPOLossConfig:
    """The policy-gradient objective, with TRL's names. r is the ratio exp(logp - old), A the advantage of the
    completion or of the token.

    loss_type: the objective of a token, and how token losses are reduced to one number. B counts fully masked
        completions too; ``denominator`` replaces the divisor of the sum (for ``grpo`` and ``sapo``: B).

        - ``grpo``: ``-min(r A, clip(r) A)``; the mean over completions of the mean over their tokens
          (arXiv 2402.03300, eq. 3). With ``importance_sampling_level="sequence"`` it is GSPO (arXiv 2507.18071).
        - ``bnpo``: the same, summed and divided by the tokens of this call.
        - ``dr_grpo``: summed and divided by ``B * max_completion_length`` (arXiv 2503.20783).
        - ``dapo``: summed and divided by the tokens of the whole accumulated batch, which the caller passes as
          ``denominator`` (arXiv 2503.14476); without it, by the tokens of this call.
        - ``luspo``: summed and divided by B, so that the tokens of a long completion weigh as much as others; meant
          for the sequence level (arXiv 2602.05261).
        - ``cispo``: ``-min(r, epsilon_high) A logp`` with a constant weight (arXiv 2506.13585); summed as in ``dapo``.
        - ``sapo``: ``-4 / t * sigmoid(t (r - 1)) A``, t the temperature for A's sign (arXiv 2511.20347); averaged as
          in ``grpo``.
        - ``vespo``: ``-phi(w) A logp`` with a constant phi, ``phi(w) = exp(lambda) w^k exp(-lambda w)``, k and
          lambda those for A's sign, and w the product of the completion's ratios, including those against the sampler
          (arXiv 2602.10693); summed as in ``dapo``.
    epsilon, epsilon_high: the ratio is clipped to ``[1 - epsilon, 1 + epsilon_high]``; None means ``epsilon``. For
        ``cispo`` the cap is ``epsilon_high`` (for example 5.0), not ``1 + epsilon_high``.
    delta: upper bound of the ratio where A < 0, where the clip has none. This *is* dual clip (arXiv 1912.09729;
        verl's ``clip_ratio_c``): above ``1 + epsilon_high``, ``-min(min(r, delta) A, clip(r) A)`` is
        ``|A| min(delta, max(r, clip(r)))`` for A < 0. Only for the clipped types.
    beta: weight of the KL estimate against ``ref_logprobs``; 0 for none.
    kl_estimator: with g = ref - logp, ``k1`` is -g, ``k2`` g^2 / 2 and ``k3`` exp(g) - g - 1 (Schulman, 2020).
    kl_gradient: ``own``: beta * KL is in the loss, with the estimator's gradient (that of k1 is zero-mean noise unless
        bias-corrected). ``straight_through``: the estimator's value with the gradient of k2, which on-policy is that
        of the reverse KL (verl's "k1+", "k3+"). ``none``: A - beta * KL replaces A, token by token.
    use_bias_correction_kl: multiplies a KL in the loss by the ratio, so that its gradient is that of the reverse KL
        off-policy too (DeepSeek-V3.2, arXiv 2512.02556).
    entropy_coef: adds ``-entropy_coef * entropy`` to each token's loss, with its gradient and the token's weight.
    top_entropy_quantile: only this share of a call's unmasked tokens, those of highest entropy, keeps its policy term
        and entropy bonus; all keep the KL (arXiv 2506.01939). 1 is all, 0 the single highest.
    temperature: divides the logits, as it did when the tokens were sampled.
    importance_sampling_level: ``sequence`` uses one ratio per completion, exp(mean of the log-ratios).
    importance_sampling_mode, importance_sampling_cap: if ``sampler_logprobs`` are given, the policy term is weighted
        by v = exp(old - sampler), per token or summed over the completion: ``*_truncate`` takes min(v, cap),
        ``*_mask`` takes v if v <= cap, else 0. TRL's ``vllm_importance_sampling_mode`` and ``_clip_max``.
    scale_rewards: the denominator of the advantages, see ``group_advantages``.
    max_completion_length: only ``dr_grpo`` uses it.
    compute_all_logprobs: also compute rows whose gradient is known to be zero (those of advantage 0), so that
        ``.logprobs`` and ``.entropy`` hold no NaN on unmasked rows.
    recompute: always sweep the vocabulary twice and form the gradients in the backward pass: slower, but without an
        fp32 gradient of the whole weight (``ops/lm_head/tiles.py``).
    workspace_mib: limit of a sweep's memory in addition to its results; None is 64 on a CPU and 3 % of a GPU's memory,
        from 512 to 2048. It is never more than a quarter of fp32 logits. On a GPU a sweep may also use the memory of an
        fp32 sum of the weight's gradient, if all rows then fit at once and that sum is not needed.

    ``key`` is the config as a JSON string, from which ``from_key`` rebuilds it.

    Raises:
        InputError: a value, or a combination of values, is not possible.
    """

    loss_type: str = "grpo"
    epsilon: float = 0.2
    epsilon_high: float | None = None
    delta: float | None = None
    beta: float = 0.0
    kl_estimator: str = "k3"
    kl_gradient: str = "own"
    use_bias_correction_kl: bool = False
    entropy_coef: float = 0.0
    top_entropy_quantile: float = 1.0
    sapo_temperature_neg: float = 1.05
    sapo_temperature_pos: float = 1.0
    vespo_k_pos: float = 2.0
    vespo_lambda_pos: float = 3.0
    vespo_k_neg: float = 3.0
    vespo_lambda_neg: float = 2.0
    temperature: float = 1.0
    importance_sampling_level: str = "token"
    importance_sampling_mode: str = "token_truncate"
    importance_sampling_cap: float = 2.0
    scale_rewards: str = "group"
    max_completion_length: int | None = None
    compute_all_logprobs: bool = False
    recompute: bool = False
    workspace_mib: int | None = None
    key: str = field(init=False, repr=False, compare=False, default="")

    def __post_init__(self) -> None:
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.init}
        if isinstance(self.loss_type, str) and self.loss_type == "gspo":
            raise InputError(
                "loss_type='gspo' is loss_type='grpo' with importance_sampling_level='sequence': set these two."
            )
        for name, value in values.items():
            if name in CHOICES:
                if not (isinstance(value, str) and value in CHOICES[name]):
                    raise InputError(f"{name}={short(value)} is unknown: choose one of {', '.join(CHOICES[name])}.")
            elif name in ("use_bias_correction_kl", "compute_all_logprobs", "recompute"):
                if not isinstance(value, bool):
                    raise InputError(f"{name}={short(value)} must be True or False.")
            elif not (name in ("epsilon_high", "delta", "max_completion_length", "workspace_mib") and value is None):
                whole = name in ("max_completion_length", "workspace_mib")
                values[name] = check_number(name, value, BOUNDS[name], whole=whole)
                object.__setattr__(self, name, values[name])
        self._check_combinations()
        object.__setattr__(self, "key", json.dumps(values))

    def _check_combinations(self) -> None:
        if self.delta is not None and self.loss_type not in CLIPPED_LOSS_TYPES:
            raise InputError(
                f"delta={self.delta} bounds a clipped ratio: leave it out for loss_type={self.loss_type!r}."
            )
        if self.delta is not None and not self.delta > 1 + self.clip_high:
            raise InputError(f"delta={self.delta} must exceed 1 + epsilon_high = {1 + self.clip_high}.")
        if self.loss_type == "dr_grpo" and not self.max_completion_length:
            raise InputError("loss_type='dr_grpo' divides by max_completion_length: set it.")
        if self.loss_type == "cispo" and self.epsilon_high is None:
            raise InputError(
                "loss_type='cispo' caps the ratio at epsilon_high, not at 1 + epsilon_high: set it, for example to 5."
            )
        if self.loss_type == "vespo" and self.importance_sampling_level == "sequence":
            raise InputError(
                "loss_type='vespo' already weights whole completions: leave importance_sampling_level at 'token'."
            )
        if self.loss_type == "vespo" and self.importance_sampling_mode.startswith("sequence"):
            raise InputError(
                f"loss_type='vespo' needs importance_sampling_mode 'token_truncate' or 'token_mask', "
                f"not {self.importance_sampling_mode!r}."
            )
        if self.use_bias_correction_kl and self.kl_gradient == "none":
            raise InputError(
                "use_bias_correction_kl=True corrects a KL in the loss, but kl_gradient='none' moves the KL into the "
                "advantage: leave one of them out."
            )

    @property
    def clip_high(self) -> float:
        return self.epsilon if self.epsilon_high is None else self.epsilon_high

    @property
    def kl_in_loss(self) -> bool:
        return self.beta != 0 and self.kl_gradient != "none"

    @property
    def kl_in_advantage(self) -> bool:
        return self.beta != 0 and self.kl_gradient == "none"

    @property
    def computes_every_row(self) -> bool:
        """Whether unmasked tokens are computed even if their advantage is zero."""
        return bool(self.beta or self.entropy_coef or self.top_entropy_quantile < 1 or self.compute_all_logprobs)

    @property
    def needs_whole_sequences(self) -> bool:
        """Whether a token's objective depends on the other unmasked tokens of its completion: then all of them are
        computed if any has an advantage that is not zero."""
        modes = (self.importance_sampling_level, self.importance_sampling_mode)
        return self.loss_type == "vespo" or any(mode.startswith("sequence") for mode in modes)

    @classmethod
    @cache
    def from_key(cls, key: str) -> GRPOLossConfig:
        """The config with this ``key``."""
        return cls(**json.loads(key))
