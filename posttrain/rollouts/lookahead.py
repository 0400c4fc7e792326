"""Guess tokens and verify several in one forward: the same completions, in less time.

    lookahead = Lookahead("ngram", [NGramDrafter()])          # kept for a whole run
    HFGenerator(model, lookahead=lookahead).generate(…)
    lookahead.note(metrics)

A token is chosen by inverting the model's distribution at a number that is known before, so the
right token of every place is fixed once the logits are there. Guesses are fed together with the
next token; up to the first that is wrong they are the tokens that plain decoding would choose, and
its place gives the right token too. Temperature, top-k, top-p, min_tokens and stops act as ever:
the choice is the same function of logits and number. Speculative decoding by rejection (arXiv
2211.17192) keeps the distribution; here the completions themselves stay.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from posttrain.errors import ConfigError
from posttrain.packed.forward import attempted, in_evaluation
from posttrain.packed.prepare import probe_ids
from posttrain.rollouts.ahead_decoding import AheadDecoding
from posttrain.rollouts.draft_length import Controller, Step, Unlimited
from posttrain.rollouts.drafts import MOST_AHEAD, Draft, Drafter, HeadDrafter, Heads, Kind, Row
from posttrain.rollouts.generator import (
    PROBE_TOKENS,
    PROBE_TOLERANCE,
    PROBE_TOLERANCE_HALF,
    Decoding,
)
from posttrain.rollouts.sampling import Completion, Sampling
from posttrain.rollouts.trees import PUBLISHED, cut
from posttrain.run.options import say

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from posttrain.rollouts.policies import MetricSink
    from posttrain.rollouts.routing import RoutingRecorder
    from posttrain.run.settings import Acceptance


class Lookahead:
    """The drafters of a run, what they remember, and the account of what they cost.

    Args:
        name: As `--lookahead` has it; `auto` decodes plainly where a model cannot be looked ahead
            with, the others raise a ConfigError.
        drafters: For each row the one whose guesses are most likely right is used.
        heads: Loads heads for the model that generates, which then draft too.
        acceptance: `typical` accepts what is likely (posttrain.rollouts.typical): other completions
            than plain decoding's. It verifies every guess, so that they do not depend on time.
    """

    def __init__(
        self,
        name: Literal["ngram", "heads", "auto"],
        drafters: Sequence[Drafter],
        *,
        heads: Callable[[nn.Module], Heads] | None = None,
        acceptance: Acceptance = "exact",
        controller: Controller | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.name, self.drafters, self._heads = name, list(drafters), heads
        self.acceptance, self.clock = acceptance, clock
        self.controller = controller or (Controller() if acceptance == "exact" else Unlimited())
        self.counts: Counter[str] = Counter()
        self.spare_slots = 1 + max((d.most_guesses for d in drafters), default=0)
        self._refused: set[str] = set()
        self.tree = PUBLISHED  # of heads' guesses

    def refuse(self, model: nn.Module, why: str) -> None:
        """Raise ConfigError, or for `auto` say once that decoding is plain."""
        name = type(model).__name__
        if self.name != "auto":
            raise ConfigError(
                f"--lookahead {self.name}: expected a model that the decode loop serves, found "
                f"{name}: {why}. Take --lookahead none."
            )
        if name not in self._refused:
            self._refused.add(name)
            say(f"lookahead none: {name}: {why}")

    def complete(
        self,
        model: nn.Module,
        prompts: Sequence[Sequence[int]],
        owners: Sequence[int],
        sampling: Sampling,
        tokenizer: PreTrainedTokenizerBase | None,
        record: RoutingRecorder | None,
        noise: Tensor,
    ) -> list[Completion]:
        """Complete a batch of rows; see posttrain.rollouts.generator.Decoding."""
        problem = _problem(model)
        if record:
            problem = "the experts of guessed tokens are not recorded (replay_routing)"
        if problem:
            self.refuse(model, problem)
        elif self._heads:
            self._add_heads(self._heads(model))
        parts = (prompts, owners, sampling, tokenizer)
        if problem:
            return Decoding(model, *parts, record).run(noise)
        if self.acceptance == "typical" and sampling.temperature:  # greedy decoding is exact
            from posttrain.rollouts.typical import TypicalDecoding

            return TypicalDecoding(self, model, *parts).run(noise)
        if self.controller.ready(len(owners)):
            return AheadDecoding(self, model, *parts).run(noise)
        plain, begun = Decoding(model, *parts), self.clock()
        completions = plain.run(noise)
        sizes = [len(completion.token_ids) for completion in completions]
        self.controller.batches = 0
        self.controller.earn(sum(sizes), max(sizes), self.clock() - begun)
        self._remember(prompts, owners, sampling, completions)
        return completions

    def _add_heads(self, heads: Heads) -> None:
        """Draft by heads from now on: Medusa's in the published tree, modules step by step."""
        self._heads, kind = None, getattr(heads, "kind", "medusa")
        if kind == "medusa":
            tree = cut(self.tree, heads.depth)
            self.drafters.append(HeadDrafter(heads, tree))
            self.spare_slots = max(self.spare_slots, 1 + len(tree))
        elif kind == "mtp":
            from posttrain.rollouts.step_drafter import StepDrafter

            self.drafters.append(StepDrafter(heads))
            self.spare_slots = max(self.spare_slots, 1 + heads.depth)
        elif self.name == "heads":
            raise ConfigError(
                "--lookahead heads: expected Medusa heads or prediction modules beside the model, "
                f"found {kind}, by which the decode loop cannot draft: each would need a cache of "
                "its own. Take --lookahead ngram."
            )

    def _remember(
        self,
        prompts: Sequence[Sequence[int]],
        owners: Sequence[int],
        sampling: Sampling,
        completions: Sequence[Completion],
    ) -> None:
        rows = [
            Row(number, tuple(prompts[owner]), [], number, completion.token_ids)
            for number, (owner, completion) in enumerate(zip(owners, completions, strict=True))
        ]
        for drafter in self.drafters:
            drafter.begin(prompts, sampling)
            drafter.end(rows)

    def count(self, step: Step) -> None:
        """Take a forward into the metrics."""
        counts = self.counts
        counts["steps"] += 1
        counts["rows"] += step.rows
        counts["emitted"] += step.emitted
        counts["guesses"] += step.guesses
        for _, depth, is_right in step.verified:
            counts[f"verified_{depth}"] += 1
            counts[f"right_{depth}"] += is_right

    def note(self, metrics: MetricSink) -> None:
        """Add what has been counted since the last call to metrics."""
        counts, cost = self.counts, self.controller.cost
        self.counts = Counter()
        if not counts["rows"]:
            return
        metrics.add("lookahead_tokens_per_step", counts["emitted"], counts["rows"])
        wrong = counts["guesses"] - (counts["emitted"] - counts["rows"])
        metrics.add("lookahead_wrong", wrong, counts["rows"] + counts["guesses"])
        for depth in range(1, MOST_AHEAD + 1):
            if verified := counts[f"verified_{depth}"]:
                metrics.add(f"lookahead_accepted_{depth}", counts[f"right_{depth}"], verified)
        metrics.add(
            "lookahead_token_cost", cost.per_token, cost.of(counts["rows"] / counts["steps"])
        )


