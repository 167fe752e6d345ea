"""The step benchmark on tiny models: both sides get the same work and make the same update from it."""

import csv
import json
import multiprocessing
import os
from dataclasses import asdict, replace
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch

from bench.common.absent import Absent
from bench.common.tables import rows_in
from bench.step.cases import SETTINGS, Case, Count, Settings, make_rows
from bench.step.measure import Worker, check_work, figures, measure, work
from bench.step.providers import TRL, StepProvider, Toolx, ToolxCheckpointing, TRLCheckpointing
from bench.step.report import REPORT, series
from bench.step.test_step import cases, scaled
from tests.ops.cases import DEVICE
from toolx_kernels.models.load import load_model
from toolx_kernels.models.tiny import tiny_tokenizer
from toolx_kernels.rollout.rollout import Rollout
from toolx_kernels.toolcall.chat import Chat

TINY = Case("tiny", 2, 120, 4, 6)
needs_trl = pytest.mark.skipif(find_spec("trl") is None, reason="trl is not installed")

CHAT = Chat(tiny_tokenizer())


def test_prompts_are_as_long_as_the_case_says_and_new_in_each_step():
    case = replace(TINY, prompts=3, rounds=2)
    rows = make_rows(case, CHAT)
    lengths = [len(CHAT.prompt_ids(row)) for row in rows]
    assert len(rows) == 9 and len({row.messages[0]["content"] for row in rows}) == 9
    for length, wanted in zip(lengths, [115, 120, 125] * 3, strict=True):
        assert wanted - 4 <= length <= wanted  # a word has several tokens
    assert rows == make_rows(case, CHAT)
    assert max(lengths[at] for at in range(3)) + case.n * case.new <= case.group_tokens


def test_a_count_holds_what_the_model_was_trained_on_and_what_was_rewarded():
    case = replace(TINY, dead=0.5)
    count, (model, _) = Count(case, [10, 20, 1000, 1000]), load_model("tiny", device=str(DEVICE))
    count.watch(model)
    count.begin()
    ids = torch.ones(2, 7, dtype=torch.int64, device=DEVICE)
    with torch.no_grad():
        model(ids)
    model(input_ids=ids)
    model(ids[:1])
    rewards = count.reward(prompts=[], completions=[], completion_ids=[[5] * n for n in range(1, 9)], other=[])
    record = count.end()
    assert rewards == record["rewards"] == [0, 0, 0, 0, 0, 1, 0, 1]
    assert record["lengths"] == list(range(1, 9)) and record["trained_tokens"] == 21
    assert record["unshared_tokens"] == 4 * 10 + 4 * 20 + 36 and record["shared_tokens"] == 20 + 26
    assert 0 < record["rollout_s"] < record["step_s"]


class Given:
    """A sampler that returns prepared completions."""

    def __init__(self, completions, engine):
        self.completions, self.engine = completions, engine

    def roll_out(self, rows, prompts, n, params, **others):
        zeros = [0.0] * 100
        made = [Rollout(ids, zeros[: len(ids)], zeros[: len(ids)], None, "", [], "stop") for ids in self.completions]
        return [made[at * n : (at + 1) * n] for at in range(len(prompts))]


def moved(kind, case, completions, settings, folder):
    """The change of the weights in one update from ``completions``, and the records of work and update."""
    model, tokenizer = load_model("tiny", case.dtype, str(DEVICE))
    before = [parameter.detach().clone() for parameter in model.parameters()]
    rows = make_rows(case, CHAT)
    count = Count(case, [len(CHAT.prompt_ids(row)) for row in rows])
    count.watch(model)
    stepper = kind(model, tokenizer, case, settings, rows, count.reward, folder)
    if issubclass(kind, TRL):
        stepper.trainer.rollout_func = lambda prompts, trainer: {
            "prompt_ids": trainer._tokenize_prompts(prompts)[0],
            "completion_ids": completions,
            "logprobs": None,
        }
    else:
        stepper.trainer.collector.rollouter = Given(completions, stepper.trainer.engine)
    stepper.run(count.begin, count.end)
    (record,), (update,) = count.steps, stepper.updates()
    after = torch.cat([(p.detach() - b).flatten() for p, b in zip(model.parameters(), before, strict=True)])
    return after.double(), record, update


