"""Online DPO: pairs of completions that the policy itself has sampled, judged as they come.

    rollouts = PairRollouts(prompts, rewards, sampling, num_generations=2, advantage=None)
    OnlineDPOTrainer(model, args, rollouts, PairObjective(dpo_loss), tokenizer=tokenizer).train()

Of a prompt's G completions the one with the highest reward is chosen and the one with the lowest
rejected; the loss is a mean over the pairs of the optimizer batch. Rewards may be rules, a reward
model or a judge. Log-probs, the reference's too, are at the sampling temperature. Guo et al.
(2402.04792), where G is 2.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from posttrain.errors import ConfigError
from posttrain.losses.preference import dpo_loss
from posttrain.packed.batch import PackedBatch
from posttrain.packed.forward import packed_logps
from posttrain.rollouts.group import Group
from posttrain.rollouts.source import Rollouts
from posttrain.trainers.objective import Scorer, Step, note_gap
from posttrain.trainers.preference import inputs_of
from posttrain.trainers.rl import RLTrainer

if TYPE_CHECKING:
    from transformers import TrainingArguments

# The arguments of a loss: (B,) summed log-probs of B pairs, in nats.
PAIR_INPUTS = ("chosen", "rejected", "ref_chosen", "ref_rejected")


class PairRollouts(Rollouts):
    """Rollouts whose groups are pairs: the best and the worst completion of each prompt.

    Prompts without one are dropped and counted: `pairs_tied`, the share of prompts whose best and
    worst reward are equal or whose best and worst completion are the same, and `pairs_unscored`,
    with fewer than two completions that have a reward.
    """

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        if self.advantage is not None:
            raise ConfigError("advantage: expected None: pairs have a preference, found one.")
        if self.num_generations < 2:
            raise ConfigError(
                f"num_generations: expected at least 2 to make pairs, found {self.num_generations}."
            )
        self.learning.compares = True

    def _trained(self, batch: list[Group]) -> list[Group]:
        number = len(batch)
        found = [best_and_worst(group) for group in batch]
        unscored = sum(bool((~group.rewards.isnan()).sum() < 2) for group in batch)
        tied = found.count(None) - unscored
        self.trainer.metrics.add("pairs_tied", tied, number)
        self.trainer.metrics.add("pairs_unscored", unscored, number)
        pairs = [
            group.select(pair) for group, pair in zip(batch, found, strict=True) if pair is not None
        ]
        # A rank must have something to run: two completions of which neither is better.
        return pairs or [batch[0].select([0, 0])]


def best_and_worst(group: Group) -> tuple[int, int] | None:
    """Find the completions with the highest and the lowest reward, the first of equals.

    None where fewer than two have a reward, where both rewards are equal, or both completions.
    """
    scored = [i for i, reward in enumerate(group.rewards.tolist()) if reward == reward]
    if len(scored) < 2:
        return None
    best = max(scored, key=lambda i: group.rewards[i])
    worst = min(scored, key=lambda i: group.rewards[i])
    texts = [group.completions[i].token_ids for i in (best, worst)]
    is_tie = group.rewards[best] == group.rewards[worst] or texts[0] == texts[1]
    return None if is_tie else (best, worst)


@dataclass
class PairObjective:
    """A mean of a preference loss over pairs: rows 2i of a batch are chosen, rows 2i + 1 rejected.

    Attributes:
        loss: f(chosen, rejected, ref_chosen, ref_rejected) -> (B,), all (B,) summed log-probs in
            nats (posttrain.losses), with its settings bound.
    """

    loss: Callable[..., Tensor] = dpo_loss

    epochs = 1
    uses_advantages = False
    needs_reference = True

    def __post_init__(self) -> None:
        inputs_of(self.loss, PAIR_INPUTS, PAIR_INPUTS)

    @staticmethod
    def correction(old_logps: Tensor, *_: Tensor) -> Tensor:
        """Return 1 for each token: a pair may come from any policy."""
        return torch.ones_like(old_logps)

    def count_items(self, groups: Sequence[Group]) -> int:
        """Count the pairs of which one completion is better."""
        return sum(bool(group.rewards[0] > group.rewards[1]) for group in groups)

    def prepare(self, groups: Sequence[Group], scorer: Scorer, *, updates: int) -> None:  # noqa: ARG002
        """Add the reference's log-probs to the pairs; a collective."""
        scorer.add_columns(groups, lambda batch: {"ref_logps": scorer.reference_logps(batch)})

    def microbatch_loss(
        self, model: nn.Module, batch: PackedBatch, step: Step
    ) -> tuple[Tensor, Tensor]:
        """Return the loss summed over the batch's pairs, and the (B, T) log-probs of its rows."""
        scores = packed_logps(model, batch, temperature=step.sampling.temperature)
        logps, rewards = batch.dense(scores.logps), batch.row_column("rewards")
        note_gap(step.metrics, logps.detach(), batch.column("policy_logps"), batch.mask())
        whole, reference = logps.sum(1), batch.column("ref_logps").sum(1)
        is_pair = rewards[0::2] > rewards[1::2]
        inputs = (whole[0::2], whole[1::2], reference[0::2], reference[1::2])
        losses = self.loss(**dict(zip(PAIR_INPUTS, inputs, strict=True)))
        chosen, rejected = ((whole - reference).detach()[i::2] for i in (0, 1))
        lengths = batch.mask().sum(1)
        step.metrics.add_all(
            is_pair.to(losses.dtype),
            margin=chosen - rejected,
            pair_accuracy=(chosen > rejected).to(losses.dtype),
            chosen_log_ratio=chosen,
            rejected_log_ratio=rejected,
            chosen_tokens=lengths[0::2],
            rejected_tokens=lengths[1::2],
        )
        return torch.where(is_pair, losses, 0.0).sum(), logps


class OnlineDPOTrainer(RLTrainer):
    """RLTrainer of pairs, which no micro-batch may part."""

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        rollouts: PairRollouts,
        objective: PairObjective,
        **settings: Any,
    ) -> None:
        super().__init__(model, args, rollouts, objective, **settings)
        self.max_tokens_per_group = sys.maxsize
