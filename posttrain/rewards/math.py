r"""The maths reward: exact verification of final answers, which evaluates nothing that they say.

    verify_math("18", "<think>3 * 6</think><answer>18.0</answer>")   # Verdict(1.0, "equal numbers")
    verify_math("2x + 1", r"\boxed{1 + 2x}")                         # (1.0, "equal by algebra")
    rewards = {"correct": (math_reward, 1.0)}                        # the data's column is `answer`

The steps, in `posttrain.maths`: `extraction` finds the final answer, `normalise` gives it one
spelling, `shapes` reads its kind, `comparison` decides what can be decided exactly, and the rest
goes to `algebra`, in a process that is killed after three seconds, unless `caps` refuses it.

A number is matched by one number only: never by a list, a range, an inequality, or boxes that
differ. A unit on one side only makes no difference, so that "50%" is 50, and also 0.5.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from posttrain.maths.algebra import (
    LIMIT_SECONDS,
    NUM_WORKERS,
    AlgebraRefused,
    AlgebraTimeout,
    AlgebraUnavailable,
    Pair,
    ask_algebra,
)
from posttrain.maths.comparison import Comparison, Refused
from posttrain.maths.normalise import after_hashes, last_boxes, normalise
from posttrain.maths.numerals import read_number
from posttrain.maths.shapes import Shape, Unreadable, read_shape
from posttrain.rewards.pieces import count_verdict, note_rules, per_completion
from posttrain.rewards.text import Completion, final_answers, whole_texts

Gold = str | int | float | None
MAX_ANSWER_CHARS = 2_000  # longer texts are not final answers; this bounds the work on one


class Verdict(NamedTuple):
    """The judgement of one completion.

    Attributes:
        score: 1.0 if it is right, 0.0 if it is not shown to be right, None if it cannot be judged,
            because the gold cannot be read or there is no worker for the algebra.
        reason: The rule that decided. Its kind comes first ("equal numbers", "refused", "timeout",
            "gold cannot be read" …), up to the colon if there is one.
    """

    score: float | None
    reason: str


class _Options(NamedTuple):
    """The options of `verify_math`."""

    prefilled_think: bool
    allow_hashes: bool
    allow_last_number: bool
    relative_tolerance: float


class _Question(NamedTuple):
    """A gold and an answer as shapes, which only algebra can compare."""

    gold: Shape
    answer: Shape
    relative_tolerance: float


def read_gold(gold: str) -> str:
    """Return a gold's final answer, normalised: what follows `####`, else the box, else all."""
    if "####" in gold:
        gold = after_hashes(gold)
    gold = last_boxes(gold) or gold
    return normalise(gold) if len(gold) <= MAX_ANSWER_CHARS else ""


def verify_math(
    gold: Gold,
    completion: str,
    *,
    prefilled_think: bool = False,
    allow_hashes: bool = False,
    allow_last_number: bool = False,
    relative_tolerance: float = 0.0,
) -> Verdict:
    """Judge one completion against the gold answer. Never raises on text; blocks for algebra.

    Args:
        gold: The final answer, or a worked solution that ends in `#### 18` or in a `\\boxed{18}`.
        completion: The model's text.
        prefilled_think: The template ended in `<think>`, so the text starts inside a thought.
        allow_hashes: Lenient: see `extraction.extract_answers`.
        allow_last_number: Lenient: see `extraction.extract_answers`.
        relative_tolerance: Largest distance of a number from a gold number, as a share of the gold;
            0 is exact. For numerals only, not for what needs algebra.

    Returns:
        The score and the rule that decided. The score is None for a gold that is empty or longer
        than `MAX_ANSWER_CHARS`, and 0 for an answer that is refused or takes too long.
    """
    options = _Options(prefilled_think, allow_hashes, allow_last_number, relative_tolerance)
    verdict = _judge_text(gold, completion, options)
    if isinstance(verdict, _Question):
        verdict = _judge_with_algebra(verdict)
    return _counted(verdict)


@per_completion
def math_reward(
    completions: Sequence[Completion],
    *,
    answer: Sequence[Gold],
    prompts: Sequence[object] | None = None,
    prefilled_think: bool | None = None,
    allow_hashes: bool = False,
    allow_last_number: bool = False,
    relative_tolerance: float = 0.0,
    **_columns: object,
) -> list[float | None]:
    """Apply `verify_math` to each completion with the data's column `answer`.

    The questions to algebra are asked for all completions at once. Bind the options with
    `functools.partial`. For a column of another name, wrap it:
    `lambda completions, solution, **_: math_reward(completions, answer=solution)`.
    """
    options = _Options(False, allow_hashes, allow_last_number, relative_tolerance)
    texts = whole_texts(completions, prompts, prefilled_think=prefilled_think)
    verdicts = [_judge_text(gold, text, options) for gold, text in zip(answer, texts, strict=True)]
    open_rows = [row for row, verdict in enumerate(verdicts) if isinstance(verdict, _Question)]
    if open_rows:
        with ThreadPoolExecutor(NUM_WORKERS) as threads:
            questions = [verdicts[row] for row in open_rows]
            decided = threads.map(_judge_with_algebra, questions)
            for row, verdict in zip(open_rows, decided, strict=True):
                verdicts[row] = verdict
    note_rules([verdict.reason for verdict in verdicts])
    return [_counted(verdict).score for verdict in verdicts]


