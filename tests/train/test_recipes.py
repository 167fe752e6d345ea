"""Recipes: the policies and settings that each chooses, and the exact resume of a stopped run."""

import signal
from importlib.resources import files
from types import SimpleNamespace

import pytest

from tests.train.scripted import PLACES, scripted_trainer
from tests.train.test_trainer import even_is_good, metrics
from toolx_kernels.cli.recipes import read_recipe
from toolx_kernels.cli.train import parse_train
from toolx_kernels.rollout.single_turn import SingleTurn
from toolx_kernels.train.policies.advantages import (
    GroupRelative,
    Routed,
    SuccessesOnly,
    ZeroVariance,
    chosen_advantage_shaper,
)
from toolx_kernels.train.policies.demonstrators import RandomDemonstrations, VerifiedDemonstrations
from toolx_kernels.train.policies.hard_samples import FewShot, PlainGRPO, chosen_hard_sample_policy
from toolx_kernels.train.policies.prompt_order import DynamicSampling, EpochOrder, SolveRateOrder, chosen_prompt_order
from toolx_kernels.train.policies.retry import Retry, ShowDemonstrations, ShowHint
from toolx_kernels.train.policies.selection import AllRollouts, MaxVariance, chosen_group_selector
from toolx_kernels.train.run.stopping import Stopped

ALL = sorted(file.name.removesuffix(".yaml") for file in (files("toolx_kernels") / "configs").iterdir())
PAPERS = dict(beta=1e-3, epsilon=0.2, epsilon_high=0.2, num_iterations=2, lr_decay=0.8)

# differences from GRPO by recipe: policies, settings
CHOICES = {
    "grpo": ({}, dict(lr_decay=1.0)),
    "replace": ({"hard": ("replace", RandomDemonstrations)}, {}),
    "replace-better": ({"hard": ("replace", VerifiedDemonstrations)}, dict(verification="cautious")),
    "add": ({"hard": ("add", RandomDemonstrations)}, {}),
    "distill": ({"hard": ("distill", RandomDemonstrations)}, {}),
    "distill-successes": ({"hard": ("distill", RandomDemonstrations), "shaper": SuccessesOnly}, {}),
    "retry": ({"hard": ("raw", ShowDemonstrations)}, {}),
    "retry-shown": ({"hard": ("shown", ShowDemonstrations)}, {}),
    "retry-hint": ({"hard": ("raw", ShowHint)}, {}),
    "retry-successes": ({"hard": ("raw", ShowDemonstrations), "shaper": SuccessesOnly}, {}),
    "routed": ({"hard": ("raw", ShowDemonstrations), "shaper": Routed}, {}),
    "sft": ({}, dict(sft_fraction=1.0, sft_patience=2, beta=0.0, num_iterations=1, lr_decay=1.0, epsilon_high=0.26)),
    "sft-grpo": ({}, dict(sft_fraction=0.2)),
    "sft-retry": ({"hard": ("raw", ShowDemonstrations)}, dict(sft_fraction=0.2)),
    "imitate": ({}, dict(sft_coef=0.1, sft_decay=True)),
    "zero-variance": ({"shaper": ZeroVariance}, {}),
    "max-variance": ({"order": SolveRateOrder, "selector": MaxVariance}, {}),
    "dapo": ({"order": DynamicSampling}, dict(loss_type="dapo", beta=0.0, epsilon_high=0.28, lr_decay=1.0)),
    "similarity": ({}, dict(reward="similarity")),
}
OF_THE_METHOD = {
    "sft_fraction": 0.0, "sft_patience": 0, "sft_coef": 0.0, "sft_decay": False, "reward": "exact", "loss_type": "grpo",
    "self_exemplify": False, "denominator": "all", "solved_reward": 1.0, "probe_every": None, **PAPERS,
}  # fmt: skip


def test_every_recipe_is_looked_at():
    others = {"builtin", "builtin-facts", "builtin-turns", "self-exemplify", "self-exemplify-replace"}
    assert {*CHOICES} == {*ALL} - others


