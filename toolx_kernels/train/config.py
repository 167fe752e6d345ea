"""Every setting of a run, section by section.

Each field is a flag of ``toolx train`` and a YAML key; names are TRL's where TRL has one. A function takes the whole
:class:`ToolExpanderConfig`, or names the section that it needs.
"""

from __future__ import annotations

import datetime
import re
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Literal

from toolx_kernels.errors import InputError
from toolx_kernels.loss_config import GRPOLossConfig
from toolx_kernels.settings import NO_LIMIT_OR_POSITIVE, POSITIVE, SHARE, Bounds, Settings, setting
from toolx_kernels.train.method_settings import (
    HardSamplingSettings,
    ImitationSettings,
    LossSettings,
    RewardSettings,
)

if TYPE_CHECKING:  # it loads torch, and a parser of flags is made without
    from toolx_kernels.engine.types import SamplingParams

BELOW_1 = Bounds("lie in [0, 1)", lambda value: 0 <= value < 1)
BY_SAMPLING = "SamplingParams checks it"


@dataclass(kw_only=True)
class RunSettings(Settings):
    """The run: its model, its folder, its device."""

    model: str | None = setting(None, "tiny (the default), smollm2-135m, a folder, a .gguf file, or a hub name")
    output_dir: str = setting("runs/train", "the run folder")
    resume: bool = setting(False, "go on from the last checkpoint in the run folder")
    overwrite: bool = setting(False, "delete the run that the run folder holds")
    seed: int = setting(
        0, "of data, weights and sampling", bounds=Bounds("lie in [0, 2**32)", lambda seed: 0 <= seed < 2**32)
    )
    device: str = setting("auto", "auto, cpu, cuda, cuda:1, ...")
    dtype: Literal["float32", "bfloat16"] = setting("float32", "of the weights")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", self.device):
            raise InputError(f"device={self.device!r} is unknown: use auto, cpu, cuda or cuda:<number>.")
        if self.resume and self.overwrite:
            raise InputError("resume and overwrite contradict each other: choose one.")


@dataclass(kw_only=True)
class DataSettings(Settings):
    """The rows to train and to evaluate on."""

    dataset: str | None = setting(
        None,
        "builtin (the default), bfcl:<category>, seal-tools:<path>, a .jsonl path or a hub name; or several, by commas",
    )
    eval_dataset: str | None = setting(None, "as --dataset; by default a held-out part of --dataset")
    demonstration_dataset: str | None = setting(
        None, "as --dataset: more rows that demonstrations are taken from, besides the training rows"
    )
    demonstrate_training_rows: bool = setting(
        True, "demonstrations are taken from the training rows too; false: only from --demonstration_dataset"
    )
    calls: int | None = setting(
        None, "keep only rows whose answer has this many calls", unbounded="a number that no row has leaves no rows"
    )
    train_rows: int | None = setting(None, "rows to train on; all of the dataset's by default, 640 of builtin", least=1)
    eval_rows: int | None = setting(None, "held-out rows to evaluate on; all by default, 480 of builtin", least=1)
    eval_fraction: float = setting(
        0.2,
        "share of --dataset held out when there is no --eval_dataset",
        bounds=Bounds("lie between 0 and 1", lambda share: 0 < share < 1),
    )


@dataclass(kw_only=True)
class ChatSettings(Settings):
    """Prompts: the chat template, and the form in which the model writes calls."""

    tool_format: Literal["auto", "hermes", "llama3", "mistral", "mistral_args", "pythonic", "lfm2", "json"] = setting(
        "auto",
        "the form of calls; auto: the one of the chat template. Another one is asked for in our words; "
        "docs/tool_calls.md shows them",
    )
    chat_template_kwargs: dict | None = setting(
        None, """what the chat template is given besides, as JSON: '{"enable_thinking": false}'"""
    )
    date: str | None = setting(
        None, "the day that templates with a date show, YYYY-MM-DD; by default the one on which the run began"
    )
    overlong: Literal["error", "drop"] = setting(
        "error", "what happens to rows whose prompt leaves no room for an answer in the context"
    )

    def __post_init__(self) -> None:
        if isinstance(self.date, datetime.date):  # as YAML reads it
            self.date = str(self.date)
        super().__post_init__()


