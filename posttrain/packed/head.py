"""Log-probs of the scored tokens, in chunks: the (N, V) logits never exist.

    install_scoring_head(model)
    scores = packed_logps(model, batch, temperature=1.0)    # posttrain.packed.forward

`ScoringHead` takes the place of a model's LM head. In an ordinary forward it is the linear layer
that it replaces. Inside `packed_logps` it turns the hidden states of the S scored positions into
S log-probs (with entropy on request), one chunk of tokens at a time, and recomputes the chunks in
the backward pass, as gradient checkpointing does, except the last one. Because it stays a module
of the model, ZeRO-3 and DDP gather and reduce its weight like any other.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from posttrain.packed.half import add_product, kept_multiplier, multiplier, wide

# Logits computed at a time. On a CPU 128 MiB in float32, and twice that for the softmax beside
# them; more would only leave the cache earlier. On CUDA 1 GiB: every chunk reads and writes the
# whole float32 gradient of the weight, so there should be few.
CHUNK_ENTRIES, CHUNK_ENTRIES_CUDA = 2**25, 2**28


class TokenScores(NamedTuple):
    """Scores of S tokens under the policy.

    logps: log-probs in nats at the temperature asked for, with gradient. entropy: of the whole
    next-token distribution, in nats. is_argmax: 1 where the token is the most likely one.
    The last two are zeros unless `with_entropy`.
    """

    logps: Float[Tensor, "S"]
    entropy: Float[Tensor, "S"]
    is_argmax: Float[Tensor, "S"]


class Request:
    """A question to an LM head: answer(head, (S, D) hidden states) -> (S, numbers)."""


@dataclass(frozen=True)
class ScoreRequest(Request):
    """A request for scores; see packed_logps, and chunked_logps for scale and cap."""

    targets: Tensor
    temperature: float = 1.0
    with_entropy: bool = False
    entropy_gradient: bool = True
    equal_slopes: bool = False
    scale: float = 1.0
    cap: float | None = None

    def answer(self, head: "ScoringHead", hidden: Tensor) -> Tensor:
        """(S, D) -> (S, 3) scores."""
        equal, change = self.equal_slopes and torch.is_grad_enabled(), head.change
        request = replace(self, equal_slopes=equal, scale=change.scale, cap=change.cap)
        logps, entropy, is_argmax = _ChunkedLogps.apply(hidden, head.weight, head.bias, request)
        if not (self.with_entropy and self.entropy_gradient):
            entropy = entropy.detach()  # else a gradient of zeros: three passes over all logits
        return torch.stack((logps, entropy, is_argmax), -1)


# A context variable, for a model calls its head with hidden states and nothing else.
_REQUEST: ContextVar[Request | None] = ContextVar("scoring_request", default=None)
# How an LM head takes the states of padded rows; see taking_states.
_TAKING: ContextVar[tuple[Tensor | None, list | None]] = ContextVar("taking", default=(None, None))
# Settings of the model that hold again when the request is over: (object, name, value).
_SET_ASIDE: ContextVar[list[tuple[Any, str, float]]] = ContextVar("set_aside")


def chunked_logps(
    hidden: Float[Tensor, "S D"],
    weight: Float[Tensor, "V D"],
    targets: Int[Tensor, "S"],
    *,
    bias: Float[Tensor, "V"] | None = None,
    temperature: float = 1.0,
    with_entropy: bool = False,
    equal_slopes: bool = False,
    scale: float = 1.0,
    cap: float | None = None,
) -> TokenScores:
    """Log-probs of `targets` under softmax((hidden @ weight.T + bias) / temperature), in nats.

    Peak memory is one chunk of logits, whatever S and V. The products take hidden's dtype; their
    results, the softmax and the sum of the weight's gradient over the chunks are float32 at least.
    Entropy has a gradient too.

    Args:
        equal_slopes: promises that the loss has the same gradient in every log-prob, as a sum or
            a mean has, and none in an entropy. Then no chunk is computed twice: gradients are
            formed in the forward pass and scaled in the backward pass.
        scale: logits are multiplied by it, before all else (Cohere, Granite).
        cap: and then squeezed into (-cap, cap), to cap * tanh(logits / cap) (Gemma 2 and 4).

    Raises:
        RuntimeError: in the backward pass, where that promise is broken.
    """
    equal_slopes = equal_slopes and torch.is_grad_enabled()
    request = ScoreRequest(targets, temperature, with_entropy, True, equal_slopes, scale, cap)
    return TokenScores(*_ChunkedLogps.apply(hidden, weight, bias, request))


class _ChunkedLogps(torch.autograd.Function):
    """log softmax(hidden @ weight.T / temperature)[target] and entropy, without all the logits."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, request):
        size, logits, formed = _chunk_size(hidden, len(weight)), None, None
        if request.equal_slopes and hidden.dtype != torch.float16:  # where p would underflow
            formed = Gradients(hidden, weight, bias, ctx.needs_input_grad)
        # Empty by hand: without scored tokens (an all-masked micro-batch) there is no chunk.
        scores = [hidden.new_empty(0, 4, dtype=wide(hidden.dtype))]
        narrow = weight.to(hidden.dtype)
        times = multiplier(narrow)
        for start in range(0, len(hidden), size):
            part = slice(start, start + size)
            logits, targets = _logits(times(hidden[part]), bias, request), request.targets[part]
            scores.append(_scores_of(logits, targets, request.with_entropy))
            if formed:
                # The slope of every log-prob is 1 here; the backward pass scales by the real one.
                log_norm, ones = scores[-1][:, 3], torch.ones_like(scores[-1][:, 3])
                slope = _slope_of_logits(logits, request, targets, log_norm, ones)
                formed.add(slope, hidden, narrow, part)
        logps, entropy, is_argmax, log_norm = torch.cat(scores).unbind(-1)
        ctx.request, ctx.chunk_size, ctx.formed = request, size, formed
        # The backward begins where the forward ends, so the last chunk's logits cost no memory
        # beyond the peak, and a batch of one chunk no fourth product.
        ctx.last_logits = None if formed else logits
        ctx.save_for_backward(hidden, weight, bias, log_norm, entropy)
        ctx.mark_non_differentiable(is_argmax)
        ctx.set_materialize_grads(False)  # no entropy term, no work for its gradient
        return logps.contiguous(), entropy.contiguous(), is_argmax.contiguous()

    @staticmethod
    def backward(ctx, grad_logps, grad_entropy, _):
        hidden, weight, bias, log_norm, entropy = ctx.saved_tensors
        request, targets = ctx.request, ctx.request.targets
        if grad_logps is None:  # a loss of entropies alone
            grad_logps = torch.zeros_like(log_norm)
        # Both are used up here: the logits are overwritten by their slopes, the formed gradients
        # are scaled in place. A second backward finds neither and computes all chunks again.
        (formed, ctx.formed), (last, ctx.last_logits) = (ctx.formed, None), (ctx.last_logits, None)
        if formed:
            formed.scale(only_slope(grad_logps, grad_entropy))
            return *formed.finished(), None
        gradients = Gradients(hidden, weight, bias, ctx.needs_input_grad)
        narrow, times = weight.to(hidden.dtype), None
        for start in reversed(range(0, hidden.shape[0], ctx.chunk_size)):  # the kept one first
            part = slice(start, start + ctx.chunk_size)
            if last is None:
                times = times or multiplier(narrow)
                last = _logits(times(hidden[part]), bias, request)
            (logits, last), of_entropy = (last, None), None
            if grad_entropy is not None:
                of_entropy = (entropy[part, None], grad_entropy[part, None])
            slopes = grad_logps[part]
            slope = _slope_of_logits(
                logits, request, targets[part], log_norm[part], slopes, of_entropy
            )
            gradients.add(slope, hidden, narrow, part)
        return *gradients.finished(), None


