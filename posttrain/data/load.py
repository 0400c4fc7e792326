"""Data to token ids: documents for SFT, pairs for preference training, prompts for RL.

    documents = load_documents("data/alpaca.json", tokenizer, max_length=512)

Each loader reads the source, finds its format (formats.py), renders each row with a template
(templates.py, or the tokenizer's chat template), checks it, and says in one line what it found.
"""

import itertools
from collections.abc import Iterator
from typing import Any

from posttrain.data.columns import as_bools, as_ids, to_dataset
from posttrain.data.encoding import Encoder
from posttrain.data.examples import DroppedRow, Example
from posttrain.data.formats import DOCUMENTS, PAIRS, PROMPTS, detect_format, parse_row
from posttrain.data.records import Records, Row, Source, read_records
from posttrain.data.rendering import choose_template
from posttrain.data.summary import Run, Say, Tally, announce, quantiles, summary_line
from posttrain.data.templates import PromptTemplate
from posttrain.errors import DataError

BLOCK_ROWS = 1024  # rows tokenised in one call: enough to keep the tokenizer's threads busy
MAX_EMPTY_SHARE = 0.01  # a few empty answers are noise in the data; more are a mistake
EMPTY_ANSWER, EMPTY_PROMPT = "with an empty answer", "with an empty prompt"


