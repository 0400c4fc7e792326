"""Losses that fit a reward model to human comparisons, and one that fits it to labels of steps.

Rewards come one per completion, read at its last token. Only differences of rewards are identified;
`centering` pins their level. Scores of steps are logits, of the probability that a step is right.
"""

import itertools

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
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


def step_loss(scores: Float[Tensor, " S"], right: Bool[Tensor, " S"]) -> Float[Tensor, " S"]:
    """Compute -log σ(score) for right steps and -log σ(-score) for wrong ones: the log-likelihood
    of the labels.

    Scores are logits, one for each step, read at its last token; the loss is in nats per step; not
    reduced. By hand: a score of 0 costs log 2, whatever the label.
    Source: Lightman et al. (2305.20050) section 2.6; Math-Shepherd (2312.08935) Eq. 2.
    """
    scores = upcast(scores)
    return -F.logsigmoid(torch.where(right, scores, -scores))
