"""Precondition of a record: whether demonstrations can help a cold start, measured on it before any arm runs.

    python -m bench.learning.precondition out.json --budget 3000000 --model runs/cold-seed0 --config builtin-facts retry

takes the settings of ``toolx train``, and in ``--budget`` the forward-equivalents (tokens prefilled + written + 3 x
trained on) that an arm may spend. It writes, for all rows and for each tier:

hard    rows for which none of ``probe_rollouts`` rollouts is right: the paper's first table. ``raw`` prompts; with
        demonstrations drawn once (``random``); with those that training would choose (``better``: drawn until they make
        the model answer correctly within ``verify_rollouts`` rollouts, at most ``demonstration_tries`` times; a row
        that gets none is probed raw). Each count uses separate rollouts.
right   the share of right rollouts on raw prompts and with random demonstrations
inside  rows that, with random demonstrations, are right in some rollouts but not in all: their group has a gradient

and for each fact (a value that no request states, ``builtin_facts.fact_of``):

p         the probability of the required value on the raw prompt, given the part of the answer before it: the mean over
          the fact's rows, teacher-forced
rollouts  that the budget pays for on raw prompts of these rows: rows x G x passes, where a pass is all training rows
          once at their present cost. A raw group costs its prompt and completions and, if it is trained on (it is live,
          or there is a KL), 3 x both for each of ``num_iterations`` updates and once more for the reference (the first
          G of the rollouts above decide). Passes cost more as more groups become live, so this is an upper bound.
lambda    p x rollouts: how often plain GRPO is expected to find the value by chance
verified  right rollouts with random demonstrations that the budget pays for, if each dead group of a pass is sampled
          again with them and learned, and nothing else changes: passes x G x the share that is right, over the fact's
          rows whose raw group is dead

``passes`` is true if lambda is below 0.1 for each fact except the listed convention, hard(raw) - hard(random) is at
least 15 % of the rows, and verified is at least 200 for each fact.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory

import torch

from bench.common.arguments import number
from toolx_kernels.cli.train import parse_train
from toolx_kernels.files import write_atomically
from toolx_kernels.toolcall.datasets.builtin_facts import Fact, fact_of
from toolx_kernels.toolcall.rows import Row
from toolx_kernels.train.hard_sampling import Demonstrations, HardSamples, probe
from toolx_kernels.train.policies.demonstrators import RandomDemonstrations, VerifiedDemonstrations
from toolx_kernels.train.rounds import PROBE_STREAM
from toolx_kernels.train.rows import load_demonstrations, load_rows
from toolx_kernels.train.trainer import ToolExpanderTrainer
from toolx_kernels.train.verification import VERIFY_STREAM

LISTED = "convention"  # the fact whose values the signature lists: exploration may find it
MOST_LAMBDA, LEAST_FEWER_HARD, LEAST_VERIFIED = 0.1, 0.15, 200


@dataclass(frozen=True, slots=True)
class Answers:
    """The rollouts of a row's prompt: tokens of the prompt, tokens of each rollout, and which are right."""

    prompt: int
    written: list[int]
    right: list[bool]

    def cost(self, n: int) -> int:
        """Tokens of a group of the first ``n`` rollouts: the prompt once, and what they wrote."""
        return self.prompt + sum(self.written[:n])

    def live(self, n: int) -> bool:
        return 0 < sum(self.right[:n]) < n

    def dead(self, n: int) -> bool:
        return not any(self.right[:n])


@dataclass(frozen=True, slots=True)
class Measured:
    """A row: its rollouts on the raw prompt and with random demonstrations, and whether it is hard with better ones."""

    tier: str
    raw: Answers
    random: Answers
    hard_with_better: bool
    fact: Fact | None = None
    p: float = 0.0  # of the fact

    def hard(self, probed: int) -> dict[str, bool]:
        return {"raw": self.raw.dead(probed), "random": self.random.dead(probed), "better": self.hard_with_better}


def counts(rows: Sequence[Measured], probed: int) -> dict:
    hard = [row.hard(probed) for row in rows]
    return {
        "rows": len(rows),
        "hard": {name: sum(of_row[name] for of_row in hard) for name in ("raw", "random", "better")},
        "right": {name: rounded(fmean(share(getattr(row, name)) for row in rows)) for name in ("raw", "random")},
        "inside": sum(0 < share(row.random) < 1 for row in rows),
    }


def share(answers: Answers) -> float:
    return fmean(answers.right)


def passes_over(rows: Sequence[Measured], n: int, budget: int, updates: int = 1, kl: bool = False) -> dict[str, float]:
    """The number of passes over all rows within the budget: by plain GRPO with groups of ``n``, and if each dead group
    is sampled again with random demonstrations and learned on the raw prompt."""
    training = 3 * updates + kl
    grpo = sum(row.raw.cost(n) * (1 + training if kl or row.raw.live(n) else 1) for row in rows)
    again = [row for row in rows if row.raw.dead(n)]
    revived = [row for row in again if not row.random.dead(n)]
    learned = sum((0 if kl else row.raw.cost(n)) + sum(row.random.written[:n]) for row in revived)
    retry = grpo + sum(row.random.cost(n) for row in again) + training * learned
    return {"grpo": budget / grpo, "retry": budget / retry}


