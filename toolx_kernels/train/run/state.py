"""Where a run stands, as a checkpoint keeps it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from toolx_kernels.errors import InputError
from toolx_kernels.train.config import ToolExpanderConfig
from toolx_kernels.train.run.checkpoint import check_whole


@dataclass(slots=True)
class RunState:
    """What a checkpoint keeps besides weights and optimizer."""

    step: int = 0  # optimizer steps done
    batch: int = 0  # batches of prompts drawn, one a step unless groups are dropped and filled up
    round: int = -1  # round whose probe was done last
    evaluated: int = 0  # the last step that was evaluated between beginning and end
    settings: dict = field(default_factory=dict)  # that a resumed run must share
    data: dict[str, str] = field(default_factory=dict)  # digests of the rows, by what they are for
    table: list[dict] = field(default_factory=list)  # of HardSamples
    schedule: dict = field(default_factory=dict)  # of ExponentialDecay
    hard_before: int | None = None
    eval_before: float | None = None
    tokens: dict[str, int] = field(default_factory=dict)  # written, by purpose
    trained_tokens: int = 0
    unrewarded: int = 0
    seconds: float = 0.0
    phases: dict[str, float] = field(default_factory=dict)  # seconds of each
    peaks: dict[str, int] = field(default_factory=dict)  # bytes of memory of each
    token_budget: int = 0  # of micro-batches, smaller than the setting once memory ran out
    lines: dict[str, int] = field(default_factory=dict)  # of the logs when the checkpoint was written

    def to_dict(self) -> dict:
        return {name: getattr(self, name) for name in self.__dataclass_fields__}

    def check_data(self, run: Path, data: dict[str, str]) -> None:
        """Raises InputError when the run was on other rows than those of these digests."""
        for name, digest in data.items():
            if self.data[name] != digest:
                raise InputError(f"{run} was run on other {name}: resume with the same, or start another run.")


def check_reference(checkpoint: Path, args: ToolExpanderConfig) -> None:
    """Raises InputError when ``checkpoint``, the model before RL, is needed by a resumed run and cannot be read."""
    if not args.needs_reference:
        return
    why = f"beta={args.beta}" if args.beta else "verification='cautious'"
    if not checkpoint.exists():
        raise InputError(f"{why} needs {checkpoint}, and it is gone: start anew.")
    try:
        check_whole(checkpoint)
    except InputError as error:
        raise InputError(f"{error}, and {why} needs it: put it back, or start anew.") from None
