r"""The text of a completion, and the part of it that the completion commits itself to.

    completion_text([{"role": "assistant", "content": "so 42"}])            # "so 42"
    final_text("<think>6 * 7</think><answer>42</answer>").text              # "42"
    final_answers(r"<think>6 * 7</think>So it is \boxed{42}.").answers      # ["42"]

A completion commits itself to what follows the last `</think>`, inside the last
`<answer>…</answer>` if there is one. A thought or an answer that was begun and not finished holds
nothing, so that a truncated completion earns nothing for what it was still thinking.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple, TypeAlias

from posttrain.maths.normalise import Extracted, extract_answers

Message: TypeAlias = Mapping[str, object]  # a chat message, such as {"role": …, "content": …}
Completion: TypeAlias = str | Sequence[Message]


class FinalText(NamedTuple):
    """The final text of a completion, or the problem that leaves it without one.

    `is_tagged`: the text is the body of `<answer>`.
    """

    text: str
    is_tagged: bool = False
    problem: str = ""


def completion_text(completion: Completion) -> str:
    """Return the text of a completion: the string itself, or the content of the last message.

    A message's content may be a string, None (a tool call without words, which is empty text), or
    a list of parts, of which those with a `text` are joined.
    """
    if isinstance(completion, str):
        return completion
    content = completion[-1]["content"] if completion else ""
    if content is None or isinstance(content, str):
        return content or ""
    return "".join(part.get("text") or "" for part in content)


def whole_texts(
    completions: Sequence[Completion],
    prompts: Sequence[object] | None = None,
    *,
    prefilled_think: bool | None = None,
) -> list[str]:
    """Return the texts of completions, with the `<think>` before them that their prompt ends in.

    Args:
        prompts: The rendered prompts, one each; whether a thought is open is read from them.
        prefilled_think: Says so instead, for all prompts.
    """
    texts = list(map(completion_text, completions))
    rendered = prompts if prompts is not None else [""] * len(texts)
    opened = [
        str(prompt).rstrip().endswith("<think>") if prefilled_think is None else prefilled_think
        for prompt in rendered
    ]
    return [
        "<think>" + text if is_open else text for text, is_open in zip(texts, opened, strict=True)
    ]


def final_text(completion: str, *, prefilled_think: bool = False) -> FinalText:
    """Find the text that a completion commits itself to; linear in its length.

    Args:
        completion: The model's text, without special tokens.
        prefilled_think: The template ended in `<think>`, so the text starts inside a thought.
    """
    if prefilled_think:
        completion = "<think>" + completion
    text = completion.rpartition("</think>")[2]
    if "<think>" in text:
        return FinalText("", problem="<think> is not closed")
    end = text.rfind("</answer>")
    start = text.rfind("<answer>", 0, max(end, 0))
    if start >= 0:
        return FinalText(text[start + len("<answer>") : end], is_tagged=True)
    if "<answer>" in text or end >= 0:
        return FinalText("", problem="<answer> is not closed, or not opened")
    return FinalText(text)


def final_answers(
    completion: str,
    *,
    prefilled_think: bool = False,
    allow_hashes: bool = False,
    allow_last_number: bool = False,
) -> Extracted:
    """Extract the answers in a completion's final text: see `maths.extraction.extract_answers`."""
    final = final_text(completion, prefilled_think=prefilled_think)
    if final.problem:
        return Extracted([], final.problem)
    return extract_answers(
        final.text,
        is_whole=final.is_tagged,
        allow_hashes=allow_hashes,
        allow_last_number=allow_last_number,
    )