def facts(rows: Iterable[Measured], n: int, passes: dict[str, float]) -> dict[str, dict]:
    of_fact = defaultdict(list)
    for row in rows:
        if row.fact:
            of_fact[row.fact.name].append(row)
    result = {}
    for name, those in sorted(of_fact.items()):
        p, rollouts = fmean(row.p for row in those), len(those) * n * passes["grpo"]
        verified = passes["retry"] * n * sum(share(row.random) for row in those if row.raw.dead(n))
        numbers = {"p": p, "rollouts": rollouts, "lambda": p * rollouts, "verified": verified}
        result[name] = {"rows": len(those)} | {key: rounded(number) for key, number in numbers.items()}
    return result


def passes(everything: dict, of_facts: dict[str, dict]) -> bool:
    hard = everything["hard"]
    return (
        hard["raw"] - hard["random"] >= LEAST_FEWER_HARD * everything["rows"]
        and all(fact["lambda"] < MOST_LAMBDA for name, fact in of_facts.items() if name != LISTED)
        and all(fact["verified"] >= LEAST_VERIFIED for fact in of_facts.values())
    )


def rounded(number: float) -> float:
    return float(f"{number:.4g}")


def probability(trainer: ToolExpanderTrainer, row: Row, fact: Fact) -> float:
    """The probability of the fact's value on the row's raw prompt, given the part of the answer before it."""
    prompts = trainer.task.prompts
    prompt = prompts.ids(row)
    answer = prompts.chat.completion_ids(row.answer, prompt)
    value = trainer.tokenizer(fact.value, add_special_tokens=False)["input_ids"]
    start = max(at for at in range(len(answer)) if answer[at : at + len(value)] == value)
    ids = torch.tensor([prompt + answer[: start + len(value)]], device=trainer.model.device)
    with torch.no_grad():
        logits = trainer.model(input_ids=ids).logits[0, -len(value) - 1 : -1].float() / trainer.args.temperature
    return float(logits.log_softmax(-1).gather(1, ids[0, -len(value) :, None]).sum().exp())


def measured(trainer: ToolExpanderTrainer, more: Sequence[Row]) -> tuple[list[Measured], dict[str, int]]:
    """Measures all training rows; also returns how many of them got no demonstrations."""
    args, rows, collector, everything = (
        trainer.args,
        trainer.task.rows,
        trainer.collector,
        range(len(trainer.task.rows)),
    )
    drawer = RandomDemonstrations.of(args, trainer.task.demonstrations, trainer.task.prompts)
    drawn = [drawer.draw(row, 0, 0)[0] for row in rows]
    table = HardSamples(rows, more)
    chooser = VerifiedDemonstrations(
        drawer,
        args.demonstration_tries,
        args.verify_rollouts,
        lambda number: collector.attempt(VERIFY_STREAM + number, "verify"),
    )
    chooser.choose(table, everything, 0)
    chosen = [table.demonstrations(row) for row in everything]

    def answers(shown: Sequence[Demonstrations], stream: int) -> list[Answers]:
        prompts = [trainer.task.prompts.ids(row, those) for row, those in zip(rows, shown, strict=True)]
        n = max(args.probe_rollouts, args.num_generations)
        groups = trainer.rollouter.roll_out(rows, prompts, n, collector.params, row_ids=everything, step=stream)
        return [
            Answers(len(ids), [r.written for r in group], trainer.task.solves([row] * n, group))
            for row, ids, group in zip(rows, prompts, groups, strict=True)
        ]

    raw, random = answers([()] * len(rows), PROBE_STREAM), answers(drawn, PROBE_STREAM + 1)
    attempt = collector.attempt(PROBE_STREAM + 2, "probe")
    hard_with_better = set(probe(enumerate(chosen), args.probe_rollouts, attempt).hard)
    result = []
    for place, row in enumerate(rows):
        fact = fact_of(row)
        p = probability(trainer, row, fact) if fact else 0.0
        tier = row.columns.get("tier", "all")
        result.append(Measured(tier, raw[place], random[place], place in hard_with_better, fact, p))
    return result, {"random": sum(not shown for shown in drawn), "better": sum(not shown for shown in chosen)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--budget", type=number(int, 1, 10**18), required=True, help="forward-equivalents of an arm")
    own, flags = parser.parse_known_args()
    with TemporaryDirectory() as nowhere:
        args = parse_train([*flags, "--output_dir", f"{nowhere}/run"])
        more = load_demonstrations(args)
        trainer = ToolExpanderTrainer(args.model, None, args, *load_rows(args), demonstrations=more)
        rows, without = measured(trainer, more)
    everything, tiers = counts(rows, args.probe_rollouts), sorted({row.tier for row in rows})
    passed = passes_over(rows, args.num_generations, own.budget, args.num_iterations, bool(args.beta))
    of_facts = facts(rows, args.num_generations, passed)
    names = ("dataset", "seed", "temperature", "probe_rollouts", "num_generations")
    result = {
        "passes": passes(everything, of_facts),
        **everything,
        "without_demonstrations": without,
        "tiers": {tier: counts([row for row in rows if row.tier == tier], args.probe_rollouts) for tier in tiers},
        "budget": own.budget,
        "passes_over_rows": {name: rounded(number) for name, number in passed.items()},
        "facts": of_facts,
        "model": Path(args.model).name,
        **{name: getattr(args, name) for name in names},
    }
    write_atomically(own.output, json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
