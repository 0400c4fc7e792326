"""Partial rollouts and prompts that are chosen: RLTrainer over PartialRolloutLoader.

    PartialRolloutTrainer(model, args, …, parts=PartialRollouts(tokens_per_rollout=4096),
                          sampler=lambda prompts: PrioritizedSampler(len(prompts), seed=0),
                          success_of="accuracy", callbacks=[OptimizerReset(every=updates)])

Kimi k1.5 (arXiv 2501.12599). Goes with any advantage and loss. With tokens_per_rollout=None and no
sampler it is RLTrainer.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from posttrain.errors import ConfigError, DataError
from posttrain.losses import fresh_tokens
from posttrain.packed.batch import PackedBatch
from posttrain.rewards.checks import reward_identity
from posttrain.rollouts.generator import HFGenerator
from posttrain.rollouts.group import Rollout, roll_out
from posttrain.rollouts.partial import OpenGroup, PartialRollouts, draw_parts
from posttrain.rollouts.partial_loader import PartialRolloutLoader
from posttrain.rollouts.pass_rates import (
    cached_pass_rates,
    fingerprint,
    measure_pass_rates,
    with_pass_rates,
)
from posttrain.rollouts.prompts import InOrderSampler, PromptSampler
from posttrain.rollouts.sampling import Completion
from posttrain.rollouts.source import arguments_of
from posttrain.run.engine import whole_model
from posttrain.trainers.rl import RLTrainer

# Settings of RLTrainer that would be ignored here.
NOT_OURS = {"selection", "engine", "overlap_rollouts", "reward_kl_coef"}
STATE_FILE = "unfinished_rank{rank}.json"  # in checkpoints: the loader's state, each rank's own


class PartialRolloutTrainer(RLTrainer):
    """Adds to RLTrainer's settings:

    parts: how answers are cut into parts, and which parts train. sampler: f(prompts) -> which
    of them are started, given those that are left after RLTrainer's checks; None: in order.
    success_of: the reward whose mean in a group is the prompt's success rate.

    Not among its settings: `selection`, for the sampler chooses; another engine or policy that
    draws; rewards and advantages of single tokens. Metrics: `finished_groups`,
    `unfinished_answers`, `on_policy_tokens`, `repetition_stops`, and the sampler's.
    """

    def __init__(
        self,
        model: nn.Module,
        args: Any,
        *,
        parts: PartialRollouts,
        sampler: Callable[[Any], PromptSampler] | None = None,
        success_of: str | None = None,
        **settings: Any,
    ) -> None:
        for name in NOT_OURS & set(settings):
            raise ConfigError(
                f"{name}: PartialRolloutTrainer has no such setting. Its sampler chooses the "
                "prompts, the policy itself draws, and a reward counts for a whole answer."
            )
        if arguments_of(settings["advantage"]) != ("rewards",):
            raise ConfigError(
                "advantage: expected a function of (rewards) here, found one of single tokens."
            )
        rewards = settings["rewards"]
        if success_of not in (None, *rewards):
            raise ConfigError(
                f"success_of: expected the name of a reward ({', '.join(rewards)}), "
                f"found {success_of!r}."
            )
        parts.check(settings["sampling"])
        super().__init__(model, args, **settings)
        self.parts, self.make_sampler, self.success_of = parts, sampler, success_of
        self._check_prompts()

    def _check_prompts(self) -> None:
        started = self.plan.prompts_per_rollout
        num_parts = self.parts.num_parts(self.sampling.max_tokens)
        if started * num_parts > len(self.train_dataset):
            raise ConfigError(
                f"a rollout starts {started} prompts, the longest answers take {num_parts} "
                f"rollouts, and the data has {len(self.train_dataset)} prompts; expected at least "
                f"{started * num_parts}. Lower the batch size, or raise --tokens_per_rollout."
            )

    # Rollouts.

    def get_train_dataloader(self) -> PartialRolloutLoader:
        prompts, seed = self.train_dataset, self.args.seed
        in_order = InOrderSampler(len(prompts), seed=seed)
        self.loader = PartialRolloutLoader(
            prompts,
            self.plan,
            self.parts,
            sampler=self.make_sampler(prompts) if self.make_sampler else in_order,
            draw=self._draw,
            score=self._score,
            advantage=self.advantage,
            on_rollout=self._note_rollout,
            finish_batch=self._finish_batch,
            note=self.metrics.add,
            success_of=self.success_of,
            updates_per_rollout=self.updates_per_rollout,
        )
        return self.loader

    def add_pass_rates(self, num_generations: int, folder: str | Path) -> None:
        """Give the prompts a column `pass_rate`: the share of so many answers by the model as it is
        that are right, for the sampler. Kept in `folder`, for later runs; a collective."""
        if self.success_of is None:
            raise ConfigError(
                "pass rates: expected success_of, the reward that says what is right."
            )
        reward, prompts = self.success_of, self.train_dataset
        with_pass_rates(prompts)  # refused before it takes hours
        own = {"rewards": {reward: self.rewards[reward]}, "num_generations": num_generations}
        policy = self.accelerator.unwrap_model(self.model).to(self.args.device)
        judge = reward_identity(self.rewards[reward][0])
        made_for = fingerprint(policy, prompts, self.sampling, judge, num_generations)
        measure = partial(
            measure_pass_rates, prompts, partial(self._roll_out, **own), reward=reward,
            num_generations=num_generations,
        )  # fmt: skip
        with self.half_precision():
            rates = cached_pass_rates(Path(folder) / f"{made_for[:16]}.json", measure)
        self.train_dataset = with_pass_rates(prompts, rates)

    def _draw(self, groups: list[OpenGroup], version: int) -> None:
        begun = time.perf_counter()
        with whole_model(self.accelerator, self.model_wrapped) as policy:
            draw_parts(
                HFGenerator(policy).generate, groups, version=version, settings=self.parts,
                sampling=self.sampling, num_generations=self.num_generations,
            )  # fmt: skip
        self.metrics.add("seconds_generate", time.perf_counter() - begun)

    def _score(self, prompts: list[dict], completions: list[list[Completion]]) -> Rollout:
        rollout = roll_out(
            _Drawn(completions), self.processing_class, prompts, rewards=self.rewards,
            scoring=self.scoring, sampling=self.sampling, trainer_state=self.state,
            num_generations=self.num_generations, seeds=[0] * len(prompts),
        )  # fmt: skip
        del rollout.seconds["generate"]  # nothing was drawn: that was before
        return rollout

    # The loss: which tokens it sees.

    def count_items(self, examples: Sequence[dict]) -> int:
        ages = [ages for group in examples for ages in group["ages"]]
        trained = [sum(age <= self.parts.max_staleness for age in answer) for answer in ages]
        return sum(trained) if self.per == "token" else sum(count > 0 for count in trained)

    def _old_and_mask(
        self, batch: PackedBatch, examples: Sequence[dict], logps: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Older tokens start from the policy that drew them, and train up to `max_staleness`."""
        old, mask = super()._old_and_mask(batch, examples, logps)
        ages = self._dense(batch, examples, "ages")
        old = torch.where(ages > 0, self._dense(batch, examples, "policy_logps"), old)
        return old, fresh_tokens(mask, ages, max_staleness=self.parts.max_staleness)

    def _note_first_ratio(
        self, batch: PackedBatch, examples: Sequence[dict], gaps: Tensor, mask: Tensor
    ) -> None:
        newest = fresh_tokens(mask, self._dense(batch, examples, "ages"))
        super()._note_first_ratio(batch, examples, gaps, newest)

    # Checkpoints.

    def _state_file(self, folder: str | Path) -> Path:
        return Path(folder) / STATE_FILE.format(rank=self.args.process_index)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        folder = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"
        self._state_file(folder).write_text(json.dumps(self.loader.state_dict()), encoding="utf-8")

    def _init_training_state(
        self, max_steps: int, steps: int, epochs: int, resume_from_checkpoint: Any, trial: Any
    ) -> Any:
        state = super()._init_training_state(
            max_steps, steps, epochs, resume_from_checkpoint, trial
        )
        if resume_from_checkpoint is not None:
            path = self._state_file(resume_from_checkpoint)
            if not path.is_file():
                raise DataError(
                    f"{path} is missing: expected the unfinished answers of this process. Resume "
                    "with the recipe and the number of processes that the run was started with."
                )
            self.loader.load_state_dict(json.loads(path.read_text(encoding="utf-8")))
        return state


class _Drawn:
    """A generator whose answers are there already."""

    def __init__(self, completions: list[list[Completion]]) -> None:
        self.completions = completions

    def generate(self, *_: Any, **__: Any) -> list[list[Completion]]:
        return self.completions


class OptimizerReset(TrainerCallback):
    """Empties the optimizer's state before every `every`-th step: Adam's moments start anew.

    In Kimi k1.5 each iteration is a new problem, with a reference of its own, so `every` is the
    updates per rollout. The schedule of the learning rate goes on.
    """

    def __init__(self, every: int) -> None:
        if every < 1:
            raise ConfigError(f"optimizer reset: expected at least 1 step, found {every}.")
        self.every = every

    def on_step_begin(
        self, _args: Any, state: Any, _control: Any, optimizer: Any = None, **_: Any
    ) -> None:
        if state.global_step % self.every == 0:
            while hasattr(optimizer, "optimizer"):  # accelerate's and DeepSpeed's wrappers
                optimizer = optimizer.optimizer
            optimizer.state.clear()
