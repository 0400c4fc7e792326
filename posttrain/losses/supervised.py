"""Supervised fine-tuning: the negative log-likelihood of the completion, and two variants of it.

The trainers compute log-probs of target tokens in chunks and pass those; `cross_entropy_loss` is
the same from logits, for those who have them. The mask decides which tokens train.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from posttrain.losses.masking import Mask, PerToken, masked, upcast

IGNORED_LABEL = -100  # PyTorch's and Hugging Face's mark of a position without a target


def nll_loss(logps: PerToken, mask: Mask) -> PerToken:
    """Compute the negative log-probability of each target token.

    Nats per token, 0 where the mask is 0. Not reduced: `token_weights(mask, per="token")` makes
    it the SFT loss. By hand: a token of probability 1/4 costs log 4 = 1.386.
    Source: Alpaca (github.com/tatsu-lab/stanford_alpaca), train.py.
    """
    return -masked(logps, mask)


# The derivative by every trained token's log-prob is the same, -1 times the token's weight. The LM
# head can then form its gradient in the forward pass (posttrain.packed.head, equal_slopes).
nll_loss.equal_slopes = True


def has_equal_slopes(loss: Callable[..., Tensor]) -> bool:
    """Return True if the loss, bound settings aside, is marked as linear in the log-probs."""
    return getattr(getattr(loss, "func", loss), "equal_slopes", False)


def dft_loss(logps: PerToken, mask: Mask) -> PerToken:
    """Compute the loss of dynamic fine-tuning: each token's loss is weighted by its own
    probability, without gradient.

    Nats per token, 0 where the mask is 0; not reduced. The weight cancels the 1/p in the gradient
    of log p, so that improbable tokens no longer dominate. By hand: a token of probability 1/4
    costs log(4)/4 = 0.347.
    Source: "On the Generalization of SFT" (2508.05629).
    """
    logps = masked(logps, mask)
    return -logps.detach().exp() * logps


def cross_entropy_loss(
    logits: Float[Tensor, "B T V"], targets: Int[Tensor, "B T"], *, label_smoothing: float = 0.0
) -> PerToken:
    """Compute the cross-entropy of each target under the logits *at the same position*, with
    smoothed labels.

    Nats per token, 0 where the target is -100; not reduced. Nothing is shifted: pass
    `logits[:, :-1]` and `labels[:, 1:]`. `label_smoothing` in [0, 1] moves that much probability
    from the target to a uniform distribution over all V tokens, target included: 0 is the plain
    loss, 1 forgets the target. By hand: equal logits cost log V whatever the smoothing.
    Source: Szegedy et al. (1512.00567) section 7.
    """
    logps = F.log_softmax(upcast(logits), dim=-1)
    trained = targets != IGNORED_LABEL
    index = torch.where(trained, targets, torch.zeros_like(targets)).unsqueeze(-1)
    nll = -logps.gather(-1, index).squeeze(-1)  # (B, T, V) -> (B, T)
    uniform = -logps.mean(dim=-1)
    return masked((1 - label_smoothing) * nll + label_smoothing * uniform, trained)
