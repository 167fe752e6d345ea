"""Settings of the method: what happens to hard prompts, what is rewarded, what is learned.

Sections of ``ToolExpanderConfig``, which has them all.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from toolx_kernels.loss_config import LossType
from toolx_kernels.settings import POSITIVE, SHARE, Bounds, Settings, setting

BY_LOSS = "GRPOLossConfig checks it"
FINITE = Bounds("be finite", math.isfinite)
NOT_NEGATIVE = Bounds("be a number that is not negative", lambda value: 0 <= value < math.inf)


@dataclass(kw_only=True)
class HardSamplingSettings(Settings):
    """Prompts without a solved rollout: dynamic multi-round hard sampling, and retries."""

    hard_sampling: Literal["replace", "add", "distill", "retry", "none"] = setting(
        "retry",
        "hard prompts get demonstrations for a round: instead of the raw prompt (replace), besides it (add), or "
        "besides it with the loss on the raw prompt (distill); retry: no round, groups without a solved rollout are "
        "sampled again with help in the same step; none: plain GRPO, whose hard prompts are only counted",
    )
    probe_rollouts: int = setting(10, "rollouts that decide whether a prompt is hard", least=1)
    probe_every: int | None = setting(
        None,
        "rounds between two probes; by default 1 where hard_sampling acts on them, and else one probe before RL and "
        "one after",
        least=1,
    )
    epochs_per_round: int = setting(1, "passes over the training rows in a round", least=1)
    few_shots_per_tool: int = setting(1, "demonstrations per offered tool", least=1)
    max_few_shots: int = setting(3, "demonstrations per prompt", least=1)
    demonstrations: Literal["random", "better"] = setting(
        "random", "better: drawn again until they make a model answer correctly; where none do, the prompt stays raw"
    )
    verification: Literal["cautious", "bold"] = setting(
        "cautious", "of better demonstrations: by the model before RL (cautious) or the present one (bold)"
    )
    demonstration_tries: int = setting(4, "draws of better demonstrations per row and round", least=1)
    verify_rollouts: int = setting(4, "rollouts that verify a draw; the first solved one ends them", least=1)
    retry_with: Literal["demonstrations", "hint"] = setting(
        "demonstrations",
        "what a retry shows; hint: the first quarter of the answer, then half, then three quarters, until a rollout is "
        "solved",
    )
    retry_learns: Literal["raw", "shown"] = setting(
        "raw",
        "the prompt on which retried rollouts are learned: raw, in one group with the failures; or as it was shown, in "
        "a group of their own",
    )

    @property
    def probes(self) -> bool:
        """Whether a remedy acts on what a probe finds; otherwise it only measures."""
        return self.hard_sampling not in ("none", "retry")

    @property
    def hints(self) -> bool:
        """Whether retries tell how the answer begins."""
        return self.hard_sampling == "retry" and self.retry_with == "hint"

    @property
    def retries_learn_raw(self) -> bool:
        return self.hard_sampling == "retry" and self.retry_learns == "raw"

    @property
    def learns_elsewhere(self) -> bool:
        """Whether rollouts are learned on another prompt than they were sampled on."""
        return self.hard_sampling == "distill" or self.retries_learn_raw


@dataclass(kw_only=True)
class RewardSettings(Settings):
    """Rewards, self-exemplifying thinking, advantages."""

    self_exemplify: bool = setting(
        False, "the model writes examples of its own and thinks before it answers; its reward rewards the examples"
    )
    reward: Literal["exact", "similarity"] = setting(
        "exact",
        "the default reward: 1 for the right calls and nothing else, else 0; or how similar the calls are to the right "
        "ones (STAR)",
    )
    solved_reward: float = setting(
        1.0,
        "the total of your own reward functions from which a rollout counts as solved; with the default rewards only "
        "the right calls are",
        bounds=FINITE,
    )
    thoughts: Literal["auto", "allowed", "forbidden"] = setting(
        "auto",
        "whether the default reward lets a turn begin with a thought; auto: where the chat template expects one. A "
        "thought is never read for calls",
    )
    distinct_examples: bool = setting(
        True, "duplicates and trivial edits of one another count as one example; false judges by parse and count alone"
    )
    reward_weights: list[float] | None = setting(
        None, "one per reward function; all 1 by default", unbounded="a weight below 0 punishes"
    )
    reward_timeout: float = setting(60.0, "seconds that one call of a reward function may take", bounds=POSITIVE)
    scale_rewards: Literal["group", "batch", "none"] = setting("group", "whose std divides the advantages")
    min_reward_std: float = setting(
        0.1,
        "the least std of a group that divides advantages, so that a bonus of 0.01 stays small; 0: none (0 / 1 rewards "
        "of up to 100 rollouts never have less)",
        bounds=NOT_NEGATIVE,
    )
    advantage_shaping: Literal["group", "difficulty", "successes", "routed", "zero-variance"] = setting(
        "group",
        "group: better than its siblings; difficulty: that, weighted by how middling a prompt's difficulty is "
        "(Observe-R1); successes: failures of groups that got help count 0; routed: groups that got help imitate their "
        "solved rollouts (SRPO); zero-variance: groups of equal reward learn by their entropy (RL-ZVP)",
    )


@dataclass(kw_only=True)
class LossSettings(Settings):
    """The loss, and how often a batch is learned from."""

    loss_type: LossType = setting("grpo", "the objective, and how token losses are averaged")
    epsilon: float = setting(0.2, "lower clip", unbounded=BY_LOSS)
    epsilon_high: float | None = setting(0.26, "upper clip", unbounded=BY_LOSS)
    delta: float | None = setting(None, "two-sided clip", unbounded=BY_LOSS)
    beta: float = setting(0.0, "weight of the KL to the model before RL; 0 needs no reference model", unbounded=BY_LOSS)
    importance_sampling_level: Literal["token", "sequence"] = setting("token", "sequence is GSPO")
    num_iterations: int = setting(
        1, "updates from one batch; with 1 the ratio is exactly 1 and no old log-probs exist", least=1
    )
    old_logprobs: Literal["trainer", "sampler"] = setting(
        "trainer",
        "what ratios start from where a batch has several updates: the log-probs of the first update's own forward, or "
        "those that the sampler reported",
    )
    importance_sampling_mode: Literal["none", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask"] = (
        setting("none", "weights for what trainer and sampler disagree in, cut or left out beyond the cap")
    )
    importance_sampling_cap: float = setting(2.0, "largest of these weights", bounds=POSITIVE)
    denominator: Literal["all", "live"] = setting(
        "all", "groups that divide the loss: all that were sampled, or those that have a gradient"
    )


@dataclass(kw_only=True)
class ImitationSettings(Settings):
    """Imitation of demonstrations, before RL or beside it."""

    sft_fraction: float = setting(
        0.0, "share of the run's budget that goes to supervised steps on the demonstrations first; 1: all", bounds=SHARE
    )
    sft_learning_rate: float | None = setting(None, "of these steps; by default learning_rate", bounds=POSITIVE)
    sft_patience: int = setting(
        0,
        "end these steps when a tenth of the demonstrations, held out, is predicted no better for N passes over the "
        "others; 0: never",
        least=0,
    )
    sft_coef: float = setting(
        0.0,
        "weight of the mean negative log-prob of demonstrations beside the loss, one for each group",
        bounds=NOT_NEGATIVE,
    )
    sft_decay: bool = setting(False, "sft_coef falls to 0 along a cosine until the end of the run")

    @property
    def imitates(self) -> bool:
        return bool(self.sft_fraction or self.sft_coef)