class _Told:
    """A drafter that is told what comes, and has a wrong guess beside each right one."""

    needs_hidden, most_guesses = False, 4

    def __init__(self, completions: Sequence[Completion]) -> None:
        self.completions = completions

    def begin(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> None:
        pass

    def propose(self, rows: Sequence[Row], most: int, hidden: Tensor | None) -> list[Draft]:  # noqa: ARG002
        """Two branches at each token, the first of which is wrong."""
        drafts = []
        for row in rows:
            ids = self.completions[row.number].token_ids[len(row.ids) :][: min(2, row.room - 1)]
            wrong = [(token + 1) % 2 for token in ids]
            tokens = [token for pair in zip(wrong, ids, strict=True) for token in pair]
            drafts.append(
                Draft(tokens, [Kind("told", 0)] * len(tokens), [0, 0, 2, 2][: len(tokens)])
            )
        return drafts

    def end(self, rows: Sequence[Row]) -> None:
        pass


def _problem(model: nn.Module) -> str | None:
    """Why a model cannot be looked ahead with, tried once, by a tree of right and wrong guesses."""
    if getattr(model, "looks_ahead", None) is None:
        weight = model.get_input_embeddings().weight
        # Without autocast: rounding to half precision would change tokens by itself.
        with in_evaluation(model), torch.autocast(weight.device.type, enabled=False):
            found, raised = attempted(lambda: _gap(model))
        is_half = weight.element_size() < 4
        most = PROBE_TOLERANCE_HALF if is_half else PROBE_TOLERANCE
        model.looks_ahead = raised or (
            "" if found <= most else f"log-probs with guesses differ by {found:.2g} nats"
        )
    return model.looks_ahead or None


def _gap(model: nn.Module) -> float:
    """Largest difference that guesses make to log-probs, up to the first token that differs.

    Where that is the first that a forward with guesses gives, nothing was compared: infinite.
    """
    is_half = model.get_input_embeddings().weight.element_size() < 4
    prompt, sampling = probe_ids(model)[0], Sampling(PROBE_TOKENS, (), 0.0 if is_half else 1.0)
    noise = torch.tensor([[0.2], [0.7]]).expand(2, PROBE_TOKENS)
    plain = Decoding(model, [prompt], [0, 0], sampling, None).run(noise)
    told = Lookahead("ngram", [_Told(plain)], controller=Unlimited())
    ahead = AheadDecoding(told, model, [prompt], [0, 0], sampling, None).run(noise)
    gaps = [0.0]
    for one, other in zip(plain, ahead, strict=True):
        same = [a == b for a, b in zip(one.token_ids, other.token_ids, strict=True)]
        until = same.index(False) if False in same else len(same)
        gaps += [abs(p - q) for p, q in zip(one.logps[:until], other.logps, strict=False)]
        gaps += [float("inf")] * (until < 2)  # the first token is the prompt's
    return max(gaps)
