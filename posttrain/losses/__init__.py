"""Losses as plain functions of small tensors: per pair or per token, never reduced.

    from posttrain.losses import dpo_loss
    loss = dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta=0.1).mean()

Nothing here knows of models, trainers or tokenizers; importing it loads torch and jaxtyping alone.
"""

from posttrain.losses.importance import (
    fresh_tokens,
    icepop_weights,
    sequence_mask_weights,
    sequence_tis_weights,
    tis_weights,
)
from posttrain.losses.kl import (
    adaptive_kl_coef,
    importance_weighted_kl,
    kl_k1,
    kl_k2,
    kl_k3,
    kl_k3_plus,
    ppo_penalty_coef,
)
from posttrain.losses.masking import masked_mean, masked_sum, token_weights
from posttrain.losses.pointwise import (
    apo_down_loss,
    apo_zero_loss,
    apo_zero_unpaired_loss,
    bco_pair_loss,
    bco_unpaired_loss,
    kto_loss,
    kto_reference_point,
    nca_loss,
    sppo_loss,
)
from posttrain.losses.policy import (
    cispo_loss,
    clipped_policy_loss,
    dual_clip_policy_loss,
    gspo_loss,
    gspo_token_loss,
    reinforce_loss,
    rloo_loss,
    token_entropy,
    two_sided_policy_loss,
)
from posttrain.losses.preference import (
    aot_loss,
    aot_unpaired_loss,
    cdpo_loss,
    discopop_loss,
    dpo_length_norm_loss,
    dpo_loss,
    exo_loss,
    fdpo_forward_kl_loss,
    fdpo_js_loss,
    hinge_loss,
    ipo_avg_loss,
    ipo_loss,
    robust_dpo_loss,
)
from posttrain.losses.reference_free import cpo_loss, orpo_loss, simpo_loss
from posttrain.losses.reward_model import bradley_terry_loss, kwise_loss, step_loss
from posttrain.losses.supervised import cross_entropy_loss, dft_loss, nll_loss
from posttrain.losses.trust_region import (
    dppo_kl_loss,
    dppo_tv_loss,
    kimi_policy_loss,
    kimi_squared_loss,
    kimi_token_loss,
    off_policy_mask,
)
from posttrain.losses.value import clipped_value_loss

__all__ = [
    "adaptive_kl_coef",
    "aot_loss",
    "aot_unpaired_loss",
    "apo_down_loss",
    "apo_zero_loss",
    "apo_zero_unpaired_loss",
    "bco_pair_loss",
    "bco_unpaired_loss",
    "bradley_terry_loss",
    "cdpo_loss",
    "cispo_loss",
    "clipped_policy_loss",
    "clipped_value_loss",
    "cpo_loss",
    "cross_entropy_loss",
    "dft_loss",
    "discopop_loss",
    "dpo_length_norm_loss",
    "dpo_loss",
    "dppo_kl_loss",
    "dppo_tv_loss",
    "dual_clip_policy_loss",
    "exo_loss",
    "fdpo_forward_kl_loss",
    "fdpo_js_loss",
    "fresh_tokens",
    "gspo_loss",
    "gspo_token_loss",
    "hinge_loss",
    "icepop_weights",
    "importance_weighted_kl",
    "ipo_avg_loss",
    "ipo_loss",
    "kimi_policy_loss",
    "kimi_squared_loss",
    "kimi_token_loss",
    "kl_k1",
    "kl_k2",
    "kl_k3",
    "kl_k3_plus",
    "kto_loss",
    "kto_reference_point",
    "kwise_loss",
    "masked_mean",
    "masked_sum",
    "nca_loss",
    "nll_loss",
    "off_policy_mask",
    "orpo_loss",
    "ppo_penalty_coef",
    "reinforce_loss",
    "rloo_loss",
    "robust_dpo_loss",
    "sequence_mask_weights",
    "sequence_tis_weights",
    "simpo_loss",
    "sppo_loss",
    "step_loss",
    "tis_weights",
    "token_entropy",
    "token_weights",
    "two_sided_policy_loss",
]