class Gradients:
    """Accumulates the gradients of hidden states, weight and bias, one chunk at a time.

    Skips those that autograd does not need. Weight and bias get a term from every chunk, so they
    are summed in float32 whatever their dtype: in bfloat16 a sum of 64 chunks is off by 1 %.
    """

    def __init__(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, needed: Sequence[bool]
    ) -> None:
        self.dtype = weight.dtype
        dtype = wide(weight.dtype)
        self.hidden = torch.empty_like(hidden) if needed[0] else None
        self.weight = torch.zeros_like(weight, dtype=dtype) if needed[1] else None
        self.bias = torch.zeros_like(bias, dtype=dtype) if bias is not None and needed[2] else None

    def add(self, slope: Tensor, hidden: Tensor, weight: Tensor, part: slice) -> None:
        """slope: (s, V) of the logits of hidden[part]. weight: in the hidden states' dtype."""
        narrow = slope.to(hidden.dtype)
        if self.hidden is not None:  # each row has its one chunk: nothing to sum
            torch.mm(narrow, weight, out=self.hidden[part])
        if self.weight is not None:
            add_product(self.weight, narrow.T, hidden[part])
        if self.bias is not None:
            self.bias += slope.sum(0)

    def scale(self, factor: Tensor) -> None:
        """Multiply all of them by a 0-dimensional tensor."""
        for gradient in (self.hidden, self.weight, self.bias):
            if gradient is not None:
                gradient *= factor

    def finished(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Gradients of hidden states, weight and bias in the dtypes of these."""
        weight, bias = (x if x is None else x.to(self.dtype) for x in (self.weight, self.bias))
        return self.hidden, weight, bias


def only_slope(grad_logps: Tensor, grad_entropy: Tensor | None) -> Tensor:
    """The gradient that all log-probs have, checked on the device: the host does not wait.

    NaN passes: a loss that is not finite is for the trainer to report, on all ranks at once.
    """
    if grad_entropy is not None:
        raise RuntimeError("equal_slopes: the loss has a term of the entropies.")
    first = grad_logps[:1]
    torch._assert_async(
        torch.isclose(grad_logps, first, rtol=0, atol=0, equal_nan=True).all(),
        "equal_slopes: the loss has different gradients in its log-probs. Leave equal_slopes out.",
    )
    return first.sum()  # 0 where there is none


def _slope_of_logits(
    logits: Tensor,
    request: ScoreRequest,
    targets: Tensor,
    log_norm: Tensor,
    grad_logps: Tensor,
    of_entropy: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """(s, V) gradient of the products hidden @ weight.T, in place of their logits.

    With z the logits, p their softmax and H its entropy,
        d logp_target / d z = onehot(target) - p,      d H / d z = -p (log p + H).
    So the gradient is -p (g + h (log p + H)) + g onehot(target), g and h being the gradients of
    log-prob and entropy: one exponential in place, and one number added in each row. What lies
    between products and logits follows: temperature, cap (d c tanh(x/c) / dx = 1 - tanh^2), scale.

    of_entropy: (s, 1) entropies and their gradients, where there are any.
    """
    of_cap = None
    if request.cap is not None:
        of_cap = 1 - (logits * (request.temperature / request.cap)).square_()
    log_probs = logits.sub_(log_norm[:, None])
    slope = grad_logps[:, None]
    if of_entropy is not None:
        entropy, grad_entropy = of_entropy
        slope = slope + grad_entropy * (log_probs + entropy)  # before exp_ overwrites log_probs
    grad_logits = log_probs.exp_().mul_(-slope)
    grad_logits.scatter_add_(-1, targets[:, None], grad_logps[:, None])
    if of_cap is not None:
        grad_logits *= of_cap
    factor = request.scale / request.temperature
    return grad_logits.mul_(factor) if factor != 1.0 else grad_logits


def _chunk_size(hidden: Tensor, vocabulary: int) -> int:
    """Tokens at a time: as many as CHUNK_ENTRIES allows, in chunks of even size."""
    entries = CHUNK_ENTRIES_CUDA if hidden.is_cuda else CHUNK_ENTRIES
    most = max(1, entries // vocabulary)
    num_chunks = max(1, -(-len(hidden) // most))
    return max(1, -(-len(hidden) // num_chunks))


def _scores_of(logits: Tensor, targets: Tensor, with_entropy: bool) -> Tensor:
    """(s, V) logits -> (s, 4): log-probs of the targets, entropy, is_argmax, log of the norm."""
    highest = logits.amax(-1)
    unnormalised = (logits - highest[:, None]).exp_()
    total = unnormalised.sum(-1)
    log_norm = highest + total.log()
    chosen = logits.gather(-1, targets[:, None]).squeeze(-1)
    entropy = is_argmax = torch.zeros_like(log_norm)
    if with_entropy:
        is_argmax = (chosen >= highest).to(logits.dtype)
        # H = log norm - sum p z, and p = unnormalised / total: no (s, V) of probabilities.
        mean_logit = torch.linalg.vecdot(unnormalised, logits) / total
        entropy = log_norm - mean_logit
    return torch.stack((chosen - log_norm, entropy, is_argmax, log_norm), -1)


def _logits(logits: Tensor, bias: Tensor | None, request: ScoreRequest) -> Tensor:
    """The logits, in place of the products hidden @ weight.T."""
    if bias is not None:
        logits += bias
    if request.cap is None:
        factor = request.scale / request.temperature
        return logits.mul_(factor) if factor != 1.0 else logits
    logits.mul_(request.scale / request.cap).tanh_()
    return logits.mul_(request.cap / request.temperature)


@dataclass(frozen=True)
class Change:
    """The change that a model makes to its logits: times scale, then cap * tanh(… / cap).

    set_aside: (object, setting, value of no change), for while the head does it instead.
    """

    scale: float = 1.0
    cap: float | None = None
    set_aside: tuple[tuple[Any, str, float | None], ...] = ()

    def applied(self, logits: Tensor) -> Tensor:
        """Return what the model makes of these logits of its head."""
        logits = logits * self.scale
        return logits if self.cap is None else self.cap * torch.tanh(logits / self.cap)


class ScoringHead(nn.Linear):
    """An LM head that answers a scoring request with scores instead of logits.

    It does to them what the model does to its logits (`change`), whose settings are set aside.
    """

    @classmethod
    def replacing(cls, head: nn.Linear) -> "ScoringHead":
        """The same layer with the same parameter objects, so that tied weights stay tied."""
        with torch.device("meta"):
            new = cls(head.in_features, head.out_features, bias=head.bias is not None)
        new.weight, new.bias, new.change = head.weight, head.bias, Change()
        return new.train(head.training)

    def forward(self, hidden: Tensor) -> Tensor:
        """(1, S, D) -> (1, S, numbers) within a request; (…, D) -> (…, V) logits otherwise."""
        request, device = _REQUEST.get(), hidden.device.type
        places, into = _TAKING.get()
        if places is not None:
            hidden = hidden.flatten(0, 1)[places][None]
        if into is not None:
            into.append(hidden)
            return hidden[..., :1]
        if request is None and torch.is_grad_enabled():
            return F.linear(hidden, self.weight, self.bias)
        if torch.is_autocast_enabled(device):
            hidden = hidden.to(torch.get_autocast_dtype(device))
        with torch.autocast(device, enabled=False):
            return self._all_logits(hidden) if request is None else self._answer(hidden, request)

    def _answer(self, hidden: Tensor, request: Request) -> Tensor:
        for place, name, neutral in self.change.set_aside:
            _SET_ASIDE.get().append((place, name, getattr(place, name)))
            vars(place)[name] = neutral  # some configs refuse None when it is assigned
        return request.answer(self, hidden[0])[None]

    def _all_logits(self, hidden: Tensor) -> Tensor:
        """(…, D) -> (…, V) without gradient, in float32: as the decode loop samples from them."""
        times = kept_multiplier(self.weight, hidden.dtype)
        logits = times(hidden.flatten(0, -2))
        if self.bias is not None:
            logits += self.bias
        return logits.unflatten(0, hidden.shape[:-1])


def requesting_scores(batch: Any, **wanted: float | bool) -> AbstractContextManager:
    """Request the (1, S, 3) scores of the batch's targets, with the keywords of packed_logps.

    batch: a packed batch, or what else has (S,) `targets`.
    """
    return requesting(ScoreRequest(batch.targets, **wanted))


@contextmanager
def requesting(request: Request) -> Iterator[None]:
    """Inside, an LM head gives the answer of this request, not logits."""
    token = _REQUEST.set(request)
    aside = _SET_ASIDE.set([])
    try:
        yield
    finally:
        _REQUEST.reset(token)
        for place, name, value in reversed(_SET_ASIDE.get()):
            vars(place)[name] = value
        _SET_ASIDE.reset(aside)


def is_scoring() -> bool:
    """Return True inside `requesting_scores`."""
    return bool(_REQUEST.get())


@contextmanager
def taking_states(*, places: Tensor | None = None, into: list | None = None) -> Iterator[None]:
    """Inside, an LM head uses of its (r, L, D) states those at these (S,) flat places.

    into: it adds them to this list instead of computing logits.
    """
    was = _TAKING.get()
    token = _TAKING.set((was[0] if places is None else places, was[1] if into is None else into))
    try:
        yield
    finally:
        _TAKING.reset(token)
