"""Data to token ids: documents for SFT, pairs for preference training, prompts for RL.

    documents = load_documents("data/alpaca.json", tokenizer, max_length=512)

Each loader reads the source, finds its format (formats.py), renders each row with a template
(templates.py, or the tokenizer's chat template), checks it, and says in one line what it found.

Labelled data to token ids: single answers for KTO and its like, steps for process rewards.

answers = load_unpaired("data/kto.jsonl", tokenizer)
"""

import itertools
import json
from dataclasses import replace
from typing import Any, get_args

from posttrain.data.encode import Encoder, Truncation, as_bools, as_ids, to_dataset
from posttrain.data.example import Example, Segment, assistant
from posttrain.data.formats import DOCUMENTS, PAIRS, PROMPTS, STEPS, UNPAIRED
from posttrain.data.loading import Loader, Run, Say
from posttrain.data.read import Records, Row, Source
from posttrain.data.render import PromptTemplate
from posttrain.errors import ConfigError, DataError


def load_documents(
    source: Source | Records,
    tokenizer: Any,
    *,
    template: str | PromptTemplate = "auto",
    max_length: int = 2048,
    truncation: Truncation = "keep_start",
    split: str | None = "train",
    say: Say | None = None,
):
    """SFT documents: a Dataset with `input_ids` and `trained` (True: this token is a target).

    Targets are the answer and its end-of-sequence token; in conversations each assistant turn
    with its end token; in plain text every token but the first.

    template: "auto" (the tokenizer's chat template, else Alpaca), a name in templates.TEMPLATES,
        "chat", or a function from an Example to the prompt's text.
    max_length: tokens of a document.
    truncation: what happens to longer ones: "keep_start" cuts their end off, so that the last
        answer has no end token, "keep_end" their start, "drop" leaves them out. A document in
        which no target remains is dropped.
    split: of a folder or a Hub dataset. say: called with each line of the report, else printed.

    Raises DataError for data, ConfigError for a template, that cannot be used.
    """
    if truncation not in get_args(Truncation):
        known = ", ".join(get_args(Truncation))
        raise ConfigError(f"truncation: unknown way '{truncation}'; known: {known}.")
    loader = Loader(source, tokenizer, DOCUMENTS, split)
    loader.choose(template, default="alpaca")
    columns: dict[str, list] = {"input_ids": [], "trained": []}
    for block in loader.blocks(num_answers=1):
        examples, rendered = _render(loader, [example for _, example in block])
        encoded = loader.encoder.documents(rendered, add_bos=loader.renderer.adds_bos)
        for example, document in zip(examples, encoded, strict=True):
            kept = loader.fit(example, document, max_length, truncation)
            if kept is not None:
                columns["input_ids"].append(as_ids(kept[0]))
                columns["trained"].append(as_bools(kept[1]))
    loader.check(len(columns["input_ids"]), f"max_length={max_length}")
    loader.check_ends_are_trained(columns, max_length)
    first = _runs(loader.encoder, columns["input_ids"][0], columns["trained"][0])
    loader.announce(len(columns["input_ids"]), first, say)
    return to_dataset(columns)


def load_pairs(
    source: Source | Records,
    tokenizer: Any,
    *,
    template: str | PromptTemplate = "auto",
    max_length: int = 2048,
    split: str | None = "train",
    say: Say | None = None,
):
    """Preference pairs: a Dataset with `prompt_ids`, `chosen_ids`, `rejected_ids`.

    Answers hold their end-of-sequence token. A column `margin` of the data, by how much the chosen
    answer is better, is carried along, for reward models. Pairs whose prompt and longer answer
    together have more than max_length tokens are dropped and counted. Arguments and errors as
    load_documents.
    """
    loader = Loader(source, tokenizer, PAIRS, split)
    loader.choose(template, default="alpaca")
    columns: dict[str, list] = {"prompt_ids": [], "chosen_ids": [], "rejected_ids": []}
    margins: list[float | None] = []
    for block in loader.blocks(num_answers=2):
        exchanges = loader.exchanges([example for _, example in block])
        for (row, example), (prompt, (chosen, rejected)) in zip(block, exchanges, strict=True):
            length = len(prompt) + max(len(chosen), len(rejected))
            if loader.keeps(example, prompt, length, max_length):
                for column, ids in zip(columns.values(), (prompt, chosen, rejected), strict=True):
                    column.append(as_ids(ids))
                margins.append(row.number_or_nothing("margin"))
    loader.check(len(columns["prompt_ids"]), f"max_length={max_length}")
    prompt, chosen, rejected = (loader.encoder.decode(ids[0]) for ids in columns.values())
    first = [(prompt, False), (chosen, True), (" | rejected: ", False), (rejected, True)]
    loader.announce(len(columns["prompt_ids"]), first, say)
    has_margins = "margin" in loader.records.columns
    return to_dataset(columns | ({"margin": margins} if has_margins else {}))