@needs_trl
@pytest.mark.parametrize("peer", [TRL, TRLCheckpointing], ids=lambda kind: kind.name)
@pytest.mark.parametrize(
    "settings, closeness",
    [
        # with so large an epsilon, Adam's update is the clipped gradient itself, so its size matters too
        (Settings(learning_rate=10.0, adam_epsilon=1.0), 1e-5),
        # as in the benchmark: a first step of AdamW is the gradient's sign, except where rounding decides it
        (replace(SETTINGS, learning_rate=1e-3), 1e-3),
    ],
    ids=["gradient", "as measured"],
)
def test_both_sides_make_the_same_update_of_the_same_completions(peer, settings, closeness, tmp_path):
    case = replace(TINY, prompts=2, rounds=0, new=9, stop=True)
    generator = torch.Generator().manual_seed(0)
    lengths = (3, 9, 1, 7, 9, 2, 5, 4)
    completions = [torch.randint(8, 300, (n,), generator=generator).tolist() for n in lengths]
    ours, our_record, our_update = moved(Toolx, case, completions, settings, tmp_path / "ours")
    theirs, their_record, their_update = moved(peer, case, completions, settings, tmp_path / "theirs")
    assert ours.abs().max() > 1e-4
    assert float((ours - theirs).norm() / theirs.norm()) < closeness
    assert our_update["grad_norm"] == pytest.approx(their_update["grad_norm"], rel=1e-4)
    assert our_update["grad_norm"] > 1  # so that the clipping is compared too
    assert our_update["learning_rate"] == their_update["learning_rate"] == settings.learning_rate
    for name in ("lengths", "rewards", "unshared_tokens", "shared_tokens"):
        assert our_record[name] == their_record[name]
    prompt = max(len(CHAT.prompt_ids(row)) for row in make_rows(case, CHAT))
    assert their_record["trained_tokens"] == case.rows * (prompt + 9)  # padded
    assert our_record["trained_tokens"] == our_record["shared_tokens"] - case.rows  # the last token predicts nothing


class Dies(StepProvider):
    name = "dies"

    def __init__(self, *others):
        pass

    def run(self, begin, end):
        begin()
        os._exit(9)


@pytest.mark.soak
def test_each_trainer_runs_in_a_process_of_its_own_and_who_cannot_is_named():
    kinds = (Toolx, Dies, *([TRL] if find_spec("trl") else []))
    info = measure(replace(TINY, rounds=2), kinds, DEVICE)
    ours, dies, *peers = info["records"]
    assert dies == {"provider": "dies", "absent": "its process ended with status 9"}
    assert [record["provider"] for record in peers] == (["TRL"] if find_spec("trl") else [])
    for record in (ours, *peers):
        assert len(record["rounds_s"]) == 2 and record["mean_tokens"] == 6 and record["mean_reward"] == 0.5
        assert record["step_s"] == pytest.approx(sum(record["rounds_s"]) / 2, abs=1e-3)
        assert record["tokens_per_s"] == pytest.approx(48 / record["step_s"], rel=1e-2)
        assert 0 < record["rollout_s"] < record["step_s"] and record["peak_mib"] > 1
    promised = ours["sharing_possible"]
    assert (
        promised == pytest.approx(4 * (118 + 6) / (118 + 24), rel=0.03) and abs(ours["sharing"] / promised - 1) < 0.05
    )
    assert all(record["sharing"] <= 1 for record in peers)
    assert info["versions"].keys() == {"transformers", "trl", "accelerate"}


class Lacks(StepProvider):
    name = "lacks"
    package = "not-here-at-all"

    def __init__(self, *others):
        import not_here_at_all  # noqa: F401


def test_a_trainer_that_is_not_installed_says_so():
    seen, other = multiprocessing.Pipe()
    work(other, Lacks, TINY, SETTINGS, str(DEVICE))
    what, (why, _) = seen.recv()
    assert (what, why) == ("failed", "not_here_at_all is not installed: pip install not-here-at-all")


@pytest.fixture
def worker():
    records = [{"lengths": [6] * 8, "rewards": [0.0, 1.0] * 4}] * 2
    updates = [{"learning_rate": SETTINGS.learning_rate, "grad_norm": 0.5}] * 2
    return SimpleNamespace(kind=TRL, records=records, updates=updates)


@pytest.mark.parametrize(
    "place, value, words",
    [
        ("records", {"lengths": [6] * 4}, "rewarded 4 completions instead of 8"),
        ("records", {"lengths": [6] * 7 + [5]}, "sampled \\[5, 6\\] tokens instead of 6"),
        ("records", {"rewards": [0.0] * 8}, "rewarded 8 completions"),
        ("updates", {"grad_norm": 0.0}, "gradient of norm 0.0"),
        ("updates", {"grad_norm": float("nan")}, "gradient of norm nan"),
        ("updates", {"learning_rate": 5e-7}, "updated at 5e-07, not 1e-06"),
        ("updates", None, "updated 1 times instead of 2"),
    ],
)
def test_a_trainer_that_did_other_work_is_no_measurement(worker, place, value, words):
    check_work(worker, TINY, SETTINGS)
    kept = getattr(worker, place)
    setattr(worker, place, kept[:1] if value is None else [kept[0], kept[1] | value])
    with pytest.raises(RuntimeError, match=f"^TRL .*{words}"):
        check_work(worker, TINY, SETTINGS)


def test_completions_that_end_by_themselves_may_be_shorter_but_not_longer(worker):
    worker.records = [{"lengths": [1, 6] * 4, "rewards": [0.0, 1.0] * 4}] * 2
    check_work(worker, replace(TINY, stop=True), SETTINGS)
    with pytest.raises(RuntimeError, match="sampled"):
        check_work(worker, replace(TINY, stop=True, new=5), SETTINGS)


