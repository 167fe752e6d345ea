"""Settings of the method, as sections of ``ToolExpanderConfig``: hard prompts, rewards, loss, imitation, cold start."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from toolx_kernels.loss_config import LossType
from toolx_kernels.settings import FINITE, NOT_NEGATIVE, POSITIVE, SECONDS, SHARE, Settings, setting

if TYPE_CHECKING:
    from typing import Self  # since Python 3.11

BY_LOSS = "GRPOLossConfig checks it"


@dataclass(kw_only=True)
class HardSamplingSettings(Settings):
    """Prompts without a solved rollout: retries and hard sampling."""

    hard_sampling: Literal["replace", "add", "distill", "retry", "none"] = setting(
        "retry",
        "what to do with prompts that have no solved rollout. retry: sample again in the same step, with help"
        " in the prompt. replace, add, distill: probe before each round, and sample hard prompts with "
        "demonstrations: in place of the raw prompt (replace), in addition to it (add), or in addition to it "
        "and learned on the raw prompt (distill). none: plain GRPO, which only counts them",
    )
    probe_rollouts: int = setting(
        10, "rollouts of a prompt in a probe; it is hard if none of them is solved", most=4096
    )
    probe_every: int | None = setting(
        None,
        "rounds from one probe to the next (default: 1 for replace, add and distill; otherwise a probe before"
        " RL and one after)",
        least=1,
    )
    epochs_per_round: int = setting(1, "passes over the training rows in a round", least=1)
    few_shots_per_tool: int = setting(1, "demonstrations per offered tool", most=1000)
    max_few_shots: int = setting(3, "largest number of demonstrations in a prompt", most=1000)
    demonstrations: Literal["random", "better"] = setting(
        "random",
        "random: any that use the offered tools; better: drawn again until a model answers correctly with "
        "them; the prompt stays raw if none work",
    )
    verification: Literal["cautious", "bold"] = setting(
        "cautious", "which model checks better demonstrations: cautious: the one before RL; bold: the current one"
    )
    demonstration_tries: int = setting(4, "draws of better demonstrations per row and round", most=1000)
    verify_rollouts: int = setting(
        4, "rollouts that check a draw of better demonstrations; one solved rollout is enough", most=4096
    )
    retry_with: Literal["demonstrations", "hint"] = setting(
        "demonstrations",
        "what a retried prompt shows: demonstrations; or hint: the first quarter of the answer, then half, "
        "then three quarters, until a rollout is solved",
    )
    retry_learns: Literal["raw", "shown"] = setting(
        "raw",
        "prompt that retried rollouts are learned on: raw: the prompt without help, in one group with the "
        "failed rollouts; shown: the prompt with help, in a separate group",
    )

    @property
    def probes(self) -> bool:
        """Whether hard prompts are treated as a probe finds them; otherwise a probe only counts them."""
        return self.hard_sampling not in ("none", "retry")

    @property
    def hints(self) -> bool:
        """Whether retries show the beginning of the answer."""
        return self.hard_sampling == "retry" and self.retry_with == "hint"

    @property
    def retries_learn_raw(self) -> bool:
        return self.hard_sampling == "retry" and self.retry_learns == "raw"

    @property
    def learns_elsewhere(self) -> bool:
        """Whether rollouts are learned on another prompt than the one they were sampled from."""
        return self.hard_sampling == "distill" or self.retries_learn_raw


@dataclass(kw_only=True)
class RewardSettings(Settings):
    """Rewards and advantages."""

    reward_funcs: list[str] | None = setting(
        None,
        "reward functions of your own, as module.function or path/to/file.py:function, called as "
        "f(prompts, completions, completion_ids, **columns), as in TRL (default: the default reward)",
    )
    self_exemplify: bool = setting(
        False, "let the model write examples and think before it answers, and reward the examples"
    )
    reward: Literal["exact", "similarity"] = setting(
        "exact",
        "the default reward: exact: 1 for exactly the right calls, otherwise 0; similarity: how similar the calls"
        " are to the right ones (STAR)",
    )
    solved_reward: float = setting(
        1.0,
        "total of your reward functions from which a rollout counts as solved; by the default reward only the"
        " right calls do",
        bounds=FINITE,
    )
    thoughts: Literal["auto", "allowed", "forbidden"] = setting(
        "auto",
        "whether a turn may begin with a thought and still earn the default reward: allowed, forbidden, or "
        "auto: allowed if the chat template has thoughts. Calls in a thought never count",
    )
    distinct_examples: bool = setting(
        True, "count duplicates and trivial edits as one example; false: only parse and count examples"
    )
    reward_weights: list[float] | None = setting(
        None, "one weight per reward function (default: 1 each); one below 0 punishes", bounds=FINITE
    )
    reward_timeout: float = setting(60.0, "seconds allowed for one call of a reward function", bounds=SECONDS)
    scale_rewards: Literal["group", "batch", "none"] = setting(
        "group", "divide advantages by the standard deviation of the rewards in the group or the batch; none: do not"
    )
    min_reward_std: float | None = setting(
        None,
        "least standard deviation that advantages are divided by; 0: any (default: 0 for reward functions of "
        "your own; 0.1 for the default rewards, so that a bonus of 0.01 stays small. With rewards of 0 and 1, "
        "groups of up to 100 rollouts never have less than 0.1)",
        bounds=NOT_NEGATIVE,
    )
    advantage_shaping: Literal["group", "difficulty", "successes", "routed", "zero-variance"] = setting(
        "group",
        "group: reward relative to the rest of the group; difficulty: the same, with more weight on prompts "
        "of medium difficulty (Observe-R1); successes: failed rollouts count 0 in groups that got help; "
        "routed: groups that got help imitate their solved rollouts (SRPO); zero-variance: groups whose "
        "rewards are all equal learn from their entropy (RL-ZVP)",
    )

    def settled(self, own_rewards: bool = False) -> Self:
        """Returns the settings with a number for ``min_reward_std``; ``own_rewards``: functions are given besides."""
        if self.min_reward_std is not None:
            return self
        return replace(self, min_reward_std=0.0 if own_rewards or self.reward_funcs else 0.1)


@dataclass(kw_only=True)
class LossSettings(Settings):
    """The loss, and how often a batch is used."""

    loss_type: LossType = setting(
        "grpo", "objective, and averaging over tokens: grpo, bnpo, dr_grpo, dapo, cispo, sapo, luspo or vespo"
    )
    epsilon: float = setting(0.2, "lower clip: the ratio counts as at least 1 - epsilon", unbounded=BY_LOSS)
    epsilon_high: float | None = setting(
        0.26,
        "upper clip: the ratio counts as at most 1 + epsilon_high; for cispo, as at most epsilon_high",
        unbounded=BY_LOSS,
    )
    delta: float | None = setting(
        None,
        "upper bound of the ratio where the advantage is negative: two-sided clip (default: none)",
        unbounded=BY_LOSS,
    )
    beta: float = setting(
        0.0, "weight of the KL to the model before RL; 0: no KL, and no reference model in memory", unbounded=BY_LOSS
    )
    importance_sampling_level: Literal["token", "sequence"] = setting(
        "token", "one ratio per token, or per sequence (GSPO)"
    )
    num_iterations: int = setting(1, "updates per batch; with 1 the ratio is exactly 1, and no clip acts", most=1000)
    old_logprobs: Literal["trainer", "sampler"] = setting(
        "trainer",
        "log-probs that ratios compare with, if a batch has several updates: trainer: those of the first "
        "update; sampler: those reported with the rollouts",
    )
    importance_sampling_mode: Literal["none", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask"] = (
        setting(
            "none",
            "correct for differences between the log-probs of trainer and sampler, by a weight per token or "
            "sequence: token_truncate, sequence_truncate: capped; token_mask, sequence_mask: 0 above the cap; "
            "none: do not",
        )
    )
    importance_sampling_cap: float = setting(2.0, "cap of these weights", bounds=POSITIVE)
    denominator: Literal["all", "live"] = setting(
        "all", "groups that the loss is divided by: all: every sampled group; live: those that have a gradient"
    )


@dataclass(kw_only=True)
class ImitationSettings(Settings):
    """Imitation of demonstrations, before and during RL."""

    sft_fraction: float = setting(
        0.0,
        "share of the run's budget for supervised steps on the demonstrations, before RL; 1: all of it",
        bounds=SHARE,
    )
    sft_learning_rate: float | None = setting(
        None, "learning rate of these steps (default: --learning_rate)", bounds=POSITIVE
    )
    sft_patience: int = setting(
        0,
        "end these steps once N passes have not improved the prediction of a held-out tenth of the "
        "demonstrations; 0: never",
        least=0,
    )
    sft_coef: float = setting(
        0.0,
        "weight, during RL, of a second loss: the mean negative log-prob of demonstrations, one per group",
        bounds=NOT_NEGATIVE,
    )
    sft_decay: bool = setting(False, "lower sft_coef to 0 along a cosine until the end of the run")

    @property
    def imitates(self) -> bool:
        return bool(self.sft_fraction or self.sft_coef)


@dataclass(kw_only=True)
class ColdStartSettings(Settings):
    """Supervised training before RL."""

    cold_start_steps: int = setting(0, "supervised steps on right answers before RL", least=0)
    cold_start_batch_size: int = setting(24, "examples per supervised step", most=1 << 16)
    cold_start_learning_rate: float = setting(1e-5, "peak learning rate of these steps", bounds=POSITIVE)
    cold_start_demonstrations: float = setting(
        0.3, "share of examples that show demonstrations; the built-in tasks have their own", bounds=SHARE
    )
    cold_start_self_exemplify: float = setting(0.0, "share of examples in the self-exemplifying form", bounds=SHARE)
