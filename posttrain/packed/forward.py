"""Log-probs of the scored tokens, in chunks: the (N, V) logits never exist.

`ScoringHead` takes the place of a model's LM head. In an ordinary forward it is the linear layer
that it replaces. Inside `packed_logps` it turns the hidden states of the S scored positions into
S log-probs (with entropy on request), one chunk of tokens at a time, and recomputes the chunks in
the backward pass, as gradient checkpointing does, except the last one. Because it stays a module
of the model, ZeRO-3 and DDP gather and reduce its weight like any other.

    install_scoring_head(model)
    scores = packed_logps(model, batch, temperature=1.0)
"""

from typing import Any

import torch
from torch import nn

from posttrain.packed.batch import PackedBatch
from posttrain.packed.head import TokenScores, requesting_scores


def packed_inputs(batch: PackedBatch) -> dict[str, Any]:
    """What a forward of a packed batch is called with, whichever head it ends in."""
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
    """One forward of a packed batch -> the scores of its S scored tokens.

    `model` is a causal LM that posttrain.packed.prepare has made ready, bare or wrapped by DDP,
    DeepSpeed, FSDP or PEFT. Logits are divided by `temperature`, as in sampling.
    entropy_gradient: False where entropies are looked at, and the loss has no term of them.
    equal_slopes: see chunked_logps.
    """
    with requesting_scores(
        batch, temperature=temperature, with_entropy=with_entropy,
        entropy_gradient=entropy_gradient, equal_slopes=equal_slopes,
    ):  # fmt: skip
        output = model(**packed_inputs(batch), logits_to_keep=batch.predictors)
    return TokenScores(*output.logits[0].unbind(-1))