def equal_answers(one: str, other: str) -> bool:
    """Tell whether two final answers, normalised, are equal: `verify_math` with `one` as the gold.

    False too where it cannot be told: refused, too late, unreadable.
    """
    try:
        verdict = _judge(_Question(read_shape(one), read_shape(other), 0.0))
    except (Refused, Unreadable):
        return False
    if isinstance(verdict, _Question):
        verdict = _judge_with_algebra(verdict)
    return verdict.score == 1.0


def check_golds(golds: Iterable[Gold]) -> list[tuple[int, str]]:
    """List the golds that do not verify against themselves: (position, reason).

    For checks when data is loaded: such a gold would give every completion None, or every right
    one 0.
    """
    found: dict[Gold, str] = {}
    problems = []
    for position, gold in enumerate(golds):
        if not isinstance(gold, (str, int, float)):
            problems.append((position, f"gold cannot be read: {type(gold).__name__}, not text"))
            continue
        if gold not in found:
            found[gold] = _gold_problem(str(gold))
        if found[gold]:
            problems.append((position, found[gold]))
    return problems


def _golds_that_fail(answer: Iterable[Gold]) -> list[tuple[int, str]]:
    return check_golds(answer)


math_reward.find_unscorable = _golds_that_fail


def _gold_problem(gold: str) -> str:
    final = read_gold(gold)
    if read_number(final) is not None:
        return ""
    score, reason = verify_math(gold, rf"\boxed{{{final}}}")
    return "" if score == 1.0 else reason


def _counted(verdict: Verdict) -> Verdict:
    count_verdict(verdict.reason.partition(":")[0])
    return verdict


def _judge_text(gold: Gold, completion: str, options: _Options) -> Verdict | _Question:
    """Judge as far as that needs no algebra: return a verdict, or the question that is left."""
    wanted = read_gold(str(gold)) if isinstance(gold, (str, int, float)) else ""
    if not wanted:
        return Verdict(None, "gold cannot be read: empty, too long, or not text")
    found, problem = final_answers(
        completion,
        prefilled_think=options.prefilled_think,
        allow_hashes=options.allow_hashes,
        allow_last_number=options.allow_last_number,
    )
    if problem:
        return Verdict(0.0, f"no answer: {problem}")
    if max(map(len, found)) > MAX_ANSWER_CHARS:
        return Verdict(0.0, f"refused: over {MAX_ANSWER_CHARS} characters")
    try:
        gold_shape = read_shape(wanted)
    except Unreadable as error:
        return Verdict(None, f"gold cannot be read: {error}")
    try:
        answer = _one_answer([normalise(text) for text in dict.fromkeys(found)], gold_shape)
        if isinstance(answer, Verdict):
            return answer
        return _judge(_Question(gold_shape, answer, options.relative_tolerance))
    except (Refused, Unreadable) as error:
        return Verdict(0.0, f"refused: {error}")


def _one_answer(texts: list[str], gold: Shape) -> Shape | Verdict:
    """Read several boxes as one answer: a list if the gold is one; otherwise they must agree."""
    *others, last = texts
    if not last:
        return Verdict(0.0, "no answer: empty")
    if others and gold.kind in ("list", "set"):
        return read_shape(", ".join(texts))
    answer = read_shape(last)
    for text in others:
        if Comparison().shapes(answer, read_shape(text)) is not True:
            return Verdict(0.0, "several boxes that differ")
    return answer


def _judge(question: _Question, known: Mapping[Pair, bool] | None = None) -> Verdict | _Question:
    comparison = Comparison(known, relative_tolerance=question.relative_tolerance)
    is_equal = comparison.shapes(question.gold, question.answer)
    if is_equal is None:
        return question
    return Verdict(float(is_equal), comparison.reason)


def _judge_with_algebra(question: _Question) -> Verdict:
    comparison = Comparison(relative_tolerance=question.relative_tolerance)
    comparison.shapes(question.gold, question.answer)
    pairs = tuple(comparison.pending)
    try:
        answers = ask_algebra(pairs)
    except AlgebraTimeout:
        return Verdict(0.0, f"timeout: no decision in {LIMIT_SECONDS:g} seconds")
    except AlgebraRefused as error:
        return Verdict(0.0, f"refused: {error}")
    except AlgebraUnavailable as error:
        return Verdict(None, f"our failure: no worker for algebra ({error})")
    known = {pair: status == "equal" for pair, status in zip(pairs, answers, strict=True)}
    verdict = _judge(question, known)
    if isinstance(verdict, _Question):
        raise AssertionError("a second comparison asked for more than the first")
    if verdict.score == 0.0 and "gold unreadable" in answers:
        return Verdict(None, "gold cannot be read: neither equal as text nor understood")
    return verdict
