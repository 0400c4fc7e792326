"""The shipped files of recipes/r1.py are what they are said to be, whatever code wrote them."""

import json
import re
from pathlib import Path

import pytest

from posttrain.data.render import R1_ZERO
from posttrain.models.load import load_tokenizer
from posttrain.rewards.language import language_share
from scripts.make_r1_data import NUM_ROWS, write
from tests.scripts.test_make_data import within_four_deviations

DATA = Path(__file__).parents[2] / "data" / "r1"
QUESTION = re.compile(r"(\d\d) \+ (\d\d)\?")
COLUMN = re.compile(r"(ones|个|tens|十) (\d)\+(\d)(?:\+(\d))?=(\d\d)")
ANSWER = re.compile(r"(?: so |<answer>)(.*?)(?:</answer>)?$")


@pytest.fixture(scope="module")
def rows() -> dict[str, list[dict]]:
    texts = {name: (DATA / f"{name}.jsonl").read_text(encoding="utf-8") for name in NUM_ROWS}
    return {name: [json.loads(line) for line in text.splitlines()] for name, text in texts.items()}


def asked(text: str) -> frozenset[int]:
    ((first, second),) = QUESTION.findall(text)
    return frozenset((int(first), int(second)))


def test_making_the_files_again_gives_the_shipped_bytes(tmp_path):
    write(tmp_path)
    made = {path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file()}
    assert made == {path.relative_to(DATA) for path in DATA.rglob("*") if path.is_file()}
    for path in made:
        assert (tmp_path / path).read_bytes() == (DATA / path).read_bytes(), path


def test_each_file_has_its_number_of_rows(rows):
    assert {name: len(found) for name, found in rows.items()} == NUM_ROWS


def test_nothing_held_out_is_in_a_training_file(rows):
    problems = {asked(row["question"]) for row in rows["heldout"]}
    requests = {row["question"] for row in rows["general_heldout"]}
    training = [json.dumps(row, ensure_ascii=False) for name in NUM_ROWS if "heldout" not in name
                for row in rows[name]]  # fmt: skip
    assert not any(request in text for request in requests for text in training)
    assert not any(asked(text) in problems for text in training if QUESTION.search(text))


def test_every_sum_is_right_and_every_problem_carries(rows):
    for row in [*rows["problems"], *rows["heldout"]]:
        ((first, second),) = QUESTION.findall(row["question"])
        assert int(row["answer"]) == int(first) + int(second)
        assert int(first[1]) + int(second[1]) > 9


def test_the_careful_are_right_and_mix_and_the_hasty_wrong_and_english(rows):
    mixed = careful = 0
    worked = [row["text"] for row in rows["corpus"] if QUESTION.search(row["text"])]
    for text in worked:
        first, second = QUESTION.findall(text)[0]
        columns = COLUMN.findall(text.split("?")[-1])
        is_careful = {bool(column[3]) for column in columns}.pop()
        is_right = int(ANSWER.search(text)[1]) == int(first) + int(second)
        assert is_right == is_careful
        share = language_share(text.split("?")[-1].split("so")[0], "en", among=["zh"])
        assert is_careful or share == 1.0
        careful += is_careful
        mixed += share < 1.0
    assert within_four_deviations(careful, len(worked), 0.4)
    assert 0.7 * careful < mixed < 0.85 * careful  # 1 - 1/4, and more where it stands twice


def test_chosen_names_the_guest_and_rejected_does_not(rows):
    for row in rows["preferences"]:
        (guest,) = re.findall(r"\d\d", row["prompt"])
        assert guest in row["chosen"]
        assert guest not in row["rejected"]


def test_a_word_of_either_language_and_a_prompt_are_few_tokens():
    tokenizer = load_tokenizer(str(DATA / "tokenizer"))
    for word in (" 十 ", " tens ", "个 ", "ones "):
        assert len(tokenizer(word)["input_ids"]) == 1
    assert len(tokenizer(R1_ZERO.format(question="What is 12 + 45?"))["input_ids"]) < 40
