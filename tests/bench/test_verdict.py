"""The verdict of the built-in records."""

import json

import pytest
from scipy.stats import t

from bench.learning.verdict import holm, main, p_value, page, verdict

SEEDS = range(4, 12)
NOISE = (0.02, -0.01, 0.0, -0.02, 0.01, 0.01, 0.0, -0.01)


def runs(**arms):
    """Runs as in ``runs.json``: accuracy ends at the arm's level plus noise per seed, hard rows at 100 (1 - level)."""
    return [
        {
            "run": f"{arm.replace('_', '-')}-seed{seed}",
            "events": [
                {"event": "eval", "accuracy": 0.9},
                {"event": "probe", "hard": 500},
                {"event": "eval", "accuracy": 0.3 * noise * seed + level},
                {"event": "probe", "hard": 100 * (1 - level) + seed * (arm == "retry")},
            ],
        }
        for arm, level in arms.items()
        for seed, noise in zip(SEEDS, NOISE, strict=True)
    ]


def found(builtin_retry=0.5, replace=0.4, sft_retry=0.5, **others):
    facts = runs(grpo=0.3, retry=0.5, replace=replace, sft_grpo=0.5, sft_retry=sft_retry, **others)
    of_builtin = runs(grpo=0.5, replace=0.5, retry=builtin_retry)
    for seed, run in enumerate(each for each in facts if each["run"].startswith(("retry", "sft"))):
        run["events"][2]["accuracy"] += 0.01 * (seed % 3)
    return verdict(facts, of_builtin)


def test_retry_is_the_default_only_where_all_three_intervals_say_so():
    assert found()["default_is_retry"] and [each["holds"] for each in found()["default"]] == [True] * 3
    assert [each["holds"] for each in found(replace=0.505)["default"]] == [True, False, True]
    assert [each["holds"] for each in found(builtin_retry=0.48)["default"]] == [True, True, True]
    lost = found(builtin_retry=0.46)
    assert [each["holds"] for each in lost["default"]] == [True, True, False] and not lost["default_is_retry"]
    first = found()["default"][0]
    assert first["pairs"] == 8 and first["accuracy"].value == pytest.approx(0.2 + 0.01 * 7 / 8)
    assert first["hard"].value == pytest.approx(-20 + 7.5)


def test_rules_whose_seeds_are_not_complete_decide_nothing():
    facts = runs(grpo=0.3, retry=0.5, replace=0.4, sft_grpo=0.6, sft_retry=0.6)
    missing = verdict([run for run in facts if run["run"] not in ("retry-seed7", "sft-grpo-seed4")], [])
    assert [(each["pairs"], each["holds"]) for each in missing["default"]] == [(7, None), (7, None), (0, None)]
    assert missing["default_is_retry"] is None and missing["recommended_with_demonstrations"] == []
    assert "not decided yet" in page(missing)
    lost = verdict(facts, runs(grpo=0.5, retry=0.4))
    assert lost["default_is_retry"] is False
    facts = [run for run in facts if run["run"] != "replace-seed7"]
    assert verdict(facts, runs(grpo=0.5, retry=0.4))["default_is_retry"] is False, "whatever the others will say"


def test_a_supervised_start_is_recommended_where_it_is_clearly_ahead_of_retry():
    assert found()["recommended_with_demonstrations"] == []
    assert found(sft_retry=0.6)["recommended_with_demonstrations"] == ["sft-retry"]
    assert found(sft_retry=0.4)["recommended_with_demonstrations"] == []


def test_other_arms_are_judged_at_the_level_that_their_place_among_all_has():
    seeds = range(4, 9)
    base = dict.fromkeys(seeds, 0.0)
    spread = dict(zip(seeds, (0.02, -0.01, 0.0, -0.02, 0.01), strict=True))
    arms = {
        "far": {seed: 0.3 + x for seed, x in spread.items()},
        "near": {seed: 0.025 + x for seed, x in spread.items()},
        "level": dict(spread),
        "few": {4: 0.5},
    }
    adjusted = holm(arms, base)
    assert [*adjusted] == ["far", "near", "level", "few"]
    assert [each["confidence"] for each in adjusted.values()] == pytest.approx([1 - 0.05 / k for k in (4, 3, 2, 1)])
    half = t.ppf(1 - 0.05 / 3 / 2, 4) * (0.00025**0.5) / 5**0.5
    assert adjusted["near"]["difference"][1:] == pytest.approx((0.025 - half, 0.025 + half))
    near = [0.025 + x for x in spread.values()]
    assert p_value(near) < 0.05 < 3 * p_value(near)
    assert [each["differs"] for each in adjusted.values()] == [True, False, False, False]
    assert adjusted["few"]["pairs"] == 1 and adjusted["few"]["difference"].low is None
    assert p_value([0.1, 0.1]) == 0.0 and p_value([0.0, 0.0]) == 1.0
    two = {name: {seed: shift + x for seed, x in spread.items()} for name, shift in (("a", 0.0225), ("b", 0.022))}
    first, second = holm(two, base).values()
    assert 0.025 < p_value(0.0225 + x for x in spread.values()) < 0.05 and not first["differs"]
    assert second["difference"].low > 0 and not second["differs"], "after one that does not differ none does"


def test_the_page_is_written_from_the_committed_runs(tmp_path):
    for task, arms in (
        ("builtin-facts", {"grpo": 0.3, "retry": 0.5, "replace": 0.3, "sft_grpo": 0.5, "sft_retry": 0.5, "dapo": 0.3}),
        ("builtin", {"grpo": 0.5, "replace": 0.5, "retry": 0.5}),
    ):
        (tmp_path / task).mkdir()
        (tmp_path / task / "runs.json").write_text(json.dumps(runs(**arms)))
    main(str(tmp_path))
    said = (tmp_path / "verdict.md").read_text()
    assert "| builtin-facts: retry minus grpo | 8 | +0.200 [+0.200, +0.200] | -12.5 [-14.5, -10.5] | yes |" in said
    assert "| dapo | 8 | +0.000 [+0.000, +0.000] | no | +0.0 [+0.0, +0.0] | no |" in said and "Default: retry." in said
    numbers = json.loads((tmp_path / "verdict.json").read_text())
    assert numbers["default"][1]["accuracy"]["value"] == pytest.approx(0.2)
