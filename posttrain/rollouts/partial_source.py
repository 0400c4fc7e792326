"""Partial rollouts: a source that keeps unfinished groups and gives those that are finished.

    PartialRollouts(prompts, rewards, sampling, num_generations=8, advantage=dr_grpo_advantages,
                    options=PartialOptions(Parts(tokens_per_rollout=4096), success_of="accuracy"))

Each rollout starts as many prompts as `Rollouts` would, and samples one part of every completion
that is not finished, older ones included (posttrain.rollouts.partial). A group is scored, and
trains, once all its completions are finished. So a rollout trains as many groups as it starts only
on average. Each rank's checkpoint holds its unfinished groups and the state of the prompt sampler.
Kimi k1.5 (arXiv 2501.12599). With tokens_per_rollout=None and no sampler it gives what `Rollouts`
gives.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from posttrain.errors import ConfigError, DataError
from posttrain.rewards.call import Scoring
from posttrain.rewards.checks import reward_identity
from posttrain.rollouts.group import (
    Advantage,
    Group,
    Prompt,
    Rewards,
    Rollout,
    arguments_of,
    has_signal,
    roll_out,
    success_rates,
)
from posttrain.rollouts.options import SEED_STRIDE, RolloutOptions
from posttrain.rollouts.partial import OpenGroup, Parts, sample_parts
from posttrain.rollouts.pass_rates import (
    cached_pass_rates,
    fingerprint,
    measure_pass_rates,
    with_pass_rates,
)
from posttrain.rollouts.prompts import InOrderSampler, PromptSampler
from posttrain.rollouts.sampling import Completion, Sampling
from posttrain.rollouts.source import Rollouts
from posttrain.run.engine import from_all_ranks

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

    from posttrain.rollouts.lookahead import Lookahead
    from posttrain.rollouts.policies import TrainerView

STATE_FILE = "unfinished_rank{rank}.json"  # in checkpoints: the source's state, each rank's own


@dataclass(frozen=True)
class PartialOptions:
    """The settings of partial rollouts.

    Attributes:
        parts: The settings that cut completions into parts, and decide which parts train.
        sampler: f(prompts) -> a PromptSampler of the prompts, of which all can be scored; None
            takes them in order.
        success_of: The reward whose mean in a group is the prompt's success rate, for the sampler.
        pass_rate_generations: Completions for each prompt by the starting model, whose success rate
            becomes the column `pass_rate`; 0 measures none.
        pass_rate_folder: Folder in which the measured rates are kept for later runs.
    """

    parts: Parts = field(default_factory=Parts)
    sampler: Callable[[Dataset], PromptSampler] | None = None
    success_of: str | None = None
    updates_per_rollout: int = 1
    samples_path: str | Path | None = None
    scoring: Scoring = field(default_factory=Scoring)
    pass_rate_generations: int = 0
    pass_rate_folder: str | Path | None = None
    max_unscored_share: float | None = None
    lookahead: Lookahead | None = None


class PartialRollouts(Rollouts):
    """A source whose completions may take several rollouts; see the module.

    The groups' columns also hold `trained` and `fresh`, and `old_logps` of older tokens, which
    start from the policy that sampled them. Metrics: `finished_groups`, `unfinished_completions`,
    `on_policy_tokens`, `repetition_stops`, and the sampler's.
    """

    def __init__(
        self,
        prompts: Dataset,
        rewards: Rewards,
        sampling: Sampling,
        *,
        num_generations: int,
        advantage: Advantage,
        eval_prompts: Dataset | None = None,
        options: PartialOptions,
    ) -> None:
        if arguments_of(advantage) != ("rewards",):
            raise ConfigError(
                "advantage: expected a function of (rewards) here, found one of single tokens."
            )
        if options.success_of not in (None, *rewards):
            raise ConfigError(
                f"success_of: expected the name of a reward ({', '.join(rewards)}), "
                f"found {options.success_of!r}."
            )
        options.parts.check(sampling)
        super().__init__(
            prompts,
            rewards,
            sampling,
            num_generations=num_generations,
            advantage=advantage,
            eval_prompts=eval_prompts,
            options=RolloutOptions(
                updates_per_rollout=options.updates_per_rollout,
                scoring=options.scoring,
                samples_path=options.samples_path,
                max_unscored_share=options.max_unscored_share,
                lookahead=options.lookahead,
            ),
        )
        self.partial, self.parts = options, options.parts

    # The run.

    def bind(
        self, trainer: TrainerView, tokenizer: PreTrainedTokenizerBase, *, epochs: int
    ) -> None:
        """Prepare for a run: measure pass rates if they are asked for."""
        super().bind(trainer, tokenizer, epochs=epochs)
        if self.partial.pass_rate_generations:
            self._add_pass_rates(trainer.accelerator.unwrap_model(trainer.model))
        self.check_prompts()

    def start(self, num_rollouts: int) -> None:
        """Begin a run with no unfinished groups."""
        super().start(num_rollouts)
        self.open: list[OpenGroup] = []
        self.next_rollout = 0
        make = self.partial.sampler
        in_order = InOrderSampler(len(self.prompts), seed=self.plan.seed)
        self.prompt_sampler = make(self.prompts) if make else in_order

    def check_prompts(self) -> None:
        """Raise ConfigError where the data has fewer prompts than groups are open together."""
        started = self.plan.prompts_per_rollout
        num_parts = self.parts.num_parts(self.sampling.max_tokens)
        if started * num_parts > len(self.prompts):
            raise ConfigError(
                f"a rollout starts {started} prompts, the longest completions take {num_parts} "
                f"rollouts, and the data has {len(self.prompts)} prompts; expected at least "
                f"{started * num_parts}. Lower the batch size, or raise --tokens_per_rollout."
            )

    def _add_pass_rates(self, policy: nn.Module) -> None:
        """Give the prompts a column `pass_rate`: the share of completions by the starting model
        that are right. A collective."""
        options, prompts, reward = self.partial, self.prompts, self.partial.success_of
        if reward is None:
            raise ConfigError(
                "pass rates: expected success_of, the reward that says what is right."
            )
        with_pass_rates(prompts)  # raises for a column `pass_rate`, before hours of sampling
        number, own = options.pass_rate_generations, {reward: self.rewards[reward]}
        policy = policy.to(self.trainer.args.device)
        judge = reward_identity(self.rewards[reward][0])
        made_for = fingerprint(policy, prompts, self.sampling, judge, number)

        def sample(prompts: list[Prompt], seeds: Sequence[int]) -> Rollout:
            return self.roll_out(prompts, seeds, num_generations=number, rewards=own)

        def measure() -> list[float | None]:
            return measure_pass_rates(prompts, sample, reward=reward, num_generations=number)

        path = Path(options.pass_rate_folder or "pass_rates") / f"{made_for[:16]}.json"
        with self.trainer.half_precision():
            rates = cached_pass_rates(path, measure)
        self.prompts = with_pass_rates(prompts, rates)

    # One rollout.

    def groups(self, number: int) -> list[Group]:
        """Start prompts, sample a part of all that is open, and score what is finished."""
        self.next_rollout = number + 1
        self._start(number)
        self._sample_parts(number)
        finished = [group for group in self.open if group.is_finished]
        self._note_parts(number, finished)
        self.open = [group for group in self.open if not group.is_finished]
        self.finished = finished
        groups, rates = self._scored(finished)
        results = from_all_ranks(list(zip([g.row for g in finished], rates, strict=True)))
        self.prompt_sampler.report([result for theirs in results for result in theirs])
        return groups

    def batches(self, groups: list[Group], number: int) -> list[list[Group]]:
        """Divide the finished groups among the updates and their accumulation steps.

        Which update a group belongs to follows from its position among all ranks' groups, so that
        ranks and accumulation steps only cut the same optimizer batches in another way. Where there
        are fewer groups than updates, those without a group come last.
        """
        super().batches(groups, number)  # for the advantages
        positions = [group.position for group in self.finished]
        order = sorted(position for theirs in from_all_ranks(positions) for position in theirs)
        place = {position: i for i, position in enumerate(order)}
        num_updates = self.options.updates_per_rollout
        updates: list[list[Group]] = [[] for _ in range(num_updates)]
        most = max(len(order), num_updates)
        for position, group in zip(positions, groups, strict=True):
            trained = self._with_ages(group, number)
            updates[place[position] * num_updates // most].append(trained)
        steps = self.plan.batches_per_rollout // num_updates
        cuts = [
            mine[step * len(mine) // steps : (step + 1) * len(mine) // steps]
            for mine in updates
            for step in range(steps)
        ]
        return [batch or [self._stand_in()] for batch in cuts]

    def _start(self, number: int) -> None:
        first = number * self.plan.prompts_per_rollout
        rows = self.prompt_sampler.take(number, self.plan.prompts_per_rollout)
        for position in self.plan.positions(number):
            self._open(position, rows[position - first], [])

    def _open(self, position: int, row: int, completions: list[Completion]) -> None:
        seed = self.plan.seed * SEED_STRIDE + position
        prompt_ids = self.prompts[row]["prompt_ids"]
        self.open.append(OpenGroup(position, row, seed, prompt_ids, completions))

    def _sample_parts(self, number: int) -> None:
        begun = time.perf_counter()
        with self.current.generator() as generator:
            sample_parts(
                generator.generate,
                self.open,
                version=number,
                settings=self.parts,
                sampling=self.sampling,
                num_generations=self.num_generations,
            )
        self.trainer.metrics.add("seconds_generate", time.perf_counter() - begun)

    def _note_parts(self, number: int, finished: Sequence[OpenGroup]) -> None:
        note = self.trainer.metrics.add
        completions = [completion for group in finished for completion in group.completions]
        waiting = sum(len(group.unfinished) for group in self.open)
        note("unfinished_completions", waiting, sum(len(group.completions) for group in self.open))
        started = self.plan.prompts_per_batch * self.plan.batches_per_rollout
        note("finished_groups", len(finished), started)
        if completions:
            versions = [version for c in completions for version in c.policy_versions]
            note("on_policy_tokens", versions.count(number), len(versions))
            loops = sum(c.finish_reason == "repetition" for c in completions)
            note("repetition_stops", loops, len(completions))
        for name, value in self.prompt_sampler.metrics(number).items():
            note(name, value, 1)

    def _scored(self, finished: Sequence[OpenGroup]) -> tuple[list[Group], list[float | None]]:
        """Return the groups with their rewards, and their success rates; None where unknown."""
        if not finished:
            self.learning.read([], [])
            return [], []
        rollout = roll_out(
            _Sampled([group.completions for group in finished]),
            self.tokenizer,
            [self.prompts[group.row] for group in finished],
            rewards=self.rewards,
            sampling=self.sampling,
            num_generations=self.num_generations,
            seeds=[0] * len(finished),
            scoring=self.options.scoring,
            trainer_state=self.trainer.state,
        )
        rollout.policy_version = self.trainer.state.global_step
        del rollout.seconds["generate"]  # `_sample_parts` has measured it
        self.note(rollout)
        self.learning.read([rollout], [bool(x) for x in has_signal(rollout.rewards)])
        if self.partial.success_of is None:
            return rollout.groups(), [None] * len(finished)
        return rollout.groups(), success_rates(rollout, self.partial.success_of)

    def _with_ages(self, group: Group, number: int) -> Group:
        """Keep the completions with a token that trains, and add the columns that tell its age."""
        oldest = number - self.parts.max_staleness
        kept = [i for i, c in enumerate(group.completions) if c.policy_versions[-1] >= oldest]
        group = group.select(kept)
        ages = [number - torch.tensor(c.policy_versions) for c in group.completions]
        policy = group.columns["policy_logps"]
        group.columns |= {
            "trained": [(age <= self.parts.max_staleness).float() for age in ages],
            "fresh": [(age == 0).float() for age in ages],
            # Older tokens start from the policy that sampled them, fresh ones from the current one.
            "old_logps": [
                torch.where(age > 0, logps, torch.nan)
                for age, logps in zip(ages, policy, strict=True)
            ],
        }
        return group

    def _stand_in(self) -> Group:
        """Make a group of one token, which does not train, to run where no group is finished."""
        prompt = self.prompts[0]
        completion = Completion(prompt["prompt_ids"][-1:], [0.0], [0.0])
        group = Group(prompt, [completion], torch.zeros(1), advantages=torch.zeros(1))
        group.columns |= {"trained": [torch.zeros(1)], "fresh": [torch.zeros(1)]}
        group.columns["old_logps"] = [torch.zeros(1)]
        return group.without_advantage()

    # The state, between two rollouts.

    def save(self, folder: Path) -> None:
        """Write this rank's unfinished groups and what the prompt sampler knows."""
        self._state_file(folder).write_text(json.dumps(self.state_dict()), encoding="utf-8")

    def load(self, folder: Path, next_rollout: int) -> None:
        """Continue with what `save` wrote; DataError where this rank's file is missing."""
        path = self._state_file(folder)
        if not path.is_file():
            raise DataError(
                f"{path} is missing: expected the unfinished completions of this process. Resume "
                "with the recipe and the number of processes that the run was started with."
            )
        self.load_state_dict(json.loads(path.read_text(encoding="utf-8")), next_rollout)

    def _state_file(self, folder: Path) -> Path:
        return folder / STATE_FILE.format(rank=self.plan.rank)

    def state_dict(self) -> dict[str, Any]:
        """Return this rank's state as JSON types."""
        return {
            "world_size": self.plan.world_size,
            "next_rollout": self.next_rollout,
            "open": [group.state_dict() for group in self.open],
            "sampler": self.prompt_sampler.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any], next_rollout: int) -> None:
        """Raise DataError where the state is of another number of ranks, or of another rollout."""
        found = state["world_size"], state["next_rollout"]
        expected = self.plan.world_size, next_rollout
        if found != expected:
            raise DataError(
                f"unfinished completions: expected those of {expected[0]} processes before rollout "
                f"{expected[1]}, found {found[0]} and {found[1]}. Resume with the number of "
                "processes and --updates_per_rollout that the run was started with."
            )
        self.next_rollout = next_rollout
        self.prompt_sampler.load_state_dict(state["sampler"])
        for group in state["open"]:
            completions = [Completion(**fields) for fields in group["completions"]]
            self._open(group["position"], group["row"], completions)


class _Sampled:
    """A generator that returns completions which are sampled already."""

    def __init__(self, completions: list[list[Completion]]) -> None:
        self.completions = completions

    def generate(self, *_: object, **__: object) -> list[list[Completion]]:
        return self.completions
