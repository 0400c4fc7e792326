"""Train a policy by RL from rewards: a trainer composed of a source of groups and an objective.

    rollouts = Rollouts(prompts, rewards, sampling, num_generations=8, advantage=group_advantages)
    objective = Objective(clipped_policy_loss, per="token", beta=0.01)
    RLTrainer(model, args, rollouts, objective, tokenizer=tokenizer).train()

`Rollouts` (posttrain.rollouts.source, or .partial_source) owns prompts, sampling, rewards and
advantages; `Objective` (posttrain.trainers.objective) owns the loss. The trainer asks for a
rollout, lets the objective add the log-probs that training must not move, cuts groups to
micro-batches, and steps.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from posttrain.errors import ConfigError
from posttrain.packed.batch import PackedBatch, with_experts
from posttrain.packed.forward import MOST_TOKENS, check_context, frozen_copy, packed_logps
from posttrain.packed.half import half_of
from posttrain.packed.prepare import prepare_once
from posttrain.rollouts.group import Group, pack
from posttrain.rollouts.record import note_completions
from posttrain.rollouts.sampling import Sampling
from posttrain.rollouts.source import Rollouts
from posttrain.run.options import say
from posttrain.run.watch import Watch
from posttrain.trainers.base import PackedTrainer
from posttrain.trainers.callbacks import TrainerAware
from posttrain.trainers.objective import Columns, RLObjective, Step, StepBatch

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import (
        PreTrainedTokenizerBase,
        TrainerControl,
        TrainerState,
        TrainingArguments,
    )
    from transformers.trainer_utils import TrainOutput

    from posttrain.packed.replay import RoutingReplay


class RLTrainer(PackedTrainer):
    """Trains a policy on completions that it generates itself; see the module.

    `per_device_train_batch_size` counts completions. With a KL term the reference is a frozen copy
    of the model as it is now, or with LoRA the model without its adapter.

    Raises:
        ConfigError: Settings that cannot work together, before anything is generated.
    """

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        rollouts: Rollouts,
        objective: RLObjective,
        *,
        tokenizer: PreTrainedTokenizerBase,
        callbacks: Sequence[TrainerCallback] = (),
        max_tokens_per_microbatch: int | None = None,
    ) -> None:
        rollouts.check_arguments(args)
        check_steps(args, rollouts.options.updates_per_rollout, objective.epochs)
        check_together(rollouts, objective)
        args.ignore_data_skip = True  # rollouts know where a resumed run continues
        prepare_once(model, half=args.bf16 or args.fp16)  # before it is wrapped or sharded
        longest = rollouts.longest_sequence
        check_context(model, longest, "Lower --max_prompt_length or --max_completion_length.")
        is_needed = objective.needs_reference or rollouts.options.reward_kl_coef
        self.reference = frozen_copy(model, args.device, half=half_of(args)) if is_needed else None
        self._extend(model)
        super().__init__(
            model,
            args,
            tokenizer=tokenizer,
            train_dataset=rollouts.prompts,
            eval_dataset=rollouts.eval_prompts,
            max_tokens_per_microbatch=max_tokens_per_microbatch,
            callbacks=[*callbacks, WatchCallback(list(rollouts.rewards))],
        )
        self.rollouts, self.objective = rollouts, objective
        rollouts.bind(self, tokenizer, epochs=objective.epochs)
        # A group that is cut computes its prompt again, so that is done for memory's sake alone.
        self.max_tokens_per_group = max_tokens_per_microbatch or MOST_TOKENS
        self.replay = self._start_replay(model) if rollouts.options.replay_routing else None
        # Filled where a callback or an optimizer looks at the step's own tokens; None otherwise.
        self.step_batches: list[StepBatch] | None = None
        for callback in self._aware:
            callback.attach(self)

    def _extend(self, model: nn.Module) -> None:
        """Add to the model what trains with it, once the reference is copied; nothing here."""

    def _start_replay(self, model: nn.Module) -> RoutingReplay:
        """Have routing recorded and replayed, once the reference and a frozen policy are copied."""
        from posttrain.packed.replay import RoutingReplay

        self.rollouts.current.record_routing = True
        with self.half_precision():
            return RoutingReplay(model)

    @property
    def _aware(self) -> list[TrainerAware]:
        return [c for c in self.callback_handler.callbacks if isinstance(c, TrainerAware)]

    @property
    def sampling(self) -> Sampling:
        """The settings of generation; their temperature is that of all log-probs."""
        return self.rollouts.sampling

    @property
    def steps_between_saves(self) -> int:
        """The steps of a rollout: a resumed run starts with a fresh one."""
        return self.rollouts.steps_per_rollout

    # Rollouts.

    def get_train_dataloader(self) -> _Batches:
        """Return an endless loader of the groups of one accumulation step after the other."""
        # Not prepared by accelerate, which fetches one batch ahead: one policy step stale.
        return _Batches(self._batches)

    def _batches(self) -> Iterator[list[Group]]:
        """Yield the groups of one accumulation step after the other, for ever."""
        number = self.state.global_step // self.rollouts.steps_per_rollout
        while True:
            groups = self.rollouts.groups(number)
            if self.rollouts.options.reward_kl_coef:
                self.add_columns(groups, self._columns_of_reward_kl)
            batches = self.rollouts.batches(groups, number)
            trained = [group for batch in batches for group in batch]
            updates = self.rollouts.steps_per_rollout
            self.objective.prepare(trained, self, updates=updates)
            limit = self.max_tokens_per_group
            cut = [[part for group in batch for part in group.cut(limit)] for batch in batches]
            for _ in range(self.objective.epochs):
                yield from cut
            number += 1

    def train(
        self, resume_from_checkpoint: str | bool | None = None, **settings: object
    ) -> TrainOutput:
        """Train as transformers.Trainer does; nothing is generated any more when it returns."""
        self.rollouts.start(self.args.max_steps // self.rollouts.steps_per_rollout)
        try:
            return super().train(resume_from_checkpoint, **settings)
        finally:
            self.rollouts.close()

    def _init_training_state(
        self,
        max_steps: int,
        num_update_steps_per_epoch: int,
        num_train_epochs: int,
        resume_from_checkpoint: str | None,
        trial: object,
    ) -> tuple[int, int]:
        state = super()._init_training_state(
            max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
        )
        if resume_from_checkpoint:
            next_rollout = self.state.global_step // self.rollouts.steps_per_rollout
            self.rollouts.load(Path(resume_from_checkpoint), next_rollout)
        return state

    def _save_checkpoint(self, model: nn.Module, trial: object) -> None:
        super()._save_checkpoint(model, trial)
        folder = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"
        self.rollouts.save(folder)
        if self.args.should_save:
            for callback in self._aware:
                callback.save_state(str(folder))

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            for callback in self._aware:
                callback.save_beside(output_dir or self.args.output_dir)

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        for callback in self._aware:
            callback.load_state(resume_from_checkpoint)

    # Columns that training must not move.

    @torch.no_grad()
    def add_columns(
        self, groups: Sequence[Group], compute: Callable[[PackedBatch], Columns]
    ) -> None:
        """Give each group the columns that `compute` finds for it, in micro-batches.

        A collective where the weights are sharded: ranks with fewer micro-batches run one again.
        """
        self.model_wrapped.eval()
        cut = [group.cut(self.max_tokens_per_group) for group in groups]
        flat = [part for parts in cut for part in parts]
        for parts in self._microbatches(flat):
            batch = self.pack(parts or flat[:1])
            rows = {name: iter(values.cpu()) for name, values in compute(batch).items()}
            for part in parts:
                for name, values in rows.items():
                    part.columns[name] = [
                        next(values)[: len(c.token_ids)] for c in part.completions
                    ]
        for group, parts in zip(groups, cut, strict=True):
            group.add_columns_of(parts)

    def policy_logps(self, batch: PackedBatch) -> Tensor:
        """(B, T) log-probs by the current policy."""
        return self._logps(self.model_wrapped, batch)

    def reference_logps(self, batch: PackedBatch) -> Tensor:
        """(B, T) log-probs by the reference, in the policy's number format."""
        batch = with_experts(batch, None)  # it was not sampled from: its routers choose
        if self.reference is not None:
            with self.half_precision():
                return self._logps(self.reference, batch)
        with self.accelerator.unwrap_model(self.model_wrapped).disable_adapter():
            return self._logps(self.model_wrapped, batch)

    def _logps(self, model: nn.Module, batch: PackedBatch) -> Tensor:
        scores = packed_logps(model, batch, temperature=self.sampling.temperature)
        return batch.dense(scores.logps)

    def _columns_of_reward_kl(self, batch: PackedBatch) -> Columns:
        found = {"ref_logps": self.reference_logps(batch)}
        if self.rollouts.options.engine:  # which does not know the policy's own log-probs
            found["old_logps"] = self.policy_logps(batch)
        return found

    # The step.

    def pack(self, groups: Sequence[Group]) -> PackedBatch:
        """Pack groups into one micro-batch on this trainer's device."""
        return pack(groups, device=self.args.device)

    def num_tokens(self, example: Group) -> int:
        """Packed tokens of a group."""
        return example.num_tokens

    def count_items(self, examples: Sequence[Group]) -> int:
        """Count the items of these groups that the objective is a mean over."""
        return self.objective.count_items(examples)

    def training_step(
        self, model: nn.Module, inputs: list[Group], num_items_in_batch: Tensor | None = None
    ) -> Tensor:
        """Run and time the forward and backward passes of one accumulation step."""
        start = time.perf_counter()
        loss = super().training_step(model, inputs, num_items_in_batch)
        seconds = time.perf_counter() - start
        self.metrics.add("seconds_train", seconds, 1 / self.args.gradient_accumulation_steps)
        return loss

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, Tensor]:
        """Return the accumulation window, and forget the recorded batches of the last step."""
        if self.step_batches is not None:
            self.step_batches.clear()
        return super().get_batch_samples(epoch_iterator, num_batches, device)

    def microbatch_loss(self, model: nn.Module, examples: Sequence[Group]) -> Tensor:
        """The objective, summed over the items of one packed micro-batch."""
        done, updates = self.state.global_step, self.rollouts.steps_per_rollout
        # Skipped when rollouts are stale by design, because the ratio then measures staleness.
        is_first = done % updates == 0 and not self.rollouts.options.overlap
        batch = self.pack(examples)
        step = Step(self.sampling, self.metrics, is_first)
        loss, logps = self.objective.microbatch_loss(model, batch, step)
        if self.replay is not None:
            self.metrics.add("replayed_choices", *self.replay.changed())
        if self.step_batches is not None:
            self.step_batches.append(StepBatch(batch, logps.detach()))
        return loss

    # Evaluation.

    def _evaluate_into_metrics(self, dataset: Dataset) -> None:
        """Generate and score one greedy completion of each prompt; each rank takes its share."""
        for rows in self._eval_batches(len(dataset)):
            # A rank without rows rolls out the first prompt, since the others wait for it in
            # collectives; its result is not counted.
            prompts = [dataset[i] for i in rows or [0]]
            rollout = self.rollouts.evaluate(prompts, is_first=rows.start == 0)
            if rows:
                note_completions(self.metrics, rollout)


