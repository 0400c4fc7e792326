"""Data to token ids: documents, preference pairs, prompts, labelled answers, labelled steps.

    documents = load_documents("data/alpaca.json", tokenizer, max_length=512)
    pairs = load_pairs("data/pairs.jsonl", tokenizer)

Each loader reads the source, finds its format (formats.py), renders each row with a template
(render.py, or the tokenizer's chat template), checks it, and reports in one line what it found.
Rows that are left out are counted in that line, with their reason.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple, get_args

from posttrain.data.encode import (
    Encoder,
    Truncation,
    as_bools,
    as_ids,
    to_dataset,
    without_spelling_marks,
)
from posttrain.data.example import Example, assistant
from posttrain.data.formats import DOCUMENTS, PAIRS, PROMPTS, STEPS, UNPAIRED
from posttrain.data.images import GetProcessor
from posttrain.data.loading import Loader, RenderedPrompt, Run, Say
from posttrain.data.read import Records, Source
from posttrain.data.render import PromptTemplate
from posttrain.errors import ConfigError, DataError

if TYPE_CHECKING:
    import numpy
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

OF_A_PAIR = (True, False)  # labels of chosen and rejected
STEP_END = "\n"


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
    common = {"template": template, "split": split, "processor": processor}
    loader = Loader(source, tokenizer, DOCUMENTS, limit=max_length, **common)
    ids, masks, images = [], [], []
    for example, document in loader.documents():
        way = "drop" if example.images else truncation  # half an image is none
        kept = loader.truncate_or_drop(example, document, way)
        if kept is not None:
            ids.append(as_ids(kept[0]))
            masks.append(as_bools(kept[1]))
            images.append(list(example.images))
    loader.refuse_empty(len(ids))
    loader.refuse_endless(each[mask].tolist() for each, mask in zip(ids, masks, strict=True))
    loader.announce(len(ids), _runs(loader.encoder, ids[0], masks[0]), say)
    return to_dataset({"input_ids": ids, "trained": masks} | _seen(images))


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
    common = {"template": template, "split": split, "processor": processor}
    loader = Loader(source, tokenizer, PAIRS, limit=max_length, **common)
    pairs, margins, images = [], [], []
    for row, example, prompt, (chosen, rejected) in loader.exchanges():
        length = len(prompt) + max(len(chosen), len(rejected))
        if loader.admit(example, prompt, length):
            pairs.append((as_ids(prompt), as_ids(chosen), as_ids(rejected)))
            margins.append(row.number_or_nothing("margin"))
            images.append(list(example.images))
    loader.refuse_empty(len(pairs))
    prompt, chosen, rejected = map(loader.encoder.decode, pairs[0])
    first = [(prompt, False), (chosen, True), (" | rejected: ", False), (rejected, True)]
    loader.announce(len(pairs), first, say)
    columns = _columns(("prompt_ids", "chosen_ids", "rejected_ids"), pairs) | _seen(images)
    has_margins = "margin" in loader.records.columns
    return to_dataset(columns | ({"margin": margins} if has_margins else {}))


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
    common = {"template": template, "split": split, "processor": processor}
    loader = Loader(source, tokenizer, PROMPTS, limit=max_prompt_length, **common)
    kept: list[RenderedPrompt] = []
    for prompt in loader.prompts(as_recorded=keep_source):
        if loader.admit(prompt.example, prompt.ids, len(prompt.ids)):
            kept.append(prompt._replace(ids=as_ids(prompt.ids)))
            loader.tally.count_gold(prompt.example)
    loader.refuse_empty(len(kept))
    gold = kept[0].example.gold
    first = [(kept[0].text, False), ("" if gold is None else f" | answer: {gold}", False)]
    loader.announce(len(kept), first, say)
    own = {"prompt", "prompt_ids"} | ({"images"} if loader.images else set())
    names = [name for name in loader.records.columns if name not in own]
    columns = {name: [prompt.row.values.get(name) for prompt in kept] for name in names}
    if loader.tally.golds:
        columns["answer"] = [prompt.example.gold for prompt in kept]
    if any(prompt.example.tests for prompt in kept):
        columns["tests"] = [prompt.example.tests for prompt in kept]
    if keep_source:
        bare = [json.dumps(p.example.bare_prompt, ensure_ascii=False) for p in kept]
        columns["source_prompt"] = [without_spelling_marks(prompt) for prompt in bare]
    columns["prompt_ids"] = [prompt.ids for prompt in kept]
    columns["prompt"] = [prompt.text for prompt in kept]
    if loader.images:
        columns["prompt"] = [loader.images.collapsed(prompt.text) for prompt in kept]
    return to_dataset(columns | _seen([list(prompt.example.images) for prompt in kept]))


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
    loader = Loader(source, tokenizer, UNPAIRED, template=template, limit=max_length, split=split)
    kept = []
    for _, example, prompt, answers in loader.exchanges():
        for answer, label in zip(answers, example.labels or OF_A_PAIR, strict=True):
            if loader.admit(example, prompt, len(prompt) + len(answer)):
                kept.append((as_ids(prompt), as_ids(answer), label))
    loader.refuse_empty(len(kept))
    prompt, answer = map(loader.encoder.decode, kept[0][:2])
    first = [(prompt, False), (answer, True), (f" | label: {_good_or_bad(kept[0][2])}", False)]
    num_good = sum(label for *_, label in kept)
    loader.announce(len(kept), first, say, detail=f" ({num_good:,} good)")
    return to_dataset(_columns(("prompt_ids", "completion_ids", "label"), kept))


def load_steps(
    source: Source | Records,
    tokenizer: PreTrainedTokenizerBase,
    *,
    template: str | PromptTemplate = "auto",
    max_length: int = 2048,
    split: str | None = "train",
    say: Say | None = None,
) -> Dataset:
    """Labelled steps: a Dataset with `prompt_ids`, `completion_ids`, `step_ends`, `labels`.

    `step_ends` are the positions in `completion_ids` at which a step is judged: the last token of
    its newline, and for the last step the end-of-sequence token. `labels` say whether each step is
    right. Arguments, limit and errors as load_unpaired.
    """
    loader = Loader(source, tokenizer, STEPS, template=template, limit=max_length, split=split)
    kept = []
    for prompt in loader.prompts():
        steps = _encode_steps(loader, prompt.example)
        if loader.admit(prompt.example, prompt.ids, len(prompt.ids) + len(steps.ids)):
            labels = as_bools(prompt.example.labels)
            kept.append((as_ids(prompt.ids), as_ids(steps.ids), as_ids(steps.ends), labels))
    loader.refuse_empty(len(kept))
    prompt, answer = map(loader.encoder.decode, kept[0][:2])
    loader.announce(len(kept), [(prompt, False), (answer, True)], say)
    return to_dataset(_columns(("prompt_ids", "completion_ids", "step_ends", "labels"), kept))


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
    """The steps, a newline between them, within what the template writes around an answer."""
    steps = [answer["content"].strip() for answer in example.answers]
    whole = STEP_END.join(steps)
    one = replace(example, answers=(assistant(whole),), texts=(example.texts[0], whole))
    (text,) = loader.renderer.answers(one)
    before, found, after = text.partition(whole)
    if not found:
        raise DataError(
            f"{example.where}: the template '{loader.renderer.name}' rewrites the steps of "
            "'completions', so that they cannot be found again. Choose another template."
        )
    ended = [step + STEP_END for step in steps[:-1]] + [steps[-1] + after]
    return [before + ended[0], *ended[1:]]


def _runs(encoder: Encoder, ids: numpy.ndarray, trained: numpy.ndarray) -> list[Run]:
    """The document's text in runs of neighbouring tokens that are all trained or all not."""
    edges = [i for i in range(1, len(ids)) if trained[i] != trained[i - 1]]
    bounds = [0, *edges, len(ids)]
    return [(encoder.decode(ids[a:b]), bool(trained[a])) for a, b in itertools.pairwise(bounds)]


def _columns(names: Sequence[str], rows: Sequence[tuple]) -> dict[str, list]:
    return dict(zip(names, map(list, zip(*rows, strict=True)), strict=True))


def _seen(images: list[list[dict]]) -> dict[str, list]:
    """The column `images`, where any row has some."""
    return {"images": images} if any(images) else {}


def _good_or_bad(label: bool) -> str:
    return "good" if label else "bad"
