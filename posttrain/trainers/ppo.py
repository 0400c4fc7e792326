"""Train by PPO, the actor-critic of RLHF: a value for every token, and a KL penalty in the reward.

    rollouts = Rollouts(prompts, {"score": (score, 1.0)}, sampling, num_generations=1,
                        advantage=None)
    PPOTrainer(model, args, rollouts, ActorCritic(kl_coef=0.05), tokenizer=tokenizer)

Once per rollout, with the policy that sampled it (rewards R, values V, advantages A, returns G),

    R_t = -kl_coef (log pi_old - log pi_ref) + [t is the last token] score     rlhf_token_rewards
    A, G = gae(R, V_old), and A whitened over all tokens of the rollout        posttrain.advantages

and in each of `epochs` passes over it, as a mean over tokens,

    L = clipped_policy_loss(log pi, log pi_old, A)
        + value_coef * clipped_value_loss(V, V_old, G)                         posttrain.losses

InstructGPT (2203.02155), PPO (1707.06347), GAE (1506.02438), openai/lm-human-preferences. Left out:
an entropy bonus, PPO-ptx's pretraining term, shuffling the mini-batches of later epochs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from accelerate.utils import DistributedType
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from posttrain.advantages import gae, rlhf_token_rewards, whiten
from posttrain.errors import ConfigError, DataError
from posttrain.losses import clipped_policy_loss, clipped_value_loss, kl_k1
from posttrain.packed.batch import PackedBatch
from posttrain.packed.forward import check_context, computes_rows
from posttrain.packed.scalar import add_critic, critic_of, scores_and_values, without_critic
from posttrain.rollouts.group import Group
from posttrain.rollouts.source import Rollouts
from posttrain.run.engine import SHARDED, from_all_ranks, rank_and_world
from posttrain.trainers.base import Metrics
from posttrain.trainers.objective import (
    Columns,
    PolicyLoss,
    Scorer,
    Step,
    check_loss,
    note_clipping,
)
from posttrain.trainers.rl import RLTrainer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, TrainingArguments

CRITIC_FILE = "critic.safetensors"  # in checkpoints: what the critic has learnt
STATE = "posttrain.PPOTrainer"  # where trainer_state.json keeps the KL coefficient


@dataclass
class ActorCritic:
    """PPO's objective: a policy loss and a value loss, on targets that are made once per rollout.

    Attributes:
        estimator: f(rewards, values, mask) -> advantages and returns, each (B, T).
        normalise: f((1, N) advantages, mask) -> (1, N), over the tokens of all ranks.
        kl_coef: Weight of the KL to the reference in the reward; 0 holds no reference.
        kl_control: f(kl_coef, kl, num_episodes=) -> the next rollout's coefficient, such as
            posttrain.losses.adaptive_kl_coef with target and horizon bound; None keeps it.
        epochs: Passes over each rollout.
    """

    loss: PolicyLoss = clipped_policy_loss
    value_loss: Callable[..., Tensor] = clipped_value_loss
    estimator: Callable[..., tuple[Tensor, Tensor]] = gae
    normalise: Callable[[Tensor, Tensor], Tensor] = whiten
    value_coef: float = 0.1
    kl_coef: float = 0.05
    kl_control: Callable[..., float] | None = None
    epochs: int = 4

    correction = None  # completions must come from the current policy
    uses_advantages = False  # it makes its own

    def __post_init__(self) -> None:
        check_loss(self.loss)
        if self.epochs < 1:
            raise ConfigError(f"--epochs: expected at least 1, found {self.epochs}.")
        if self.kl_control and not self.kl_coef > 0:
            raise ConfigError(
                f"kl_control multiplies kl_coef: expected one above 0 to start from, "
                f"found {self.kl_coef}."
            )
        self.needs_reference = bool(self.kl_coef)

    def count_items(self, groups: Sequence[Group]) -> int:
        """Count the tokens of all completions, as they were generated."""
        return sum(len(c.token_ids) for group in groups for c in group.completions)

    def prepare(self, groups: Sequence[Group], scorer: Scorer, *, updates: int) -> None:  # noqa: ARG002
        """Add what training must not move: log-probs, values, advantages and returns."""
        scorer.add_columns(groups, lambda batch: self._targets(batch, scorer))
        tokens = RolloutTokens.gather(groups)
        tokens.set_advantages(groups, self.normalise)
        self._note(tokens, groups, scorer.metrics)
        if self.kl_control:
            self.kl_coef = self.kl_control(
                self.kl_coef, tokens.kl_per_completion(), num_episodes=tokens.num_completions
            )

    def _note(self, tokens: RolloutTokens, groups: Sequence[Group], metrics: Metrics) -> None:
        metrics.add("sampler_gap", *tokens.sampler_gap(groups))
        if (explained := tokens.explained_variance()) is not None:
            metrics.add("explained_variance", explained)
        if self.needs_reference:
            metrics.add("kl_per_completion", tokens.kl_per_completion())
            metrics.add("kl_coef", self.kl_coef)

    def _targets(self, batch: PackedBatch, scorer: Scorer) -> Columns:
        temperature = scorer.sampling.temperature
        policy, values = scores_and_values(scorer.model_wrapped, batch, temperature=temperature)
        old, values = batch.dense(policy.logps), batch.dense(values)
        ref = scorer.reference_logps(batch) if self.needs_reference else old
        scores = batch.row_column("rewards")
        mask = batch.mask() * (~scores.isnan())[:, None]  # without a score nothing trains
        rewards = rlhf_token_rewards(scores.nan_to_num(), old, ref, mask, kl_coef=self.kl_coef)
        advantages, returns = self.estimator(rewards, values, mask)
        return {
            "trained": mask,
            "old_logps": old,
            "old_values": values,
            "advantages": advantages,
            "returns": returns,
            "kl": kl_k1(old, ref, mask),
        }

    def microbatch_loss(
        self, model: nn.Module, batch: PackedBatch, step: Step
    ) -> tuple[Tensor, Tensor]:
        """Return both losses summed over the batch's tokens, and the (B, T) log-probs."""
        scores, values = scores_and_values(
            model,
            batch,
            temperature=step.sampling.temperature,
            with_entropy=True,
            entropy_gradient=False,
        )
        logps, values = batch.dense(scores.logps), batch.dense(values)
        mask, advantages = batch.column("trained"), batch.column("advantages")
        loss = self.loss(logps, batch.column("old_logps"), advantages, mask)
        note_clipping(step.metrics, loss, logps, advantages, mask)
        old_values, returns = batch.column("old_values"), batch.column("returns")
        value_loss = self.value_loss(values, old_values, returns, mask)
        step.metrics.add_all(
            mask, entropy=batch.dense(scores.entropy), policy_loss=loss, value_loss=value_loss
        )
        return (loss + self.value_coef * value_loss).sum(), logps