class WatchCallback(TrainerCallback):
    """Prints what the metrics of a run mean; a resumed run is watched from its beginning.

    Each finding of `posttrain.run.watch` is printed once when it begins to hold, by the main
    process. Log lines get `warnings`, the number that hold; the end of training says on how many
    lines each did.

    Args:
        rewards: Names of the rewards, the main one first.
    """

    def __init__(self, rewards: list[str]) -> None:
        self.rewards = rewards

    def on_train_begin(
        self, _args: TrainingArguments, state: TrainerState, _control: TrainerControl, **_: object
    ) -> None:
        """Read the lines that a resumed run has logged already."""
        self.watch = Watch(self.rewards)
        for line in state.log_history:
            if "loss" in line:
                self.watch.read(line)

    def on_log(
        self,
        _args: TrainingArguments,
        state: TrainerState,
        _control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: object,
    ) -> None:
        """Read a log line, and print what is new."""
        if not state.is_world_process_zero or not logs or "loss" not in logs:
            return
        for finding in self.watch.read(logs):
            say(str(finding))
        logs["warnings"] = self.watch.num_warnings

    def on_train_end(
        self, _args: TrainingArguments, state: TrainerState, _control: TrainerControl, **_: object
    ) -> None:
        """Say on how many lines each warning held."""
        held = [f"{name} on {n}" for name, n in self.watch.counts.items() if n]
        if state.is_world_process_zero and held:
            say(f"warnings of {len(self.watch.lines)} log lines: {', '.join(held)}")


