"""Configuration of a run: all its settings, section by section.

Each field is a flag of ``toolx train`` and a YAML key, named as in TRL where TRL has it; each section is a group of
``toolx train --help``. A function takes the whole ``ToolExpanderConfig``, or the section that it needs.
"""

from __future__ import annotations

import datetime
import re
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Literal

from toolx_kernels.errors import InputError
from toolx_kernels.loss_config import GRPOLossConfig
from toolx_kernels.settings import LIMIT, NOT_NEGATIVE, POSITIVE, SECONDS, SHARE, Bounds, Settings, setting
from toolx_kernels.train.method_settings import (
    ColdStartSettings,
    HardSamplingSettings,
    ImitationSettings,
    LossSettings,
    RewardSettings,
)

if TYPE_CHECKING:  # it loads torch, which reading flags does without
    from toolx_kernels.engine.types import SamplingParams

BELOW_1 = Bounds("lie in [0, 1)", lambda value: 0 <= value < 1)
BY_SAMPLING = "SamplingParams checks it"
MOST_ROLLOUTS = 1 << 16  # of a step


@dataclass(kw_only=True)
class RunSettings(Settings):
    """Model, run folder, device."""

    model: str | None = setting(None, "tiny, smollm2-135m, a folder, a .gguf file, or a model on the Hugging Face hub")
    output_dir: str = setting("runs/train", "run folder: config, logs, curves and checkpoints")
    resume: bool = setting(
        False, "continue the run in the run folder from its last checkpoint, with the settings that it was started with"
    )
    overwrite: bool = setting(False, "delete the run in the run folder first")
    seed: int = setting(
        0, "seed of data, weights and sampling", bounds=Bounds("lie in [0, 2**32)", lambda seed: 0 <= seed < 2**32)
    )
    device: str = setting("auto", "auto, cpu, cuda, cuda:1, ...")
    dtype: Literal["float32", "bfloat16"] = setting("float32", "data type of the weights: float32 or bfloat16")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not re.fullmatch(r"auto|cpu|cuda(:[0-9]{1,2})?", self.device):
            raise InputError(f"device={self.device!r} is unknown: use auto, cpu, cuda or cuda:<number>.")
        if self.resume and self.overwrite:
            raise InputError("resume=True keeps the run that overwrite=True deletes: choose one.")


@dataclass(kw_only=True)
class DataSettings(Settings):
    """Rows to train on, to evaluate on and to demonstrate with."""

    dataset: str | None = setting(
        None,
        "training rows: builtin, builtin-facts or builtin-turns; or bfcl:<category>, seal-tools:<path>, a .jsonl, "
        ".json, .parquet or .csv file, a dataset on the Hugging Face hub, or several of these, separated by commas",
    )
    eval_dataset: str | None = setting(
        None, "evaluation rows, named as for --dataset (default: a held-out part of --dataset)"
    )
    demonstration_dataset: str | None = setting(None, "more rows to take demonstrations from, named as for --dataset")
    demonstrate_training_rows: bool = setting(
        True, "take demonstrations from the training rows; false: only from --demonstration_dataset"
    )
    calls: int | None = setting(
        None, "keep only rows whose answer has this many calls (default: all rows)", least=0, most=1000
    )
    train_rows: int | None = setting(None, "rows to train on (default: all; of the built-in tasks 640)", most=10**6)
    eval_rows: int | None = setting(None, "rows to evaluate on (default: all; of the built-in tasks 480)", most=10**6)
    eval_fraction: float = setting(
        0.2,
        "share of --dataset to hold out if there is no --eval_dataset",
        bounds=Bounds("lie between 0 and 1", lambda share: 0 < share < 1),
    )


@dataclass(kw_only=True)
class ChatSettings(Settings):
    """Chat template, and the format of tool calls."""

    tool_format: Literal["auto", "hermes", "llama3", "mistral", "mistral_args", "pythonic", "lfm2", "json"] = setting(
        "auto",
        "format of tool calls: hermes, llama3, mistral, mistral_args, pythonic, lfm2 or json; auto: the chat "
        "template's. Any other is described in the prompt (docs/tool_calls.md)",
    )
    chat_template_kwargs: dict | None = setting(
        None, """arguments of the chat template, as JSON: '{"enable_thinking": false}'"""
    )
    date: str | None = setting(
        None, "date shown by chat templates that have one, YYYY-MM-DD (default: the day on which the run began)"
    )
    overlong: Literal["error", "drop"] = setting(
        "error",
        "what to do if a prompt leaves no room for an answer in the model's context: error: refuse the "
        "dataset; drop: leave the row out",
    )

    def __post_init__(self) -> None:
        if isinstance(self.date, datetime.date):  # YAML makes one of a date
            self.date = str(self.date)
        super().__post_init__()


