"""Per-token numbers of a rollout: stored in its groups, and seen over all ranks at once."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from posttrain.ranks import from_all_ranks, rank_and_world

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
        pairs = zip(_flat(groups, "old_logps"), _flat(groups, "sampled_logps"), strict=True)
        gaps = [abs(old - sampled) for old, sampled in pairs]
        return sum(gaps), len(gaps)


def _flat(groups: Sequence[dict], name: str) -> list[float]:
    """A per-token number of all answers, one after the other."""
    return [x for group in groups for answer in group[name] for x in answer]
