"""PPO, the actor-critic of RLHF: values for every token, and the KL to the SFT model as a reward.

Once per rollout, with the policy that drew it (rewards R, values V, advantages A, returns G):

    R_t = -kl_coef (log pi_old - log pi_ref) + [t is the last token] score     rlhf_token_rewards
    A, G = gae(R, V_old), and A whitened over all tokens of the rollout        posttrain.advantages

and in each of `epochs` passes over its `minibatches`, as a mean over tokens,

    L = clipped_policy_loss(log pi, log pi_old, A)
        + value_coef * clipped_value_loss(V, V_old, G)                         posttrain.losses

InstructGPT (2203.02155), PPO (1707.06347), GAE (1506.02438), openai/lm-human-preferences. Left out:
an entropy bonus, PPO-ptx's pretraining term, shuffling the mini-batches of later epochs.

Per-token numbers of a rollout: stored in its groups, and seen over all ranks at once.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from posttrain.advantages import gae, rlhf_token_rewards, whiten
from posttrain.errors import ConfigError, DataError
from posttrain.losses import clipped_policy_loss, clipped_value_loss, kl_k1
from posttrain.packed.batch import PackedBatch
from posttrain.packed.forward import packed_logps
from posttrain.packed.prepare import check_context, frozen_copy, prepare_once
from posttrain.packed.scalar import add_critic, critic_of, scores_and_values, without_critic
from posttrain.rollouts.group import cut_group
from posttrain.rollouts.source import RolloutLoader
from posttrain.run.ranks import from_all_ranks, rank_and_world
from posttrain.trainers.metrics import note_clipping
from posttrain.trainers.rl import RLTrainer

CRITIC_FILE = "critic.safetensors"  # in checkpoints: what the critic has learnt
STATE = "posttrain.PPOTrainer"  # where trainer_state.json keeps the KL coefficient

# Settings of RLTrainer that would be ignored here.
NOT_OURS = {"beta", "kl", "reward_kl_coef", "entropy_coef", "advantage", "per",
             "updates_per_rollout", "selection", "correction", "off_policy_mask",
             "engine", "overlap_rollouts"}  # fmt: skip


class PPOTrainer(RLTrainer):
    """Trains a policy and its critic on answers that the policy draws; see RLTrainer for the rest.

    critic: a sequence classifier with one label (posttrain.models.reward_model), which becomes the
    value model; None: a value head on the policy's own trunk. Both heads start at 0.
    loss, value_loss, estimator, normalise: the functions above, settings bound.
    value_learning_rate: the critic's peak rate; None: the policy's. kl_control: f(kl_coef, kl,
    num_episodes=) -> the next rollout's coefficient, such as adaptive_kl_coef with target and
    horizon bound; None keeps it. kl_coef 0 holds no reference.
    A rollout serves `minibatches` optimizer steps, `epochs` times over; max_steps and save_steps
    are multiples of their product.
    """

    def __init__(
        self,
        model: nn.Module,
        args: Any,
        *,
        critic: nn.Module | None = None,
        num_generations: int = 1,
        loss: Callable[..., Tensor] = clipped_policy_loss,
        value_loss: Callable[..., Tensor] = clipped_value_loss,
        estimator: Callable[..., tuple[Tensor, Tensor]] = gae,
        normalise: Callable[[Tensor, Tensor], Tensor] = whiten,
        value_coef: float = 0.1,
        value_learning_rate: float | None = None,
        kl_coef: float = 0.05,
        kl_control: Callable[..., float] | None = None,
        epochs: int = 4,
        minibatches: int = 1,
        **settings: Any,
    ) -> None:
        _check_steps(args, epochs, minibatches)
        for name in NOT_OURS & set(settings):
            raise ConfigError(
                f"{name}: PPO has no such setting. It has kl_coef, estimator, epochs and "
                "minibatches, and takes the mean over all tokens as they were drawn."
            )
        if kl_control and not kl_coef > 0:
            raise ConfigError(
                f"kl_control multiplies kl_coef: expected one above 0 to start from, "
                f"found {kl_coef}."
            )
        prepare_once(model, half=args.bf16 or args.fp16)
        reference = frozen_copy(model, args.device) if kl_coef else None
        add_critic(model, critic)
        self.minibatches, self.epochs = minibatches, epochs
        super().__init__(
            model, args, num_generations=num_generations, advantage=_scores, loss=loss,
            updates_per_rollout=minibatches * epochs, **settings,
        )  # fmt: skip
        if critic is not None:
            longest = max(map(len, self.train_dataset["prompt_ids"])) + self.sampling.max_tokens
            check_context(critic, longest, "Take a critic with a longer context.")
        self.reference = reference
        self.value_loss, self.estimator, self.normalise = value_loss, estimator, normalise
        self.value_coef, self.value_learning_rate = value_coef, value_learning_rate
        self.kl_coef, self.kl_control, self.has_reference = kl_coef, kl_control, bool(kl_coef)

    # Rollouts.

    @property
    def steps_drawn_for(self) -> int:
        return self.minibatches

    def get_train_dataloader(self) -> "_Epochs":
        return _Epochs(super().get_train_dataloader(), self._finish_rollout, self.epochs)

    def _finish_batch(self, groups: list[dict]) -> list[dict]:
        limit = self.max_tokens_per_microbatch
        return [part for group in groups for part in cut_group(group, limit)]

    @torch.no_grad()
    def _finish_rollout(self, groups: list[dict]) -> None:
        """Add what training must not move: log-probs, values, advantages and returns."""
        for group in groups:
            group["scores"] = group.pop("advantages")
        self.model_wrapped.eval()
        for part in self._microbatches(groups):
            # Where other ranks have more parts, this one keeps them company and adds the same anew.
            self._add_targets(part or groups[:1])
        tokens = RolloutTokens.gather(groups)
        tokens.set_advantages(groups, self.normalise)
        self.metrics.add("sampler_gap", *tokens.sampler_gap(groups))
        if (explained := tokens.explained_variance()) is not None:
            self.metrics.add("explained_variance", explained)
        if self.has_reference:
            self.metrics.add("kl_per_answer", tokens.kl_per_answer())
            self.metrics.add("kl_coef", self.kl_coef)
        if self.kl_control:
            self.kl_coef = self.kl_control(
                self.kl_coef, tokens.kl_per_answer(), num_episodes=tokens.num_answers
            )

    def _add_targets(self, groups: list[dict]) -> None:
        batch = self.pack(groups)
        policy, values = scores_and_values(
            self.model_wrapped, batch, temperature=self.sampling.temperature
        )
        old, values = batch.dense(policy.logps), batch.dense(values)
        ref = batch.dense(self._reference_logps(batch)) if self.has_reference else old
        scores = torch.tensor([s for group in groups for s in group["scores"]], device=old.device)
        mask = batch.mask() * (~scores.isnan())[:, None]  # an answer without a score trains nothing
        rewards = rlhf_token_rewards(scores.nan_to_num(), old, ref, mask, kl_coef=self.kl_coef)
        advantages, returns = self.estimator(rewards, values, mask)
        store_tokens(
            groups, trained=mask, old_logps=old, old_values=values, advantages=advantages,
            returns=returns, kl=kl_k1(old, ref, mask),
        )  # fmt: skip

    def _reference_logps(self, batch: PackedBatch) -> Tensor:
        settings = {"temperature": self.sampling.temperature}
        if self.reference is not None:
            with self.half_precision():
                return packed_logps(self.reference, batch, **settings).logps
        with self.accelerator.unwrap_model(self.model_wrapped).disable_adapter():
            return packed_logps(self.model_wrapped, batch, **settings).logps

    # The loss.

    def microbatch_loss(self, model: nn.Module, examples: Sequence[dict]) -> Tensor:
        batch = self.pack(examples)
        scores, values = scores_and_values(
            model, batch, temperature=self.sampling.temperature, with_entropy=True,
            entropy_gradient=False,
        )  # fmt: skip
        logps, values = batch.dense(scores.logps), batch.dense(values)
        names = ("trained", "old_logps", "advantages", "old_values", "returns")
        mask, old, advantages, old_values, returns = (
            self._dense(batch, examples, name) for name in names
        )
        loss = self.loss(logps, old, advantages, mask)
        note_clipping(self.metrics, loss, logps, advantages, mask)
        value_loss = self.value_loss(values, old_values, returns, mask)
        self.metrics.add_all(
            mask, entropy=batch.dense(scores.entropy), policy_loss=loss, value_loss=value_loss
        )
        return (loss + self.value_coef * value_loss).sum()

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """One optimizer; the critic's parameters in groups of their own, with their own rate."""
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

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self.state.stateful_callbacks[STATE] = {"kl_coef": self.kl_coef}
        super()._save_checkpoint(model, trial)
        # DeepSpeed keeps the critic in its own files, with the policy.
        if self.args.should_save and not self.is_deepspeed_enabled:
            learnt = {n: p for n, p in critic_of(self.model).named_parameters() if p.requires_grad}
            folder = Path(self._get_output_dir(trial=trial))
            save_file(learnt, folder / f"checkpoint-{self.state.global_step}" / CRITIC_FILE)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
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

    def _init_training_state(self, *arguments: Any, **settings: Any) -> Any:
        state = super()._init_training_state(*arguments, **settings)
        saved = self.state.stateful_callbacks.get(STATE)
        self.kl_coef = saved["kl_coef"] if saved else self.kl_coef
        return state


