"""Summary of the facts, one page of Markdown: machine, claims of README and docs, facts, and failures."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from bench.gpu.runner import words

LISTED_FAILURES = 30


@dataclass(frozen=True, slots=True)
class Claim:
    """A sentence of README or docs, word for word, and the facts that decide it: ``judge`` returns whether it holds,
    and the figure."""

    text: str
    facts: Sequence[str]
    judge: Callable[..., tuple[bool, str]]


def within_workspace(*runs: Mapping) -> tuple[bool, str]:
    beyond = [(run["mib_beyond_gradients"], run["workspace_mib"]) for run in runs]
    told = ", ".join(f"{mib:.0f} of {bound} MiB" for mib, bound in beyond)
    return all(mib <= 1.1 * bound + 32 for mib, bound in beyond), told


CLAIMS = (
    Claim(
        "a bounded workspace holds a chunk of them",
        ("loss/time D=896 trained", "loss/length D=896 N=65536 trained"),
        within_workspace,
    ),
    Claim(
        "give the same bits on every run",
        ("loss/exact bf16", "loss/exact fp32", "loss/exact fp16"),
        lambda *runs: (not any("two runs differ" in f for run in runs for f in run["failures"]), "each form twice"),
    ),
    Claim(
        "groups of equal reward never enter",
        ("loss/time D=896 trained", "loss/time D=896 50% dead"),
        lambda all_, half: (
            half["ms"] < 0.65 * all_["ms"],
            f"{half['ms'] / all_['ms']:.2f} of the time with half of the groups dead",
        ),
    ),
    Claim(
        "a frozen head gets no weight gradient",
        ("loss/time D=896 trained", "loss/time D=896 frozen"),
        lambda trained, frozen: (frozen["ms"] < 0.8 * trained["ms"], f"{frozen['ms'] / trained['ms']:.2f} of the time"),
    ),
    Claim(
        "`linear_logprob` on the same tokens gives the same log-probs (1e-4 in fp32, tested)",
        ("rollout/exact",),
        lambda run: (run["logprob_difference"] <= 1e-4, f"{run['logprob_difference']:.1e}"),
    ),
    Claim(
        "Log-probs of bf16 heads err by at most 3e-5 against float64",
        ("loss/exact bf16",),
        lambda run: (run["logprob"] < 3.5e-5, f"{run['logprob']:.1e}"),
    ),
    Claim(
        "Greedy decoding gives what `generate` gives, token for token.",
        ("rollout/exact",),
        lambda run: (not any("greedy" in failure for failure in run["failures"]), "Llama and Qwen2, six prompts"),
    ),
    Claim(
        "a decode step with its sampling is one graph, kept for a few sizes",
        ("rollout/exact", "rollout/ragged"),
        lambda run, ragged: (bool(run["graphs"]), f"{ragged['graphs']} graphs where 320 rows end one after the other"),
    ),
    Claim(
        "Updates at a learning rate of 1e-6 arrive in each of them (tested)",
        ("train/steps 0.5b", "train/steps 3b"),
        lambda *runs: (
            all(run["moved"] > 0 for run in runs),
            ", ".join(f"{run['optim']}: {run['moved']:.1%} of weights moved" for run in runs),
        ),
    ),
    Claim(
        "Each run begins with its plan and ends with what was planned and what was measured",
        ("train/steps 0.5b", "train/steps 1.5b", "train/steps 3b"),
        lambda *runs: (
            all(abs(run["planned_by_measured"] - 1) <= 0.1 for run in runs),
            "planned over measured " + ", ".join(f"{run['planned_by_measured']:.2f}" for run in runs),
        ),
    ),
    Claim(
        "then removes the mistakes with reinforcement learning alone",
        ("train/tiny",),
        lambda run: (run["eval_after"] > run["eval_before"], f"{run['eval_before']:.3f} -> {run['eval_after']:.3f}"),
    ),
)


def summary(facts: Mapping[str, Mapping]) -> str:
    machine = facts.get("machine", {})
    told = {name: value for name, value in machine.items() if name not in ("fact", "status", "at", "seconds", "device")}
    text = [
        f"# {machine.get('device', 'unknown machine')}",
        "",
        "; ".join(f"{k} {v}" for k, v in told.items()) + ".",
        "",
    ]
    if machine.get("toy"):
        text += ["Toy sizes: this shows that everything runs, and no figure means anything."]
    else:
        text += ["| claim | holds | measured |", "|---|---|---|", *(claim_row(c, facts) for c in CLAIMS)]
    text += ["", "| fact | result | seconds | found |", "|---|---|---|---|"]
    text += [
        f"| {name} | {line['status']} | {line.get('seconds', '')} | {cell(words(figures(line)))} |"
        for name, line in facts.items()
        if name != "machine"
    ]
    for name, line in facts.items():
        if "kernels" in line:
            text += ["", f"Kernels of {name}, ms:", ""]
            text += [f"- {cell(kernel)} x {count}: {ms}" for kernel, count, ms in line["kernels"]]
    failures = [
        f"- {name}: {failure}"
        for name, line in facts.items()
        if line["status"] == "failed"
        for failure in ([line["error"]] if "error" in line else line.get("failures", ["no reason was given"]))
    ]
    if len(failures) > LISTED_FAILURES:
        failures = [*failures[:LISTED_FAILURES], f"- and {len(failures) - LISTED_FAILURES} more: see facts.jsonl"]
    return "\n".join([*text, "", *(["Failures:", "", *failures] if failures else ["No failures."])]) + "\n"


def claim_row(claim: Claim, facts: Mapping[str, Mapping]) -> str:
    missing = [name for name in claim.facts if "error" in facts.get(name, {"error": ""}) or not measured(facts[name])]
    if missing:
        return f"| {cell(claim.text)} | not measured | {', '.join(missing)} |"
    holds, figure = claim.judge(*(facts[name] for name in claim.facts))
    return f"| {cell(claim.text)} | {'yes' if holds else '**no**'} | {cell(figure)} |"


def measured(line: Mapping) -> bool:
    return line["status"] == "ok" or (line["status"] == "failed" and "error" not in line)


def figures(line: Mapping) -> dict:
    return {name: value for name, value in line.items() if name not in ("fact", "status", "at", "seconds", "commit")}


def cell(text: str) -> str:
    return text.replace("|", "/")[:400]
