"""One example as training sees it: which tokens are trained, which are special, where each ends.

    print_example(find_row(stream, 17), tokenizer, need="documents")

The row goes through the very loader of the recipes. On a terminal trained tokens are green and
special ones reversed; elsewhere trained tokens stand between « and ».
"""

from typing import Any, NamedTuple

from posttrain.data.formats import LOADERS, PROMPTS
from posttrain.data.hygiene.rows import RowStream, format_of
from posttrain.data.records import Records, Row
from posttrain.data.summary import MARKS
from posttrain.errors import ConfigError, DataError

REPLACEMENT = "\ufffd"  # what an incomplete character is decoded to
BOUNDARY = "│"
MAX_TOKENS_OF_A_CHARACTER = 8


class Piece(NamedTuple):
    """The text of a token, or of several tokens that make one character."""

    text: str
    trained: bool
    special: bool


def find_row(stream: RowStream, number: int) -> Row:
    """The first row of that number (its line in JSONL)."""
    last = 0
    for row in stream:
        if row.number == number:
            return row
        last = row.number
    raise DataError(f"{stream.name}: no row {number}; the last one is row {last}.")


def tokens_of(
    row: Row, tokenizer: Any, *, need: str | None = None, template: str = "auto", max_length: int
) -> list[tuple[str, list[int], list[bool]]]:
    """(name, token ids, trained) of each part that a loader makes of the row.

    need: documents, pairs, …: a key of LOADERS; none: what the row's format gives first.
    """
    from posttrain import data

    given = format_of(row).gives
    if need is not None and need not in given:
        raise ConfigError(f"need: this row gives {' or '.join(given)}; found '{need}'.")
    need = need or given[0]
    limit = {"max_prompt_length" if need == PROMPTS else "max_length": max_length}
    load = getattr(data, LOADERS[need])
    records = Records(row.file, ((row.file, [row.number], [row.values]),))
    examples = load(records, tokenizer, template=template, say=_silent, **limit)
    return [part for example in examples for part in _parts(example)]


def _parts(example: dict[str, Any]) -> list[tuple[str, list[int], list[bool]]]:
    if "input_ids" in example:
        return [("document", example["input_ids"], example["trained"])]
    names = [name for name in example if name.endswith("_ids")]
    return [
        (name.removesuffix("_ids"), example[name], [name != "prompt_ids"] * len(example[name]))
        for name in names
    ]


def pieces_of(ids: list[int], trained: list[bool], tokenizer: Any) -> list[Piece]:
    """The tokens' texts; tokens that only together make a character are one piece."""
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    pieces, start = [], 0
    for end in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[start:end], skip_special_tokens=False)
        is_open = text.endswith(REPLACEMENT) and end - start < MAX_TOKENS_OF_A_CHARACTER
        if is_open and end < len(ids) and trained[end] == trained[start]:
            continue
        pieces.append(Piece(text, trained[start], ids[start] in special))
        start = end
    return pieces


def print_example(
    parts: list[tuple[str, list[int], list[bool]]],
    tokenizer: Any,
    *,
    boundaries: bool = False,
    console: Any = None,
) -> None:
    """Print each part under its name. boundaries: a line between two tokens."""
    from rich.console import Console
    from rich.text import Text

    console = console or Console(highlight=False, soft_wrap=True)
    in_colour = console.is_terminal and not console.no_color
    marks = ("", "") if in_colour else MARKS
    for name, ids, trained in parts:
        pieces = pieces_of(ids, trained, tokenizer)
        legend = "green: trained" if in_colour else f"{MARKS[0]}trained{MARKS[1]}"
        console.print(f"{name}: {len(ids):,} tokens, {sum(trained):,} trained ({legend})")
        text = Text()
        for place, piece in enumerate(pieces):
            was_trained = place > 0 and pieces[place - 1].trained
            if piece.trained != was_trained:
                text.append(marks[0] if piece.trained else marks[1])
            elif boundaries and place:
                text.append(BOUNDARY, style="dim")
            text.append(piece.text, style=_style(piece))
        if pieces and pieces[-1].trained:
            text.append(marks[1])
        console.print(text)


def _style(piece: Piece) -> str:
    styles = ["bold green"] * piece.trained + ["reverse"] * piece.special
    return " ".join(styles)


def _silent(_line: str) -> None:
    """For a loader whose report on a single row says nothing."""