@pytest.mark.parametrize("name", CHOICES)
def test_a_recipe_chooses_what_it_is_named_for(name):
    args = parse_train(["--config", name])
    chosen, settings = CHOICES[name]
    assert {key: getattr(args, key) for key in OF_THE_METHOD} == OF_THE_METHOD | {
        key: value for key, value in settings.items() if key in OF_THE_METHOD
    }
    assert all(getattr(args, key) == value for key, value in settings.items())

    hard = chosen_hard_sample_policy(args, None, SimpleNamespace(fitting=len, hint=len), None)
    if "hard" not in chosen:
        assert type(hard) is PlainGRPO
    elif isinstance(hard, FewShot):
        assert (hard.form, type(hard.demonstrator)) == chosen["hard"] and hard.needs_probe
    else:
        assert isinstance(hard, Retry) and not hard.needs_probe
        assert (hard.learns, type(hard.helper)) == chosen["hard"]
    assert type(chosen_prompt_order(args, 12)) is chosen.get("order", EpochOrder)
    assert type(chosen_group_selector(args)) is chosen.get("selector", AllRollouts)
    shaper = chosen_advantage_shaper(args)
    assert type(shaper) is chosen.get("shaper", GroupRelative)
    assert getattr(shaper, "of", shaper) == GroupRelative("group", 0.1)


@pytest.mark.parametrize("name", ALL)
def test_a_recipe_that_names_a_clip_takes_the_updates_in_which_it_acts(name):
    settings = read_recipe(name).settings
    if {"epsilon", "epsilon_high", "delta"} & settings.keys():
        assert settings["num_iterations"] == 2


# ---- stopped and resumed runs


def right(row, help, index):
    """Without help, a third of the rows is dead, a third live, a third solved."""
    kind = PLACES[row.id] % 3
    return kind == 2 or (kind == 1 or help != "raw") and index % 2 == 0


def made(folder, name, engine, **settings):
    own = read_recipe(name).settings | dict(
        num_generations=4 if name == "max-variance" else 2,
        prompts_per_step=2,
        num_train_epochs=20,
        max_steps=10,
        probe_rollouts=1,
        save_steps=50,
    )
    own |= dict(cold_start_steps=0, log_completions=16, **settings)
    if not engine:
        return scripted_trainer(folder, right, **own)
    reward = None if name == "similarity" else even_is_good
    trainer = scripted_trainer(folder, right, reward, **own | dict(solved_reward=0.6, max_completion_length=6))
    trainer.rollouter = trainer.collector.rollouter = SingleTurn(trainer.engine, trainer.task.prompts.chat)
    return trainer


def stopped_after(trainer, steps):
    step = trainer.step

    def stepping():
        told = step()
        if trainer.rounds.step == steps:
            trainer.stop.requested = signal.SIGTERM
        return told

    trainer.step = stepping
    with pytest.raises(Stopped):
        trainer.train()
    assert trainer.rounds.step == steps


def left(folder):
    """Log lines, texts and tensors that a run leaves."""
    tensors = sorted((folder / "checkpoint-10").glob("*.safetensors"))
    assert [path.name for path in tensors] == ["model.safetensors", "optimizer.safetensors"]
    texts = [
        (folder / name).read_text() for name in ("rollouts.jsonl", "hard_samples.jsonl") if (folder / name).exists()
    ]
    lines = metrics(folder, ("data", "probe", "step", "sft", "eval"))
    return lines, texts, [path.read_bytes() for path in tensors]


# one recipe for each policy that a resumed run could get wrong
RESUMED = {"grpo", "replace-better", "distill", "retry", "retry-hint", "routed", "max-variance", "imitate", "sft-retry"}


@pytest.mark.parametrize(
    ("name", "engine"),
    [pytest.param(name, False, marks=() if name in RESUMED else pytest.mark.soak) for name in CHOICES]
    + [pytest.param(name, True, marks=() if name == "retry" else pytest.mark.soak) for name in CHOICES],
)
def test_ten_steps_are_five_and_five(tmp_path, name, engine):
    """Also with a scripted sampler, whose rollouts depend on all state except the weights."""
    made(tmp_path / "whole", name, engine).train()
    stopped_after(made(tmp_path / "halves", name, engine), 5)
    made(tmp_path / "halves", name, engine, resume=True).train()
    whole, halves = left(tmp_path / "whole"), left(tmp_path / "halves")
    assert halves[0] == whole[0] and halves[1:] == whole[1:]
    steps = [line for line in whole[0] if line["event"] in ("step", "sft")]
    assert [line["step"] for line in steps] == list(range(1, 11))
    probe = next(line for line in whole[0] if line["event"] == "probe")
    assert engine or 0 < probe["hard"] < probe["rows"]
    assert sum(line["grad_norm"] > 0 for line in steps) > 5
    assert read_recipe(name).settings["hard_sampling"] != "retry" or sum(line.get("revived", 0) for line in steps) > 0