@dataclass(kw_only=True)
class RolloutSettings(Settings):
    """What a step samples, and how."""

    num_generations: int = setting(5, "completions per prompt: the group size G", most=4096)
    prompts_per_step: int = setting(8, "prompts per step", most=MOST_ROLLOUTS)
    prompt_sampling: Literal["epochs", "dynamic", "solve-rate"] = setting(
        "epochs",
        "epochs: every prompt once per epoch; dynamic: drop groups whose rewards are all equal, and fill the "
        "step up with the next prompts (DAPO); solve-rate: leave out most prompts that are nearly always or "
        "nearly never solved",
    )
    rollout_selection: Literal["all", "max-variance"] = setting(
        "all", "rollouts of a group to learn from: all; or max-variance: the half whose rewards differ most"
    )
    temperature: float = setting(0.7, "temperature of sampling, and of the log-probs in the loss", bounds=POSITIVE)
    top_k: int = setting(0, "sample from the K most likely tokens only; 0: off", unbounded=BY_SAMPLING)
    top_p: float = setting(
        1.0, "sample from the most likely tokens whose probabilities add up to this; 1: off", unbounded=BY_SAMPLING
    )
    min_p: float = setting(
        0.0,
        "sample only tokens that have this share of the most likely token's probability; 0: off",
        unbounded=BY_SAMPLING,
    )
    max_completion_length: int = setting(128, "tokens per completion; 128 are enough for a few calls", most=1 << 20)
    torch_compile: bool = setting(
        False, "compile the decode step of rollouts: takes a minute, and pays off in long runs on a GPU"
    )
    # only for a trainer that was given tools or an environment
    max_tool_calling_iterations: int = setting(
        4, "turns with tool calls per rollout, where there are tools to call", most=1000
    )
    tool_timeout: float = setting(10.0, "seconds allowed for one tool call", bounds=SECONDS)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_generations == 1:
            raise InputError("num_generations=1 has no siblings to compare with: GRPO needs at least 2.")
        if (rollouts := self.num_generations * self.prompts_per_step) > MOST_ROLLOUTS:
            raise InputError(
                f"num_generations={self.num_generations} and prompts_per_step={self.prompts_per_step} make "
                f"{rollouts:,} rollouts per step: lower one of them, to at most {MOST_ROLLOUTS:,} in all."
            )
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
    """Optimizer, its schedule, and when training ends."""

    optim: Literal["adamw", "adamw_8bit", "adamw_stochastic", "adamw_offload"] = setting(
        "adamw",
        "adamw: fp32 states, and fp32 master weights if the weights are bfloat16; adamw_8bit: 8-bit states "
        "(needs torchao); adamw_stochastic: bfloat16 weights with stochastic rounding in place of master "
        "weights; adamw_offload: fp32 master weights and states in CPU memory",
    )
    learning_rate: float = setting(1e-6, "learning rate in the first round", bounds=POSITIVE)
    lr_decay: float = setting(
        0.8,
        "factor on the learning rate from one round (or lr_decay_per) to the next",
        bounds=Bounds("lie in (0, 1]; 1 keeps the learning rate", lambda factor: 0 < factor <= 1),
    )
    lr_decay_per: Literal["round", "epoch", "step"] = setting(
        "round", "when the learning rate decays: after each round, epoch or step"
    )
    min_lr_rate: float = setting(0.0, "lowest learning rate, as a share of learning_rate", bounds=SHARE)
    adam_beta1: float = setting(0.9, "AdamW's decay of the mean gradient", bounds=BELOW_1)
    adam_beta2: float = setting(0.95, "AdamW's decay of the mean squared gradient", bounds=BELOW_1)
    adam_epsilon: float = setting(1e-8, "AdamW's addend to the denominator", bounds=POSITIVE)
    weight_decay: float = setting(0.0, "AdamW's weight decay", bounds=NOT_NEGATIVE)
    max_grad_norm: float = setting(1.0, "clip gradients to this norm", bounds=POSITIVE)
    num_train_epochs: int = setting(10, "passes over the training rows; 0: only the cold start", least=0)
    max_steps: int = setting(
        -1, "stop after N steps, or num_train_epochs if that is earlier; -1: no limit", bounds=LIMIT
    )
    max_tokens: int = setting(
        -1,
        "stop after N tokens: generated (including the method's probes) plus trained-on tokens; -1: no limit",
        bounds=LIMIT,
    )
    max_fe: int = setting(
        -1,
        "stop after N forward-equivalents: tokens read, plus tokens written, plus 3 times the tokens trained "
        "on (docs/remedies.md); -1: no limit",
        bounds=LIMIT,
    )
    micro_batch_tokens: int = setting(
        4096, "tokens per forward and backward pass; limits memory, does not change the gradient", most=1 << 20
    )
    gradient_checkpointing: bool = setting(
        False, "recompute the activations of each layer in the backward pass: less memory, a third more work"
    )


@dataclass(kw_only=True)
class AdapterSettings(Settings):
    """LoRA adapter."""

    use_peft: bool = setting(False, "train a LoRA adapter (needs peft) instead of all weights")
    lora_r: int = setting(16, "rank of the adapter", most=4096)
    lora_alpha: int = setting(32, "the adapter's output is scaled by lora_alpha / lora_r", least=1)
    lora_target_modules: list[str] | None = setting(
        None, "linear layers that get an adapter (default: all but the LM head)"
    )


