"""The loss benchmark on tiny shapes: every available provider is correct, and so is the report."""

import csv
import json
from dataclasses import asdict
from importlib.util import find_spec

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from bench.loss.cases import Case, make_problem
from bench.loss.measure import TOLERANCE, errors, load, measure
from bench.loss.providers import OURS, PEERS, Floor, LiveFloor, PlainTorch, Toolx, grpo
from bench.loss.report import REPORT

CPU = torch.device("cpu")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", [k for k in OURS + PEERS if not issubclass(k, Floor)], ids=lambda k: k.name)
def test_every_provider_that_runs_here_agrees_with_truth(kind, dtype):
    provider, found = load(kind, dtype, DEVICE)
    if provider is None:
        assert "\n" not in found
        pytest.skip(f"absent: {found}")
    assert all(error <= TOLERANCE[dtype] for error in found.values()), found
    assert {"hidden", "weight"} <= found.keys()


def test_a_wrong_provider_is_seen():
    class Half(PlainTorch):
        def loss(self, p):
            return grpo(self.logprobs(p), p) / 2

    class Shifted(PlainTorch):
        def logprobs(self, p):
            return super().logprobs(p) + 0.5

    assert errors(Half(CPU), torch.float32, CPU)["weight"] == pytest.approx(0.5, rel=1e-3)
    assert errors(Shifted(CPU), torch.float32, CPU)["logprobs"] == pytest.approx(0.5, rel=1e-3)


def test_a_problem_is_the_same_each_time_and_dead_rows_are_dead():
    first, again = (make_problem(64, 16, 50, dtype=torch.float32, device="cpu", dead=0.5) for _ in range(2))
    for a, b in zip(asdict(first).values(), asdict(again).values(), strict=True):
        assert torch.equal(a, b)
    assert int((first.advantages == 0).sum()) == 8
    Toolx(CPU).stage("both", first)()
    dead = (first.advantages == 0).repeat_interleave(4)
    assert torch.equal(first.hidden.grad.abs().sum(1) == 0, dead)


class Broken(PlainTorch):
    name = "broken"

    def stage(self, what, p):
        if len(p.hidden) == 32:
            raise RuntimeError("out of memory\nand more")
        return super().stage(what, p)


def test_a_provider_that_fails_at_a_size_is_named_and_the_others_are_timed():
    measured = measure(Case("both", 32, 16, 50), (Toolx, Broken), CPU)
    records = {record["provider"]: record for record in measured["records"]}
    assert records["broken"]["absent"] == "RuntimeError: out of memory"
    assert len(records["toolx"]["rounds_ms"]) == 3 and records["toolx"]["ms"] > 0


def test_a_slow_peer_is_timed_once(monkeypatch):
    class Slow(PlainTorch):
        name = "slow"

        def loss(self, p):
            took.append(5.0)
            return super().loss(p)

    took = []

    def seconds(call, device):
        took[:] = [1.0]
        call()
        return took[-1]

    monkeypatch.setattr("bench.loss.measure.seconds", seconds)
    monkeypatch.setattr("bench.loss.measure.PEERS", (Slow,))
    measured = measure(Case("both", 32, 16, 50), (*OURS, Slow), CPU)
    records = {record["provider"]: record for record in measured["records"]}
    assert records["slow"]["rounds_ms"] == [5000]
    assert all(records[kind.name]["rounds_ms"] == [1000] * 3 for kind in (Toolx, PlainTorch, Floor))


def test_the_floor_is_the_gemms_and_nothing_else():
    p = make_problem(64, 16, 50, dtype=torch.float32, device="cpu", dead=0.5)
    frozen = make_problem(64, 16, 50, dtype=torch.float32, device="cpu", dead=0.5, frozen=True)
    gemm = 2 * 64 * 16 * 50
    for kind, what, problem, flops in (
        (Floor, "forward", p, gemm),
        (Floor, "backward", p, 2 * gemm),
        (Floor, "both", p, 3 * gemm),
        (Floor, "both", frozen, 2 * gemm),
        (LiveFloor, "both", p, 3 * gemm // 2),
    ):
        call = kind(CPU).stage(what, problem)
        with FlopCounterMode(display=False) as counter:
            call()
        assert counter.get_total_flops() == flops


@pytest.mark.soak
def test_report_writes_table_figures_and_plots(tmp_path):
    cases = [Case("both", n, 16, 50, dtype="float32", dead=dead) for n in (32, 64) for dead in (0.0, 0.5)]
    cases += [Case("forward", 32, 16, 50), Case("both", 32, 16, 50, frozen=True)]
    measured = [measure(case, OURS, CPU, rounds=2) for case in cases]
    measured[0]["records"].append({"provider": "peer", "absent": "needs peer, which is not installed"})
    # known times give known ratios: the floor takes 10 ms, toolx 12 ms, and 6 ms with dead rows
    times = {"toolx": 12.0, "plain torch": 20.0, "floor": 10.0, "floor, live rows": 5.0}
    for info in measured:
        for record in info["records"]:
            if "ms" in record:
                record["ms"] = times[record["provider"]] / (2 if info["case"]["dead"] else 1)
    benchmarks = [*({"extra_info": {"loss": info}} for info in measured), {"name": "test_kv_write", "extra_info": {}}]
    machine = {"slug": "some-cpu", "device": "Some CPU"}
    record = {"machine_info": machine, "datetime": "2026-01-02T03", "benchmarks": json.loads(json.dumps(benchmarks))}
    folder = REPORT.write(record, tmp_path)
    plots = {"loss_dead.png", "loss_memory.png", "loss_time.png"} if find_spec("matplotlib") else set()
    assert {path.name for path in folder.iterdir()} == {"loss.csv", "loss.md"} | plots
    rows = list(csv.DictReader((folder / "loss.csv").open()))
    ours = {(r["what"], r["n"], r["dead"], r["frozen"]): r for r in rows if r["provider"] == "toolx"}
    assert len(ours) == len(cases)
    assert ours["both", "32", "0.0", "False"]["to_floor"] == "1.2"
    assert ours["both", "32", "0.5", "False"]["to_live_floor"] == "2.4"
    assert ours["both", "32", "0.5", "False"]["to_dense"] == "0.5"
    text = (folder / "loss.md").read_text()
    assert "N=64 D=16 V=50 fp32 50% dead | toolx | 6" in text and "frozen head" in text
    assert "- peer: needs peer, which is not installed" in text and "2026-01-02" in text
    assert "wrong" not in text