class _Epochs:
    """The loader's batches, rollout by rollout: `finish` sees all groups of one, then each batch
    comes `epochs` times."""

    def __init__(
        self, loader: RolloutLoader, finish: Callable[[list[dict]], None], epochs: int
    ) -> None:
        self.loader, self.finish, self.epochs = loader, finish, epochs

    def __iter__(self) -> Iterator[list[dict]]:
        batches = iter(self.loader)
        while True:
            rollout = list(islice(batches, self.loader.plan.batches_per_rollout))
            self.finish([group for batch in rollout for group in batch])
            for _ in range(self.epochs):
                yield from rollout


def _check_steps(args: Any, epochs: int, minibatches: int) -> None:
    if min(epochs, minibatches) < 1:
        raise ConfigError(
            f"--epochs and --minibatches: expected at least 1, found {epochs} and {minibatches}."
        )
    steps = {"max_steps": args.max_steps}
    if args.save_strategy != "no":
        steps["save_steps"] = args.save_steps
    for name, value in steps.items():
        if value % (epochs * minibatches):
            raise ConfigError(
                f"--{name} {value:g}: expected a multiple of --epochs times --minibatches "
                f"({epochs} x {minibatches}), so that a rollout is used up."
            )


def _scores(rewards: Tensor) -> Tensor:
    """What the loader takes for advantages: (P, G) scores as they are, NaN where there is none."""
    return rewards


