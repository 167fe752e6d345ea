"""Forward-equivalents: reported compute compared with actual compute, and the probes that count."""

import pytest
import torch

from tests.train.scripted import PLACES, scripted_trainer
from tests.train.test_trainer import metrics
from toolx_kernels.train.rounds import PROBE_STREAM, RETRY_STREAM
from toolx_kernels.train.update.batch import PackedBatch
from toolx_kernels.train.verification import VERIFY_STREAM


def right(row, help, index):
    """Without help, a third of the rows is dead, a third live, a third solved."""
    kind = PLACES[row.id] % 3
    return kind == 2 or (kind == 1 or help != "raw") and index % 2 == 0


FEW = dict(num_generations=2, prompts_per_step=4, num_train_epochs=2, probe_rollouts=2, save_steps=50)


class Counted:
    """Counts the tokens that pass through a run's sampler and models.

    sampled  tokens by purpose; tool outputs are read, not written, which costs the same
    """

    def __init__(self, trainer, monkeypatch):
        self.trainer, self.sampled, self.forwards = trainer, {}, []
        roll_out, hidden = trainer.rollouter.roll_out, PackedBatch.hidden

        def counting(rows, prompts, n, params, **keywords):
            groups = roll_out(rows, prompts, n, params, **keywords)
            tokens = sum(map(len, prompts)) + sum(len(rollout.ids) for of in groups for rollout in of)
            purpose = self._purpose(params, keywords.get("step", 0))
            self.sampled[purpose] = self.sampled.get(purpose, 0) + tokens
            return groups

        def packed(batch, model):
            self.forwards.append((model is trainer.model, torch.is_grad_enabled(), batch.input_ids.numel()))
            return hidden(batch, model)

        trainer.rollouter.roll_out = counting
        monkeypatch.setattr(PackedBatch, "hidden", packed)

    def _purpose(self, params, stream):
        if params.temperature == 0:
            return "evaluation"
        if stream >= VERIFY_STREAM:
            return "verify"
        if stream >= PROBE_STREAM:
            return "measure" if stream - PROBE_STREAM > self.trainer.rounds.probed_round else "probe"
        return "retry" if stream >= RETRY_STREAM else "step"

    def trained(self, passes):
        """Tokens of forwards; those with a gradient count ``passes`` times, the reference and held-out checks once."""
        return sum(tokens * (passes if own and gradient else 1) for own, gradient, tokens in self.forwards)


RUNS = {
    "none": dict(hard_sampling="none"),
    "replace": dict(hard_sampling="replace"),
    "add, again": dict(hard_sampling="add", num_iterations=2),
    "distill, a reference": dict(hard_sampling="distill", beta=0.05, num_iterations=2),
    "verified": dict(hard_sampling="replace", demonstrations="better", verification="bold", demonstration_tries=1),
    "retry": dict(hard_sampling="retry", num_iterations=2, gradient_checkpointing=True),
    "hints": dict(
        hard_sampling="retry", retry_with="hint", retry_learns="shown", beta=0.05, gradient_checkpointing=True
    ),
    "half": dict(hard_sampling="retry", rollout_selection="max-variance", num_generations=4, denominator="live"),
    "beside": dict(hard_sampling="retry", sft_coef=0.1, num_iterations=2),
    "before": dict(hard_sampling="none", sft_fraction=0.6, prompts_per_step=6, sft_patience=2),
}


@pytest.mark.parametrize("name", RUNS)
def test_what_was_spent_is_what_was_computed(tmp_path, monkeypatch, name):
    settings = FEW | {"max_steps": 3} | RUNS[name]
    trainer = scripted_trainer(tmp_path / "run", right, tool=2, micro_batch_tokens=100_000, **settings)
    counted = Counted(trainer, monkeypatch)
    summary = trainer.train()
    of_method = ["step", "retry", "verify", *(["probe"] if trainer.rounds.policy.needs_probe else [])]
    spent = sum(counted.sampled.get(purpose, 0) for purpose in of_method)
    spent += counted.trained(4 if trainer.args.gradient_checkpointing else 3)
    assert summary["spent_fe"] == spent
    assert counted.sampled.keys() >= {"evaluation", "measure", "probe", "step"}
    assert ("retry" in counted.sampled) == (settings["hard_sampling"] == "retry")
    assert ("verify" in counted.sampled) == (name == "verified")
    assert any(not own for own, *_ in counted.forwards) == bool(trainer.args.beta)
    assert any(own and not gradient for own, gradient, _ in counted.forwards) == (name == "before")
    last = metrics(tmp_path / "run", ["step"])[-1]
    assert last["spent_fe"] == summary["spent_fe"] and last["spent_tokens"] == summary["spent_tokens"]
    read = sum(summary["prefilled"].get(purpose, 0) for purpose in of_method)
    written = sum(summary["tokens"].get(purpose, 0) for purpose in of_method)
    assert summary["spent_tokens"] == written + summary["trained_tokens"]
    assert (
        read > 0 and summary["spent_fe"] - spent + sum(counted.sampled.get(p, 0) for p in of_method) == read + written
    )


