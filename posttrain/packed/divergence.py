"""Divergences of a student from a teacher, in chunks: the (S, V) logits of neither ever exist.

    with torch.no_grad():
        target = packed_states(teacher, batch)
    found = packed_divergence(student, batch, target, divergence=generalised_jsd_with_slope)
    found.losses.sum().backward()

Both models see the same packed batch. The student's LM head makes its logits for a chunk of tokens
and the target those of the same tokens; in blocks of rows that stay in the processor's cache the
divergence turns them into one number for each token, and the student's logits into the slopes of
that number, from which the gradients are formed at once. So no chunk is computed twice, and memory
holds two chunks of logits, whatever the number of tokens and the vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from posttrain.packed.batch import PackedBatch
from posttrain.packed.forward import packed_inputs
from posttrain.packed.half import multiplier, wide
from posttrain.packed.head import (
    Change,
    Gradients,
    Request,
    ScoreRequest,
    ScoringHead,
    _logits,
    chunked_logps,
    only_slope,
    requesting,
)

NO_CHANGE = Change()

# Logits of each model at a time: on a CPU 32 MiB in float32, where larger chunks are no faster; on
# CUDA 512 MiB, since every chunk reads and writes the whole gradient of the weight.
CHUNK_ENTRIES, CHUNK_ENTRIES_CUDA = 2**23, 2**27
BLOCK_ENTRIES = 2**17  # on a CPU, of a block of rows: a handful of its tensors fit the cache

# f(student's log-probs (s, V), *the target's rows) -> (s,) values, and their (s, V) slopes by the
# student's logits: those of posttrain.losses.distillation.
Divergence = Callable[..., tuple[Tensor, Tensor]]


class Target:
    """The teacher's side of S tokens.

    vocabulary: the rows of its head, where it has all of its logits; None otherwise.
    """

    vocabulary: int | None = None

    def rows(self, part: slice, vocabulary: int) -> tuple[Tensor, ...]:
        """Return what a divergence takes for these of the tokens, each with s rows."""
        raise NotImplementedError


@dataclass(frozen=True)
class States(Target):
    """A teacher's hidden states of S tokens, and the head that makes logits of them.

    hidden: (S, D). weight: (V, D). bias: (V,) or None. temperature: logits are divided by it.
    multipliers: of the weight, by the vocabulary asked for and the dtype; made where missing.
    """

    hidden: Float[Tensor, "S D"]
    weight: Float[Tensor, "V D"]
    bias: Float[Tensor, "V"] | None = None
    change: Change = NO_CHANGE
    temperature: float = 1.0
    multipliers: dict[tuple, Callable] = field(default_factory=dict)

    @property
    def vocabulary(self) -> int:
        """V."""
        return len(self.weight)

    def rows(self, part: slice, vocabulary: int) -> tuple[Tensor]:
        """(s, vocabulary) log-probs over the first tokens."""
        name = vocabulary, self.hidden.dtype
        if name not in self.multipliers:
            self.multipliers[name] = multiplier(self.weight[:vocabulary].to(self.hidden.dtype))
        bias = None if self.bias is None else self.bias[:vocabulary]
        logits = _logits(self.multipliers[name](self.hidden[part]), bias, self._request())
        return (logits.sub_(logits.logsumexp(-1, keepdim=True)),)

    def logps(self, targets: Int[Tensor, "S"]) -> Float[Tensor, "S"]:
        """Log-probs of these tokens."""
        request = self._request()
        return chunked_logps(
            self.hidden,
            self.weight,
            targets,
            bias=self.bias,
            temperature=request.temperature,
            scale=request.scale,
            cap=request.cap,
        ).logps

    def _request(self) -> ScoreRequest:
        return ScoreRequest(
            self.hidden, self.temperature, scale=self.change.scale, cap=self.change.cap
        )


@dataclass(frozen=True)
class TopK(Target):
    """The (S, K) ids and log-probs of the tokens that a teacher finds most likely.

    A place without a token has -inf.
    """

    ids: Int[Tensor, "S K"]
    logps: Float[Tensor, "S K"]

    def rows(self, part: slice, vocabulary: int) -> tuple[Tensor, Tensor]:  # noqa: ARG002
        """The ids and log-probs of these tokens."""
        return self.ids[part], self.logps[part]


class Divergences(NamedTuple):
    """The result for S tokens.

    losses: divergence less coefficient times log-prob, in nats, with gradient. values: the
    divergence alone. logps: the student's log-probs of the batch's targets.
    """

    losses: Float[Tensor, "S"]
    values: Float[Tensor, "S"]
    logps: Float[Tensor, "S"]


@torch.no_grad()
def packed_states(
    model: nn.Module,
    batch: PackedBatch,
    *,
    temperature: float = 1.0,
    multipliers: dict[tuple, Callable] | None = None,
) -> States:
    """Run a teacher's forward, and keep its states of the S scored tokens instead of logits.

    multipliers: for a teacher whose weights never change, one dict for all batches, so that its
    head is laid out once.
    """
    kept = _Keep(temperature, {} if multipliers is None else multipliers)
    with requesting(kept):
        model(**packed_inputs(batch), logits_to_keep=batch.predictors)
    return kept.states


def packed_divergence(
    model: nn.Module,
    batch: PackedBatch,
    target: Target,
    *,
    divergence: Divergence,
    coefficients: Float[Tensor, "S"] | None = None,
    temperature: float = 1.0,
) -> Divergences:
    """Run one forward of a packed batch, and compare the student's distributions with the target.

    Args:
        model: a causal LM as packed_logps takes it.
        coefficients: of a policy-gradient term beside the divergence: each token's loss is
            divergence - coefficient * log q(token). None: no such term.
        temperature: the student's logits are divided by it.

    Raises:
        RuntimeError: in the backward pass, where the losses have different gradients: they are
            summed or averaged, since all slopes are formed in the forward pass.
    """
    request = _Compare(batch.targets, target, divergence, coefficients, temperature)
    with requesting(request):
        output = model(**packed_inputs(batch), logits_to_keep=batch.predictors)
    return Divergences(*output.logits[0].unbind(-1))


def chunked_divergence(
    hidden: Float[Tensor, "S D"],
    weight: Float[Tensor, "V D"],
    targets: Int[Tensor, "S"],
    target: Target,
    *,
    divergence: Divergence,
    bias: Float[Tensor, "V"] | None = None,
    coefficients: Float[Tensor, "S"] | None = None,
    temperature: float = 1.0,
    change: Change = NO_CHANGE,
) -> Divergences:
    """Compare softmax((hidden @ weight.T + bias) / temperature) with the target at each token.

    See packed_divergence. Products take hidden's dtype; all else is float32 at least. Vocabularies
    of two sizes, as of padded embeddings, are compared on the tokens that both have.
    """
    common = min(len(weight), target.vocabulary or len(weight))
    if common < len(weight):
        weight, bias = weight[:common], None if bias is None else bias[:common]
    forms = torch.is_grad_enabled()
    request = _Compare(targets, target, divergence, coefficients, temperature, change, forms)
    return Divergences(*_ChunkedDivergence.apply(hidden, weight, bias, request))


class _Keep(Request):
    """A request that keeps the states which an LM head is asked about."""

    def __init__(self, temperature: float, multipliers: dict[tuple, Callable]) -> None:
        self.temperature, self.multipliers = temperature, multipliers

    def answer(self, head: ScoringHead, hidden: Tensor) -> Tensor:
        weight, bias = head.weight.detach(), None if head.bias is None else head.bias.detach()
        settings = head.change, self.temperature, self.multipliers
        self.states = States(hidden.detach(), weight, bias, *settings)
        return hidden[:, :1]


@dataclass(frozen=True)
class _Compare(Request):
    """A request for divergences; see packed_divergence. forms: gradients are wanted."""

    targets: Tensor
    target: Target
    divergence: Divergence
    coefficients: Tensor | None = None
    temperature: float = 1.0
    change: Change = NO_CHANGE
    forms: bool = True

    def answer(self, head: ScoringHead, hidden: Tensor) -> Tensor:
        found = chunked_divergence(
            hidden,
            head.weight,
            self.targets,
            self.target,
            divergence=self.divergence,
            bias=head.bias,
            coefficients=self.coefficients,
            temperature=self.temperature,
            change=head.change,
        )
        return torch.stack(found, -1)


class _ChunkedDivergence(torch.autograd.Function):
    """Divergences, with gradients that are formed in the forward pass."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, request):
        formed = None
        # In float16 slopes that nothing scales would underflow: the backward pass forms them there.
        if request.forms and any(ctx.needs_input_grad) and hidden.dtype != torch.float16:
            formed = Gradients(hidden, weight, bias, ctx.needs_input_grad)
        found = _compare(hidden, weight, bias, request, formed)
        ctx.request, ctx.formed = request, formed
        ctx.save_for_backward(hidden, weight, bias)
        ctx.mark_non_differentiable(*found[1:])
        return found

    @staticmethod
    def backward(ctx, grad_losses, *_):
        factor, (formed, ctx.formed) = only_slope(grad_losses, None), (ctx.formed, None)
        if formed:
            formed.scale(factor)
            return *formed.finished(), None
        hidden, weight, bias = ctx.saved_tensors
        gradients = Gradients(hidden, weight, bias, ctx.needs_input_grad)
        _compare(hidden, weight, bias, ctx.request, gradients, factor)
        return *gradients.finished(), None


