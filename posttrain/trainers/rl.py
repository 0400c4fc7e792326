"""RL from rewards: groups of answers, and three functions that make the algorithm.

    advantage((P, G) rewards) -> (P, G)                      posttrain.advantages
    loss(logps, old_logps, advantages, mask) -> (B, T)       posttrain.losses, per token
    per: which mean over tokens                              posttrain.losses.token_weights

    L = sum over answers i, tokens t of weight[i, t] * (loss[i, t] + beta * kl[i, t])

with kl the k3 estimate against the reference, left out (and no reference held) where beta is 0.
"""

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from accelerate.utils import DistributedType
from torch import Tensor, nn

from posttrain.errors import ConfigError
from posttrain.logprobs import packed_logps
from posttrain.losses.kl import kl_k3
from posttrain.losses.reduce import token_weights
from posttrain.losses.tokens import per_token
from posttrain.models.prepare import check_context, is_prepared, prepare
from posttrain.packing import PackedBatch, pack_groups
from posttrain.rewards import tally
from posttrain.rewards.checks import check_rewards
from posttrain.rewards.scoring import Scoring
from posttrain.rollouts.generator import HFGenerator
from posttrain.rollouts.loader import RolloutLoader, RolloutPlan, Selection
from posttrain.rollouts.rollout import Rollout, has_spread, roll_out
from posttrain.rollouts.sampling import Sampling
from posttrain.runs import append_log
from posttrain.trainers.base import PackedTrainer, refuse_empty
from posttrain.trainers.engines import whole_model
from posttrain.trainers.rl_checks import (
    check_batch,
    check_loss,
    check_selection,
    without_unscorable,
)

SAMPLES_PER_ROLLOUT = 2  # answers written to samples.jsonl each time a line is logged
# Kinds of verdicts that are worth 0 or nothing without being wrong: share of answers.
WATCHED_VERDICTS = {
    "refused": "answers_refused", "timeout": "answers_timed_out", "our failure": "verifier_failed",
}  # fmt: skip
EVALUATION_SEED = 2**40  # far from the seeds of training prompts


