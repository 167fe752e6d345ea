"""The progress bar of a whole run, which moves in every phase and fits the terminal."""

import re

from transformers.utils import logging

from tests.test_progress import terminal
from tests.train.scripted import scripted_trainer
from toolx_kernels import progress


def test_the_bar_moves_in_every_phase_of_a_run(tmp_path, monkeypatch):
    monkeypatch.setattr(progress, "DELAY", 0)
    monkeypatch.setattr(progress, "SCREEN", 0)
    logging.enable_progress_bar()  # transformers' own, which a run silences
    trainer = scripted_trainer(
        tmp_path / "run",
        lambda row, help, index: help == "demonstrations" and index > 0,
        hard_sampling="replace",
        demonstrations="better",
        verification="bold",
        probe_rollouts=5,
        cold_start_steps=2,
        micro_batch_tokens=256,
        sft_fraction=0.4,
        max_steps=3,
        solved_reward=1.0,
    )
    with terminal(monkeypatch, 80) as seen:
        trainer.train()
    assert logging.is_progress_bar_enabled() and not any("shards" in frame for frame in seen.frames)
    assert all(len(frame) < 80 for frame in seen.frames)
    shown = {}
    for frame in seen.frames:
        for phase in ("cold start", "evaluation", "probe", "verification", "rollout", "update", "step"):
            if found := re.search(rf"{phase} +([\d/%]+)", frame):
                shown.setdefault(phase, []).append(found[1])
    assert {"0/2", "1/2", "2/2"} <= {*shown["cold start"]} and {"1/2", "2/2"} <= {*shown["evaluation"]}
    assert len({*shown["probe"]}) > 8 and len({*shown["verification"]}) > 5
    assert len({*shown["rollout"]}) > 5 and len({*shown["update"]}) > 1
    assert {"0/3", "1/3", "2/3", "3/3"} <= {*shown["step"]}
    supervised = [frame for frame in seen.frames if re.match(r"step 1/3 \|.*loss", frame)]
    assert supervised and seen.frames[-1].startswith("step 3/3 ")
    assert re.search(r"\| reward \d\.\d\d acc \d\.\d\d hard \d+ \d+ tok/s$", seen.frames[-1])
