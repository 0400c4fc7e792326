"""Heads that predict tokens beyond the next one: Medusa's, multi-token prediction, distillation.

    heads = [ahead_logps(logits[k], labels, offset=k + 2) for k in range(K)]
    loss = medusa1_loss(heads)

Unlike the other losses these are reduced: a head that looks further ahead has fewer targets, so
each head is a mean of its own, and the loss a weighted sum of means. A trainer that cuts its batch
passes the counts over the whole batch as `totals`; the losses of its parts then add up.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Real
from torch import Tensor

from posttrain.losses.masking import Mask, PerToken, masked, upcast
from posttrain.losses.supervised import IGNORED_LABEL

# One entry for each head, the nearest first: log-probs of its targets, in nats, in any order.
ByHead = Sequence[Float[Tensor, " _"]]
Totals = Sequence[int] | Real[Tensor, " K"] | None


def ahead_logps(
    logits: Float[Tensor, "B T V"],
    labels: Int[Tensor, "B T"],
    *,
    offset: int,
    segments: Int[Tensor, "B T"] | None = None,
) -> Float[Tensor, " S"]:
    """Collect the log-probs of the tokens `offset` places on: position t predicts label t + offset.

    Nats, of the S targets that exist, row by row. Labels are as the input is, not shifted; one of
    -100 is no target. `offset` is 1 for the next token; Medusa's head k and DeepSeek's module k
    have k + 1. `segments` numbers the documents of a packed row: a target in another document than
    the position that predicts it is none. By hand: 5 tokens in one document have 3 targets at
    offset 2; as documents of 2 and 3 tokens they have 1.
    """
    length = max(0, logits.shape[1] - offset)
    logps = F.log_softmax(upcast(logits[:, :length]), dim=-1)
    targets = labels[:, offset:]
    valid = targets != IGNORED_LABEL
    if segments is not None:
        valid = valid & (segments[:, offset:] == segments[:, :length])
    return logps[valid].gather(-1, targets[valid][:, None]).squeeze(-1)


def medusa1_loss(logps: ByHead, *, decay: float = 0.8, totals: Totals = None) -> Float[Tensor, ""]:
    """Compute Medusa's loss of the heads: sum over k of decay^k times head k's mean of -log p, k
    from 1.

    Nats. `decay` in (0, 1]: heads that look further are less certain, and 1 weighs all alike.
    `totals`: targets of each head in the whole batch; none: those given. A head without a target
    counts nothing. By hand: two heads whose targets all have probability 1/2 cost
    (0.8 + 0.64) log 2 = 0.998. Source: Medusa (2401.10774) Eq. 1.
    """
    return _sum_of_means(logps, [decay**k for k in range(1, len(logps) + 1)], totals)


def medusa2_loss(
    base_logps: Float[Tensor, " _"],
    logps: ByHead,
    *,
    lambda0: float = 0.2,
    decay: float = 0.8,
    totals: Totals = None,
) -> Float[Tensor, ""]:
    """Compute Medusa's joint loss: the model's own mean of -log p, plus lambda0 times
    `medusa1_loss`.

    Nats. `base_logps`: of the next tokens, under the model itself. `lambda0` above 0; 0.2 in the
    paper's runs, or ramped up from 0. `totals`: the count of base targets, then those of each head.
    By hand: with all probabilities 1/2 and two heads, log 2 + 0.2 · 0.998 = 0.893.
    Source: Medusa (2401.10774) Eq. 2.
    """
    of_base, of_heads = (None, None) if totals is None else (totals[:1], totals[1:])
    own = _sum_of_means([base_logps], [1.0], of_base)
    return own + lambda0 * medusa1_loss(logps, decay=decay, totals=of_heads)


def mtp_loss(logps: ByHead, *, weight: float = 0.3, totals: Totals = None) -> Float[Tensor, ""]:
    """Compute DeepSeek-V3's loss of D modules: weight times the mean over modules of their mean of
    -log p.

    Nats; it is added to the model's own loss. `weight` at least 0: 0.3, later 0.1 in the report.
    `totals`: targets of each module in the whole batch; none: those given. The report divides every
    module by the number of tokens T: pass [T] * D for that. By hand: two modules whose targets all
    have probability 1/2 cost 0.3 log 2 = 0.208. Source: DeepSeek-V3 (2412.19437) Eq. 24, 25.
    """
    return _sum_of_means(logps, [weight / max(1, len(logps))] * len(logps), totals)


def parallel_heads_loss(logps: ByHead, *, totals: Totals = None) -> Float[Tensor, ""]:
    """Compute the loss of parallel heads: the sum over heads of their mean of -log p.

    Nats; equal weights. Head 1 predicts the next token, head i the i-th. `totals`: as above, of the
    whole batch; none: those given. By hand: two heads whose targets all have probability 1/2 cost
    2 log 2 = 1.386. Source: Gloeckle et al. (2404.19737) Eq. 2.
    """
    return _sum_of_means(logps, [1.0] * len(logps), totals)


def self_distillation_kl(
    logits: Float[Tensor, "B T V"], teacher_logits: Float[Tensor, "B T V"], mask: Mask
) -> PerToken:
    """Compute KL(teacher || current) of each position, the teacher being the model as it was.

    Nats per position, 0 where the mask is 0; not reduced, no gradient in the teacher. It takes the
    place of the model's own loss in Medusa-2 where the completions are its own. By hand: teacher
    (1/2, 1/2) and current (1/4, 3/4) give ½ log 2 + ½ log ⅔ = 0.144.
    Source: Medusa (2401.10774) section 2.3.2, whose mean is over the valid positions.
    """
    current = F.log_softmax(upcast(logits), dim=-1)
    teacher = F.log_softmax(upcast(teacher_logits.detach()), dim=-1)
    return masked((teacher.exp() * (teacher - current)).sum(-1), mask)


def _sum_of_means(logps: ByHead, weights: Sequence[float], totals: Totals) -> Float[Tensor, ""]:
    if totals is None:
        totals = [len(of_head) for of_head in logps]
    if len(totals) != len(logps):
        raise ValueError(f"totals: expected {len(logps)}, one for each head; found {len(totals)}.")
    loss = logps[0].new_zeros((), dtype=torch.promote_types(logps[0].dtype, torch.float32))
    for of_head, weight, total in zip(logps, weights, totals, strict=True):
        total = total.clamp(min=1) if isinstance(total, Tensor) else max(total, 1)
        loss = loss - weight / total * upcast(of_head).sum()
    return loss