def load_prompts(
    source: Source | Records,
    tokenizer: Any,
    *,
    template: str | PromptTemplate = "r1_zero",
    max_prompt_length: int = 1024,
    keep_source: bool = False,
    split: str | None = "train",
    say: Say | None = None,
):
    """RL prompts: a Dataset with `prompt_ids`, `prompt` (the rendered text) and the data's columns.

    The data's other columns keep their names, for rewards to ask for. Where the format has a
    reference answer, the column `answer` holds it alone: what follows `####`, the content of
    `\\boxed{}`, else the answer as it is. HumanEval's and MBPP's tests become the column `tests` of
    the code reward. Prompts of more than max_prompt_length tokens are dropped and counted. "auto"
    is the chat template, else r1_zero. Errors as load_documents.

    keep_source: also the column `source_prompt`, JSON of what the template was given, a text or
    messages, so that records of the prompt can be written; an Alpaca input is joined to it.
    """
    loader = Loader(source, tokenizer, PROMPTS, split)
    loader.choose(template, default="r1_zero")
    kept: list[tuple[Row, Example, str, list[int]]] = []
    for block in loader.blocks(num_answers=0):
        if keep_source:
            block = [(row, _as_recorded(example)) for row, example in block]
        texts = [loader.renderer.prompt(example) for _, example in block]
        for (row, example), text, ids in zip(block, texts, loader.prompt_ids(texts), strict=True):
            if loader.keeps(example, ids, len(ids), max_prompt_length):
                kept.append((row, example, text, as_ids(ids)))
                loader.count_gold(example)
    loader.check(len(kept), f"max_prompt_length={max_prompt_length}")
    names = [name for name in loader.records.columns if name not in ("prompt", "prompt_ids")]
    columns = {name: [row.values.get(name) for row, *_ in kept] for name in names}
    if loader.tally.golds:
        columns["answer"] = [example.gold for _, example, *_ in kept]
    if any(example.tests for _, example, *_ in kept):
        columns["tests"] = [example.tests for _, example, *_ in kept]
    if keep_source:
        columns["source_prompt"] = [json.dumps(example.bare_prompt) for _, example, *_ in kept]
    columns |= {"prompt_ids": [ids for *_, ids in kept], "prompt": [text for *_, text, _ in kept]}
    gold = kept[0][1].gold
    first = [(kept[0][2], False), ("" if gold is None else f" | answer: {gold}", False)]
    loader.announce(len(kept), first, say)
    return to_dataset(columns)


def _as_recorded(example: Example) -> Example:
    """As it would be read back from a record of its bare prompt."""
    prompt = example.bare_prompt
    texts = (prompt,) if isinstance(prompt, str) else None
    return replace(example, turns=example.joined_turns, input="", texts=texts)


def _render(loader: Loader, examples: list[Example]) -> tuple[list[Example], list[list[Segment]]]:
    """The documents of the examples, each with its example: one may make several."""
    rendered = [(example, loader.renderer.documents(example)) for example in examples]
    each = [(example, document) for example, documents in rendered for document in documents]
    boundaries = [
        (example, before.text, segment.text)
        for example, document in each
        for before, segment in itertools.pairwise(document)
        if segment.trained and before.text
    ]
    loader.note_joined(boundaries)
    return [example for example, _ in each], [document for _, document in each]


