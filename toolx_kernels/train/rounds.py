"""Rounds of a run: a probe before each, then its batches of prompts, hard ones sampled as the policy says."""

from __future__ import annotations

from toolx_kernels.train.collect import Collector
from toolx_kernels.train.config import ToolExpanderConfig
from toolx_kernels.train.demonstrators import HardSamplePolicy
from toolx_kernels.train.groups import ScoredGroup
from toolx_kernels.train.hard_sampling import HardSamples, Probe, probe
from toolx_kernels.train.policies import PromptOrder

# Probes and verifications draw from other random streams than training steps.
PROBE_STREAM = 1 << 31
VERIFY_STREAM = 3 << 30


class Rounds:
    """A run as batches of prompts: ``per_epoch`` of them are an epoch, ``per_round`` a round, ``total`` the run.

    step            optimizer steps done
    batch           batches drawn: one a step, unless groups are dropped and the step filled up
    probed_round    the one whose probe was done last
    trained_tokens  that passed through the training forward
    table           the state of every training row
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
        self.step = self.batch = self.trained_tokens = 0
        self.probed_round = -1
        self._begun = -1  # by this process; a resumed run begins its round once more
        self.per_epoch = max(1, len(table.rows) // args.prompts_per_step)
        self.per_round = self.per_epoch * args.epochs_per_round
        self.total = args.num_train_epochs * self.per_epoch
        if args.max_steps > 0:
            self.total = min(self.total, args.max_steps * order.max_batches)

    def state_dict(self) -> dict:
        names = ("step", "batch", "probed_round", "trained_tokens")
        return {name: getattr(self, name) for name in names} | {"table": self.table.lines()}

    def load_state_dict(self, state: dict) -> None:
        self.step, self.batch = state["step"], state["batch"]
        self.probed_round, self.trained_tokens = state["probed_round"], state["trained_tokens"]
        self.table.load(state["table"])
        self._begun = -1

    # ---- where the run stands

    @property
    def planned_steps(self) -> int:
        """Steps that the run takes if no group is dropped and no budget of tokens ends it sooner."""
        return min(self.total, self.args.max_steps) if self.args.max_steps > 0 else self.total

    @property
    def finished(self) -> bool:
        out_of_tokens = 0 < self.args.max_tokens <= self.spent_tokens
        out_of_steps = 0 < self.args.max_steps <= self.step
        return out_of_tokens or out_of_steps or self.batch >= self.total

    @property
    def next_round(self) -> int:
        """The round of the next batch."""
        return self.batch // self.per_round

    @property
    def at_round_start(self) -> bool:
        """Whether the next batch begins a round."""
        return self._begun != self.next_round

    def passed(self, unit: str) -> int:
        """Rounds or epochs before that of the batch drawn last, or steps done."""
        if unit == "step":
            return self.step
        return (self.batch - 1) // {"round": self.per_round, "epoch": self.per_epoch}[unit]

    @property
    def spent_tokens(self) -> int:
        """Tokens that the method cost so far: written in steps and verifications, trained on, and written in probes
        if the hard-sample policy needs them; evaluations and the last probe are measurements."""
        tokens = self.collector.tokens
        probed = tokens["probe"] if getattr(self.policy, "needs_probe", True) else 0
        return self.trained_tokens + tokens["step"] + tokens["verify"] + probed

    # ---- probes

    def members(self, round_index: int) -> list[int]:
        """The training rows that a round may use, in dataset order."""
        first = round_index * self.per_round
        batches = range(first, min(first + self.per_round, self.total))
        return sorted({row for batch in batches for row in self.order.rows(batch)})

    def begin_round(self) -> Probe | None:
        """Probes the raw prompts of the next batch's round, then lets the policy choose what it shows with hard ones.

        When a resumed run begins a round again, only rows that an earlier, smaller ``max_steps`` skipped are probed.
        Returns None if there are none.
        """
        index = self._begun = self.next_round
        members = self.members(index)
        if self.probed_round == index:
            done = {i for i, row in enumerate(self.table.states) if row.probes and row.probes[-1][0] == index}
            members = [row for row in members if row not in done]
        self.probed_round = index
        if not members:
            return None
        found = self.probe(members, index)
        self.policy.start_round(self.table, found.hard, index)
        return found

    def measure(self) -> Probe:
        """Probes the rows of the first round once more, after the run."""
        return self.probe(self.members(0), self.probed_round + 1, "measure")

    def probe(self, members: list[int], round_index: int, purpose: str = "probe") -> Probe:
        """Finds the rows among ``members`` whose raw prompts get no correct rollout, and enters them in the table."""
        attempt = self.collector.attempt(PROBE_STREAM + round_index, purpose)
        found = probe([(row, ()) for row in members], self.args.probe_rollouts, attempt)
        self.table.record(found, round_index)
        return found

    # ---- steps

    def next_groups(self) -> tuple[list[ScoredGroup], list[ScoredGroup]]:
        """The groups that the next step learns from, and all that were sampled for it.

        What the prompt order does not keep is replaced by groups of the round's next batches, as long as it allows.
        """
        kept: list[ScoredGroup] = []
        sampled: list[ScoredGroup] = []
        end_of_round = min(self.total, (self.next_round + 1) * self.per_round)
        batches = range(self.batch, min(end_of_round, self.batch + self.order.max_batches))
        wanted = 0
        for batch in batches:
            plans = [plan for row in self.order.rows(batch) for plan in self.policy.groups(self.table, row)]
            groups = self.collector.groups(plans, batch)
            self.batch = batch + 1
            wanted = wanted or len(plans)
            sampled += groups
            kept += [group for group in groups if self.order.keeps(group)]
            if len(kept) >= wanted:
                break
        return kept[:wanted], sampled

    def finish_step(self, trained_tokens: int) -> None:
        """Counts a step whose update took ``trained_tokens``."""
        self.step += 1
        self.trained_tokens += trained_tokens
