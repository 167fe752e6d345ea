"""The collector: rollouts of training rows, scored as groups or for a probe, and their token counts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from toolx_kernels.engine import RolloutEngine
from toolx_kernels.errors import InputError
from toolx_kernels.rollout.prompts import Prompts
from toolx_kernels.rollout.rollout import OnRollout, Rollout, Rollouter
from toolx_kernels.rollout.single_turn import SingleTurn
from toolx_kernels.rollout.tool_loop import ToolLoop
from toolx_kernels.toolcall.reward_runner import Rewards
from toolx_kernels.toolcall.rows import Row
from toolx_kernels.train.config import ToolExpanderConfig
from toolx_kernels.train.groups import GroupPlan, Help, ScoredGroup
from toolx_kernels.train.hard_sampling import Attempt, Demonstrations
from toolx_kernels.train.phases import Phases
from toolx_kernels.train.task import Task

Prompt = tuple[int, Help]  # the index of a row, and the help in its prompt
NAMES = {"verify": "verification", "measure": "probe"}  # on the bar, where they differ from the purpose
MAX_ROLLOUTS = 2048  # rollouts of a probe sampled together


class Collector:
    """Samples rollouts of the training rows and rewards them.

    tokens      written by the model, by purpose: "step", "retry", "probe", "verify", "measure" (the last probe)
    prefilled   read by the model, likewise: each prompt once for all its rollouts in a call, and outputs of tools
    unrewarded  rollouts to which no reward function applied; they earn 0
    """

    def __init__(
        self,
        task: Task,
        rollouter: Rollouter,
        args: ToolExpanderConfig,
        stop_token_ids: tuple[int, ...],
        phases: Phases,
    ):
        self.task, self.rollouter, self.args, self.phases = task, rollouter, args, phases
        self.params = args.sampling(stop_token_ids)
        self.tokens: Counter[str] = Counter()
        self.prefilled: Counter[str] = Counter()
        self.unrewarded = 0

    def state_dict(self) -> dict:
        return {"tokens": dict(self.tokens), "prefilled": dict(self.prefilled), "unrewarded": self.unrewarded}

    def load_state_dict(self, state: dict) -> None:
        self.tokens, self.prefilled = Counter(state["tokens"]), Counter(state["prefilled"])
        self.unrewarded = state["unrewarded"]

    def groups(self, plans: Sequence[GroupPlan], stream: int, purpose: str = "step") -> list[ScoredGroup]:
        """Samples and scores the groups of a batch, all prompts together, with the random numbers of ``stream``;
        ``purpose`` is "step" or "retry"."""
        prompts = [(plan.row, shown) for plan in plans for shown in plan.shown]
        # each prompt of a row in the batch has its own random stream
        prompts_of_row: Counter[int] = Counter()
        row_ids = []
        for row, _ in prompts:
            row_ids.append(row + prompts_of_row[row] * len(self.task.rows))
            prompts_of_row[row] += 1
        bar, n = self.phases.bar, self.args.num_generations
        bar.part("rollout" if purpose == "step" else purpose, n * len(prompts))

        def count(*_: object) -> bool:
            bar.advance_part()
            return False

        rolled_out = self._roll_out(prompts, n, self.rollouter, purpose, row_ids, stream, on_rollout=count)
        sampled = iter(rolled_out)
        groups = []
        for plan in plans:
            group = ScoredGroup(plan, self.task.prompts.ids(self.task.rows[plan.row], *plan.scored_with))
            for shown in plan.shown:
                rollouts = next(sampled)
                group.rollouts += rollouts
                group.shown += [shown] * len(rollouts)
                group.retried += [purpose == "retry"] * len(rollouts)
            group.lengths = [rollout.written for rollout in group.rollouts]
            groups.append(group)
        self._score(groups)
        return groups

    def attempt(self, stream: int, purpose: str, rollouter: Rollouter | None = None) -> Attempt:
        """Returns a function for ``probe`` that samples prompts with the random numbers of ``stream``, each until one
        rollout is solved."""
        most = self.args.verify_rollouts if purpose == "verify" else self.args.probe_rollouts
        total = 0  # rows, of all waves

        def solved_by(asked: list[tuple[int, Demonstrations]], n: int, first: int) -> list[bool]:
            nonlocal total
            total = total if first else len(asked)
            prompts = [(row, Help(shown)) for row, shown in asked]
            solved: list[bool] = []
            size = max(1, MAX_ROLLOUTS // n)
            # a row is done when it is solved; until then, the done share of its rollouts counts
            with self.phases.bar.stretch(NAMES.get(purpose, purpose), total, total - len(asked) * (1 - first / most)):
                # in parts: the rollouts of a wave over a large dataset would not fit in memory
                for start in range(0, len(prompts), size):
                    part = prompts[start : start + size]
                    solved += self._solved(part, n, rollouter or self.rollouter, purpose, stream, first, most)
            return solved

        return solved_by

    def _solved(
        self, prompts: list[Prompt], n: int, rollouter: Rollouter, purpose: str, stream: int, first: int, most: int
    ) -> list[bool]:
        """Returns for each prompt whether one of its ``n`` rollouts (number ``first`` on, of at most ``most``) is
        solved. The default reward takes microseconds: a solved rollout cancels the rest of its group. A user's reward
        functions are called after all rollouts, with as many at a time as in a step.
        """
        solved, done = [False] * len(prompts), [first] * len(prompts)
        at_once = not self.task.own_rewards

        def ends_its_group(place: int, _: int, rollout: Rollout) -> bool:
            if at_once and not solved[place]:
                solved[place] = self.task.solves([self.task.rows[prompts[place][0]]], [rollout])[0]
            before, done[place] = done[place], most if solved[place] else done[place] + 1
            self.phases.bar.advance((done[place] - before) / most)
            return solved[place]

        row_ids = [row for row, _ in prompts]
        groups = self._roll_out(prompts, n, rollouter, purpose, row_ids, stream, first, ends_its_group)
        if at_once:
            return solved
        rows = [self.task.rows[row] for row, _ in prompts for _ in range(n)]
        rollouts = [rollout for group in groups for rollout in group]
        with self.phases.phase("probe"):
            flags = [flag for scores in self._in_parts(rows, rollouts) for flag in self.task.solved(scores)]
        return [any(flags[place * n : (place + 1) * n]) for place in range(len(prompts))]

    def total_rewards(self, rows: Sequence[Row], rollouts: Sequence[Rollout]) -> list[float]:
        """Returns the total reward of each rollout."""
        return [total for scores in self._in_parts(rows, rollouts) for total in scores.total]

    def _in_parts(self, rows: Sequence[Row], rollouts: Sequence[Rollout]) -> Iterator[Rewards]:
        """Yields the rewards of many rollouts: a user's functions get as many at a time as in a step."""
        size = self.args.num_generations * self.args.prompts_per_step
        for start in range(0, len(rows), size):
            yield self.task.rewards(rows[start : start + size], rollouts[start : start + size])

    def _roll_out(
        self,
        prompts: Sequence[Prompt],
        n: int,
        rollouter: Rollouter,
        purpose: str,
        row_ids: Sequence[int],
        stream: int,
        first_rollout: int = 0,
        on_rollout: OnRollout | None = None,
    ) -> list[list[Rollout]]:
        rows = [self.task.rows[row] for row, _ in prompts]
        ids = [self.task.prompts.ids(row, *shown) for row, (_, shown) in zip(rows, prompts, strict=True)]
        self.prefilled[purpose] += sum(map(len, ids))
        with self.phases.phase("rollout" if purpose in ("step", "retry") else "probe"):
            groups = rollouter.roll_out(
                rows,
                ids,
                n,
                self.params,
                row_ids=row_ids,
                step=stream,
                first_rollout=first_rollout,
                on_rollout=on_rollout,
            )
        for rollouts in groups:
            for rollout in rollouts:
                self.tokens[purpose] += rollout.written
                self.prefilled[purpose] += len(rollout.ids) - rollout.written
        return groups

    def _score(self, groups: Sequence[ScoredGroup]) -> None:
        rollouts = [rollout for group in groups for rollout in group.rollouts]
        rows = [self.task.rows[group.plan.row] for group in groups for _ in group.rollouts]
        self.phases.bar.part("reward")
        with self.phases.phase("reward"):
            scores = self.task.rewards(rows, rollouts)
        self.unrewarded += scores.unrewarded
        total, solved = iter(scores.total), iter(self.task.solved(scores))
        parts = {name: iter(values) for name, values in scores.parts.items()}
        for group in groups:
            group.rewards = [next(total) for _ in group.rollouts]
            group.parts = {name: [next(values) for _ in group.rollouts] for name, values in parts.items()}
            group.correct = [
                self.task.judge(rollout.answer_text, self.task.rows[group.plan.row]) for rollout in group.rollouts
            ]
            group.solved = [next(solved) for _ in group.rollouts]


def chosen_rollouter(
    args: ToolExpanderConfig,
    engine: RolloutEngine,
    prompts: Prompts,
    tools: Sequence[Callable],
    environment_factory: Callable[[], Any] | None,
) -> Rollouter:
    """Returns a rollouter with several turns if there are tools or an environment, else with one.

    Raises:
        InputError: the settings ask for rollouts of one turn, and there are tools or an environment.
    """
    if not (tools or environment_factory):
        return SingleTurn(engine, prompts.chat)
    if args.imitates or args.hints:
        raise InputError(
            "sft_fraction, sft_coef and retry_with=hint put all calls in one turn, and tools and environment_factory "
            "need several: leave out one or the other."
        )
    if args.self_exemplify:
        raise InputError(
            "self_exemplify=True has one turn, with examples, thought and answer: leave out tools and "
            "environment_factory, or self_exemplify."
        )
    return ToolLoop(
        engine,
        prompts,
        tools=tools,
        environment_factory=environment_factory,
        max_turns=args.max_tool_calling_iterations + 1,
        tool_timeout=args.tool_timeout,
    )
