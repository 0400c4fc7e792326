"""One forward of a packed batch: what a model is called with, and the scores that come back.

    scores = packed_logps(model, batch, temperature=1.0, with_entropy=True)
    logps = batch.dense(scores.logps)                # (B, T)

The layout goes to attention as the keyword argument `packed`, the targets go to the LM head beside
the model's arguments (posttrain.packed.head), so any wrapper around the model passes both on.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from posttrain.packed.batch import Layout, PackedBatch
from posttrain.packed.head import TokenScores, requesting_scores


def packed_inputs(batch: PackedBatch) -> dict[str, Tensor | Layout | bool]:
    """Arguments for a forward of a packed batch, whichever head it ends in."""
    # A ready-made 4-D mask makes transformers build none; packed attention never reads it. It is
    # made on the device: a copy from the host would stand in the queue of every forward.
    no_mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=batch.input_ids.device)
    return {
        "input_ids": batch.input_ids,
        "attention_mask": no_mask,
        "position_ids": batch.position_ids,
        "packed": batch.layout,
        "use_cache": False,
    }


def packed_logps(
    model: nn.Module,
    batch: PackedBatch,
    *,
    temperature: float = 1.0,
    with_entropy: bool = False,
    entropy_gradient: bool = True,
    equal_slopes: bool = False,
) -> TokenScores:
    """Run one forward of a packed batch and return the scores of its S scored tokens.

    Args:
        model: a causal LM that posttrain.packed.prepare has made ready, bare or wrapped by DDP,
            DeepSpeed, FSDP or PEFT.
        temperature: logits are divided by it, as in sampling.
        with_entropy: also compute entropies, and which tokens are the most likely ones.
        entropy_gradient: False where entropies are only logged, and the loss has no term of them.
        equal_slopes: see posttrain.packed.head.chunked_logps.
    """
    wanted = {
        "temperature": temperature,
        "with_entropy": with_entropy,
        "entropy_gradient": entropy_gradient,
        "equal_slopes": equal_slopes,
    }
    with requesting_scores(batch, **wanted):
        output = model(**packed_inputs(batch), logits_to_keep=batch.predictors)
    return TokenScores(*output.logits[0].unbind(-1))
