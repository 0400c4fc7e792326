"""KL divergence to a reference policy, estimated on sampled tokens; and control of its weight.

Write u = log π - log π_ref on a token sampled from π.

| kind | value             | expected value | expected gradient as a loss term |
|------|-------------------|----------------|----------------------------------|
| k1   | u                 | KL(π‖ref)      | 0: use it in rewards only        |
| k2   | u²/2              | biased         | ∇KL(π‖ref)                       |
| k3   | e^-u - 1 + u      | KL(π‖ref)      | ∇KL(ref‖π), the other direction  |
| k3+  | k3's              | KL(π‖ref)      | ∇KL(π‖ref), taken from k2        |

Source of k1, k2, k3: J. Schulman, "Approximating KL divergence" (2020).
"""

from posttrain.losses.masking import LOG_RATIO_BOUND, Mask, PerToken, exp_bounded, masked


def kl_k1(logps: PerToken, ref_logps: PerToken, mask: Mask) -> PerToken:
    """Compute log π - log π_ref of each token: unbiased, may be negative.

    Nats per token, 0 where the mask is 0; not reduced, gradient kept. As a loss term its expected
    gradient is 0; subtract it from the reward instead. By hand: π = 1/2, π_ref = 1/4 gives log 2.
    """
    return masked(logps, mask) - masked(ref_logps, mask)


def kl_k2(logps: PerToken, ref_logps: PerToken, mask: Mask) -> PerToken:
    """Compute ½ (log π - log π_ref)² of each token: as a loss term, the true gradient of
    KL(π‖π_ref).

    Nats² per token, 0 where the mask is 0; not reduced, gradient kept. By hand: π = 1/2,
    π_ref = 1/4 gives ½ (log 2)² = 0.240.
    """
    return 0.5 * kl_k1(logps, ref_logps, mask).square()


def kl_k3(logps: PerToken, ref_logps: PerToken, mask: Mask) -> PerToken:
    """Compute π_ref/π - 1 - log(π_ref/π) of each token: unbiased and never negative; GRPO's KL.

    Nats per token, 0 where the mask is 0; not reduced, gradient kept. Below u = -20 nats value
    and gradient stop growing. By hand: π = 1/2, π_ref = 1/4 gives ½ - 1 + log 2 = 0.193.
    Source: DeepSeekMath (2402.03300) Eq. 4.
    """
    log_ratio = kl_k1(logps, ref_logps, mask).clamp(min=-LOG_RATIO_BOUND)
    return (-log_ratio).expm1() + log_ratio


def kl_k3_plus(logps: PerToken, ref_logps: PerToken, mask: Mask) -> PerToken:
    """Combine the value of k3 with the gradient of k2: both the right number and the right
    direction.

    Nats per token, 0 where the mask is 0; not reduced. By hand: π = 1/2, π_ref = 1/4 gives 0.193,
    with the gradient log 2 with respect to log π.
    Source: verl's "k3+" (github.com/volcengine/verl).
    """
    k2 = kl_k2(logps, ref_logps, mask)
    return k2 - k2.detach() + kl_k3(logps, ref_logps, mask).detach()


def importance_weighted_kl(
    logps: PerToken, old_logps: PerToken, ref_logps: PerToken, mask: Mask
) -> PerToken:
    """Compute k3 times π/π_old: unbiased, value and gradient, on tokens that an older policy
    sampled.

    Nats per token, 0 where the mask is 0; not reduced, and the ratio keeps its gradient. By hand:
    with π_old = π the value is k3's. Source: DeepSeek-V3.2 (2512.02556), "unbiased KL estimate".
    """
    ratio = exp_bounded(kl_k1(logps, old_logps, mask))
    return ratio * kl_k3(logps, ref_logps, mask)


def adaptive_kl_coef(
    coef: float, kl: float, *, target: float, horizon: int | float, num_episodes: int
) -> float:
    """Compute the next KL coefficient of a proportional controller that steers the KL to `target`.

    `kl` and `target` in nats per sequence (mean over sequences of the summed token KL),
    `num_episodes` completions since the last call. The error is cut to ±20 %; a longer `horizon`
    (episodes; OpenAI: 10,000 with target 6) moves slower. By hand: coef 0.2, kl 30, target 6, 1,000
    episodes of 10,000 give 0.2 (1 + 0.2 · 0.1) = 0.204.
    Source: Ziegler et al. (1909.08593) section 2.2.
    """
    error = min(max(kl / target - 1, -0.2), 0.2)
    return coef * (1 + error * num_episodes / horizon)


def ppo_penalty_coef(coef: float, kl: float, *, target: float) -> float:
    """Compute the next KL coefficient of PPO's penalty form: halved, doubled or kept.

    `kl` and `target` in the same unit: halved below target/1.5, doubled above 1.5 target. By hand:
    coef 1, target 0.01, kl 0.02 gives 2. Source: PPO (1707.06347) section 4.
    """
    if kl < target / 1.5:
        return coef / 2
    if kl > target * 1.5:
        return coef * 2
    return coef
