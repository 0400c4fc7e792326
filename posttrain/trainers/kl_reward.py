"""The KL to the reference as a part of the reward, token by token, before advantages are taken.

    RLTrainer(…, reward_kl_coef=0.05)     a token's reward less 0.05 (log pi - log pi_ref)

The estimate is k1, whose place this is: as a term of the loss its expected gradient is 0.
Source: InstructGPT (2203.02155) Eq. 2; RLOO (2402.14740).
"""

from collections.abc import Sequence
from typing import Any

import torch

from posttrain.rollouts.group import DrawnGroup, cut_group
from posttrain.rollouts.source import Penalties


def kl_penalties(trainer: Any, drawn: Sequence[DrawnGroup]) -> Penalties:
    """What each token's reward is lowered by, per group and answer; logs `kl_per_answer`.

    Log-probs of the policy are those of drawing, or the trainer's where an engine drew, which with
    top_k, … does not know the policy's own. All ranks call it with equally many groups.
    """
    limit = trainer.max_tokens_per_microbatch
    cut = [cut_group(group.training_record([0.0] * len(group.answers)), limit) for group in drawn]
    parts = [part for parts in cut for part in parts]
    trainer.add_reference_logps(parts)
    source = "policy_logps"
    if trainer.policy_now.engine is not None:
        trainer.add_old_logps(parts)
        source = "old_logps"
    ratios = [
        torch.tensor(old) - torch.tensor(ref)
        for part in parts
        for old, ref in zip(part[source], part["ref_logps"], strict=True)
    ]
    trainer.metrics.add("kl_per_answer", sum(ratio.sum() for ratio in ratios), len(ratios))
    penalties = iter([(trainer.reward_kl_coef * ratio).tolist() for ratio in ratios])
    return [[next(penalties) for _ in group.answers] for group in drawn]
