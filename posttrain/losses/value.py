"""The critic's loss in PPO."""

import torch

from posttrain.losses.masking import Mask, PerToken, masked


def clipped_value_loss(
    values: PerToken,
    old_values: PerToken,
    returns: PerToken,
    mask: Mask,
    *,
    clip: float = 0.2,
) -> PerToken:
    """Compute ½ max((v - R)², (v_clipped - R)²), with v_clipped = `values` kept within `clip` of
    the old.

    Half squared reward units per token, 0 where the mask is 0; not reduced. `returns` and
    `old_values` are of rollout time and carry no gradient. `clip` > 0 in reward units (0.2 OpenAI
    and TRL, 0.5 OpenRLHF): at infinity it is the plain squared error. The maximum is pessimistic:
    a value that has already moved further than `clip` towards the return has no gradient. By hand:
    v = 1, v_old = 0, R = 1, clip 0.2 costs ½ 0.8² = 0.32.
    Source: openai/lm-human-preferences, train_policy.py; the form of PPO (1707.06347) Eq. 7.
    """
    values, old_values, returns = (masked(x, mask) for x in (values, old_values, returns))
    clipped = old_values + (values - old_values).clamp(-clip, clip)
    return 0.5 * torch.maximum((values - returns).square(), (clipped - returns).square())
