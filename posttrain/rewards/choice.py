r"""Rewards for answers compared as text: exact match, and multiple choice by letter.

    exact_match("Paris", r"<think>…</think>\boxed{\text{Paris}}")              # 1.0
    choice_match("B", "<answer>(B)</answer>")                                  # 1.0
    choice_match("B", "<answer>B) 42</answer>", choices=["41", "42", "43"])    # 1.0
    rewards = {"correct": (choice_reward, 1.0)}    # the data's columns: `answer`, perhaps `choices`

`text.final_answers` finds the answer; several boxes must all say the same. For numbers and formulas
there is `math`.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from string import ascii_uppercase

from posttrain.rewards.pieces import per_completion
from posttrain.rewards.text import Completion, final_answers, whole_texts

MAX_ANSWER_CHARS = 2_000  # longer texts are not final answers; this bounds the work on one
DEFAULT_NUM_CHOICES = 4

Choices = int | Sequence[str]  # the number of choices, or the texts of A, B, C …

_TEXT_COMMAND = re.compile(
    r"\\(?:text|textbf|textit|textrm|textnormal|mathrm|mathbf|mbox)\s*\{([^{}]*)\}"
)
# Signs that may stand around a letter: "(B)", "B.", "**B**", "$B$", "\(B\)".
_AROUND_LETTER = " \t\n()[]{}.:*_`$\\"
_LEAD_IN = re.compile(
    r"(?:(?:the|my|final|correct|best)\s+){0,3}(?:answer|option|choice)(?:\s+is)?\b", re.IGNORECASE
)
_LETTER_AND_TEXT = re.compile(r"[(\[*\s]*([A-Za-z])[)\].:*]+\s*(\S.*)", re.DOTALL)


def exact_match(gold: object, completion: str, *, prefilled_think: bool = False) -> float | None:
    r"""Score 1.0 if the answer is the gold, character by character, else 0.0.

    White space, `\text{}` around words and the encoding of a Unicode character make no difference;
    capitals and punctuation do. None for a gold that is empty, longer than `MAX_ANSWER_CHARS`, or
    neither text nor number.
    """
    wanted = _gold_text(gold)
    if not wanted:
        return None
    answers = _answers(completion, prefilled_think)
    return float(bool(answers) and all(answer == wanted for answer in answers))


def choice_match(
    gold: object,
    completion: str,
    *,
    choices: Choices = DEFAULT_NUM_CHOICES,
    prefilled_think: bool = False,
) -> float | None:
    """Score 1.0 if the answer is the gold's letter and no other, else 0.0: see `read_choice`.

    None for a gold that is not a letter of the choices, or choices that are not a list of texts.
    """
    if not _are_choices(choices):
        return None
    wanted = read_choice(_gold_text(gold), choices=_number(choices))
    if wanted is None:
        return None
    answers = _answers(completion, prefilled_think)
    return float({read_choice(text, choices=choices) for text in answers} == {wanted})


def read_choice(text: str, *, choices: Choices = DEFAULT_NUM_CHOICES) -> str | None:
    """Return the letter of the one choice that the text names, or None.

    "B", "b", "(B)", "B.", "**B**", "Answer: B" and "The answer is (B)." are B. If the texts of the
    choices are known, so are "B) 42", if 42 is the text of B, and "42", if only B has that text.
    Two letters are not a choice, nor is a letter with anything else after it.
    """
    text = _plain(text)
    if lead_in := _LEAD_IN.match(text):
        text = text[lead_in.end() :].lstrip(": ")
    letters = ascii_uppercase[: _number(choices)]
    letter = text.strip(_AROUND_LETTER).upper()
    if len(letter) == 1:
        return letter if letter in letters else None
    if isinstance(choices, int):
        return None
    said = dict(zip(letters, map(_plain, choices), strict=False))
    if match := _LETTER_AND_TEXT.fullmatch(text):
        letter, rest = match[1].upper(), match[2]
        if letter in said and _is_same(rest, said[letter]):
            return letter
    same = [letter for letter, words in said.items() if _is_same(text, words)]
    return same[0] if len(same) == 1 else None


@per_completion
def exact_match_reward(
    completions: Sequence[Completion],
    *,
    answer: Sequence[object],
    prompts: Sequence[object] | None = None,
    prefilled_think: bool | None = None,
    **_columns: object,
) -> list[float | None]:
    """Apply `exact_match` to each completion with the column `answer`."""
    return [
        exact_match(gold, text)
        for gold, text in zip(
            answer,
            whole_texts(completions, prompts, prefilled_think=prefilled_think),
            strict=True,
        )
    ]


@per_completion
def choice_reward(
    completions: Sequence[Completion],
    *,
    answer: Sequence[object],
    choices: Sequence[Sequence[str] | None] | None = None,
    num_choices: int = DEFAULT_NUM_CHOICES,
    prompts: Sequence[object] | None = None,
    prefilled_think: bool | None = None,
    **_columns: object,
) -> list[float | None]:
    """Apply `choice_match` to each completion with the columns `answer`, a letter, and `choices`.

    If the data has no `choices`, bind `num_choices`, which is the same for all rows.
    """
    known = choices if choices is not None else [None] * len(completions)
    texts = whole_texts(completions, prompts, prefilled_think=prefilled_think)
    return [
        choice_match(gold, text, choices=num_choices if its_choices is None else its_choices)
        for gold, text, its_choices in zip(answer, texts, known, strict=True)
    ]


def _golds_without_text(answer: Iterable[object] = ()) -> Iterator[tuple[int, str]]:
    for row, gold in enumerate(answer):
        if not _gold_text(gold):
            yield row, f"gold cannot be read: {gold!r:.60}"


def _golds_without_letter(
    answer: Sequence[object] = (), choices: Sequence[object] | None = None
) -> Iterator[tuple[int, str]]:
    unknown = [None] * len(answer)
    for row, (gold, texts) in enumerate(zip(answer, choices or unknown, strict=True)):
        its_choices = len(ascii_uppercase) if texts is None else texts
        if not _are_choices(its_choices):
            yield row, f"choices: expected a list of texts, found {its_choices!r:.60}"
        elif read_choice(_gold_text(gold), choices=_number(its_choices)) is None:
            yield row, f"gold cannot be read: expected the letter of a choice, found {gold!r:.60}"


exact_match_reward.find_unscorable = _golds_without_text
choice_reward.find_unscorable = _golds_without_letter


def _gold_text(gold: object) -> str:
    text = str(gold) if isinstance(gold, (str, int, float)) else ""
    return _plain(text) if len(text) <= MAX_ANSWER_CHARS else ""


def _are_choices(choices: object) -> bool:
    if isinstance(choices, int):
        return True
    is_list = isinstance(choices, Sequence) and not isinstance(choices, str)
    return is_list and all(isinstance(choice, str) for choice in choices)


def _number(choices: Choices) -> int:
    return choices if isinstance(choices, int) else len(choices)


def _answers(completion: str, prefilled_think: bool) -> list[str]:
    """Return the plain answers of a completion; none if one is too long to be an answer."""
    found = final_answers(completion, prefilled_think=prefilled_think).answers
    if any(len(text) > MAX_ANSWER_CHARS for text in found):
        return []
    return [_plain(text) for text in found]


def _plain(text: str) -> str:
    r"""Remove `\text{}` and needless white space, and compose Unicode characters."""
    return " ".join(unicodedata.normalize("NFC", _TEXT_COMMAND.sub(r"\1", text)).split())


def _is_same(said: str, choice: str) -> bool:
    """Tell whether two texts differ in nothing but capitals and a full stop."""
    return said.casefold().rstrip(". ") == choice.casefold().rstrip(". ")
