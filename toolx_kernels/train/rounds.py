"""Rounds of a run: a probe before each, then its batches of prompts, hard ones sampled as the policy says."""

from __future__ import annotations

from toolx_kernels.train.collect import Collector
from toolx_kernels.train.config import ToolExpanderConfig
from toolx_kernels.train.demonstrators import HardSamplePolicy, PlainGRPO
from toolx_kernels.train.groups import ScoredGroup
from toolx_kernels.train.hard_sampling import HardSamples, Probe, probe
from toolx_kernels.train.policies import PromptOrder

# Probes and verifications draw from other random streams than training steps.
PROBE_STREAM = 1 << 31
VERIFY_STREAM = 3 << 30


class Rounds:
    """A run as batches of prompts: ``per_epoch`` of them are an epoch, ``per_round`` a round, ``total`` the run.

    ``batch`` and ``round`` say where the run stands; they and the table are part of each checkpoint.
    """

    def __init__(
        self,
        table: HardSamples,
        policy: HardSamplePolicy,
        prompts: PromptOrder,
        collector: Collector,
        args: ToolExpanderConfig,
    ):
        self.table, self.policy, self.prompts, self.collector, self.args = table, policy, prompts, collector, args
        self.batch = 0  # drawn so far: one a step, unless groups are dropped and the step filled up
        self.round = -1  # the one whose probe was done last
        self.trained_tokens = 0  # that passed through the training forward
        self.per_epoch = max(1, len(table.rows) // args.prompts_per_step)
        self.per_round = self.per_epoch * args.epochs_per_round
        self.total = args.num_train_epochs * self.per_epoch
        if args.max_steps > 0:
            self.total = min(self.total, args.max_steps * prompts.max_batches)

    @property
    def current(self) -> int:
        """The round of the next batch."""
        return self.batch // self.per_round

    def members(self, round_index: int) -> list[int]:
        """The training rows that a round may use, in dataset order."""
        first = round_index * self.per_round
        batches = range(first, min(first + self.per_round, self.total))
        return sorted({row for batch in batches for row in self.prompts.rows(batch)})

    def enter(self, round_index: int) -> Probe | None:
        """Probes the round's raw prompts, then lets the policy choose what it shows with the hard ones.

        Of a round that is gone on with only those rows are probed that a smaller ``max_steps`` had left out; None when
        there are none.
        """
        asked = self.members(round_index)
        if self.round == round_index:
            done = {i for i, row in enumerate(self.table.states) if row.probes and row.probes[-1][0] == round_index}
            asked = [row for row in asked if row not in done]
        self.round = round_index
        if not asked:
            return None
        found = self.probe(asked, round_index)
        self.policy.start_round(self.table, found.hard, round_index)
        return found

    def probe(self, members: list[int], round_index: int, purpose: str = "probe") -> Probe:
        """Finds the rows among ``members`` whose raw prompts get no correct rollout, and enters them in the table."""
        attempt = self.collector.attempt(PROBE_STREAM + round_index, purpose)
        found = probe([(row, ()) for row in members], self.args.probe_rollouts, attempt)
        self.table.record(found, round_index)
        return found

    def next_groups(self) -> tuple[list[ScoredGroup], list[ScoredGroup]]:
        """The groups that the next step learns from, and all that were sampled for it.

        What the prompt sampler does not keep is replaced by groups of the round's next batches, as long as it allows.
        """
        kept: list[ScoredGroup] = []
        sampled: list[ScoredGroup] = []
        end_of_round = min(self.total, (self.current + 1) * self.per_round)
        batches = range(self.batch, min(end_of_round, self.batch + self.prompts.max_batches))
        wanted = 0
        for batch in batches:
            plans = [plan for row in self.prompts.rows(batch) for plan in self.policy.groups(self.table, row)]
            groups = self.collector.groups(plans, batch)
            self.batch = batch + 1
            wanted = wanted or len(plans)
            sampled += groups
            kept += [group for group in groups if self.prompts.keeps(group)]
            if len(kept) >= wanted:
                break
        return kept[:wanted], sampled

    @property
    def spent_tokens(self) -> int:
        """Tokens that the method cost so far: written in steps and verifications, trained on, and written in probes
        if the hard-sample policy acts on these; evaluations and the last probe are measurements."""
        tokens = self.collector.tokens
        acts = not isinstance(self.policy, PlainGRPO)
        return self.trained_tokens + tokens["step"] + tokens["verify"] + (tokens["probe"] if acts else 0)