def load_documents(
    source: Source | Records,
    tokenizer: Any,
    *,
    template: str | PromptTemplate = "auto",
    max_length: int = 2048,
    split: str | None = "train",
    say: Say | None = None,
):
    """SFT documents: a Dataset with `input_ids` and `trained` (True: this token is a target).

    Targets are the answer and its end-of-sequence token; in conversations each assistant turn
    with its end token; in plain text every token but the first.

    template: "auto" (the tokenizer's chat template, else Alpaca), a name in templates.TEMPLATES,
        "chat", or a function from an Example to the prompt's text.
    max_length: tokens; longer documents are cut, and dropped when no target remains.
    split: of a folder or a Hub dataset. say: called with each line of the report, else printed.

    Raises DataError for data, ConfigError for a template, that cannot be used.
    """
    loader = _Loader(source, tokenizer, DOCUMENTS, split)
    loader.choose(template, default="alpaca")
    columns: dict[str, list] = {"input_ids": [], "trained": []}
    for block in loader.blocks(num_answers=1):
        rendered = [loader.renderer.document(example) for _, example in block]
        encoded = loader.encoder.documents(rendered, add_bos=loader.renderer.adds_bos)
        for (_, example), (ids, trained) in zip(block, encoded, strict=True):
            loader.tally.lengths.append(len(ids))
            if not any(trained[:max_length]):
                loader.tally.drop("without a target within max_length", example.where)
                continue
            loader.tally.num_truncated += len(ids) > max_length
            columns["input_ids"].append(as_ids(ids[:max_length]))
            columns["trained"].append(as_bools(trained[:max_length]))
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

    Answers hold their end-of-sequence token. Pairs whose prompt and longer answer together have
    more than max_length tokens are dropped and counted. Arguments and errors as load_documents.
    """
    loader = _Loader(source, tokenizer, PAIRS, split)
    loader.choose(template, default="alpaca")
    columns: dict[str, list] = {"prompt_ids": [], "chosen_ids": [], "rejected_ids": []}
    for block in loader.blocks(num_answers=2):
        answers = [loader.renderer.answers(example) for _, example in block]
        prompts = loader.prompt_ids([loader.renderer.prompt(example) for _, example in block])
        chosen = loader.encoder.answers([first for first, _ in answers])
        rejected = loader.encoder.answers([second for _, second in answers])
        for (_, example), *triple in zip(block, prompts, chosen, rejected, strict=True):
            length = len(triple[0]) + max(len(triple[1]), len(triple[2]))
            if loader.keeps(example, triple[0], length, max_length):
                for column, ids in zip(columns.values(), triple, strict=True):
                    column.append(as_ids(ids))
    loader.check(len(columns["prompt_ids"]), f"max_length={max_length}")
    prompt, chosen, rejected = (loader.encoder.decode(ids[0]) for ids in columns.values())
    first = [(prompt, False), (chosen, True), (" | rejected: ", False), (rejected, True)]
    loader.announce(len(columns["prompt_ids"]), first, say)
    return to_dataset(columns)


def load_prompts(
    source: Source | Records,
    tokenizer: Any,
    *,
    template: str | PromptTemplate = "r1_zero",
    max_prompt_length: int = 1024,
    split: str | None = "train",
    say: Say | None = None,
):
    """RL prompts: a Dataset with `prompt_ids`, `prompt` (the rendered text) and the data's columns.

    The data's other columns keep their names, for rewards to ask for. Where the format has a
    reference answer, the column `answer` holds it alone: what follows `####`, the content of
    `\\boxed{}`, else the answer as it is. HumanEval's and MBPP's tests become the column `tests` of
    the code reward. Prompts of more than max_prompt_length tokens are dropped and counted. "auto"
    is the chat template, else r1_zero. Errors as load_documents.
    """
    loader = _Loader(source, tokenizer, PROMPTS, split)
    loader.choose(template, default="r1_zero")
    kept: list[tuple[Row, Example, str, list[int]]] = []
    for block in loader.blocks(num_answers=0):
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
    columns |= {"prompt_ids": [ids for *_, ids in kept], "prompt": [text for *_, text, _ in kept]}
    gold = kept[0][1].gold
    first = [(kept[0][2], False), ("" if gold is None else f" | answer: {gold}", False)]
    loader.announce(len(kept), first, say)
    return to_dataset(columns)


class _Loader:
    """What the three loaders share: rows in, checked examples out, and the tally of both."""

    def __init__(self, source: Source | Records, tokenizer: Any, need: str, split: str | None):
        self.records = source if isinstance(source, Records) else read_records(source, split=split)
        self.need = need
        self.format = detect_format(self.records, need)
        self.tokenizer = tokenizer
        self.encoder = Encoder(tokenizer)

    def choose(self, template: str | PromptTemplate, *, default: str) -> None:
        self.renderer = choose_template(template, self.tokenizer, self.format, default=default)
        self.tally = Tally(
            source=self.records.source,
            format=self.format.name,
            columns=list(self.format.columns),
            template=self.renderer.name,
            num_rows=len(self.records),
        )

    def blocks(self, *, num_answers: int) -> Iterator[list[tuple[Row, Example]]]:
        """Examples with at least `num_answers` answers, BLOCK_ROWS at a time."""
        block: list[tuple[Row, Example]] = []
        for row in self.records:
            block += [(row, example) for example in self._examples(row, num_answers)]
            if len(block) >= BLOCK_ROWS:
                yield block
                block = []
        if block:
            yield block
        self._refuse_many_empty()

    def _examples(self, row: Row, num_answers: int) -> list[Example]:
        try:
            examples = parse_row(self.format, row)
        except DroppedRow as reason:
            self.tally.drop(str(reason), row.where)
            return []
        problems = [_problem(example, num_answers) for example in examples]
        for problem in filter(None, problems):
            self.tally.drop(problem, row.where)
        return [e for e, problem in zip(examples, problems, strict=True) if not problem]

    def _refuse_many_empty(self) -> None:
        for reason in (EMPTY_ANSWER, EMPTY_PROMPT):
            places = self.tally.dropped.get(reason, [])
            if len(places) > MAX_EMPTY_SHARE * len(self.records):
                raise DataError(
                    f"{self.records.source}: {len(places):,} of {len(self.records):,} rows come "
                    f"{reason} (first: {places[0]}). Up to {MAX_EMPTY_SHARE:.0%} are dropped; "
                    "more are taken for a mistake. Fill or remove them."
                )

    def prompt_ids(self, texts: list[str]) -> list[list[int]]:
        return self.encoder.prompts(texts, add_bos=self.renderer.adds_bos)

    def keeps(self, example: Example, prompt_ids: list[int], length: int, limit: int) -> bool:
        """Whether it fits; counted either way."""
        self.tally.lengths.append(length)
        if not prompt_ids:  # nothing could predict the answer's first token
            self.tally.drop(EMPTY_PROMPT, example.where)
        elif length > limit:
            self.tally.drop(f"longer than {limit:,} tokens", example.where)
        return bool(prompt_ids) and length <= limit

    def count_gold(self, example: Example) -> None:
        if example.gold is not None:
            count = self.tally.golds.get(example.gold_rule, 0)
            self.tally.golds[example.gold_rule] = count + 1

    def check(self, num_kept: int, limit: str) -> None:
        if num_kept:
            return
        reasons = ", ".join(f"{len(p):,} {reason}" for reason, p in self.tally.dropped.items())
        lengths = ""
        if self.tally.lengths:
            middle, _, longest = quantiles(self.tally.lengths)
            lengths = f" Their lengths: median {middle:,}, longest {longest:,} tokens; {limit}."
        raise DataError(
            f"{self.records.source}: none of {self.tally.num_rows:,} rows can be used as "
            f"{self.need} ({reasons}).{lengths} Raise the limit or mend the rows."
        )

    def check_ends_are_trained(self, columns: dict[str, list], max_length: int) -> None:
        """Refuse documents that would never teach the model to stop."""
        for ids, trained in zip(*columns.values(), strict=True):
            if not self.encoder.end_ids.isdisjoint(ids[trained].tolist()):
                return
        raise DataError(
            f"{self.records.source}: no document keeps its end-of-sequence token within "
            f"max_length={max_length}, so the model could not learn to stop. Raise max_length, or "
            "cut the documents into shorter ones."
        )

    def announce(self, num_kept: int, first: list[Run], say: Say | None) -> None:
        line = summary_line(self.tally, num_kept, self.need)
        announce(line, "first example", first, say)


def _problem(example: Example, num_answers: int) -> str:
    """Why the example is dropped; empty when it is fine."""
    contents = [a["content"].strip() or a.get("tool_calls", "") for a in example.answers]
    if len(contents) < num_answers:
        return "without an assistant turn"
    if example.gold == "":
        return EMPTY_ANSWER
    if example.turns and not example.turns[-1]["content"].strip():
        return EMPTY_PROMPT
    if num_answers and not all(contents):
        return EMPTY_ANSWER
    if num_answers == 2 and example.answers[0] == example.answers[1]:
        return "whose chosen equals rejected"
    return ""


def _runs(encoder: Encoder, ids: list[int], trained: list[bool]) -> list[Run]:
    """Neighbouring tokens that are alike in being trained, decoded together."""
    edges = [i for i in range(1, len(ids)) if trained[i] != trained[i - 1]]
    bounds = [0, *edges, len(ids)]
    return [(encoder.decode(ids[a:b]), bool(trained[a])) for a, b in itertools.pairwise(bounds)]
