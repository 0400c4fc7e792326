"""Data to token ids: documents, preference pairs, prompts, labelled answers, labelled steps.

    documents = load_documents("data/alpaca.json", tokenizer, max_length=512)
    pairs = load_pairs("data/pairs.jsonl", tokenizer)

Each loader reads the source, finds its format (formats.py), renders each row with a template
(render.py, or the tokenizer's chat template), checks it, and reports in one line what it found.
Rows that are left out are counted in that line, with their reason.
"""

from __future__ import annotations

import gc
import itertools
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple, get_args

from posttrain.data.encode import Encoder, Truncation, as_ids, without_spelling_marks
from posttrain.data.example import Example, assistant
from posttrain.data.formats import DOCUMENTS, PAIRS, PROMPTS, STEPS, UNPAIRED
from posttrain.data.images import GetProcessor
from posttrain.data.loading import Loader, Made, RenderedPrompt, Run
from posttrain.data.read import Records, Source
from posttrain.data.render import PromptTemplate
from posttrain.errors import ConfigError, DataError

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

OF_A_PAIR = (True, False)  # labels of chosen and rejected
MAX_RUN_CHARS, MAX_RUNS = 320, 8  # of the first example
MARKS = ("«", "»")  # around trained text

Say = Callable[[str], None]


def load_documents(
    source: Source | Records,
    tokenizer: PreTrainedTokenizerBase,
    *,
    template: str | PromptTemplate = "auto",
    max_length: int = 2048,
    truncation: Truncation = "keep_start",
    split: str | None = "train",
    processor: GetProcessor | None = None,
    say: Say | None = None,
) -> Dataset:
    """SFT documents: a Dataset with `input_ids` and `trained` (True: this token is a target).

    Targets are the answer and its end-of-sequence token; in conversations each assistant turn
    with its end token; in plain text every token but the first.

    Args:
        source: a file, a folder, a Hub dataset or rows in memory (read.py).
        tokenizer: the tokenizer of the model that is trained.
        template: "auto" (the tokenizer's chat template, else Alpaca), a name in render.TEMPLATES,
            "chat", or a function from an Example to the prompt's text.
        max_length: tokens of a document.
        truncation: what happens to longer ones: "keep_start" cuts their end off, so that the last
            answer has no end token, "keep_end" their start, "drop" leaves them out. A document in
            which no target remains is dropped.
        split: which files of a folder, or which split on the Hub.
        processor: f() -> the model's AutoProcessor, called at the first row with images; the rows
            then have a column `images` (images.py). None drops such rows, and counts them.
        say: called with each line of the report; None prints it.

    Raises:
        DataError: for data that cannot be used; it names file and row.
        ConfigError: for a template or truncation that cannot be used.
    """
    if truncation not in get_args(Truncation):
        known = ", ".join(get_args(Truncation))
        raise ConfigError(f"truncation: unknown way '{truncation}'; known: {known}.")
    common = {"template": template, "split": split, "processor": processor, "limit": max_length}
    return _load(Loader(source, tokenizer, DOCUMENTS, **common, option=truncation), _documents, say)


def _documents(loader: Loader) -> Made:
    columns = loader.columns({"input_ids": "ids", "trained": "flags"})
    for example, document in loader.documents():
        way = "drop" if example.images else loader.option  # half an image is none
        kept = loader.truncate_or_drop(example, document, way)
        if kept is not None:
            columns.append((*kept, *loader.seen(example)))
    loader.refuse_empty(len(columns))
    loader.refuse_endless()
    return loader.made(columns, _runs(loader.encoder, *columns.first[:2]))