def _compare(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    request: _Compare,
    gradients: Gradients | None,
    factor: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Losses, divergences and log-probs of all tokens; adds their gradients, times factor."""
    found = hidden.new_empty(3, len(hidden), dtype=wide(hidden.dtype))
    of_head = ScoreRequest(
        request.targets, request.temperature, scale=request.change.scale, cap=request.change.cap
    )
    narrow, size = weight.to(hidden.dtype), _chunk_size(hidden, len(weight))
    times = multiplier(narrow)
    for start in range(0, len(hidden), size):
        part = slice(start, start + size)
        logits = _logits(times(hidden[part]), bias, of_head)
        of_cap = None
        if request.change.cap is not None and gradients is not None:
            of_cap = 1 - (logits * (request.temperature / request.change.cap)).square_()
        _compare_chunk(logits, request.target.rows(part, len(weight)), part, request, found)
        if gradients is None:
            continue
        logits *= request.change.scale / request.temperature * (1.0 if factor is None else factor)
        if of_cap is not None:
            logits *= of_cap
        gradients.add(logits, hidden, narrow, part)
    return tuple(x.clone() for x in found)


def _compare_chunk(
    logits: Tensor, rows: tuple[Tensor, ...], part: slice, request: _Compare, found: Tensor
) -> None:
    """Fill in `found`, and replace (s, V) logits by the losses' slopes, one block after another."""
    most = logits.numel() if logits.is_cuda else BLOCK_ENTRIES
    size = max(1, most // logits.shape[1])
    for start in range(0, len(logits), size):
        block = slice(start, start + size)
        place = slice(part.start + start, min(part.start + start + size, part.stop))
        targets = request.targets[place, None]
        logps = logits[block] - logits[block].logsumexp(-1, keepdim=True)
        of_target = logps.gather(-1, targets).squeeze(-1)
        values, slope = request.divergence(logps, *(row[block] for row in rows))
        losses = values
        if request.coefficients is not None:
            coefficients = request.coefficients[place].to(values.dtype)
            losses = values - coefficients * of_target
            slope.addcmul_(logps.exp_(), coefficients[:, None])
            slope.scatter_add_(-1, targets, -coefficients[:, None])
        found[:, place] = torch.stack((losses, values, of_target))
        logits[block] = slope


def _chunk_size(hidden: Tensor, vocabulary: int) -> int:
    """Tokens at a time, of which there is at least one."""
    entries = CHUNK_ENTRIES_CUDA if hidden.is_cuda else CHUNK_ENTRIES
    return max(1, entries // vocabulary)
