"""The learning record on a GPU: training subject to time, pairs and gates, on fake runs and a fake clock."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bench.gpu.runner import Bench, Fact, Journal, read_journal
from bench.learning import gpu
from bench.learning.gpu import Gates, Record, pass_gates, train_pairs
from tests.compare.cases import write_run
from toolx_kernels.cli.train import parse_train
from toolx_kernels.errors import InputError

NEVER = 10**6


class Clock:
    """A clock that advances by one second per ``sleep``."""

    def __init__(self):
        self.seconds = 0.0

    def monotonic(self):
        return self.seconds

    def sleep(self, seconds):
        self.seconds += 1


@pytest.fixture
def clock(monkeypatch):
    monkeypatch.setattr(gpu, "time", clock := Clock())
    return clock


class FakeJob:
    """A run that takes ``seconds`` and ends with ``code``."""

    def __init__(self, clock, seconds, code=0):
        ends = clock.seconds + seconds
        self.process = SimpleNamespace(poll=lambda: code if clock.seconds >= ends else None)
        self.ended = False

    def end(self):
        self.ended = True


def paired(clock, seconds, seeds, **settings):
    """The outcomes of pairs whose runs take ``seconds`` by seed, or (seconds, code), and their jobs."""
    told, jobs = {}, {}

    def begin(seed):
        of_seed = [each if isinstance(each, tuple) else (each, 0) for each in seconds[seed]]
        jobs[seed] = [FakeJob(clock, *each) for each in of_seed]
        return jobs[seed]

    train_pairs(seeds, begin, lambda seed, *what: told.update({seed: what}), **settings)
    return told, jobs


def test_a_pair_begins_only_if_the_time_of_the_longest_is_left(clock):
    told, jobs = paired(clock, {0: (10, 9), 1: (4, 8), 2: (1, 1), 3: (1, 1)}, range(4), at_once=1, deadline=27)
    assert told == {0: ("ok", 10), 1: ("ok", 8), 2: ("no time", 0), 3: ("no time", 0)}
    assert sorted(jobs) == [0, 1], "at second 18 there are 9 left, and the longest pair took 10"
    clock.seconds = 0
    known, jobs = paired(clock, {0: (4, 8)}, [0], at_once=1, deadline=27, longest=30.0)
    assert known == {0: ("no time", 0)} and not jobs, "an earlier call has measured a pair"


def test_as_many_pairs_run_at_once_as_there_is_room_for(clock):
    told, _ = paired(clock, dict.fromkeys(range(6), (10, 10)), range(6), at_once=3, deadline=35)
    assert clock.seconds == 20 and set(told.values()) == {("ok", 10)}


def test_half_a_pair_at_the_end_of_the_time_is_none(clock):
    told, jobs = paired(clock, {0: (5, 5), 1: (3, NEVER)}, range(2), at_once=1, deadline=12)
    assert told == {0: ("ok", 5), 1: ("incomplete", 7)}
    assert all(job.ended for job in jobs[1])


def test_a_run_that_fails_ends_its_partner_and_no_other_pair(clock):
    told, jobs = paired(clock, {0: (NEVER, (2, 1)), 1: (6, 6)}, range(2), at_once=1, deadline=50)
    assert told == {0: ("failed", 2), 1: ("ok", 6)} and jobs[0][0].ended


def test_an_interrupt_ends_all_runs(clock):
    jobs = [FakeJob(clock, NEVER), FakeJob(clock, NEVER)]

    def begin(seed):
        if seed:
            raise KeyboardInterrupt
        return jobs

    with pytest.raises(KeyboardInterrupt):
        train_pairs(range(2), begin, lambda *_: None, at_once=2, deadline=9)
    assert all(job.ended for job in jobs)


# ---- gates


@pytest.fixture
def bench(tmp_path):
    (tmp_path / "logs").mkdir()
    return Bench(torch.device("cpu"), True, tmp_path, tmp_path / "logs")


def journal_in(folder):
    return Journal(folder / "facts.jsonl", {})


def test_the_first_gate_that_does_not_hold_ends_it_all(bench, tmp_path):
    passed = []

    def gate(name, **found):
        return Fact(name, 0.1, lambda bench: passed.append(name) or found)

    def broken(bench):
        raise InputError("the model is in pieces")

    journal = journal_in(tmp_path)
    with pytest.raises(InputError, match=r"^step: the step has no gradient; so no arm is trained\.$"):
        gates = [gate("model"), gate("step", failures=["the step has no gradient"]), gate("answers")]
        pass_gates(gates, journal, bench, gpu.time.monotonic() + 9)
    assert passed == ["model", "step"]
    assert {name: line["status"] for name, line in journal.facts.items()} == {"model": "ok", "step": "failed"}
    with pytest.raises(InputError, match=r"model: InputError: the model is in pieces; so no arm"):
        pass_gates([Fact("model", 0.1, broken)], journal_in(tmp_path), bench, gpu.time.monotonic() + 9)
    with pytest.raises(InputError, match="room: there is no time for it"):
        pass_gates([Fact("room", 30, broken)], journal_in(tmp_path), bench, gpu.time.monotonic() + 9)


def record_in(folder, **settings):
    return Record(folder, folder / "bundle", "cpu", **settings)


@pytest.mark.parametrize(
    "told, failures",
    [
        ({"grad_norm": 0.2, "logp_difference": 0.4, "logp_difference_mean": 0.02}, []),
        ({"grad_norm": 0.0, "logp_difference": 0.4, "logp_difference_mean": 0.02}, ["the step has no gradient"]),
        (
            {"grad_norm": 0.2, "logp_difference": 0.4, "logp_difference_mean": 0.2},
            ["logp_difference_mean between sampler and learner is 0.2, more than 0.1"],
        ),
        (
            {"grad_norm": 0.2},
            ["logp_difference_mean between sampler and learner is nan, more than 0.1"],
        ),
    ],
)
def test_sampler_and_learner_agree_in_a_step_with_a_gradient(bench, tmp_path, told, failures):
    gates = Gates(record_in(tmp_path), "tiny", tmp_path / "run")
    step = {"loss": 0.1, "timing": {"seconds": 3.0}, **told}
    gates.trainer = SimpleNamespace(run=SimpleNamespace(start=lambda args: None), step=lambda: step)
    assert gates.step(bench)["failures"] == failures


@pytest.mark.parametrize("shown, holds", [(15, True), (16, False)])
def test_demonstrations_must_make_rows_less_hard(bench, tmp_path, shown, holds):
    """18 of 20 rows are hard without demonstrations."""
    gates = Gates(record_in(tmp_path), "tiny", tmp_path / "run")
    gates.drawn = [(("a row",), 0)] * 20

    def attempt(asked, n, first):
        hard = shown if asked[0][1] else 18
        return [row >= hard for row, _ in asked]

    gates.trainer = SimpleNamespace(collector=SimpleNamespace(attempt=lambda stream, purpose: attempt))
    found = gates.precondition(bench)
    assert (found["hard_raw"], found["hard_shown"], not found["failures"]) == (18, shown, holds)


# ---- a record


def test_arms_differ_in_the_method_alone_and_learn_other_rows_than_the_cold_start(tmp_path):
    record = record_in(tmp_path, more=["--max_fe", "5"])
    grpo, retry = (parse_train(record.flags(arm, 3)).to_dict() for arm in gpu.ARMS)
    differing = {name for name, value in grpo.items() if retry[name] != value}
    assert differing == {"output_dir", "hard_sampling"}
    assert (grpo["seed"], grpo["dtype"], grpo["max_fe"]) == (3, "bfloat16", 5)
    assert grpo["model"] == str(tmp_path / "cold-seed0")
    cold = parse_train(record.flags(gpu.COLD, 0))
    assert (cold.model, cold.num_train_epochs, cold.max_fe) == ("smollm2-135m", 0, 800000)
    assert [Path(settings).name for settings in (grpo["dataset"], cold.dataset)] == ["rl.jsonl", "cold.jsonl"]
    (tmp_path / "bundle" / "cold").mkdir(parents=True)
    assert record.cold == tmp_path / "bundle" / "cold", "a bundle's own comes first"


def test_whole_pairs_are_kept_and_the_same_command_goes_on(monkeypatch, tmp_path, bench, clock):
    started, endless = [], {"retry-seed1"}

    def job(command, bench):
        started.append(command)
        (arm, _, seed), folder = command.name.partition("-seed"), tmp_path / command.name
        shutil.rmtree(folder, ignore_errors=True)
        write_run(folder, int(seed), finished=command.name not in endless, hard_sampling=arm)
        return FakeJob(clock, NEVER if command.name in endless else 2)

    def train():
        started.clear()
        journal = journal_in(tmp_path)
        gpu.train(Record(tmp_path, None, "cpu", seeds=[0, 1]), tmp_path, journal, bench, clock.seconds + 10)
        runs = [run["run"] for run in json.loads((tmp_path / "runs.json").read_text())]
        return [command.name for command in started], runs, read_journal(journal.path)

    monkeypatch.setattr(gpu, "Job", job)
    monkeypatch.setattr(gpu, "prepare", lambda *_: 2)
    monkeypatch.setattr(gpu, "write_comparison", lambda folder, arms: compared.append(arms))
    monkeypatch.setattr(gpu, "describe", str)
    compared = []
    names, runs, facts = train()
    assert names == ["grpo-seed0", "retry-seed0", "grpo-seed1", "retry-seed1"]
    assert [facts[f"pair {seed}"]["status"] for seed in (0, 1)] == ["ok", "incomplete"]
    assert runs == ["grpo-seed0", "retry-seed0"] and (tmp_path / "grpo-seed1" / "summary.json").exists()
    assert [(arm.name, [run.seed for run in arm.runs]) for arm in compared[-1]] == [("grpo", [0]), ("retry", [0])]

    endless.clear()
    names, runs, facts = train()
    assert names == ["retry-seed1"] and "--resume" in started[0].command
    assert runs == ["grpo-seed0", "retry-seed0", "grpo-seed1", "retry-seed1"]
    assert [arm.name for arm in compared[-1]] == ["grpo", "retry"] and facts["pair 1"]["status"] == "ok"
    assert train()[0] == [] and len(compared[-1][0].runs) == 2


def test_no_gpu_is_said_and_no_cpu_taken_instead(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([str(tmp_path / "record"), "--toy"]) == 2
    assert "torch sees no GPU here; use --device cpu." in capsys.readouterr().err
    assert not (tmp_path / "record").exists()
