"""Judges as rewards (posttrain.rewards): one number in [0, 1] for each completion.

    judge = ScalarJudge(verdicts, rubric="…")                  # a score for each completion
    judge = PairwiseJudge(verdicts, rubric="…", rivals=2)      # a share of comparisons that it wins
    judge.probe("--judge_url http://…")                     # before anything is trained

The judge reads the question as it was asked (the column `source_prompt`, see
posttrain.data.load_prompts), else as the template rendered it, and the column `answer`, if the data
has one, as a reference. A completion without a verdict gets None.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import groupby
from typing import Any

from posttrain.judges.prompts import (
    HIGHEST,
    LOWEST,
    PAIR_SCHEMA,
    RUBRIC,
    SCORE_SCHEMA,
    pair_prompt,
    read_better,
    read_score,
    scalar_prompt,
)
from posttrain.judges.verdicts import Read, Verdicts
from posttrain.rewards.text import Completion, completion_text

DEADLINE_SECONDS = 6 * 3600.0  # of a call: a server may ask to wait, and says how long
QUESTION, ANSWER = "What is the capital of France?", "It is Paris."  # of the probe

Columns = Sequence[object] | None


class Judge:
    """A teacher with a rubric; the base of both kinds.

    Args:
        rubric: What makes an answer good.
    """

    timeout_seconds = DEADLINE_SECONDS
    read: Read
    schema: dict[str, Any]  # of a verdict

    def __init__(self, verdicts: Verdicts, *, rubric: str = RUBRIC) -> None:
        self.verdicts, self.rubric = verdicts, rubric

    def describe(self) -> dict[str, object]:
        """Return facts for a run's metadata."""
        return {"judge": type(self).__name__, "rubric": self.rubric}

    def probe(self, setting: str) -> None:
        """Ask about a known answer; TeacherError where the judge gives no verdict."""
        self.verdicts.probe(self._example(), self.read, setting, schema=self.schema)

    def _example(self) -> str:
        raise NotImplementedError


class ScalarJudge(Judge):
    """A reward: the judge's score of each completion, LOWEST to HIGHEST mapped to 0 to 1."""

    read = staticmethod(read_score)
    schema = SCORE_SCHEMA

    def __call__(
        self,
        completions: Sequence[Completion],
        prompts: Sequence[object],
        source_prompt: Columns = None,
        answer: Columns = None,
        **_: object,
    ) -> list[float | None]:
        """Score each completion by itself."""
        questions, references = _questions(prompts, source_prompt), _references(answer, prompts)
        asked = [
            scalar_prompt(self.rubric, question, completion_text(completion), reference=reference)
            for question, completion, reference in zip(
                questions, completions, references, strict=True
            )
        ]
        scores = self.verdicts.ask(asked, self.read, schema=self.schema)
        span = HIGHEST - LOWEST
        return [None if score is None else (score - LOWEST) / span for score in scores]

    def _example(self) -> str:
        return scalar_prompt(self.rubric, QUESTION, ANSWER)


class PairwiseJudge(Judge):
    """A reward: the mean points of a completion in comparisons with the others of its prompt.

    Each two are shown in both orders, and the points of both are averaged: a judge that always
    prefers the first gives a tie. Equal texts are a tie, and are not asked about.

    Args:
        rivals: Completions that each is compared with, its next ones in a ring; None takes all.
    """

    read = staticmethod(read_better)
    schema = PAIR_SCHEMA

    def __init__(
        self, verdicts: Verdicts, *, rubric: str = RUBRIC, rivals: int | None = None
    ) -> None:
        super().__init__(verdicts, rubric=rubric)
        self.rivals = rivals

    def __call__(
        self,
        completions: Sequence[Completion],
        prompts: Sequence[object],
        source_prompt: Columns = None,
        answer: Columns = None,
        **_: object,
    ) -> list[float | None]:
        """Compare the completions of each prompt; those of one prompt are neighbours."""
        questions, references = _questions(prompts, source_prompt), _references(answer, prompts)
        texts = list(map(completion_text, completions))
        rows = range(len(texts))
        groups = [list(group) for _, group in groupby(rows, key=lambda row: prompts[row])]
        pairs = [pair for group in groups for pair in pairs_of(group, self.rivals)]
        asked = [
            pair_prompt(self.rubric, questions[a], texts[a], texts[b], reference=references[a])
            for pair in pairs
            if texts[pair[0]] != texts[pair[1]]
            for a, b in (pair, pair[::-1])
        ]
        points_of_first = iter(self.verdicts.ask(asked, self.read, schema=self.schema))
        points: list[list[float]] = [[] for _ in texts]
        for a, b in pairs:
            shown = 0.5, 0.5
            if texts[a] != texts[b]:
                shown = next(points_of_first), next(points_of_first)
            if None not in shown:
                share = (shown[0] + 1 - shown[1]) / 2
                points[a].append(share)
                points[b].append(1 - share)
        return [sum(some) / len(some) if some else None for some in points]

    def _example(self) -> str:
        return pair_prompt(self.rubric, QUESTION, ANSWER, "It is Rome.")


def pairs_of(rows: Sequence[int], rivals: int | None = None) -> list[tuple[int, int]]:
    """List the pairs to compare: each row with the next `rivals` in a ring, no pair twice.

    By hand: rows 0, 1, 2, 3 with one rival give 01, 12, 23, 30; with all rivals the six pairs.
    """
    size = len(rows)
    reach = size - 1 if rivals is None else min(rivals, size - 1)
    found: dict[frozenset[int], tuple[int, int]] = {}
    for step in range(1, reach + 1):
        for place in range(size):
            pair = rows[place], rows[(place + step) % size]
            found.setdefault(frozenset(pair), pair)
    return list(found.values())


def _questions(prompts: Sequence[object], source: Columns) -> list[str]:
    if source is None:
        return [str(prompt) for prompt in prompts]
    return [_in_words(json.loads(str(prompt))) for prompt in source]


def _in_words(prompt: str | list[dict[str, str]]) -> str:
    """A prompt as text; of a conversation each turn after the name of its role."""
    if isinstance(prompt, str):
        return prompt
    if len(prompt) == 1:
        return completion_text(prompt)
    return "\n\n".join(f"{turn['role'].upper()}: {completion_text([turn])}" for turn in prompt)


def _references(answer: Columns, prompts: Sequence[object]) -> list[str | None]:
    if answer is None:
        return [None] * len(prompts)
    return [None if text is None else str(text) for text in answer]
