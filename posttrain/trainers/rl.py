"""RL from rewards: groups of answers, and three functions that make the algorithm.

    advantage((P, G) rewards) -> (P, G)                      posttrain.advantages
    loss(logps, old_logps, advantages, mask) -> (B, T)       posttrain.losses, per token
    per: which mean over tokens                              posttrain.losses.token_weights

    L = sum over answers i, tokens t of
        weight[i, t] * (loss[i, t] + beta * kl[i, t] - entropy_coef * entropy[i, t])

with kl an estimate of the KL to the reference (posttrain.losses.kl), k3 unless another is passed.
The KL may lower the reward instead: by reward_kl_coef (log pi_old - log pi_ref) at each token.
Without either no reference is held. Advantages per token: posttrain.rollouts.source.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from posttrain.losses.kl import kl_k3
from posttrain.losses.reduce import token_weights
from posttrain.packed.batch import PackedBatch, pack_groups
from posttrain.packed.forward import packed_logps
from posttrain.packed.prepare import check_context, frozen_copy, prepare_once
from posttrain.rewards.call import Scoring
from posttrain.rewards.checks import check_rewards
from posttrain.rollouts.group import Rollout, cut_group, has_spread, roll_out
from posttrain.rollouts.policies import PolicyBefore, PolicyOfNow
from posttrain.rollouts.sampling import Sampling
from posttrain.rollouts.source import RolloutLoader, RolloutPlan, Selection, no_penalties
from posttrain.run.folder import append_log
from posttrain.trainers.base import PackedTrainer, refuse_empty
from posttrain.trainers.callbacks import WatchCallback
from posttrain.trainers.kl_reward import kl_penalties
from posttrain.trainers.metrics import (
    note_answers,
    note_clipping,
    note_correction,
    note_first_ratio,
    note_gap,
    sample_record,
)
from posttrain.trainers.rl_checks import (
    check_advantage,
    check_batch,
    check_kl,
    check_loss,
    check_sampling,
    check_selection,
    refuse_fsdp,
    without_unscorable,
)

SAMPLES_PER_ROLLOUT = 2  # answers written to samples.jsonl each time a line is logged
EVALUATION_SEED = 2**40  # far from the seeds of training prompts


class RLTrainer(PackedTrainer):
    """Trains on prompts (posttrain.data.load_prompts), with answers drawn by the policy itself.

    rewards: name -> (function, weight), the main one first, by which WatchCallback judges the run;
    scoring: how they are called and added up. Prompts that no answer could be scored for are left
    out, and said. sampling, num_generations: how answers are drawn.
    `per_device_train_batch_size` counts answers, and is a multiple of `num_generations`.
    selection: which groups and answers train. correction: f(old_logps, sampler_logps, mask) -> (B, T)
    weights for the gap between sampling and training (posttrain.losses: tis_weights, …).
    off_policy_mask: f(logps, sampler_logps, advantages, mask) -> (B, T), 0 for tokens whose loss is
    dropped (posttrain.losses.off_policy_mask). Unlike `loss`, it is passed the log-probs that were
    drawn with, and old ones only where an engine did not know them.
    engine: f(model, accelerator, tokenizer) -> what draws instead of the decode loop on the model
    itself (posttrain.rollouts.vllm.start_vllm, with its settings bound). overlap_rollouts: the next
    rollout is drawn while this one trains, by the policy before it. Both need a correction.
    beta, kl, reward_kl_coef, entropy_coef: as above, in advantage or reward units per nat.
    updates_per_rollout: optimizer steps that share one rollout; above 1, old log-probs are
    recomputed by the trainer before the first. samples_path: a JSON-lines file for a few answers.
    """

    def __init__(
        self,
        model: nn.Module,
        args: Any,
        *,
        prompts: Any,
        tokenizer: Any,
        rewards: Mapping[str, tuple[Callable, float]],
        sampling: Sampling,
        num_generations: int,
        advantage: Callable[..., Tensor],
        loss: Callable[..., Tensor],
        per: str = "token",
        beta: float = 0.0,
        kl: Callable[..., Tensor] = kl_k3,
        reward_kl_coef: float = 0.0,
        entropy_coef: float = 0.0,
        updates_per_rollout: int = 1,
        scoring: Scoring | None = None,
        selection: Selection | None = None,
        correction: Callable[..., Tensor] | None = None,
        off_policy_mask: Callable[..., Tensor] | None = None,
        engine: Callable[..., Any] | None = None,
        overlap_rollouts: bool = False,
        eval_prompts: Any = None,
        samples_path: Any = None,
        callbacks: Sequence[Any] = (),
        **settings: Any,
    ) -> None:
        scoring = scoring or Scoring()
        refuse_empty(prompts, "prompt")
        check_rewards(rewards, prompts.column_names, scoring.gates)
        prompts = without_unscorable(prompts, rewards)
        check_batch(args, num_generations, updates_per_rollout)
        check_loss(loss, per)
        check_sampling(sampling, correction, engine=engine, is_overlapped=overlap_rollouts)
        check_advantage(advantage, num_generations)
        check_kl(beta, kl)
        check_selection(selection or Selection(), rewards)
        args.ignore_data_skip = True  # the loader knows where a resumed run goes on
        prepare_once(model, half=args.bf16 or args.fp16)  # before it is wrapped or sharded
        longest = max(map(len, prompts["prompt_ids"])) + sampling.max_tokens
        check_context(model, longest, "Lower --max_prompt_length or --max_completion_length.")
        self.reference = frozen_copy(model, args.device) if beta or reward_kl_coef else None
        super().__init__(
            model, args, tokenizer=tokenizer, train_dataset=prompts, eval_dataset=eval_prompts,
            callbacks=[*callbacks, WatchCallback()], **settings,
        )  # fmt: skip
        refuse_fsdp(self.accelerator)
        self.rewards, self.scoring, self.sampling = dict(rewards), scoring, sampling
        self.num_generations, self.updates_per_rollout = num_generations, updates_per_rollout
        self.advantage, self.loss, self.per, self.beta, self.kl = advantage, loss, per, beta, kl
        self.reward_kl_coef, self.entropy_coef = reward_kl_coef, entropy_coef
        self.selection, self.correction = selection or Selection(), correction
        self.off_policy_mask, self.samples_path = off_policy_mask, samples_path
        self.policy_now = PolicyOfNow(self, engine)
        self.policy_before = PolicyBefore(self, self.policy_now) if overlap_rollouts else None
        # (groups, their log-probs before the optimizer step), where a callback asks for them
        self.step_logps: list[tuple[Sequence[dict], Tensor]] | None = None
        self._attach_callbacks()

    def _attach_callbacks(self) -> None:
        for callback in self.callback_handler.callbacks:
            if hasattr(callback, "attach"):
                callback.attach(self)

    # Rollouts.

    @property
    def steps_drawn_for(self) -> int:
        """Optimizer batches of answers in one rollout."""
        return self.updates_per_rollout

    @property
    def plan(self) -> RolloutPlan:
        args = self.args
        return RolloutPlan(
            prompts_per_batch=args.per_device_train_batch_size // self.num_generations,
            batches_per_rollout=args.gradient_accumulation_steps * self.steps_drawn_for,
            seed=args.seed,
            rank=args.process_index,
            world_size=args.world_size,
        )

    def get_train_dataloader(self) -> RolloutLoader:
        # Not prepared by accelerate, which fetches one batch ahead: one policy step stale.
        self.loader = RolloutLoader(
            self.train_dataset,
            self.plan,
            make_rollout=partial(self._roll_out, policy=self.policy_before or self.policy_now),
            advantage=self.advantage,
            on_rollout=self._note_rollout,
            finish_batch=self._finish_batch,
            selection=self.selection,
            penalise=partial(kl_penalties, self) if self.reward_kl_coef else no_penalties,
        )
        if self.policy_before:
            steps = self.args.max_steps // self.updates_per_rollout
            self.policy_before.start(self.loader, steps)
        return self.loader

    def train(self, *arguments: Any, **settings: Any) -> Any:
        self.policy_now.forget()
        try:
            return super().train(*arguments, **settings)
        finally:
            if self.policy_before:
                self.policy_before.close()

    def _init_training_state(
        self, max_steps: int, steps: int, epochs: int, resume_from_checkpoint: Any, trial: Any
    ) -> Any:
        start = (max_steps, steps, epochs, resume_from_checkpoint, trial)
        state = super()._init_training_state(*start)
        self.loader.first_rollout = self.state.global_step // self.updates_per_rollout
        if self.policy_before and resume_from_checkpoint:
            self.policy_before.load(Path(resume_from_checkpoint))
        return state

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        if self.policy_before:
            folder = Path(self._get_output_dir(trial=trial))
            self.policy_before.save(folder / f"checkpoint-{self.state.global_step}")

    def _roll_out(
        self,
        prompts: Sequence[dict],
        seeds: Sequence[int],
        *,
        policy: PolicyOfNow | PolicyBefore | None = None,
        **overrides: Any,
    ) -> Rollout | None:
        """All ranks together; None for no prompts. policy: who draws, by default that of now."""
        settings = {
            "rewards": self.rewards, "scoring": self.scoring, "sampling": self.sampling,
            "num_generations": self.num_generations, **overrides,
        }  # fmt: skip
        policy = policy or self.policy_now
        with policy.generator() as generator:
            if not prompts:  # an engine may need all ranks to ask it
                generator.generate([], self.sampling, self.num_generations, seeds=[])
                return None
            rollout = roll_out(
                generator, self.processing_class, prompts, seeds=seeds,
                trainer_state=policy.state, **settings,
            )  # fmt: skip
        rollout.policy_version = policy.state.global_step
        return rollout

    def _note_rollout(self, rollout: Rollout) -> None:
        note_answers(self.metrics, rollout)
        if self.num_generations > 1:
            spread = has_spread(rollout.rewards)
            self.metrics.add("groups_without_spread", (~spread).sum(), len(spread))
        if self.policy_before:
            self.metrics.add("staleness", self.policy_before.staleness(rollout))
        for phase, seconds in rollout.seconds.items():
            self.metrics.add(f"seconds_{phase}", seconds)
        done = self.state.global_step
        every = max(1, int(self.args.logging_steps))
        logs = done == 0 or (done + self.updates_per_rollout) // every > done // every
        if self.samples_path and self.is_world_process_zero() and logs:
            for row in range(min(SAMPLES_PER_ROLLOUT, len(rollout.texts))):
                append_log(self.samples_path, sample_record(rollout, row, done + 1))

    def _finish_batch(self, groups: list[dict]) -> list[dict]:
        """Cut groups that are larger than a micro-batch; add log-probs that training won't move."""
        limit = self.max_tokens_per_microbatch
        groups = [part for group in groups for part in cut_group(group, limit)]
        if self.updates_per_rollout > 1:
            self.add_old_logps(groups)
        if self.beta:
            self.add_reference_logps(groups)
        return groups

    def add_old_logps(self, groups: list[dict]) -> None:
        """`old_logps` of the policy of now into each group; as add_reference_logps."""
        self._add_logps(groups, "old_logps", self.model_wrapped, nullcontext())

    def add_reference_logps(self, groups: list[dict]) -> None:
        """`ref_logps` into each group; a collective where the weights are sharded."""
        policy = self.accelerator.unwrap_model(self.model_wrapped)
        context = self.half_precision() if self.reference else policy.disable_adapter()
        self._add_logps(groups, "ref_logps", self.reference or self.model_wrapped, context)

    @torch.no_grad()
    def _add_logps(self, groups: list[dict], name: str, model: nn.Module, context: Any) -> None:
        model.eval()
        with context:
            for part in self._microbatches(groups):
                batch = self.pack(part or groups[:1])
                scores = packed_logps(model, batch, temperature=self.sampling.temperature)
                rows = iter(batch.dense(scores.logps).tolist())
                for group in part:
                    group[name] = [next(rows)[: len(answer)] for answer in group["answers"]]

    # The loss.

    def training_step(self, *arguments: Any, **settings: Any) -> Tensor:
        start = time.perf_counter()
        loss = super().training_step(*arguments, **settings)
        seconds = time.perf_counter() - start
        self.metrics.add("seconds_train", seconds, 1 / self.args.gradient_accumulation_steps)
        return loss

    def get_batch_samples(self, *arguments: Any, **settings: Any) -> Any:
        if self.step_logps is not None:
            self.step_logps.clear()
        return super().get_batch_samples(*arguments, **settings)

    def num_tokens(self, example: dict) -> int:
        return len(example["prompt_ids"]) + sum(map(len, example["answers"]))

    def count_items(self, examples: Sequence[dict]) -> int:
        lengths = [len(answer) for group in examples for answer in group["answers"]]
        return sum(lengths) if self.per == "token" else len(lengths)

    def microbatch_loss(self, model: nn.Module, examples: Sequence[dict]) -> Tensor:
        batch = self.pack(examples)
        scores = packed_logps(
            model, batch, temperature=self.sampling.temperature, with_entropy=True,
            entropy_gradient=self.entropy_coef != 0,
        )  # fmt: skip
        logps = batch.dense(scores.logps)
        sampled, drawn = (
            self._dense(batch, examples, name) for name in ("policy_logps", "sampler_logps")
        )
        old, mask = self._old_and_mask(batch, examples, logps)
        advantages = self.advantages_of(batch, examples)
        if self.step_logps is not None:
            self.step_logps.append((examples, logps.detach()))
        loss = self.loss(logps, old, advantages, mask)
        if self.off_policy_mask:
            known = torch.where(drawn.isnan(), old, drawn)
            loss = loss * self.off_policy_mask(logps, known, advantages, mask)
        note_clipping(self.metrics, loss, logps, advantages, mask)
        note_gap(self.metrics, logps, sampled, mask)
        if self.correction:
            weights = self.correction(old, drawn, mask)
            note_correction(self.metrics, weights, old, drawn, mask)
            loss = loss * weights
        if self.beta:
            kl = self.kl(logps, self._dense(batch, examples, "ref_logps"), mask)
            self.metrics.add_all(mask, kl=kl)
            loss = loss + self.beta * kl
        entropy = batch.dense(scores.entropy)
        if self.entropy_coef:
            loss = loss - self.entropy_coef * entropy
        self.metrics.add_all(mask, entropy=entropy)
        self._note_first_ratio(batch, examples, logps - sampled, mask)
        length = self.sampling.max_tokens if self.per == "constant" else None
        return (loss * token_weights(mask, per=self.per, total=1, length=length)).sum()

    def _old_and_mask(
        self, batch: PackedBatch, examples: Sequence[dict], logps: Tensor
    ) -> tuple[Tensor, Tensor]:
        """(B, T) log-probs that the policy started from, and which tokens train."""
        old = self._dense(batch, examples, "old_logps")
        return (logps.detach() if old is None else old), batch.mask()

    def pack(self, groups: Sequence[dict]) -> PackedBatch:
        return pack_groups(
            [group["prompt_ids"] for group in groups],
            [group["answers"] for group in groups],
            device=self.args.device,
        )

    def advantages_of(self, batch: PackedBatch, groups: Sequence[dict]) -> Tensor:
        """(B,), or (B, T) where answers have an advantage for each token."""
        if isinstance(groups[0]["advantages"][0], list):
            return self._dense(batch, groups, "advantages")
        flat = [a for group in groups for a in group["advantages"]]
        return torch.tensor(flat, device=batch.rows.device)

    @staticmethod
    def _dense(batch: PackedBatch, groups: Sequence[dict], name: str) -> Tensor | None:
        """(B, T) of a per-token list that the groups carry; None where they do not."""
        if name not in groups[0]:
            return None
        flat = [x for group in groups for values in group[name] for x in values]
        return batch.dense(torch.tensor(flat, device=batch.rows.device))

    def _note_first_ratio(
        self, batch: PackedBatch, examples: Sequence[dict], gaps: Tensor, mask: Tensor
    ) -> None:
        """Not of tokens that an older policy drew by design: their ratio is staleness, no fault."""
        del batch, examples  # for subclasses, whose tokens have an age
        is_first = self.state.global_step % self.updates_per_rollout == 0
        if is_first and not self.policy_before:
            note_first_ratio(self.metrics, gaps, mask)

    # Evaluation.

    def _evaluate_into_metrics(self, dataset: Any) -> None:
        """One greedy answer to each prompt, each rank its share."""
        if self.policy_before:
            self.policy_before.wait()
        greedy = Sampling(self.sampling.max_tokens, self.sampling.stop_ids, temperature=0.0)
        for rows in self._eval_batches(len(dataset)):
            # A rank without rows takes part where weights are gathered; its answer is not counted.
            rollout = self._roll_out(
                [dataset[i] for i in rows or [0]], [EVALUATION_SEED] * max(1, len(rows)),
                sampling=greedy, num_generations=1,
            )  # fmt: skip
            if rows:
                note_answers(self.metrics, rollout)
