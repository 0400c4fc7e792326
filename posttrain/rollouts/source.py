"""Turn prompts into scored groups with advantages, cut into the batches that train.

    rollouts = Rollouts(prompts, {"accuracy": (math_reward, 1.0)}, Sampling(512, stop_ids),
                        num_generations=8, advantage=group_advantages)
    trainer = RLTrainer(model, args, rollouts, Objective(clipped_policy_loss), tokenizer=tokenizer)

A rollout takes this rank's next prompts, generates G completions for each, scores them and turns
the scores into advantages; its settings are in posttrain.rollouts.options. Everything is a function
of the seed and the step: a resumed run generates the same completions, and a group is the same on
whichever rank it is generated. All completions of a group are on one rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posttrain.errors import ConfigError, DataError
from posttrain.rewards.checks import check_rewards
from posttrain.rollouts.group import (
    Advantage,
    Group,
    Penalties,
    Prompt,
    Rewards,
    Rollout,
    assign_advantages,
    check_advantage,
    has_signal,
    roll_out,
)
from posttrain.rollouts.options import (
    SEED_STRIDE,
    LearningCheck,
    PromptOrder,
    RolloutOptions,
    RolloutPlan,
    check_no_advantage,
    without_unscorable,
)
from posttrain.rollouts.policies import (
    CurrentPolicy,
    FrozenPolicy,
    RolloutPrefetcher,
    TrainerView,
)
from posttrain.rollouts.sampling import Sampling
from posttrain.run.engine import any_rank
from posttrain.run.folder import append_log

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase, TrainingArguments

    from posttrain.rollouts.policies import MetricSink

REFILL_POSITION = 2**41  # where the positions of refills begin, far from those of any run's prompts
SAMPLES_PER_ROLLOUT = 2  # completions written to samples.jsonl each time a line is logged
EVALUATION_SEED = 2**40  # far from the seeds of training prompts


class Rollouts:
    """The source of an RL run's groups; `RLTrainer` binds it and asks for one rollout at a time.

    Prompts whose completions no reward could score are left out, with a log line.

    Args:
        prompts: A dataset of `posttrain.data.load_prompts`.
        rewards: Name -> (function, weight), the main one first.
        sampling: The settings of generation.
        num_generations: Completions G for each prompt.
        advantage: A function of the rewards (posttrain.rollouts.group); None where the objective
            takes the rewards themselves, as PPO's does.
        eval_prompts: Held-out prompts, answered greedily.

    Raises:
        ConfigError: Settings that cannot work, before anything is generated.
    """

    def __init__(
        self,
        prompts: Dataset,
        rewards: Rewards,
        sampling: Sampling,
        *,
        num_generations: int,
        advantage: Advantage | None,
        eval_prompts: Dataset | None = None,
        options: RolloutOptions | None = None,
    ) -> None:
        self.options = options or RolloutOptions()
        if prompts is None or len(prompts) == 0:
            raise DataError("expected at least one prompt to train on, found none.")
        check_rewards(rewards, prompts.column_names, self.options.scoring.gates)
        signal_of = self.options.selection.signal_of
        if signal_of not in (None, *rewards):
            raise ConfigError(
                f"selection: expected signal_of to name a reward ({', '.join(rewards)}), "
                f"found {signal_of!r}."
            )
        if not sampling.temperature:
            raise ConfigError(
                "sampling: expected a temperature above 0, found 0. Greedy completions of a prompt "
                "are all the same, and there is nothing to learn from them."
            )
        if advantage is None:
            check_no_advantage(self.options)
        else:
            check_advantage(advantage, num_generations)
        self.prompts = without_unscorable(prompts, rewards)
        self.eval_prompts, self.rewards = eval_prompts, dict(rewards)
        self.sampling, self.num_generations = sampling, num_generations
        self.advantage = advantage
        self.learning = LearningCheck(
            self.options.max_unscored_share, compares=advantage is not None and num_generations > 1
        )

    @property
    def longest_sequence(self) -> int:
        """Tokens of the longest prompt with the longest completion."""
        return max(map(len, self.prompts["prompt_ids"])) + self.sampling.max_tokens

    @property
    def reasons_for_correction(self) -> list[str]:
        """Why completions come from another distribution than the current policy's, if they do."""
        reasons = {
            "with top_k, top_p or min_tokens": self.sampling.is_restricted,
            "where an engine generates": self.options.engine is not None,
            "with overlap": self.options.overlap,
        }
        return [reason for reason, holds in reasons.items() if holds]

    def check_arguments(self, args: TrainingArguments) -> None:
        """Raise ConfigError unless a batch is made of whole groups."""
        batch = args.per_device_train_batch_size
        if batch % self.num_generations:
            raise ConfigError(
                f"--per_device_train_batch_size counts completions: expected a multiple of "
                f"--num_generations ({self.num_generations}), found {batch}."
            )

    # The run.

    def bind(
        self, trainer: TrainerView, tokenizer: PreTrainedTokenizerBase, *, epochs: int
    ) -> None:
        """Prepare for a run.

        Args:
            epochs: How often the objective passes over each rollout.
        """
        self.trainer, self.tokenizer, self.epochs = trainer, tokenizer, epochs
        args, options = trainer.args, self.options
        self.plan = RolloutPlan(
            prompts_per_batch=args.per_device_train_batch_size // self.num_generations,
            batches_per_rollout=args.gradient_accumulation_steps * options.updates_per_rollout,
            seed=args.seed,
            rank=args.process_index,
            world_size=args.world_size,
        )
        self.order = PromptOrder(len(self.prompts), args.seed)
        self.current = CurrentPolicy(trainer, tokenizer, options.engine, options.lookahead)
        self.frozen = FrozenPolicy(trainer, self.current) if options.overlap else None
        self.prefetcher: RolloutPrefetcher | None = None

    @property
    def steps_per_rollout(self) -> int:
        """Optimizer steps from one rollout to the next."""
        return self.options.updates_per_rollout * self.epochs

    def start(self, num_rollouts: int) -> None:
        """Begin a run of at most `num_rollouts`."""
        self.check_prompts()
        self.current.forget()
        if self.frozen:
            self.frozen.resume()
            self.prefetcher = RolloutPrefetcher(
                self.sample, freeze=self.frozen.freeze, num_rollouts=num_rollouts
            )

    def check_prompts(self) -> None:
        """Raise ConfigError where the data has fewer prompts than a rollout takes."""
        if self.plan.prompts_per_rollout > len(self.prompts):
            raise ConfigError(
                f"a rollout takes {self.plan.prompts_per_rollout} prompts, and the data has "
                f"{len(self.prompts)}. Lower the batch size, or add prompts."
            )

    def close(self) -> None:
        """End the run: nothing is generated any more."""
        if self.prefetcher:
            self.frozen.stop()
            self.prefetcher.close()
            self.prefetcher = None

    def save(self, folder: Path) -> None:
        """Write what a resumed run needs besides the number of steps into a checkpoint."""
        if self.prefetcher:
            self.prefetcher.save(folder)

    def load(self, folder: Path, next_rollout: int) -> None:  # noqa: ARG002  (a source's signature)
        """Continue with what `save` wrote."""
        if self.prefetcher:
            self.prefetcher.load(folder)

    def groups(self, number: int) -> list[Group]:
        """Return the groups of rollout `number` that train on this rank, without advantages."""
        rollouts = (self.prefetcher or self.sample)(number)
        for rollout in rollouts:
            self.note(rollout)
        self.learning.read(rollouts, [bool(x) for r in rollouts for x in has_signal(r.rewards)])
        return self._selected(rollouts)

    def batches(self, groups: list[Group], number: int) -> list[list[Group]]:  # noqa: ARG002
        """Give the groups their advantages, and cut them into accumulation steps.

        A collective. Where `reward_kl_coef` is set the groups carry `ref_logps`.
        """
        if self.advantage is not None:
            assign_advantages(groups, self.advantage, self._penalties(groups))
        size = self.plan.prompts_per_batch
        cuts = [groups[start : start + size] for start in range(0, len(groups), size)]
        return [self._trained(batch) for batch in cuts]

    def sample(self, number: int) -> list[Rollout]:
        """Generate this rank's completions of a rollout, then those of prompts that replace groups
        whose rewards have standard deviation zero, round by round."""
        plan, refills = self.plan, self.options.selection.max_refills
        rollouts = [self._at(plan.positions(number))]
        for attempt in range(refills):
            groups = self._groups(rollouts)
            missing = len(rollouts[0].prompts) - sum(group.has_signal for group in groups)
            if not any_rank(missing > 0):
                break
            place = (number * refills + attempt) * plan.world_size + plan.rank
            first = REFILL_POSITION + place * len(rollouts[0].prompts)
            rollout = self._at(range(first, first + missing))
            rollouts += [rollout] if rollout else []  # None: only other ranks missed groups
        return rollouts

    def evaluate(self, prompts: Sequence[Prompt]) -> Rollout:
        """Generate one greedy completion of each prompt and score it; all ranks together."""
        if self.prefetcher:
            self.prefetcher.wait()  # it uses the same engine and the same rewards
        greedy = Sampling(self.sampling.max_tokens, self.sampling.stop_ids, temperature=0.0)
        seeds = [EVALUATION_SEED] * len(prompts)
        return self.roll_out(prompts, seeds, sampling=greedy, num_generations=1)

    def roll_out(
        self,
        prompts: Sequence[Prompt],
        seeds: Sequence[int],
        *,
        sampling: Sampling | None = None,
        num_generations: int | None = None,
        rewards: Rewards | None = None,
        policy: CurrentPolicy | FrozenPolicy | None = None,
    ) -> Rollout | None:
        """Generate and score, by default with this source's settings and by the current policy.

        All ranks call it together.

        Returns:
            The rollout; None without prompts.
        """
        sampling = sampling or self.sampling
        num_generations = num_generations or self.num_generations
        policy = policy or self.current
        with policy.generator() as generator:
            if not prompts:  # an engine may need all ranks to ask it
                generator.generate([], sampling, num_generations, seeds=[])
                return None
            rollout = roll_out(
                generator,
                self.tokenizer,
                prompts,
                rewards=rewards or self.rewards,
                sampling=sampling,
                num_generations=num_generations,
                seeds=seeds,
                scoring=self.options.scoring,
                trainer_state=policy.state,
            )
        rollout.policy_version = policy.state.global_step
        return rollout

    def note(self, rollout: Rollout) -> None:
        """Add a rollout's metrics, and write a few of its completions to samples.jsonl."""
        metrics, done = self.trainer.metrics, self.trainer.state.global_step
        note_completions(metrics, rollout)
        if self.options.lookahead:
            self.options.lookahead.note(metrics)
        if self.num_generations > 1:
            signal = has_signal(rollout.rewards)
            metrics.add("reward_std_zero", (~signal).sum(), len(signal))
        if self.frozen:
            metrics.add("staleness", self.frozen.staleness(rollout, self.steps_per_rollout))
        for phase, seconds in rollout.seconds.items():
            metrics.add(f"seconds_{phase}", seconds)
        every = max(1, int(self.trainer.args.logging_steps))
        # True where one of the steps that learn from this rollout is logged.
        logs = done == 0 or (done + self.steps_per_rollout) // every > done // every
        if self.options.samples_path and self.trainer.args.process_index == 0 and logs:
            for row in range(min(SAMPLES_PER_ROLLOUT, len(rollout.texts))):
                append_log(self.options.samples_path, sample_record(rollout, row, done + 1))

    def _at(self, positions: Sequence[int]) -> Rollout | None:
        """This rank's completions of the prompts at these positions of their order."""
        prompts = [self.prompts[self.order[position]] for position in positions]
        seeds = [self.plan.seed * SEED_STRIDE + position for position in positions]
        return self.roll_out(prompts, seeds, policy=self.frozen or self.current)

    def _groups(self, rollouts: list[Rollout]) -> list[Group]:
        signal_of = self.options.selection.signal_of
        return [group for rollout in rollouts for group in rollout.groups(signal_of)]

    def _selected(self, rollouts: list[Rollout]) -> list[Group]:
        """Return as many groups as the first rollout has: with refills, those with a signal first.

        Where the last round left too few of them, groups without a signal fill the batch up: they
        teach nothing and keep its size.
        """
        groups = self._groups(rollouts)
        if self.options.selection.max_refills:
            groups.sort(key=lambda group: not group.has_signal)
        return groups[: len(rollouts[0].prompts)]

    def _penalties(self, groups: list[Group]) -> Penalties | None:
        coef = self.options.reward_kl_coef
        if not coef:
            return None
        # The decode loop knows the policy's own log-probs. An engine does not when top_k, top_p or
        # min_tokens restrict it; `old_logps` then holds those that the trainer computed.
        policy = "old_logps" if self.options.engine else "policy_logps"
        ratios = [
            [old - ref for old, ref in zip(g.columns[policy], g.columns["ref_logps"], strict=True)]
            for g in groups
        ]
        flat = [ratio for row in ratios for ratio in row]
        self.trainer.metrics.add("kl_per_completion", sum(ratio.sum() for ratio in flat), len(flat))
        return [[coef * ratio for ratio in row] for row in ratios]

    def _trained(self, batch: list[Group]) -> list[Group]:
        if not self.options.selection.drop_truncated:
            return batch
        kept = [group.select(group.whole()) for group in batch if group.whole()]
        # A rank must have something to run: where every completion was truncated, one group that
        # trains nothing.
        return kept or [batch[0].without_advantage()]