def load_pairs(
    source: Source | Records,
    tokenizer: PreTrainedTokenizerBase,
    *,
    template: str | PromptTemplate = "auto",
    max_length: int = 2048,
    split: str | None = "train",
    processor: GetProcessor | None = None,
    say: Say | None = None,
) -> Dataset:
    """Preference pairs: a Dataset with `prompt_ids`, `chosen_ids`, `rejected_ids`.

    Completions hold their end-of-sequence token. A column `margin` of the data, by how much the
    chosen one is better, is carried along, for reward models. Pairs whose prompt and longer
    completion together have more than max_length tokens are dropped and counted. Arguments and
    errors as load_documents.
    """
    common = {"template": template, "split": split, "processor": processor, "limit": max_length}
    return _load(Loader(source, tokenizer, PAIRS, **common), _pairs, say)


def _pairs(loader: Loader) -> Made:
    kinds = dict.fromkeys(("prompt_ids", "chosen_ids", "rejected_ids"), "ids")
    has_margins = "margin" in loader.records.columns
    columns = loader.columns(kinds | ({"margin": "number"} if has_margins else {}))
    for row, example, prompt, (chosen, rejected) in loader.exchanges():
        length = len(prompt) + max(len(chosen), len(rejected))
        if loader.admit(example, prompt, length):
            margin = [row.number_or_nothing("margin")] if has_margins else []
            columns.append((prompt, chosen, rejected, *margin, *loader.seen(example)))
    loader.refuse_empty(len(columns))
    prompt, chosen, rejected = map(loader.encoder.decode, columns.first[:3])
    first = [(prompt, False), (chosen, True), (" | rejected: ", False), (rejected, True)]
    return loader.made(columns, first)


def load_prompts(
    source: Source | Records,
    tokenizer: PreTrainedTokenizerBase,
    *,
    template: str | PromptTemplate = "r1_zero",
    max_prompt_length: int = 1024,
    keep_source: bool = False,
    split: str | None = "train",
    processor: GetProcessor | None = None,
    say: Say | None = None,
) -> Dataset:
    """RL prompts: a Dataset with `prompt_ids`, `prompt` (the rendered text) and the data's columns.

    The data's other columns keep their names, for rewards to ask for. Where the format has a
    reference answer, the column `answer` holds it alone: what follows `####`, the content of
    `\\boxed{}`, else the answer as it is. HumanEval's and MBPP's tests become the column `tests` of
    the code reward. Prompts of more than max_prompt_length tokens are dropped and counted. "auto"
    is the chat template, else r1_zero. Errors as load_documents.

    keep_source: also the column `source_prompt`, JSON of what the template was given, a text or
    messages, so that records of the prompt can be written; an Alpaca input is joined to it.
    """
    common = {
        "template": template,
        "split": split,
        "processor": processor,
        "limit": max_prompt_length,
    }
    return _load(Loader(source, tokenizer, PROMPTS, **common, option=keep_source), _prompts, say)


def _prompts(loader: Loader) -> Made:
    kept: list[RenderedPrompt] = []
    for prompt in loader.prompts(as_recorded=loader.option):
        if loader.admit(prompt.example, prompt.ids, len(prompt.ids)):
            kept.append(prompt._replace(ids=as_ids(prompt.ids)))
            loader.tally.count_gold(prompt.example)
    loader.refuse_empty(len(kept))
    own = ("prompt", "prompt_ids", "images")
    names = [name for name in loader.records.columns if name not in own]
    values = {name: [prompt.row.values.get(name) for prompt in kept] for name in names}
    if loader.tally.golds:
        values["answer"] = [prompt.example.gold for prompt in kept]
    if any(prompt.example.tests for prompt in kept):
        values["tests"] = [prompt.example.tests for prompt in kept]
    if loader.option:
        bare = [json.dumps(p.example.bare_prompt, ensure_ascii=False) for p in kept]
        values["source_prompt"] = [without_spelling_marks(prompt) for prompt in bare]
    values["prompt_ids"] = [prompt.ids for prompt in kept]
    show = loader.images.collapsed if loader.images else str
    values["prompt"] = [show(prompt.text) for prompt in kept]
    columns = loader.columns(dict.fromkeys(values, "any") | {"prompt_ids": "ids"})
    for row, prompt in zip(zip(*values.values(), strict=True), kept, strict=True):
        columns.append((*row, *loader.seen(prompt.example)))
    gold = kept[0].example.gold
    first = [(kept[0].text, False), ("" if gold is None else f" | answer: {gold}", False)]
    return loader.made(columns, first)


