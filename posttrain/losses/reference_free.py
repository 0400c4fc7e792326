"""Preference losses that need no reference model, only the policy's log-probs of both completions.

Log-probs are sums over whole completions in nats (EOS included), one per pair; lengths count the
same tokens. One loss per pair comes back. Nothing is reduced, masked or detached.
"""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from posttrain.losses.masking import Lengths, PerPair, log1mexp, upcast

MeanLength = float | Float[Tensor, ""] | None


def simpo_loss(
    chosen: PerPair,
    rejected: PerPair,
    *,
    chosen_lengths: Lengths,
    rejected_lengths: Lengths,
    beta: float = 2.0,
    gamma: float = 1.0,
) -> PerPair:
    """Compute -log σ(β (log π(w)/|w| - log π(l)/|l|) - γ): the reward is the mean log-prob per
    token.

    Nats per pair. `beta` > 0, published 2 to 2.5 (10 in v0.2); `gamma` >= 0 is the margin to win
    by, published 0.1 to 0.8 times beta; 0 asks for none. By hand: equal mean log-probs and γ = 0
    cost log 2. Source: SimPO (2405.14734) Eq. 6.
    """
    mean_w, mean_l = upcast(chosen) / chosen_lengths, upcast(rejected) / rejected_lengths
    return -F.logsigmoid(beta * (mean_w - mean_l) - gamma)


def cpo_loss(
    chosen: PerPair,
    rejected: PerPair,
    *,
    chosen_lengths: Lengths,
    beta: float = 0.1,
    alpha: float = 1.0,
    mean_chosen_length: MeanLength = None,
) -> PerPair:
    """Compute -log σ(β (log π(w) - log π(l))) + α NLL(w): DPO with a uniform reference, and an
    anchor.

    Nats per pair. `beta` > 0. `alpha` >= 0 weights the negative log-likelihood per token of the
    chosen completions (published 1); 0 leaves the preference term alone. `mean_chosen_length`: see
    `_token_nll`. By hand: equal log-probs of -4, 2 tokens each, cost log 2 + 2.
    Source: CPO (2401.08417).
    """
    chosen, rejected = upcast(chosen), upcast(rejected)
    nll = _token_nll(chosen, chosen_lengths, mean_chosen_length)
    return -F.logsigmoid(beta * (chosen - rejected)) + alpha * nll


def orpo_loss(
    chosen: PerPair,
    rejected: PerPair,
    *,
    chosen_lengths: Lengths,
    rejected_lengths: Lengths,
    lam: float = 0.1,
    mean_chosen_length: MeanLength = None,
) -> PerPair:
    """Compute NLL(w) - λ log σ(log odds(w) - log odds(l)): fine-tuning that disfavours the rejected
    completion.

    The odds p/(1-p) are those of the geometric mean probability per token. Nats per pair; the
    likelihood covers the completion only. `lam` >= 0, published 0.1 to 0.25; 0 is SFT on the chosen
    completions. `mean_chosen_length`: see `_token_nll`. By hand: both completions at probability
    1/2 per token and λ = 1 cost log 2 + log 2. Source: ORPO (2403.07691) Eq. 6 and 7.
    """
    chosen, rejected = upcast(chosen), upcast(rejected)
    odds_w, odds_l = _log_odds(chosen / chosen_lengths), _log_odds(rejected / rejected_lengths)
    nll = _token_nll(chosen, chosen_lengths, mean_chosen_length)
    return nll - lam * F.logsigmoid(odds_w - odds_l)


def _log_odds(mean_logps: PerPair) -> PerPair:
    return mean_logps - log1mexp(mean_logps)


def _token_nll(chosen: PerPair, lengths: Lengths, mean_length: MeanLength) -> PerPair:
    """Negative log-likelihood, scaled so that its mean over pairs is the mean over *tokens*.

    `mean_length` is that of the chosen completions in the whole optimizer batch, over all ranks and
    accumulation steps, in tokens. PreferenceTrainer passes it: how a batch is cut into
    micro-batches then changes nothing. None takes these pairs' own mean.
    """
    return -chosen / (lengths.to(chosen.dtype).mean() if mean_length is None else mean_length)
