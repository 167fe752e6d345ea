"""Export of a run to the learning record."""

import json

from bench.learning.export import exported
from tests.compare.cases import write_run


def test_a_record_keeps_all_of_evaluations_and_probes_but_their_seconds(tmp_path):
    tiers = {"easy": (0.1, 0.2, 0.3), "office": (0.0, 0.0, 0.1)}
    folder = write_run(tmp_path / "a", tiers=tiers, relapsed=(0, 1, 2), model="cold/checkpoint")
    metrics = folder / "metrics.jsonl"
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    metrics.write_text("".join(json.dumps(line | {"timing": {"seconds": 1.0}}) + "\n" for line in lines))
    record = exported(folder)
    assert record["events"] == [line for line in lines if line["event"] in ("eval", "probe")]
    assert record["events"][-1]["spent_fe"] == 60_000 and record["events"][-1]["relapsed"] == 2
    assert record["summary"]["wall_seconds"] == 60 and "model" not in record["config"]
