"""Alpaca's method: what it asks, and what it keeps of the answers."""

from collections import Counter

import pytest

from posttrain.self_instruct.filters import REASONS
from posttrain.self_instruct.methods import MAX_BARREN_REQUESTS, Alpaca
from posttrain.self_instruct.tasks import Task
from posttrain.self_instruct.teacher import Answer
from tests.self_instruct.conftest import make_seeds


def item(number: int, instruction: str, output: str = "an output", given: str = "") -> str:
    return (
        f"{number}. Instruction: {instruction}\n{number}. Input:\n{given or '<noinput>'}\n"
        f"{number}. Output:\n{output}\n###\n"
    )


def take(method: Alpaca, text: str, finish_reason: str = "stop") -> None:
    method.take(method.next_request(), Answer(text, finish_reason))


def reasons(method: Alpaca) -> list[str]:
    return [each.reason for each in method.made.rejected]


def test_a_request_shows_three_seeds_and_asks_for_tasks_4_to_20():
    request = Alpaca(make_seeds(), num_records=1).next_request()
    shown = [seed for seed in make_seeds() if seed.instruction in request.prompt]
    assert len(shown) == 3
    for number in (1, 2, 3):
        assert f"\n{number}. Instruction: " in request.prompt
    assert "continue with task 4 and go on to task 20" in request.prompt
    assert request.stop == ("\n21. ",)
    assert (request.temperature, request.top_p, request.max_tokens) == (1.0, 1.0, 3072)


def test_an_empty_input_is_shown_as_noinput():
    seeds = [Task(f"Do thing number {i}", "", f"out{i}") for i in range(8)]
    prompt = Alpaca(seeds, num_records=1).next_request().prompt
    assert prompt.count("Input:\n<noinput>\n") == 3


def test_requests_hang_on_the_seed_and_their_number_not_on_answers():
    one, other = (Alpaca(make_seeds(), num_records=9, seed=5) for _ in range(2))
    take(one, item(4, "Paint the old fence green"))
    other.next_request()
    assert one.next_request() == other.next_request()
    assert len({one.next_request().prompt for _ in range(9)}) > 5
    prompts = {Alpaca(make_seeds(), num_records=9, seed=s).next_request().prompt for s in range(9)}
    assert len(prompts) > 5


def test_what_passes_is_kept_in_order_with_its_three_fields():
    method = Alpaca(make_seeds(), num_records=9)
    take(method, item(4, "Paint the old fence green") + item(5, "Add all these up", "5", "2, 3"))
    take(method, item(4, "Whistle a short lively tune"))
    assert [task.record for task in method.made.records] == [
        {"instruction": "Paint the old fence green", "input": "", "output": "an output"},
        {"instruction": "Add all these up", "input": "2, 3", "output": "5"},
        {"instruction": "Whistle a short lively tune", "input": "", "output": "an output"},
    ]


@pytest.mark.parametrize(
    ("earlier", "text"),
    [
        ("", "Bake alpha0 beta0 gamma0 delta0"),  # like a seed: 4 of 5 and 4 tokens
        ("Paint the old fence green now", "Paint the old fence blue now"),  # like one kept
    ],
)
def test_instructions_like_a_seed_or_a_kept_one_are_rejected_within_one_answer(earlier, text):
    method = Alpaca(make_seeds(), num_records=9)
    take(method, (item(4, earlier) if earlier else "") + item(5, text))
    assert reasons(method) == ["too similar"]
    assert method.made.rejected[0].detail.startswith("ROUGE-L 0.8")
    assert len(method.made.records) == bool(earlier)


def test_a_rejected_instruction_does_not_block_a_later_one_like_it():
    method = Alpaca(make_seeds(), num_records=9)
    first, second = item(4, "Paint the old fence green", output=""), item(5, "Paint the old fence")
    take(method, first + second)
    assert reasons(method) == ["no output"]
    assert len(method.made.records) == 1


def test_of_an_answer_cut_by_length_only_the_last_item_is_lost():
    method = Alpaca(make_seeds(), num_records=9)
    take(method, item(4, "Paint the old fence green") + item(5, "Whistle a short tune"), "length")
    assert len(method.made.records) == 1
    assert reasons(method) == ["truncated"]


def test_every_item_is_kept_or_rejected_with_reason_source_and_text():
    texts = ["Paint the old fence green", "Too short", "Draw a cat and dog", "- a list of things"]
    method = Alpaca(make_seeds(), num_records=9)
    take(method, "".join(item(i, text) for i, text in enumerate(texts, start=4)))
    assert len(method.made.records) + len(method.made.rejected) == len(texts)
    for rejected in method.made.rejected:
        assert rejected.reason in REASONS
        assert rejected.source == "tasks-00000"
        assert "Instruction:" in rejected.text
    assert Counter(reasons(method)) == method.made.count_rejected()


def test_it_asks_until_there_are_records_enough():
    method = Alpaca(make_seeds(), num_records=2)
    take(method, item(4, "Paint the old fence green"))
    assert method.next_request() is not None
    take(method, item(4, "Whistle a short lively tune"))
    assert method.next_request() is None
    assert method.stopped == ""


def test_a_teacher_that_brings_nothing_is_not_asked_for_ever():
    method = Alpaca(make_seeds(), num_records=5)
    for _ in range(MAX_BARREN_REQUESTS):
        take(method, "I would rather not.")
    assert method.next_request() is None
    assert "20 answers in a row brought no record" in method.stopped


def test_a_request_without_an_answer_adds_no_item():
    method = Alpaca(make_seeds(), num_records=5)
    method.take(method.next_request(), Answer("", "failed", problem="HTTP 500"))
    assert not method.made.records
    assert not method.made.rejected
