"""Distillation: how far a student's next-token distribution is from a teacher's.

p is the teacher's distribution and q the student's; both come as log-probs over the vocabulary, in
nats, and one number for each position goes out, never reduced. The functions that end in
`_with_slope` give the same values, and with them the gradient by the student's logits, without
autograd: the chunked computation over hidden states (posttrain.packed.divergence) calls those.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from posttrain.losses.masking import Mask, PerToken, masked

Distribution = Float[Tensor, "*B V"]
PerPosition = Float[Tensor, "*B"]


def forward_kl(student_logps: Distribution, teacher_logps: Distribution) -> PerPosition:
    """Compute KL(p || q) = sum_v p (log p - log q): the student covers what the teacher may say.

    Nats, not reduced; a token that the teacher gives probability 0 adds 0. By hand: p = (1/2, 1/2)
    and q = (1/4, 3/4) give log 2 - log(3)/2 = 0.1438.
    Source: Hinton et al. (1503.02531); GKD (2306.13649) Section 2, "KL-based divergences".
    """
    return _kl(teacher_logps, student_logps)


def reverse_kl(student_logps: Distribution, teacher_logps: Distribution) -> PerPosition:
    """Compute KL(q || p): the student keeps to what the teacher would say, and may leave some out.

    Nats, not reduced. By hand: p = (1/2, 1/2) and q = (1/4, 3/4) give (3/4) log(3/2) - log(2)/4 =
    0.1308. Source: MiniLLM (2306.08543) Eq. 1.
    """
    return _kl(student_logps, teacher_logps)


def generalised_jsd(
    student_logps: Distribution, teacher_logps: Distribution, *, beta: int | float = 0.5
) -> PerPosition:
    """Compute beta KL(p || m) + (1 - beta) KL(q || m) with m = beta p + (1 - beta) q.

    Nats, not reduced. `beta` in [0, 1]. Inside, the formula as published: it vanishes with beta at
    both ends, beta KL(p || q) near 0 and (1 - beta) KL(q || p) near 1, so that a small beta needs a
    larger learning rate. At the ends themselves it is 0 everywhere, and the limits of the quotients
    are taken instead, as in GKD's experiments and TRL: 0 is `forward_kl`, 1 is `reverse_kl`.
    By hand: p = (1, 0), q = (0, 1) and beta = 1/2 give log 2. Source: GKD (2306.13649) Eq. 1.
    """
    if beta == 0:
        return forward_kl(student_logps, teacher_logps)
    if beta == 1:
        return reverse_kl(student_logps, teacher_logps)
    mixture = _mixture(student_logps, teacher_logps, beta)
    of_teacher, of_student = _kl(teacher_logps, mixture), _kl(student_logps, mixture)
    return beta * of_teacher + (1 - beta) * of_student


def top_k_kl(
    student_top_logps: Float[Tensor, "*B K"], teacher_top_logps: Float[Tensor, "*B K"]
) -> PerPosition:
    """Compute KL(p || q) over K + 1 outcomes: the teacher's k most likely tokens, and all others.

    Nats, not reduced. The arguments are log-probs of the same K tokens; a place without a token has
    -inf in both. All other tokens are one bucket with the rest of the probability, so the result
    is at most `forward_kl`, and equal to it for K = V. Without that bucket the loss could fall by
    q giving the k tokens more than p does. Nothing is said about the others among themselves.
    By hand: p = (1/2, 1/4, 1/4), q = (1/4, 1/4, 1/2) and K = 1 give
    (1/2) log 2 + (1/2) log(2/3) = 0.1438. Source: the partition (data processing) inequality.
    """
    rest_of_teacher, rest_of_student = _rest(teacher_top_logps), _rest(student_top_logps)
    of_top = _kl(teacher_top_logps, student_top_logps)
    return of_top + _kl(rest_of_teacher.unsqueeze(-1), rest_of_student.unsqueeze(-1))


def reverse_kl_advantages(
    student_logps: PerToken, teacher_logps: PerToken, mask: Mask, *, discount: int | float = 0.0
) -> PerToken:
    """Compute the advantages of sampled tokens: sum over k >= t of discount^(k - t) times
    log p(y_k) - log q(y_k).

    Nats, no gradient, 0 where the mask is 0. `discount` in [0, 1]: 0 credits a token with its own
    log-ratio alone, whose policy gradient is that of the reverse KL at each position that was
    visited; 1 gives the gradient of the whole completion's reverse KL, at a higher variance.
    By hand: log-ratios (1, -2) give (1, -2), and (-1, -2) with discount 1.
    Source: MiniLLM (2306.08543) Eq. 2; discount 0 is "On-Policy Distillation", Thinking Machines
    Lab (2025), of which k1 of posttrain.losses.kl is the negative.
    """
    ratios = masked(teacher_logps - student_logps, mask).detach()
    if not discount:
        return ratios
    total, found = torch.zeros_like(ratios[:, 0]), []
    for column in reversed(ratios.unbind(1)):
        total = column + discount * total
        found.append(total)
    return masked(torch.stack(found[::-1], 1), mask)


def minillm_advantages(student_logps: PerToken, teacher_logps: PerToken, mask: Mask) -> PerToken:
    """Compute the mean of log p(y_k) - log q(y_k) over the tokens k > t of a completion.

    Nats, no gradient; 0 for the last token and where the mask is 0. It is what MiniLLM's policy
    gradient multiplies grad log q(y_t) by, beside the gradient of the reverse KL at t itself, which
    is known exactly and is `reverse_kl`. The mean, where a sum would favour short completions.
    By hand: log-ratios (1, -2, 4) give (1, 4, 0). Source: MiniLLM (2306.08543) Eq. 3 and 6.
    """
    after = reverse_kl_advantages(student_logps, teacher_logps, mask, discount=1.0)
    after = after - reverse_kl_advantages(student_logps, teacher_logps, mask)
    trained = mask.bool().to(after.dtype)
    number = trained.flip(1).cumsum(1).flip(1) - trained
    return masked(after / number.clamp(min=1), mask)


# The same values with their slopes.


def generalised_jsd_with_slope(
    student_logps: Float[Tensor, "S V"],
    teacher_logps: Float[Tensor, "S V"],
    *,
    beta: int | float = 0.5,
) -> tuple[Float[Tensor, "S"], Float[Tensor, "S V"]]:
    """Return `generalised_jsd` and its gradient by the logits that `student_logps` normalises.

    With g the gradient by q, d D / d z = q (g - sum q g). g is -p/q for the forward KL, and
    (1 - beta) log(q / m) inside, whose sum with q is (1 - beta) KL(q || m); for the reverse KL
    log(q / p), whose sum is the KL. Constants cancel. Finite log-probs only. By hand: with beta 0,
    q = (1/2, 1/2) and p = (3/4, 1/4) the gradient is q - p = (-1/4, 1/4).
    """
    q = student_logps.exp()
    if beta == 0:
        p = teacher_logps.exp()
        values = torch.linalg.vecdot(p, teacher_logps - student_logps)
        return values, q.sub_(p)
    toward = teacher_logps if beta == 1 else _mixture(student_logps, teacher_logps, beta)
    gap = student_logps - toward
    of_student = torch.linalg.vecdot(q, gap)
    slope = gap.sub_(of_student[:, None]).mul_(q)
    if beta == 1:
        return of_student, slope
    of_teacher = torch.linalg.vecdot(teacher_logps.exp(), teacher_logps - toward)
    values = beta * of_teacher + (1 - beta) * of_student
    return values, slope.mul_(1 - beta)


def top_k_kl_with_slope(
    student_logps: Float[Tensor, "S V"],
    teacher_top_ids: Int[Tensor, "S K"],
    teacher_top_logps: Float[Tensor, "S K"],
) -> tuple[Float[Tensor, "S"], Float[Tensor, "S V"]]:
    """Return `top_k_kl` and its gradient by the logits that `student_logps` normalises.

    d D / d z is q - p for the k tokens, and q (1 - r_p / r_q) for the others, r being what is left
    of the probability. A place without a token has the log-prob -inf, and any id. By hand: with the
    teacher's one token at p = 3/4 and the student's q = (1/2, 1/2) the gradient is (-1/4, 1/4).
    """
    there = teacher_top_logps > -torch.inf
    student_top = student_logps.gather(-1, teacher_top_ids).masked_fill(~there, -torch.inf)
    values = top_k_kl(student_top, teacher_top_logps)
    share = (_rest(teacher_top_logps) - _rest(student_top)).exp()
    slope = student_logps.exp().mul_((1 - share)[:, None])
    at_top = student_top.exp() * share[:, None] - teacher_top_logps.exp()  # what is missing there
    return values, slope.scatter_add_(-1, teacher_top_ids, at_top)


def _kl(of: Distribution, to: Distribution) -> PerPosition:
    """KL of two distributions; outcomes of probability 0 in the first add 0, also to gradients."""
    gap = (of - to).masked_fill(of == -torch.inf, 0.0)
    return (of.exp() * gap).sum(-1)


def _mixture(student_logps: Tensor, teacher_logps: Tensor, beta: int | float) -> Tensor:
    """Log of beta p + (1 - beta) q."""
    shares = torch.tensor((beta, 1 - beta), dtype=torch.float64).log().tolist()
    return torch.logaddexp(teacher_logps + shares[0], student_logps + shares[1])


def _rest(top_logps: Float[Tensor, "*B K"]) -> PerPosition:
    """Log of the probability that is not in the top; of at least a rounding error, never 0."""
    total = top_logps.exp().sum(-1)
    return torch.log1p(-total.clamp(max=1 - torch.finfo(total.dtype).eps))
