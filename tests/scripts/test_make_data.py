"""The shipped files are what they are said to be, row by row, whatever code wrote them.

Shares of random draws are allowed four standard deviations.
"""

import json
import random
import re
from pathlib import Path
from typing import NamedTuple

import pytest

from posttrain.data.render import R1_ZERO
from posttrain.models.load import load_tokenizer
from posttrain.rewards.format import is_think_answer
from posttrain.rewards.math import verify_math
from scripts.make_data import (
    BARE_SHARE,
    CAREFUL_SHARE,
    CHECK_SHARE,
    INPUT_SHARE,
    NUM_ROWS,
    THINK_SHARE,
    write,
)

DATA = Path(__file__).parents[2] / "data"
TRAINING = ("corpus", "sft", "preferences", "problems", "checked", "steps")
QUESTION = re.compile(r"(?<!\d)(\d{3}) \+ (\d{3})(?!\d)")
COLUMN = re.compile(r"(\d)\+(\d)(?:\+(\d))?=(\d\d)")
SUM = re.compile(r"(?: so |<answer>)(\d+)")


class Worked(NamedTuple):
    """A solution taken apart: columns of (digit, digit, carry, total) as text, from the right.

    The carry is empty where the writer wrote none down.
    """

    first: int
    second: int
    columns: list[tuple[str, ...]]
    written: int

    @property
    def is_right(self) -> bool:
        return self.written == self.first + self.second

    @property
    def is_careful(self) -> bool:
        """Whether carries are written down; a writer does it in every column or in none."""
        (careful,) = {carry != "" for *_, carry, _ in self.columns}
        return careful


@pytest.fixture(scope="module")
def rows() -> dict[str, list[dict]]:
    names = (*TRAINING, "heldout", "sft_heldout", "preferences_heldout")
    files = {name: (DATA / f"{name}.jsonl").read_text(encoding="utf-8") for name in names}
    return {name: [json.loads(line) for line in text.splitlines()] for name, text in files.items()}


def numbers(text: str) -> tuple[int, int]:
    """The one problem that a text asks."""
    ((first, second),) = QUESTION.findall(text)
    return int(first), int(second)


def worked(question: str, solution: str) -> Worked:
    (written,) = SUM.findall(solution)
    return Worked(*numbers(question), COLUMN.findall(solution), int(written))


@pytest.fixture(scope="module")
def solutions(rows) -> dict[str, list[Worked]]:
    """Every solution of the corpus and of the SFT data."""
    return {
        "corpus": [worked(row["text"], row["text"]) for row in rows["corpus"]],
        "sft": [worked(row["instruction"] + row["input"], row["output"]) for row in rows["sft"]],
    }


def within_four_deviations(count: int, total: int, share: float) -> bool:
    return abs(count - total * share) <= 4 * (total * share * (1 - share)) ** 0.5


def test_making_the_files_again_gives_the_shipped_bytes(tmp_path):
    write(tmp_path)
    made = {path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file()}
    shipped = {path.relative_to(DATA) for path in DATA.rglob("*") if path.is_file()}
    shipped = {path for path in shipped if path.parts[0] != "r1"}  # see test_make_r1_data.py
    written = {"README.md", "code_problems.jsonl", "seed_tasks.jsonl", "self_instruct_replay.jsonl"}
    assert shipped == made | {Path(name) for name in written}
    for path in made:
        assert (tmp_path / path).read_bytes() == (DATA / path).read_bytes(), path


def test_each_file_has_its_number_of_rows(rows):
    assert {name: len(found) for name, found in rows.items()} == NUM_ROWS


def test_no_held_out_problem_is_in_any_training_file_in_either_order(rows):
    held_out = {frozenset(numbers(row["question"])) for row in rows["heldout"]}
    assert len(held_out) == len(rows["heldout"]) >= 256
    for name in TRAINING:
        for number, row in enumerate(rows[name], start=1):
            asked = {frozenset(map(int, pair)) for pair in QUESTION.findall(json.dumps(row))}
            assert len(asked) == 1, (name, number)
            assert not asked & held_out, (name, number)


def test_held_out_records_and_pairs_ask_held_out_problems(rows):
    held_out = {numbers(row["question"]) for row in rows["heldout"]}
    assert {numbers(row["instruction"]) for row in rows["sft_heldout"]} <= held_out
    assert {numbers(row["prompt"]) for row in rows["preferences_heldout"]} <= held_out


def test_questions_come_with_their_sum(rows):
    for name in ("problems", "heldout"):
        for row in rows[name]:
            assert row["answer"] == str(sum(numbers(row["question"])))
            assert len(row["answer"]) == 3


def test_every_working_adds_its_own_columns_and_writes_down_what_they_give(rows, solutions):
    """A hasty writer knows of no carries, and makes no other mistake."""
    pairs = [
        worked(row["prompt"], row[name])
        for row in rows["preferences"]
        for name in ("chosen", "rejected")
    ]
    for solution in [*solutions["corpus"], *solutions["sft"], *pairs]:
        due = 0
        for place, (one, other, carry, total) in zip((1, 10, 100), solution.columns, strict=True):
            assert int(one) == solution.first // place % 10
            assert int(other) == solution.second // place % 10
            assert carry in ("", str(due))
            assert int(total) == int(one) + int(other) + int(carry or 0)
            due = int(total) // 10
        units, tens, hundreds = (int(total) for *_, total in solution.columns)
        assert solution.written == hundreds * 100 + tens % 10 * 10 + units % 10