class RLTrainer(PackedTrainer):
    """Trains on prompts (posttrain.data.load_prompts), with answers drawn by the policy itself.

    rewards: name -> (function, weight); scoring: how they are called and added up. Prompts that no
    answer could be scored for are left out, and said. sampling, answers_per_prompt: how answers
    are drawn.
    `per_device_train_batch_size` counts answers, and is a multiple of `answers_per_prompt`.
    selection: which groups and answers train. correction: f(old_logps, drawn_logps, mask) -> (B, T)
    weights for the gap between sampling and training (posttrain.losses: tis_weights, …).
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
        answers_per_prompt: int,
        advantage: Callable[[Tensor], Tensor],
        loss: Callable[..., Tensor],
        per: str = "token",
        beta: float = 0.0,
        updates_per_rollout: int = 1,
        scoring: Scoring | None = None,
        selection: Selection | None = None,
        correction: Callable[..., Tensor] | None = None,
        eval_prompts: Any = None,
        samples_path: Any = None,
        **settings: Any,
    ) -> None:
        scoring = scoring or Scoring()
        refuse_empty(prompts, "prompt")
        check_rewards(rewards, prompts.column_names, scoring.gates)
        prompts = without_unscorable(prompts, rewards)
        check_batch(args, answers_per_prompt, updates_per_rollout)
        check_loss(loss, per, sampling, correction)
        check_selection(selection or Selection(), rewards)
        args.ignore_data_skip = True  # the loader knows where a resumed run goes on
        # Before the model is wrapped or sharded. An adapter that is switched off is the reference.
        if not is_prepared(model):
            prepare(model, half=args.bf16 or args.fp16)
        longest = max(map(len, prompts["prompt_ids"])) + sampling.max_tokens
        check_context(model, longest, "Lower --max_prompt_length or --max_completion_length.")
        self.reference = None
        if beta and not hasattr(model, "disable_adapter"):
            self.reference = copy.deepcopy(model).requires_grad_(False).eval().to(args.device)
        super().__init__(
            model, args, tokenizer=tokenizer, train_dataset=prompts, eval_dataset=eval_prompts,
            **settings,
        )  # fmt: skip
        if self.accelerator.distributed_type == DistributedType.FSDP:
            raise ConfigError(
                "RL does not run under FSDP, whose ranks would have to decode in step. Use "
                "accelerate_configs/ddp.yaml, zero2.yaml or zero3.yaml."
            )
        self.rewards, self.scoring, self.sampling = dict(rewards), scoring, sampling
        self.answers_per_prompt, self.updates_per_rollout = answers_per_prompt, updates_per_rollout
        self.advantage, self.loss, self.per, self.beta = advantage, loss, per, beta
        self.selection, self.correction = selection or Selection(), correction
        self.samples_path = samples_path
        # (groups, their log-probs before the optimizer step), where a callback asks for them
        self.step_logps: list[tuple[Sequence[dict], Tensor]] | None = None
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
            prompts_per_batch=args.per_device_train_batch_size // self.answers_per_prompt,
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
            make_rollout=self._roll_out,
            advantage=self.advantage,
            on_rollout=self._note_rollout,
            finish_batch=self._finish_batch,
            selection=self.selection,
        )
        return self.loader

    def _init_training_state(self, *arguments: Any, **settings: Any) -> Any:
        state = super()._init_training_state(*arguments, **settings)
        self.loader.first_rollout = self.state.global_step // self.updates_per_rollout
        return state

    def _roll_out(
        self, prompts: Sequence[dict], seeds: Sequence[int], **overrides: Any
    ) -> Rollout | None:
        """All ranks together; None for no prompts."""
        settings = {
            "rewards": self.rewards, "scoring": self.scoring, "sampling": self.sampling,
            "answers_per_prompt": self.answers_per_prompt, **overrides,
        }  # fmt: skip
        tokenizer = self.processing_class
        with whole_model(self.accelerator, self.model_wrapped) as policy:
            if not prompts:
                return None
            generator = HFGenerator(policy, tokenizer=tokenizer)
            return roll_out(
                generator, tokenizer, prompts, seeds=seeds, trainer_state=self.state, **settings
            )

    def _note_rollout(self, rollout: Rollout) -> None:
        self._note_answers(rollout)
        if self.answers_per_prompt > 1:
            spread = has_spread(rollout.rewards)
            self.metrics.add("groups_without_spread", (~spread).sum(), len(spread))
        for phase, seconds in rollout.seconds.items():
            self.metrics.add(f"seconds_{phase}", seconds)
        done = self.state.global_step
        every = max(1, int(self.args.logging_steps))
        logs = done == 0 or (done + self.updates_per_rollout) // every > done // every
        if self.samples_path and self.is_world_process_zero() and logs:
            for row in range(min(SAMPLES_PER_ROLLOUT, len(rollout.texts))):
                append_log(self.samples_path, _sample(rollout, row, done + 1))

    def _note_answers(self, rollout: Rollout) -> None:
        """Reward and its parts, length, cut answers: of training and evaluation alike."""
        scored = rollout.rewards[~rollout.rewards.isnan()]
        self.metrics.add("reward", scored.sum(), scored.numel())
        for name, (total, count) in rollout.scores.sums().items():
            self.metrics.add(name, total, count)
        answers = rollout.answers
        lengths = sum(len(answer.token_ids) for answer in answers)
        cut = sum(answer.finish_reason == "length" for answer in answers)
        self.metrics.add("mean_answer_tokens", lengths, len(answers))
        self.metrics.add("truncated", cut, len(answers))
        self.metrics.add("unscored", rollout.scores.none, len(answers))
        for kind, number in tally.take().items():
            if kind in WATCHED_VERDICTS:
                self.metrics.add(WATCHED_VERDICTS[kind], number, len(answers))
        self.metrics.add("reward_failures", rollout.scores.errors + rollout.scores.timeouts)

    def _finish_batch(self, groups: list[dict]) -> list[dict]:
        """Cut groups that are larger than a micro-batch; add log-probs that training won't move."""
        groups = [part for group in groups for part in self._cut(group)]
        if self.updates_per_rollout > 1:
            self._add_logps(groups, "old_logps", self.model_wrapped, nullcontext())
        if self.beta:
            policy = self.accelerator.unwrap_model(self.model_wrapped)
            context = self.half_precision() if self.reference else policy.disable_adapter()
            reference = self.reference or self.model_wrapped
            self._add_logps(groups, "ref_logps", reference, context)
        return groups

    def _cut(self, group: dict) -> list[dict]:
        """A group as several with the same prompt, each within max_tokens_per_microbatch."""
        room = self.max_tokens_per_microbatch - len(group["prompt_ids"])
        parts: list[list[int]] = [[]]
        load = 0
        for index, answer in enumerate(group["answers"]):
            if parts[-1] and load + len(answer) > room:
                parts.append([])
                load = 0
            parts[-1].append(index)
            load += len(answer)
        per_answer = [name for name in group if name != "prompt_ids"]
        return [
            {**group, **{name: [group[name][i] for i in part] for name in per_answer}}
            for part in parts
        ]

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
            model, batch, temperature=self.sampling.temperature, with_entropy=True
        )
        logps = batch.dense(scores.logps)
        sampled = self._dense(batch, examples, "sampled_logps")
        old, mask = self._old_and_mask(batch, examples, logps)
        advantages = torch.tensor(
            [a for group in examples for a in group["advantages"]], device=logps.device
        )
        if self.step_logps is not None:
            self.step_logps.append((examples, logps.detach()))
        loss = self.loss(logps, old, advantages, mask)
        self._note_clipping(loss, logps, advantages, mask)
        if self.correction:
            drawn = self._dense(batch, examples, "drawn_logps")
            weights = self.correction(old, drawn, mask)
            self.metrics.add_all(mask, correction=weights)
            loss = loss * weights
        if self.beta:
            kl = kl_k3(logps, self._dense(batch, examples, "ref_logps"), mask)
            self.metrics.add_all(mask, kl=kl)
            loss = loss + self.beta * kl
        self.metrics.add_all(
            mask, entropy=batch.dense(scores.entropy), sampler_gap=(logps - sampled).abs()
        )
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

    @staticmethod
    def _dense(batch: PackedBatch, groups: Sequence[dict], name: str) -> Tensor | None:
        """(B, T) of a per-token list that the groups carry; None where they do not."""
        if name not in groups[0]:
            return None
        flat = [x for group in groups for values in group[name] for x in values]
        return batch.dense(torch.tensor(flat, device=batch.rows.device))

    def _note_clipping(self, loss: Tensor, logps: Tensor, advantages: Tensor, mask: Tensor) -> None:
        """Share of tokens that the loss's clip keeps from training: those without a gradient."""
        (gradient,) = torch.autograd.grad(loss.sum(), logps, retain_graph=True)
        active = mask * (per_token(advantages, mask) != 0)
        self.metrics.add("clip_share", (active * (gradient == 0)).sum(), active.sum())

    # Evaluation.

    def _evaluate_into_metrics(self, dataset: Any) -> None:
        """One greedy answer to each prompt, each rank its share."""
        greedy = Sampling(self.sampling.max_tokens, self.sampling.stop_ids, temperature=0.0)
        for rows in self._eval_batches(len(dataset)):
            # A rank without rows takes part where weights are gathered; its answer is not counted.
            rollout = self._roll_out(
                [dataset[i] for i in rows or [0]], [EVALUATION_SEED] * max(1, len(rows)),
                sampling=greedy, answers_per_prompt=1,
            )  # fmt: skip
            if rows:
                self._note_answers(rollout)


def _sample(rollout: Rollout, row: int, step: int) -> dict:
    """A record of samples.jsonl; step: the first that learns from this rollout."""
    answer = rollout.answers[row]
    prompt = rollout.prompts[row // len(rollout.completions[0])]
    parts = {name: values[row] for name, values in rollout.scores.parts.items()}
    return {
        "step": step, "prompt": prompt["prompt"], "completion": rollout.texts[row],
        "reward": rollout.scores.totals[row], **parts, "tokens": len(answer.token_ids),
        "finish_reason": answer.finish_reason,
    }  # fmt: skip