def load_unpaired(
    source: Source | Records,
    tokenizer: PreTrainedTokenizerBase,
    *,
    template: str | PromptTemplate = "auto",
    max_length: int = 2048,
    split: str | None = "train",
    say: Say | None = None,
) -> Dataset:
    """Single labelled completions: a Dataset with `prompt_ids`, `completion_ids`, `label`.

    A preference pair gives two, chosen as good and rejected as bad. Completions hold their
    end-of-sequence token; those that with their prompt have more than max_length tokens are dropped
    and counted. Arguments and errors as load_documents; `label` is `desirable` of kto_loss.
    """
    common = {"template": template, "limit": max_length, "split": split}
    return _load(Loader(source, tokenizer, UNPAIRED, **common), _unpaired, say)


def _unpaired(loader: Loader) -> Made:
    kinds = {"prompt_ids": "ids", "completion_ids": "ids", "label": "flag"}
    columns, num_good = loader.columns(kinds), 0
    for _, example, prompt, answers in loader.exchanges():
        for answer, label in zip(answers, example.labels or OF_A_PAIR, strict=True):
            if loader.admit(example, prompt, len(prompt) + len(answer)):
                columns.append((prompt, answer, label))
                num_good += label
    loader.refuse_empty(len(columns))
    prompt, answer = map(loader.encoder.decode, columns.first[:2])
    label = f" | label: {_good_or_bad(columns.first[2])}"
    first = [(prompt, False), (answer, True), (label, False)]
    return loader.made(columns, first, detail=f" ({num_good:,} good)")


def load_steps(
    source: Source | Records,
    tokenizer: PreTrainedTokenizerBase,
    *,
    template: str | PromptTemplate = "auto",
    separator: str = "\n",
    max_length: int = 2048,
    split: str | None = "train",
    say: Say | None = None,
) -> Dataset:
    """Labelled steps: a Dataset with `prompt_ids`, `completion_ids`, `step_ends`, `labels`.

    `step_ends` are the positions in `completion_ids` at which a step is judged: the last token of
    the separator after it, and for the last step the end-of-sequence token. `labels` say whether
    each step is right; a step that nobody judged has neither. Arguments, limit and errors as
    load_unpaired.
    """
    common = {"template": template, "limit": max_length, "split": split, "option": separator}
    return _load(Loader(source, tokenizer, STEPS, **common), _steps, say)


def _steps(loader: Loader) -> Made:
    kinds = dict.fromkeys(("prompt_ids", "completion_ids", "step_ends"), "ids")
    columns = loader.columns(kinds | {"labels": "flags"})
    for prompt in loader.prompts():
        steps = _encode_steps(loader, prompt.example)
        if loader.admit(prompt.example, prompt.ids, len(prompt.ids) + len(steps.ids)):
            both = zip(steps.ends, prompt.example.labels, strict=True)
            ends, labels = zip(*((e, mark) for e, mark in both if mark is not None), strict=True)
            columns.append((prompt.ids, steps.ids, ends, labels))
    loader.refuse_empty(len(columns))
    prompt, answer = map(loader.encoder.decode, columns.first[:2])
    return loader.made(columns, [(prompt, False), (answer, True)])


class _Steps(NamedTuple):
    """Token ids of all steps, and the position of each step's last token."""

    ids: list[int]
    ends: list[int]


def _encode_steps(loader: Loader, example: Example) -> _Steps:
    """The steps tokenised apart, so that each ends with a token of its own."""
    *steps, last = loader.encoder.continuations(_step_texts(loader, example))
    pieces = [*steps, loader.encoder.ended(last)]
    ends = [total - 1 for total in itertools.accumulate(map(len, pieces))]
    return _Steps([token for piece in pieces for token in piece], ends)