NAMES = ("trained", "advantages", "returns", "old_values", "kl")


def store_tokens(groups: Sequence[dict], **dense: Tensor) -> None:
    """Write (B, T) tensors, rows in the order of the groups' answers, as lists into the groups."""
    for name, tensor in dense.items():
        rows = iter(tensor.tolist())
        for group in groups:
            group[name] = [next(rows)[: len(answer)] for answer in group["answers"]]


@dataclass(frozen=True)
class RolloutTokens:
    """NAMES of all ranks' tokens, (5, N), and which of the N are this rank's.

    num_answers: of all ranks, those that have a score.
    """

    values: Tensor
    mine: slice
    num_answers: int

    @classmethod
    def gather(cls, groups: Sequence[dict]) -> "RolloutTokens":
        """A collective: every rank calls it, with its own groups."""
        own = torch.tensor([_flat(groups, name) for name in NAMES])
        num_answers = sum(any(answer) for group in groups for answer in group["trained"])
        everyone = from_all_ranks((own, num_answers))
        start = sum(tokens.shape[1] for tokens, _ in everyone[: rank_and_world()[0]])
        return cls(
            torch.cat([tokens for tokens, _ in everyone], 1),
            slice(start, start + own.shape[1]),
            sum(count for _, count in everyone),
        )

    def named(self, name: str) -> Tensor:
        """(1, N) of all ranks."""
        return self.values[NAMES.index(name)][None]

    def set_advantages(
        self, groups: Sequence[dict], normalise: Callable[[Tensor, Tensor], Tensor]
    ) -> None:
        """normalise: f((1, N) advantages, mask) -> (1, N), over the tokens of all ranks."""
        advantages = normalise(self.named("advantages"), self.named("trained"))
        mine = iter(advantages[0, self.mine].tolist())
        for group in groups:
            group["advantages"] = [[next(mine) for _ in answer] for answer in group["answers"]]

    def kl_per_answer(self) -> float:
        """Mean over answers of the summed log-ratio to the reference, in nats."""
        total = (self.named("kl") * self.named("trained")).sum()
        return total.item() / max(1, self.num_answers)

    def explained_variance(self) -> float | None:
        """1 - Var(returns - values) / Var(returns): 1 for a perfect critic, 0 for one that says
        the mean, negative for a worse one. None where all returns are the same."""
        trained = self.named("trained").bool()
        returns, values = (self.named(name)[trained] for name in ("returns", "old_values"))
        if len(returns) < 2 or not returns.var() > 0:
            return None
        return 1 - ((returns - values).var() / returns.var()).item()

    @staticmethod
    def sampler_gap(groups: Sequence[dict]) -> tuple[float, int]:
        """Sum and count, on this rank, of |log-prob in training - log-prob when drawn|."""
        pairs = zip(_flat(groups, "old_logps"), _flat(groups, "policy_logps"), strict=True)
        gaps = [abs(old - sampled) for old, sampled in pairs]
        return sum(gaps), len(gaps)


def _flat(groups: Sequence[dict], name: str) -> list[float]:
    """A per-token number of all answers, one after the other."""
    return [x for group in groups for answer in group[name] for x in answer]
