"""Every setting of a run. Each field is a flag of ``toolx train`` and a YAML key; names are TRL's where TRL has one."""

from __future__ import annotations

import math
import re
from dataclasses import asdict, dataclass, field
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from toolx_kernels.engine.types import SamplingParams
from toolx_kernels.errors import InputError
from toolx_kernels.loss_config import GRPOLossConfig


def setting(default, help: str):
    return field(default=default, metadata={"help": help})


@dataclass(slots=True)
class ToolExpanderConfig:
    """A ToolExpander run (arXiv 2510.07737).

    Rollouts, temperature, probe, learning rate, its decay and the number of epochs are the paper's. Batch and
    completion length fit one small machine (the paper has 1024 prompts and 8192 tokens). The loss is that of its
    self-exemplifying form (no KL, clip 0.2 / 0.26) also where hard rows are replaced, for which the paper has KL 1e-3
    and clip 0.2 / 0.2. ``toolx_kernels/configs/builtin.yaml`` holds the values for the built-in task's tiny model.
    """

    # what is trained, on what, and where it goes
    model: str | None = setting(None, "tiny (the default), smollm2-135m, a folder, a .gguf file, or a hub name")
    dataset: str | None = setting(
        None,
        "builtin (the default), bfcl:<category>, seal-tools:<path>, a .jsonl path or a hub name; or several, by commas",
    )
    eval_dataset: str | None = setting(None, "as --dataset; by default a held-out part of --dataset")
    demonstration_dataset: str | None = setting(
        None, "as --dataset: more rows that demonstrations are taken from, besides the training rows"
    )
    output_dir: str = setting("runs/train", "the run folder")
    resume: bool = setting(False, "go on from the last checkpoint in the run folder")
    overwrite: bool = setting(False, "delete the run that the run folder holds")
    seed: int = setting(0, "of data, weights and sampling")
    device: str = setting("auto", "auto, cpu, cuda, cuda:1, ...")
    dtype: Literal["float32", "bfloat16"] = setting("float32", "of the weights")
    calls: int | None = setting(None, "only rows with so many calls in their answer")
    train_rows: int | None = setting(None, "rows to train on; all of the dataset's by default, 640 of builtin")
    eval_rows: int | None = setting(None, "held-out rows to evaluate on; all by default, 480 of builtin")
    eval_fraction: float = setting(0.2, "share of --dataset held out when there is no --eval_dataset")

    # rollouts
    num_generations: int = setting(5, "completions per prompt, G")
    prompts_per_step: int = setting(8, "prompts in one optimizer step")
    temperature: float = setting(0.7, "of sampling, and of the loss")
    top_k: int = setting(0, "0 is off")
    top_p: float = setting(1.0, "1.0 is off")
    min_p: float = setting(0.0, "0.0 is off")
    max_completion_length: int = setting(128, "tokens; room for a few calls")
    torch_compile: bool = setting(False, "of rollouts' decode steps: takes a minute, pays off in long runs on a GPU")

    # dynamic multi-round hard sampling
    hard_sampling: Literal["replace", "add", "distill", "none"] = setting(
        "replace",
        "hard prompts get demonstrations for a round: instead of the raw prompt (replace), besides it (add), or "
        "besides it with the loss on the raw prompt (distill); none: plain GRPO, whose hard prompts are only counted",
    )
    probe_rollouts: int = setting(10, "rollouts that decide whether a prompt is hard")
    epochs_per_round: int = setting(1, "passes over the training rows between two probes")
    few_shots_per_tool: int = setting(1, "demonstrations per offered tool")
    max_few_shots: int = setting(3, "demonstrations per prompt")
    demonstrations: Literal["random", "better"] = setting(
        "random", "better: drawn again until they make a model answer correctly; where none do, the prompt stays raw"
    )
    verification: Literal["cautious", "bold"] = setting(
        "cautious", "of better demonstrations: by the model before RL (cautious) or the present one (bold)"
    )
    demonstration_tries: int = setting(4, "draws of better demonstrations per row and round")
    verify_rollouts: int = setting(4, "rollouts that verify a draw; the first correct one ends them")

    # self-exemplifying thinking
    self_exemplify: bool = setting(
        False, "the model writes examples of its own and thinks before it answers; its reward rewards the examples"
    )
    distinct_examples: bool = setting(
        True, "duplicates and trivial edits of one another count as one example; false judges by parse and count alone"
    )

    # which prompts a step learns from
    prompt_sampling: Literal["epochs", "dynamic"] = setting(
        "epochs", "dynamic: groups of equal reward are dropped and the step filled up with the next prompts (DAPO)"
    )

    # tool use in several turns: only for a trainer that was given tools or an environment
    max_tool_calling_iterations: int = setting(4, "turns with calls in one rollout")
    tool_timeout: float = setting(10.0, "seconds that one tool call may take")

    # rewards
    reward_weights: list[float] | None = setting(None, "one per reward function; all 1 by default")
    reward_timeout: float = setting(60.0, "seconds that one call of a reward function may take")

    # the loss
    loss_type: Literal["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo"] = setting(
        "grpo", "the objective, and how token losses are averaged"
    )
    epsilon: float = setting(0.2, "lower clip")
    epsilon_high: float | None = setting(0.26, "upper clip")
    delta: float | None = setting(None, "two-sided clip")
    beta: float = setting(0.0, "weight of the KL to the model before RL; 0 needs no reference model")
    scale_rewards: Literal["group", "batch", "none"] = setting("group", "whose std divides the advantages")
    min_reward_std: float = setting(
        0.1,
        "the least std of a group that divides advantages, so that a bonus of 0.01 stays small; 0: none (0 / 1 rewards "
        "of up to 100 rollouts never have less)",
    )
    advantage_shaping: Literal["group", "difficulty"] = setting(
        "group", "difficulty: weighted by how middling a prompt's difficulty is (Observe-R1)"
    )
    importance_sampling_level: Literal["token", "sequence"] = setting("token", "sequence is GSPO")

    # updates from one batch
    num_iterations: int = setting(1, "updates from one batch; with 1 the ratio is exactly 1 and no old log-probs exist")
    old_logprobs: Literal["trainer", "sampler"] = setting(
        "trainer",
        "what ratios start from where a batch has several updates: the log-probs of the first update's own forward, or "
        "those that the sampler reported",
    )
    importance_sampling_mode: Literal["none", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask"] = (
        setting("none", "weights for what trainer and sampler disagree in, cut or left out beyond the cap")
    )
    importance_sampling_cap: float = setting(2.0, "largest of these weights")

    # the optimizer
    optim: Literal["adamw", "adamw_8bit", "adamw_stochastic", "adamw_offload"] = setting(
        "adamw",
        "adamw: fp32 states, for bfloat16 weights also fp32 masters; adamw_8bit: 8-bit states (torchao); "
        "adamw_stochastic: bfloat16 weights rounded stochastically instead of masters; adamw_offload: "
        "fp32 masters and states in the CPU's memory",
    )
    gradient_checkpointing: bool = setting(
        False, "activations of each layer are computed again in the backward pass: less memory, a third more work"
    )
    use_peft: bool = setting(False, "train a LoRA adapter (peft) instead of the weights")
    lora_r: int = setting(16, "rank of the adapter")
    lora_alpha: int = setting(32, "its output is scaled by lora_alpha / lora_r")
    lora_target_modules: list[str] | None = setting(None, "linear layers with an adapter; all but the head by default")
    learning_rate: float = setting(1e-6, "of the first round")
    lr_decay: float = setting(0.8, "factor on the learning rate from one round (or lr_decay_per) to the next")
    lr_decay_per: Literal["round", "epoch", "step"] = setting("round", "when the learning rate decays")
    min_lr_rate: float = setting(0.0, "floor of the learning rate, as a share of learning_rate")
    adam_beta1: float = setting(0.9, "AdamW")
    adam_beta2: float = setting(0.95, "AdamW")
    adam_epsilon: float = setting(1e-8, "AdamW")
    weight_decay: float = setting(0.0, "AdamW")
    max_grad_norm: float = setting(1.0, "gradients are clipped to this norm")
    num_train_epochs: int = setting(10, "passes over the training rows; 0: only the cold start")
    max_steps: int = setting(-1, "stop after so many optimizer steps; -1: after num_train_epochs")
    max_tokens: int = setting(
        -1, "stop after so many tokens: all generated ones, of probes that the method needs too, and all trained on"
    )
    micro_batch_tokens: int = setting(4096, "tokens in one forward and backward; bounds memory, not the gradient")

    # the supervised cold start before RL
    cold_start_steps: int = setting(0, "supervised steps on the answers before RL")
    cold_start_batch_size: int = setting(24, "examples per step")
    cold_start_learning_rate: float = setting(1e-5, "its peak")
    cold_start_demonstrations: float = setting(0.3, "share of examples that show demonstrations (builtin has its own)")
    cold_start_self_exemplify: float = setting(0.0, "share of examples in the self-exemplifying form")

    # evaluation, logs, checkpoints
    eval_on_start: bool = setting(True, "evaluate before RL")
    eval_steps: int = setting(0, "evaluate every so many steps besides the beginning and the end; 0: not")
    save_steps: int = setting(50, "checkpoint every so many steps besides the end")
    save_total_limit: int = setting(2, "checkpoints kept; the first too where it is needed (KL, cautious verification)")
    log_completions: int = setting(4, "completions per step written to rollouts.jsonl")
    profile_step: int = setting(0, "the optimizer step of which a torch profiler trace is written; 0: none")

    def __post_init__(self):
        for name, kind in get_type_hints(type(self)).items():
            setattr(self, name, _of_kind(name, getattr(self, name), kind))
        at_least_one = (
            "num_generations", "prompts_per_step", "max_completion_length", "probe_rollouts", "epochs_per_round",
            "micro_batch_tokens", "cold_start_batch_size", "save_steps", "save_total_limit",
            "few_shots_per_tool", "max_few_shots", "demonstration_tries", "verify_rollouts",
            "max_tool_calling_iterations", "num_iterations", "lora_r", "lora_alpha",
        )  # fmt: skip
        for name in at_least_one:
            if getattr(self, name) < 1:
                raise InputError(f"{name}={getattr(self, name)} must be at least 1.")
        for name in ("train_rows", "eval_rows"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise InputError(f"{name}={getattr(self, name)} must be at least 1.")
        not_negative = (
            "num_train_epochs", "cold_start_steps", "eval_steps", "log_completions", "weight_decay", "profile_step",
        )  # fmt: skip
        for name in not_negative:
            if getattr(self, name) < 0:
                raise InputError(f"{name}={getattr(self, name)} must not be negative.")
        positive = (
            "learning_rate", "cold_start_learning_rate", "adam_epsilon", "max_grad_norm", "temperature", "tool_timeout",
            "reward_timeout", "importance_sampling_cap",
        )  # fmt: skip
        for name in positive:
            if not 0 < getattr(self, name) < math.inf:
                raise InputError(f"{name}={getattr(self, name)} must be positive and finite.")
        for name in ("adam_beta1", "adam_beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise InputError(f"{name}={getattr(self, name)} must lie in [0, 1).")
        for name in ("cold_start_demonstrations", "cold_start_self_exemplify", "min_lr_rate"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"{name}={getattr(self, name)} must lie in [0, 1].")
        if not 0 <= self.min_reward_std < math.inf:
            raise InputError(f"min_reward_std={self.min_reward_std} must be a number that is not negative.")
        if not 0 <= self.seed < 2**32:
            raise InputError(f"seed={self.seed} must lie in [0, 2**32).")
        if not 0 < self.lr_decay <= 1:
            raise InputError(f"lr_decay={self.lr_decay} must lie in (0, 1]; 1 keeps the learning rate.")
        if not 0 < self.eval_fraction < 1:
            raise InputError(f"eval_fraction={self.eval_fraction} must lie between 0 and 1.")
        if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", self.device):
            raise InputError(f"device={self.device!r} is unknown: use auto, cpu, cuda or cuda:<number>.")
        if self.num_generations == 1:
            raise InputError("num_generations=1 has no siblings to compare with: GRPO needs at least 2.")
        for name in ("max_steps", "max_tokens"):
            if getattr(self, name) == 0 or getattr(self, name) < -1:
                raise InputError(f"{name}={getattr(self, name)} must be -1 (no limit) or at least 1.")
        from_sampler = self.num_iterations > 1 and self.old_logprobs == "sampler"
        if self.hard_sampling == "distill" and (from_sampler or self.importance_sampling_mode != "none"):
            mode = f"importance_sampling_mode={self.importance_sampling_mode}"
            which = "old_logprobs=sampler" if from_sampler else mode
            raise InputError(
                f"{which} compares log-probs on one prompt, and hard_sampling=distill samples on another one than it "
                "learns on: leave it at its default there."
            )
        if from_sampler and self.importance_sampling_mode != "none":
            raise InputError(
                f"importance_sampling_mode={self.importance_sampling_mode} weighs what trainer and sampler disagree "
                "in, and old_logprobs=sampler has that in its ratios already: choose one."
            )
        if self.resume and self.overwrite:
            raise InputError("resume and overwrite contradict each other: choose one.")
        self.loss, self.sampling()  # noqa: B018 (they check themselves)

    def sampling(self, stop_token_ids: tuple[int, ...] = (), greedy: bool = False) -> SamplingParams:
        return SamplingParams(
            max_new_tokens=self.max_completion_length,
            temperature=0.0 if greedy else self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            stop_token_ids=stop_token_ids,
        )

    @property
    def loss(self) -> GRPOLossConfig:
        return GRPOLossConfig(
            loss_type=self.loss_type,
            epsilon=self.epsilon,
            epsilon_high=self.epsilon_high,
            delta=self.delta,
            beta=self.beta,
            temperature=self.temperature,
            importance_sampling_level=self.importance_sampling_level,
            # without sampler_logprobs nothing is weighted, whatever the mode
            importance_sampling_mode=(
                "token_truncate" if self.importance_sampling_mode == "none" else self.importance_sampling_mode
            ),
            importance_sampling_cap=self.importance_sampling_cap,
            scale_rewards=self.scale_rewards,
            max_completion_length=self.max_completion_length,
        )

    @property
    def needs_reference(self) -> bool:
        """Whether the model before RL is kept: for the KL term, or because it is what verifies demonstrations."""
        cautious = self.demonstrations == "better" and self.verification == "cautious"
        return bool(self.beta) or (cautious and self.hard_sampling != "none")

    def to_dict(self) -> dict:
        return asdict(self)


def _of_kind(name: str, value: Any, kind: Any) -> Any:
    """``value`` as the field's type, or InputError; YAML reads 5e-4 as text, so numbers may be text."""
    allowed = get_args(kind)
    if get_origin(kind) is Literal:
        if value not in allowed:
            raise InputError(f"{name}={value!r} is unknown: choose one of {', '.join(allowed)}.")
        return value
    if value is None and NoneType in allowed:
        return None
    (wanted,) = set(allowed or (kind,)) - {NoneType} if get_origin(kind) is not list else (kind,)
    if get_origin(wanted) is list:
        if not isinstance(value, list) or not value:
            raise InputError(f"{name}={value!r} must be a list, one item after the other.")
        return [_of_kind(name, item, get_args(wanted)[0]) for item in value]
    if wanted is float and isinstance(value, int | str) and not isinstance(value, bool):
        try:
            value = float(value)
        except (ValueError, OverflowError):
            pass
    if type(value) is not wanted:
        words = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
        raise InputError(f"{name}={value!r} must be {words[wanted]}.")
    return value