class _Batches:
    """The endless data loader that transformers.Trainer iterates over."""

    def __init__(self, batches: Callable[[], Iterator[list[Group]]]) -> None:
        self._batches = batches

    def __iter__(self) -> Iterator[list[Group]]:
        return self._batches()


def check_steps(args: TrainingArguments, updates: int, epochs: int) -> None:
    """Raise ConfigError unless training and checkpoints end with a rollout that is used up."""
    flags, number = f"--updates_per_rollout ({updates})", updates * epochs
    if epochs > 1:
        flags = f"--epochs times --minibatches ({epochs} x {updates})"
    if args.max_steps <= 0:
        raise ConfigError("--max_steps: RL has no epochs; expected a number of steps above 0.")
    if args.max_steps % number:
        raise ConfigError(
            f"--max_steps {args.max_steps}: expected a multiple of {flags}, so that the last "
            "rollout is used up."
        )
    if args.save_strategy != "no" and args.save_steps % number:
        raise ConfigError(
            f"--save_steps {args.save_steps:g}: expected a multiple of {flags}, so that a resumed "
            "run starts with a fresh rollout."
        )


def check_together(rollouts: Rollouts, objective: RLObjective) -> None:
    """Raise ConfigError unless rollouts and objective have what they need of each other."""
    if objective.uses_advantages and rollouts.advantage is None:
        raise ConfigError(
            "rollouts: expected an advantage (posttrain.advantages), which this objective trains "
            "on; found None."
        )
    reasons = rollouts.reasons_for_correction
    if reasons and objective.correction is None:
        raise ConfigError(
            f"sampling: {' and '.join(reasons)}, completions come from another distribution than "
            "the policy's. Pass a correction (posttrain.losses: tis_weights, …; --correction tis) "
            "or leave these settings out."
        )