class PPOTrainer(RLTrainer):
    """RLTrainer of a policy and a critic, which is not saved in the model folder.

    Args:
        critic: A sequence classifier with one label (posttrain.models.reward_model), which becomes
            the value model; None puts a value head on the policy's own trunk. Its head starts at 0.
        value_learning_rate: The critic's peak rate; None takes the policy's.
    """

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        rollouts: Rollouts,
        objective: ActorCritic,
        *,
        tokenizer: PreTrainedTokenizerBase,
        critic: nn.Module | None = None,
        value_learning_rate: float | None = None,
        max_tokens_per_microbatch: int | None = None,
    ) -> None:
        self._critic, self.value_learning_rate = critic, value_learning_rate
        super().__init__(
            model,
            args,
            rollouts,
            objective,
            tokenizer=tokenizer,
            max_tokens_per_microbatch=max_tokens_per_microbatch,
        )
        if computes_rows(model) and self.accelerator.distributed_type == DistributedType.FSDP:
            raise ConfigError(
                f"PPO under FSDP: expected a model that is packed; {type(model).__name__} runs by "
                "rows. Use accelerate_configs/zero3.yaml."
            )
        if critic is not None:
            check_context(critic, rollouts.longest_sequence, "Take a critic with a longer context.")

    def _extend(self, model: nn.Module) -> None:
        add_critic(model, self._critic)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Make one optimizer, with the critic's parameters in groups that have their own rate."""
        if self.optimizer is not None:
            return self.optimizer
        optimizer = super().create_optimizer(model)
        theirs = {id(parameter) for parameter in critic_of(self.model).parameters()}
        rate = self.value_learning_rate or self.args.learning_rate
        for group in list(optimizer.param_groups):
            critic = [p for p in group["params"] if id(p) in theirs]
            if critic:
                group["params"] = [p for p in group["params"] if id(p) not in theirs]
                optimizer.add_param_group({**group, "params": critic, "lr": rate})
        return optimizer

    # Saving. The model folder holds the policy alone, as it would be without a critic.

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if state_dict is not None:
            state_dict = {k: v for k, v in state_dict.items() if ".critic." not in f".{k}"}
        with without_critic(self.model):
            super()._save(output_dir, state_dict)

    def _save_checkpoint(self, model: nn.Module, trial: object) -> None:
        self.state.stateful_callbacks[STATE] = {"kl_coef": self.objective.kl_coef}
        super()._save_checkpoint(model, trial)
        # DeepSpeed and FSDP keep the critic in their own files, with the policy.
        is_sharded = self.accelerator.distributed_type in SHARDED
        if self.args.should_save and not is_sharded:
            learnt = {n: p for n, p in critic_of(self.model).named_parameters() if p.requires_grad}
            folder = Path(self._get_output_dir(trial=trial))
            save_file(learnt, folder / f"checkpoint-{self.state.global_step}" / CRITIC_FILE)

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        if self.accelerator.distributed_type in SHARDED:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        with without_critic(self.model):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        path = Path(resume_from_checkpoint) / CRITIC_FILE
        learnt = load_file(path)
        critic = critic_of(self.model)
        expected = {name for name, p in critic.named_parameters() if p.requires_grad}
        if set(learnt) != expected:
            raise DataError(
                f"{path} holds another critic than this run's: {len(set(learnt) ^ expected)} of "
                "its parameters differ in name. Resume with the settings of the first start."
            )
        critic.load_state_dict(learnt, strict=False)

    def _init_training_state(self, *arguments: object) -> tuple[int, int]:
        state = super()._init_training_state(*arguments)
        saved = self.state.stateful_callbacks.get(STATE)
        if saved:
            self.objective.kl_coef = saved["kl_coef"]
        return state


