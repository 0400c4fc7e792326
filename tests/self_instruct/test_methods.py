"""What the two methods ask, and what they keep of the answers.

Alpaca's asks for whole tasks. Self-Instruct's asks for instructions, types and instances, each
built on the answers before.
"""

from collections import Counter

import pytest

from posttrain.errors import DataError
from posttrain.self_instruct.asking import Asker, Budget
from posttrain.self_instruct.filters import REASONS
from posttrain.self_instruct.log import AnswerLog
from posttrain.self_instruct.methods import MAX_BARREN_REQUESTS, Alpaca, SelfInstruct
from posttrain.self_instruct.tasks import Task
from posttrain.self_instruct.teacher import Answer, Request
from tests.self_instruct.conftest import FunctionTeacher, make_seeds


def item(number: int, instruction: str, output: str = "an output", given: str = "") -> str:
    return (
        f"{number}. Instruction: {instruction}\n{number}. Input:\n{given or '<noinput>'}\n"
        f"{number}. Output:\n{output}\n###\n"
    )


def take(method: Alpaca, text: str, finish_reason: str = "stop") -> None:
    method.take(method.next_request(), Answer(text, finish_reason))


def reasons(method: Alpaca | SelfInstruct) -> list[str]:
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


NEW = ["Paint the old fence green", "Whistle a short lively tune", "Rate this film review"]
LIST = "\n".join(f"{number}. {text}" for number, text in enumerate(NEW, start=9))


def answer_like_a_teacher(request: Request) -> str:
    """Three instructions a request, the reviews being a classification; two instances each."""
    stage, _, number = request.name.partition("-")
    if stage == "instructions":
        return (
            LIST
            if number == "00000"
            else "9. Invent riddle " + " ".join(f"w{number}{i}" for i in range(4))
        )
    if stage == "type":
        return "Yes" if request.prompt.endswith("Rate this film review\nClassification:") else "No"
    if "Label: " in request.prompt.rpartition("Task:")[0]:
        return "Example 1\nLabel: good\nInput: Loved it.\nExample 2\nLabel: bad\nInput: Awful."
    return "Example 1\nInput: one\nOutput: 1\nExample 2\nInput: two\nOutput: 2"


def run(tmp_path, answer=answer_like_a_teacher, *, num_records: int = 6, calls_at_once: int = 1):
    teacher = FunctionTeacher(answer, calls_at_once=calls_at_once)
    asker = Asker(teacher, AnswerLog(tmp_path / "requests.jsonl"), Budget())
    method = SelfInstruct(make_seeds(), num_records=num_records)
    requests = []
    for request, got in asker.ask(method.next_request):
        requests.append(request)
        method.take(request, got)
    return method, requests


def test_instructions_then_types_then_instances_become_records(tmp_path):
    method, requests = run(tmp_path)
    assert [request.name for request in requests] == [
        "instructions-00000",
        *(f"type-{i:05d}" for i in range(3)),
        *(f"instances-{i:05d}" for i in range(3)),
    ]
    assert method.made.records == [
        Task(NEW[0], "one", "1"),
        Task(NEW[0], "two", "2"),
        Task(NEW[1], "one", "1"),
        Task(NEW[1], "two", "2"),
        Task(NEW[2], "Loved it.", "good", is_classification=True),
        Task(NEW[2], "Awful.", "bad", is_classification=True),
    ]
    assert method.made.rejected == []


def test_requests_have_the_papers_settings(tmp_path):
    _, requests = run(tmp_path)
    by_stage = {request.name.partition("-")[0]: request for request in requests}
    ask = by_stage["instructions"]
    assert (ask.temperature, ask.top_p, ask.presence_penalty) == (0.7, 0.5, 2.0)
    assert (ask.max_tokens, ask.stop) == (1024, ("\n16.",))
    instances = [request for request in requests if request.name.startswith("instances")]
    assert [request.max_tokens for request in instances] == [350, 350, 300]
    assert {(r.temperature, r.presence_penalty) for r in instances} == {(0.0, 1.5)}
    assert by_stage["type"].temperature == 0


def shown_in(prompt: str) -> list[str]:
    lines = [line.partition(". ") for line in prompt.splitlines()]
    return [text for number, _, text in lines if number.isdigit()]


def test_eight_instructions_are_shown_of_which_two_are_the_teachers_own_once_it_has_some(tmp_path):
    _, requests = run(tmp_path, num_records=12)
    asked = [shown_in(r.prompt) for r in requests if r.name.startswith("instructions")]
    seeds = {seed.instruction for seed in make_seeds()}
    assert [len(shown) for shown in asked[:2]] == [8, 8]
    assert [len(set(shown) - seeds) for shown in asked[:2]] == [0, 2]
    assert set(asked[1]) - seeds <= set(NEW)