@dataclass(kw_only=True)
class RolloutSettings(Settings):
    """Rollouts: what a step samples, and how."""

    num_generations: int = setting(5, "completions per prompt, G", least=1)
    prompts_per_step: int = setting(8, "prompts in one optimizer step", least=1)
    prompt_sampling: Literal["epochs", "dynamic", "solve-rate"] = setting(
        "epochs",
        "epochs: every prompt once an epoch; dynamic: groups of equal reward are dropped and the step filled up with "
        "the next prompts (DAPO); solve-rate: prompts that are nearly always or nearly never solved are left out",
    )
    rollout_selection: Literal["all", "max-variance"] = setting(
        "all", "rollouts of a group that are learned from; max-variance: the half whose rewards differ most"
    )
    temperature: float = setting(0.7, "of sampling, and of the loss", bounds=POSITIVE)
    top_k: int = setting(0, "0 is off", unbounded=BY_SAMPLING)
    top_p: float = setting(1.0, "1.0 is off", unbounded=BY_SAMPLING)
    min_p: float = setting(0.0, "0.0 is off", unbounded=BY_SAMPLING)
    max_completion_length: int = setting(128, "tokens; room for a few calls", least=1)
    torch_compile: bool = setting(False, "of rollouts' decode steps: takes a minute, pays off in long runs on a GPU")
    # only for a trainer that was given tools or an environment
    max_tool_calling_iterations: int = setting(4, "turns with calls in one rollout", least=1)
    tool_timeout: float = setting(10.0, "seconds that one tool call may take", bounds=POSITIVE)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_generations == 1:
            raise InputError("num_generations=1 has no siblings to compare with: GRPO needs at least 2.")
        self.sampling()  # which checks itself

    def sampling(self, stop_token_ids: tuple[int, ...] = (), greedy: bool = False) -> SamplingParams:
        from toolx_kernels.engine.types import SamplingParams

        return SamplingParams(
            max_new_tokens=self.max_completion_length,
            temperature=0.0 if greedy else self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            stop_token_ids=stop_token_ids,
        )


@dataclass(kw_only=True)
class UpdateSettings(Settings):
    """Updates: the optimizer, its schedule, and when training ends."""

    optim: Literal["adamw", "adamw_8bit", "adamw_stochastic", "adamw_offload"] = setting(
        "adamw",
        "adamw: fp32 states, for bfloat16 weights also fp32 masters; adamw_8bit: 8-bit states (torchao); "
        "adamw_stochastic: bfloat16 weights rounded stochastically instead of masters; adamw_offload: "
        "fp32 masters and states in the CPU's memory",
    )
    learning_rate: float = setting(1e-6, "of the first round", bounds=POSITIVE)
    lr_decay: float = setting(
        0.8,
        "factor on the learning rate from one round (or lr_decay_per) to the next",
        bounds=Bounds("lie in (0, 1]; 1 keeps the learning rate", lambda factor: 0 < factor <= 1),
    )
    lr_decay_per: Literal["round", "epoch", "step"] = setting("round", "when the learning rate decays")
    min_lr_rate: float = setting(0.0, "floor of the learning rate, as a share of learning_rate", bounds=SHARE)
    adam_beta1: float = setting(0.9, "AdamW", bounds=BELOW_1)
    adam_beta2: float = setting(0.95, "AdamW", bounds=BELOW_1)
    adam_epsilon: float = setting(1e-8, "AdamW", bounds=POSITIVE)
    weight_decay: float = setting(0.0, "AdamW", least=0)
    max_grad_norm: float = setting(1.0, "gradients are clipped to this norm", bounds=POSITIVE)
    num_train_epochs: int = setting(10, "passes over the training rows; 0: only the cold start", least=0)
    max_steps: int = setting(
        -1, "stop after N optimizer steps; -1: after num_train_epochs", bounds=NO_LIMIT_OR_POSITIVE
    )
    max_tokens: int = setting(
        -1,
        "stop after N tokens: generated (including the method's probes) plus trained-on tokens",
        bounds=NO_LIMIT_OR_POSITIVE,
    )
    max_fe: int = setting(
        -1,
        "stop after N forward-equivalents: tokens prefilled, written, and 3 times those trained on (docs/remedies.md)",
        bounds=NO_LIMIT_OR_POSITIVE,
    )
    micro_batch_tokens: int = setting(
        4096, "tokens in one forward and backward; bounds memory, not the gradient", least=1
    )
    gradient_checkpointing: bool = setting(
        False, "activations of each layer are computed again in the backward pass: less memory, a third more work"
    )


@dataclass(kw_only=True)
class AdapterSettings(Settings):
    """The LoRA adapter."""

    use_peft: bool = setting(False, "train a LoRA adapter (peft) instead of the weights")
    lora_r: int = setting(16, "rank of the adapter", least=1)
    lora_alpha: int = setting(32, "its output is scaled by lora_alpha / lora_r", least=1)
    lora_target_modules: list[str] | None = setting(None, "linear layers with an adapter; all but the head by default")


@dataclass(kw_only=True)
class ColdStartSettings(Settings):
    """The supervised cold start before RL."""

    cold_start_steps: int = setting(0, "supervised steps on the answers before RL", least=0)
    cold_start_batch_size: int = setting(24, "examples per step", least=1)
    cold_start_learning_rate: float = setting(1e-5, "its peak", bounds=POSITIVE)
    cold_start_demonstrations: float = setting(
        0.3, "share of examples that show demonstrations (builtin has its own)", bounds=SHARE
    )
    cold_start_self_exemplify: float = setting(0.0, "share of examples in the self-exemplifying form", bounds=SHARE)