NAMES = ("trained", "advantages", "returns", "old_values", "kl")


@dataclass(frozen=True)
class RolloutTokens:
    """The columns NAMES of all ranks' tokens, (5, N), and which of the N are this rank's.

    Attributes:
        num_completions: Number of completions of all ranks that have a score.
    """

    values: Tensor
    mine: slice
    num_completions: int

    @classmethod
    def gather(cls, groups: Sequence[Group]) -> RolloutTokens:
        """Gather the tokens of all ranks; a collective, called with this rank's groups."""
        own = torch.stack([_flat(groups, name) for name in NAMES])
        number = sum(bool(row.any()) for group in groups for row in group.columns["trained"])
        everyone = from_all_ranks((own, number))
        start = sum(tokens.shape[1] for tokens, _ in everyone[: rank_and_world()[0]])
        return cls(
            torch.cat([tokens for tokens, _ in everyone], 1),
            slice(start, start + own.shape[1]),
            sum(count for _, count in everyone),
        )

    def named(self, name: str) -> Tensor:
        """(1, N) values of one column, of all ranks."""
        return self.values[NAMES.index(name)][None]

    def set_advantages(
        self, groups: Sequence[Group], normalise: Callable[[Tensor, Tensor], Tensor]
    ) -> None:
        """Replace the groups' advantages by normalised ones.

        Args:
            normalise: f((1, N) advantages, mask) -> (1, N), over the tokens of all ranks.
        """
        advantages = normalise(self.named("advantages"), self.named("trained"))[0, self.mine]
        sizes = [len(c.token_ids) for group in groups for c in group.completions]
        rows = iter(advantages.split(sizes))
        for group in groups:
            group.columns["advantages"] = [next(rows) for _ in group.completions]

    def kl_per_completion(self) -> float:
        """Mean over completions of the summed log-ratio to the reference, in nats."""
        total = (self.named("kl") * self.named("trained")).sum()
        return total.item() / max(1, self.num_completions)

    def explained_variance(self) -> float | None:
        """1 - Var(returns - values) / Var(returns): 1 for a perfect critic, 0 for one that predicts
        the mean, negative for a worse one. None where all returns are the same."""
        trained = self.named("trained").bool()
        returns, values = (self.named(name)[trained] for name in ("returns", "old_values"))
        if len(returns) < 2 or not returns.var() > 0:
            return None
        return 1 - ((returns - values).var() / returns.var()).item()

    @staticmethod
    def sampler_gap(groups: Sequence[Group]) -> tuple[float, int]:
        """Sum and count, on this rank, of |log-prob in training - log-prob at sampling|."""
        gaps = (_flat(groups, "old_logps") - _flat(groups, "policy_logps")).abs()
        return gaps.sum().item(), len(gaps)


def _flat(groups: Sequence[Group], name: str) -> Tensor:
    """Concatenate a column of all completions, in their order."""
    return torch.cat([row for group in groups for row in group.columns[name]])
