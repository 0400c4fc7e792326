"""Decode by Medusa's typical acceptance: other completions than the model's, in less time.

    lookahead = Lookahead("heads", [], heads=find, acceptance="typical")

A guess stays if the model's probability of it, at the sampling temperature and within top-k and
top-p, is above min(epsilon, delta exp(-H)), with H the entropy of that distribution in nats, and if
all before it stay. Of a tree's branches the longest wins, of equally long ones the more likely. So
that each forward gains a token whatever the guesses are, the first token after the guesses that
stayed is the most likely one, without a condition. Likely tokens are favoured: completions do not
have the model's distribution. Cai et al., Medusa (2401.10774) section 2.3.1. At temperature 0
acceptance is exact. Left out: epsilon and delta as settings.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from posttrain.rollouts.ahead_decoding import AheadDecoding
from posttrain.rollouts.draft_length import Step
from posttrain.rollouts.drafts import Draft
from posttrain.rollouts.sampling import distributions
from posttrain.rollouts.trees import typical_bar

EPSILON, DELTA = 0.09, 0.3  # those of the paper's code; delta is the root of epsilon


class TypicalDecoding(AheadDecoding):
    """One batch of completions, whose guesses stay if they are likely enough."""

    def _choose(self, logits: Tensor, numbers: Tensor, steps: Tensor) -> list[list]:  # noqa: ARG002
        """The most likely token after each place, with its log-probs; see AheadDecoding."""
        parts = logits, self.sampling, self.stop_ids, steps
        self.log_probs, self.allowed = distributions(*parts)
        token = self.allowed.argmax(-1)
        pairs = self._pairs(torch.arange(len(token), device=self.device), token)
        return [token.tolist(), *pairs.tolist()]

    def _pairs(self, places: Tensor, tokens: Tensor) -> Tensor:
        """(2, N) log-probs of the policy, and within top-k and top-p, of tokens after places."""
        return torch.stack((self.log_probs[places, tokens], self.allowed[places, tokens]))

    def _accepted(
        self, draft: Draft, own: Sequence[tuple], offset: int, step: Step
    ) -> tuple[list[int], list[tuple]]:
        """Find the places of the path that stays, and what the row gains; see AheadDecoding."""
        if not draft.token_ids:
            return [0], [own[0]]
        parents = [draft.parent(index) for index in range(len(draft.token_ids))]
        places = torch.tensor(parents, device=self.device) + offset
        pairs = self._pairs(places, torch.tensor(draft.token_ids, device=self.device))
        bars = typical_bar(self.allowed[places], epsilon=EPSILON, delta=DELTA)
        stays, logps = (pairs[1].exp() > bars).tolist(), pairs.T.tolist()
        best: dict[int, tuple[int, float]] = {0: (0, 0.0)}  # place -> guesses, sum of log-probs
        for index, (parent, kind) in enumerate(zip(parents, draft.kinds, strict=True)):
            if parent not in best:
                continue
            depth, total = best[parent]
            step.verified.append((kind, depth + 1, stays[index]))
            if stays[index]:
                best[index + 1] = (depth + 1, total + logps[index][1])
        path = [max(best, key=best.__getitem__)]
        while path[0]:
            path.insert(0, parents[path[0] - 1])
        kept = [(draft.token_ids[p - 1], *logps[p - 1]) for p in path[1:]]
        return path, [*kept, own[path[-1]]]