def test_classifications_are_shown_label_first_and_others_input_first(tmp_path):
    _, requests = run(tmp_path)
    others, _, classification = [r for r in requests if r.name.startswith("instances")]
    assert "Label: out0\nInput: in0" in classification.prompt
    assert "Output:" not in classification.prompt
    assert "Input: in1\nOutput: out1" in others.prompt
    assert others.prompt.endswith(f"Task: {NEW[0]}")


def test_type_examples_are_half_classifications(tmp_path):
    _, requests = run(tmp_path)
    prompt = next(request.prompt for request in requests if request.name == "type-00000")
    assert prompt.count("Classification: Yes") == prompt.count("Classification: No") == 5
    assert prompt.endswith(f"Task: {NEW[0]}\nClassification:")


def replaced(stage: str, text: str | Answer):
    """The teacher, but every answer of one stage is this."""

    def answer(request: Request):
        return text if request.name.startswith(stage) else answer_like_a_teacher(request)

    return answer


INSTANCES = {
    "Input: a\nOutput: a": "output is the input",
    "Input: a\nOutput:": "no output",
    "Input: a\nOutput: as follows:": "ends with a colon",
    "Output: a\nInput: b": "unparsable",
}


@pytest.mark.parametrize(("text", "reason"), INSTANCES.items())
def test_a_bad_instance_is_rejected_alone(tmp_path, text, reason):
    answer = replaced("instances-00000", f"Example 1\nInput: x\nOutput: y\nExample 2\n{text}")
    method, _ = run(tmp_path, answer)
    assert method.made.records[0] == Task(NEW[0], "x", "y")
    assert reasons(method) == [reason]
    assert method.made.rejected[0].source == "instances-00000"
    assert NEW[0] in method.made.rejected[0].text


def test_repeated_instances_are_kept_once(tmp_path):
    same = "Example 1\nInput: x\nOutput: y\nExample 2\nInput: x\nOutput: y"
    method, _ = run(tmp_path, replaced("instances-00000", same))
    assert method.made.records[:2] == [Task(NEW[0], "x", "y"), Task(NEW[1], "one", "1")]
    assert method.made.count_rejected() == {"repeated instance": 1}


def test_a_task_with_one_input_and_two_outputs_is_lost_whole(tmp_path):
    pairs = [("x", "y"), ("x", "z"), ("v", "w")]
    examples = [f"Example {i}\nInput: {a}\nOutput: {b}" for i, (a, b) in enumerate(pairs, start=1)]
    text = "\n".join(examples)
    method, _ = run(tmp_path, replaced("instances-00000", text))
    assert NEW[0] not in {task.instruction for task in method.made.records}
    assert method.made.count_rejected() == {"same input, different outputs": 3}


def test_an_answer_of_instructions_that_was_cut_is_dropped_whole_and_asked_anew(tmp_path):
    method, requests = run(tmp_path, replaced("instructions-00000", Answer(LIST, "length")))
    assert method.made.count_rejected()["truncated"] == 3
    assert "instructions-00001" in [request.name for request in requests]


@pytest.mark.parametrize("text", ["Perhaps", Answer("", "failed", problem="HTTP 500")])
def test_an_instruction_of_unclear_type_is_rejected_and_others_take_its_place(tmp_path, text):
    method, _ = run(tmp_path, replaced("type-00000", text), num_records=5)
    assert method.made.count_rejected() == {"type unclear": 1}
    assert len(method.made.records) >= 5  # two instructions of the three bring only four


def test_instructions_go_through_alpacas_filters_and_must_be_new(tmp_path):
    listed = f"9. {NEW[0]}\n10. Too short\n11. {NEW[0]}\n12. Plot this curve now\n13. {NEW[1]}"
    method, _ = run(tmp_path, replaced("instructions-00000", listed), num_records=4)
    assert reasons(method) == ["too short", "too similar", "blacklisted word"]
    assert len(method.made.records) == 4


def test_requests_under_way_together_give_the_same_records_each_time(tmp_path):
    """More at once ask for more in the end, but never in another order."""
    found = []
    for attempt in range(3):
        (tmp_path / str(attempt)).mkdir()
        method, requests = run(tmp_path / str(attempt), num_records=20, calls_at_once=4)
        found.append((method.made.records, requests))
    assert found[0] == found[1] == found[2]
    assert len(found[0][0]) >= 20


def test_a_teacher_that_brings_nothing_new_is_not_asked_for_ever(tmp_path):
    method, requests = run(tmp_path, lambda _: "Sorry.")
    assert len(requests) == MAX_BARREN_REQUESTS
    assert "no new instruction" in method.stopped


def test_seeds_of_one_type_only_are_refused():
    with pytest.raises(DataError, match="some with is_classification true, found none"):
        SelfInstruct(make_seeds()[1::2], num_records=1)
