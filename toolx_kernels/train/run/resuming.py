"""Resuming: everything that a run must share with its checkpoint, checked before anything changes."""

from __future__ import annotations

from transformers import PreTrainedModel

from toolx_kernels.errors import InputError
from toolx_kernels.train.config import ToolExpanderConfig
from toolx_kernels.train.run.checkpoint import Checkpoint, check_reference, resumable_checkpoint
from toolx_kernels.train.run.folder import LOGS, NOTHING, RunFolder, check_same_settings
from toolx_kernels.train.task import Task


def checkpoint_to_resume(
    run: RunFolder, model: PreTrainedModel, args: ToolExpanderConfig, task: Task
) -> Checkpoint | None:
    """Reads the run's last checkpoint; None if the run was interrupted before its first.

    Raises InputError: the checkpoint is damaged or beyond ``max_steps``, or of another model, other settings, rows,
    prompts or reward functions, or of another step than its name says.
    """
    checkpoint = resumable_checkpoint(run.path, model)
    if checkpoint:
        if args.needs_reference:
            why = f"beta={args.beta}" if args.beta else "verification='cautious'"
            check_reference(run.path / "checkpoint-0", why)
        check_same_settings(checkpoint.path, checkpoint.state["settings"], args)
        task.check_same(run.path, checkpoint.state["data"])
        step = checkpoint.state["rounds"]["step"]
        if int(checkpoint.path.name.partition("-")[2]) != step:
            raise InputError(f"{checkpoint.path} was written at step {step}: give it back its name, or remove it.")
        if 0 < args.max_steps < step:
            raise InputError(
                f"max_steps={args.max_steps} is less than the {step} steps of {checkpoint.path}: allow as many or more."
            )
    return checkpoint


def rewind(run: RunFolder, checkpoint: Checkpoint | None) -> str:
    """Drops what was logged after the checkpoint; returns a line for the screen that says what is repeated.

    Raises InputError: a log is damaged before that place; then nothing is changed.
    """
    repeated = run.forget_after(checkpoint.state["reporter"]["marks"] if checkpoint else dict.fromkeys(LOGS, NOTHING))
    start = f"from {checkpoint.path.name}" if checkpoint else "from the start, as nothing was saved yet"
    return f"resuming {start}" + (f", repeating {repeated}" if repeated else "")