def _step_texts(loader: Loader, example: Example) -> list[str]:
    """The steps, a separator between them, within what the template writes around an answer."""
    steps = [answer["content"].strip() for answer in example.answers]
    whole = loader.option.join(steps)
    one = replace(example, answers=(assistant(whole),), texts=(example.texts[0], whole))
    (text,) = loader.renderer.answers(one)
    before, found, after = text.partition(whole)
    if not found:
        raise DataError(
            f"{example.where}: the template '{loader.renderer.name}' rewrites the steps of "
            "'completions', so that they cannot be found again. Choose another template."
        )
    ended = [step + loader.option for step in steps[:-1]] + [steps[-1] + after]
    return [before + ended[0], *ended[1:]]


def _runs(encoder: Encoder, ids: Sequence[int], trained: Sequence[bool]) -> list[Run]:
    """The document's text in runs of neighbouring tokens that are all trained or all not."""
    edges = [i for i in range(1, len(ids)) if trained[i] != trained[i - 1]]
    bounds = [0, *edges, len(ids)]
    return [(encoder.decode(ids[a:b]), bool(trained[a])) for a, b in itertools.pairwise(bounds)]


def _good_or_bad(label: bool) -> str:
    return "good" if label else "bad"


def _load(loader: Loader, make: Callable[[Loader], Made], say: Say | None) -> Dataset:
    """The dataset that `make` gives, with its report; much data from where it was kept before."""
    with _uncollected():
        if loader.is_worth_keeping:
            from posttrain.data.cache import prepared

            dataset, line, first = prepared(loader, make)
        else:
            dataset, line, first = make(loader).in_memory()
    announce(line, first, say)
    return dataset


@contextmanager
def _uncollected() -> Iterator[None]:
    """Pause the collection of cycles, of which rows make none.

    Every row makes objects, so Python would look through all of torch again and again: a sixth of
    the time.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def marked_example(
    runs: Sequence[Run],
    *,
    marks: tuple[str, str] = MARKS,
    escape: Callable[[str], str] = str,
) -> str:
    """The runs on one line, trained ones between the marks, long ones with their middle cut."""
    shown = []
    for text, trained in runs[:MAX_RUNS]:
        text = escape(_shortened(text).replace("\n", "↵"))
        shown.append(f"{marks[0]}{text}{marks[1]}" if trained else text)
    if len(runs) > MAX_RUNS:
        shown.append(f" … and {len(runs) - MAX_RUNS} more pieces")
    return "".join(shown)


def announce(line: str, first: Sequence[Run], say: Say | None) -> None:
    """Report the summary and the first example, on the main process only.

    say: called with each line; None prints, in colour on a terminal.
    """
    if os.environ.get("RANK", "0") != "0":
        return
    if say is None and sys.stdout.isatty():
        _print_in_colour(line, first)
        return
    say = say or _print
    say(line)
    note = f" (trained between {MARKS[0]} {MARKS[1]})" if any(t for _, t in first) else ""
    say(f"first example{note}: {marked_example(first)}")


def _print_in_colour(line: str, first: Sequence[Run]) -> None:
    from rich.console import Console
    from rich.markup import escape

    console = Console(highlight=False)
    console.print(escape(line))
    example = marked_example(first, marks=("[bold green]", "[/]"), escape=escape)
    note = " (trained tokens in [bold green]green[/])" if any(t for _, t in first) else ""
    console.print(f"first example{note}: {example}")


def _print(line: str) -> None:
    encoding = sys.stdout.encoding or "utf-8"  # a terminal without « must not end the run
    print(line.encode(encoding, "replace").decode(encoding), flush=True)


def _shortened(text: str) -> str:
    half = MAX_RUN_CHARS // 2
    return text if len(text) <= MAX_RUN_CHARS else f"{text[:half]} … {text[-half:]}"