def test_how_updates_are_cut_and_what_came_before_rl_is_not_counted(tmp_path):
    """The cold start, evaluations and micro-batches leave the count unchanged."""
    settings = FEW | dict(hard_sampling="retry", beta=0.05, num_iterations=2, max_steps=1)
    whole = scripted_trainer(tmp_path / "whole", right, **settings).train()
    others = dict(micro_batch_tokens=60, cold_start_steps=1, eval_steps=1)
    cut = scripted_trainer(tmp_path / "cut", right, **settings | others).train()
    assert cut["spent_fe"] == whole["spent_fe"] and cut["spent_tokens"] == whole["spent_tokens"]


def test_the_step_that_reaches_max_fe_is_the_last(tmp_path):
    settings = FEW | dict(hard_sampling="replace", num_train_epochs=1)
    scripted_trainer(tmp_path / "run", right, **settings).train()
    spent = [step["spent_fe"] for step in metrics(tmp_path / "run", ["step"])]
    assert len(spent) == 3 and spent == sorted(set(spent))
    for budget, steps in ((spent[0], 1), (spent[0] + 1, 2)):
        name = str(budget)
        assert scripted_trainer(tmp_path / name, right, **settings | dict(max_fe=budget)).train()["steps"] == steps
        assert [step["spent_fe"] for step in metrics(tmp_path / name, ["step"])] == spent[:steps]


# ---- probed rounds


@pytest.mark.parametrize(
    ("settings", "rounds"),
    [
        (dict(hard_sampling="none"), [0, 1]),
        (dict(hard_sampling="retry"), [0, 1]),
        (dict(hard_sampling="none", probe_every=1), [0, 1, 2, 3, 4]),
        (dict(hard_sampling="replace"), [0, 1, 2, 3, 4]),
        (dict(hard_sampling="replace", probe_every=2), [0, 2, 3]),
        (dict(hard_sampling="retry", probe_every=3), [0, 3, 4]),
    ],
    ids=str,
)
def test_probes_come_as_often_as_they_are_needed(tmp_path, settings, rounds):
    """Four rounds of one step without a gradient; the last probe measures the rows of the first one again."""
    trainer = scripted_trainer(
        tmp_path / "run",
        lambda row, help, index: False,
        **FEW | dict(num_train_epochs=4, prompts_per_step=12) | settings,
    )
    trainer.train()
    lines = metrics(tmp_path / "run", ["probe", "step"])
    probes = [line for line in lines if line["event"] == "probe"]
    assert [line["round"] for line in probes] == rounds
    assert [line["step"] for line in probes] == [*rounds[:-1], 4]
    assert {line["rows"] for line in probes} == {12}


def test_a_probe_for_two_rounds_is_of_the_rows_of_both(tmp_path):
    """Each epoch of two steps leaves out two of the twelve rows, different ones each time."""

    def members(every, epochs):
        settings = FEW | dict(num_train_epochs=epochs, prompts_per_step=5, probe_every=every, hard_sampling="replace")
        trainer = scripted_trainer(tmp_path / "run", right, **settings)
        rounds = trainer.rounds
        used = [set(rounds.members(number)) for number in range(epochs)]
        found = rounds.begin_round()
        of_round = [found and set(found.tried)]
        shown = [len(rounds.table.demonstrations(row)) for row in range(12)]
        for _ in range(epochs * rounds.per_epoch - 1):
            rounds.next_groups()
            if rounds.at_round_start:
                found = rounds.begin_round()
                of_round.append(found and set(found.tried))
                assert found or [len(rounds.table.demonstrations(row)) for row in range(12)] == shown
        assert any(shown)
        return used, of_round

    used, of_round = members(2, 4)
    assert [len(rows) for rows in used] == [10] * 4 and used[0] != used[1]
    assert of_round == [used[0] | used[1], None, used[2] | used[3], None]
    used, of_round = members(2, 3)
    assert of_round == [used[0] | used[1], None, used[2]], "the last round has none behind it"
    used, of_round = members(1, 3)
    assert of_round == used


def test_a_probe_of_rows_that_a_smaller_run_skipped_is_counted_where_it_belongs(tmp_path):
    """Rows used only by the second round are probed on resuming a run that ended with the first, as part of probe 0."""
    settings = FEW | dict(prompts_per_step=5, probe_every=2, hard_sampling="replace", num_train_epochs=2)
    scripted_trainer(tmp_path / "run", right, **settings, max_steps=2).train()
    scripted_trainer(tmp_path / "run", right, **settings, max_steps=4, resume=True).train()
    probes = [line for line in metrics(tmp_path / "run", ["probe", "step"]) if line["event"] == "probe"]
    first, late, _ = probes
    assert (first["round"], first["rows"], first["step"]) == (0, 10, 0)
    assert (late["round"], late["rows"], late["step"]) == (0, 12, 2), "all of its round, those of before among them"
    assert late["hard"] >= first["hard"] > 0
