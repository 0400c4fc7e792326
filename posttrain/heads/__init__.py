"""Heads that predict tokens beyond the next one: Medusa's, DeepSeek's modules, parallel heads.

heads = MedusaHeads.on(model, num_heads=4)      # a prepared causal LM
add_heads(model, heads)
scores = scores_ahead(model, batch, segments, with_base=False)
save_heads(model, folder)
load_heads(folder, model).draft_logits(hidden)
"""

from posttrain.heads.ahead import Ahead, tokens_ahead
from posttrain.heads.attach import (
    ScoresAhead,
    add_heads,
    heads_of,
    scores_ahead,
    trunk_states,
    without_heads,
)
from posttrain.heads.drafting import GrowingCache, Heads
from posttrain.heads.files import (
    check_heads,
    continued_modules,
    load_heads,
    save_heads,
    saved_heads,
)
from posttrain.heads.medusa import MedusaHeads
from posttrain.heads.mtp import MTPModules, ParallelHeads

__all__ = [
    "Ahead",
    "GrowingCache",
    "Heads",
    "MTPModules",
    "MedusaHeads",
    "ParallelHeads",
    "ScoresAhead",
    "add_heads",
    "check_heads",
    "continued_modules",
    "heads_of",
    "load_heads",
    "save_heads",
    "saved_heads",
    "scores_ahead",
    "tokens_ahead",
    "trunk_states",
    "without_heads",
]
