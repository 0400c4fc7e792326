r"""The language reward: the share of the reasoning's words in the language that was asked for.

    language_share("<think>Zuerst rechnen wir 6 * 7 …</think>42", "de")    # 1.0
    rewards = {"correct": (math_reward, 1.0), "language": (language_reward("en"), 0.1)}

Source: DeepSeek-R1 (arXiv 2501.12948, section 2.3.2), which leaves open what a word is and how its
language is found. Here a word is a run of letters of one script, outside code, formulas and
addresses. A word in a script that the language does not use is foreign. If other languages share
the script, py3langid picks among them for each ten to twenty words.

It can be fooled by text inside code or formulas, by foreign words scattered one by one within the
same script, and by words that mean nothing. It says nothing about the final answer.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache, partial
from itertools import groupby
from typing import NamedTuple

from posttrain.errors import ConfigError
from posttrain.rewards.pieces import Reward, per_completion
from posttrain.rewards.text import Completion, completion_text

MAX_CHARS = 100_000  # of longer reasoning, this many from its two ends are read
MIN_WORDS = 10  # with fewer, languages of one script cannot be told apart
MAX_WINDOW_WORDS = 20
MAX_LABEL_LETTERS = 4  # capitals up to this length name things: ABC, GCD, HCN

_LATIN = (
    "af ca cs da de en es et eu fi fr hr hu id is it lt lv nl no pl pt ro sk sl sq sv sw tl tr vi"
)
_CYRILLIC = "be bg kk mk mn ru sr uk"
_ARABIC = "ar fa ur"
_DEVANAGARI = "hi mr ne"
# ISO 639-1 code to the scripts of the language, by the first word of their characters' names.
LANGUAGES: dict[str, frozenset[str]] = {
    **dict.fromkeys(_LATIN.split(), frozenset({"LATIN"})),
    **dict.fromkeys(_CYRILLIC.split(), frozenset({"CYRILLIC"})),
    **dict.fromkeys(_ARABIC.split(), frozenset({"ARABIC"})),
    **dict.fromkeys(_DEVANAGARI.split(), frozenset({"DEVANAGARI"})),
    "zh": frozenset({"CJK"}),
    "ja": frozenset({"CJK", "HIRAGANA", "KATAKANA"}),
    "ko": frozenset({"HANGUL"}),
    "bn": frozenset({"BENGALI"}),
    "el": frozenset({"GREEK"}),
    "gu": frozenset({"GUJARATI"}),
    "he": frozenset({"HEBREW"}),
    "hy": frozenset({"ARMENIAN"}),
    "ka": frozenset({"GEORGIAN"}),
    "km": frozenset({"KHMER"}),
    "kn": frozenset({"KANNADA"}),
    "lo": frozenset({"LAO"}),
    "ml": frozenset({"MALAYALAM"}),
    "my": frozenset({"MYANMAR"}),
    "pa": frozenset({"GURMUKHI"}),
    "si": frozenset({"SINHALA"}),
    "ta": frozenset({"TAMIL"}),
    "te": frozenset({"TELUGU"}),
    "th": frozenset({"THAI"}),
}
# Scripts without spaces between words: the number of letters that count as a word.
_LETTERS_PER_WORD = {
    **dict.fromkeys(("CJK", "HIRAGANA", "KATAKANA"), 1),
    **dict.fromkeys(("THAI", "LAO", "KHMER", "MYANMAR"), 4),
}
_SCRIPT_OF_NAME = {
    "IDEOGRAPHIC": "CJK",
    "KATAKANA-HIRAGANA": "KATAKANA",
    **dict.fromkeys(("COMBINING", "MODIFIER", "VARIATION"), ""),  # accents, emoji variants
}

# Applied in this order. No pattern runs past the next opening of its kind, so all are linear. Text
# that is opened and not closed is kept, because one stray sign would hide all that follows.
_NOT_PROSE = [
    re.compile(pattern)
    for pattern in (
        r"`[^`\n]+`",
        r"\$\$[^$]+\$\$",
        r"\$(?=\S)[^$\n]+(?<=\S)\$(?!\d)",  # not "$5 and $6"
        r"\\\((?:[^\\]|\\(?![()]))*\\\)",
        r"\\\[(?:[^\\]|\\(?![\[\]]))*\\\]",
        r"\\begin\{\w{1,20}\*?\}(?:[^\\]|\\(?!begin|end))*\\end\{\w{1,20}\*?\}",
        r"\\[A-Za-z]+\*?(?:\{[^{}\\]*\})*",  # \boxed{42}, \frac{1}{2}
        r"(?:https?://|www\.)[!-~]+",
        r"</?[A-Za-z]{1,20}>",
    )
]
_SENTENCE_END = re.compile(r"[.!?;:。！？；：।؟\n]+")


class _Word(NamedTuple):
    script: str
    letters: str
    count: int  # number of words in this run of letters


def language_share(text: str, language: str, *, among: Sequence[str] | None = None) -> float | None:
    """The share of words in `language`, in the text before the last `</think>`, or all without one.

    Single letters, in scripts that have capitals, and short words in capitals are names of things,
    not words. A Chinese or Japanese character is a word, as are four letters of Thai, Lao, Khmer or
    Burmese, which put no space between words.

    It is None if there is no word, or fewer than `MIN_WORDS` that would have to be told from those
    of another language of their script. Three English words and nine Chinese characters have 0.75
    for "zh".

    Args:
        text: A completion.
        language: A code in `LANGUAGES`.
        among: The languages that occur, if that is known; none: any. Where only "en" and "zh" do, a
            Latin word is English: the script alone decides, in a text of any length.

    Raises:
        ConfigError: A language is not known.
    """
    for code in (language, *(among or ())):
        check_language(code)
    scripts, rivals = LANGUAGES[language], _rivals(language, among)
    sentences = [list(_words(sentence)) for sentence in _SENTENCE_END.split(_prose(text))]
    total = sum(map(_count, sentences))
    num_own = sum(_count(_of(sentence, scripts)) for sentence in sentences)
    if not total:
        return None
    if not num_own or rivals == {language}:
        return num_own / total
    if total < MIN_WORDS:
        return None
    scripts_of_rivals = frozenset().union(*(LANGUAGES[rival] for rival in rivals))
    windows = _windows(_of(sentence, scripts_of_rivals) for sentence in sentences)
    identified = [window for window in windows if _identify(window, rivals) == language]
    return sum(_count(_of(window, scripts)) for window in identified) / total


@per_completion
def language_consistency(
    completions: Sequence[Completion],
    *,
    language: str | Sequence[str],
    among: Sequence[str] | None = None,
    **_columns: object,
) -> list[float | None]:
    """Apply `language_share` to each completion. `language` is a column of codes, or one code."""
    codes = [language] * len(completions) if isinstance(language, str) else language
    return [
        language_share(completion_text(completion), code, among=among)
        for completion, code in zip(completions, codes, strict=True)
    ]


def language_reward(language: str, *, among: Sequence[str] | None = None) -> Reward:
    """Bind `language_consistency` to one language. ConfigError for an unknown code."""
    for code in (language, *(among or ())):
        check_language(code)
    return partial(language_consistency, language=language, among=among)


def check_language(language: object) -> None:
    """Raise ConfigError unless `language` is a code in `LANGUAGES`."""
    if _is_known(language):
        return
    without_region = str(language).lower().partition("-")[0]
    hint = f" Did you mean {without_region!r}?" if _is_known(without_region) else ""
    raise ConfigError(
        f"language: expected an ISO 639-1 code, found {language!r}.{hint} "
        f"Known: {', '.join(sorted(LANGUAGES))}."
    )


def _is_known(language: object) -> bool:
    return isinstance(language, str) and language in LANGUAGES


def _unknown_languages(language: str | Iterable[object] = ()) -> Iterator[tuple[int, str]]:
    if isinstance(language, str):  # bound, so it is the same in every row
        check_language(language)
        return
    for row, code in enumerate(language):
        if not _is_known(code):
            yield row, f"language {code!r} is not known"


language_consistency.find_unscorable = _unknown_languages


def _rivals(language: str, among: Sequence[str] | None = None) -> set[str]:
    """Return the languages, of `among` and this one, that share one of its scripts."""
    known = LANGUAGES if among is None else {language, *among}
    return {code for code in known if LANGUAGES[code] & LANGUAGES[language]}


def _prose(text: str) -> str:
    """Return the reasoning without code, formulas, addresses and tags."""
    before, closed, after = text.rpartition("</think>")
    reasoning = before if closed else after
    if len(reasoning) > MAX_CHARS:
        reasoning = f"{reasoning[: MAX_CHARS // 2]}\n{reasoning[-MAX_CHARS // 2 :]}"
    pieces = reasoning.split("```")  # prose, code, prose, …
    last_is_open = [] if len(pieces) % 2 else pieces[-1:]
    prose = "\n".join(pieces[::2] + last_is_open)
    for pattern in _NOT_PROSE:
        prose = pattern.sub(" ", prose)
    return unicodedata.normalize("NFC", prose)


def _words(text: str) -> Iterator[_Word]:
    for script, run in groupby(text, key=_script):
        letters = "".join(run) if script else ""
        if count := _num_words(script, letters):
            yield _Word(script, letters, count)


def _num_words(script: str, letters: str) -> int:
    """Count the words in a run of letters: 0 for x and ABC, 2 for two Chinese characters."""
    if letters_per_word := _LETTERS_PER_WORD.get(script):
        return -(-len(letters) // letters_per_word)
    is_variable = len(letters) == 1 and letters.islower()
    is_label = len(letters) <= MAX_LABEL_LETTERS and letters.isupper()
    return int(bool(script) and not is_variable and not is_label)


@lru_cache(maxsize=10_000)
def _script(character: str) -> str:
    """Return the script of a letter or vowel sign: the first word of its Unicode name; else "".

    For letters of a special width it is the second word: "FULLWIDTH LATIN CAPITAL LETTER A".
    """
    if unicodedata.category(character)[0] not in "LM":
        return ""
    first, _, rest = unicodedata.name(character, "").partition(" ")
    if first in ("FULLWIDTH", "HALFWIDTH"):
        first = rest.partition(" ")[0]
    return _SCRIPT_OF_NAME.get(first, first)


def _of(words: Iterable[_Word], scripts: frozenset[str]) -> list[_Word]:
    return [word for word in words if word.script in scripts]


def _windows(sentences: Iterable[list[_Word]]) -> list[list[_Word]]:
    """Group words into windows that end with a sentence after `MIN_WORDS`, or are full."""
    windows: list[list[_Word]] = []
    window: list[_Word] = []
    for sentence in sentences:
        for word in sentence:
            window.append(word)
            if _count(window) >= MAX_WINDOW_WORDS:
                windows.append(window)
                window = []
        if _count(window) >= MIN_WORDS:
            windows.append(window)
            window = []
    if windows:  # the rest is too short to be identified by itself
        windows[-1] += window
    return windows or [window]


def _count(words: Iterable[_Word]) -> int:
    return sum(word.count for word in words)


def _identify(words: list[_Word], languages: set[str]) -> str:
    """Return the likeliest language by py3langid, which costs 0.8 s and 100 MB once."""
    from py3langid import rank

    ranking = rank(" ".join(word.letters for word in words))
    return next((code for code, _ in ranking if code in languages), "")
