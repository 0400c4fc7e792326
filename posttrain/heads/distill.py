"""The KL to a teacher that differs in its states alone, in chunks: no logits of a whole batch.

    kl = chunked_kl(lm_head, states, teacher_states, ahead)

Chunks are computed again in the backward pass.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from posttrain.heads.ahead import Ahead
from posttrain.losses.lookahead import self_distillation_kl
from posttrain.packed.head import CHUNK_ENTRIES, ScoringHead


def chunked_kl(lm_head: ScoringHead, states: Tensor, teacher: Tensor, ahead: Ahead) -> Tensor:
    """Compute minus the KL(teacher || current) of each position, as (1, S, 3) scores.

    states, teacher: (1, N, D), which the same LM head turns into logits. The second and third
    number are 0 and whether the teacher's most likely token is the model's.
    """
    size = max(1, CHUNK_ENTRIES // lm_head.out_features)
    pairs = (x[0, ahead.positions].split(size) for x in (states, teacher))
    parts = [
        checkpoint(_chunk, lm_head, mine, theirs, use_reentrant=False)
        for mine, theirs in zip(*pairs, strict=True)
    ]
    return torch.cat(parts)[None] if parts else states.new_zeros(1, 0, 3)


def _chunk(lm_head: ScoringHead, states: Tensor, teacher: Tensor) -> Tensor:
    weight, bias = lm_head.weight, lm_head.bias
    logits = lm_head.change.applied(F.linear(states, weight, bias).float())
    with torch.no_grad():
        wanted = lm_head.change.applied(F.linear(teacher, weight, bias).float())
    mask = torch.ones_like(logits[None, :, 0])
    kl = self_distillation_kl(logits[None], wanted[None], mask)[0]
    agrees = (logits.argmax(-1) == wanted.argmax(-1)).to(kl.dtype)
    return torch.stack((-kl, torch.zeros_like(kl), agrees), -1)