@pytest.mark.parametrize("kind, error", [(TRL, Absent), (Toolx, RuntimeError), (ToolxCheckpointing, RuntimeError)])
def test_a_peers_failure_is_a_reason_and_ours_an_error(kind, error):
    seen = object.__new__(Worker)
    seen.kind, seen.case = kind, TINY
    seen.pipe, other = multiprocessing.Pipe()
    other.send(("failed", ("no memory", "Traceback: no memory")))
    with pytest.raises(error, match="no memory"):
        seen.expect(["step"], 1)
    other.send(("ready", None))
    with pytest.raises(RuntimeError, match="another number of steps than 2"):
        seen.expect(["done"], 1)
    with pytest.raises(Absent, match="no answer within 0 s"):
        seen.expect(["step"], 0)


def test_figures_leave_the_first_step_out_except_for_its_peak():
    step = dict(trained_tokens=100, unshared_tokens=400, shared_tokens=110, lengths=[3, 5], rewards=[0.0, 1.0])
    times = [(90.0, 50.0, 9), (10.0, 2.0, 7), (12.0, 4.0, 8), (11.0, 6.0, 6)]
    found = figures([step | {"step_s": s, "rollout_s": r, "peak": p * 2**20} for s, r, p in times])
    assert (found["step_s"], found["rollout_s"], found["update_s"], found["peak_mib"]) == (11, 4, 8, 9)
    assert found["tokens_per_s"] == pytest.approx(24 / 33, abs=1e-2) and found["mean_tokens"] == 4
    assert (found["trained_tokens"], found["sharing"], found["sharing_possible"]) == (100, 4.0, 3.6364)


def test_scaling_cases_vary_one_number_each():
    named = cases()
    (main,) = named["measure"]
    assert (main.prompts, main.length, main.n, main.new, main.dtype, main.stop) == (2, 500, 10, 96, "float32", False)
    small = scaled()
    assert small in named["length"], "the case that all three series share"
    for kind, field in (("length", "length"), ("group", "n"), ("new", "new")):
        values = {getattr(case, field) for case in [small, *named[kind]]}
        assert len(values) == 4 and all(
            replace(case, **{field: getattr(small, field)}) == small for case in named[kind]
        )
    assert all(case.rows % 2 == 0 for kind in named.values() for case in kind)  # TRL takes two at a time


def test_the_report(tmp_path):
    versions = {"transformers": "5.17.0", "trl": "1.16.0", "accelerate": "1.15.0"}

    def step(new, ours_s, theirs_s):
        case = asdict(TINY) | {"threads": torch.get_num_threads(), "new": new}
        common = dict(tokens_per_s=1.0, mean_tokens=6.0, mean_reward=0.5, sharing_possible=4.0, rollout_s=0.1)
        ours = {"provider": "toolx", "step_s": ours_s, "update_s": 1.0, "peak_mib": 600.0, "sharing": 3.9}
        theirs = {"provider": "TRL", "step_s": theirs_s, "update_s": 3.0, "peak_mib": 1000.0, "sharing": 0.9}
        counted = {"trained_tokens": 1234}
        records = [ours | common | counted, {"provider": "dies", "absent": "it died"}, theirs | common | counted]
        return {"extra_info": {"step": {"case": case, "records": records, "versions": versions}}}

    record = {
        "machine_info": {"slug": "some-cpu", "device": "Some CPU", "torch": "2.13.0"},
        "datetime": "2026-01-02T03",
        "benchmarks": [{"name": "other", "extra_info": {}}, step(6, 2.0, 8.0), step(12, 3.0, 15.0)],
    }
    folder = REPORT.write(json.loads(json.dumps(record)), tmp_path)
    plots = {"step.png"} if find_spec("matplotlib") else set()
    assert {path.name for path in folder.iterdir()} == {"step.csv", "step.md"} | plots
    assert rows_in(folder / "step.csv") == REPORT.rows(record)
    rows = list(csv.DictReader((folder / "step.csv").open()))
    found = [(row["provider"], row["speedup_of_toolx"], row["peak_of_toolx"]) for row in rows]
    ours, none = ("toolx", "1.0", "1.0"), ("dies", "", "")
    assert found == [ours, none, ("TRL", "4.0", "0.6"), ours, none, ("TRL", "5.0", "0.6")]
    text = (folder / "step.md").read_text()
    threads = f"{torch.get_num_threads()} thread{'s' * (torch.get_num_threads() > 1)}"
    assert f"| tiny fp32, 2 prompts of 120, 4 x 6 tokens, {threads} | toolx | 2 | 1.00 x |" in text
    assert "|  | TRL | 15 | 5.00 x |" in text and "- dies: it died" in text and "2026-01-02" in text
    scaling = series(REPORT.rows(record), "new")
    assert [(row["new"], row["provider"]) for row in scaling] == [(6, "toolx"), (6, "TRL"), (12, "toolx"), (12, "TRL")]
    assert {row["new"] for row in series(REPORT.rows(record), "n")} == {6}