def test_chosen_is_careful_and_right_rejected_hasty_and_wrong_and_both_well_formed(rows):
    for row in rows["preferences"]:
        answer = str(sum(numbers(row["prompt"])))
        assert is_think_answer(row["chosen"])
        assert is_think_answer(row["rejected"])
        assert verify_math(answer, row["chosen"]).score == 1.0
        assert verify_math(answer, row["rejected"]).score == 0.0
        assert worked(row["prompt"], row["chosen"]).is_careful
        assert not worked(row["prompt"], row["rejected"]).is_careful


def test_checked_answers_are_right_and_most_hold_their_working_twice(rows):
    twice = 0
    for row in rows["checked"]:
        working, answer = row["output"].removesuffix("</answer>").split("</think><answer>")
        once = working.removeprefix("<think>")[: len("7+5+0=12 4+8+1=13 3+2+1=06")]
        solution = worked(row["instruction"], f"{once}<answer>{answer}")
        assert solution.is_right
        assert solution.is_careful
        assert is_think_answer(row["output"])
        assert working in (f"<think>{once}", f"<think>{once} {once}")
        twice += working.endswith(f" {once}")
    assert within_four_deviations(twice, len(rows["checked"]), CHECK_SHARE)


def test_the_stated_shares_hold(rows):
    opening = R1_ZERO.partition("{question}")[0]
    prompted = [r["text"].removeprefix(opening) for r in rows["corpus"] if opening in r["text"]]
    thought = sum("<think>" in text for text in prompted)
    corpus = len(rows["corpus"])
    assert within_four_deviations(thought, corpus, THINK_SHARE)
    assert within_four_deviations(len(prompted) - thought, corpus, BARE_SHARE)
    assert sum(row["text"].startswith("Q: ") for row in rows["corpus"]) == corpus - len(prompted)
    with_input = sum(row["input"] != "" for row in rows["sft"])
    assert within_four_deviations(with_input, len(rows["sft"]), INPUT_SHARE)
    assert all(is_think_answer(row["output"]) for row in rows["sft"])


@pytest.mark.parametrize("name", ["corpus", "sft"])
def test_the_stated_share_of_writers_is_careful(solutions, name):
    careful = sum(solution.is_careful for solution in solutions[name])
    assert within_four_deviations(careful, len(solutions[name]), CAREFUL_SHARE)


@pytest.mark.parametrize("name", ["corpus", "sft"])
def test_the_careful_are_always_right_and_the_hasty_never(solutions, name):
    for solution in solutions[name]:
        assert solution.is_right == solution.is_careful


# The tokenizer.


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(str(DATA / "tiny_tokenizer"))


def encode(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def random_text(draw: random.Random) -> str:
    """Characters of every plane but the surrogates, with digits, tags and blanks among them."""
    plane = [(0, 0x80), (0x80, 0x800), (0x800, 0xD800), (0xE000, 0x110000)]
    pieces = [chr(draw.randrange(*draw.choice(plane))) for _ in range(40)]
    return "".join([*pieces, *draw.choices(["12", "<think>", "\n", "  ", " + ", "="], k=10)])


def test_any_text_survives_the_tokenizer(tokenizer):
    draw = random.Random(0)
    every_byte = "".join(chr(code) for code in range(0x250))
    for text in [every_byte, "", " a", "a ", "\r\n\t", *(random_text(draw) for _ in range(200))]:
        assert tokenizer.decode(encode(tokenizer, text)) == text


def test_every_byte_has_a_token(tokenizer):
    """Each of the 256 letters of the byte alphabet alone, so that no text needs an unknown."""
    from tokenizers.pre_tokenizers import ByteLevel

    assert set(ByteLevel.alphabet()) <= set(tokenizer.get_vocab())
    assert tokenizer.unk_token is None


def test_digits_are_single_tokens_wherever_they_stand(tokenizer):
    digits = {str(digit): encode(tokenizer, str(digit)) for digit in range(10)}
    assert {len(ids) for ids in digits.values()} == {1}
    for text in ("What is 123 + 456?", "7+5+0=12", "so 579", "<answer>1032</answer>"):
        ids = encode(tokenizer, text)
        written = [digit for digit in text if digit.isdigit()]
        read = [token for token in ids if [token] in digits.values()]
        assert [tokenizer.decode([token]) for token in read] == written


def test_prompts_and_tags_are_short(tokenizer):
    """The R1-Zero prompt of a three-digit problem takes fewer than 48 tokens."""
    assert len(encode(tokenizer, R1_ZERO.format(question="What is 123 + 456?"))) < 48
    for tag in ("<think>", "</think>", "<answer>", "</answer>", " + "):
        assert len(encode(tokenizer, tag)) == 1