def _runs(encoder: Encoder, ids: list[int], trained: list[bool]) -> list[Run]:
    """Neighbouring tokens that are alike in being trained, decoded together."""
    edges = [i for i in range(1, len(ids)) if trained[i] != trained[i - 1]]
    bounds = [0, *edges, len(ids)]
    return [(encoder.decode(ids[a:b]), bool(trained[a])) for a, b in itertools.pairwise(bounds)]


OF_A_PAIR = (True, False)  # chosen, rejected
STEP_END = "\n"


def load_unpaired(
    source: Source | Records,
    tokenizer: Any,
    *,
    template: str | PromptTemplate = "auto",
    max_length: int = 2048,
    split: str | None = "train",
    say: Say | None = None,
):
    """Single labelled answers: a Dataset with `prompt_ids`, `completion_ids`, `label`.

    A preference pair gives two, chosen as good and rejected as bad. Answers hold their
    end-of-sequence token; those that with their prompt have more than max_length tokens are dropped
    and counted. Arguments and errors as load_documents; `label` is `desirable` of kto_loss.
    """
    loader = Loader(source, tokenizer, UNPAIRED, split)
    loader.choose(template, default="alpaca")
    columns: dict[str, list] = {"prompt_ids": [], "completion_ids": [], "label": []}
    for block in loader.blocks(num_answers=1):
        examples = [example for _, example in block]
        for example, (prompt, answers) in zip(examples, loader.exchanges(examples), strict=True):
            for answer, label in zip(answers, example.labels or OF_A_PAIR, strict=True):
                if loader.keeps(example, prompt, len(prompt) + len(answer), max_length):
                    values = (as_ids(prompt), as_ids(answer), label)
                    for column, value in zip(columns.values(), values, strict=True):
                        column.append(value)
    num_kept = len(columns["label"])
    loader.check(num_kept, f"max_length={max_length}")
    prompt, answer = (loader.encoder.decode(columns[name][0]) for name in list(columns)[:2])
    mark = " | label: good" if columns["label"][0] else " | label: bad"
    first = [(prompt, False), (answer, True), (mark, False)]
    loader.announce(num_kept, first, say, f" ({sum(columns['label']):,} good)")
    return to_dataset(columns)


def load_steps(
    source: Source | Records,
    tokenizer: Any,
    *,
    template: str | PromptTemplate = "auto",
    max_length: int = 2048,
    split: str | None = "train",
    say: Say | None = None,
):
    """Labelled steps: a Dataset with `prompt_ids`, `completion_ids`, `step_ends`, `labels`.

    `step_ends` are the places in `completion_ids` after which a step is judged: its newline's last
    token, of the last step the end-of-sequence token. `labels` say whether each step is right.
    Arguments, limit and errors as load_unpaired.
    """
    loader = Loader(source, tokenizer, STEPS, split)
    loader.choose(template, default="alpaca")
    names = ("prompt_ids", "completion_ids", "step_ends", "labels")
    columns: dict[str, list] = {name: [] for name in names}
    for block in loader.blocks(num_answers=1):
        examples = [example for _, example in block]
        prompts = loader.prompt_ids([loader.renderer.prompt(example) for example in examples])
        for example, prompt in zip(examples, prompts, strict=True):
            answer, ends = _encode(loader, _step_texts(loader, example))
            if loader.keeps(example, prompt, len(prompt) + len(answer), max_length):
                values = (as_ids(prompt), as_ids(answer), as_ids(ends), as_bools(example.labels))
                for column, value in zip(columns.values(), values, strict=True):
                    column.append(value)
    num_kept = len(columns["labels"])
    loader.check(num_kept, f"max_length={max_length}")
    prompt, answer = (loader.encoder.decode(columns[name][0]) for name in names[:2])
    loader.announce(num_kept, [(prompt, False), (answer, True)], say)
    return to_dataset(columns)


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


def _encode(loader: Loader, texts: list[str]) -> tuple[list[int], list[int]]:
    """The ids of all steps, tokenised apart, and the place of each step's last token."""
    *steps, last = loader.encoder.continuations(texts)
    pieces = [*steps, loader.encoder.ended(last)]
    ends = [total - 1 for total in itertools.accumulate(map(len, pieces))]
    return [token for piece in pieces for token in piece], ends