# Verdicts without a reward that need not be the completion's fault -> the metric of their share.
WATCHED_VERDICTS = {
    "refused": "completions_refused",
    "timeout": "completions_timed_out",
    "our failure": "verifier_failed",
    "judge failed": "judge_failed",
}


def note_completions(metrics: MetricSink, rollout: Rollout) -> None:
    """Add a rollout's rewards and their parts, lengths and shares of special cases to metrics.

    Training and evaluation both use it, so their metrics have the same names.
    """
    scored = rollout.rewards[~rollout.rewards.isnan()]
    metrics.add("reward", scored.sum(), scored.numel())
    for name, (total, count) in rollout.scores.sums().items():
        metrics.add(name, total, count)
    completions = rollout.flat
    number = len(completions)
    metrics.add("mean_completion_tokens", sum(len(c.token_ids) for c in completions), number)
    metrics.add("truncated", sum(c.finish_reason == "length" for c in completions), number)
    metrics.add("unscored", rollout.scores.none, number)
    for kind, times in rollout.verdicts.items():
        if kind in WATCHED_VERDICTS:
            metrics.add(WATCHED_VERDICTS[kind], times, number)
    metrics.add("reward_failures", rollout.scores.errors + rollout.scores.timeouts)


def sample_record(rollout: Rollout, row: int, step: int) -> dict[str, Any]:
    """Make the record of one completion for samples.jsonl.

    Args:
        row: The completion's index among all P * G.
        step: The first optimizer step that learns from this rollout.
    """
    completion = rollout.flat[row]
    prompt = rollout.prompts[row // len(rollout.completions[0])]
    parts = {name: values[row] for name, values in rollout.scores.parts.items()}
    return {
        "step": step,
        "prompt": prompt["prompt"],
        "completion": rollout.texts[row],
        "reward": rollout.scores.totals[row],
        **parts,
        "tokens": len(completion.token_ids),
        "finish_reason": completion.finish_reason,
    }
