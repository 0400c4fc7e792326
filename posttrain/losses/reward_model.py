"""Losses that fit a reward model to human comparisons.

Rewards come one per completion, read at its last token. Only differences of rewards are identified;
`centering` pins their level.
"""

import itertools

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from posttrain.losses.masking import PerPair, upcast


def bradley_terry_loss(
    chosen: PerPair,
    rejected: PerPair,
    *,
    margin: PerPair | float = 0.0,
    centering: float = 0.0,
) -> PerPair:
    """Compute -log σ(chosen - rejected - margin) + centering (chosen + rejected)²: the
    log-likelihood of the comparison.

    Rewards are logits, the loss is in nats per pair; not reduced. `margin` >= 0, per pair or for
    all, asks that clear preferences be clear (Llama 2: 1, 2/3, 1/3, 0); 0 is the plain model.
    `centering` >= 0 (published: 0.01) pulls the rewards of a pair to a sum of 0; 0 leaves their
    level free. By hand: equal rewards cost log 2; chosen 2, rejected 1, margin 1, centering 0.01
    cost log 2 + 0.09.
    Source: InstructGPT (2203.02155) Eq. 1 with K = 2; Llama 2 (2307.09288) Eq. 2; centering:
    Eisenstein et al. (2312.09244).
    """
    chosen, rejected = upcast(chosen), upcast(rejected)
    return -F.logsigmoid(chosen - rejected - margin) + centering * (chosen + rejected).square()


def kwise_loss(ranked: Float[Tensor, "P K"]) -> Float[Tensor, " P"]:
    """Compute Bradley-Terry over all pairs of K ranked completions of one prompt, averaged over the
    pairs.

    `ranked` holds rewards (logits), best completion first. Nats per prompt; not reduced over
    prompts. All pairs of a prompt belong in one batch: split over batches they overfit within an
    epoch. By hand: K equal rewards cost log 2. Raises ValueError for K < 2.
    Source: InstructGPT (2203.02155) Eq. 1.
    """
    num_completions = ranked.shape[1]
    if num_completions < 2:
        raise ValueError(
            f"kwise_loss compares completions: expected K >= 2 a prompt, found {num_completions}."
        )
    better, worse = zip(*itertools.combinations(range(num_completions), 2), strict=True)
    ranked = upcast(ranked)
    differences = ranked[:, list(better)] - ranked[:, list(worse)]  # (P, K) -> (P, K(K-1)/2)
    return -F.logsigmoid(differences).mean(dim=1)
