"""Labelled data to token ids: single answers for KTO and its like, steps for process rewards.

answers = load_unpaired("data/kto.jsonl", tokenizer)
"""

import itertools
from dataclasses import replace
from typing import Any

from posttrain.data.columns import as_bools, as_ids, to_dataset
from posttrain.data.examples import Example, assistant
from posttrain.data.formats import STEPS, UNPAIRED
from posttrain.data.loader import Loader
from posttrain.data.records import Records, Source
from posttrain.data.summary import Say
from posttrain.data.templates import PromptTemplate
from posttrain.errors import DataError

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
