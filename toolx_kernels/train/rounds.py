"""Rounds of a run: each begins with a probe, then samples batches of prompts, hard ones by the policy."""

from __future__ import annotations

from collections.abc import Sequence

from toolx_kernels.errors import InputError, counted
from toolx_kernels.train.collect import Collector
from toolx_kernels.train.config import ToolExpanderConfig
from toolx_kernels.train.groups import ScoredGroup
from toolx_kernels.train.hard_sampling import HardSamples, Probe, probe
from toolx_kernels.train.policies.hard_samples import HardSamplePolicy
from toolx_kernels.train.policies.prompt_order import PromptOrder

# Retries, probes and verifications each use other random streams than the first draws of steps.
RETRY_STREAM = 1 << 30
PROBE_STREAM = 1 << 31
MOST_TRIES = 16  # per step, each with a separate stream

COUNTS = ("step", "batch", "supervised", "probed_round", "trained_tokens", "trained_fe")  # saved in a checkpoint


class Rounds:
    """A run as batches of prompts: ``per_epoch`` of them are an epoch, ``per_round`` a round, ``total`` the run.

    step            optimizer steps done
    batch           batches drawn: one per step, unless groups are dropped and the step filled up
    probed_round    the round of the last probe
    round_rows      rows that this probe covers if the round is not cut short
    trained_tokens  tokens that passed through the training forward
    trained_fe      forward-equivalents of all updates, see ``Learner.improve``
    supervised      those steps that sampled nothing
    table           the state of every training row

    Raises InputError if ``args.profile_step`` is beyond the steps of the run.
    """

    def __init__(
        self,
        table: HardSamples,
        policy: HardSamplePolicy,
        order: PromptOrder,
        collector: Collector,
        args: ToolExpanderConfig,
    ):
        self.table, self.policy, self.order, self.collector, self.args = table, policy, order, collector, args
        self.step = self.batch = self.supervised = self.trained_tokens = self.trained_fe = 0
        self.probed_round, self.round_rows = -1, 0
        self._begun = -1  # round begun by this process; a resumed run begins its round again
        self.per_epoch = max(1, len(table.rows) // args.prompts_per_step)
        self.per_round = self.per_epoch * args.epochs_per_round
        self.total = args.num_train_epochs * self.per_epoch
        if args.max_steps > 0:
            self.total = min(self.total, args.max_steps * order.max_batches)
        if args.profile_step > (steps := self.planned_steps):
            raise InputError(
                f"profile_step={args.profile_step} is beyond this run of {counted(steps, 'step')}: choose one of those."
            )

    def state_dict(self) -> dict:
        return {name: getattr(self, name) for name in COUNTS} | {"table": self.table.lines()}

    def load_state_dict(self, state: dict) -> None:
        for name in COUNTS:
            setattr(self, name, state[name])
        self.table.load(state["table"])
        self._begun = -1

    # ---- progress of the run

    @property
    def planned_steps(self) -> int:
        """Steps that the run takes if no group is dropped and no token budget ends it earlier."""
        return min(self.total, self.args.max_steps) if self.args.max_steps > 0 else self.total

    @property
    def progress(self) -> float:
        """The share of the run that is done, by the limit that ends it first; 1 or more when it is finished.

        Without a budget of steps or tokens the batches are the limit; supervised steps draw none and count as one each.
        """
        args = self.args
        spent = [(self.step, args.max_steps), (self.spent_tokens, args.max_tokens), (self.spent_fe, args.max_fe)]
        budgets = [(done, limit) for done, limit in spent if limit > 0] or [(self.step, self.total)]
        return max(done / limit if limit else 1.0 for done, limit in [*budgets, (self.batch, self.total)])

    @property
    def finished(self) -> bool:
        return self.progress >= 1

    @property
    def next_round(self) -> int:
        """Round index of the next batch."""
        return self.batch // self.per_round

    @property
    def at_round_start(self) -> bool:
        """Whether the next batch starts a round."""
        return self._begun != self.next_round

    def passed(self, unit: str) -> int:
        """Returns the rounds or epochs completed before the last drawn batch, or the RL steps done."""
        if unit == "step":
            return self.step - self.supervised
        return max(0, self.batch - 1) // {"round": self.per_round, "epoch": self.per_epoch}[unit]

    @property
    def spent_tokens(self) -> int:
        """Tokens that the method spent so far: written in steps and verifications, trained on, and written in probes
        if the hard-sample policy needs them. Evaluations and the last probe only measure and do not count."""
        return self.trained_tokens + sum(self.collector.tokens[purpose] for purpose in self._of_method())

    @property
    def spent_fe(self) -> int:
        """The same in forward-equivalents: prefilled tokens count too, and trained ones three times or more."""
        read, written = self.collector.prefilled, self.collector.tokens
        return self.trained_fe + sum(read[purpose] + written[purpose] for purpose in self._of_method())

    @property
    def spent(self) -> dict[str, int]:
        """Both, under their names in the metrics."""
        return {"spent_tokens": self.spent_tokens, "spent_fe": self.spent_fe}

    def _of_method(self) -> list[str]:
        return ["step", "retry", "verify", *(["probe"] if self.policy.needs_probe else [])]

    # ---- probes

    @property
    def _probe_every(self) -> int:
        """Rounds between two probes; 0: only the first round has one."""
        return self.args.probe_every or int(self.policy.needs_probe)

    def members(self, round_index: int, rounds: int = 1, *, whole: bool = False) -> list[int]:
        """Returns the training rows that ``rounds`` rounds from ``round_index`` on may use, in dataset order; with
        ``whole`` also those of batches that come after ``max_steps``."""
        end = self.args.num_train_epochs * self.per_epoch if whole else self.total
        first = round_index * self.per_round
        return self.order.candidates(range(first, min(first + rounds * self.per_round, end)))

    def begin_round(self) -> Probe | None:
        """Probes the raw prompts of the next batch's round and of the rounds up to the next probe, then lets the policy
        prepare the hard ones.

        Skips rows that were already probed for these rounds. When a resumed run re-enters a round, only rows that an
        earlier, smaller ``max_steps`` skipped are probed. Returns None if there are none.
        """
        self._begun, every = self.next_round, self._probe_every
        due = self.next_round // every * every if every else 0
        members = self.members(due, every or 1)
        self.round_rows = len(self.members(due, every or 1, whole=True))
        if self.probed_round == due:
            done = {i for i, row in enumerate(self.table.states) if row.probes and row.probes[-1][0] == due}
            members = [row for row in members if row not in done]
        self.probed_round = due
        if not members:
            return None
        found = self.probe(members, due)
        self.policy.start_round(self.table, found.hard, due)
        return found

    def measure(self) -> Probe:
        """Probes the rows of the first probe again, after the run."""
        every = self._probe_every or 1
        self.round_rows = len(self.members(0, every, whole=True))
        return self.probe(self.members(0, every), self.probed_round + 1, "measure")

    def probe(self, members: list[int], round_index: int, purpose: str = "probe") -> Probe:
        """Probes the raw prompts of ``members`` and records the result in the table."""
        attempt = self.collector.attempt(PROBE_STREAM + round_index, purpose)
        found = probe([(row, ()) for row in members], self.args.probe_rollouts, attempt)
        self.table.record(found, round_index)
        return found

    # ---- steps

    def next_groups(self) -> tuple[list[ScoredGroup], list[ScoredGroup]]:
        """Returns the groups that the next step learns from, and all that were sampled for it.

        Groups that the prompt order does not keep are replaced from the round's next batches, up to its limit.

        Raises InputError: the order or the policy returns nothing to sample, or a row index out of range; or the policy
        never stops retrying.
        """
        kept: list[ScoredGroup] = []
        sampled: list[ScoredGroup] = []
        end_of_round = min(self.total, (self.next_round + 1) * self.per_round)
        batches = range(self.batch, min(end_of_round, self.batch + self.order.max_batches))
        wanted = 0
        for batch in batches:
            rows = self.order.rows(batch, self.table)
            if any(not 0 <= row < len(self.table.rows) for row in rows):
                raise InputError(
                    f"{_name(self.order)}.rows returned {rows}: return indices of the {len(self.table.rows)} rows."
                )
            plans = [plan for row in rows for plan in self.policy.groups(self.table, row)]
            if not plans:
                raise InputError(
                    f"Batch {batch} has nothing to sample, as {_name(self.order)}.rows returned {rows} and "
                    f"{_name(self.policy)}.groups no group for these: return at least one row and group."
                )
            groups = self.collector.groups(plans, batch)
            self.table.draw(groups, self.next_round)
            groups += self._retry(groups, batch)
            self.batch = batch + 1
            sampled += groups
            kept += [group for group in groups if self.order.keeps(group)]
            # separate groups of retries are at most as many as dead groups, which an order that drops groups drops
            wanted = wanted or max(len(plans), len(kept))
            if len(kept) >= wanted:
                break
        kept = kept[:wanted]
        for group in kept:  # a retry in a separate group counts for the loss only if its dead group is not kept
            group.counted = not any(group.retry_of is other for other in kept)
        return kept, sampled

    def _retry(self, groups: Sequence[ScoredGroup], batch: int) -> list[ScoredGroup]:
        """Samples groups of the batch again, as the policy decides; returns retries that form separate groups."""
        further: list[ScoredGroup] = []
        number = 0
        while again := self.policy.retry(self.table, groups):
            if number == MOST_TRIES:
                raise InputError(
                    f"{_name(self.policy)}.retry returns groups for more than {MOST_TRIES} tries in one step: let it "
                    "stop by their tries."
                )
            stream = RETRY_STREAM + batch * MOST_TRIES + number
            retried = self.collector.groups([plan for _, plan in again], stream, "retry")
            for (group, _), new in zip(again, retried, strict=True):
                group.tries += 1
                if new.dead:
                    continue
                group.revived = True
                if new.plan.scored_with == group.plan.scored_with:
                    group.extend(new)
                else:
                    new.retry_of, new.lengths = group, list(group.lengths)
                    further.append(new)
            number += 1
        return further

    def finish_step(self, update: dict, *, supervised: bool = False) -> None:
        """Counts a step, given the metrics that ``Learner.improve`` returned."""
        self.step += 1
        self.supervised += supervised
        self.trained_tokens += update["trained_tokens"]
        self.trained_fe += update["trained_fe"]


def _name(part: object) -> str:
    return type(part).__name__