@dataclass(kw_only=True)
class LogSettings(Settings):
    """Evaluation, logs, checkpoints."""

    eval_on_start: bool = setting(True, "evaluate before RL")
    eval_steps: int = setting(0, "evaluate every N steps besides the beginning and the end; 0: not", least=0)
    save_steps: int = setting(50, "checkpoint every N steps besides the end", least=1)
    save_total_limit: int = setting(
        2, "checkpoints kept; the first too where it is needed (KL, cautious verification)", least=1
    )
    log_completions: int = setting(4, "completions per step written to rollouts.jsonl", least=0)
    profile_step: int = setting(0, "the optimizer step of which a torch profiler trace is written; 0: none", least=0)


@dataclass(kw_only=True)
class ToolExpanderConfig(  # the fields of the last base come first
    LogSettings,
    ColdStartSettings,
    AdapterSettings,
    UpdateSettings,
    ImitationSettings,
    LossSettings,
    RewardSettings,
    HardSamplingSettings,
    RolloutSettings,
    ChatSettings,
    DataSettings,
    RunSettings,
):
    """A ToolExpander run (arXiv 2510.07737).

    Rollouts, temperature, probe, learning rate, its decay and the number of epochs are the paper's. Batch and
    completion length fit one small machine (the paper has 1024 prompts and 8192 tokens). Hard rows are retried, which
    is not the paper's (docs/records.md says why); the loss is that of its self-exemplifying form (no KL, clip
    0.2 / 0.26). ``toolx_kernels/configs`` has the paper's rows as recipes, with KL 1e-3 and clip 0.2 / 0.2 where it has
    them; ``builtin.yaml`` there holds the values for the built-in task's tiny model.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        from_sampler = self.num_iterations > 1 and self.old_logprobs == "sampler"
        if self.learns_elsewhere and (from_sampler or self.importance_sampling_mode != "none"):
            mode = f"importance_sampling_mode={self.importance_sampling_mode}"
            which = "old_logprobs=sampler" if from_sampler else mode
            raise InputError(
                f"{which} compares log-probs on one prompt, and hard_sampling={self.hard_sampling} samples on another "
                "one than it learns on: choose hard_sampling=none, replace or add, or leave it at its default."
            )
        self._check_remedies()
        if from_sampler and self.importance_sampling_mode != "none":
            raise InputError(
                f"importance_sampling_mode={self.importance_sampling_mode} weighs what trainer and sampler disagree "
                "in, and old_logprobs=sampler has that in its ratios already: choose one."
            )
        assert self.loss  # which checks itself

    def _check_remedies(self) -> None:
        """Refuses combinations of which one half would silently do nothing, or what it does not say."""
        shaping = f"advantage_shaping={self.advantage_shaping}"
        for wrong, sentence in (
            (
                self.advantage_shaping == "routed" and not self.retries_learn_raw,
                f"{shaping} imitates retries on the raw prompt: choose hard_sampling=retry and retry_learns=raw.",
            ),
            (
                self.advantage_shaping == "successes" and not self.learns_elsewhere,
                f"{shaping} is of rollouts that are learned on another prompt than they were sampled on: choose "
                "hard_sampling=distill, or retry with retry_learns=raw.",
            ),
            (
                self.advantage_shaping == "zero-variance" and self.prompt_sampling == "dynamic",
                f"{shaping} learns from groups of equal reward, and prompt_sampling=dynamic drops them: choose one.",
            ),
            (
                self.hard_sampling == "retry" and self.demonstrations == "better",
                "hard_sampling=retry draws demonstrations anew for each step, and demonstrations=better verifies them "
                "before a round: choose hard_sampling=replace, add or distill, or leave it at random.",
            ),
            (
                self.self_exemplify and (self.imitates or self.hints),
                "self_exemplify=True wants examples before an answer, and sft_fraction, sft_coef and retry_with=hint "
                "show answers alone: leave them out.",
            ),
            (
                self.self_exemplify and self.reward != "exact",
                f"self_exemplify=True has a reward of its own: leave reward={self.reward} out.",
            ),
            (
                not self.sft_fraction and (self.sft_patience or self.sft_learning_rate),
                "sft_patience and sft_learning_rate are of supervised steps: give sft_fraction, the share of these.",
            ),
            (self.sft_decay and not self.sft_coef, "sft_decay lets sft_coef fall: give sft_coef, or leave it out."),
        ):
            if wrong:
                raise InputError(sentence)

    @property
    def loss(self) -> GRPOLossConfig:
        """The objective: every setting that it shares a name with."""
        shared = {each.name: getattr(self, each.name) for each in fields(GRPOLossConfig) if hasattr(self, each.name)}
        if self.importance_sampling_mode == "none":  # nothing is weighted without sampler_logprobs, whatever the mode
            del shared["importance_sampling_mode"]
        return GRPOLossConfig(**shared)

    @property
    def needs_reference(self) -> bool:
        """Whether the model before RL is kept: for the KL term, or because it is what verifies demonstrations."""
        cautious = self.demonstrations == "better" and self.verification == "cautious"
        return bool(self.beta) or (cautious and self.probes)

    def to_dict(self) -> dict:
        return asdict(self)