@dataclass(kw_only=True)
class LogSettings(Settings):
    """Evaluation, logs, checkpoints."""

    eval_on_start: bool = setting(True, "evaluate before RL")
    eval_steps: int = setting(0, "evaluate every N steps, in addition to the start and the end; 0: only then", least=0)
    save_steps: int = setting(50, "save a checkpoint every N steps, in addition to the end", least=1)
    save_total_limit: int = setting(
        2, "checkpoints to keep; the first is also kept if it is needed (KL, cautious verification)", least=1
    )
    log_completions: int = setting(4, "completions per step to write to rollouts.jsonl", least=0)
    profile_step: int = setting(0, "optimizer step to record with torch's profiler, into trace.json; 0: none", least=0)


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
    """Settings of a ToolExpander run (arXiv 2510.07737).

    Number of rollouts, temperature, probe, learning rate, its decay and number of epochs default to the paper's values.
    Batch and completion length fit one small machine (the paper has 1024 prompts and 8192 tokens). Hard rows are
    retried, which differs from the paper (docs/records.md says why); the loss is that of the paper's self-exemplifying
    form (no KL, clip 0.2 / 0.26). ``toolx_kernels/configs`` has the paper's variants as recipes, with KL 1e-3 and clip
    0.2 / 0.2 where the paper has them; ``builtin.yaml`` there has the values for the built-in task's tiny model.

    Raises InputError for a value, or a combination of values, that cannot work.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        from_sampler = self.num_iterations > 1 and self.old_logprobs == "sampler"
        if self.learns_elsewhere and (from_sampler or self.importance_sampling_mode != "none"):
            mode = f"importance_sampling_mode={self.importance_sampling_mode}"
            which = "old_logprobs=sampler" if from_sampler else mode
            raise InputError(
                f"{which} compares log-probs on one prompt, but hard_sampling={self.hard_sampling} learns on another "
                "prompt than it samples from: choose hard_sampling=none, replace or add, or leave "
                f"{which.partition('=')[0]} out."
            )
        self._check_remedies()
        if from_sampler and self.importance_sampling_mode != "none":
            raise InputError(
                f"importance_sampling_mode={self.importance_sampling_mode} corrects for differences between trainer "
                "and sampler, which the ratios of old_logprobs=sampler contain already: choose one."
            )
        assert self.loss  # which checks itself

    def _check_remedies(self) -> None:
        """Refuses combinations in which a setting would do nothing, or not what its help says."""
        shaping = f"advantage_shaping={self.advantage_shaping}"
        for wrong, sentence in (
            (
                self.advantage_shaping == "routed" and not self.retries_learn_raw,
                f"{shaping} imitates retried rollouts on the raw prompt: choose hard_sampling=retry and "
                "retry_learns=raw.",
            ),
            (
                self.advantage_shaping == "successes" and not self.learns_elsewhere,
                f"{shaping} needs rollouts that are learned on another prompt than they were sampled from: choose "
                "hard_sampling=distill, or retry with retry_learns=raw.",
            ),
            (
                self.advantage_shaping == "zero-variance" and self.prompt_sampling == "dynamic",
                f"{shaping} learns from groups of equal reward, which prompt_sampling=dynamic drops: choose one.",
            ),
            (
                self.hard_sampling == "retry" and self.demonstrations == "better",
                "hard_sampling=retry draws demonstrations at each step, but demonstrations=better checks them before a "
                "round: choose hard_sampling=replace, add or distill, or demonstrations=random.",
            ),
            (
                self.self_exemplify and (self.imitates or self.hints),
                "self_exemplify=True asks for examples before the answer, but sft_fraction, sft_coef and "
                "retry_with=hint show answers alone: leave them out.",
            ),
            (
                self.self_exemplify and self.reward != "exact",
                f"self_exemplify=True has a reward of its own: leave reward={self.reward} out.",
            ),
            (
                self.reward_funcs is not None and self.reward != "exact",
                f"reward={self.reward} is a default reward, which reward_funcs replaces: choose one.",
            ),
            (
                not self.sft_fraction and (self.sft_patience or self.sft_learning_rate),
                "sft_patience and sft_learning_rate apply to supervised steps: set sft_fraction, their share.",
            ),
            (self.sft_decay and not self.sft_coef, "sft_decay lowers sft_coef: set sft_coef, or leave sft_decay out."),
        ):
            if wrong:
                raise InputError(sentence)

    @property
    def loss(self) -> GRPOLossConfig:
        """The objective, from the settings that have the same names."""
        shared = {each.name: getattr(self, each.name) for each in fields(GRPOLossConfig) if hasattr(self, each.name)}
        if self.importance_sampling_mode == "none":  # without sampler_logprobs nothing is weighted, whatever the mode
            del shared["importance_sampling_mode"]
        return GRPOLossConfig(**shared)

    @property
    def needs_reference(self) -> bool:
        """Whether the model before RL is kept: for the KL term, or to check demonstrations."""
        cautious = self.demonstrations == "better" and self.verification == "cautious"
        return bool(self.beta) or (cautious and self.probes)

    def to_dict(self) -> dict:
        return asdict(self)
