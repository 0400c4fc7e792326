"""The rollout loader of partial rollouts: it starts prompts, keeps unfinished groups, and yields
those that are finished.

Each rollout starts as many prompts as `RolloutLoader` would, and draws one part of every answer
that is not finished, older ones included. A group is scored, and trains, once all its answers are
finished; so a batch has as many groups on average as a rollout starts, and not in each rollout.
What is unfinished, and what the prompt sampler knows, is `state_dict`, each rank's its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from posttrain.errors import DataError
from posttrain.rollouts.group import DrawnGroup, Rollout, success_rates
from posttrain.rollouts.partial import OpenGroup, PartialRollouts
from posttrain.rollouts.prompts import SEED_STRIDE, PromptSampler
from posttrain.rollouts.sampling import Completion
from posttrain.rollouts.source import RolloutPlan
from posttrain.run.ranks import from_all_ranks


class PartialRolloutLoader:
    """Yields batches of groups for ever, as `RolloutLoader`; records also hold `ages`, how many
    rollouts ago each token was drawn.

    draw: f(open groups, version) draws a part of each, all ranks together. score: f(prompts,
    completions) -> Rollout. note: f(name, total, count) takes metrics. success_of: the reward whose
    mean in a group is its success rate, for the sampler; None: it hears of none.
    updates_per_rollout: optimizer steps that the finished groups of all ranks are divided over, in
    their order. The rest as in RolloutLoader.
    """

    def __init__(
        self,
        prompts: Any,
        plan: RolloutPlan,
        settings: PartialRollouts,
        *,
        sampler: PromptSampler,
        draw: Callable[[list[OpenGroup], int], None],
        score: Callable[[list[dict], list[list[Completion]]], Rollout],
        advantage: Callable[[Tensor], Tensor],
        on_rollout: Callable[[Rollout], None],
        finish_batch: Callable[[list[dict]], list[dict]],
        note: Callable[[str, float, float], None],
        success_of: str | None = None,
        updates_per_rollout: int = 1,
    ) -> None:
        self.prompts, self.plan, self.settings, self.sampler = prompts, plan, settings, sampler
        self.draw, self.score, self.advantage = draw, score, advantage
        self.on_rollout, self.finish_batch, self.note = on_rollout, finish_batch, note
        self.success_of, self.updates_per_rollout = success_of, updates_per_rollout
        self.first_rollout = 0  # the next one; where a resumed run goes on
        self.open: list[OpenGroup] = []

    def __iter__(self) -> Iterator[list[dict]]:
        while True:
            number = self.first_rollout
            self.first_rollout += 1  # a checkpoint between the last batch and the next rollout
            yield from [self.finish_batch(batch) for batch in self._batches(number)]

    def _batches(self, number: int) -> list[list[dict]]:
        self._start(number)
        self.draw(self.open, number)
        finished = [group for group in self.open if group.is_finished]
        self._note_parts(number, finished)
        self.open = [group for group in self.open if not group.is_finished]
        drawn, rates = self._scored(finished)
        everyone = from_all_ranks(
            {
                "positions": [group.position for group in finished],
                "results": list(zip([g.row for g in finished], rates, strict=True)),
                "rewards": [group.rewards for group in drawn],
            }
        )
        self.sampler.report([result for rank in everyone for result in rank["results"]])
        advantages = self._advantages(everyone)
        records = [
            self._record(group, values, number)
            for group, values in zip(drawn, advantages, strict=True)
        ]
        return self._divided(records, finished, everyone)

    def _start(self, number: int) -> None:
        first = number * self.plan.prompts_per_rollout
        rows = self.sampler.take(number, self.plan.prompts_per_rollout)
        for position in self.plan.positions(number):
            self._open(position, rows[position - first], [])

    def _open(self, position: int, row: int, answers: list[Completion]) -> None:
        seed = self.plan.seed * SEED_STRIDE + position
        prompt_ids = self.prompts[row]["prompt_ids"]
        self.open.append(OpenGroup(position, row, seed, prompt_ids, answers))

    def _note_parts(self, number: int, finished: Sequence[OpenGroup]) -> None:
        answers = [answer for group in finished for answer in group.answers]
        waiting = sum(len(group.unfinished) for group in self.open)
        self.note("unfinished_answers", waiting, sum(len(group.answers) for group in self.open))
        started = self.plan.prompts_per_batch * self.plan.batches_per_rollout
        self.note("finished_groups", len(finished), started)
        if answers:
            versions = [version for answer in answers for version in answer.policy_versions]
            self.note("on_policy_tokens", versions.count(number), len(versions))
            loops = sum(answer.finish_reason == "repetition" for answer in answers)
            self.note("repetition_stops", loops, len(answers))
        for name, value in self.sampler.metrics(number).items():
            self.note(name, value, 1)

    def _scored(self, finished: Sequence[OpenGroup]) -> tuple[list[DrawnGroup], list[float | None]]:
        """The groups with their rewards; their success rates, None where none could be scored."""
        if not finished:
            return [], []
        prompts = [self.prompts[group.row] for group in finished]
        rollout = self.score(prompts, [group.answers for group in finished])
        self.on_rollout(rollout)
        if self.success_of is None:
            return rollout.groups(), [None] * len(finished)
        return rollout.groups(), success_rates(rollout, self.success_of)

    def _advantages(self, everyone: Sequence[dict]) -> list[list[float]]:
        """Of this rank's groups, as a function of all ranks' rewards."""
        rewards = [row for rank in everyone for row in rank["rewards"]]
        if not rewards:
            return []
        first = sum(len(rank["rewards"]) for rank in everyone[: self.plan.rank])
        mine = len(everyone[self.plan.rank]["rewards"])
        return self.advantage(torch.stack(rewards))[first : first + mine].tolist()

    def _record(self, group: DrawnGroup, advantages: list[float], number: int) -> dict:
        """Of the answers with a token that trains."""
        oldest = number - self.settings.max_staleness
        rows = [i for i, a in enumerate(group.answers) if a.policy_versions[-1] >= oldest]
        ages = [[number - v for v in group.answers[i].policy_versions] for i in rows]
        return {**group.training_record(advantages, rows), "ages": ages}

    def _divided(
        self, records: list[dict], finished: Sequence[OpenGroup], everyone: Sequence[dict]
    ) -> list[list[dict]]:
        """This rank's share of each update, cut into its accumulation steps.

        Which update a group belongs to follows from its place among all ranks' groups, so that
        ranks and accumulation steps only cut the same optimizer batches in another way. Where there
        are fewer groups than updates, those without a group come last.
        """
        order = sorted(position for rank in everyone for position in rank["positions"])
        place = {position: i for i, position in enumerate(order)}
        updates: list[list[dict]] = [[] for _ in range(self.updates_per_rollout)]
        most = max(len(order), self.updates_per_rollout)
        for group, record in zip(finished, records, strict=True):
            updates[place[group.position] * self.updates_per_rollout // most].append(record)
        steps = self.plan.batches_per_rollout // self.updates_per_rollout
        cuts = [
            mine[step * len(mine) // steps : (step + 1) * len(mine) // steps]
            for mine in updates
            for step in range(steps)
        ]
        return [batch or [self._stand_in()] for batch in cuts]

    def _stand_in(self) -> dict:
        """Something to run where no group is finished: one token, too old to train."""
        ids = self.prompts[0]["prompt_ids"]
        age = self.settings.max_staleness + 1
        return {
            "prompt_ids": ids, "answers": [ids[-1:]], "policy_logps": [[0.0]],
            "sampler_logps": [[0.0]], "advantages": [0.0], "ages": [[age]],
        }  # fmt: skip

    # The state, between two rollouts.

    def state_dict(self) -> dict[str, Any]:
        """This rank's, of JSON types."""
        return {
            "world_size": self.plan.world_size,
            "next_rollout": self.first_rollout,
            "open": [group.state_dict() for group in self.open],
            "sampler": self.sampler.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """DataError where the checkpoint is another number of ranks' or of another rollout."""
        found = state["world_size"], state["next_rollout"]
        expected = self.plan.world_size, self.first_rollout
        if found != expected:
            raise DataError(
                f"unfinished answers: expected those of {expected[0]} processes before rollout "
                f"{expected[1]}, found {found[0]} and {found[1]}. Resume with the number of "
                "processes and --updates_per_rollout that the run was started with."
            )
        self.sampler.load_state_dict(state["sampler"])
        for group in state["open"]:
            answers = [Completion(**answer) for answer in group["answers"]]
            self._open(group["position"], group["row"], answers)
